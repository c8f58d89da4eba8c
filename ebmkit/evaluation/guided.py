r"""Measures of samples that were asked for by label, beside real images of these labels.

How often an independent classifier sees the label, how far the samples of a class are from its real
images in the classifier's features and how much they vary, how saturated they are, and how their
energy differs: the numbers by which ways of guiding are compared.

- *Recognised* (``accuracy``): the share that the extractor gives the label asked for; Wilson's
  interval.
- *Distance of a class*: ``frechet`` and ``kernel`` (`ebmkit.evaluation.features`) between samples
  and real images of one label. Of few images the Frechet distance is biased upwards, the more the
  fewer; so beside it stands its ``floor``, the same of as many other real images of that label (or
  of as many as there are, ``count``). The kernel distance has no bias, whatever the number.
- *Diversity*: mean distance of two samples over that of two real images of the label, in features.
- *Saturation*: ``ends``, the share of pixel values up to 1/255 or from 254/255; ``colour``, of
  colour images, the mean saturation of HSV, :math:`(\max - \min)/\max` over the channels. Both are
  taken of each image and averaged. Floats are rounded to 255ths first, as real images are.
- *Energy gap*: the mean of E under a model over the samples minus that over real images of the same
  label, nats. RCG section 4.8 has it far below 0. Of all samples it is the mean of the gaps of
  their own labels, so it does not depend on how many samples each label has. Intervals are
  Welch's; over all labels, Student's of the samples, with the error of the real means added.

Without labels everything counts as one class, and nothing is said by class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.data import ImageSet
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import Images
from ebmkit.evaluation.features import (
    WHOLE,
    Extractor,
    frechet_distance,
    kernel_distance,
    mean_distance,
)
from ebmkit.evaluation.statistics import Estimate, ImageEnergies, energies_of, to_json
from ebmkit.metrics import predict
from ebmkit.models.heads import EnergySource

Columns = dict[str, Tensor]

UNKNOWN = float("nan")

PAIRED = 1000
"""Real images of a label at most, of which mean distances are taken."""

MOST_FEATURES = 512
"""Features, up to which the Frechet distance gets an interval: each is 20 distances."""


class Features(NamedTuple):
    """Columns, one entry per image, and the labels (N,), or None."""

    columns: Columns
    labels: Tensor | None

    def among(self, labels: Tensor | None) -> Features:
        """The images whose label is among ``labels``; all, if either has none."""
        if self.labels is None or labels is None:
            return self
        own = torch.isin(self.labels, labels)
        return Features({name: c[own] for name, c in self.columns.items()}, self.labels[own])


def measure_guided(
    samples: Tensor,
    labels: Tensor | None,
    real: Images,
    extractor: Extractor,
    energy_model: EnergyModel | None = None,
    *,
    others: Images | None = None,
    reading: EnergySource = "auto",
    batch_size: int = 250,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Everything in the module's text, of samples beside real images.

    Args:
        samples: (N, C, H, W), uint8 or floats in [0, 1] (clipped and rounded to 255ths).
        labels: (N,) that were asked for, or None.
        real: images of the same shape, with labels if there are any of samples.
        extractor: `features.find_extractor` or `features.classifier_of`.
        energy_model: under which energies are taken; None: no energy gap.
        others: other real images, for the floor, best as many as there are samples of each label;
            None: halves of ``real`` against each other.
        reading: how energies are read; see `ebmkit.models.heads`.
        batch_size: images at a time.
        device: where extractor and model are; None: where the extractor's classifier is.

    Returns:
        A document as JSON has it; estimates are ``{"value", "low", "high", "count"}`` with 95 %
        intervals, null where undefined.

        - ``count``, ``real_count``: samples, and real images of the same labels;
        - ``accuracy``: recognised, or null without labels or with an extractor of other classes;
        - ``frechet``, ``kernel``: of all samples against all those real images; ``floor``:
            ``count``, ``frechet`` and ``kernel`` of other real images;
        - ``saturation``: ``ends`` and ``colour`` (null for gray images), each with ``samples`` and
            ``real``;
        - ``energy_gap``: ``energy`` and ``joint_energy`` (of E(x, y); null without labels that the
            model knows), or null without a model;
        - ``means``: as `class_means`, or null without labels;
        - ``classes``: as `by_class`, or null without labels.

    Raises:
        UserError: if shapes or labels do not fit, or a sample is not finite.
    """
    pixels = _pixels(samples)
    shape = (real.channels, *real.image_size)
    if tuple(pixels.shape[1:]) != shape:
        raise UserError(
            f"samples of shape {tuple(pixels.shape[1:])} cannot be compared with images of {shape} "
            f"({real.name!r}): take a data set of the same shape"
        )
    labels = None if labels is None else _labels(labels, len(pixels), real)
    device = device or ("cpu" if extractor.model is None else device_of(extractor.model))

    def features(images: Images, own: Tensor | None) -> Features:
        classes = real.num_classes
        with torch.no_grad():
            rows = [
                columns_of_images(x.to(device), extractor, energy_model, classes, reading)
                for x, _ in images.batches(batch_size)
            ]
        return Features({name: torch.cat([r[name].cpu() for r in rows]) for name in rows[0]}, own)

    def own_features(images: Images) -> Features:
        return features(images, None if images.labels is None else images.labels.cpu())

    made = features(ImageSet(pixels), labels)
    known, spare = own_features(real), None if others is None else own_features(others)
    judged = extractor.model is not None and extractor.model.num_classes == real.num_classes
    same = known.among(labels)
    classes = None
    if labels is not None:
        classes = by_class(made, known, spare, real.class_names, judged)
    document: dict[str, Any] = to_json(
        {
            "count": len(pixels),
            "real_count": len(same.columns["features"]),
            **_compared(made, same, None if spare is None else spare.among(labels), judged),
            "means": None if classes is None else class_means(classes),
            "classes": classes,
        }
    )
    return document


