"""Normalised densities of trained networks on labelled mixtures, against the exact ones.

    python benchmarks/densities.py --out benchmarks/results/densities.json

Preconditioned perceptrons are trained by sums of ``ce``, ``dsm``, ``tsm`` and ``diffclf`` on fresh
samples of a mixture of Gaussians, at all noise levels. Their constant is fixed by the samples
(`PreconditionedModel.anchor`), not by the truth. Measured are

- the error of log p_sigma(y), in nats: its mean and root mean square over noisy samples;
- the mass of each mode at the lowest noise level, the mean of p / p_true over samples of the truth
  that come from the mode, and its share of all.

Three mixtures: ``plane`` (d = 2) and ``space`` (d = 16) have three modes and two labels; ``modes``
has two modes, 12 standard deviations apart, of weights 0.8 and 0.2.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ebmkit import GaussianMixture
from ebmkit.data import Batch
from ebmkit.models import MLP, JointModel, LinearHead, MLPConfig, PreconditionedModel
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.terminal import counting

SIGMA_MIN, SIGMA_MAX = 0.02, 4.0
SAMPLES = 10_000


class Setting(NamedTuple):
    """A training run."""

    mixture: str
    objective: str
    steps: int
    batch: int
    width: int
    lr: float = 5e-3


SETTINGS = (
    Setting("plane", "ce+dsm+tsm", 4000, 512, 96),
    Setting("space", "ce+dsm+tsm", 4000, 512, 128),
    Setting("modes", "dsm", 2500, 256, 64),
    Setting("modes", "dsm+tsm", 2500, 256, 64),
    Setting("modes", "dsm+4*diffclf", 2500, 256, 64),
)


def make_mixture(name: str, by_mode: bool = False) -> GaussianMixture:
    """The mixture called ``name``, on pixels with d channels; ``by_mode``: each mode is a label."""
    generator = torch.Generator().manual_seed(1)
    if name == "modes":
        means = torch.tensor([[0.2, 0.5], [0.8, 0.5]])
        return GaussianMixture(means[..., None, None], 0.05**2, weights=[0.8, 0.2]).eval()
    if name == "plane":
        means = torch.tensor([[0.25, 0.3], [0.7, 0.35], [0.5, 0.75]])
        entries = [[0.010, 0.004, 0.006], [0.004, 0.0, 0.012], [0.006, -0.002, 0.006]]
        covariances = torch.stack([torch.tensor([[a, b], [b, c]]) for a, b, c in entries])
    else:
        means = 0.5 + 0.1 * torch.randn(3, 16, generator=generator)
        axes = torch.linalg.qr(torch.randn(3, 16, 16, generator=generator))[0]
        covariances = axes @ torch.diag(torch.logspace(-2.5, -1.5, 16)) @ axes.mT
    weights, labels = [0.5, 0.3, 0.2], None if by_mode else [0, 1, 1]
    return GaussianMixture(means[..., None, None], covariances, weights, labels).eval()


def draw(truth: GaussianMixture, count: int, generator: torch.Generator) -> Batch:
    """A batch of fresh samples at noise levels uniform in log sigma."""
    x, labels = truth.sample(count, generator)
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** torch.rand(count, generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    soft = torch.nn.functional.one_hot(labels, truth.num_classes).float()
    return Batch(x, x + sigma[:, None, None, None] * eps, sigma, eps, labels, soft)


def train(setting: Setting, truth: GaussianMixture, seed: int = 0) -> PreconditionedModel:
    """Train and normalise a preconditioned perceptron."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = truth.sample(2000, generator)
    mean = images.mean(0).flatten()
    std = float((images - mean[:, None, None]).square().mean().sqrt())
    config = MLPConfig(width=setting.width, depth=4, noise_conditional=True)
    head = LinearHead(setting.width, truth.num_classes)
    network = JointModel(MLP(len(mean), config), head, in_channels=len(mean))
    torch.nn.init.zeros_(head.density.weight)
    model = PreconditionedModel(network, tuple(mean.tolist()), std, SIGMA_MIN, gamma=0.0)
    loss = TrainingLoss(model, parse_objective(setting.objective), streams={"ce": "denoise"})
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, betas=(0.9, 0.99))
    rule = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rule)
    with counting(f"{setting.mixture}, {setting.objective}") as shown:
        for step in range(setting.steps):
            shown(step, setting.steps)
            done = step / setting.steps
            rate = min(1.0, (step + 1) / 50, 2 * (1 - done))  # warm-up, constant, linear decay
            optimizer.param_groups[0]["lr"] = setting.lr * rate
            found = loss({"denoise": draw(truth, setting.batch, generator)})
            optimizer.zero_grad()
            found.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.update_running(found.parts)
            average.update_parameters(model)
    trained = average.module.eval().requires_grad_(False)
    trained.anchor(images, SIGMA_MAX, labels, generator)
    return trained


def measure(
    model: PreconditionedModel, truth: GaussianMixture, modes: GaussianMixture, seed: int = 1
) -> dict[str, object]:
    """Errors of log p by noise level, and weights of the modes."""
    generator = torch.Generator().manual_seed(seed)
    x, mode = modes.sample(SAMPLES, generator)
    errors: dict[str, dict[str, float]] = {}
    for sigma in torch.logspace(math.log10(SIGMA_MIN), math.log10(SIGMA_MAX), 8):
        y = x + sigma * torch.randn(x.shape, generator=generator)
        error = model.normalized_log_density(y, sigma) - truth.log_density(y, sigma)
        mean, rms = float(error.mean()), float(error.square().mean().sqrt())
        errors[f"{float(sigma):.3g}"] = {"mean": round(mean, 4), "rms": round(rms, 4)}
    sigma = torch.tensor(SIGMA_MIN)
    y = x + sigma * torch.randn(x.shape, generator=generator)
    ratio = (model.log_density(y, sigma) - truth.log_density(y, sigma)).double().exp()
    masses = [float((ratio * (mode == k)).mean()) for k in range(len(truth.means))]
    return {
        "constant_error": float(f"{float(model.constant_error):.2g}"),
        "errors": errors,
        "weights": [round(mass / sum(masses), 4) for mass in masses],
        "mass": round(sum(masses), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only these, as plane or dsm+tsm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    for setting in (own for own in SETTINGS if arguments.only in " ".join(own[:2])):
        truth, modes = (make_mixture(setting.mixture, by_mode) for by_mode in (False, True))
        start = time.process_time()
        model = train(setting, truth)
        seconds = round(time.process_time() - start, 1)
        row = {**setting._asdict(), "cpu_seconds": seconds, **measure(model, truth, modes)}
        print(json.dumps(row), flush=True)
        runs = [own for own in runs if (own["mixture"], own["objective"]) != setting[:2]] + [row]
        document = {"sigma": [SIGMA_MIN, SIGMA_MAX], "torch": torch.__version__, "threads": 1}
        arguments.out.write_text(json.dumps({**document, "runs": runs}, indent=1) + "\n")
