r"""Suite ``ood``: whether the model knows images of its distribution from others.

In distribution are the images evaluated; out of it are the images of each of several sets
(`ebmkit.evaluation.ood_sets`). Each image x of d values gets scores, higher meaning "in". JEM's
three (arXiv 1912.03263, section 5.2):

- ``log-density``: :math:`\log p(x)`, up to one constant, nats;
- ``confidence``: :math:`\max_c p(c \mid x)`;
- ``gradient``: :math:`-\|\nabla \log p(x)\|`, which is low where a density has its mass.

A joint model is trained on noisy images, :math:`y = x + \sigma\epsilon`, and has more to say there.
With the score s(y) and fixed noise :math:`\epsilon_1, \dots, \epsilon_n` for each image, at each
level sigma,

- ``residual``: :math:`-\frac1n \sum_i \|\sigma s(y_i) + \epsilon_i\|^2 / d`, minus the loss of
  denoising score matching at this one image: its denoising error over :math:`\sigma^2 d`.
  Integrated over :math:`\log\sigma` these errors are the negative log-likelihood up to a constant
  (Kong et al., arXiv 2302.03792), so each level is a share of it;
- ``noise-level``: :math:`-\bigl|\log\bigl(\frac1n \sum_i \|\sigma s(y_i)\|^2 / d\bigr)\bigr|`.
  A model that knows such images reads off the noise level that is there, and
  :math:`\|\sigma s\|^2` is near d: a test of typicality and not of likelihood;
- ``noisy-density``: :math:`\frac1n \sum_i \log p(y_i)`. At sigma the density is one that training
  saw, unlike at 0.

With scores u of images in and v of images out, and a threshold t,

.. math:: \mathrm{TPR}(t) = P(u \ge t), \qquad \mathrm{FPR}(t) = P(v \ge t),

- ``auroc``: the area under TPR against FPR, :math:`P(u > v) + \tfrac12 P(u = v)`;
- ``aupr_in``: average precision with the images in as positives, :math:`\sum_t \Delta\mathrm{TPR}\,
  \frac{n\,\mathrm{TPR}}{n\,\mathrm{TPR} + m\,\mathrm{FPR}}`; ``aupr_out``: with those out as
  positives, by -score;
- ``fpr95``: the share of images out that are taken for in at the highest threshold at which at
  least 95 % of those in are.

Ties count as scikit-learn counts them. Intervals are of the basic bootstrap
(`ebmkit.evaluation.statistics`), kept within [0, 1], with the images in and the images out
resampled apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.energy import EnergyModel, LogDensity, ScoreModel, classifies
from ebmkit.evaluation import statistics
from ebmkit.evaluation.ood_sets import OutSet, find_set, standard_sets
from ebmkit.evaluation.statistics import LEVEL, Estimate
from ebmkit.evaluation.suite import (
    Batch,
    Distinct,
    EvaluationContext,
    Positive,
    Several,
    Suite,
    SuiteConfig,
    check_one_size,
    interval,
    new_table,
    noise_warnings,
    number,
    unique_name,
)
from ebmkit.noise import Sigma, format_sigma
from ebmkit.randomness import image_noise

BINS = 40
SHOWN = 8


class OodConfig(SuiteConfig):
    """Settings of the suite ``ood``."""

    sets: Several[str] = ("auto",)
    """OOD sets: auto; interpolations, constant, uniform, gaussian, inverted, shuffled; cifar10,
    cifar100, digits, patches; image folders and HDF5 files"""
    sigmas: Distinct[Sigma] = (10 / 255, 25 / 255)
    """noise levels of the scores on noisy images, image units"""
    draws: Positive = 4
    """number of noise draws per image and level"""


CLEAN = {
    "log-density": "log p(x)",
    "confidence": "largest class probability",
    "gradient": "minus the norm of the gradient of log p(x)",
}
NOISY = {
    "residual": "minus the mean square of sigma s(y) + eps",
    "noise-level": "minus |log of the mean square of sigma s(y)|",
    "noisy-density": "mean log p(x + sigma eps)",
}


def known_scores(model: ScoreModel, sigmas: Sequence[float]) -> dict[str, str]:
    """The scores that ``model`` has, each with what it is in words."""
    density = isinstance(model, EnergyModel)
    clean = {
        name: description
        for name, description in CLEAN.items()
        if (classifies(model) if name == "confidence" else density)
    }
    noisy = {
        _at(name, sigma): f"{description}, sigma {format_sigma(sigma)}"
        for sigma in sigmas
        for name, description in NOISY.items()
        if density or name != "noisy-density"
    }
    return clean | noisy


def scores_of(
    model: ScoreModel, x: Tensor, sigmas: Sequence[float], draws: int, seed: int = 0
) -> dict[str, Tensor]:
    """`known_scores` of images ``x`` (B, C, H, W), each (B,).

    Args:
        model: in evaluation mode.
        x: in [0, 1].
        sigmas: noise levels, image units.
        draws: noise images for each image and level, from its content and ``seed``.
        seed: of the noise.
    """
    found: dict[str, Tensor] = {}
    if isinstance(model, EnergyModel):
        level = 0.0 if model.noise_conditional else None
        energies, (score,) = model.value_and_grads(x, level, LogDensity())
        found["log-density"] = energies.log_density
        if classifies(model):
            found["confidence"] = energies.log_posterior().exp().amax(dim=1)
        found["gradient"] = -score.flatten(1).norm(dim=1)
    for sigma in sigmas:
        rows: list[dict[str, Tensor]] = []
        for eps in image_noise(x, draws, f"ood {seed} {sigma:.9g}").movedim(1, 0):
            y, row = x + sigma * eps, {}
            if isinstance(model, EnergyModel):
                row["noisy-density"], score = model.density_and_score(y, sigma)
            else:
                score = model.score(y, sigma)
            row["residual"] = (sigma * score + eps).flatten(1).square().mean(dim=1)
            row["noise-level"] = (sigma * score).flatten(1).square().mean(dim=1)
            rows.append(row)
        means = {name: torch.stack([row[name] for row in rows]).mean(dim=0) for name in rows[0]}
        means["residual"] = -means["residual"]
        means["noise-level"] = -means["noise-level"].log().abs()
        found |= {_at(name, sigma): means[name] for name in NOISY if name in means}
    return found


def _at(name: str, sigma: float) -> str:
    return f"{name}-{sigma * 255:.4g}"


METRICS = {"auroc": "AUROC", "aupr_in": "AUPR in", "aupr_out": "AUPR out", "fpr95": "FPR95"}
"""By name, what tables call them."""

TPR = 0.95

Counts = NDArray[np.float64]


def detection(
    inside: Tensor, outside: Tensor, seed: int = 0, resamples: int = 400
) -> dict[str, Estimate]:
    """`METRICS` of finite scores ``inside`` (n,) and ``outside`` (m,), with 95 % intervals.

    Args:
        inside: of images in distribution.
        outside: of images out of it.
        seed: of the bootstrap.
        resamples: how many.
    """
    scores = torch.cat([inside, outside]).double().cpu().numpy()
    levels, place = np.unique(scores, return_inverse=True)
    parts = np.split(place, [len(inside)])
    rng = np.random.default_rng(seed)

    def counts(rows: NDArray[np.intp]) -> Counts:
        return np.bincount(rows, minlength=len(levels)).astype(np.float64)

    values = _of_counts(*map(counts, parts))
    draws = [
        _of_counts(*(counts(part[rng.integers(0, len(part), len(part))]) for part in parts))
        for _ in range(resamples)
    ]
    ends = 2 * np.array(values) - np.quantile(draws, [(1 + LEVEL) / 2, (1 - LEVEL) / 2], axis=0)
    lows, highs = ends.clip(0, 1).tolist()
    return {
        name: Estimate(value, low, high, len(scores))
        for name, value, low, high in zip(METRICS, values, lows, highs, strict=True)
    }


def _of_counts(inside: Counts, outside: Counts) -> list[float]:
    """`METRICS` where level k of the score, from low to high, has so many images in and out."""
    n, m = inside.sum(), outside.sum()
    below = outside.cumsum() - outside
    auroc = float(inside @ (below + outside / 2)) / (n * m)
    hits, misses = inside[::-1].cumsum(), outside[::-1].cumsum()
    first = int(np.argmax(hits >= TPR * n - 1e-9))
    return [
        auroc,
        _average_precision(inside[::-1], outside[::-1]),
        _average_precision(outside, inside),
        float(misses[first] / m),
    ]


def _average_precision(positive: Counts, negative: Counts) -> float:
    """Over thresholds from the first level to the last."""
    hits, taken = positive.cumsum(), (positive + negative).cumsum()
    precision = hits / np.maximum(taken, 1)
    return float(positive @ precision / positive.sum())


def find_sets(context: EvaluationContext) -> list[OutSet]:
    """The sets that the settings name.

    Raises:
        UserError: if one is not there, or cannot be made of these images.
    """
    found: dict[str, OutSet] = {}
    for name in _names(context):
        own = find_set(name, context.images, context.data_dir, context.seed)
        label = unique_name(own.name, {"in", *found})  # folders of one name in two places
        found[label] = replace(own, name=label)
    return list(found.values())


def _names(context: EvaluationContext) -> list[str]:
    names: list[str] = []
    for name in context.option(OodConfig).sets:
        auto = name == "auto"
        names += standard_sets(context.images, context.data_dir) if auto else [name]
    return list(dict.fromkeys(names))


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure and return the document."""
    options, model = context.option(OodConfig), context.model
    names = known_scores(model, options.sigmas)

    def scores(batch: Batch) -> dict[str, Tensor]:
        return scores_of(model, batch.x, options.sigmas, options.draws, context.seed)

    def means(columns: Mapping[str, Tensor]) -> dict[str, Estimate]:
        return {name: statistics.mean(columns[name]) for name in names}

    columns = {"in": context.columns(0.0, scores)}
    inside = columns["in"]
    sets: dict[str, Any] = {}
    warnings = _warnings(model, options)
    for found in find_sets(context):
        own = columns[found.name] = context.columns(0.0, scores, found.images)
        finite = [n for n in names if own[n].isfinite().all() and inside[n].isfinite().all()]
        if len(finite) < len(names):
            warnings.append(
                f"{', '.join(n for n in names if n not in finite)}: not finite on some images in "
                f"or of {found.name}, so there is no measure"
            )
        sets[found.name] = {
            "about": found.description,
            "count": len(found.images),
            "mean": means(own),
            "scores": {
                n: detection(inside[n], own[n], context.seed) if n in finite else None
                for n in names
            },
        }
        if len(found.images) < 100:
            warnings.append(f"{found.name} has only {len(found.images)} images")
    document: dict[str, Any] = {
        "sigmas": list(options.sigmas),
        "scores": names,
        "in": {"count": len(context.images), "mean": means(inside)},
        "sets": sets,
        "histograms": {n: _histogram({s: c[n] for s, c in columns.items()}) for n in names},
        "warnings": warnings,
    }
    if isinstance(model, EnergyModel):
        document["energy"] = {
            name: statistics.mean(-own["log-density"]) for name, own in columns.items()
        }
    return document


