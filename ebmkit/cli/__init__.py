"""The command line: one file for each command, gathered in `ebmkit.cli.app`."""

from ebmkit.cli.app import app, main

__all__ = ["app", "main"]
