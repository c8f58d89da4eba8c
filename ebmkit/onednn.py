"""A defect of oneDNN that corrupts memory, and how the models here avoid it.

In PyTorch 2.15, on processors with AVX2 and without AVX-512, the weight gradient of some
convolutions writes out of bounds: 1x1, strided, not padded, one group, fewer than 8 input channels,
channels last, two images or more, one thread (docs: "oneDNN: strided 1x1 convolutions"). Such a
convolution is a subsampling and a 1x1 convolution of stride 1,

    conv(x, stride=s) = conv(x[:, :, ::s, ::s], stride=1),

with the same values and gradients, to rounding, and a sound kernel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

SOUND_CHANNELS = 8
"""Input channels from which the kernel is sound: the float32 numbers in an AVX2 register."""


def subsample_before_1x1(model: nn.Module) -> None:
    """Change the convolutions of ``model`` that the defect can reach, in place.

    The stride moves from the convolution to a forward pre-hook of it. Parameters keep their names
    and values; a second call changes nothing, nor does one where oneDNN is switched off
    (`torch.backends.mkldnn`). Calls of `torch.nn.functional.conv2d` are not seen.

    >>> from torch import nn
    >>> conv = nn.Conv2d(4, 8, 1, stride=2)
    >>> subsample_before_1x1(conv)
    >>> conv.stride, len(conv._forward_pre_hooks)
    ((1, 1), 1)
    """
    if not torch.backends.mkldnn.enabled:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_affected(module):
            rows, columns = module.stride
            module.stride = (1, 1)
            module.register_forward_pre_hook(partial(_subsample, rows=rows, columns=columns))


def _is_affected(conv: nn.Conv2d) -> bool:
    return (
        tuple(conv.kernel_size) == (1, 1)
        and tuple(conv.stride) != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.in_channels < SOUND_CHANNELS
    )


def _subsample(
    conv: nn.Module, inputs: tuple[Tensor, ...], *, rows: int, columns: int
) -> tuple[Tensor, ...]:
    x, *others = inputs
    return (x[..., ::rows, ::columns], *others)
