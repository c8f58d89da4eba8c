"""What suites share that measure few images, each at length, or others than are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation.context import EvaluationContext
from ebmkit.evaluation.data import Batch, Images
from ebmkit.noise import format_sigma
from ebmkit.terminal import shown_name

__all__ = ["check_one_size", "class_name", "columns_of", "first_columns", "noise_warnings"]

K = TypeVar("K", bound=Hashable)


def first_columns(
    setting: EvaluationContext,
    count: int,
    sigma: float,
    measure: Callable[[Batch], Mapping[K, Tensor]],
    batch_size: int | None = None,
) -> dict[K, Tensor]:
    """`EvaluationContext.columns` of the first ``count`` images, one pass of the progress.

    Args:
        setting: its images may be fewer than ``count``; then all are taken.
        count: how many images.
        sigma: image units.
        measure: what it gives has one entry per image of the batch, (B, ...).
        batch_size: images at a time, if not the setting's; processes share batches.
    """
    few = setting.images.first(min(count, len(setting.images)))
    return columns_of(setting, few, sigma, measure, batch_size)


def columns_of(
    setting: EvaluationContext,
    images: Images,
    sigma: float,
    measure: Callable[[Batch], Mapping[K, Tensor]],
    batch_size: int | None = None,
) -> dict[K, Tensor]:
    """`EvaluationContext.columns` of other ``images``, one pass of the progress.

    Args:
        setting: how; its images only count.
        images: what is measured.
        sigma: image units.
        measure: what it gives has one entry per image of the batch, (B, ...).
        batch_size: images at a time, if not the setting's; processes share batches.
    """
    total, done, told = len(setting.images), 0, 0

    def advance(more: int) -> None:
        nonlocal done, told
        done += more
        news = total * done // len(images) - told
        told += news
        setting.left -= news
        setting.advance(news)

    few = replace(
        setting,
        images=images,
        batch_size=batch_size or setting.batch_size,
        advance=advance,
        left=0,
        _predictions={},
    )
    return few.columns(sigma, measure)


def check_one_size(suite: str, images: Images) -> None:
    """Whether all images have one size.

    Raises:
        UserError: if they are pictures of any size.
    """
    if not getattr(images, "one_size", True):
        raise UserError(
            f"suite {suite!r} compares images of one size, and those of {images.name!r} differ: "
            "use data set 'folder' with --image-size"
        )


def noise_warnings(model: ScoreModel, sigmas: Sequence[float]) -> list[str]:
    """A sentence if ``model`` was not trained to denoise, or not at some of ``sigmas``."""
    card = model.card
    if card is None:
        return []
    if card.sigma_range is None:
        return [
            f"this model was not trained to denoise (its objective is {card.objective!r}): its "
            "score means little; add dsm to the objective"
        ]
    low, high = card.sigma_range
    outside = [s for s in sigmas if not low * (1 - 1e-6) <= s <= high * (1 + 1e-6)]
    if not outside:
        return []
    return [
        f"noise at {', '.join(format_sigma(s) for s in outside)} is outside the range that this "
        f"model was trained for, {format_sigma(low)} to {format_sigma(high)}"
    ]


def class_name(images: Images, label: int) -> str:
    """The name of a class of ``images`` as pictures show it; its number, where there is none."""
    names = images.class_names
    return shown_name(names[label]) if label < len(names) else str(label)
