"""What a backbone and a head owe each other.

A backbone turns images into features, a head turns features into energies, a
`ebmkit.models.JointModel` is one of each. Neither knows the other: a backbone of your own needs
`num_features` and a `forward` that returns `Features`; a head of your own needs only `forward`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ebmkit.core import Energies

__all__ = ["Backbone", "Features", "Head", "WindowedBackbone"]


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
