r"""Suite ``generation``: compare samples with real images in the feature space of a network.

The samples are in an HDF5 file from `ebmkit sample` (docs/guide/generation.md has its format and
the names of the metrics). The evaluated images are the *reference*. An extractor computes features
and class probabilities of both; `ebmkit.evaluation.features` computes the metrics.

Distances of few images are biased. The *floor* is the same metric for as many other real images as
there are samples, from the other split of the data set or, if that is not available, between two
halves of the reference. It is the value that a perfect model reaches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.compile import unwrapped
from ebmkit.data import DATASETS, ImageSet, load_dataset
from ebmkit.data.hdf5 import read_contents
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.features import (
    KINDS,
    Columns,
    Extractor,
    FeatureColumns,
    by_class,
    class_means,
    columns_of_images,
    energy_gap,
    find_extractor,
    frechet,
    inception_score,
    kernel_distance,
    precision_recall,
    saturation,
)
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    Suite,
    SuiteConfig,
    add_note,
    check_one_size,
    class_name,
    interval,
    new_table,
    number,
)
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array, read_attribute

MIN_SAMPLES_PER_FEATURE = 10
"""Number of samples per feature below which the suite warns that the Frechet distance is biased."""

SHOWN = 24

ATTRIBUTES = ("source", "sampler", "settings", "seed", "run", "filter")


class GenerationConfig(SuiteConfig):
    """Settings of the suite ``generation``."""

    samples: Path | None = None
    """HDF5 file of `ebmkit sample`"""
    extractor: str = "inception"
    """feature extractor: inception, or the run folder of a classifier"""
    weights: Path | None = None
    """file of the Inception weights [default: downloaded by torch-fidelity]"""


class Generated(NamedTuple):
    """Samples without NaN and Inf.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: requested labels (N,) int64, or None.
        description: metadata of the file, the ``count`` of samples, and the number of skipped ones,
            ``left_out``.
    """

    images: Tensor
    labels: Tensor | None
    description: dict[str, Any]


def read_samples(path: Path, like: Images, setting: str = "generation.samples") -> Generated:
    """Read the samples in ``path``, to compare them with the images ``like``.

    Args:
        path: HDF5 file.
        like: images of the expected shape.
        setting: name of the setting that has the path, for errors.

    Raises:
        UserError: if the file is missing, damaged or not from `ebmkit sample`, its images have
            another shape, or all have NaN or Inf.
    """
    what = repr(str(path))
    if not path.is_file():
        raise UserError(
            f"{setting}: there is no file {what}: make one by `ebmkit sample RUN --out DIR`"
        )
    contents, shape = read_contents(path), (*like.image_size, like.channels)
    if contents.shape[1:] != shape:
        own, other = ("x".join(map(str, sides)) for sides in (contents.shape[1:], shape))
        raise UserError(
            f"{setting}: {what} holds images of {own} and {like.name!r} of {other}: use a data set "
            "of the same shape"
        )
    images = contents.read_all()
    with open_hdf5(path) as file:
        marks = find_array(file, "finite", what)
        finite = np.ones(len(images), bool) if marks is None else read_array(marks, what)
        attributes = {name: read_attribute(file, name, what) for name in ATTRIBUTES}
    if finite.shape != (len(images),):
        raise UserError(f"{what}: 'finite' must have one entry for each of {len(images)}")
    finished = torch.from_numpy(finite.astype(bool))
    if not finished.any():
        raise UserError(f"{what}: all of {len(images)} samples have NaN or Inf: sample again")
    if attributes["source"] is None:
        raise UserError(
            f"{what} does not say where its samples come from: it must have the attribute "
            "'source', fresh or buffer, as `ebmkit sample RUN --out DIR` writes it"
        )
    if isinstance(attributes["settings"], str):
        with contextlib.suppress(ValueError):  # keep text that is not JSON
            attributes["settings"] = json.loads(attributes["settings"])
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:8]
    description: dict[str, Any] = {"file": path.name, "fingerprint": digest}
    description |= {name: value for name, value in attributes.items() if value is not None}
    description |= {"count": int(finished.sum()), "left_out": int((~finished).sum())}
    return Generated(
        rearrange(images, "n h w c -> n c h w").contiguous()[finished],
        None if contents.labels is None else contents.labels[finished],
        description,
    )


def other_split(images: Images, data_dir: Path | None) -> Images | None:
    """Return the other split (train or test) of the data set of ``images``; None if unavailable."""
    if images.name not in DATASETS:
        return None
    try:
        other = load_dataset(
            images.name,
            data_dir,
            "test" if images.split == "train" else "train",
            image_size=images.image_size[0] if DATASETS[images.name].resizable else None,
            download=False,
            progress=False,
        )
    except UserError:
        return None
    same = (other.channels, other.image_size) == (images.channels, images.image_size)
    return other if same else None


def prepare(context: EvaluationContext) -> None:
    """Raise `UserError` if samples or extractor are missing."""
    _samples(context)
    if context.world.first:
        _extractor(context)  # may download weights, so only one process does it
    context.world.broadcast(None)


def _samples(context: EvaluationContext) -> Generated:
    path = context.option(GenerationConfig).samples
    if path is None:
        raise UserError(
            "suite generation needs samples: run `ebmkit sample RUN --out DIR` and name the file "
            "by --set generation.samples=FILE.h5"
        )
    return read_samples(path, context.images)


def _extractor(context: EvaluationContext) -> Extractor:
    config = context.option(GenerationConfig)
    return find_extractor(config.extractor, config.weights, context.device)


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Compute the metrics; return the document.

    Raises:
        UserError: if there are no samples, or a feature is NaN or Inf.
    """
    images, generated, extractor = context.images, _samples(context), _extractor(context)
    model = context.model if isinstance(context.model, EnergyModel) else None

    def see(batch: EvaluationBatch) -> Columns:
        return columns_of_images(batch.x, extractor, model, images.num_classes)

    def features(of: Images, labels: Tensor | None) -> FeatureColumns:
        return FeatureColumns(
            context.columns(0.0, see, of), None if labels is None else labels.cpu()
        )

    made = ImageSet(generated.images, name="samples", split="test")
    samples, real = features(made, generated.labels), features(images, images.labels)
    other, baseline = other_split(images, context.data_dir), None
    if other is not None:
        other = other.first(len(generated.images))
        baseline = features(other, other.labels)
        floor, against, of = baseline.columns, real.columns, f"{other.split} images"
    else:
        context.skip(len(images))
        floor, against = ({n: c[k::2] for n, c in real.columns.items()} for k in (0, 1))
        of = "half of the reference, against the other half"
    for name, own in (("samples", samples.columns), ("reference", real.columns), ("floor", floor)):
        if not (own["features"].isfinite().all() and own["logits"].isfinite().all()):
            raise UserError(
                f"generation: the extractor's features or logits of the {name} have NaN or Inf: "
                "name another extractor by generation.extractor"
            )
    known = samples._replace(labels=None)
    if samples.labels is not None and real.labels is not None:
        known = samples if torch.isin(samples.labels, real.labels).all() else known
    accuracy = labels = None
    judged = extractor.model is not None and extractor.model.num_classes == images.num_classes
    if judged and real.labels is not None:
        accuracy = statistics.accuracy(real.columns["logits"].argmax(dim=1) == real.labels)
        if samples.labels is not None:
            others = None if baseline is None or baseline.labels is None else baseline
            classes = by_class(samples, real, others, images.class_names, True)
            right = samples.columns["logits"].argmax(dim=1) == samples.labels
            labels = {
                "accuracy": statistics.accuracy(right),
                "means": class_means(classes),
                "classes": classes,
            }
    document: dict[str, Any] = {
        "sigmas": [],
        "samples": generated.description,
        "extractor": {
            "kind": extractor.kind,
            "run": extractor.run,
            "features": real.columns["features"].shape[1],
            "accuracy": accuracy,
        },
        "names": extractor.names,
        "measures": measures(samples.columns, real.columns, extractor),
        "floor": measures(floor, against, extractor) | {"of": of, "count": len(floor["features"])},
        "saturation": saturation(samples.columns, real.among(known.labels).columns),
        "energy_gap": energy_gap(known, real),
        "labels": labels,
    }
    return document | {"warnings": _warnings(context, extractor, generated, document)}


