r"""Restoring pictures by stochastic ascent under their measurements (`ebmkit.sampling.kadkhodaie`).

Pictures of one measurement are restored together, each in S chains. A chain is a draw that explains
the measurements; the mean of the S is nearer to the posterior mean and so has the higher PSNR,
though it looks smoother than any picture.

Pictures up to twice the size that the model was trained at go through it as they are. Larger ones
are denoised in overlapping crops (`ebmkit.inference`), so that memory is bounded; the noise level
is that of the whole picture, as the ascent needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import Noise, ScoreModel
from ebmkit.errors import UserError
from ebmkit.inference import TILE, denoise_image
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import Chains
from ebmkit.sampling.config import StochasticAscentConfig
from ebmkit.sampling.inverse import Measurement
from ebmkit.sampling.jobs.record import means_of
from ebmkit.sampling.presets import make_restorer

__all__ = ["LARGEST", "Restored", "restore"]

LARGEST = 1024 * 1024
"""Pixels of a picture at the most: a restoration is hundreds of passes."""

WHOLE = 2
"""Times the trained size up to which a picture goes through the network as it is."""


class Restored(NamedTuple):
    """What came of B pictures in S chains each.

    Attributes:
        images: (B, S, C, H, W), not clipped.
        finite: (B, S) bool, chains that stayed with finite numbers.
        error: (B, S) root mean square of what the measurements of the images are off, image units.
        sigmas: mean noise level that the chains found at each step.
        steps: of the longest chain.
    """

    images: Tensor
    finite: Tensor
    error: Tensor
    sigmas: list[float | None]
    steps: int


@torch.no_grad()
def restore(
    model: ScoreModel,
    measurement: Measurement,
    measured: Tensor,
    config: StochasticAscentConfig | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    c: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Restored:
    """Draw images that have the measurements ``measured`` (B, n).

    Args:
        model: a blind denoiser, frozen.
        measurement: which numbers of the images are known.
        measured: what they are.
        config: of the sampler ``ks``.
        samples: S, chains for each picture.
        seed: of the noise.
        c: a label, for the class-conditional denoiser.
        progress: told of (step, steps at the most).

    Raises:
        UserError: if the sampler ``ks`` cannot drive the model, the picture is too large, or the
            number of samples is below 1.
    """
    if samples < 1:
        raise UserError(f"{samples} samples of each picture cannot be drawn: take 1 or more")
    _, height, width = measurement.shape
    if height * width > LARGEST:
        raise UserError(
            f"a picture of {width}x{height} has more than {LARGEST // 1024**2} megapixel, too many "
            "to restore: cut it into parts, or make it smaller"
        )
    config = config or StochasticAscentConfig()
    device, count = device_of(model), len(measured)
    numbers = measured.to(device).repeat_interleave(samples, 0)
    ascent = make_restorer(model, measurement, numbers, config, c)
    if not _whole(model, height, width):
        ascent.denoiser = _InCrops(model, c)
    shape = (len(numbers), *measurement.shape)
    chains = Chains(ascent, ascent.init(ascent.start(shape, _generator(device, seed, 0))))
    sums: list[Tensor] = []
    while not chains.done:
        before = chains.finished.clone()
        info = chains.advance(_generator(device, seed, chains.state.step + 1))
        active = ~before
        active[list(chains.died)] = False
        assert info.sigma is not None
        row: list[Any] = [active.sum(), info.sigma[active].sum(), torch.nan, 0]
        sums.append(torch.tensor([float(v) for v in row], dtype=torch.float64))
        if progress is not None:
            progress(chains.state.step, ascent.steps)
    finite = torch.ones(len(numbers), dtype=torch.bool)
    finite[list(chains.died)] = False
    images = chains.state.x
    off = measurement.measure(images) - numbers
    return Restored(
        images.reshape(count, samples, *measurement.shape).cpu(),
        finite.reshape(count, samples),
        off.square().mean(1).sqrt().reshape(count, samples).cpu(),
        means_of([torch.stack(sums)]).sigma,
        chains.state.step,
    )


def _generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    return keyed_generator(device, seed, "restore", step)


def _whole(model: ScoreModel, height: int, width: int) -> bool:
    size = model.card.image_size if model.card else None
    return max(height, width) <= (WHOLE * max(size) if size else TILE)


class _InCrops:
    """The blind denoiser of pictures of any size (B, C, H, W), in crops, one after the other."""

    def __init__(self, model: ScoreModel, c: int | None) -> None:
        self.model, self.c = model, c

    def __call__(self, y: Tensor, sigma: Noise | None = None, /) -> Tensor:
        return torch.stack([self._one(one) for one in y])

    def _one(self, y: Tensor) -> Tensor:
        found = denoise_image(self.model, y, c=self.c)
        limits = self.model.card.sigma_range if self.model.card else None
        if limits is None or not self.model.is_energy_based or found.sigma <= limits[1]:
            return found.image
        # the level held to the range, as `ebmkit.sampling.target.blind_denoiser_of` holds it
        return y + (limits[1] / found.sigma) ** 2 * (found.image - y)
