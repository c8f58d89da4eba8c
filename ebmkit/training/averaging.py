"""Averaged weights that stay where they are once a step has failed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["follow"]


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
