"""Learn the joint density of a labelled 2-D mixture, and plot it next to the true density.

    uv run python examples/mixture_2d.py --objective ce+dsm --steps 2000 --out mixture_2d.png

The data distribution is an `ebmkit.GaussianMixture`, whose density is exact at every sigma. The
model is an MLP with the paper's head, trained with `TrainingLoss` in a custom loop. A point of the
plane is an image of two channels and one pixel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

import ebmkit
from ebmkit.data import Batch, NoiseLaw
from ebmkit.models import LinearQuadraticHead, MLPConfig
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.plots import new_figure, save_figure
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import MALA, Chains, density_of
from ebmkit.sampling.langevin import MALAConfig

SIGMA = 0.1
MOVES, MOVE_SIZE = 2, 0.005  # Langevin steps of a chain per training step; image units squared
AT_ONE_SIGMA = NoiseLaw(kind="fixed", max=SIGMA)
MASS = 0.999


def truth() -> ebmkit.GaussianMixture:
    """Two classes with two Gaussians each."""
    means = torch.tensor([[0.2, 0.25], [0.75, 0.7], [0.25, 0.75], [0.7, 0.2]])
    return ebmkit.GaussianMixture(
        means[:, :, None, None], torch.tensor([0.004, 0.008, 0.006, 0.003]), labels=[0, 0, 1, 1]
    )


def learner(noise_conditional: bool = False) -> ebmkit.JointModel:
    """An untrained joint model of points with two labels, noise-conditional or blind."""
    backbone = MLPConfig(width=64, noise_conditional=noise_conditional).build(in_channels=2)
    head = LinearQuadraticHead(backbone.num_features, 2, bias=True)
    # log p = -1/2 u^2 with u = w f + b. If u starts at 0, where the density is largest, training
    # may converge to a ring of zeros of u. If u starts well above 0, peaks of any height can form.
    nn.init.normal_(head.density.weight, std=0.01)
    nn.init.constant_(head.density.bias, 4.0)
    return ebmkit.JointModel(backbone, head, input_mean=0.5, input_std=0.25)


class PersistentChains:
    """Chains of ``model`` that persist between training steps.

    Persistent contrastive divergence (Tieleman 2008), with Metropolis-adjusted Langevin steps
    (MALA), which have no bias in equilibrium.

    Args:
        model: density model that is being trained.
        count: number of chains; they start uniformly around the mixture.
        seed: seed of starts and steps.
        temperature: T; the chains sample p^(1/T).
    """

    def __init__(
        self, model: ebmkit.JointModel, count: int, seed: int = 0, temperature: float = 1.0
    ) -> None:
        config = MALAConfig(step_size=MOVE_SIZE, temperature=temperature)
        self.sampler = MALA(density_of(model), config)
        self.seed, self.step = seed, 0
        start = torch.rand(count, 2, 1, 1, generator=keyed_generator("cpu", seed, "start"))
        self.x = 2 * start - 0.5

    def draw(self) -> Tensor:
        """Take `MOVES` steps; return the states of the chains, (count, 2, 1, 1)."""
        generator = keyed_generator("cpu", self.seed, "negatives", self.step)
        with torch.no_grad():
            chains = Chains(self.sampler, self.sampler.init(self.x))
            self.x = chains.run(MOVES, generator).x
        self.step += 1
        return self.x


def learn(
    mixture: ebmkit.GaussianMixture,
    steps: int,
    objective: str = "ce+dsm",
    law: NoiseLaw = AT_ONE_SIGMA,
    noise_conditional: bool = False,
    seed: int = 0,
    batch_size: int = 512,
    temperature: float = 1.0,
) -> ebmkit.JointModel:
    """Train a joint model of the noisy mixture with ``objective``.

    ``law`` is the distribution of sigma. Negatives, if the objective needs them, are sampled at
    ``temperature``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = learner(noise_conditional)
    terms = parse_objective(objective)
    loss = TrainingLoss(model, terms, streams={term.name: "denoise" for term in terms})
    chains = PersistentChains(model, batch_size, seed, temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), f"training with {objective}"):
        x, labels = mixture.sample(batch_size, generator)
        sigma = law.sample(batch_size, generator, "cpu")
        eps = torch.randn(x.shape, generator=generator)
        soft = nn.functional.one_hot(labels, 2).float()
        batch = Batch(x, x + sigma[:, None, None, None] * eps, sigma, eps, labels, soft)
        for term in terms:
            if "negatives" in term.objective.columns:
                batch = batch.with_columns(term.name, {"negatives": chains.draw()})
        losses = loss({"denoise": batch})
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        schedule.step()
        loss.update_running(losses.parts)
    return model.eval().requires_grad_(False)


class Fields(NamedTuple):
    """Log-densities and scores of a joint density at points of the plane.

    Attributes:
        log_joint: (N, 2), log p(y, c) up to a constant.
        scores: (N, 2, 2), its gradient with respect to y; axes point, label, direction.
    """

    log_joint: Tensor
    scores: Tensor

    @property
    def log_density(self) -> Tensor:
        """log p(y), (N,)."""
        return self.log_joint.logsumexp(1)

    @property
    def posterior(self) -> Tensor:
        """p(c|y), (N, 2)."""
        return self.log_joint.softmax(1)

    @property
    def score(self) -> Tensor:
        """grad log p(y), (N, 2)."""
        return torch.einsum("nc,ncd->nd", self.posterior, self.scores)


