r"""Suite ``certify``: certified accuracy by randomised smoothing.

Randomised smoothing turns a classifier f of noisy images into a majority vote,

.. math:: g(x) = \arg\max_c \, P\bigl(f(x + \sigma\epsilon) = c\bigr),
    \qquad \epsilon \sim \mathcal N(0, I).

If f predicts label A with probability at least :math:`\underline{p_A} > 1/2`, then g predicts A
at every :math:`x + \delta` with

.. math:: \|\delta\|_2 < R = \sigma \, \Phi^{-1}(\underline{p_A}),

for any f; for a linear f no larger radius holds (Cohen, Rosenfeld, Kolter, arXiv 1902.02918,
theorems 1 and 2). Their algorithm CERTIFY selects the most frequent label of :math:`n_0` votes as
A, counts the k votes for A among n other votes, and computes the exact (Clopper-Pearson) lower
bound of the binomial probability, :math:`\underline{p_A} = B^{-1}(\alpha;\; k,\; n - k + 1)`, the
:math:`\alpha` quantile of a Beta distribution. If the bound is 1/2 or less, it abstains. A
certificate is wrong with probability at most :math:`\alpha` over the votes. Even if all n votes
agree, :math:`\underline{p_A} = \alpha^{1/n}`.

The suite certifies two classifiers on the same noisy copies y, which are not clipped: ``direct``,
the label of y, and ``denoised``, the label of :math:`D(y) = y + \sigma^2 s(y)` clipped to [0, 1]
(Salman et al., arXiv 2003.01908), with the true sigma, which is known because the suite adds the
noise. The noise of an image depends on its index, not on batch size or processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.energy import EnergyModel, LogDensity, tweedie
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    NonEmptyUnique,
    Positive,
    Suite,
    SuiteConfig,
    check_classifies,
    new_table,
    noise_warnings,
    number,
)
from ebmkit.metrics import predict
from ebmkit.noise import Sigma, format_sigma, in_255ths
from ebmkit.randomness import hashed_generator

ABSTAIN = -1
"""The label of an image without a certificate."""

BLOCK = 16
"""Number of votes for which noise is drawn at once, for every batch size."""


class CertifyConfig(SuiteConfig):
    """Settings of the suite ``certify``."""

    sigmas: NonEmptyUnique[Sigma] = (20 / 255, 0.12, 0.25)
    """noise levels of the smoothing"""
    samples: Positive = 1000
    """number of votes for the certificate of an image"""
    selection: Positive = 100
    """number of separate votes that select the label"""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    """maximum probability that the certificate of an image is wrong"""
    images: Positive = 100
    """number of images, evenly spaced in the data set"""
    radii: NonEmptyUnique[float] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    """l2 radii at which certified accuracy is reported, image units"""
    classifiers: NonEmptyUnique[Literal["direct", "denoised"]] = ("direct", "denoised")
    """smoothed classifiers: direct, denoised (denoise first)"""

    @model_validator(mode="after")
    def _check(self) -> CertifyConfig:
        if not all(0 <= r < math.inf for r in self.radii):
            raise UserError(f"radii {list(self.radii)} must be finite and not below 0")
        if largest_radius(1.0, self.samples, self.alpha) == 0:
            least = math.floor(math.log2(1 / self.alpha)) + 1
            raise UserError(
                f"samples {self.samples} cannot certify anything at alpha {self.alpha:g}: take at "
                f"least {least}, more for a useful radius"
            )
        return self


class Certificates(NamedTuple):
    """Certificates of N images."""

    labels: Tensor
    """(N,) int64, certified label, or `ABSTAIN`"""
    radius: Tensor
    """(N,) float64, l2 radius in image units; 0 without a certificate"""
    top: Tensor
    """(N,) int64, most frequent label of the estimation votes, certified or not"""
    lower: Tensor
    """(N,) float64, lower bound of the probability of the selected label"""

    def right_radius(self, truth: Tensor) -> Tensor:
        """The radius where the certified label equals ``truth`` (N,), otherwise -1.

        An image counts as certified at radius r >= 0 if this value is at least r.
        """
        return torch.where(self.labels == truth, self.radius, -1.0)


def lower_bound(hits: Tensor, count: int, alpha: float) -> Tensor:
    """Exact one-sided lower confidence bound, (N,) float64, of the probability of an event that
    occurred ``hits`` (N,) times in ``count`` trials, at level 1 - ``alpha``.

    Source: C. Clopper, E. Pearson, Biometrika 26 (1934); scipy's Beta quantile.
    """
    from scipy.stats import beta

    k = hits.double().numpy()
    found = torch.from_numpy(beta.ppf(alpha, k.clip(min=1), count - k + 1))
    return torch.where(hits > 0, found, 0.0)


def certificates(votes: Tensor, selection: int, sigma: float, alpha: float) -> Certificates:
    """Algorithm CERTIFY of Cohen et al., for N images.

    Args:
        votes: (N, selection + n) int64, labels of noisy copies of each image.
        selection: number of votes, from the first, that select the label; the other n votes
            estimate its probability.
        sigma: noise level of the votes, image units.
        alpha: maximum probability that the certificate of an image is wrong.
    """
    from scipy.special import ndtri
    from scipy.stats import mode

    if votes.shape[1] <= selection:
        raise ValueError(f"{votes.shape[1]} votes leave none to estimate from after {selection}")
    estimating = votes[:, selection:]
    selected, top = (  # ties: the smallest label
        torch.from_numpy(mode(part.numpy(), axis=1).mode)
        for part in (votes[:, :selection], estimating)
    )
    hits = (estimating == selected[:, None]).sum(dim=1)
    lower = lower_bound(hits, estimating.shape[1], alpha)
    certain = lower > 0.5
    radius = sigma * torch.from_numpy(ndtri(lower.numpy()))
    labels = selected.where(certain, ABSTAIN)
    return Certificates(labels, radius.where(certain, 0.0), top, lower)


def largest_radius(sigma: float, samples: int, alpha: float) -> float:
    """The radius, image units, that ``samples`` equal votes certify; 0 if they are too few.

    >>> round(largest_radius(0.25, 100_000, 0.001), 3)
    0.953
    """
    from scipy.special import ndtri

    return max(0.0, sigma * float(ndtri(alpha ** (1 / samples))))


def draw_votes(
    classify: Callable[[Tensor], Mapping[str, Tensor]],
    x: Tensor,
    sigma: float,
    count: int,
    generator: torch.Generator,
    batch_size: int = 250,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Classify ``count`` noisy copies of an image by several classifiers, on the same copies.

    Noise is drawn on the CPU and does not depend on the batch size. All batches have the same size,
    at most ``batch_size``; surplus copies of the last batch are not counted.

    Args:
        classify: function from noisy images (B, C, H, W) to labels (B,) by classifier name.
        x: the image (C, H, W).
        sigma: noise level, image units.
        count: number of votes.
        generator: generator of the noise, on the CPU.
        batch_size: maximum number of noisy copies per batch.
        advance: progress callback, called with the number of new votes.

    Returns:
        Votes (count,) int64 on the CPU, by classifier name.
    """
    batches = math.ceil(count / batch_size)
    size = math.ceil(count / batches)
    eps = torch.empty(0, *x.shape)
    cast: dict[str, list[Tensor]] = {}
    for k in range(batches):
        missing = math.ceil((size - len(eps)) / BLOCK)
        blocks = [torch.randn(BLOCK, *x.shape, generator=generator) for _ in range(missing)]
        eps = torch.cat([eps, *blocks])
        for name, labels in classify(x + sigma * eps[:size].to(x)).items():
            cast.setdefault(name, []).append(labels.cpu())
        eps = eps[size:]
        advance(min(size, count - k * size))
    return {name: torch.cat(parts)[:count] for name, parts in cast.items()}


