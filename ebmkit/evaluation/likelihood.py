r"""Suite ``likelihood``: log-likelihood in nats and bits per dimension, by up to three methods.

The log-density is :math:`\log p_{\sigma_0}(y)` of dequantised images y (`ebmkit.likelihood`), with
:math:`\sigma_0` the lowest noise level that the model knows, or a quarter of the distance of the
levels of the pixels if that is more. It is computed by

- ``denoising``: denoising errors (pointwise I-MMSE), every model; ``denoising_label``: the same for
  :math:`\log p(y \mid c)` with the true label, if the model has labels;
- ``energy``: the log-density of a normalised model;
- ``flow``: the probability-flow ODE, noise-conditional models; on the first ``flow_images`` only;
- ``gaussian``: for comparison, a Gaussian of the mean and covariance of the training images. It is
  the reference of the other methods above the trained noise levels.

Bits per dimension bound :math:`-\log_2 P(v)/d` of the quantised images v. Two scores for
out-of-distribution detection follow from the denoising errors, higher means in distribution:

- ``log-density``: :math:`\log p(y)`;
- ``typicality``: :math:`-|\log p(y) - m|`, with m the mean over the evaluated images, an estimate
  of minus the entropy (Nalisnick et al., arXiv 1906.02994, for sets of one image).

OOD images are rounded to the levels of the evaluated ones and dequantised alike.

Intervals are over images; they include the Monte Carlo noise, which is independent from image to
image. ``standard_error`` is that of the mean by Monte Carlo noise alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.analytic import Gaussian
from ebmkit.data import load_dataset
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.ood import detection, find_set
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    Positive,
    Suite,
    SuiteConfig,
    Unique,
    add_note,
    check_one_size,
    class_name,
    interval,
    new_table,
    number,
)
from ebmkit.likelihood import (
    TOLERANCE,
    Dequantization,
    Dequantized,
    Likelihood,
    denoising_likelihood,
    density_level,
    dequantize,
    energy_likelihood,
    fit_gaussian,
    flow_likelihood,
    image_levels,
    is_normalized,
    trained_range,
)
from ebmkit.noise import Sigma, format_sigma

METHODS = {
    "denoising": "denoising errors",
    "denoising_label": "denoising errors, given the label",
    "energy": "energy",
    "flow": "probability-flow ODE",
    "gaussian": "Gaussian of the training images",
}
LARGEST_FIT = 5000
"""Maximum number of training images that the Gaussian is fitted to."""
SHOWN, BINS = 8, 30


class LikelihoodConfig(SuiteConfig):
    """Settings of the suite ``likelihood``."""

    images: Positive = 200
    """number of images"""
    draws: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """number of noisy copies of each image"""
    sigma: Sigma | None = None
    """noise level of the density, image units; null: the lowest trained one, and at least a quarter
    of the distance of the pixels' levels"""
    dequantization: Dequantization = "uniform"
    """uniform or gaussian"""
    flow_images: Annotated[int, Field(ge=0)] = 8
    """number of images for the probability-flow ODE"""
    sets: Unique[str] = ("constant", "interpolations", "shuffled")
    """OOD sets, as in the suite ood"""


@dataclass
class _Plan:
    """What all images of a suite share: level, levels of the pixels, and reference."""

    sigma: float
    levels: Tensor | None
    reference: Gaussian
    fitted_to: str
    seed: int
    how: Dequantization

    def dequantized(self, x: Tensor) -> Dequantized:
        if self.levels is None:
            return Dequantized(x, torch.full((len(x),), torch.nan, dtype=torch.float64))
        levels = self.levels.to(x)
        nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        return dequantize(nearest, levels, self.how, self.sigma, self.seed)


def training_images(context: EvaluationContext) -> tuple[Tensor, str]:
    """Training images (N, C, H, W) like the evaluated ones, and a description of them.

    Up to `LARGEST_FIT` of the training split; the evaluated images if there is none.
    """
    try:
        found: Images = load_dataset(
            context.images.name, context.data_dir, "train", download=False, progress=False
        )
        found, where = found.first(min(LARGEST_FIT, len(found))), f"{context.images.name} train"
    except UserError:
        found, where = context.first(LARGEST_FIT), "the evaluated images"
    x = torch.cat([x for x, _ in found.batches(500)])
    return x, f"{where}, {len(x)} images"


def make_plan(context: EvaluationContext, sigma: float | None, how: Dequantization) -> _Plan:
    """Fit the reference and find the levels of the pixels."""
    x, where = training_images(context)
    own = torch.cat([x for x, _ in context.first(LARGEST_FIT).batches(500)])
    levels = image_levels(torch.cat([x, own]))
    spacing = 0.0 if levels is None else 1 / (len(levels) - 1)
    reference = fit_gaussian(x, spacing).to(context.device)
    level = density_level(context.exact_model, sigma)
    if sigma is None:  # below, a network that has learned the levels has a spike at each of them
        level = max(level, spacing / 4)
    return _Plan(level, levels, reference, where, context.seed, how)


