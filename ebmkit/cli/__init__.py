"""The command line: commands, gathered in `ebmkit.cli.app`."""

from ebmkit.cli.app import app, main

__all__ = ["app", "main"]
