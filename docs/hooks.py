"""Fill documentation pages from the program itself: the command-line reference and the tables."""

from __future__ import annotations

from typing import Any

import typer

COMMANDS = "<!-- commands -->"
TABLES = "<!-- tables -->"
FIELDS = "<!-- fields -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers in a page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())
    if TABLES in markdown:
        markdown = markdown.replace(TABLES, component_tables())
    if FIELDS in markdown:
        markdown = markdown.replace(FIELDS, config_fields())
    return markdown


def command_reference() -> str:
    """Every command with its arguments and options, from the objects that parse them."""
    from ebmkit.cli import app
    from ebmkit.cli import commands as _commands  # noqa: F401  (registers them)

    lines: list[str] = []
    _describe(typer.main.get_command(app), "ebmkit", lines)
    return "\n".join(lines)


def _describe(command: Any, name: str, lines: list[str]) -> None:
    children = getattr(command, "commands", None)
    if children:
        for child in children.values():
            _describe(child, f"{name} {child.name}", lines)
        return
    paragraphs = (command.help or "").replace("\n\n", "\0").replace("\n", " ").split("\0")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([name, *(_metavar(a) for a in arguments), "[OPTIONS]"])
    lines += [f"## {name}", "", "```", usage, "```", "", *paragraphs, ""]
    rows = [(f"`{_metavar(a)}`", getattr(a, "help", "") or "") for a in arguments]
    rows += [(f"`{' / '.join([*o.opts, *o.secondary_opts])}`", o.help or "") for o in options]
    lines += _table(("argument or option", "meaning"), rows)


def _metavar(argument: Any) -> str:
    return argument.name.upper() + (" ..." if argument.nargs == -1 else "")


def component_tables() -> str:
    """The tables behind `ebmkit list`."""
    from ebmkit.cli.list import tables

    lines: list[str] = []
    for kind, table in tables().items():
        lines += [f"### {kind}", ""]
        lines += _table(("name", "about"), [(f"`{k}`", v) for k, v in table.items()])
    return "\n".join(lines)


def config_fields() -> str:
    """Every field of a run's configuration, from the models that validate it."""
    from ebmkit.training import TrainConfig

    rows = list(_fields(TrainConfig, ""))
    return "\n".join(_table(("field", "meaning"), rows))


def _fields(model: Any, prefix: str) -> Any:
    for name, field in model.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None)
        if nested:
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else f" [default: `{field.default}`]"
            yield f"`{prefix}{name}`", (field.description or "") + default


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    body = [f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *body, ""]
