"""Generative and discriminative fits in theory: figure 1 and appendix D of arXiv 2410.03505."""

from ebmkit.theory.constants import Expansion, discriminative, expand, generative
from ebmkit.theory.families import (
    CentredMeans,
    ClassCovariances,
    Family,
    Gaussians,
    NaiveBayes,
    SharedCovariance,
)
from ebmkit.theory.figure import figure1, markdown, rows
from ebmkit.theory.settings import SETTINGS, Setting
from ebmkit.theory.truth import Nodes, Truth

__all__ = [
    "SETTINGS",
    "CentredMeans",
    "ClassCovariances",
    "Expansion",
    "Family",
    "Gaussians",
    "NaiveBayes",
    "Nodes",
    "Setting",
    "SharedCovariance",
    "Truth",
    "discriminative",
    "expand",
    "figure1",
    "generative",
    "markdown",
    "rows",
]
