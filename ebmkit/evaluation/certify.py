r"""Suite ``certify``: accuracy that no perturbation of a given size can take away.

Two classifiers made of the same network are smoothed (`ebmkit.evaluation.smoothing`) and certified
on the same noisy copies :math:`y = x + \sigma\epsilon`, not clipped:

- ``direct``: the label of y itself (Cohen et al., arXiv 1902.02918);
- ``denoised``: the label of :math:`D(y) = y + \sigma^2 s(y)`, clipped to [0, 1] ("denoised
  smoothing", Salman et al., arXiv 2003.01908). It is given the true sigma, which is no secret: the
  one who certifies adds the noise.

The images certified are evenly spaced among all, because the first images of a folder may all be of
one class. The noise on an image is keyed by its number, so that the batch size and the number of
processes do not change it; it is the same at every sigma, but for its scale.

``certify.json`` holds, beside the common entries: ``certified_images``, their ``numbers``,
``labels``, and the ``unsmoothed_accuracy`` of the network on them, without noise; ``radii``; and
``levels``, one entry per sigma with its ``largest_radius`` (all votes alike) and by classifier

- ``accuracy`` of the most frequent label, certified or not, and the share ``abstained``;
- ``certified``, at each of ``radii`` the share of images certified right at that radius;
- ``average_radius``, a wrong or missing label counting as 0;
- ``predicted`` (null: no certificate) and ``radius`` of each image;

and ``difference``, the average radius of ``denoised`` less that of ``direct``, image by image.
Radii are l2, in image units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ebmkit.energy import EnergyModel, LogDensity, ScoreModel, tweedie
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext, Suite, check_classifies
from ebmkit.evaluation.data import Images
from ebmkit.evaluation.smoothing import (
    ABSTAIN,
    Certificates,
    certificates,
    draw_votes,
    largest_radius,
    vote_generator,
)
from ebmkit.evaluation.tables import new_table, number
from ebmkit.metrics import predict
from ebmkit.noise import Sigma, format_sigma

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CERTIFY", "CLASSIFIERS", "CertifyConfig", "draw", "labels_of", "run", "table"]

Classifier = Literal["direct", "denoised"]

CLASSIFIERS: dict[Classifier, str] = {"direct": "direct", "denoised": "denoise first"}

T = TypeVar("T")


class CertifyConfig(BaseModel):
    """Settings of the suite ``certify``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigmas: tuple[Sigma, ...] = Field(
        (20 / 255, 0.12, 0.25), min_length=1, description="noise levels of the smoothing"
    )
    samples: int = Field(1000, ge=1, description="number of votes for the certificate of an image")
    selection: int = Field(100, ge=1, description="number of separate votes that select the label")
    alpha: float = Field(
        0.001,
        gt=0,
        lt=0.5,
        description="maximum probability that the certificate of an image is wrong",
    )
    images: int = Field(100, ge=1, description="number of images, evenly spaced in the data set")
    radii: tuple[float, ...] = Field(
        (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6),
        min_length=1,
        description="l2 radii at which certified accuracy is reported, image units",
    )
    classifiers: tuple[Classifier, ...] = Field(
        ("direct", "denoised"),
        min_length=1,
        description="smoothed classifiers: direct, denoised (denoise first)",
    )

    @model_validator(mode="after")
    def _check(self) -> CertifyConfig:
        if not all(0 <= r < math.inf for r in self.radii):
            raise UserError(f"radii {list(self.radii)} must be finite and not below 0")
        if largest_radius(1.0, self.samples, self.alpha) == 0:
            least = math.floor(math.log2(1 / self.alpha)) + 1
            raise UserError(
                f"samples {self.samples} cannot certify anything at alpha {self.alpha:g}: take at "
                f"least {least}, or more for a radius of use"
            )
        return self


