r"""Whether chains arrive at images, by the noise level that the model itself estimates.

A blind denoiser estimates the noise level of an image as :math:`\sqrt d / \|s(y)\|`. Samples that
arrived have levels like those of held-out images. Chains can fail to arrive although a sampler
follows its schedule to the end: a network trained on little noise has not seen gray images with
noise, from which they start, and its score does not lead from there to images.

A trial shows this before sampling: a few chains of the same sampler from the same starting points,
in at most `STEPS` steps. A schedule is shortened to that length. The stochastic ascent has none;
its level must fall by half as much, in logarithms, as with an ideal denoiser.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import format_sigma
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import trained_range
from ebmkit.sampling.diagnostics import finite_or_none
from ebmkit.sampling.diffusion import DDIM_ENTRY
from ebmkit.sampling.entry import SamplerConfig, SamplerEntry
from ebmkit.sampling.jobs.chains import Hook, Record, run_chains

if TYPE_CHECKING:
    from ebmkit.sampling.jobs.job import SamplingJob

CHAINS, STEPS = 8, 150
"""Maximum numbers of chains and of steps of a trial."""

MARGIN = 2.0
"""A sample arrived if its level is at most this multiple of the 95 % quantile of real images."""

Train = tuple[Tensor, Tensor | None]  # training images (M, C, H, W) and labels (M,)


class Forecast(NamedTuple):
    """Result of `forecast`."""

    seconds: float  # approximate time of the job
    caution: str | None  # a sentence if the chains will not arrive


def estimates_level(model: ScoreModel) -> bool:
    """Whether ``model`` estimates noise levels: a blind model that was trained to denoise."""
    return not model.noise_conditional and trained_range(model) is not None


def noise_level(model: ScoreModel, x: Tensor, batch: int) -> Tensor:
    """Noise level (N,) of images on any device, image units, estimated by `estimates_level`."""
    device = device_of(model)
    with torch.no_grad():
        parts = [model.estimate_sigma(part.to(device)) for part in torch.split(x, batch)]
    return torch.cat(parts).float().cpu()


def level_reached(model: ScoreModel, x: Tensor, record: Record) -> Tensor:
    """Noise level (B,) that the chains of ``record`` reached: that of their last images ``x``, or
    of their last step, if it is higher: the stochastic ascent denoises after its last step."""
    own = noise_level(model, x, len(x))
    return own if record.level is None else torch.fmax(own, record.level)


def arrival(
    model: ScoreModel, samples: Tensor, data: Tensor | None, lowest_limit: float = 0.0
) -> dict[str, Any]:
    """Entry ``noise`` of ``sampling.json``: median levels, and how many ``samples`` arrived.

    ``samples`` (N,) and ``data`` (M,) are levels of samples and of held-out images. Without images
    the limit is half of the highest level of training. It is at least ``lowest_limit``.
    """
    limits = trained_range(model)
    assert limits is not None
    limit = limits[1] / 2 if data is None else MARGIN * float(data.quantile(0.95))
    limit = max(limit, lowest_limit)
    return {
        "meaning": "noise level by the model's own estimate, median; arrived: at most the limit",
        "level_of_samples": finite_or_none(float(samples.median())) if len(samples) else None,
        "level_of_data": None if data is None else finite_or_none(float(data.median())),
        "limit": finite_or_none(limit),
        "arrived": int((samples <= limit).sum()),
        "samples": len(samples),
    }


def describe(noise: dict[str, Any]) -> str:
    """Sentence about the entry `arrival`."""
    return (
        f"{noise['arrived']} of {noise['samples']} samples arrived at images; noise level by the "
        f"model's own estimate: samples {_shown(noise['level_of_samples'])}, held-out images "
        f"{_shown(noise['level_of_data'])}"
    )


def forecast(
    job: SamplingJob, train: Callable[[], Train], progress: Hook = lambda done, total: None
) -> Forecast | None:
    """Try whether the chains of ``job`` arrive, and how long it takes, in a short trial.

    ``train`` loads training images, to try DDIM from ``class_gaussian`` if the trial fails; it may
    raise a `UserError`. ``progress`` is called with (steps done, all steps). None if there is
    nothing to try: the model estimates no level, the chains start from images or have a single
    level, or the job is little longer than its trial.
    """
    settings, entry = job.settings, job.entry
    if (
        entry is None
        or job.first_level is None
        or settings.guidance is not None
        or settings.start not in ("noise", "mean", "uniform")
        or not estimates_level(job.model)
        or job.length * settings.count <= 4 * STEPS * CHAINS
    ):
        return None
    held_out = job.sources.held_out
    data = None if held_out is None else noise_level(job.model, held_out, settings.batch_size)
    found, steps, seconds = _trial(job, entry, job.config, job.sources.train, data, progress)
    seconds *= job.length * settings.count
    if 2 * found["arrived"] >= found["samples"]:
        return Forecast(seconds, None)
    sentence = (
        f"chains of this model do not reach images from {settings.start}: after a trial of {steps} "
        f"steps their noise level by the model's own estimate is "
        f"{_shown(found['level_of_samples'])}, and {_shown(found['limit'])} or less is expected"
    )
    offer = "train with higher noise (`ebmkit list recipes`)"
    with contextlib.suppress(UserError):  # no images, too few of a class, or a model without DDIM
        config = DDIM_ENTRY.config(start="class_gaussian")
        other, _, _ = _trial(job, DDIM_ENTRY, config, train(), data, progress)
        if 2 * other["arrived"] >= other["samples"]:
            level = _shown(other["level_of_samples"])
            offer = (
                f"take --sampler ddim --start class_gaussian, which arrived in a trial ({level})"
            )
    return Forecast(seconds, f"{sentence}: {offer}")


def _shown(level: float | None) -> str:
    return "unknown" if level is None else format_sigma(level)


def _trial(
    job: SamplingJob,
    entry: SamplerEntry[Any],
    config: SamplerConfig,
    train: Train | None,
    data: Tensor | None,
    progress: Hook,
) -> tuple[dict[str, Any], int, float]:
    """`arrival` of a few chains, the steps taken, and seconds of a step of one chain."""
    device, count = job.device, min(CHAINS, job.settings.batch_size)
    c = None if job.labels is None else job.labels[:count].to(device)
    config = config.model_copy(update={"steps": min(config.steps, STEPS)})
    sampler = entry.build(job.model, c, config)
    if train is not None:
        train = train[0].to(device), None if train[1] is None else train[1].to(device)
    mean = train[0].mean(0) if train is not None and job.settings.start == "mean" else 0.5
    generator = keyed_generator(device, job.settings.seed, "trial")
    shape = (count, *job.settings.shape)
    length, record = entry.length(sampler, config), Record(STEPS)
    chains, seconds = run_chains(
        sampler,
        lambda: entry.start(job.model, sampler, config, shape, generator, c, train, mean),
        shape,
        length,
        lambda step: generator,
        record,
        lambda step: progress(step, length),
    )
    limit = 0.0
    if (ideal := getattr(sampler, "level_after", None)) is not None:
        limit = math.sqrt(ideal(0) * ideal(chains.state.step))
    found = arrival(job.model, level_reached(job.model, chains.state.x, record), data, limit)
    return found, chains.state.step, seconds / (chains.state.step * count)
