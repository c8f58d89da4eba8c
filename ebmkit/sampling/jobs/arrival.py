"""Trial before sampling: whether the chains of a job will arrive at images, and how long they take.

Chains can fail to arrive although a sampler follows its schedule to the end: a network trained on
little noise has not seen gray images with noise, from which they start, and its score does not lead
from there to images. A trial shows this before sampling: a few chains of the same sampler from the
same starting points, in at most `STEPS` steps. A schedule is shortened to that length. The
stochastic ascent has none; its level must fall by half as much, in logarithms, as with an ideal
denoiser (`ebmkit.sampling.diagnostics.arrival` has the levels).

The time is that of some steps of the job's first batch, after a first one, which is slower.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.diagnostics import (
    arrival,
    estimates_level,
    level_reached,
    noise_level,
    shown_level,
)
from ebmkit.sampling.diffusion import DDIM_ENTRY
from ebmkit.sampling.entry import SamplerConfig, SamplerEntry, gaussians_of
from ebmkit.sampling.jobs.chains import Hook, Record, run_chains
from ebmkit.sampling.jobs.job import SamplingJob

CHAINS, STEPS = 8, 150
"""Maximum numbers of chains and of steps of a trial."""

TIMED_STEPS = 4
"""Number of steps of a batch to time; the first does not count."""

Train = tuple[Tensor, Tensor | None]  # training images (M, C, H, W) and labels (M,)


class Forecast(NamedTuple):
    """Result of `forecast`."""

    steps: int  # expected number of steps of a chain, at most those of the job
    seconds: float  # approximate time of the job
    caution: str | None  # a sentence if the chains will not arrive


def forecast(
    job: SamplingJob, train: Callable[[], Train], progress: Hook = lambda done, total: None
) -> Forecast | None:
    """Try whether the chains of ``job`` arrive, and how long it takes, in a short trial.

    ``train`` loads training images, to try DDIM from ``class_gaussian`` if the trial fails and the
    model stores no Gaussians; it may raise a `UserError`. ``progress`` is called with (steps done,
    all steps). There is only a time if the model estimates no level, the chains start from images
    or have a single level, or the job is little longer than a trial; None if it has few steps.
    """
    settings, entry = job.settings, job.entry
    if entry is None or job.total <= 10 * TIMED_STEPS:
        return None
    seconds = job.seconds_per_step(TIMED_STEPS) * settings.count
    if (
        job.first_level is None
        or job.length * settings.count <= 4 * STEPS * CHAINS
        or settings.start not in ("noise", "mean", "uniform")
        or not estimates_level(job.model)
    ):
        return Forecast(job.length, seconds * job.length, None)
    held_out = job.sources.held_out
    data = None if held_out is None else noise_level(job.model, held_out, settings.batch_size)
    found, steps, expected = _trial(job, entry, job.config, job.sources.train, data, progress)
    if 2 * found["arrived"] >= found["samples"]:
        return Forecast(expected, seconds * expected, None)
    level, limit = (shown_level(found[name]) for name in ("level_of_samples", "limit"))
    sentence = (
        f"chains of this model do not reach images from {settings.start}: after a trial of {steps} "
        f"steps their noise level by the model's own estimate is {level}, and {limit} or less is "
        "expected"
    )
    offer = "train with higher noise (`ebmkit list recipes`)"
    with contextlib.suppress(UserError):  # no images, too few of a class, or a model without DDIM
        config = DDIM_ENTRY.config(start="class_gaussian")
        stored = gaussians_of(job.model, settings.shape) is not None
        images = None if stored else train()
        other, _, _ = _trial(job, DDIM_ENTRY, config, images, data, progress)
        if 2 * other["arrived"] >= other["samples"]:
            level = shown_level(other["level_of_samples"])
            offer = (
                f"take --sampler ddim --start class_gaussian, which arrived in a trial ({level})"
            )
    return Forecast(expected, seconds * expected, f"{sentence}: {offer}")


def _trial(
    job: SamplingJob,
    entry: SamplerEntry[Any],
    config: SamplerConfig,
    train: Train | None,
    data: Tensor | None,
    progress: Hook,
) -> tuple[dict[str, Any], int, int]:
    """`arrival` of a few chains, the steps taken, and those to expect of the job.

    Chains that end by themselves take as many in the job; if they arrive so far, those that go on
    take as many as with an ideal denoiser.
    """
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
    chains, _ = run_chains(
        sampler,
        lambda: entry.start(job.model, sampler, config, shape, generator, c, train, mean),
        shape,
        length,
        lambda step: generator,
        record,
        lambda step: progress(step, length),
    )
    taken, limit, expected = chains.state.step, 0.0, job.length
    if taken < length:
        expected = taken
    if (ideal := getattr(sampler, "level_after", None)) is not None:
        limit = math.sqrt(ideal(0) * ideal(taken))
    found = arrival(job.model, level_reached(job.model, chains.state.x, record.level), data, limit)
    if ideal is not None and taken == length and 2 * found["arrived"] >= found["samples"]:
        last = ideal(job.length)
        expected = bisect_left(range(job.length), -last, key=lambda step: -ideal(step))
    return found, taken, expected
