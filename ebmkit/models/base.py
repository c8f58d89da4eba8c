r"""Interfaces of backbones, heads and configurations, and shared tools of backbones.

A backbone maps images to features, a head maps features to energies, and a
`ebmkit.models.JointModel` combines one of each. A custom backbone needs `num_features` and a
`forward` that returns `Features`; a custom head needs `num_classes` and a `forward` that returns
`Energies`.

A network that is built by name has a configuration: a `BackboneConfig`, or a `DenoiserConfig` for a
complete model without a head. Its class is in one file with the network and its presets, and in the
list `ebmkit.models.config.NETWORKS`.

**Mean over positions.** Its gradient has the memory layout of its input:

.. math:: f = \frac{1}{HW} \sum_{ij} h_{ij}, \qquad
    \frac{\partial f}{\partial h_{ij}}^{\!\top} g = \frac{g}{HW} .

PyTorch expands g in its default layout. If feature maps are channels last, the rest of the backward
pass then mixes the two layouts, which on a CPU costs a few percent of a score-matching step
(``benchmarks/layout.py``).

**Noise levels.** A classifier for every step of a diffusion, :math:`p_t(c \mid u_t)` (RCG section
2.3), must accept every noise level. In image units y grows with sigma, so `NoiseConditioned` gives
its backbone the input of a diffusion network, the variance-preserving image of :math:`2y - 1`, and
one more channel, constant over the image, that encodes the noise level:

.. math::
    u = \sqrt{\bar\alpha}\,(2y - 1), \qquad \bar\alpha = \frac{1}{1 + (2\sigma)^2}, \qquad
    m = \tfrac14 \log \max(\sigma, \sigma_0) .

:math:`\sigma_0 = 0.005` is the lowest level of the linear schedule. It is used for clean images,
because training has no lower level. Up to the highest level, :math:`\sigma = 79`, m lies between
-1.4 and 1.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ebmkit.compute import upcast, without_autocast
from ebmkit.energy import Energies, ScoreModel, per_image
from ebmkit.errors import UserError
from ebmkit.models.convolution import in_forward_mode
from ebmkit.registry import Preset, find, record_addition


class Features(NamedTuple):
    """Output of a backbone for a batch of images.

    Attributes:
        pooled: features averaged over positions, (B, K).
        maps: feature maps before pooling, each (B, C_i, H_i, W_i); may be empty.
    """

    pooled: Tensor
    maps: tuple[Tensor, ...] = ()


@runtime_checkable
class Backbone(Protocol):
    """Maps images (B, C, H, W) to `Features` with K = ``num_features``."""

    num_features: int

    def __call__(self, y: Tensor, /) -> Features: ...


@runtime_checkable
class NoiseConditionalBackbone(Protocol):
    """A backbone with sigma, (B,) in image units, as a second input.

    A backbone whose attribute ``noise_conditional`` is missing or False gets only the images.
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
    """Maps pooled features (B, K) to energies; ``num_classes`` is C."""

    num_classes: int

    def __call__(self, pooled: Tensor, /) -> Energies: ...


# --- configurations ------------------------------------------------------------------------------


