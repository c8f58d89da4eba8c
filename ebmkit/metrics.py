r"""Measures of single images.

.. math::
    \operatorname{PSNR}(\hat x, x) = -10 \log_{10} \tfrac1d \|\hat x - x\|^2
    \quad \text{dB, for images in } [0, 1].
"""

from __future__ import annotations

from torch import Tensor


def predict(logits: Tensor) -> Tensor:
    """The label with the largest of the logits (B, C), (B,); -1, never right, where one is not a
    number."""
    return logits.argmax(dim=1).where(~logits.isnan().any(dim=1), -1)


def psnr(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, over all its pixels and channels.

    Args:
        estimate: (B, C, H, W); clip it to [0, 1] first if it is a denoiser's output.
        clean: (B, C, H, W) in [0, 1].

    Returns:
        (B,) in dB; infinite where the images are equal.
    """
    return -10 * (estimate - clean).square().flatten(1).mean(dim=1).log10()