def measures(samples: Columns, real: Columns, extractor: Extractor) -> dict[str, Any]:
    """Metrics of ``features`` and ``logits`` with intervals, by the extractor's names."""
    a, b = samples["features"], real["features"]
    score = statistics.jackknife(inception_score, samples["logits"], lowest=1.0)
    found = (frechet(a, b), kernel_distance(a, b), score, *precision_recall(a, b))
    return {extractor.names[kind]: each for kind, each in zip(KINDS, found, strict=True)}


def _warnings(
    context: EvaluationContext, extractor: Extractor, generated: Generated, document: dict[str, Any]
) -> list[str]:
    """Return the warnings that apply."""
    least, width = (
        min(len(generated.images), len(context.images)),
        document["extractor"]["features"],
    )
    skipped = generated.description["left_out"]
    high, wide = context.images.image_size
    found = []
    if least < MIN_SAMPLES_PER_FEATURE * width:
        found.append(
            f"{least} images are few for {width} features: {extractor.names['frechet']} is biased "
            "upwards; compare it with the floor, and only for equal numbers of images"
        )
    if skipped:
        total = skipped + len(generated.images)
        found.append(f"{skipped} of {total} samples have NaN or Inf and are skipped")
    if extractor.model is not None:
        own, other = extractor.model.state_dict(), unwrapped(context.model).state_dict()
        if own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own):
            found.append(
                "the classifier is the evaluated model, so the metrics are not independent of it: "
                "train another by ce alone"
            )
    if extractor.kind == "inception" and min(high, wide) < 32:
        found.append(
            f"Inception was trained on photographs, and these images have {high}x{wide} pixels: "
            "use a classifier trained on such images"
        )
    if generated.labels is not None and document["labels"] is None:
        found.append(
            "the samples have labels; to measure the label accuracy, name a classifier of the same "
            "classes by generation.extractor"
        )
    return found


