"""Generative and discriminative fits in theory: figure 1 and appendix D of arXiv 2410.03505."""

from ebmkit.experiments.theory.constants import discriminative, generative
from ebmkit.experiments.theory.figure import figure1, markdown, rows
from ebmkit.experiments.theory.settings import SETTINGS, Setting, Truth

__all__ = [
    "SETTINGS",
    "Setting",
    "Truth",
    "discriminative",
    "figure1",
    "generative",
    "markdown",
    "rows",
]
