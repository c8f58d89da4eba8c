"""Options that all commands have in common."""

import pytest
import typer
from typer.testing import CliRunner

from ebmkit import UserError
from ebmkit.cli import app

COMMANDS = typer.main.get_command(app).commands
INTEGERS = [
    (name, parameter.opts[0])
    for name, command in COMMANDS.items()
    for parameter in command.params
    if "int" in str(getattr(getattr(parameter, "type_descriptor", None), "annotation", ""))
    and parameter.opts[0].startswith("-")
]


@pytest.mark.parametrize(("name", "option"), INTEGERS)
def test_integers_beyond_64_bits_are_refused(name, option):
    needed = [p for p in COMMANDS[name].params if p.required]
    given = [
        word
        for p in needed
        for word in ((p.opts[0], "x") if p.opts[0].startswith("-") else ("x",))
        if p.opts[0] != option
    ]
    result = CliRunner().invoke(app, [name, *given, option, str(2**64 + 1)])
    refused = isinstance(result.exception, UserError) and any(
        words in str(result.exception) for words in ("is too large", "is not legal")
    )
    assert refused or (result.exit_code == 2 and f"Invalid value for '{option}'" in result.output)


def test_every_command_with_integers_is_tested():
    assert {"train", "evaluate", "sample", "restore", "bench"} <= {name for name, _ in INTEGERS}
