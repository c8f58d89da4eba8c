r"""Suite ``ood``: out-of-distribution (OOD) detection. Does the model separate the evaluated images
from others?

The evaluated images are in distribution. OOD sets are other data sets, or generated: random images
or modified evaluated images, one per evaluated image. Random numbers depend only on the seed and
the index of the image, not on batches or processes. Of other data sets the first images up to that
number are used (files in the order of their names), converted to the model's size and channels: the
shorter side is resized (bicubic), the centre is cropped, gray is repeated to colour, and colour
becomes gray by a weighted mean.

Each image x of d values gets several scores; higher means in distribution. JEM's scores (arXiv
1912.03263, section 5.2):

- ``log-density``: :math:`\log p(x)`, up to one constant, nats;
- ``confidence``: :math:`\max_c p(c \mid x)`;
- ``gradient``: :math:`-\|\nabla \log p(x)\|`; the norm is small where a density has its mass.

Joint models are trained on noisy images, :math:`y = x + \sigma\epsilon`. With the score s(y) and
fixed noise :math:`\epsilon_1, \dots, \epsilon_n` for each image, at each level sigma,

- ``residual``: :math:`-\frac1n \sum_i \|\sigma s(y_i) + \epsilon_i\|^2 / d`, minus the loss of
  denoising score matching for this image. Its integral over :math:`\log\sigma` is the
  log-likelihood up to a constant (Kong et al., arXiv 2302.03792);
- ``noise-level``: :math:`-\bigl|\log\bigl(\frac1n \sum_i \|\sigma s(y_i)\|^2 / d\bigr)\bigr|`.
  On images of its distribution a model estimates the true noise level, and
  :math:`\|\sigma s\|^2` is near d. This is a test of typicality, not of likelihood;
- ``noisy-density``: :math:`\frac1n \sum_i \log p(y_i)`, the density at a noise level seen in
  training, unlike that at 0.

With scores u of n in-distribution and v of m OOD images, and a threshold t,

.. math:: \mathrm{TPR}(t) = P(u \ge t), \qquad \mathrm{FPR}(t) = P(v \ge t),

- ``auroc``: area under the curve of TPR against FPR, :math:`P(u > v) + \tfrac12 P(u = v)`;
- ``aupr_in``: average precision with in-distribution images as positives,
  :math:`\sum_t \Delta\mathrm{TPR}\, \frac{n\,\mathrm{TPR}}{n\,\mathrm{TPR} + m\,\mathrm{FPR}}`;
  ``aupr_out``: with OOD images as positives, by -score;
- ``fpr95``: FPR at the highest threshold with a TPR of at least 95 %.

Ties count as in scikit-learn. Intervals are basic bootstraps (`ebmkit.evaluation.statistics`),
clipped to [0, 1]; both sets are resampled independently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.data import AnyImages, StreamedSet, load_dataset
from ebmkit.data.folders import SUFFIXES, find_images, to_image, to_pixels
from ebmkit.data.hdf5 import load_rows, read_contents
from ebmkit.data.images import MAX_PIXELS_IN_SET, open_image
from ebmkit.energy import EnergyModel, LogDensity, ScoreModel, classifies
from ebmkit.errors import UserError, unknown_name
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import LEVEL, Estimate
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    NonEmptyUnique,
    Positive,
    Suite,
    SuiteConfig,
    Unique,
    check_one_size,
    interval,
    new_table,
    noise_warnings,
    number,
    unique_name,
)
from ebmkit.noise import Sigma, format_sigma
from ebmkit.randomness import image_noise, keyed_generator
from ebmkit.storage.hdf5 import holds, open_hdf5

BINS = 40
SHOWN = 8


class OodConfig(SuiteConfig):
    """Settings of the suite ``ood``."""

    sets: NonEmptyUnique[str] = ("auto",)
    """OOD sets: auto; interpolations, constant, uniform, gaussian, inverted, shuffled; cifar10,
    cifar100, digits, patches; image folders and HDF5 files"""
    sigmas: Unique[Sigma] = (10 / 255, 25 / 255)
    """noise levels of the scores on noisy images, image units"""
    draws: Positive = 4
    """number of noise draws per image and level"""


class OODSet(NamedTuple):
    """A set of OOD images of the model's size and channels, with its name and description."""

    name: str
    description: str
    images: Images


