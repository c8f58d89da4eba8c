r"""Suite ``diffusion-path``: accuracy and energies along the forward process of a diffusion model
(RCG figures 4.5, 4.6, 4.9, 4.12 and 4.15).

A diffusion model of T steps adds noise to images :math:`u = 2x - 1`,

.. math:: u_t = \sqrt{\bar\alpha_t}\, u + \sqrt{1 - \bar\alpha_t}\, \epsilon .

The suite measures four views of the image at timestep t, as inputs of a classifier for guidance:

============ ===================================================== =============================
view         image                                                 noise standard deviation
============ ===================================================== =============================
``timestep`` :math:`v_t = (u_t + 1)/2`, as in the thesis           :math:`\sqrt{1 - \bar\alpha_t}/2`
``image``    :math:`y = x + \sigma_t \epsilon`, image units        :math:`\sigma_t = \frac12
                                                                   \sqrt{(1 - \bar\alpha_t) /
                                                                   \bar\alpha_t}`
``dark``     :math:`\sqrt{\bar\alpha_t}\, x`: towards black        0
``faded``    :math:`v_t` without noise: towards gray               0
============ ===================================================== =============================

``timestep`` and ``image`` have the same :math:`\epsilon` and differ only in contrast. RCG section
4.4 multiplies test images by :math:`\sqrt{\bar\alpha_t}` and does not state their range: in [0, 1]
this darkens them (``dark``), in [-1, 1] it reduces contrast (``faded``). Nothing is clipped.
Noise-conditional models get the standard deviation of the noise in their input. The noise is that
of the suite ``classify`` at :math:`\sigma_t`.

The suite measures accuracy per view, and the means of

.. math:: E(x) = -\log p(x), \qquad E(x, y) = -\log p(x, y) = E(x) - \log p(y \mid x)

with the true label y, in nats, up to one constant per model; for clean images also by class (source
of the energies: see `ebmkit.models.heads`). RCG is the thesis "Classifier-free Diffusion Guidance
with a Robust Energy-Based Classifier" (Sapienza, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.compile import optimize
from ebmkit.data import ImageSet
from ebmkit.energy import Energies, EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.generation import Generated, read_samples
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    Positive,
    Suite,
    SuiteConfig,
    add_note,
    check_classifies,
    check_one_size,
    load_comparison_models,
    new_table,
    noisy_batches,
    number,
    unique_name,
)
from ebmkit.models.heads import EnergySource, LogitEnergy, energy_source
from ebmkit.noise import Schedule, make_schedule

VIEWS = {
    "timestep": "in the range of images, sqrt(abar) y + (1 - sqrt(abar))/2",
    "image": "in image units, y = x + sigma eps, the same noise",
    "dark": "sqrt(abar) x, images in [0, 1], no noise",
    "faded": "x_t without its noise",
}
SHORT = dict(zip(VIEWS, ("x_t", "image", "dark", "faded"), strict=True))
ENERGIES = {"energy": "E(x)", "joint_energy": "E(x, y)"}
Views = dict[str, tuple[Tensor, float]]
"""Images (B, C, H, W) and the standard deviation of their noise, image units, by view."""

PLOTTED = 9
"""Maximum number of timesteps at which the plot shows an image."""

LISTED = (0.1, 0.2, 0.4, 1.0)
"""Timesteps at which the table lists accuracy, as fractions of the last timestep."""

PANELS = {
    "Accuracy against noise": ("timestep", "image"),
    "Accuracy against darkness and contrast": ("dark", "faded"),
}


class DiffusionPathConfig(SuiteConfig):
    """Settings of the suite ``diffusion-path``."""

    schedule: Literal["linear", "cosine"] = "linear"
    """noise schedule"""
    steps: Annotated[int, Field(ge=2)] = 1000
    """timesteps T of the diffusion model"""
    step: Positive = 50
    """difference between measured timesteps"""
    until: Annotated[int, Field(ge=0)] | None = None
    """last measured timestep [default: T - 1]"""
    name: str = "this run"
    """name of the evaluated run in tables and plots"""
    beside: tuple[Path, ...] = ()
    """run folders of further classifiers, shown in the same plots"""
    samples: Path | None = None
    """HDF5 file of `ebmkit sample`, whose energies are compared with those of the data"""
    energies: EnergySource = "auto"
    """definition of E(x): model (its own density), logits (-logsumexp), auto (model if its density
    was trained, else logits)"""

    def timesteps(self) -> tuple[int, ...]:
        """The measured timesteps: 0, step, ... and the last one.

        Raises:
            UserError: if ``until`` is beyond the schedule.
        """
        last = self.steps - 1 if self.until is None else self.until
        if last >= self.steps:
            raise UserError(
                f"diffusion-path.until {last} is out of range: with diffusion-path.steps "
                f"{self.steps} it is 0 to {self.steps - 1}"
            )
        return tuple(sorted({*range(0, last + 1, self.step), last}))


def views_at(schedule: Schedule, t: int, x: Tensor, y: Tensor) -> Views:
    """Compute the `VIEWS` of images at timestep ``t``.

    Args:
        schedule: noise schedule of the diffusion model.
        t: the timestep.
        x: clean images (B, C, H, W) in [0, 1].
        y: noisy images, x plus noise at level ``schedule.sigma(t)``, image units.

    Returns:
        Images, shape of x, and their noise level, image units, by view.
    """
    low, high = schedule.image_range
    root, sigma = math.sqrt(schedule.abar(t)), schedule.sigma(t)

    def rescaled(images: Tensor) -> Tensor:
        return (schedule.from_image_units(images, t) - low) / (high - low)

    return {
        "timestep": (rescaled(y), root * sigma),
        "image": (y, sigma),
        "dark": (root * x, 0.0),
        "faded": (rescaled(x), 0.0),
    }


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if the model cannot classify the images, or their sizes differ."""
    check_classifies(model, images)
    check_one_size("diffusion-path", images)


