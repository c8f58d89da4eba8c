r"""What can be said of samples that were asked for by label, beside real images of these labels.

How often an independent classifier sees the label, how far the samples of a class are from its real
images in the classifier's features and how much they vary, how saturated they are, and how their
energy differs: the numbers by which ways of guiding are compared.

- *Recognised* (``accuracy``): the share that the extractor gives the label asked for; Wilson's
  interval.
- *Distance of a class*: ``frechet`` and ``kernel`` (`ebmkit.evaluation.distances`) between samples
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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.evaluation import distances, statistics
from ebmkit.evaluation.data import Images
from ebmkit.evaluation.energies import EnergySource
from ebmkit.evaluation.features import Extractor
from ebmkit.evaluation.guided_measures import (
    Columns,
    Features,
    columns_of_images,
    energy_gap,
    frechet,
    kernel,
    saturation,
)
from ebmkit.metrics import predict

__all__ = ["by_class", "class_means", "measure_guided"]

UNKNOWN = float("nan")

PAIRED = 1000
"""Real images of a label at most, of which mean distances are taken."""


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
        reading: how energies are read; see `ebmkit.evaluation.energies`.
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
    wanted = None if labels is None else _labels(labels, len(pixels), real)

    place = device or ("cpu" if extractor.model is None else device_of(extractor.model))

    def see(x: Tensor) -> Columns:
        return columns_of_images(x.to(place), extractor, energy_model, real.num_classes, reading)

    starts = range(0, len(pixels), batch_size)
    drawn = _gathered(see, [pixels[at : at + batch_size].float() / 255 for at in starts])
    known = Features(_gathered(see, [x for x, _ in real.batches(batch_size)]), _on_cpu(real.labels))
    spare = None
    if others is not None:
        spare = Features(
            _gathered(see, [x for x, _ in others.batches(batch_size)]), _on_cpu(others.labels)
        )
    made, same = Features(drawn, wanted), known.among(wanted)
    judged = extractor.model is not None and extractor.model.num_classes == real.num_classes
    classes = None
    if wanted is not None:
        classes = by_class(made, known, spare, real.class_names, judged)
    return {
        "count": len(pixels),
        "real_count": len(same["features"]),
        "accuracy": _accuracy(drawn, wanted) if wanted is not None and judged else None,
        **_distances(drawn, same, None if spare is None else spare.among(wanted)),
        "saturation": saturation(drawn, same),
        "energy_gap": energy_gap(made, known),
        "means": None if classes is None else class_means(classes),
        "classes": classes,
    }


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
        ``kernel``, ``floor``, ``saturation`` and ``energy_gap``, as in `measure_guided`, and
        ``diversity``, a number, with ``diversity_interval``, of the choice of samples alone.
    """
    assert samples.labels is not None
    found = []
    for label in sorted(set(samples.labels.tolist())):
        made, known = samples.of(label), real.of(label)
        spread = distances.mean_distance(known["features"][:PAIRED])

        def ratio(features: Tensor, spread: float = spread) -> float:
            return distances.mean_distance(features) / spread if spread else UNKNOWN

        diversity = distances.jackknife(ratio, made["features"])
        spare = None if others is None else others.of(label)
        wanted = torch.full((len(made["features"]),), label)
        found.append(
            {
                "label": label,
                "name": names[label] if label < len(names) else str(label),
                "count": len(made["features"]),
                "real_count": len(known["features"]),
                "accuracy": _accuracy(made, wanted) if judged else None,
                **_distances(made, known, spare),
                "diversity": statistics.finite(diversity.value),
                "diversity_interval": diversity.interval(),
                "saturation": saturation(made, known),
                "energy_gap": energy_gap(
                    Features(made, wanted),
                    Features(known, torch.full((len(known["features"]),), label)),
                ),
            }
        )
    return found


def class_means(classes: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the entries of `by_class` that have a number, null if none has: of ``frechet``,
    ``kernel``, ``floor`` (its Frechet distance) and ``diversity``."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        "frechet": mean([c["frechet"]["value"] for c in classes]),
        "kernel": mean([c["kernel"]["value"] for c in classes]),
        "floor": mean([c["floor"]["frechet"] for c in classes]),
        "diversity": mean([c["diversity"] for c in classes]),
    }


def _distances(samples: Columns, real: Columns, others: Columns | None) -> dict[str, Any]:
    made, known = samples["features"], real["features"]
    few, against = (known[::2], known[1::2]) if others is None else (others["features"], known)
    few = few[: len(made)]
    floor = UNKNOWN
    if min(len(few), len(against)) > 1:
        floor = distances.frechet_distance(few, against)
    return {
        "frechet": frechet(made, known).document(),
        "kernel": kernel(made, known).document(),
        "floor": {
            "count": len(few),
            "frechet": statistics.finite(floor),
            "kernel": statistics.finite(kernel(few, against).value),
        },
    }


def _accuracy(columns: Columns, wanted: Tensor) -> dict[str, Any]:
    right = predict(columns["logits"]) == wanted
    return statistics.proportion(int(right.sum()), len(right)).document()


def _gathered(see: Callable[[Tensor], Columns], batches: Sequence[Tensor]) -> Columns:
    with torch.no_grad():
        parts = [{name: c.cpu() for name, c in see(x).items()} for x in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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


def _on_cpu(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.cpu()
