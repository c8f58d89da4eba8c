"""Tables for the terminal, made of the JSON documents of the suites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["interval", "new_table", "number"]


def new_table(document: dict[str, Any], columns: Sequence[str]) -> Table:
    """A table titled by suite, data set and number of images; the first column is left-aligned."""
    from rich.table import Table
    from rich.text import Text

    of = "" if document["images"] == document["of"] else f" of {document['of']}"
    where = f"{document['dataset']} {document['split']}".strip()
    title = f"{document['suite']}: {where}, {document['images']}{of} images"
    warnings = "\n".join(f"warning: {line}" for line in document["warnings"])
    result = Table(
        title=Text(title),
        title_justify="left",
        caption=Text(warnings, style="yellow") if warnings else None,
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def number(value: float | None, form: str) -> str:
    """``value`` in the form ``form``; a dash where there is no finite number.

    >>> number(0.98765, "{:.2%}")
    '98.77%'
    """
    return "-" if value is None else form.format(value)


def interval(low: float | None, high: float | None, form: str) -> str:
    """Both ends in the form ``form``.

    >>> interval(29.01, 29.2, "{:.2f}")
    '29.01 to 29.20'
    """
    return "-" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