def prepare(context: EvaluationContext) -> None:
    """Raise `UserError` if settings are inconsistent, or runs or samples are missing."""
    context.option(DiffusionPathConfig).timesteps()
    _models(context)
    _samples(context)


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure all models at all timesteps; return the document."""
    config, images = context.option(DiffusionPathConfig), context.images
    schedule, timesteps = make_schedule(config.schedule, config.steps), config.timesteps()
    models, generated = _models(context), _samples(context)
    assert images.labels is not None
    labels, names = images.labels.cpu(), images.class_names

    def entry(found: Energies) -> dict[str, Any]:
        right = found.log_posterior().argmax(dim=1) == labels
        return {"accuracy": statistics.accuracy(right), **energy_statistics(found, labels)}

    documents: dict[str, dict[str, Any]] = {}
    for (name, _), found in _energies(context, models, 0.0).items():
        documents[name] = {
            "reading": "logits" if isinstance(models[name], LogitEnergy) else "model",
            "clean": entry(found),
            "path": {view: [] for view in VIEWS},
            "classes": class_statistics(found, labels, names),
            "samples": None,
        }
    for t in timesteps:
        where = {"t": t, "sigma": schedule.sigma(t), "abar": schedule.abar(t)}

        def views(batch: EvaluationBatch, t: int = t) -> Views:
            return views_at(schedule, t, batch.x, batch.y)

        for (name, view), found in _energies(context, models, schedule.sigma(t), views).items():
            documents[name]["path"][view].append(where | entry(found))
    chance = 1 / context.model.num_classes
    warnings = []
    for name, document in documents.items():
        paths = document["path"].items()
        document["chance_from"] = {
            view: next((e["t"] for e in path if e["accuracy"].low <= chance), None)
            for view, path in paths
        }
        bad = [e["t"] for _, path in paths for e in path if e["energy"]["value"] is None]
        if bad:
            warnings.append(
                f"{name}: energies are NaN or Inf on some images from timestep {min(bad)} on, so "
                "their means are undefined"
            )
    if generated is not None:
        samples, own = ImageSet(generated.images, name="samples", split="test"), generated.labels
        for (name, _), found in _energies(context, models, 0.0, images=samples).items():
            documents[name]["samples"] = energy_statistics(found, own)
            if own is not None:
                documents[name]["samples"]["classes"] = class_statistics(found, own, names)
    return {
        "sigmas": [schedule.sigma(t) for t in timesteps],
        "timesteps": timesteps,
        "abar": [schedule.abar(t) for t in timesteps],
        "chance": chance,
        "views": VIEWS,
        "models": documents,
        "files": generated and generated.description,
        "warnings": warnings,
    }


def _energies(
    context: EvaluationContext,
    models: dict[str, EnergyModel],
    sigma: float,
    views: Callable[[EvaluationBatch], Views] = lambda batch: {"clean": (batch.x, 0.0)},
    images: Images | None = None,
) -> dict[tuple[str, str], Energies]:
    """Energies of all images, by (model, view)."""

    def of_batch(batch: EvaluationBatch) -> dict[tuple[str, str, str], Tensor]:
        return {
            (name, view, field): column
            for view, (x, level) in views(batch).items()
            for name, model in models.items()
            for field, column in model.energies(x, level)._asdict().items()
        }

    columns = context.columns(sigma, of_batch, images)
    keys = dict.fromkeys((name, view) for name, view, _ in columns)
    return {key: Energies(*(columns[*key, field] for field in Energies._fields)) for key in keys}


def energy_statistics(found: Energies, labels: Tensor | None = None) -> dict[str, Any]:
    """Statistics of ``energy`` E(x) and, with ``labels`` (N,), of ``joint_energy`` E(x, y).

    Both have ``value`` (the mean, nats), ``low``, ``high`` (its 95 % interval), ``count`` and
    ``std`` over images.
    """
    quantities = {"energy": -found.log_density}
    if labels is not None and found.logits.shape[1]:
        quantities["joint_energy"] = -(found.log_density + found.at_label(labels))
    document = {}
    for name, values in quantities.items():
        std = float(values.double().std()) if len(values) > 1 else math.nan
        document[name] = statistics.mean(values).document() | {"std": statistics.finite(std)}
    return document


def class_statistics(
    found: Energies, labels: Tensor, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """`energy_statistics` by class, in ascending order, without empty classes.

    Args:
        found: energies of N images.
        labels: labels of the images (N,).
        names: class names; a class without a name is named by its index.

    Returns:
        One entry per class, with ``label`` and ``name``.
    """
    return [
        {"label": label, "name": names[label] if label < len(names) else str(label)}
        | energy_statistics(
            Energies(*(column[labels == label] for column in found)), labels[labels == label]
        )
        for label in sorted(set(labels.tolist()))
    ]


def _models(context: EvaluationContext) -> dict[str, EnergyModel]:
    """The evaluated model and those of ``beside``, with the selected energies, by name.

    Raises:
        UserError: if a run is missing, or its model has other classes or channels.
    """
    assert isinstance(context.model, EnergyModel)
    config = context.option(DiffusionPathConfig)
    found = {config.name: context.model}
    for name, model in load_comparison_models(context, config.beside, "diffusion-path.beside"):
        found[unique_name(name, found)] = optimize(model, context.inference.precision)
    return {
        name: LogitEnergy(model) if energy_source(model, config.energies) == "logits" else model
        for name, model in found.items()
    }


def _samples(context: EvaluationContext) -> Generated | None:
    path = context.option(DiffusionPathConfig).samples
    if path is None:
        return None
    found = read_samples(path, context.images, "diffusion-path.samples")
    known = context.model.num_classes
    labels = [] if found.labels is None else found.labels.tolist()
    if (label := max(labels, default=0)) >= known:  # none is below 0 in such a file
        raise UserError(
            f"diffusion-path.samples: {str(path)!r} has label {label}, and this model has "
            f"labels 0 to {known - 1}"
        )
    return found


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``diffusion-path.png``, ``diffusion-energies.png`` and ``class-energies.png``."""
    config, timesteps = context.option(DiffusionPathConfig), document["timesteps"]
    schedule = make_schedule(config.schedule, config.steps)
    strips: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    places = np.linspace(0, len(timesteps) - 1, min(PLOTTED, len(timesteps))).round()
    for t in [timesteps[int(i)] for i in np.unique(places)]:
        (batch,) = noisy_batches(context.images.first(1), schedule.sigma(t), context.seed, 1)
        for view, (images, _) in views_at(schedule, t, batch.x, batch.y).items():
            strips[view].append(images[0])
    where = f"{plots.images_of(document)}, {config.schedule} schedule of {config.steps} steps"
    _plot_accuracy(document, strips, where, folder / "diffusion-path.png")
    _plot_energies(document, where, folder / "diffusion-energies.png")
    _plot_classes(document, folder / "class-energies.png")


