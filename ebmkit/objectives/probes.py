"""Random numbers that are hashed from the bits of a batch's noise.

So they are keyed as the noise is, the same on every device, under every compiler, and however a
batch is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["label_dropout", "rademacher_probes"]


def rademacher_probes(eps: Tensor) -> Tensor:
    """Random signs, of the shape and type of the continuous noise ``eps``, from its bits.

    A hash of all bits of an entry is decided by the last ones, which say nothing of its value. So
    the signs are as good as independent of anything that is a smooth function of the noise, and
    the same for the same noise, on every device and under every compiler.
    """
    return (1 - 2 * (_hashed(eps) & 1)).to(eps.dtype)


def label_dropout(eps: Tensor, share: float) -> Tensor:
    """Which images of noise ``eps`` (B, ...) hide their label, (B,) bool: a ``share`` of them.

    A hash of the image's own noise decides, so it is keyed as the noise is, and the same however a
    batch is divided.
    """
    uniform = (_hashed(eps).flatten(1).sum(1) & _LOW).double() / (_LOW + 1)  # in [0, 1)
    return uniform < share


def _hashed(eps: Tensor) -> Tensor:
    """A hash of the bits of each entry, 0 to 2^32 - 1, int64."""
    wide = eps.dtype == torch.float64
    bits = eps.contiguous().view(torch.int64 if wide else torch.int32).to(torch.int64)
    bits = (bits ^ (bits >> 32)) & _LOW
    for factor, shift in ((0x5BD1E995, 15), (0x2C1B3C6D, 13), (0x297A2D39, 16)):
        bits = (bits * factor) & _LOW  # below 2^63: the factors are below 2^31
        bits = bits ^ (bits >> shift)
    return bits


_LOW = 0xFFFFFFFF