def _gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    std, mean = torch.std_mean(x, dim=(1, 2), keepdim=True)
    return (mean + std * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(x[0].numel(), generator=generator)
    return x.flatten(1)[:, order].reshape(x.shape)


GENERATORS: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], str]] = {
    "constant": (
        lambda x, generator: torch.rand(len(x), 1, 1, generator=generator).expand(x.shape),
        "one gray level or colour",
    ),
    "uniform": (
        lambda x, generator: torch.rand(x.shape, generator=generator),
        "each value uniform in [0, 1]",
    ),
    "gaussian": (_gaussian, "normal noise of each image's mean and deviation, clipped"),
    "inverted": (lambda x, generator: 1 - x, "1 - x"),
    "shuffled": (_shuffled, "the pixels of each image in random order"),
}
"""Functions from an evaluated image (C, H, W) and a generator to an OOD image, and descriptions."""

GENERATED = ("interpolations", *GENERATORS)
"""Names of generated sets."""

NAMED = ("cifar10", "cifar100", "digits", "patches")
"""Names of data sets, whose test images are used."""


@dataclass(frozen=True)
class _Reader:
    """Reads images (B, C, H, W) by index."""

    images: Callable[[Sequence[int]], Tensor]

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.images(rows)


class _GeneratedSet(StreamedSet):
    """A set whose reader returns float32 in [0, 1]."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(self), size):
            yield self.reader.read(self.rows[start : start + size].tolist()), None


def _generated(name: str, source: Images, seed: int) -> Images:
    """The generated set ``name``, one image per image of ``source``."""

    def originals(numbers: Sequence[int]) -> Tensor:
        ((x, _),) = source.select(torch.as_tensor(numbers)).batches(len(numbers))
        return x

    def read(numbers: Sequence[int]) -> Tensor:
        if name == "interpolations":
            return (originals(numbers) + originals([other[k] for k in numbers])) / 2
        generators = [keyed_generator("cpu", "ood", name, seed, k) for k in numbers]
        pairs = zip(originals(numbers).cpu(), generators, strict=True)
        return torch.stack([GENERATORS[name][0](x, generator) for x, generator in pairs])

    other = partners(source.labels, len(source)) if name == "interpolations" else []
    shape = source.channels, source.image_size
    return _GeneratedSet(_Reader(read), torch.arange(len(source)), *shape, name=name, split="test")


def partners(labels: Tensor | None, count: int) -> list[int]:
    """Index of the next image of another class (any, without labels) for each image, cyclically.

    Raises:
        UserError: if all images have one label.
    """
    own = list(range(count)) if labels is None else labels.tolist()
    if len(set(own)) < 2:
        raise UserError(
            f"interpolations are means of two images of different classes, and all {count} are of "
            "one class: remove interpolations from ood.sets, or use more images"
        )
    after: list[int] = [0] * (2 * count)
    for i in reversed(range(2 * count - 1)):
        same = own[(i + 1) % count] == own[i % count]
        after[i] = after[i + 1] if same and after[i + 1] else i + 1
    return [after[i] % count for i in range(count)]


def standard_sets(images: Images, data_dir: Path | None) -> list[str]:
    """Names of the sets of ``auto``: generated sets and, for CIFAR-10, CIFAR-100 if available."""
    if images.name != "cifar10":
        return list(GENERATED)
    where = data_dir or Path("data")
    there = (where / "cifar-100-python").is_dir() or (where / "cifar100-test.h5").is_file()
    return [*(["cifar100"] if there else []), *GENERATED[:4]]


def find_set(name: str, images: Images, data_dir: Path | None, seed: int) -> OODSet:
    """Find or generate the OOD set ``name``.

    Args:
        name: one of `GENERATED` or `NAMED`, an image folder, or an HDF5 file with images
            (N, H, W, C) uint8 at its root or in the group ``test``.
        images: in-distribution images; the set has at most as many, of the same shape.
        data_dir: folder of the data sets.
        seed: random seed of generated sets.

    Raises:
        UserError: if there is no such set, or its files cannot be read.
    """
    if name in GENERATED:
        classes = "" if images.labels is None else " of different classes"
        description = GENERATORS.get(name, (None, f"means of two images{classes}"))[1]
        return OODSet(name, description, _generated(name, images, seed))
    if name in NAMED:
        if name == images.name:
            raise UserError(f"ood.sets: {name!r} is the evaluated data set: name another")
        own = load_dataset(name, data_dir, "test", download=False, progress=False)
        return OODSet(name, f"{name} test images", _reshaped(own, images))
    path = Path(name).expanduser()
    if path.is_dir():
        return OODSet(path.name, f"images in the folder {path.name}", _folder(path, images))
    if path.is_file():
        return OODSet(path.name, f"images in the file {path.name}", _file(path, images))
    if os.sep in name or path.suffix:
        raise UserError(f"ood.sets: there is no folder or HDF5 file {name!r}")
    raise unknown_name("OOD set", name, ["auto", *GENERATED, *NAMED])


def _reshaped(other: AnyImages, like: Images) -> Images:
    """The first images of ``other``, converted to the shape of ``like``."""
    other = other.first(len(like))
    if (other.channels, other.image_size) == (like.channels, like.image_size):
        return replace(other, labels=None, class_names=())

    def read(row: int) -> Any:
        (pixels,), _ = other.read([row])
        return to_image(pixels)

    return _fitted(other.name, len(other), read, like)


def _folder(root: Path, like: Images) -> Images:
    names = find_images(root, root, ask="copy it into the folder, or make a folder without links")
    files = sorted(root / name for name in names)
    if not files:
        raise UserError(f"{str(root)!r} holds no images: put files ending in {SUFFIXES} there")

    def read(row: int) -> Any:
        opened = open_image(files[row], MAX_PIXELS_IN_SET)
        if opened.is_16_bit:
            raise UserError(f"{str(files[row])!r} has 16 bits: convert it to 8")
        return opened.image

    return _fitted(root.name, min(len(files), len(like)), read, like)


def _file(path: Path, like: Images) -> Images:
    with open_hdf5(path) as file:
        groups = [] if holds(file, "images") else ["test", "train"]
        group = next((g for g in groups if holds(file, g)), "")
    contents = read_contents(path, group)
    rows = torch.arange(min(contents.shape[0], len(like)))
    return _reshaped(load_rows(path.name, "test", contents, rows), like)


def _fitted(name: str, count: int, read: Callable[[int], Any], like: Images) -> StreamedSet:
    """Set of ``count`` images that ``read`` opens by index, converted to the shape of ``like``."""
    shape = like.channels, like.image_size

    def pixels(rows: Sequence[int]) -> Tensor:
        return torch.stack([to_pixels(read(row), *shape) for row in rows])

    return StreamedSet(_Reader(pixels), torch.arange(count), *shape, name=name, split="test")


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
    """Names and descriptions of the scores that ``model`` has."""
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
    """Compute the `known_scores` (B,) of images.

    Args:
        model: a model in evaluation mode.
        x: images (B, C, H, W) in [0, 1].
        sigmas: noise levels, image units.
        draws: number of noise draws per image and level.
        seed: random seed of the noise, which also depends on the image.
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
        for eps in image_noise(x, draws, f"ood {seed} {sigma:.9g}").unbind(dim=1):
            y, row = x + sigma * eps, {}
            if isinstance(model, EnergyModel):
                row["noisy-density"], score = model.density_and_score(y, sigma)
            else:
                score = model.score(y, sigma)
            row["residual"] = -(sigma * score + eps).flatten(1).square().mean(dim=1)
            row["noise-level"] = (sigma * score).flatten(1).square().mean(dim=1)
            rows.append(row)
        means = {name: torch.stack([row[name] for row in rows]).mean(dim=0) for name in rows[0]}
        means["noise-level"] = -means["noise-level"].log().abs()
        found |= {_at(name, sigma): means[name] for name in NOISY if name in means}
    return found


