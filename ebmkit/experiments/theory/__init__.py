"""Theory of generative and discriminative fits: figure 1 and appendix D of arXiv 2410.03505."""

from ebmkit.experiments.theory.families import SETTINGS, Setting, Truth
from ebmkit.experiments.theory.figure import draw_figure1, figure1, markdown, rows
from ebmkit.experiments.theory.fits import discriminative, generative

__all__ = [
    "SETTINGS",
    "Setting",
    "Truth",
    "discriminative",
    "draw_figure1",
    "figure1",
    "generative",
    "markdown",
    "rows",
]
