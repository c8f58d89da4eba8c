"""The command line, run in the process of the tests: nothing is imported anew."""

import contextlib
import io
import sys
import warnings
from typing import NamedTuple

import pytest

from ebmkit.cli import main


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def ebmkit_command(*arguments, cwd, **environment):
    """Run the command line in this process, in folder ``cwd``; what it printed and ended with."""
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
        main()
    warnings.showwarning = before
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())
