r"""Averaged weights that stay where they are once a step has failed.

With decay d, after t steps of which :math:`\bar\theta` is the mean,

.. math:: \bar\theta \leftarrow d_t \bar\theta + (1 - d_t)\,\theta, \qquad d_t = d .

Such a mean holds the first weights for about 1 / (1 - d) steps. With warm-up
:math:`d_t = \min(d, (1 + t) / (10 + t))`, which is the mean of a fixed share of the steps so far,
until d is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["exponential_average", "follow"]

Tensors = tuple[Tensor, ...] | list[Tensor]


def exponential_average(model: nn.Module, decay: float, warmup: bool = False) -> AveragedModel:
    """Averaged weights of ``model``, with a constant decay or its warm-up."""

    def move(means: Tensors, now: Tensors, count: Tensor | int) -> None:
        t = int(count)
        own = min(decay, (1 + t) / (10 + t)) if warmup else decay
        get_ema_multi_avg_fn(own)(means, now, count)  # type: ignore[no-untyped-call]

    return AveragedModel(model, multi_avg_fn=move, use_buffers=False)


@torch.no_grad()
def follow(average: AveragedModel, model: nn.Module, failed: Tensor) -> None:
    """Move ``average`` towards ``model``, to the bits of `AveragedModel.update_parameters`.

    Where ``failed``, a scalar on the device, is above 0 it moves towards itself instead; the host
    does not wait to learn which. It counts the step either way.
    """
    assert average.multi_avg_fn is not None
    own = [p.detach() for p in average.module.parameters()]
    ahead = [
        torch.where(failed > 0, mean, p) for mean, p in zip(own, model.parameters(), strict=True)
    ]
    if int(average.n_averaged) == 0:  # a number of the host's
        for mean, p in zip(own, ahead, strict=True):
            mean.copy_(p)
    else:
        average.multi_avg_fn(own, ahead, average.n_averaged)
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        mean.copy_(buffer)
    average.n_averaged += 1