FORMS = {"kernel": "{:.4g}", "precision": "{:.1%}", "recall": "{:.1%}"}


def table(document: dict[str, Any]) -> Table:
    """Metrics with intervals and the floor, label accuracy and metrics by class (for samples with
    labels), saturation and energy gap."""
    count, floor = document["samples"]["count"], document["floor"]
    result = new_table(document, ("measure", f"{count} samples", "95 % interval", "real images"))

    def row(name: str, own: dict[str, Any], form: str, real: str = "") -> None:
        result.add_row(name, number(own, form), interval(own, form), real)

    kinds = {name: kind for kind, name in document["names"].items()}
    for name, found in document["measures"].items():
        form = FORMS.get(kinds[name], "{:.2f}")
        row(name, found, form, number(floor[name], form))
    if labels := document["labels"]:
        whole, means = labels["accuracy"], labels["means"]
        real = number(document["extractor"]["accuracy"] or whole, "{:.1%}")
        row("label accuracy", whole, "{:.1%}", real)
        worst = min(labels["classes"], key=lambda c: c["accuracy"]["value"])
        row(f"worst class: {worst['name']}", worst["accuracy"], "{:.1%}")
        name = f"{document['names']['frechet']} within classes"
        own, real = (number(means[kind], "{:.2f}") for kind in ("frechet", "floor"))
        result.add_row(name, own, "-", real)
        result.add_row("diversity", number(means["diversity"], "{:.2f}"), "-", "1.00")
    for kind, name in (("ends", "black or white"), ("colour", "HSV saturation")):
        if sets := document["saturation"][kind]:
            row(name, sets["samples"], "{:.1%}", number(sets["real"], "{:.1%}"))
    for kind, name in (("energy", "E(x) gap, nats"), ("joint_energy", "E(x,y) gap, nats")):
        if gap := (document["energy_gap"] or {}).get(kind):
            row(name, gap, "{:+.3g}", "0")
    samples, extractor = document["samples"], document["extractor"]
    left = f", {samples['left_out']} with NaN or Inf skipped" if samples["left_out"] else ""
    chosen = f"filter: {samples['filter']}" if samples.get("filter") else "no filter"
    by = "Inception of 2015 (torch-fidelity)"
    if extractor["kind"] == "classifier":
        known = extractor["accuracy"]
        right = f", {known['value']:.1%} right on the reference" if known else ""
        by = f"the classifier of run {extractor['run']}{right}"
    add_note(
        result,
        f"samples: {count}, {samples['source']}{left}, {chosen}\n"
        f"reference: {plots.images_of(document)}; extractor: {by}\n"
        f"real images: {floor['count']}, {floor['of']}",
    )
    return result


