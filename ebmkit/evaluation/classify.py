r"""Suite ``classify``: accuracy, per class and against noise, and the likelihood of the labels.

The predicted label is :math:`\arg\max_c p(c \mid y)`. Accuracy is the share of images on which it
is the true one, NLL the mean of :math:`-\log p(c \mid y)` over images, in nats. Both are taken on
the clean images and on noisy ones, :math:`y = x + \sigma\epsilon`, not clipped, with one draw of
noise per image and level from a fixed seed (`ebmkit.evaluation.data`).

``classify.json`` holds, beside the common entries (`ebmkit.evaluation.evaluate`): ``accuracy``
(0..1) and ``accuracy_interval``, ``nll`` and ``nll_interval`` of the clean images; ``per_class``,
the accuracy on the images of each class; ``against_noise``, one entry per level; and ``confusion``,
the number of images by true (row) and predicted label (column), for up to 100 classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext
from ebmkit.evaluation.suite import Suite, check_classifies, estimate_table
from ebmkit.noise import in_255ths
from ebmkit.terminal import shown_name

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CLASSIFY", "measure", "plot", "table"]

MAX_CONFUSION = 100
MAX_DRAWN = 20


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    images, names = context.images, context.images.class_names
    clean = context.predictions(0.0)
    accuracy = statistics.proportion(int(clean.right.sum()), len(images))
    nll = statistics.mean(clean.nll)
    against_noise = []
    for sigma in context.noise_levels:
        noisy = context.predictions(sigma)
        against_noise.append(
            {
                "sigma": sigma,
                "accuracy": statistics.proportion(int(noisy.right.sum()), len(images)).document(),
                "nll": statistics.mean(noisy.nll).document(),
            }
        )
    per_class = {}
    for c in range(context.model.num_classes):
        own = clean.labels == c
        name = names[c] if names else str(c)
        hits = int((clean.right & own).sum())
        per_class[name] = statistics.proportion(hits, int(own.sum())).document()
    return {
        "sigmas": list(context.noise_levels),
        "accuracy": accuracy.value,
        "accuracy_interval": [accuracy.low, accuracy.high],
        "nll": statistics.finite(nll.value),
        "nll_interval": [nll.low, nll.high],
        "per_class": per_class,
        "against_noise": against_noise,
        "confusion": _confusion(clean.labels, clean.predicted, context.model.num_classes),
        "warnings": _warnings(context),
    }


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``accuracy-against-noise.png`` and, for up to 20 classes, ``confusion.png``."""
    from ebmkit import plots

    plots.accuracy_against_noise(
        document["against_noise"],
        folder / "accuracy-against-noise.png",
        chance=1 / context.model.num_classes,
    )
    if context.model.num_classes <= MAX_DRAWN:
        plots.confusion_matrix(
            document["confusion"], list(document["per_class"]), folder / "confusion.png"
        )


def table(document: dict[str, Any]) -> Table:
    """Accuracy and NLL with their intervals, clean and noisy."""
    rows = [
        (name, {"value": document[key], "low": low, "high": high}, form)
        for name, key, form in (("accuracy", "accuracy", "{:.2%}"), ("NLL (nats)", "nll", "{:.4f}"))
        for low, high in [document[f"{key}_interval"]]
    ]
    known = {name: e for name, e in document["per_class"].items() if e["count"]}
    if len(known) > 1:
        worst = min(known, key=lambda name: known[name]["value"])
        rows.append((f"worst class: {shown_name(worst)}", known[worst], "{:.2%}"))
    rows += [
        (f"accuracy at sigma {in_255ths(level['sigma'])}/255", level["accuracy"], "{:.2%}")
        for level in document["against_noise"]
        if level["sigma"]
    ]
    return estimate_table(document, rows)


def _confusion(
    labels: torch.Tensor, predicted: torch.Tensor, classes: int
) -> list[list[int]] | None:
    if classes > MAX_CONFUSION:
        return None
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2)
    matrix: list[list[int]] = counts.reshape(classes, classes).tolist()
    return matrix


def _warnings(context: EvaluationContext) -> list[str]:
    card, names = context.model.card, list(context.images.class_names)
    if card is None or not card.class_names or not names or card.class_names == names:
        return []
    pair = next((a, b) for a, b in zip(card.class_names, names, strict=True) if a != b)
    return [
        f"the classes of the data have other names than those trained on ({pair[1]!r} against "
        f"{pair[0]!r}): accuracies take them as the same, by their order"
    ]


CLASSIFY = Suite(
    description="accuracy (all, per class, against noise), likelihood, confusion matrix",
    check=check_classifies,
    passes=lambda context: len(context.noise_levels) + 1,
    measure=measure,
    plot=plot,
    table=table,
    standard=True,
)
