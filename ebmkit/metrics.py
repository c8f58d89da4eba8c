r"""Metrics of single images.

.. math::
    \operatorname{PSNR}(\hat x, x) = -10 \log_{10} \tfrac1d \|\hat x - x\|^2
    \quad \text{dB, for images in } [0, 1].
"""

from __future__ import annotations

from torch import Tensor


def predict(logits: Tensor) -> Tensor:
    """The labels (B,) of the largest logits (B, C); -1, always wrong, if a logit is NaN."""
    return logits.argmax(dim=1).where(~logits.isnan().any(dim=1), -1)


def psnr(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, over all its pixels and channels.

    Args:
        estimate: estimated images (B, C, H, W); clip the output of a denoiser to [0, 1] first.
        clean: clean images (B, C, H, W) in [0, 1].

    Returns:
        PSNR in dB, (B,); infinite for equal images.
    """
    return -10 * (estimate - clean).square().flatten(1).mean(dim=1).log10()
