"""Accuracy of `heun` and `ddim`, and weights of `ais`, on a mixture of a Gaussian per digit.

    uv run python benchmarks/annealed.py

The mixture is fitted to scikit-learn's digits (64 entries; 1e-5 is added to the covariances), so
its density is exact at every noise level and is normalised: log Z is 0. The error of a
deterministic sampler is the root mean square difference to Heun's method with 640 levels from the
same start, as a share of the standard deviation of the digits. Writes
``benchmarks/results/annealed.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from ebmkit import GaussianMixture
from ebmkit.data import load_dataset
from ebmkit.noise import make_schedule
from ebmkit.sampling import (
    AIS,
    DDIM,
    Chains,
    Heun,
    denoiser_of,
    density_of,
    geometric_sigmas,
    karras_sigmas,
    noise_predictor_of,
)
from ebmkit.sampling.annealed import AnnealedMALAConfig
from ebmkit.sampling.diagnostics import importance
from ebmkit.storage import write_atomically

RESULTS = Path(__file__).parent / "results" / "annealed.json"
HIGH, LOW, CHAINS = 40.0, 0.01, 500


def mixture() -> GaussianMixture:
    """A Gaussian per digit, of their frequencies, float64."""
    train = load_dataset("digits", None, "train")
    own = [train.floats()[train.labels == c].double() for c in range(10)]
    spread = 1e-5 * torch.eye(64, dtype=torch.float64)
    return GaussianMixture(
        torch.stack([x.mean(0) for x in own]),
        torch.stack([torch.cov(x.flatten(1).T) + spread for x in own]),
        [len(x) for x in own],
    )


def run(sampler: Any, x: torch.Tensor, seed: int = 1) -> Any:
    """Last state of the chains of ``sampler`` that start at ``x``."""
    chains = Chains(sampler, sampler.init(x))
    return chains.run(sampler.steps, torch.Generator().manual_seed(seed))


def start(level: float, count: int) -> torch.Tensor:
    """Gray images with noise of ``level``."""
    generator = torch.Generator().manual_seed(0)
    shape = count, 1, 8, 8
    return 0.5 + level * torch.randn(shape, generator=generator, dtype=torch.float64)


def flow_errors(model: GaussianMixture, count: int = 100) -> list[dict[str, Any]]:
    """Error of both samplers, by number of denoisings."""
    denoiser, schedule = denoiser_of(model), make_schedule("linear")
    spread, found = float(load_dataset("digits", None, "train").floats().std(0).mean()), []
    predictor, exact = noise_predictor_of(denoiser, schedule), dict[float, torch.Tensor]()
    for denoisings in (19, 39, 79, 159):
        levels = (denoisings + 1) // 2
        heun = Heun(denoiser, karras_sigmas(HIGH, 0.001, levels))
        timesteps = schedule.within(schedule.timesteps(1000), (0.005, HIGH))
        chosen = torch.linspace(0, len(timesteps) - 1, denoisings).round().long().tolist()
        ddim = DDIM(predictor, schedule, [timesteps[i] for i in chosen])
        for name, sampler in (("heun", heun), ("ddim", ddim)):
            x = start(high := sampler.sigmas[0], count)
            if high not in exact:
                exact[high] = run(Heun(denoiser, karras_sigmas(high, 0.001, 640)), x).x
            error = (run(sampler, x).x - exact[high]).square().mean().sqrt() / spread
            found.append({"sampler": name, "denoisings": denoisings, "error": float(error)})
            print(found[-1], flush=True)
    return found


def weights(model: GaussianMixture) -> list[dict[str, Any]]:
    """Estimates of log Z, by number of levels and of MALA moves at each."""
    found = []
    for steps, moves in ((100, 1), (200, 0), (200, 1), (400, 1)):
        levels = geometric_sigmas(HIGH, LOW, steps + 1)
        sampler = AIS(density_of(model), levels, AnnealedMALAConfig(steps=steps, moves=moves))
        begun = time.monotonic()
        estimate = importance(run(sampler, start(HIGH, CHAINS)).log_weight)
        seconds = round(time.monotonic() - begun, 1)
        row = {"steps": steps, "moves": moves, **estimate._asdict(), "seconds": seconds}
        found.append({**row, "chains": CHAINS})
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure both."""
    model = mixture()
    document = {"flow": flow_errors(model), "ais": weights(model)}
    write_atomically(RESULTS, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
