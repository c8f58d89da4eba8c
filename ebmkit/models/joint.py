r"""The joint model of a backbone and a head, and its log-density for larger images.

Backbones average their features over positions. So with the plain formula (CDN eq. 11) the
log-density has the same order of magnitude for all image sizes, and the score is inversely
proportional to the number of pixels. But the log-density should be about proportional to the number
of pixels. With the reference size :math:`h_0 \times w_0` of training and :math:`N = HW / h_0 w_0`,
an image with :math:`N > 1` has

.. math::
    \text{factor:}  & \quad \log p(y) = N \,\ell(f(y)) \\
    \text{windows:} & \quad \log p(y) = \tfrac{N}{M} \sum_{m=1}^{M} \ell(f_m(y)) \\
    \text{tiles:}   & \quad \log p(y) = \tfrac14 \sum_{m=1}^{M} N_m \,\ell(f(y_m))

where :math:`\ell` is the head, :math:`f_m` the features pooled over the m-th window of a grid with
windows of the reference size, and :math:`y_m` the m-th of half-overlapping crops, which are at most
twice the reference size in height and width and have the area of :math:`N_m` reference sizes. Crops
are cut at the border, so that every pixel is in four of them and :math:`\sum_m N_m / 4 = N`. If one
crop spans the height or the width, 1/4 becomes 1/2; if it spans both, 1.

The logits scale in the same way, as the sum of the evidence of all parts of the image. Up to the
reference area the three are equal to the paper's formula. The docs, "Images of any size", explain
which statistics are local and why ``tiles`` is the default.

The paper's networks are blind to sigma. A backbone whose attribute ``noise_conditional`` is True
gets sigma as an input; the model is then :math:`\log p_\sigma(y, c)` for every sigma, up to a
constant that may depend on sigma. Without sigma the image is assumed to be clean,
:math:`\sigma = 0`, as in `ebmkit.GaussianMixture`.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1, to_weights, upcast, without_autocast
from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.models.base import Backbone, Features, Head, WindowedBackbone, check_images

SizeScaling = Literal["tiles", "factor", "windows"]


class JointModel(EnergyModel):
    """log p(y, c) from a backbone and a head; blind to sigma (the paper) or noise-conditional.

    Args:
        backbone: maps images (B, C, H, W) to `Features` with K = ``backbone.num_features``; also
            gets sigma if it is a `NoiseConditionalBackbone`.
        head: maps features (B, K) to `Energies`.
        in_channels: required number of channels C; None: any.
        reference_size: height and width up to which the plain formula applies; None: at every size.
        size_scaling: log-density of larger images: ``tiles``, ``factor`` or ``windows`` (see the
            docs, "Images of any size").
        input_mean: mean subtracted from images before the backbone, one number or one per channel.
            It acts as a bias. Scores remain gradients with respect to the image itself.
        input_std: standard deviation that images are divided by before the backbone, one number or
            one per channel.

    Raises:
        UserError: if ``size_scaling`` is ``windows`` and the backbone cannot pool over windows, or
            the numbers of means or deviations and channels differ.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        in_channels: int | None = None,
        reference_size: tuple[int, int] | None = None,
        size_scaling: SizeScaling = "tiles",
        input_mean: float | tuple[float, ...] = 0.0,
        input_std: float | tuple[float, ...] = 1.0,
    ) -> None:
        super().__init__()
        for name, numbers in (("input_mean", input_mean), ("input_std", input_std)):
            if isinstance(numbers, tuple):
                if in_channels and len(numbers) != in_channels:
                    raise UserError(
                        f"{name} has {len(numbers)} numbers and images have {in_channels} "
                        "channel(s): give one number, or one per channel"
                    )
                values = torch.tensor(numbers).reshape(-1, 1, 1)  # moves with the model
                self.register_buffer(f"_{name}", values, persistent=False)
        if not isinstance(backbone, Backbone) or not isinstance(head, Head):
            raise UserError("a backbone needs num_features, a head needs num_classes")
        windows = bool(reference_size) and size_scaling == "windows"
        if windows and not isinstance(backbone, WindowedBackbone):
            raise UserError(
                f"{type(backbone).__name__} has no method pool(maps, grid), which size_scaling "
                "'windows' needs: choose size_scaling 'tiles' or 'factor'"
            )
        self.backbone = backbone
        self.head = head
        subsample_before_1x1(self)
        self.in_channels = in_channels
        self.reference_size = reference_size
        self.size_scaling = size_scaling
        self.input_mean = input_mean
        self.input_std = input_std
        self.num_classes = head.num_classes
        self.noise_conditional = bool(getattr(backbone, "noise_conditional", False))

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of images ``y`` (B, C, H, W) in image units.

        ``sigma``, a float or (B,), is ignored by a blind backbone; None: images are clean.

        Raises:
            UserError: if ``y`` is not a batch of images with C channels.
        """
        check_images(y, self.in_channels)
        if self.reference_size is None:
            return self._energies(self._features(y, sigma).pooled)
        rows, columns = self.reference_size
        size = y.shape[-2] * y.shape[-1] / (rows * columns)
        if size <= 1:
            return self._energies(self._features(y, sigma).pooled)
        if self.size_scaling == "factor":
            pooled = self._features(y, sigma).pooled
        elif self.size_scaling == "windows":
            assert isinstance(self.backbone, WindowedBackbone)
            grid = max(1, round(y.shape[-2] / rows)), max(1, round(y.shape[-1] / columns))
            maps = self._features(y, sigma).maps
            pooled = rearrange(self.backbone.pool(maps, grid), "b m k -> (b m) k")
        else:
            return self._sum_of_tiles(y, sigma, self.reference_size)
        return _total(self._energies(pooled), y.shape[0], size)

    def set_recompute(self, on: bool) -> None:
        """Switch activation checkpointing in training on or off.

        Raises:
            UserError: if no module has an attribute ``recompute``.
        """
        able = [m for m in self.modules() if isinstance(getattr(m, "recompute", None), bool)]
        if not able:
            raise UserError(
                f"{type(self.backbone).__name__} cannot recompute its activations: set "
                "compute.recompute=false, or split the batch by compute.accumulate"
            )
        for module in able:
            setattr(module, "recompute", on)  # noqa: B010  (not every module has it)

    def _sum_of_tiles(self, y: Tensor, sigma: Noise | None, reference: tuple[int, int]) -> Energies:
        """Sum of the energies of all crops, weighted by area."""
        height, width = reference
        rows = half_overlapping_tiles(y.shape[-2], 2 * height)
        columns = half_overlapping_tiles(y.shape[-1], 2 * width)
        copies = (2 if len(rows) > 1 else 1) * (2 if len(columns) > 1 else 1)
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for (top, bottom), (left, right) in itertools.product(rows, columns):
            crop = y[..., top:bottom, left:right]
            by_shape.setdefault((bottom - top, right - left), []).append(crop)
        logits, density = y.new_zeros(()), y.new_zeros(())
        for (h, w), crops in by_shape.items():  # crops of one shape in one pass
            level = sigma
            if isinstance(sigma, Tensor) and sigma.ndim:
                level = sigma.repeat_interleave(len(crops))
            stacked = rearrange(torch.stack(crops, dim=1), "b m c h w -> (b m) c h w")
            parts = self._energies(self._features(stacked, level).pooled)
            size = len(crops) * h * w / (height * width * copies)
            total = _total(parts, y.shape[0], size)
            logits, density = logits + total.logits, density + total.log_density
        return Energies(logits, density)

    def _features(self, y: Tensor, sigma: Noise | None) -> Features:
        if isinstance(self.input_mean, tuple):
            y = y - self.get_buffer("_input_mean")
        elif self.input_mean:
            y = y - self.input_mean
        if isinstance(self.input_std, tuple):
            y = y / self.get_buffer("_input_std")
        elif self.input_std != 1:
            y = y / self.input_std
        y = to_weights(y, self.backbone)
        if not self.noise_conditional:
            features: Features = self.backbone(y)
            return features
        level = torch.as_tensor(0.0 if sigma is None else sigma, dtype=y.dtype, device=y.device)
        conditional: Features = self.backbone(y, level.reshape(-1).expand(len(y)))
        return conditional

    def _energies(self, pooled: Tensor) -> Energies:
        with without_autocast(pooled):  # in float32, also if the parameters are not
            weights = {name: p for name, p in self.head.named_parameters() if upcast(p) is not p}
            if weights:
                wide = {name: upcast(p) for name, p in weights.items()}
                energies: Energies = torch.func.functional_call(self.head, wide, upcast(pooled))
            else:
                energies = self.head(upcast(pooled))
        if energies.logits.ndim != 2 or energies.log_density.ndim != 1:
            raise UserError(
                f"head {type(self.head).__name__} gives logits {tuple(energies.logits.shape)} and "
                f"log-densities {tuple(energies.log_density.shape)}: (B, C) and (B,) are needed"
            )
        return energies


def half_overlapping_tiles(length: int, tile: int) -> list[tuple[int, int]]:
    """Intervals of at most ``tile`` that cover 0 .. length twice; the first and last are halved.

    If ``length`` is at most ``tile``, one interval covers it once.

    >>> half_overlapping_tiles(96, 64)
    [(0, 32), (0, 64), (32, 96), (64, 96)]
    >>> half_overlapping_tiles(64, 64)
    [(0, 64)]
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil(2 * length / tile)
    edges = [round(k * length / count) for k in range(count + 1)]
    return list(zip([0, *edges[:-1]], [*edges[1:], length], strict=True))


def _total(parts: Energies, batch: int, size: float) -> Energies:
    """Energies of images from those of their M parts, (B * M, ...): ``size`` times the mean."""
    logits = reduce(parts.logits, "(b m) classes -> b classes", "mean", b=batch)
    density = reduce(parts.log_density, "(b m) -> b", "mean", b=batch)
    return Energies(size * logits, size * density)