def _at(name: str, sigma: float) -> str:
    return f"{name}-{sigma * 255:.4g}"


METRICS = {"auroc": "AUROC", "aupr_in": "AUPR in", "aupr_out": "AUPR out", "fpr95": "FPR95"}
"""Metrics and their names in tables."""

TPR = 0.95

Counts = NDArray[np.float64]


def detection(
    inside: Tensor, outside: Tensor, seed: int = 0, resamples: int = 400
) -> dict[str, Estimate]:
    """`METRICS` with 95 % bootstrap intervals, from finite scores.

    Args:
        inside: scores (n,) of in-distribution images.
        outside: scores (m,) of OOD images.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.
    """
    scores = torch.cat([inside, outside]).double().cpu().numpy()
    levels, place = np.unique(scores, return_inverse=True)
    parts = np.split(place, [len(inside)])
    # not `scipy.stats.bootstrap`: with these two samples and four metrics it takes 2 to 4 times as
    # long (0.3 s on 500 scores), and it refuses a set of one image
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
    """`METRICS` from the numbers of images at each distinct score, in ascending order."""
    n, m = inside.sum(), outside.sum()
    below = outside.cumsum() - outside
    hits, misses = inside[::-1].cumsum(), outside[::-1].cumsum()
    first = int(np.argmax(hits >= TPR * n - 1e-9))

    def average_precision(positive: Counts, negative: Counts) -> float:
        taken = np.maximum((positive + negative).cumsum(), 1)
        return float(positive @ (positive.cumsum() / taken) / positive.sum())

    return [
        float(inside @ (below + outside / 2)) / (n * m),
        average_precision(inside[::-1], outside[::-1]),
        average_precision(outside, inside),
        float(misses[first] / m),
    ]


