"""The table of the suite generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ebmkit.evaluation.suite import interval, new_table, number

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["described", "table"]

FORMS = {"kernel": "{:.4g}", "precision": "{:.1%}", "recall": "{:.1%}"}


def table(document: dict[str, Any]) -> Table:
    """Every measure, with its interval, beside the floor; then label accuracy."""
    count, floor = document["samples"]["count"], document["floor"]
    result = new_table(document, ("measure", f"{count} samples", "95 % interval", "real images"))
    kinds = {name: kind for kind, name in document["names"].items()}
    for name, found in document["measures"].items():
        form = FORMS.get(kinds[name], "{:.2f}")
        span = interval(found, form)
        real = number(floor[name]["value"], form)
        result.add_row(name, number(found["value"], form), span, real)
    for row in (*_of_labels(document), *_of_pixels(document)):
        result.add_row(*row)
    result.caption = "\n".join([*described(document), str(result.caption or "")]).strip()
    return result


Row = tuple[str, str, str, str]


def _of_labels(document: dict[str, Any]) -> Iterator[Row]:
    """Label accuracy, and what is known by class."""
    labels, extractor = document["labels"], document["extractor"]
    if labels is None:
        return
    whole = labels["accuracy"]
    real = number((extractor["accuracy"] or whole)["value"], "{:.1%}")
    worst = min(labels["classes"], key=lambda c: c["accuracy"]["value"])
    for name, own, beside in (
        ("label accuracy", whole, real),
        (f"worst class: {worst['name']}", worst["accuracy"], ""),
    ):
        span = interval(own, "{:.1%}")
        yield name, number(own["value"], "{:.1%}"), span, beside
    means, names = labels["means"], document["names"]
    name = f"{names['frechet']} within classes"
    yield name, number(means["frechet"], "{:.2f}"), "-", number(means["floor"], "{:.2f}")
    yield "diversity", number(means["diversity"], "{:.2f}"), "-", "1.00"


def _of_pixels(document: dict[str, Any]) -> Iterator[Row]:
    """Saturation and energy gap."""
    words = {"ends": "black or white", "colour": "HSV saturation"}
    for name, found in document["saturation"].items():
        if found is not None:
            own = found["samples"]
            span = interval(own, "{:.1%}")
            real = number(found["real"]["value"], "{:.1%}")
            yield words[name], number(own["value"], "{:.1%}"), span, real
    for name, own in (document["energy_gap"] or {}).items():
        if own is not None:
            word = "E(x)" if name == "energy" else "E(x,y)"
            span = interval(own, "{:+.3g}")
            yield f"{word} gap, nats", number(own["value"], "{:+.3g}"), span, "0"


def described(document: dict[str, Any]) -> list[str]:
    """What must be known to read the measures: samples, reference, extractor."""
    samples, extractor, floor = (document[k] for k in ("samples", "extractor", "floor"))
    left = f", {samples['left_out']} not finite left out" if samples["left_out"] else ""
    chosen = samples.get("filter")
    filtered = f", filter: {chosen}" if chosen else ", no filter"
    by = "Inception of 2015 (torch-fidelity)"
    if extractor["kind"] == "classifier":
        known = extractor["accuracy"]
        right = f", {known['value']:.1%} right on the reference" if known else ""
        by = f"the classifier of run {extractor['run']}{right}"
    reference = f"{document['dataset']} {document['split']}, {document['images']} images"
    return [
        f"samples: {samples['count']}, {samples['source']}{left}{filtered}",
        f"reference: {reference}; extractor: {by}",
        f"real images: {floor['count']}, {floor['of']}",
    ]
