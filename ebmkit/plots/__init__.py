"""Pictures of results, as PNG files written in one move (`ebmkit.plots.common`)."""

from ebmkit.plots.suites import (
    DenoisedLevel,
    accuracy_against_noise,
    confusion_matrix,
    denoising_grid,
    psnr_bars,
    reliability_diagram,
)

__all__ = [
    "DenoisedLevel",
    "accuracy_against_noise",
    "confusion_matrix",
    "denoising_grid",
    "psnr_bars",
    "reliability_diagram",
]
