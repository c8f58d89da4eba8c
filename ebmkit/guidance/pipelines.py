"""What `ebmkit.guidance.diffusers` reads off pipelines, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.energy import EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.guidance.guides import check_guide
from ebmkit.guidance.logits import LogitModel
from ebmkit.noise import Schedule
from ebmkit.sampling.target import DensityFunction

__all__ = [
    "NOISE_ALONE",
    "PREDICTIONS",
    "as_guide",
    "check_pipeline",
    "check_unet",
    "clipped",
    "from_noise",
    "in_precision_of",
    "labels_of",
    "rows_of",
    "schedule_of",
    "sizes",
    "to_noise",
]

LATENT = ("vae", "vqvae", "vqgan", "movq", "prior")
"""Components of pipelines whose UNet works on codes of images."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")

NOISE_ALONE = 1e-7
"""Below this share of the image a guide has nothing to see."""


@dataclass(frozen=True)
class _Levels(Schedule):
    """A scheduler's noise levels, also between two of its timesteps."""

    def abar(self, t: float) -> float:
        low = math.floor(t)
        if t == low:
            return super().abar(low)
        before, after = super().abar(low), super().abar(low + 1)
        levels = [math.sqrt((1 - a) / a) for a in (before, after)]
        level = levels[0] + (t - low) * (levels[1] - levels[0])  # linear, as Euler's of diffusers
        return 1 / (1 + level**2)


def schedule_of(scheduler: Any, image_range: tuple[float, float] = (-1.0, 1.0)) -> Schedule:
    """The noise levels of a scheduler of `diffusers`, to its own precision.

    Args:
        scheduler: with ``alphas_cumprod``.
        image_range: where clean images live.

    Raises:
        UserError: if it has none: its model sees something else than u_t.
    """
    abar = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(abar, Tensor) or not len(abar):
        raise UserError(
            f"{type(scheduler).__name__} has no alphas_cumprod: only schedulers of "
            "variance-preserving diffusion can be guided, as DDPM, DDIM and DPM-Solver"
        )
    known = abar.detach().double().cpu().clamp_min(NOISE_ALONE / 2)
    before = torch.cat([known.new_ones(1), known[:-1]])
    return _Levels((1 - known / before).clamp(1e-12, 1 - 1e-12), image_range)


def check_pipeline(pipeline: Any) -> None:
    name = type(pipeline).__name__
    latent = [part for part in LATENT if getattr(pipeline, part, None) is not None]
    if latent:
        raise UserError(
            f"{name} works on latents (it has {latent[0]!r}), and a guide sees images: take a "
            "pipeline on pixels, as DDPMPipeline"
        )
    for part in ("unet", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise UserError(f"{name} has no {part}: take a pipeline of diffusers with a UNet")


def check_unet(unet: nn.Module) -> int:
    """The channels C of its images.

    Raises:
        UserError: if it is no network of images to as many channels, or twice as many.
    """
    config: Any = getattr(unet, "config", None)
    taken, given = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    if not isinstance(taken, int) or given not in (taken, 2 * taken):
        raise UserError(
            f"{type(unet).__name__} takes {taken} channels and gives {given}: it must give as many "
            "as it takes, or twice as many with variances"
        )
    return taken


def as_guide(model: nn.Module, unet: Any, channels: int) -> EnergyModel:
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(model).__name__} is no network and cannot guide")
    noisy = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(m, noisy) and m.training for m in model.modules()):
        raise UserError(
            "the guide is in training mode, where its norms or dropout mix images or draw: call "
            "model.eval()"
        )
    size = getattr(unet.config, "sample_size", None)
    known = (size, size) if isinstance(size, int) else tuple(size) if size else None
    guide = model if isinstance(model, EnergyModel) else _of_logits(model, channels, known)
    check_guide(guide)
    card = guide.card
    wanted = getattr(guide, "in_channels", None) or (card.channels if card else None)
    if wanted is not None and wanted != channels:
        raise UserError(f"the pipeline makes images of {channels} channel(s), and this guide takes "
                        f"{wanted}: give one trained on such images")  # fmt: skip
    if card and card.image_size and known and tuple(card.image_size) != known:
        raise UserError(sizes(known, card.image_size))
    return guide


def sizes(own: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return (
        f"the pipeline makes images of {own[0]}x{own[1]}, and this guide was trained on "
        f"{wanted[0]}x{wanted[1]}: give one trained on such images"
    )


def _of_logits(model: nn.Module, channels: int, size: tuple[int, ...] | None) -> LogitModel:
    """A network of anyone's, with as many labels as it gives logits for one black image."""
    if size is None:
        raise UserError("the UNet does not say its sample_size: wrap the network in LogitModel")
    own = next(model.parameters(), torch.empty(0))
    black = torch.zeros(1, channels, *size, dtype=own.dtype, device=own.device)
    try:
        with torch.no_grad():
            logits = model(black)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the network does not take an image {tuple(black.shape[1:])}: {reason}"
        ) from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise UserError(
            "the network must give logits (B, labels): wrap it in a module that gives them alone"
        )
    return LogitModel(model, logits.shape[1], in_channels=channels)


def labels_of(label: int | Tensor | Sequence[int]) -> int | Tensor:
    found = torch.as_tensor(label).detach().cpu()
    if found.is_floating_point() or found.dtype == torch.bool or found.ndim > 1 or not len(
        found.reshape(-1)
    ):  # fmt: skip
        raise UserError(f"label {label} must be a whole number, or one for each image")
    return int(found) if found.ndim == 0 else found.long()


def in_precision_of(model: nn.Module, guide: DensityFunction) -> DensityFunction:
    """``guide`` in the number type of the model's parameters, its gradient in that of v."""
    own = next(model.parameters(), None)
    if own is None:
        return guide

    def cast(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        told = sigma.to(own.dtype) if isinstance(sigma, Tensor) else sigma
        value, gradient = guide(v.to(own.dtype), told)
        return value.to(v.dtype), gradient.to(v.dtype)

    return cast


def rows_of(value: Any, rows: slice, batch: int) -> Any:
    """The part of an argument that belongs to some images."""
    alike = isinstance(value, Tensor) and value.ndim and len(value) == batch
    return value[rows] if alike else value


def to_noise(out: Tensor, u: Tensor, abar: float, prediction: str) -> Tensor:
    if prediction == "epsilon":
        return out
    if prediction == "v_prediction":
        return math.sqrt(abar) * out + math.sqrt(1 - abar) * u
    return (u - math.sqrt(abar) * out) / math.sqrt(1 - abar)


def from_noise(out: Tensor, hat: Tensor, change: Tensor, abar: float, prediction: str) -> Tensor:
    """The prediction ``out`` where its noise is ``hat`` instead, changed by ``change``."""
    if prediction == "epsilon":
        return hat
    if prediction == "v_prediction":
        return out + change / math.sqrt(abar)
    return out - change * math.sqrt((1 - abar) / abar)


def clipped(noise: Tensor, u: Tensor, abar: float, limit: float) -> Tensor:
    """``noise`` where the clean image that it implies is held to -limit .. limit."""
    clean = (u - math.sqrt(1 - abar) * noise) / math.sqrt(abar)
    held: Tensor = (u - math.sqrt(abar) * clean.clamp(-limit, limit)) / math.sqrt(1 - abar)
    return held