def fields(log_joint: Callable[[Tensor], Tensor], points: Tensor) -> Fields:
    """Values and gradients of ``log_joint`` at ``points`` (N, 2, 1, 1)."""
    leaf = points.clone().requires_grad_()
    values = log_joint(leaf)
    gradients = [
        torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0].flatten(1)
        for column in values.unbind(1)
    ]
    return Fields(values.detach(), torch.stack(gradients, dim=1))


def plane(count: int = 81, reach: float = 0.8) -> Tensor:
    """A grid of ``count`` x ``count`` points around (0.5, 0.5), (count^2, 2, 1, 1).

    It extends ``reach`` in each direction: 0.8 covers the mixture at sigma 0.1, 1.5 at 0.2.
    """
    axis = torch.linspace(0.5 - reach, 0.5 + reach, count)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2, 1, 1)


def aligned(learned: Fields, exact: Fields, by_class: bool = False) -> Fields:
    """``learned`` plus the unknown log-normaliser: one constant, or one per class.

    It is the mean difference of the log-densities under the true density.
    """
    log_p = exact.log_joint if by_class else exact.log_density[:, None]
    own = learned.log_joint if by_class else learned.log_density[:, None]
    shift = ((log_p - own) * log_p.softmax(0)).sum(0)
    return Fields(learned.log_joint + shift, learned.scores)


def distances(learned: Fields, exact: Fields, sigma: float) -> dict[str, float]:
    """Errors of ``learned``, after `aligned`, on a grid.

    Means are weighted by p(y); maxima are over the smallest region with 99.9 % of the mass. Scores
    are multiplied by ``sigma``, so their errors are denoising errors in units of the noise.
    """
    weight = exact.log_density.softmax(0)
    order = weight.argsort(descending=True)
    inside = order[: int((weight[order].cumsum(0) < MASS).sum()) + 1]
    log_p = (learned.log_density - exact.log_density).abs()
    posterior = (learned.posterior - exact.posterior)[:, 1].abs()
    score = sigma * (learned.score - exact.score).norm(dim=1)
    return {
        "log p, nats (rms)": float((log_p.square() * weight).sum().sqrt()),
        "log p, nats (max)": float(log_p[inside].max()),
        "p(c|y) (mean abs)": float((posterior * weight).sum()),
        "p(c|y) (max)": float(posterior[inside].max()),
        "sigma * score (rms)": float((score.square() * weight).sum().sqrt()),
        "sigma * score (max)": float(score[inside].max()),
    }


def draw(rows: Mapping[str, tuple[Fields, float]], path: Path) -> None:
    """Plot energies, posteriors and scores on the `plane`, one row for each of ``rows``.

    Args:
        rows: name -> aligned fields, and sigma, by which scores are multiplied.
        path: the PNG file.
    """
    figure = new_figure(9.6, 2.7 * len(rows) + 0.4, layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, (found, sigma)) in zip(axes, rows.items(), strict=True):
        count = round(len(found.log_joint) ** 0.5)
        ticks = plane(count)[:count, 0, 0, 0].numpy()
        style = {"origin": "lower", "extent": (ticks[0], ticks[-1]) * 2}
        energy = -found.log_density.reshape(count, count).numpy()
        levels = row[0].imshow(energy, vmin=-2, vmax=8, cmap="viridis_r", **style)
        posterior = found.posterior[:, 1].reshape(count, count).numpy()
        posteriors = row[1].imshow(posterior, vmin=0, vmax=1, cmap="PuOr", **style)
        arrows = sigma * found.score.reshape(count, count, 2)[::5, ::5].numpy()
        row[2].quiver(ticks[::5], ticks[::5], arrows[..., 0], arrows[..., 1], angles="xy", scale=60)
        row[2].set_aspect("equal")
        row[0].set_ylabel(name, fontsize=9)
        figure.colorbar(levels, ax=row[0], shrink=0.8)
        figure.colorbar(posteriors, ax=row[1], shrink=0.8)
        for panel in row:
            panel.tick_params(labelsize=7)
    for panel, title in zip(
        axes[0], ("energy -log p(y), nats", "p(c = 1 | y)", "sigma * score"), strict=True
    ):
        panel.set_title(title, fontsize=9)
    save_figure(figure, path)


def main(steps: int, out: Path, objective: str = "ce+dsm") -> dict[str, float]:
    """Train and plot; return the errors."""
    mixture, points = truth(), plane()
    model = learn(mixture, steps, objective)
    exact = fields(lambda y: mixture.log_joint(y, SIGMA), points)
    learned = aligned(fields(model.log_joint, points), exact)
    draw({"truth": (exact, SIGMA), f"learned by {objective}": (learned, SIGMA)}, out)
    return distances(learned, exact, SIGMA)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--objective", default="ce+dsm")
    parser.add_argument("--out", type=Path, default=Path("mixture_2d.png"))
    options = parser.parse_args()
    for name, value in main(options.steps, options.out, options.objective).items():
        print(f"{name:22} {value:.3f}")
    print(f"wrote {options.out}")