class NetworkConfig(BaseModel):
    """Configuration of a network. Each class has its own ``kind``, its name in files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    _classes: ClassVar[dict[str, type[NetworkConfig]]] = {}
    PRESETS: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    """Preset name -> description and fields. The fields override those of a recipe, even where they
    equal the defaults."""

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            return
        other = cls._classes.get(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(f"there is a network of kind {kind!r} already: choose another kind")
        if kind not in cls._classes and not cls.__module__.startswith("ebmkit."):
            record_addition(cls._classes, kind)
        cls._classes[kind] = cls

    @classmethod
    def class_for(cls, given: Any) -> type[NetworkConfig]:
        """The configuration class for the ``kind`` in ``given``, a configuration as a mapping.

        The oldest files have no ``kind``; their networks are GradResNets.

        Raises:
            UserError: if there is no such kind.
        """
        kind = str(given.get("kind", "gradresnet")) if isinstance(given, Mapping) else "gradresnet"
        return find("kind of backbone", cls._classes, kind)

    @classmethod
    def presets(cls) -> dict[str, Preset[Self]]:
        """Presets of this class by name."""
        found = cls.PRESETS.items()
        return {name: Preset(cls(**fields), text) for name, (text, fields) in found}

    def without_pretrained(self) -> Self:
        """This configuration, to be built without downloading weights."""
        return self


class BackboneConfig(NetworkConfig, ABC):
    """Configuration of a network from images to `Features`."""

    @abstractmethod
    def build(self, in_channels: int) -> nn.Module:
        """Build the `Backbone` for images of ``in_channels`` channels."""


class DenoiserConfig(NetworkConfig, ABC):
    """Configuration of a complete model without a head."""

    @abstractmethod
    def build_model(self, in_channels: int, num_classes: int = 0) -> ScoreModel:
        """Build the model for images of C channels and, if any, labels."""


def check_images(y: Tensor, channels: int | None = None) -> None:
    """Check that ``y`` is a batch of images with ``channels`` channels (None: any number).

    Raises:
        UserError: if it is not.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        wrong = getattr(y, "dtype", type(y).__name__)
        raise UserError(
            f"forward takes a tensor of floats, not {wrong}: methods such as logits, score and "
            "denoise convert images"
        )
    shape = tuple(y.shape)
    if y.ndim != 4:
        one = f": a batch of one is y[None], {(1, *shape)}" if y.ndim == 3 else ""
        raise UserError(f"images must be (batch, channels, height, width), not {shape}{one}")
    if channels is not None and shape[1] != channels:
        last = ": move the channels by y.movedim(-1, 1)" if shape[3] == channels else ""
        raise UserError(f"this model takes images of {channels} channel(s), not {shape[1]}{last}")


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad ``x`` (B, C, H, W) below and right to multiples of ``multiple``, replicating the edge."""
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not (below or right):
        return x
    return nn.functional.pad(x, (0, right, 0, below), mode="replicate")


# --- pooling -------------------------------------------------------------------------------------


def mean_over_windows(h: Tensor, grid: tuple[int, int] = (1, 1)) -> Tensor:
    """Mean of maps ``h`` (B, K, H, W) over each window of ``grid``: (B, windows, K), float32."""
    with without_autocast(h):
        wide = upcast(h)
        if grid == (1, 1):
            return mean_over_positions(wide)[:, None]
        pooled = nn.functional.adaptive_avg_pool2d(wide, grid)
        return rearrange(pooled, "b k rows columns -> b (rows columns) k")


class MeanPooled(nn.Module):
    """Base class of backbones whose features are the spatial means of their last maps."""

    num_features: int

    def features(self, h: Tensor) -> Features:
        """`Features` from the last maps ``h`` (B, K, H, W)."""
        return Features(mean_over_windows(h).squeeze(1), (h,))

    def pool(self, maps: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Features of each window of ``grid`` (rows, columns): (B, rows * columns, K), float32."""
        return mean_over_windows(maps[-1], grid)


class PooledBackbone(nn.Module):
    """A network that returns a tensor, as a backbone.

    Fused attention, which has only one derivative, is switched off in modules of timm.

    Args:
        network: maps images (B, C, H, W) to features (B, K), or to maps (B, K, H, W).
        num_features: K.
    """

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010  (not every module has it)

    def forward(self, y: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W)."""
        found: Tensor = self.network(y)
        if found.ndim == 2:
            return Features(found)
        return Features(mean_over_windows(found).squeeze(1), (found,))


def mean_over_positions(h: Tensor) -> Tensor:
    """Mean of maps ``h`` (B, C, H, W) over H and W: (B, C); differentiable to any order."""
    if torch.compiler.is_compiling() or in_forward_mode():  # a compiler chooses layouts itself
        return h.mean(dim=(2, 3))
    out: Tensor = _Mean.apply(h, None, False)  # type: ignore[no-untyped-call]
    return out


class _Mean(torch.autograd.Function):
    """Mean over positions, (B, C, H, W) to (B, C); with ``shape``, its transpose, (B, C) to it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shape: torch.Size | None, last: bool) -> Tensor:
        if shape is None:
            return x.mean(dim=(2, 3))
        even = (x / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
        if not last:
            return even.contiguous()
        return even.movedim(1, -1).contiguous().movedim(-1, 1)  # `vmap` knows no channels_last

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.spread, _ = inputs
        if ctx.spread is None:
            ctx.shape = x.shape
            ctx.last = x.stride(1) == 1 and not x.is_contiguous()  # channels last; as in `vmap`

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.spread is not None:
            return mean_over_positions(g), None, None
        return _Mean.apply(g, ctx.shape, ctx.last), None, None  # type: ignore[no-untyped-call]


# --- noise levels --------------------------------------------------------------------------------

LOWEST = 0.005
"""sigma_0, the lowest noise level, image units."""


class NoiseConditioned(nn.Module):
    """A backbone with sigma as input, encoded in one more channel than the images have.

    Args:
        backbone: any `Backbone` with C + 1 input channels.
    """

    noise_conditional = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        assert isinstance(backbone, Backbone)
        self.backbone: nn.Module = backbone
        self.num_features = backbone.num_features

    def forward(self, y: Tensor, sigma: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W) with noise level ``sigma`` (B,), image units."""
        level = sigma.clamp_min(LOWEST)
        root_abar = per_image((1 + (2 * level).square()).rsqrt(), y)
        level_map = per_image(level.log() / 4, y) * torch.ones_like(y[:, :1])
        features: Features = self.backbone(torch.cat([root_abar * (2 * y - 1), level_map], dim=1))
        return features

    def pool(self, maps: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Features of each window of ``grid`` (rows, columns): (B, rows * columns, K)."""
        assert isinstance(self.backbone, WindowedBackbone)
        return self.backbone.pool(maps, grid)
