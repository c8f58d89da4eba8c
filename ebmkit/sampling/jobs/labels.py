"""Labels as people write them: a name or a number, or ``all``."""

from __future__ import annotations

import torch
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.sampling.requirements import takes_labels

__all__ = ["class_names_of", "parse_label", "parse_labels"]


def parse_label(model: ScoreModel, text: str) -> int:
    """The label that ``text`` names, by the class's name or number.

    Raises:
        UserError: if the model has no labels, none were trained, or it knows no such label.
    """
    names = model.card.class_names if model.card else []
    if model.num_classes and not takes_labels(model):
        raise UserError("the labels of this model were never trained: leave out --label")
    if model.num_classes == 0:
        raise UserError("this model was trained without labels: leave out --label")
    if text in names:
        return names.index(text)
    try:
        label = int(text)
    except ValueError:
        known = f"0 to {model.num_classes - 1}" + (f" or {', '.join(names)}" if names else "")
        raise UserError(f"label {text!r} is unknown: this model knows {known}") from None
    if not -(2**31) < label < 2**31:  # more than a tensor of labels can hold
        raise UserError(
            f"label {text.strip()!r:.60} is out of range: labels are 0 to {model.num_classes - 1}"
        )
    model.check_labels(label, torch.zeros(1))
    return label


def parse_labels(model: ScoreModel, text: str | None, count: int) -> Tensor | None:
    """Labels (count,) int64 of ``count`` chains: one for all, or with ``all`` each in turn.

    Raises:
        UserError: as `parse_label`.
    """
    if text is None:
        return None
    if text == "all":
        parse_label(model, "0")
        return torch.arange(count) % model.num_classes
    return torch.full((count,), parse_label(model, text))


def class_names_of(model: ScoreModel) -> list[str]:
    """A name for each label: the card's, or the numbers."""
    names = model.card.class_names if model.card else []
    return list(names) or [str(c) for c in range(model.num_classes)]
