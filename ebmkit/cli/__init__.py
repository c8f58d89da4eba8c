"""The command line; `ebmkit.cli.app` collects the commands."""

from ebmkit.cli.app import app, main

__all__ = ["app", "main"]
