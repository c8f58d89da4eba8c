"""Naive and annealed Langevin dynamics on a mixture with a rare mode (RCG figure 2.6).

    uv run python benchmarks/annealing.py

The target is two distant Gaussians of weights 0.8 and 0.2, in closed form; chains start uniformly
in a square. Naive chains go to the nearer mode and stay there, so the shares of the modes are
those of the start. Annealed chains reach the weights of the mixture. Both use the same number of
score evaluations. Writes ``benchmarks/results/annealing.json`` and
``docs/images/naive-annealed.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit import GaussianMixture
from ebmkit.plots import BLUE, GRAY, ORANGE, new_figure, save_figure
from ebmkit.sampling import (
    AnnealedLangevin,
    Chains,
    Langevin,
    Sampler,
    geometric_sigmas,
    score_of,
)
from ebmkit.sampling.langevin import AnnealedConfig
from ebmkit.storage import write_atomically

RESULTS = Path(__file__).parent / "results" / "annealing.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "naive-annealed.png"
SPAN = 8.0
SHARES = (0.8, 0.2)
LEVELS, INNER = 100, 30


def rare_mode() -> GaussianMixture:
    """Frequent mode at (5, 5), rare mode at (-5, -5), standard deviation 1 (Song & Ermon 2019)."""
    means = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    return GaussianMixture(means, 1.0, weights=SHARES)


def shares_of_modes(model: GaussianMixture, x: Tensor) -> list[float]:
    """Mean posterior of each mode over the samples; its expectation is the weight of the mode."""
    shares: list[float] = model.logits(x).softmax(1).mean(0).tolist()
    return shares


def measure(
    chains: int, seed: int, levels: int = LEVELS, inner: int = INNER
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shares of the modes after equally many steps, and the final samples."""
    model = rare_mode()
    # the highest level merges the modes; the last adds about a tenth to their variance of 1
    sigmas = geometric_sigmas(20.0, 0.3, levels)
    config = AnnealedConfig(steps=levels * inner, inner=inner, rate=0.2)
    annealed = AnnealedLangevin(score_of(model), sigmas, config)
    samplers: dict[str, Sampler[Any]] = {
        "naive": Langevin(score_of(model), 0.05),
        "annealed": annealed,
    }
    exact, _ = model.sample(chains, torch.Generator().manual_seed(seed))
    ends = {"exact": exact}
    for name, sampler in samplers.items():
        generator = torch.Generator().manual_seed(seed + 1)
        start = SPAN * (2 * torch.rand(chains, 2, generator=generator) - 1)
        ends[name] = Chains(sampler, sampler.init(start)).run(annealed.steps, generator).x
    error = (SHARES[0] * SHARES[1] / chains) ** 0.5
    document = {
        "chains": chains,
        "seed": seed,
        "steps": annealed.steps,
        "weights": SHARES,
        "standard_error": error,
        "shares": {name: shares_of_modes(model, x) for name, x in ends.items()},
    }
    return document, ends


def draw(document: dict[str, Any], ends: dict[str, Tensor], path: Path) -> None:
    """Plot the final samples, with the share of the rare mode."""
    figure = new_figure(9.6, 4.3, layout="constrained")
    titles = {
        "exact": "the mixture",
        "naive": "naive Langevin",
        "annealed": "annealed Langevin",
    }
    for i, (name, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 3, i + 1)
        x, share = ends[name][:1500], document["shares"][name]
        near = (x.sum(1) < 0).tolist()
        colours = [ORANGE if rare else BLUE for rare in near]
        axes.scatter(x[:, 0], x[:, 1], s=3, c=colours, alpha=0.5, linewidths=0)
        axes.set(xlim=(-SPAN - 1, SPAN + 1), ylim=(-SPAN - 1, SPAN + 1), aspect="equal")
        axes.set_title(f"{title}\nrare mode: {share[1]:.1%}", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.plot([-SPAN, SPAN], [SPAN, -SPAN], color=GRAY, lw=0.7, ls=":")
    figure.supxlabel(
        f"{document['chains']} chains started evenly over the square of side {2 * SPAN:g}; "
        f"{document['steps']} steps each (1500 chains drawn)",
        fontsize=8.5,
    )
    save_figure(figure, path)


def main() -> None:
    """Measure, and write the results and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    document, ends = measure(options.chains, options.seed)
    write_atomically(RESULTS, (json.dumps(document, indent=1) + "\n").encode())
    draw(document, ends, PICTURE)
    for name, (frequent, rare) in document["shares"].items():
        print(f"{name:10}{frequent:8.3f}{rare:8.3f}")


if __name__ == "__main__":
    main()