@contextmanager
def _per_batch() -> Iterator[None]:
    """Convergence is judged on the mean over all images, not batch by batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the likelihood did not converge")
        yield


def _column(method: Callable[[Tensor, Tensor | None], Likelihood], plan: _Plan) -> Any:
    def measured(batch: EvaluationBatch) -> dict[str, Tensor]:
        images = plan.dequantized(batch.x)
        with _per_batch():
            found = method(images.images, batch.labels)
        columns = {
            "nats": found.log_density,
            "bits": images.bits_per_dimension(found.log_density),
            "error": found.standard_error,
            "edge": found.edge,
        }
        steps = torch.full((len(batch.x),), float(found.evaluations))
        return columns | {"evaluations": steps}

    return measured


def methods_of(context: EvaluationContext, plan: _Plan) -> dict[str, Any]:
    """The methods that the model allows: functions of (y, labels)."""
    model, options = context.exact_model, context.option(LikelihoodConfig)
    common: dict[str, Any] = {"sigma": plan.sigma}
    drawn = common | {"reference": plan.reference, "seed": context.seed}

    def denoising(y: Tensor, c: Tensor | None = None) -> Likelihood:
        return denoising_likelihood(model, y, c, draws=options.draws, **drawn)

    methods: dict[str, Any] = {"denoising": lambda y, c: denoising(y)}
    if model.num_classes and context.images.num_classes == model.num_classes:
        methods["denoising_label"] = denoising
    if is_normalized(model):
        methods["energy"] = lambda y, c: energy_likelihood(model, y, **common)
    if model.noise_conditional and options.flow_images:
        methods["flow"] = lambda y, c: flow_likelihood(model, y, tolerance=1e-4, **drawn)
    gaussian = plan.reference
    methods["gaussian"] = lambda y, c: energy_likelihood(gaussian, y.to(gaussian.means), **common)
    return methods


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure the likelihood by every method; return the document."""
    options = context.option(LikelihoodConfig)
    images, found_warnings = context.first(options.images), []
    plan = make_plan(context, options.sigma, options.dequantization)
    dim = images.channels * images.image_size[0] * images.image_size[1]
    columns: dict[str, dict[str, Tensor]] = {}
    methods: dict[str, Any] = {}
    for name, method in methods_of(context, plan).items():
        own = images.first(min(options.flow_images, len(images))) if name == "flow" else images
        passes = 0 if name == "gaussian" else 1
        with warnings.catch_warnings(record=True) as failures:
            warnings.simplefilter("always")
            columns[name] = found = context.columns(0.0, _column(method, plan), own, passes=passes)
        found_warnings += sorted({str(failure.message) for failure in failures})
        error = float(found["error"].square().sum().sqrt()) / len(own)
        methods[name] = {
            "about": METHODS[name],
            "count": len(own),
            "nats": statistics.mean(found["nats"]),
            "bits": None if plan.levels is None else statistics.mean(found["bits"]),
            "standard_error": error,
            "range_error": 0.5 * abs(float(found["edge"].mean())),
            "evaluations": float(found["evaluations"].mean()),
        }
        if error / dim > TOLERANCE:
            found_warnings.append(
                f"{METHODS[name]}: did not converge, the standard error of the mean is "
                f"{error / dim:.3g} nats per dimension, above {TOLERANCE:g}"
            )
    main = columns["denoising"]
    sets = {name: _ood(context, plan, images, main["nats"], name) for name in options.sets}
    scale = "nats" if plan.levels is None else "bits"
    order = main[scale].argsort(descending=scale == "nats").tolist()
    return {
        "images": len(images),
        "sigma": plan.sigma,
        "levels": None if plan.levels is None else len(plan.levels),
        "dimensions": dim,
        "reference": plan.fitted_to,
        "methods": methods,
        "classes": _classes(images, columns["denoising"]),
        "sets": {name: {k: v for k, v in s.items() if k != "nats"} for name, s in sets.items()},
        "histogram": _histogram({"in": main["nats"], **{n: s["nats"] for n, s in sets.items()}}),
        "extremes": {"most": order[:SHOWN], "least": order[::-1][:SHOWN]},
        "extreme_values": [float(main[scale][k]) for k in [*order[:SHOWN], *order[::-1][:SHOWN]]],
        "warnings": [*_warnings(context, plan), *found_warnings],
    }


def _warnings(context: EvaluationContext, plan: _Plan) -> list[str]:
    found = []
    if plan.fitted_to.startswith("the evaluated"):
        found.append(
            "the training images were not found, so the Gaussian is fitted to the evaluated "
            "images: give --data-dir"
        )
    if plan.levels is None:
        found.append("these images are not of 8 bits, so they have no bits per dimension")
    return found


