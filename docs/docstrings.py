r"""Docstrings as Markdown, for mkdocstrings.

The docstrings use reStructuredText for formulas (``:math:`` roles and ``.. math::`` blocks), single
backticks refer to other objects, and doctests are not fenced.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, GriffeLoader, Module, NameResolutionError, Object

INLINE = re.compile(r":math:`([^`]+)`")
DISPLAY = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|[ ]*(?=\n\1 +)))*)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)(>>> (?:.*\n?)+?)(?=^ *\n|\Z|^ *```)", re.MULTILINE)
REFERENCE = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)`(?![`\]])")


def to_markdown(text: str) -> str:
    r"""``text`` with formulas as ``\(...\)`` and ``\[...\]``, and doctests in fences."""
    text = DISPLAY.sub(lambda m: f"{m[1]}\\[ {' '.join(m[2].split())} \\]", text)
    text = INLINE.sub(lambda m: f"\\({' '.join(m[1].split())}\\)", text)
    return EXAMPLE.sub(_fence, text)


def _fence(match: re.Match[str]) -> str:
    code = re.sub(r" *# doctest: .*", "", textwrap.dedent(match[1] + match[2])).rstrip()
    return textwrap.indent(f"```pycon\n{code}\n```\n", match[1])


def link(text: str, owner: Object) -> str:
    """``text`` with a link for each name in backticks that ``owner``'s scope knows.

    The link is optional: a name that no page documents stays code.
    """

    def replace(match: re.Match[str]) -> str:
        name, path = match[1], match[1]
        if not name.startswith("ebmkit."):
            try:
                path = owner.resolve(name)
            except (NameResolutionError, ValueError):
                return match[0]
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'

    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(p if p.startswith("```") else REFERENCE.sub(replace, p) for p in parts)


class Docstrings(Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Rewrite the docstrings of ``pkg`` and all its members."""
        if pkg.name == "ebmkit":
            self._rewrite(pkg)

    def _rewrite(self, owner: Object) -> None:
        if owner.docstring:
            owner.docstring.value = link(to_markdown(owner.docstring.value), owner)
        for member in owner.members.values():
            if not member.is_alias:
                self._rewrite(member)  # type: ignore[arg-type]