COLUMNS = 6


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``generation.png`` (the first samples and reference images, and the metrics) and, for
    samples with labels, ``generation-classes.png``."""
    generated = _samples(context)
    ((real, _),) = context.images.first(SHOWN).batches(SHOWN)
    labels = [] if generated.labels is None else generated.labels[:SHOWN].tolist()
    below = [class_name(context.images, label) for label in labels] or [""] * SHOWN
    made, none = generated.images[:SHOWN] / 255, [(None, "")] * SHOWN
    blocks: list[list[tuple[Tensor | None, str]]] = [
        [*zip(made, below, strict=False), *none],
        [*((image, "") for image in real), *none],
    ]
    lines = range(0, max(len(made), len(real)), COLUMNS)
    samples, floor = document["samples"], document["floor"]
    plots.image_rows(
        [[cell for block in blocks for cell in block[k : k + COLUMNS]] for k in lines],
        [""] * (2 * COLUMNS),
        folder / "generation.png",
        {
            0: f"samples ({samples['count']}, {samples['source']})",
            COLUMNS: f"{document['dataset']} {document['split']} ({document['images']} images)",
        },
        ", ".join(
            f"{name} {found['value']:.3g} (real {floor[name]['value']:.3g})"
            for name, found in document["measures"].items()
        ),
    )
    if document["labels"] is not None:
        _plot_classes(document, folder / "generation-classes.png")


def _plot_classes(document: dict[str, Any], path: Path) -> None:
    """Plot accuracy, Frechet distance, diversity, saturation and energy gap by class, with 95 %
    intervals if known, and a short line at the value of real images."""
    classes, total = document["labels"]["classes"], document["labels"]["accuracy"]
    colour = "colour" if classes[0]["saturation"]["colour"] else "ends"
    pixels = [c["saturation"][colour] for c in classes]
    spread = [
        dict(zip(("value", "low", "high"), (c["diversity"], *c["diversity_interval"]), strict=True))
        for c in classes
    ]
    real = [100 * p["real"]["value"] if p["real"]["count"] else None for p in pixels]
    floors, ones = [c["floor"]["frechet"] for c in classes], [1.0] * len(classes)
    word = "saturation (%)" if colour == "colour" else "black or white (%)"
    panels: list[tuple[str, list[dict[str, Any]], float, Sequence[float | None]]] = [
        ("recognised (%)", [c["accuracy"] for c in classes], 100, []),
        (document["names"]["frechet"], [c["frechet"] for c in classes], 1, floors),
        ("diversity", spread, 1, ones),
        (word, [p["samples"] for p in pixels], 100, real),
    ]
    gaps = [gap["energy"] for c in classes if (gap := c["energy_gap"])]
    gaps = [gap for gap in gaps if gap["value"] is not None]
    if len(gaps) == len(classes):
        panels.append(("E(x) gap (nats)", gaps, 1, [0.0] * len(classes)))
    size = max(6.6, 1.6 + 0.62 * len(classes)), 0.7 + 1.75 * len(panels)
    figure = plots.new_figure(*size, "constrained")
    figure.suptitle(
        f"Samples classified as the requested label: {total['value']:.1%} "
        f"({total['low']:.1%} to {total['high']:.1%}) of {total['count']}; lines: real images",
        fontsize=9,
    )
    rows = zip(figure.subplots(len(panels)), panels, strict=True)
    for number_of, (axes, (label, estimates, scale, lines)) in enumerate(rows):
        x, values = range(len(classes)), [scale * (e["value"] or 0.0) for e in estimates]
        axes.bar(x, values, color=plots.look(number_of)["color"], alpha=0.75, width=0.7)
        plots.bars_within(axes, x, estimates, plots.ANY, scale, fmt="none", ecolor="black", lw=1)
        for k, height in enumerate(lines):
            if height is not None:
                axes.hlines(height, k - 0.42, k + 0.42, color="black", lw=1.4)
        axes.set_ylabel(label)
        axes.set_xticks(range(len(classes)), [c["name"] for c in classes])
        axes.tick_params(labelsize=8)
        axes.tick_params("x", rotation=30 if len(classes) > 10 else 0)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
    figure.axes[0].set_ylim(0, 104)
    plots.save_figure(figure, path)


GENERATION = Suite(
    description="samples against real images: FID, KID, IS, precision, recall, or their "
    "analogues for a classifier",
    measure=measure,
    plot=plot,
    table=table,
    check=lambda model, images: check_one_size("generation", images),
    passes=lambda context: 3,
    prepare=prepare,
    options=GenerationConfig,
    needs="samples",
)
