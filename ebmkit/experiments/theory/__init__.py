"""Generative and discriminative fits in theory: figure 1 and appendix D of arXiv 2410.03505."""

from ebmkit.experiments.theory.constants import Expansion, discriminative, expand, generative
from ebmkit.experiments.theory.families import (
    CentredMeans,
    ClassCovariances,
    Family,
    Gaussians,
    NaiveBayes,
    SharedCovariance,
)
from ebmkit.experiments.theory.figure import figure1, markdown, rows
from ebmkit.experiments.theory.settings import SETTINGS, Nodes, Setting, Truth

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
