"""What a backbone and a head owe each other.

A backbone turns images into features, a head turns features into energies, a
`ebmkit.models.JointModel` is one of each. Neither knows the other: a backbone of your own needs
`num_features` and a `forward` that returns `Features`; a head of your own needs only `forward`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ebmkit.energy import Energies
from ebmkit.errors import UserError

__all__ = [
    "Backbone",
    "Features",
    "Head",
    "NoiseConditionalBackbone",
    "WindowedBackbone",
    "check_images",
]


class Features(NamedTuple):
    """What a backbone sees in a batch of images.

    Attributes:
        pooled: (B, K), averaged over positions.
        maps: the maps behind them, each (B, C_i, H_i, W_i), for who wants positions; may be empty.
    """

    pooled: Tensor
    maps: tuple[Tensor, ...] = ()


@runtime_checkable
class Backbone(Protocol):
    """Images (B, C, H, W) to `Features` with K = ``num_features``."""

    num_features: int

    def __call__(self, y: Tensor, /) -> Features: ...


@runtime_checkable
class NoiseConditionalBackbone(Protocol):
    """A backbone that is told sigma, (B,) in image units, if its ``noise_conditional`` is True.

    One without that attribute, or where it is False, is called with the images alone.
    """

    num_features: int
    noise_conditional: bool

    def __call__(self, y: Tensor, sigma: Tensor, /) -> Features: ...


@runtime_checkable
class WindowedBackbone(Backbone, Protocol):
    """A backbone that can also pool its maps over a grid of windows."""

    def pool(self, maps: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Average ``maps`` over each window of ``grid`` (rows, columns): (B, rows * columns, K)."""
        ...


@runtime_checkable
class Head(Protocol):
    """Pooled features (B, K) to energies; ``num_classes`` is C."""

    num_classes: int

    def __call__(self, pooled: Tensor, /) -> Energies: ...


def check_images(y: Tensor, channels: int | None = None) -> None:
    """Whether ``y`` is a batch of images of ``channels`` (None: any number).

    Raises:
        UserError: if it is not.
    """
    if y.ndim != 4:
        shape = tuple(y.shape)
        raise UserError(f"images must be (batch, channels, height, width), not {shape}")
    if channels is not None and y.shape[1] != channels:
        raise UserError(f"this model takes images of {channels} channel(s), not {y.shape[1]}")