def _plot_accuracy(
    document: dict[str, Any], strips: dict[str, list[Tensor]], where: str, path: Path
) -> None:
    """Plot accuracy against the timestep for all views, above strips that show each view of an
    image at evenly spaced timesteps."""
    models, timesteps = document["models"], document["timesteps"]
    share = 1 / len(strips["timestep"])
    height = 4.2 + 9 * share + 0.2 * -(-len(models) // 4)
    figure = plots.new_figure(10.6, height, layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(2.7, 4.5 * share, 4.5 * share))
    # align the first and last timestep with the centres of the strip's first and last image
    margin = 0.5 * share * max(1, timesteps[-1] - timesteps[0]) / (1 - share)
    limits = {"xlim": (timesteps[0] - margin, timesteps[-1] + margin)}
    for column, (title, views) in enumerate(PANELS.items()):
        axes = figure.add_subplot(grid[0, column])
        for row, (view, line) in enumerate(zip(views, ("-", "--"), strict=True)):
            for i, (name, found) in enumerate(models.items()):
                accuracies = [entry["accuracy"] for entry in found["path"][view]]
                look = plots.look(i) | {"ms": 3.5, "ls": line, "label": None if row else name}
                plots.plot_estimates(axes, timesteps, accuracies, 100, **look)
            strip = figure.add_subplot(grid[row + 1, column])
            plots.show_image(strip, torch.cat(strips[view], dim=-1), "", "")
            strip.set_aspect("auto")
            strip.set_ylabel(f"{SHORT[view]} ({line})", fontsize=8, labelpad=3)
        axes.axhline(100 * document["chance"], color=plots.GRAY, ls=":", lw=1)
        axes.grid(alpha=0.25, lw=0.5)
        y = "" if column else "accuracy (%), dotted: chance"
        plots.annotate(axes, title, "timestep t", y, ylim=(0, 102), **limits)
    plots.save_figure(figure, path, f"{where}, bands 95 %", legend=4)


def _plot_energies(document: dict[str, Any], where: str, path: Path) -> None:
    """Plot mean energies against the timestep for the views ``timestep`` and ``image``."""
    models = document["models"]
    figure = plots.new_figure(10, 3.9 + 0.17 * len(models), layout="constrained")
    panels = figure.subplots(1, 2)
    views = {"timestep": "x_t", "image": "image units, x + sigma eps"}
    for axes, (view, words) in zip(panels, views.items(), strict=True):
        known: list[float] = []
        for i, (name, found) in enumerate(models.items()):
            for line, (quantity, symbol) in zip(("-", "--"), ENERGIES.items(), strict=True):
                rows = [e for e in found["path"][view] if e[quantity]["value"] is not None]
                values = [e[quantity]["value"] for e in rows]
                known += values
                look = plots.look(i) | {"ms": 3.5, "ls": line, "label": f"{name}: {symbol}"}
                axes.plot([e["t"] for e in rows], values, **look)
        low, quarter, middle, most, high = np.quantile(known or [0.0], [0, 0.25, 0.5, 0.75, 1])
        if high - low > 30 * max(most - quarter, 1e-12) and middle != 0:
            # on a linear scale, outliers would flatten most values to one line
            axes.set_yscale("symlog", linthresh=max(1.0, float(np.median(np.abs(known)))))
        plots.annotate(axes, f"Input: {words}", "timestep t")
        axes.grid(alpha=0.25, lw=0.5)
    panels[0].set_ylabel("mean energy (nats)")
    title = "Energies along the forward process, each model's up to a constant"
    plots.save_figure(figure, path, f"{title}: {where}", legend=2)


def _plot_classes(document: dict[str, Any], path: Path) -> None:
    """Plot mean and standard deviation of E(x) by class, of data and samples, a panel per model."""
    models = document["models"]
    most = max(len(found["classes"]) for found in models.values())
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    size = (max(3.4, 1.0 + 0.42 * most) * columns, 0.9 + 2.8 * rows)
    figure = plots.new_figure(*size, layout="constrained")
    for place, (name, found) in enumerate(models.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        labels, samples = [c["label"] for c in found["classes"]], found["samples"] or {}
        for kind, label, aside, colour, marker in (
            (found, "data", -0.12, plots.BLUE, "o"),
            (samples, "samples", 0.12, plots.ORANGE, "s"),
        ):
            known = [c for c in kind.get("classes", []) if c["energy"]["value"] is not None]
            known = [c for c in known if c["label"] in labels]
            x = [labels.index(c["label"]) + aside for c in known]
            y, std = ([c["energy"][key] or 0.0 for c in known] for key in ("value", "std"))
            look: dict[str, Any] = {"fmt": marker, "color": colour, "ms": 4, "elinewidth": 0.9}
            axes.errorbar(x, y, std, label=label if known else None, capsize=2, **look)
        if samples:
            value, std = (samples["energy"][key] for key in ("value", "std"))
            axes.axhline(value or 0.0, color=plots.ORANGE, ls="--", lw=1, label="samples, all")
            if value is not None and std is not None:
                axes.axhspan(value - std, value + std, color=plots.ORANGE, alpha=0.1, lw=0)
        names = [c["name"] for c in found["classes"]]
        plots.class_ticks(axes, names, size=7 if most > 20 else 8)
        how = "-logsumexp of the logits" if found["reading"] == "logits" else "-log density"
        plots.annotate(axes, f"{name} ({how})", y="" if place % columns else "E(x) (nats)")
        axes.grid(axis="y", alpha=0.25, lw=0.5)
    title = f"E(x) by class, mean and standard deviation over images: {plots.images_of(document)}"
    plots.save_figure(figure, path, title, legend=3)


def table(document: dict[str, Any]) -> Table:
    """Accuracy and energies by model and view at a few timesteps, and where accuracy reaches
    chance."""
    timesteps = np.array(document["timesteps"])
    rows = sorted({int(abs(timesteps - share * timesteps[-1]).argmin()) for share in LISTED})
    heads = ("input", "clean", *(f"t={timesteps[i]}" for i in rows), "chance from")
    result = new_table(document, heads)
    widest = 0.0
    for name, found in document["models"].items():
        result.add_row(name)
        for view, path in found["path"].items():
            values = [entry["accuracy"] for entry in (found["clean"], *(path[i] for i in rows))]
            widest = max(widest, *(e["high"] - e["low"] for e in values))
            at = found["chance_from"][view]
            shown = [number(e, "{:.1%}") for e in values]
            result.add_row(f"  {SHORT[view]}", *shown, number(at, "t={}"))
        path = [found["clean"], *(found["path"]["timestep"][i] for i in rows)]
        for quantity, symbol in ENERGIES.items():
            result.add_row(f"  {symbol}", *(number(entry[quantity], "{:.4g}") for entry in path))
            if found["samples"] and quantity in found["samples"]:
                result.add_row("  samples", number(found["samples"][quantity], "{:.4g}"))
        result.add_section()
    note = [f"{SHORT[view]}: {words}" for view, words in document["views"].items()]
    note.append("E: means, nats; along t of the input x_t")
    note.append(f"95 % intervals of accuracies: at most {100 * widest:.1f} points wide")
    add_note(result, "\n".join(note))
    return result


def passes(context: EvaluationContext) -> int:
    """One pass for clean images, one per timestep, and one for samples."""
    config = context.option(DiffusionPathConfig)
    return 1 + len(config.timesteps()) + (config.samples is not None)


DIFFUSION_PATH = Suite(
    description="accuracy and energies along a diffusion model's forward process, on "
    "darkened images, by class",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    passes=passes,
    prepare=prepare,
    options=DiffusionPathConfig,
)
