"""What `ebmkit.evaluation.guided` is made of: columns of images, and measures of two sets of them.

Columns have one entry per image, so that batches and processes can measure them apart.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel
from ebmkit.evaluation import distances, statistics
from ebmkit.evaluation.energies import EnergySource, ImageEnergies, energies_of
from ebmkit.evaluation.features import Extractor
from ebmkit.evaluation.statistics import LEVEL, Estimate

__all__ = [
    "MOST_FEATURES",
    "Columns",
    "Features",
    "columns_of_images",
    "energy_gap",
    "frechet",
    "kernel",
    "pixel_columns",
    "saturation",
]

Columns = dict[str, Tensor]

MOST_FEATURES = 512
"""Features, up to which the Frechet distance gets an interval: each is 20 distances."""

UNKNOWN = float("nan")


class Features(NamedTuple):
    """Columns, one entry per image, and the labels (N,), or None."""

    columns: Columns
    labels: Tensor | None

    def of(self, label: int) -> Columns:
        """The images of one label."""
        assert self.labels is not None
        own = self.labels == label
        return {name: column[own] for name, column in self.columns.items()}

    def among(self, labels: Tensor | None) -> Columns:
        """The images whose label is among ``labels``; all, if either has none."""
        if self.labels is None or labels is None:
            return self.columns
        own = torch.isin(self.labels, labels)
        return {name: column[own] for name, column in self.columns.items()}


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
    columns = extractor.extract(x)._asdict() | pixel_columns(x)
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
    return {
        name: {
            "samples": _mean(samples[name]).document(),
            "real": _mean(real[name]).document(),
        }
        if name in samples
        else None
        for name in ("ends", "colour")
    }


def energy_gap(samples: Features, real: Features) -> dict[str, Any] | None:
    """``energy`` and ``joint_energy``: means of samples minus those of real images of their labels.

    Without labels, of all. Null where there are no energies, or no labels that the model knows.
    """
    if "energy" not in samples.columns:
        return None
    (made, wanted), (known, labels) = samples, real
    if wanted is None or labels is None:
        zeros = torch.zeros(len(made["energy"])), torch.zeros(len(known["energy"]))
        gap = _stratified(made["energy"], zeros[0], known["energy"], zeros[1])
        return {"energy": gap.document(), "joint_energy": None}
    gap = _stratified(made["energy"], wanted, known["energy"], labels)
    joint = None
    if "log_posterior" in made:
        parts = (ImageEnergies(c["energy"], c["log_posterior"]) for c in (made, known))
        a, b = (part.joint(c) for part, c in zip(parts, (wanted, labels), strict=True))
        joint = _stratified(a, wanted, b, labels).document()
    return {"energy": gap.document(), "joint_energy": joint}


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """The Frechet distance of features (n, d) and (m, d), undefined (nan) of fewer than two; with
    an interval up to `MOST_FEATURES`, and always where it is quick."""
    if min(len(a), len(b)) < 2:
        return Estimate(UNKNOWN, UNKNOWN, UNKNOWN, len(a))
    width = a.shape[1]
    if width <= MOST_FEATURES or len(a) * len(b) < width**2 / 10:
        return distances.jackknife(distances.frechet_distance, a, b)
    return Estimate(distances.frechet_distance(a, b), UNKNOWN, UNKNOWN, len(a))


def kernel(a: Tensor, b: Tensor) -> Estimate:
    """`distances.kernel_distance` of features (n, d) and (m, d), up to 2000 of each set;
    undefined (nan) of fewer than two."""
    a, b = a[: distances.WHOLE], b[: distances.WHOLE]
    if min(len(a), len(b)) < 2:
        return Estimate(UNKNOWN, UNKNOWN, UNKNOWN, len(a))
    return distances.kernel_distance(a, b)


def _stratified(made: Tensor, wanted: Tensor, known: Tensor, labels: Tensor) -> Estimate:
    """Mean over samples of their value minus the real mean of their label, with its interval."""
    from scipy.stats import t

    made, known, total = made.double(), known.double(), len(made)
    rest, error, inner = torch.empty_like(made), 0.0, 0.0
    groups = sorted(set(wanted.tolist()))
    for label in groups:
        own, base = wanted == label, known[labels == label]
        if not len(base):
            return Estimate(UNKNOWN, UNKNOWN, UNKNOWN, total)
        rest[own] = made[own] - base.mean()
        variance = float(base.var()) if len(base) > 1 else UNKNOWN
        error += (int(own.sum()) / total) ** 2 * variance / len(base)
        inner = variance / len(base)
    value = float(rest.mean())
    if total < 2:
        return Estimate(value, UNKNOWN, UNKNOWN, total)
    spread = float(rest.var()) / total
    freedom = float(total - 1)
    if len(groups) == 1 and spread + inner > 0:  # Welch's
        count = int((labels == groups[0]).sum())
        freedom = (spread + inner) ** 2 / (spread**2 / (total - 1) + inner**2 / max(1, count - 1))
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(spread + error)
    return Estimate(value, value - half, value + half, total)


def _mean(values: Tensor) -> Estimate:
    if not len(values):
        return Estimate(UNKNOWN, UNKNOWN, UNKNOWN, 0)
    return statistics.mean(values)
