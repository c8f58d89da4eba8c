r"""Timing candidates against each other, and what they hold in memory.

Two programs timed one after the other are compared on two different machines: clocks drift, caches
warm, neighbours come and go. Here every candidate runs once in every round, the order turns round
from one round to the next, and with :math:`t_{k,r}` the time of candidate k in round r the ratio to
the candidate 0 is a median over rounds of ratios *within* a round,

.. math:: \rho_k = \operatorname{median}_r \frac{t_{0,r}}{t_{k,r}},

above 1 where k is faster. The quartiles of the same ratios say how noisy it is.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

__all__ = ["Build", "Ratio", "Step", "held", "interleave", "ratio_to"]

Step = Callable[[], object]
"""What is timed: one training step, or one pass over a batch."""

Build = Callable[[], Step]
"""Makes a step, and everything it holds: network, optimiser, buffers."""

MOST_CALLS = 50


class Ratio(NamedTuple):
    """How many times as fast: the median over rounds, and its lower and upper quartile."""

    median: float
    low: float
    high: float


def interleave(
    candidates: Mapping[str, Step],
    rounds: int,
    warmup: int = 2,
    shortest: float = 0.0,
    synchronize: Step = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of each candidate in each round, (rounds,) per candidate.

    Args:
        candidates: name -> what to call.
        rounds: how often each is timed. Even rounds go through them in order, odd ones backwards.
        warmup: untimed calls of each before the first round, at least 1.
        shortest: if the last warm-up call of the fastest candidate took less than so many seconds,
            each timing is the mean over as many calls as make it so long, the same for all.
        synchronize: waits for the device; called before each look at the clock.
        clock: seconds, rising.
    """

    def timed(step: Step, calls: int) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            step()
        synchronize()
        return (clock() - start) / calls

    for step in candidates.values():
        for _ in range(warmup - 1):
            step()
    fastest = min(timed(step, 1) for step in candidates.values())
    calls = min(MOST_CALLS, max(1, math.ceil(shortest / max(fastest, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    try:
        for number in range(rounds):
            gc.collect()
            gc.disable()  # a collection would be charged to whoever happens to run
            order = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
            for name in order:
                seconds[name].append(timed(candidates[name], calls))
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratio_to(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """How many times as fast as ``base`` a candidate is, from seconds of the same rounds."""
    ratios = [b / o for b, o in zip(base, own, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def held(build: Build, device: torch.device, calls: int = 3) -> tuple[Step, int]:
    """Build a step, call it, and count what it holds at most.

    Args:
        build: makes the step.
        device: where its tensors are.
        calls: untimed calls; the first ones compile and record.

    Returns:
        The step, and the peak in bytes of all tensors that came to be on ``device`` since before
        it was built: parameters, gradients, optimiser state, activations, work space of kernels
        as far as PyTorch's allocator hands it out. The same count for every candidate.
    """
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = build()
        for _ in range(calls):
            step()
        torch.cuda.synchronize(device)
        return step, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else writes to stderr
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        step = build()
        for _ in range(calls):
            step()
    return step, _peak(profile)


def _peak(profile: torch.autograd.profiler.profile) -> int:
    """The most bytes that were allocated at once, from the allocator's own events."""
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]  # missing in the stubs
        most = max(most, now)
    return most
