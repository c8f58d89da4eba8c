"""``python -m ebmkit`` is the command ``ebmkit``."""

from ebmkit.cli import main

main()