def by_class(
    samples: Features, real: Features, others: Features | None, names: Sequence[str], judged: bool
) -> list[dict[str, Any]]:
    """One entry per label that was asked for.

    Args:
        samples: columns of `columns_of_images`, with labels.
        real: likewise.
        others: likewise, for the floor; None: halves of ``real``.
        names: of the classes.
        judged: whether the extractor's classes are these.

    Returns:
        Entries ``label``, ``name``, ``count``, ``real_count``, ``accuracy``, ``frechet``,
        ``kernel``, ``floor``, ``saturation`` and ``energy_gap``, as in `measure_guided` (but with
        an `Estimate` for each estimate), and ``diversity``, a number, with ``diversity_interval``,
        of the choice of samples alone.
    """
    assert samples.labels is not None
    found = []
    for label in torch.unique(samples.labels).tolist():
        made, known, spare = (
            None if set_ is None else set_.among(torch.tensor([label]))
            for set_ in (samples, real, others)
        )
        assert made is not None
        assert known is not None
        features = made.columns["features"]
        spread = mean_distance(known.columns["features"][:PAIRED])

        def ratio(features: Tensor, spread: float = spread) -> float:
            return mean_distance(features) / spread if spread else UNKNOWN

        diversity = statistics.jackknife(ratio, features)
        found.append(
            {
                "label": label,
                "name": names[label] if label < len(names) else str(label),
                "count": len(features),
                "real_count": len(known.columns["features"]),
                **_compared(made, known, spare, judged),
                "diversity": diversity.value,
                "diversity_interval": (diversity.low, diversity.high),
            }
        )
    return found


