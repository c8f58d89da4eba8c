"""Runs the command line in the test process, without new imports."""

import contextlib
import io
import sys
import warnings
from typing import NamedTuple

import pytest

from ebmkit.cli import main
from ebmkit.terminal import console, errors


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def ebmkit_command(*arguments, cwd, **environment):
    """Run ebmkit in this process, in folder ``cwd``; return exit code, stdout and stderr."""
    out, err, before = io.StringIO(), io.StringIO(), warnings.showwarning
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["ebmkit", *map(str, arguments)])
        for name, value in {"COLUMNS": "120", **environment}.items():
            patch.setenv(name, value)
        for one in (console, errors):  # they read the width when they are created
            patch.setattr(one, "_width", int(environment.get("COLUMNS", 120)))
        main()
    warnings.showwarning = before
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())
