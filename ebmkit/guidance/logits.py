r"""Any network that gives logits, as a model with energies.

.. math:: E(x, c) = -\operatorname{logits}_c, \qquad E(x) = -\operatorname{logsumexp}(\text{logits})

(RCG eq. 2.32-2.38; JEM, arXiv 1912.03263). Images come in [0, 1]; what the network wants instead,
the range [-1, 1] or a mean and deviation of each channel, is done inside, so that gradients are per
image unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError


class LogitModel(EnergyModel):
    """A classifier of anyone's, read as an energy model.

    Args:
        network: images (B, C, H, W) to logits (B, num_classes); with ``noise_conditional`` it is
            called as network(images, sigma), sigma (B,) in image units.
        num_classes: number of labels.
        mean: of each channel, subtracted from images in [0, 1]; a number or one for each.
        std: of each channel, divided by after that.
        signed: whether the network takes images in [-1, 1]; it excludes mean and std.
        in_channels: channels that images must have; None does not check.
        noise_conditional: whether the network needs the noise level.

    Raises:
        UserError: if mean, std and signed do not go together.

    >>> model = LogitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, signed=True)
    >>> model.log_joint(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        signed: bool = False,
        in_channels: int | None = None,
        noise_conditional: bool = False,
    ) -> None:
        super().__init__()
        if signed and not (mean is None and std is None):
            raise UserError("images in [-1, 1] have mean and std 0.5: give signed, or mean and std")
        if num_classes < 1:
            raise UserError(f"{num_classes} labels are none: take 1 or more")
        default = 0.5 if signed else None
        self.network, self.num_classes, self.in_channels = network, num_classes, in_channels
        self.noise_conditional = noise_conditional
        self.register_buffer("mean", _of_channels("mean", default or mean or 0.0, in_channels))
        self.register_buffer("std", _of_channels("std", default or std or 1.0, in_channels))
        if bool((self.std <= 0).any()):
            raise UserError(f"std {self.std.flatten().tolist()} must be above 0")

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of ``y`` (B, C, H, W) in [0, 1].

        Raises:
            UserError: if images or logits have another shape than was said, or sigma is needed.
        """
        if self.in_channels is not None and y.shape[1] != self.in_channels:
            raise UserError(
                f"this model takes images of {self.in_channels} channel(s), not {y.shape[1]}"
            )
        rest: list[Any] = []
        if self.noise_conditional:
            if sigma is None:
                raise UserError("this model takes the noise level as an input: give sigma")
            rest = [torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))]
        logits: Tensor = self.network((y - self.mean.to(y)) / self.std.to(y), *rest)
        if logits.shape != (len(y), self.num_classes):
            raise UserError(
                f"the network gives {tuple(logits.shape)} for {len(y)} images, not logits "
                f"{(len(y), self.num_classes)}"
            )
        return Energies(logits, logits.logsumexp(1))

    def _warn_if_rough(self) -> None:
        """Nothing: it was never meant to denoise."""


def _of_channels(name: str, values: float | Sequence[float], channels: int | None) -> Tensor:
    """A number of all, or (C, 1, 1)."""
    found = torch.as_tensor(values, dtype=torch.float32)
    if not found.ndim:
        return found
    found = found.reshape(-1, 1, 1)
    if channels is not None and len(found) not in (1, channels):
        raise UserError(f"{name} has {len(found)} numbers for {channels} channel(s)")
    return found
