"""Help with standard metavars: RUN, IMAGE..., INTEGER, PATH."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

__all__ = ["Command", "argument_name"]

VALUES = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
"""Names of an option's value, by the types that Typer shows: ``<str>``, ``<list[Path]>``."""


class Command(TyperCommand):
    """A command of ``ebmkit``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arguments = [p for p in self.params if p.param_type_name == "argument"]
        for argument in self.arguments:
            argument.metavar = argument.metavar or (argument.name or "").upper()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command's name in its usage line."""
        return ["[OPTIONS]", *map(argument_name, self.arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            names, meaning = param.get_help_record(ctx) or ("", "")
            if param in self.arguments:
                arguments.append((argument_name(param), meaning))
            else:
                options.append((re.sub(r"<(?:list\[)?(\w+)[^|>]*>", _value_name, names), meaning))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def argument_name(argument: Any) -> str:
    """An argument in a usage line: ``RUN``, ``IMAGE...``, ``[ROW]...``."""
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."


def _value_name(found: re.Match[str]) -> str:
    return VALUES.get(found[1].lower(), found[0])