def labels_of(
    model: EnergyModel, y: Tensor, sigma: float, which: tuple[Classifier, ...]
) -> dict[str, Tensor]:
    """Labels (B,) of noisy images (B, C, H, W) by each classifier ``which``.

    Args:
        model: in evaluation mode.
        y: noisy images.
        sigma: their noise level, image units.
        which: ``direct``, ``denoised`` or both, which share one forward pass.
    """
    found = {}
    if "denoised" in which:
        energies, (score,) = model.value_and_grads(y, sigma, LogDensity())
        clean = tweedie(y, score, sigma).clamp(0, 1)
        found["denoised"] = predict(model.logits(clean, 0.0))
        found["direct"] = predict(energies.logits)
    else:
        found["direct"] = predict(model.logits(y, sigma))
    return {name: found[name] for name in which}


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    options, model, images = setting.option(CertifyConfig), setting.model, setting.images
    assert isinstance(model, EnergyModel)
    assert images.labels is not None
    numbers = _numbers(images, options)
    own = _pick(setting, numbers[setting.world.rank :: setting.world.size])
    truth = images.labels.cpu()[numbers]
    plain = torch.stack(_in_order(setting, _unsmoothed(setting, model, list(own.values()))))
    watch = _watch(setting)
    levels = []
    for sigma in options.sigmas:
        rows = [_certify(setting, options, sigma, index, x, watch) for index, x in own.items()]
        everyone = _in_order(setting, rows)
        found = {
            name: Certificates(*map(torch.cat, zip(*(row[name] for row in everyone), strict=True)))
            for name in options.classifiers
        }
        level: dict[str, Any] = {
            "sigma": sigma,
            "largest_radius": largest_radius(sigma, options.samples, options.alpha),
            "classifiers": {n: _summary(c, truth, options.radii) for n, c in found.items()},
        }
        if len(found) == len(CLASSIFIERS):
            gain = _counted(found["denoised"], truth) - _counted(found["direct"], truth)
            level["difference"] = statistics.mean(gain).document()
        levels.append(level)
    watch(setting.left)
    return {
        "sigmas": list(options.sigmas),
        "radii": list(options.radii),
        "certified_images": len(numbers),
        "numbers": numbers,
        "labels": truth.tolist(),
        "unsmoothed_accuracy": _share(plain == truth),
        "levels": levels,
        "warnings": _warnings(model, options),
    }


