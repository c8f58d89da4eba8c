"""``python -m ebmkit`` runs the command ``ebmkit``."""

from ebmkit.cli import main

main()