def class_means(classes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the entries of `by_class` that have a number, nan if none has: of ``frechet``,
    ``kernel``, ``floor`` (its Frechet distance) and ``diversity``."""

    def mean(values: Sequence[float]) -> float:
        return float(torch.tensor(values, dtype=torch.float64).nanmean())

    return {
        "frechet": mean([c["frechet"].value for c in classes]),
        "kernel": mean([c["kernel"].value for c in classes]),
        "floor": mean([c["floor"]["frechet"] for c in classes]),
        "diversity": mean([c["diversity"] for c in classes]),
    }


def _compared(
    samples: Features, real: Features, others: Features | None, judged: bool
) -> dict[str, Any]:
    """What is said of all samples and of those of one label alike; see `measure_guided`."""
    made, known = samples.columns["features"], real.columns["features"]
    few, against = (known[::2], known[1::2])
    if others is not None:
        few, against = others.columns["features"], known
    few = few[: len(made)]
    accuracy = None
    if judged and samples.labels is not None:
        accuracy = statistics.accuracy(predict(samples.columns["logits"]) == samples.labels)
    floor = UNKNOWN
    if min(len(few), len(against)) > 1:
        floor = frechet_distance(few, against)
    return {
        "accuracy": accuracy,
        "frechet": frechet(made, known),
        "kernel": _kernel(made, known),
        "floor": {"count": len(few), "frechet": floor, "kernel": _kernel(few, against).value},
        "saturation": saturation(samples.columns, real.columns),
        "energy_gap": energy_gap(samples, real),
    }


def columns_of_images(
    x: Tensor,
    extractor: Extractor,
    energy_model: EnergyModel | None,
    num_classes: int,
    reading: EnergySource = "auto",
) -> Columns:
    """What all measures are made of, for images ``x`` (B, C, H, W) in [0, 1]: each (B, ...).

    ``features`` and ``logits`` of the extractor; those of `pixel_columns`; ``energy`` and, where
    the model has ``num_classes`` labels, ``log_posterior``, as in `ImageEnergies`.
    """
    columns = extractor.extract(x) | pixel_columns(x)
    if energy_model is not None:
        found = energies_of(energy_model, x, None, reading)
        columns["energy"] = found.energy
        if num_classes and found.log_posterior.shape[1] == num_classes:
            columns["log_posterior"] = found.log_posterior
    return columns


def pixel_columns(x: Tensor) -> Columns:
    """``ends``, and ``colour`` of colour images, of ``x`` (B, C, H, W) in [0, 1]: each (B,)."""
    values = (255 * x).round()
    columns = {"ends": ((values <= 1) | (values >= 254)).float().flatten(1).mean(dim=1)}
    if x.shape[1] == 3:
        high, low = x.amax(dim=1), x.amin(dim=1)
        share = torch.where(high > 0, (high - low) / high.clamp_min(1e-12), 0.0)
        columns["colour"] = share.flatten(1).mean(dim=1)
    return columns


def saturation(samples: Columns, real: Columns) -> dict[str, Any]:
    """``ends`` and ``colour`` (null for gray images), each of ``samples`` and ``real``."""

    sets = {"samples": samples, "real": real}
    return {
        name: {kind: statistics.mean(own[name]) for kind, own in sets.items()}
        if name in samples
        else None
        for name in ("ends", "colour")
    }


def energy_gap(samples: Features, real: Features) -> dict[str, Any] | None:
    """``energy`` and ``joint_energy``: means of samples minus those of real images of their labels.

    Without labels, of all. None where there are no energies, or no labels that the model knows.
    """
    (made, wanted), (known, labels) = samples, real
    if "energy" not in made:
        return None
    if wanted is None or labels is None:
        zeros = (torch.zeros(len(columns["energy"])) for columns in (made, known))
        gap = _stratified(made["energy"], next(zeros), known["energy"], next(zeros))
        return {"energy": gap, "joint_energy": None}
    joint = None
    if "log_posterior" in made:
        a, b = (
            ImageEnergies(columns["energy"], columns["log_posterior"]).joint(own)
            for columns, own in ((made, wanted), (known, labels))
        )
        joint = _stratified(a, wanted, b, labels)
    gap = _stratified(made["energy"], wanted, known["energy"], labels)
    return {"energy": gap, "joint_energy": joint}


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """The Frechet distance of features (n, d) and (m, d), undefined (nan) of fewer than two; with
    an interval up to `MOST_FEATURES`, and always where it is quick."""
    if min(len(a), len(b)) < 2:
        return statistics.without_interval(UNKNOWN, len(a))
    width = a.shape[1]
    if width <= MOST_FEATURES or len(a) * len(b) < width**2 / 10:
        return statistics.jackknife(frechet_distance, a, b)
    return statistics.without_interval(frechet_distance(a, b), len(a))


def _kernel(a: Tensor, b: Tensor) -> Estimate:
    """`kernel_distance` of features (n, d) and (m, d), up to 2000 of each set;
    undefined (nan) of fewer than two."""
    a, b = a[:WHOLE], b[:WHOLE]
    if min(len(a), len(b)) < 2:
        return statistics.without_interval(UNKNOWN, len(a))
    return kernel_distance(a, b)


def _stratified(made: Tensor, wanted: Tensor, known: Tensor, labels: Tensor) -> Estimate:
    """Mean over samples of their value minus the real mean of their label, with its interval."""
    made, known, total = made.double(), known.double(), len(made)
    rest, error, inner = torch.empty_like(made), 0.0, 0.0
    groups = sorted(set(wanted.tolist()))
    for label in groups:
        own, base = wanted == label, known[labels == label]
        if not len(base):
            return statistics.without_interval(UNKNOWN, total)
        rest[own] = made[own] - base.mean()
        variance = float(base.var()) if len(base) > 1 else UNKNOWN
        error += (int(own.sum()) / total) ** 2 * variance / len(base)
        inner = variance / len(base)
    value = float(rest.mean())
    if total < 2:
        return statistics.without_interval(value, total)
    spread = float(rest.var()) / total
    freedom = float(total - 1)
    if len(groups) == 1 and spread + inner > 0:  # Welch's
        count = int((labels == groups[0]).sum())
        freedom = (spread + inner) ** 2 / (spread**2 / (total - 1) + inner**2 / max(1, count - 1))
    return statistics.student(value, math.sqrt(spread + error), freedom, total)


def _pixels(samples: Tensor) -> Tensor:
    if samples.ndim != 4 or not len(samples):
        raise UserError(
            f"samples must be (N, C, H, W) with N of 1 or more, not {tuple(samples.shape)}"
        )
    if samples.dtype == torch.uint8:
        return samples
    bad = int((~samples.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        raise UserError(f"{bad} of {len(samples)} samples are not finite: leave them out")
    return (255 * samples.clamp(0, 1)).round().byte()


def _labels(labels: Tensor, count: int, real: Images) -> Tensor:
    labels = labels.cpu().long()
    if labels.shape != (count,):
        raise UserError(f"{count} samples need {count} labels, not {tuple(labels.shape)}")
    if real.labels is None:
        raise UserError(
            f"the samples have labels and data set {real.name!r} has none: compare with a labelled "
            "one, or leave the labels out"
        )
    missing = sorted(set(labels.tolist()) - set(real.labels.tolist()))
    if missing:
        raise UserError(
            f"data set {real.name!r} has no image of label {missing[0]}, which samples were asked "
            "for: take more images, or leave these samples out"
        )
    return labels
