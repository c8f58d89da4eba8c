"""Plots of results, as PNG files written in one move (`ebmkit.plots.common`)."""