def _classes(images: Images, column: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Means by class, of the classes with images."""
    if images.labels is None:
        return []
    return [
        {
            "name": class_name(images, label),
            "count": int(own.sum()),
            "nats": statistics.mean(column["nats"][own]),
            "bits": statistics.mean(column["bits"][own]),
        }
        for label in range(images.num_classes)
        if (own := images.labels.cpu() == label).any()
    ]


def _ood(
    context: EvaluationContext, plan: _Plan, images: Images, inside: Tensor, name: str
) -> dict[str, Any]:
    found = find_set(name, images, context.data_dir, context.seed)
    method = methods_of(context, plan)["denoising"]
    outside = context.columns(0.0, _column(method, plan), found.images)["nats"]
    typical = [-(column - inside.mean()).abs() for column in (inside, outside)]
    seed = context.seed
    return {
        "about": found.description,
        "count": len(found.images),
        "mean": statistics.mean(outside),
        "scores": {
            "log-density": detection(inside, outside, seed),
            "typicality": detection(typical[0], typical[1], seed),
        },
        "nats": outside,
    }


def _histogram(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts of log p(y), nats; the outer bins include values beyond."""
    inside = columns["in"].double()
    low, high = float(inside.min()), float(inside.max())
    wide = max(high - low, 1e-6)
    edges = np.linspace(low - 2 * wide, high + wide, BINS + 1)
    counts = {
        name: np.histogram(c.double().clamp(edges[0], edges[-1]).numpy(), edges)[0].tolist()
        for name, c in columns.items()
    }
    return {"edges": edges.tolist(), "counts": counts}


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``likelihood.png`` (histogram, means by class) and ``likelihood-images.png``."""
    scale = "nats" if document["levels"] is None else "bits"
    unit = "log p(x), nats" if scale == "nats" else "bits per dimension"
    figure = plots.new_figure(9.6, 4.0, layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = document["histogram"]["edges"]
    for k, (name, counts) in enumerate(document["histogram"]["counts"].items()):
        look: dict[str, Any] = {"lw": 1.3, "label": name, "color": plots.look(k)["color"]}
        if name == "in":
            look |= {"fill": True, "alpha": 0.5, "color": plots.GRAY}
        left.stairs(100 * np.array(counts) / max(1, sum(counts)), edges, **look)
    plots.annotate(left, "Log-density (outer bins: values beyond)", "log p, nats", "images (%)")
    classes = [c for c in document["classes"] if c[scale]["value"] is not None]
    if classes:
        at = list(range(len(classes)))
        bars: dict[str, Any] = {"fmt": "o", "color": plots.BLUE, "ms": 4}
        plots.bars_within(right, at, [c[scale] for c in classes], plots.ANY, **bars)
        plots.class_ticks(right, [c["name"] for c in classes])
    else:
        right.set_axis_off()
    plots.annotate(right, "By class, with 95 % intervals", "class", unit)
    title = f"Likelihood by denoising errors: {plots.images_of(document)}"
    plots.save_figure(figure, folder / "likelihood.png", title, legend=4)
    images = context.first(document["images"])
    values, rows = iter(document["extreme_values"]), []
    for which in document["extremes"].values():
        shown = next(iter(images.select(torch.tensor(which)).batches(SHOWN)))[0]
        row = [(x, f"{next(values):.2f}") for x in shown]
        rows.append([*row, *[(None, "")] * (SHOWN - len(row))])
    plots.image_rows(
        rows,
        [""] * SHOWN,
        folder / "likelihood-images.png",
        title=f"Most and least likely images, {unit}: {plots.images_of(document)}",
        names=("most likely", "least likely"),
    )


def table(document: dict[str, Any]) -> Table:
    """Nats and bits per dimension by every method, and AUROC of the OOD sets below."""
    heads = ("log p by", "nats", "bits/dim", "95 % interval", "MC error", "images", "evaluations")
    result = new_table(document, heads)
    scale = document["dimensions"] * np.log(2)
    for name, method in document["methods"].items():
        bits, error = method["bits"], method["standard_error"]
        result.add_row(
            name.replace("_", ", given the "),
            number(method["nats"], "{:.2f}"),
            number(bits, "{:.3f}"),
            "-" if bits is None else interval(bits, "{:.3f}"),
            "-" if not error else f"{error / scale if bits else error:.3f}",
            str(method["count"]),
            f"{method['evaluations']:.0f}",
        )
    edge = document["methods"]["denoising"]["range_error"]
    note = f"density at sigma {format_sigma(document['sigma'])}"
    if edge:
        note += f"; assumption of a Gaussian above the trained range: about {edge:.2g} nats"
    notes = [note]
    for name, found in document["sets"].items():
        areas = (number(own["auroc"], "{:.3f}") for own in found["scores"].values())
        notes.append(f"AUROC against {name}: log-density {{}}, typicality {{}}".format(*areas))
    add_note(result, "\n".join(notes))
    return result


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if the model has no likelihood, or the images differ in size."""
    check_one_size("likelihood", images)
    trained_range(model)


def passes(context: EvaluationContext) -> int:
    """Number of passes over the images."""
    options, model = context.option(LikelihoodConfig), context.exact_model
    labels = bool(model.num_classes) and context.images.num_classes == model.num_classes
    flow = model.noise_conditional and bool(options.flow_images)
    return 1 + labels + is_normalized(model) + flow + len(options.sets)


LIKELIHOOD = Suite(
    description="log-likelihood in nats and bits per dimension: by denoising errors, energy and "
    "ODE; OOD scores",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    passes=passes,
    options=LikelihoodConfig,
    exact=True,
)