def _histogram(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts over the range of the images in, and where there are others twice as far down and once
    as far up again."""
    finite = {name: c[c.isfinite()].double() for name, c in columns.items()}
    inside = finite["in"]
    counts: dict[str, list[int]] = {name: [] for name in columns}
    edges = np.empty(0)
    if len(inside):
        everything = torch.cat([*finite.values()])
        low, high = torch.quantile(inside, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
        wide = max(high - low, 1e-6 * max(1.0, abs(high)))
        first = max(low - 2 * wide, float(everything.min()) - 0.02 * wide)
        last = min(high + wide, float(everything.max()) + 0.02 * wide)
        edges = np.linspace(first, last, BINS + 1)
        for name, column in finite.items():
            counts[name] = np.histogram(column.clamp(first, last).numpy(), edges)[0].tolist()
    return {"edges": edges.tolist(), "in": counts.pop("in"), "sets": counts}


def _warnings(model: ScoreModel, options: OodConfig) -> list[str]:
    if model.card is not None and model.card.sigma_range is None and options.sigmas:
        return [
            f"this model was not trained to denoise (its objective is {model.card.objective!r}): "
            "the scores residual and noise-level mean little"
        ]
    return noise_warnings(model, options.sigmas)


def table(document: dict[str, Any]) -> Table:
    """Of each set and score: AUROC with its interval, both AUPR and FPR95."""
    heads = ("set, score", "AUROC", "95 % interval", *list(METRICS.values())[1:])
    result = new_table(document, heads)
    for name, found in document["sets"].items():
        result.add_row(f"{name}, {found['count']} images", *[""] * 5)
        for score, measures in found["scores"].items():
            own = measures or dict.fromkeys(METRICS, dict.fromkeys(("value", "low", "high")))
            span = interval(own["auroc"], "{:.3f}")
            value, *others = (number(own[metric], "{:.3f}") for metric in METRICS)
            result.add_row(f"  {score}", value, span, *others)
        result.add_section()
    return result


COLUMNS = 3


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``ood.png``, ``ood-histograms.png`` and ``ood-examples.png``."""
    _plot_auroc(document, folder / "ood.png")
    _plot_histograms(document, folder / "ood-histograms.png")
    sets = {"in": context.images, **{s.name: s.images for s in find_sets(context)}}
    rows, names = [], []
    for name, images in sets.items():
        shown = list(next(iter(images.first(SHOWN).batches(SHOWN)))[0])
        rows.append([(x, "") for x in [*shown, *[None] * (SHOWN - len(shown))]])
        value = document.get("energy", {}).get(name, {}).get("value")
        names.append(name if value is None else f"{name}\nenergy {value:.4g}")
    title = f"In distribution, and out of it: {plots.images_of(document)}"
    path = folder / "ood-examples.png"
    plots.image_rows(rows, [""] * SHOWN, path, title=title, names=names)


def _plot_auroc(document: dict[str, Any], path: Path) -> None:
    """AUROC of every set (row) by every score (column); 50 % is a score that knows nothing."""
    sets, scores = document["sets"], list(document["scores"])
    found = [
        [s["scores"][k] or {"auroc": {"value": np.nan}} for k in scores] for s in sets.values()
    ]
    values = [[100 * measures["auroc"]["value"] for measures in row] for row in found]
    size = 3.2 + 0.72 * len(scores), 2.3 + 0.42 * len(sets)
    figure = plots.new_figure(*size, layout="constrained")
    axes = figure.add_subplot()
    image = plots.annotated_map(axes, np.array(values), scores, list(sets), "{:.1f}")
    axes.tick_params(labelsize=8)
    axes.set_xticks(range(len(scores)), scores, rotation=35, ha="right")
    axes.set(xlabel="score", ylabel="set out of distribution")
    figure.colorbar(image, ax=axes, label="AUROC (%)")
    plots.save_figure(figure, path, f"In distribution: {plots.images_of(document)}")


def _plot_histograms(document: dict[str, Any], path: Path) -> None:
    """One panel per score: its distribution in, filled, and on every set, as lines."""
    scores = document["scores"]
    rows, columns = -(-len(scores) // COLUMNS), min(COLUMNS, len(scores))
    figure = plots.new_figure(0.5 + 3.3 * columns, 1.4 + 2.35 * rows, layout="constrained")
    for number_of, (name, found) in enumerate(document["histograms"].items()):
        axes = figure.add_subplot(rows, columns, number_of + 1)
        if edges := found["edges"]:
            filled: dict[str, Any] = {"fill": True, "color": plots.GRAY, "alpha": 0.55}
            axes.stairs(_shares(found["in"]), edges, label="in", **filled)
            for k, (own, counts) in enumerate(found["sets"].items()):
                look = plots.look(k)
                look.pop("marker")
                axes.stairs(_shares(counts), edges, lw=1.3, label=own, **look)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(scores[name], fontsize=7.5)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.01)
    figure.supylabel("share of the images (%)", fontsize=9)
    plots.save_figure(
        figure,
        path,
        f"Scores, higher is in distribution: {plots.images_of(document)}\n"
        "(outer bins hold all that is beyond)",
        legend=4,
    )


def _shares(counts: Sequence[int]) -> NDArray[np.float64]:
    return 100 * np.array(counts) / max(1, sum(counts))


OOD = Suite(
    description="OOD detection: AUROC, AUPR, FPR95 of JEM's scores and of scores on noisy images",
    measure=measure,
    plot=plot,
    table=table,
    check=lambda model, images: check_one_size("ood", images),
    passes=lambda context: 1 + len(_names(context)),
    prepare=find_sets,
    options=OodConfig,
)