def find_sets(context: EvaluationContext) -> list[OODSet]:
    """The configured sets; raise `UserError` if one is missing or cannot be generated."""
    found: dict[str, OODSet] = {}
    for name in _names(context):
        own = find_set(name, context.images, context.data_dir, context.seed)
        label = unique_name(own.name, {"in", *found})  # two folders may have the same name
        found[label] = own._replace(name=label)
    return list(found.values())


def _names(context: EvaluationContext) -> list[str]:
    groups = {"auto": standard_sets(context.images, context.data_dir)}
    names = context.option(OodConfig).sets
    return list(dict.fromkeys(own for name in names for own in groups.get(name, [name])))


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Compute scores and metrics; return the document."""
    options, model = context.option(OodConfig), context.model
    names = known_scores(model, options.sigmas)

    def scores(batch: EvaluationBatch) -> dict[str, Tensor]:
        return scores_of(model, batch.x, options.sigmas, options.draws, context.seed)

    def means(columns: Mapping[str, Tensor]) -> dict[str, Estimate]:
        return {name: statistics.bounded_mean(columns[name]) for name in names}

    columns = {"in": context.columns(0.0, scores)}
    inside = columns["in"]
    sets: dict[str, Any] = {}
    warnings = _warnings(model, options)
    for found in find_sets(context):
        own = columns[found.name] = context.columns(0.0, scores, found.images)
        finite = [n for n in names if own[n].isfinite().all() and inside[n].isfinite().all()]
        if len(finite) < len(names):
            warnings.append(
                f"{', '.join(n for n in names if n not in finite)}: NaN or Inf on some images, "
                f"so there are no metrics for {found.name}"
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
    """Histograms over the in-distribution range, extended to OOD scores by up to twice its width
    below and once above."""
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
    if model.card is not None and not model.card.denoises and options.sigmas:
        return [
            f"this model was not trained to denoise (its objective is {model.card.objective!r}): "
            "the scores residual and noise-level mean little"
        ]
    return noise_warnings(model, options.sigmas)


def table(document: dict[str, Any]) -> Table:
    """AUROC with its interval, both AUPRs and FPR95 by set and score."""
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
    title = f"In-distribution and OOD images: {plots.images_of(document)}"
    path = folder / "ood-examples.png"
    plots.image_rows(rows, [""] * SHOWN, path, title=title, names=names)


def _plot_auroc(document: dict[str, Any], path: Path) -> None:
    """Plot AUROC by set (rows) and score (columns); chance is 50 %."""
    sets, scores = document["sets"], list(document["scores"])
    unknown = {"auroc": {"value": np.nan}}
    values = [
        [100 * (found["scores"][k] or unknown)["auroc"]["value"] for k in scores]
        for found in sets.values()
    ]
    size = 3.2 + 0.72 * len(scores), 2.3 + 0.42 * len(sets)
    figure = plots.new_figure(*size, layout="constrained")
    axes = figure.add_subplot()
    image = plots.annotated_map(axes, np.array(values), scores, list(sets), "{:.1f}")
    axes.tick_params(labelsize=8)
    axes.set_xticks(range(len(scores)), scores, rotation=35, ha="right")
    axes.set(xlabel="score", ylabel="OOD set")
    figure.colorbar(image, ax=axes, label="AUROC (%)")
    plots.save_figure(figure, path, f"In distribution: {plots.images_of(document)}")


def _plot_histograms(document: dict[str, Any], path: Path) -> None:
    """Plot one panel per score: its in-distribution histogram, filled, and those of the sets."""

    def shares(counts: Sequence[int]) -> NDArray[np.float64]:
        return 100 * np.array(counts) / max(1, sum(counts))

    scores = document["scores"]
    rows, columns = -(-len(scores) // COLUMNS), min(COLUMNS, len(scores))
    figure = plots.new_figure(0.5 + 3.3 * columns, 1.4 + 2.35 * rows, layout="constrained")
    for number_of, (name, found) in enumerate(document["histograms"].items()):
        axes = figure.add_subplot(rows, columns, number_of + 1)
        if edges := found["edges"]:
            filled: dict[str, Any] = {"fill": True, "color": plots.GRAY, "alpha": 0.55}
            axes.stairs(shares(found["in"]), edges, label="in", **filled)
            for k, (own, counts) in enumerate(found["sets"].items()):
                look = plots.look(k)
                look.pop("marker")
                axes.stairs(shares(counts), edges, lw=1.3, label=own, **look)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(scores[name], fontsize=7.5)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.01)
    figure.supylabel("share of the images (%)", fontsize=9)
    title = f"Scores, higher means in distribution: {plots.images_of(document)}"
    plots.save_figure(figure, path, f"{title}\n(outer bins include values beyond)", legend=4)


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