def vote_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the noise of image ``index``, the same at every noise level."""
    return hashed_generator(f"smoothing {seed} {index}")


def labels_of(
    model: EnergyModel, y: Tensor, sigma: float, which: Sequence[str]
) -> dict[str, Tensor]:
    """Labels (B,) of noisy images ``y`` (B, C, H, W) at level ``sigma``, image units, by classifier
    name: ``direct``, ``denoised`` or both, which share one forward pass."""
    if "denoised" not in which:
        return {"direct": predict(model.logits(y, sigma))}
    energies, (score,) = model.value_and_grads(y, sigma, LogDensity())
    clean = tweedie(y, score, sigma).clamp(0, 1)
    found = {"denoised": predict(model.logits(clean, 0.0)), "direct": predict(energies.logits)}
    return {name: found[name] for name in which}


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Draw votes and certify; return the document."""
    options, model = context.option(CertifyConfig), context.model
    count = min(options.images, len(context.images))
    numbers = torch.arange(count) * len(context.images) // count
    images = context.images.select(numbers)
    assert isinstance(model, EnergyModel)
    assert images.labels is not None
    truth = images.labels.cpu()

    def of_image(batch: EvaluationBatch) -> dict[Any, Tensor]:
        found: dict[Any, Tensor] = {"unsmoothed": predict(model.logits(batch.x, 0.0))}
        for sigma in options.sigmas:
            votes = draw_votes(
                partial(labels_of, model, sigma=sigma, which=options.classifiers),
                batch.x[0],
                sigma,
                options.selection + options.samples,
                vote_generator(context.seed, int(numbers[batch.number])),
                context.batch_size,
                lambda cast: context.skip(cast * context.world.size),  # of all processes
            )
            found |= {(sigma, name): cast[None] for name, cast in votes.items()}
        return found

    votes = context.columns(0.0, of_image, images, batch_size=1, passes=_passes(context))
    levels = []
    for sigma in options.sigmas:
        found = {
            name: certificates(votes[sigma, name], options.selection, sigma, options.alpha)
            for name in options.classifiers
        }
        level: dict[str, Any] = {
            "sigma": sigma,
            "largest_radius": largest_radius(sigma, options.samples, options.alpha),
            "classifiers": {n: _summary(c, truth, options.radii) for n, c in found.items()},
        }
        if len(found) == len(CLASSIFIERS):
            radii = {name: c.right_radius(truth).clamp(min=0) for name, c in found.items()}
            level["difference"] = statistics.mean(radii["denoised"] - radii["direct"])
        levels.append(level)
    denoised = "denoised" in options.classifiers
    return {
        "sigmas": list(options.sigmas),
        "radii": list(options.radii),
        "certified_images": count,
        "numbers": numbers.tolist(),
        "labels": truth.tolist(),
        "unsmoothed_accuracy": statistics.accuracy(votes["unsmoothed"] == truth),
        "levels": levels,
        "warnings": noise_warnings(model, options.sigmas) if denoised else [],
    }