def _numbers(images: Images, options: CertifyConfig) -> list[int]:
    """Which images are certified: evenly spaced, as many as asked for, or all if fewer."""
    count = min(options.images, len(images))
    return [number * len(images) // count for number in range(count)]


def _pick(setting: EvaluationContext, numbers: list[int]) -> dict[int, Tensor]:
    """The images (C, H, W) with these ``numbers``, by number, on the device of the model."""
    found: dict[int, Tensor] = {}
    wanted, start = set(numbers), 0
    for x, _ in setting.images.batches(setting.batch_size):
        if len(found) == len(wanted):
            break
        rows = {start + i: image for i, image in enumerate(x)}
        found |= {n: rows[n].to(setting.device) for n in rows.keys() & wanted}
        start += len(x)
    return {number: found[number] for number in numbers}


def _in_order(setting: EvaluationContext, own: list[T]) -> list[T]:
    """One thing for each image, of all processes, in the order of the images."""
    everyone = setting.world.gather(own)
    return [part[k] for k in range(len(everyone[0])) for part in everyone if k < len(part)]


def _watch(setting: EvaluationContext) -> Callable[[int], None]:
    """What moves the progress bar by so many votes, and foresees the time that is left."""
    before = 0.0

    def advance(votes: int) -> None:
        nonlocal before
        now, size = time.perf_counter(), setting.world.size
        if before and votes:  # the first batch warms up
            setting.inference.expect((now - before) / votes * setting.left / size)
        before = now
        done = min(votes * size, setting.left)  # with what the others do meanwhile
        setting.left -= done
        setting.advance(done)

    return advance


def _unsmoothed(
    setting: EvaluationContext, model: EnergyModel, images: list[Tensor]
) -> list[Tensor]:
    """The label of each image, without noise."""
    found: list[Tensor] = []
    for start in range(0, len(images), setting.batch_size):
        x = torch.stack(images[start : start + setting.batch_size])
        found += predict(model.logits(x, 0.0)).cpu()
    return found


def _certify(
    setting: EvaluationContext,
    options: CertifyConfig,
    sigma: float,
    index: int,
    x: Tensor,
    advance: Callable[[int], None],
) -> dict[str, Certificates]:
    """The certificate of one image by each classifier."""
    model = setting.model
    assert isinstance(model, EnergyModel)
    votes = draw_votes(
        lambda y: labels_of(model, y, sigma, options.classifiers),
        x,
        sigma,
        options.selection + options.samples,
        vote_generator(setting.seed, index),
        setting.batch_size,
        advance,
    )
    return {
        name: certificates(cast[None], options.selection, sigma, options.alpha)
        for name, cast in votes.items()
    }


def _summary(found: Certificates, truth: Tensor, radii: Sequence[float]) -> dict[str, Any]:
    right = found.right_radius(truth)
    return {
        "accuracy": _share(found.top == truth),
        "abstained": _share(found.labels == ABSTAIN),
        "certified": [{"radius": r, **_share(right >= r)} for r in radii],
        "average_radius": statistics.mean(_counted(found, truth)).document(),
        "predicted": [None if c == ABSTAIN else c for c in found.labels.tolist()],
        "radius": found.radius.tolist(),
    }


def _share(of: Tensor) -> dict[str, Any]:
    return statistics.proportion(int(of.sum()), len(of)).document()


def _counted(found: Certificates, truth: Tensor) -> Tensor:
    """The radius of each image as the average counts it, (N,)."""
    return found.right_radius(truth).clamp(min=0)


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``certified-accuracy.png``."""
    from ebmkit.plots.certify import certified_accuracy

    certified_accuracy(document, folder / "certified-accuracy.png", CLASSIFIERS)


def table(document: dict[str, Any]) -> Table:
    """By sigma and classifier: accuracy, certified accuracy at some radii, average radius."""
    radii = document["radii"]
    chosen = sorted({len(radii) // 3, len(radii) // 2})
    columns = [f"at {radii[i]:g}" for i in chosen]
    result = new_table(
        document, ("sigma", "classifier", "accuracy", *columns, "radius", "abstains")
    )
    result.columns[1].justify = "left"
    for level in document["levels"]:
        for i, (name, found) in enumerate(level["classifiers"].items()):
            result.add_row(
                "" if i else format_sigma(level["sigma"]),
                name,
                number(found["accuracy"]["value"], "{:.1%}"),
                *(number(found["certified"][k]["value"], "{:.1%}") for k in chosen),
                number(found["average_radius"]["value"], "{:.3f}"),
                number(found["abstained"]["value"], "{:.1%}"),
            )
        result.add_section()
    return result


def _passes(setting: EvaluationContext) -> int:
    """Every vote counts as one image."""
    options = setting.option(CertifyConfig)
    votes = len(options.sigmas) * (options.selection + options.samples)
    images = len(_numbers(setting.images, options))
    return math.ceil(votes * images / len(setting.images))


def _warnings(model: ScoreModel, options: CertifyConfig) -> list[str]:
    card = model.card
    if card is None or "denoised" not in options.classifiers:
        return []
    if card.sigma_range is None:
        return [
            f"this model was not trained to denoise (its objective is {card.objective!r}): denoise "
            "first means little; add dsm to the objective"
        ]
    low, high = card.sigma_range
    outside = [s for s in options.sigmas if not low * (1 - 1e-6) <= s <= high * (1 + 1e-6)]
    if not outside:
        return []
    levels = ", ".join(format_sigma(s) for s in outside)
    return [
        f"noise at {levels} is outside the range that this model was trained to denoise, "
        f"{format_sigma(low)} to {format_sigma(high)}"
    ]


CERTIFY = Suite(
    description="randomised smoothing: certified accuracy by l2 radius, with and "
    "without denoising first",
    check=check_classifies,
    passes=_passes,
    run=run,
    draw=draw,
    table=table,
    options=CertifyConfig,
)
