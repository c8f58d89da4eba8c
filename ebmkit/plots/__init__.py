"""Plots of results, as PNG files written in one move (`ebmkit.plots.common`)."""

from ebmkit.plots.training import learning_curves

__all__ = ["learning_curves"]