def _summary(found: Certificates, truth: Tensor, radii: Sequence[float]) -> dict[str, Any]:
    right = found.right_radius(truth)
    return {
        "accuracy": statistics.accuracy(found.top == truth),
        "abstained": statistics.accuracy(found.labels == ABSTAIN),
        "certified": [{"radius": r, **statistics.accuracy(right >= r).document()} for r in radii],
        "average_radius": statistics.bounded_mean(right.clamp(min=0)),
        "predicted": [None if c == ABSTAIN else c for c in found.labels.tolist()],
        "radius": found.radius.tolist(),
    }


def table(document: dict[str, Any]) -> Table:
    """By sigma and classifier: accuracy, certified accuracy at two radii, average radius."""
    radii = document["radii"]
    chosen = sorted({len(radii) // 3, len(radii) // 2})
    at = [f"at {radii[i]:g}" for i in chosen]
    heads = ("sigma", "classifier", "accuracy", *at, "radius", "abstains")
    result = new_table(document, heads)
    result.columns[1].justify = "left"
    for level in document["levels"]:
        for i, (name, found) in enumerate(level["classifiers"].items()):
            result.add_row(
                "" if i else format_sigma(level["sigma"]),
                name,
                number(found["accuracy"], "{:.1%}"),
                *(number(found["certified"][k], "{:.1%}") for k in chosen),
                number(found["average_radius"], "{:.3f}"),
                number(found["abstained"], "{:.1%}"),
            )
        result.add_section()
    return result


CLASSIFIERS = {
    "direct": ("direct", plots.BLUE, "-"),
    "denoised": ("denoise first", plots.ORANGE, "--"),
}
"""Label, colour and line style in plots, by classifier name in the document."""

PLOTTED_RADII = 300


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``certified-accuracy.png``: certified accuracy against l2 radius, by noise level."""
    levels, truth = document["levels"], document["labels"]
    figure = plots.new_figure(0.9 + 2.75 * len(levels), 3.6, layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    limit = 1.06 * max(level["largest_radius"] for level in levels)
    for axes, level in zip(panels, levels, strict=True):
        largest = level["largest_radius"]
        radii = [i * largest / PLOTTED_RADII for i in range(PLOTTED_RADII + 1)]
        for name, found in level["classifiers"].items():
            images = zip(found["radius"], found["predicted"], truth, strict=True)
            right = [radius if label == c else -1.0 for radius, label, c in images]
            hits = [sum(own >= r for own in right) for r in radii]
            known = {n: statistics.proportion(n, len(right)).document() for n in set(hits)}
            label, colour, style = CLASSIFIERS[name]
            look = {"color": colour, "ls": style, "lw": 1.6, "label": label}
            plots.plot_estimates(axes, radii, [known[n] for n in hits], 100, **look)
        axes.axvline(largest, color=plots.GRAY, ls=":", lw=1, label="largest possible")
        axes.set(xlim=(0, limit), ylim=(0, 102), xlabel="$\\ell_2$ radius (image units)")
        sigma = level["sigma"]
        axes.set_title(f"$\\sigma$ = {sigma:.3g} = {in_255ths(sigma)}/255", fontsize=10)
    panels[0].set_ylabel("certified accuracy (%)")
    votes, alpha = document["options"]["samples"], document["options"]["alpha"]
    of = plots.images_of(document, document["certified_images"])
    title = f"Certified accuracy: {of}, {votes:,} votes each, $\\alpha$ = {alpha:g}"
    plots.save_figure(figure, folder / "certified-accuracy.png", title, legend=3)


def _passes(context: EvaluationContext) -> int:
    """Passes for the progress bar; every vote counts as one image."""
    options = context.option(CertifyConfig)
    votes = len(options.sigmas) * (options.selection + options.samples)
    return math.ceil(votes * min(options.images, len(context.images)) / len(context.images))


CERTIFY = Suite(
    description="randomised smoothing: certified accuracy by l2 radius, with and "
    "without denoising first",
    measure=measure,
    plot=plot,
    table=table,
    check=check_classifies,
    passes=_passes,
    options=CertifyConfig,
)
