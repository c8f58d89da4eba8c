"""The command line: ``ebmkit train | evaluate | classify | denoise | list | data``."""

from ebmkit.cli.app import app, main

__all__ = ["app", "main"]
