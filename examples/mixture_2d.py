"""Learn the joint density of a labelled mixture in the plane, and draw it beside the truth.

    uv run python examples/mixture_2d.py --steps 2000 --out mixture_2d.png

The truth is `ebmkit.GaussianMixture`, exact at every sigma. The learner is a small network of our
own with the paper's head, trained by ce+dsm at one sigma through `TrainingLoss`; the loop is ours.
A point of the plane is an "image" of two channels and one pixel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

import ebmkit
from ebmkit.data import Batch
from ebmkit.models import Features, LinearQuadraticHead
from ebmkit.objectives import TrainingLoss, parse_objective

SIGMA = 0.1


class PointFeatures(nn.Module):
    """A backbone of one's own: (B, 2, 1, 1) to Features of K numbers."""

    def __init__(self, num_features: int = 64) -> None:
        super().__init__()
        self.num_features = num_features
        self.layers = nn.Sequential(
            nn.Linear(2, num_features),
            nn.SiLU(),
            nn.Linear(num_features, num_features),
            nn.SiLU(),
            nn.Linear(num_features, num_features),
        )

    def forward(self, y: Tensor) -> Features:
        return Features(self.layers(y.flatten(1)))


def truth() -> ebmkit.GaussianMixture:
    """Two classes of two blobs each."""
    means = torch.tensor([[0.2, 0.25], [0.75, 0.7], [0.25, 0.75], [0.7, 0.2]])
    return ebmkit.GaussianMixture(
        means[:, :, None, None], torch.tensor([0.004, 0.008, 0.006, 0.003]), labels=[0, 0, 1, 1]
    )


def learn(mixture: ebmkit.GaussianMixture, steps: int, seed: int = 0) -> ebmkit.EnergyModel:
    """A joint model of the noisy mixture, by ce+dsm."""
    torch.manual_seed(seed)
    head = LinearQuadraticHead(64, 2, bias=True)
    # log p = -1/2 u^2 with u = w f + b. Started at u = 0, where all densities are largest, learning
    # may end with a ring of zeros; started well above, it has room for peaks of any height.
    nn.init.constant_(head.density.bias, 4.0)
    model = ebmkit.JointModel(PointFeatures(), head, input_mean=0.5, input_std=0.25)
    loss = TrainingLoss(model, parse_objective("ce+dsm"), streams={"ce": "denoise"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), "learning"):
        x, labels = mixture.sample(1024)
        sigma, eps = torch.full((len(x),), SIGMA), torch.randn_like(x)
        soft = nn.functional.one_hot(labels, 2).float()
        batch = Batch(x, x + SIGMA * eps, sigma, eps, labels, soft)
        losses = loss({"denoise": batch})
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        schedule.step()
        loss.remember(losses.parts)
    return model.eval().requires_grad_(False)


def draw(
    mixture: ebmkit.GaussianMixture, model: ebmkit.EnergyModel, path: Path
) -> dict[str, float]:
    """Energies, posteriors and scores of truth and model; their distances, weighted by p(y)."""
    axis = torch.linspace(-0.2, 1.2, 71)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2, 1, 1)
    log_p = mixture.log_density(grid, SIGMA)
    weight = log_p.softmax(0)
    figure = Figure(figsize=(10.5, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    errors = {}
    learned_log_p = model.log_density(grid)
    shift = ((log_p - learned_log_p) * weight).sum()  # the constant nobody computes
    posterior = {"truth": mixture.logits(grid, SIGMA), "learned": model.logits(grid)}
    for row, (name, values, score) in enumerate(
        [
            ("truth", log_p, mixture.score(grid, sigma=SIGMA)),
            ("learned", learned_log_p + shift, model.score(grid)),
        ]
    ):
        shape = (len(axis), len(axis))
        extent = (axis[0].item(), axis[-1].item()) * 2
        style = {"origin": "lower", "extent": extent}
        levels = axes[row, 0].imshow(
            -values.reshape(shape).numpy(), vmin=-2, vmax=8, cmap="viridis_r", **style
        )
        axes[row, 0].set_title(f"{name}: energy -log p(y), nats")
        p = posterior[name].softmax(1)[:, 1].reshape(shape).numpy()
        chance = axes[row, 1].imshow(p, vmin=0, vmax=1, cmap="PuOr", **style)
        axes[row, 1].set_title(f"{name}: p(c = 1 | y)")
        arrows = SIGMA * score.reshape(*shape, 2)[::5, ::5].numpy()
        ticks = axis[::5].numpy()
        axes[row, 2].quiver(ticks, ticks, arrows[..., 0], arrows[..., 1], angles="xy", scale=60)
        axes[row, 2].set_title(f"{name}: score")
        axes[row, 2].set_aspect("equal")
        figure.colorbar(levels, ax=axes[row, 0], shrink=0.8)
        figure.colorbar(chance, ax=axes[row, 1], shrink=0.8)
    difference = log_p - learned_log_p - shift
    errors["log p, nats (rms)"] = (difference.square() * weight).sum().sqrt().item()
    apart = posterior["truth"].softmax(1) - posterior["learned"].softmax(1)
    errors["p(c|y) (mean abs)"] = (apart[:, 1].abs() * weight).sum().item()
    gap = SIGMA * (model.score(grid) - mixture.score(grid, sigma=SIGMA))
    errors["sigma * score (rms)"] = (gap.flatten(1).square().sum(1) * weight).sum().sqrt().item()
    figure.suptitle(f"A labelled mixture at sigma {SIGMA}: truth, and what ce+dsm learned")
    figure.savefig(path, dpi=120)
    return errors


def main(steps: int, out: Path) -> dict[str, float]:
    """Learn, draw, and return the distances from the truth."""
    mixture = truth()
    return draw(mixture, learn(mixture, steps), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("mixture_2d.png"))
    options = parser.parse_args()
    for what, value in main(options.steps, options.out).items():
        print(f"{what:22} {value:.3f}")
    print(f"wrote {options.out}")
