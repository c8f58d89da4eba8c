"""What simple methods make of the same measurements: every restored picture is shown beside them.

==============  ==================================================================================
pixels          each unknown one the mean of all known ones; the nearest known one; and, where
                scikit-image is installed, the biharmonic fill (Damelin & Hoang 2018)
blocks          each block filled with its mean (``nearest``); ``bicubic`` interpolation
frequencies     the known ones alone: the blurred picture
projections     the image of these alone, on gray
==============  ==================================================================================
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ebmkit.sampling.inverse import BlockAverage, LowPass, Measurement, Pixels

__all__ = ["baselines_of"]

BIHARMONIC = 5000
"""Unknown pixels up to which the biharmonic fill, a linear system of that size, is worth it."""


def baselines_of(measurement: Measurement, measured: Tensor) -> dict[str, Tensor]:
    """Name to image (C, H, W), clipped to [0, 1], of measurements (1, n)."""
    gray = torch.full((1, *measurement.shape), 0.5, device=measured.device)
    seen = measurement.impose(gray, measured)[0]
    if isinstance(measurement, BlockAverage):
        small, size = measurement.small_images(measured), measurement.shape[1:]
        # with antialias the cubic kernel is Keys', a = -1/2, as in Pillow and Matlab
        large = torch.nn.functional.interpolate(
            small, size, mode="bicubic", align_corners=False, antialias=True
        )
        found = {"nearest": seen, "bicubic": large[0]}
    elif isinstance(measurement, Pixels):
        found = _fills(measurement, seen)
    elif isinstance(measurement, LowPass):
        found = {"low-passed": seen}
    else:
        found = {"pseudo-inverse": seen}
    return {name: image.clamp(0, 1) for name, image in found.items()}


def _fills(measurement: Pixels, seen: Tensor) -> dict[str, Tensor]:
    from scipy.ndimage import distance_transform_edt

    ones = torch.ones(1, measurement.count, device=seen.device)
    known = measurement.adjoint(ones)[0] > 0.5  # (C, H, W)
    means = [own[there].mean() for own, there in zip(seen, known, strict=True)]
    flat = torch.stack([torch.where(k, s, m) for k, s, m in zip(known, seen, means, strict=True)])
    near = flat.clone()
    for channel, there in enumerate(known.cpu()):
        rows, columns = distance_transform_edt(
            ~there.numpy(), return_distances=False, return_indices=True
        )
        near[channel] = seen[channel, torch.from_numpy(rows), torch.from_numpy(columns)]
    found = {"mean": flat, "nearest": near}
    unknown = int((~known[0]).sum())
    if importlib.util.find_spec("skimage") is not None and 0 < unknown <= BIHARMONIC:
        found["biharmonic"] = _biharmonic(seen, ~known[0])
    return found


def _biharmonic(seen: Tensor, missing: Tensor) -> Tensor:
    from skimage.restoration import inpaint_biharmonic

    pixels, mask = seen.cpu().double().movedim(0, -1).numpy(), missing.cpu().numpy()
    filled = torch.from_numpy(inpaint_biharmonic(pixels, mask, channel_axis=-1))
    return filled.movedim(-1, 0).to(seen)
