r"""Convergence diagnostics of chains: split R-hat and effective sample size.

They (Vehtari et al. 2021, arXiv 1903.08008) use a scalar summary of the images, such as the
log-density or a projection: draws (N, M) of M chains. Each chain is split in half, so that a drift
shows as a difference. With the mean W of the variances within the 2M halves, of n draws each, and
the variance B/n of their means,

.. math:: \hat R = \sqrt{\frac{\tfrac{n-1}{n} W + \tfrac1n B}{W}}

is near 1 if the halves agree; the authors recommend values below 1.01. `split_rhat` is the larger
of the values for the normal scores of two rankings: of the draws, and of their distances from the
median. So it detects differences of location and of scale, and is robust to heavy tails.

Chains with autocorrelations :math:`\rho_t` are worth :math:`N M / \tau` independent draws, with

.. math:: \tau = 1 + 2 \sum_{t \ge 1} \rho_t .

The sum is truncated and smoothed as Geyer's initial monotone sequence: sums of pairs
:math:`\rho_{2t} + \rho_{2t+1}` are positive and decrease. `effective_size` uses the normal scores
of the ranks (the "bulk" size), or the draws themselves.

A blind denoiser estimates the noise level of an image as :math:`\sqrt d / \|s(y)\|`. Samples that
arrived at images have levels like those of held-out images (`arrival`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import format_sigma
from ebmkit.randomness import seeded_generator
from ebmkit.sampling.base import Info, State, trained_range
from ebmkit.sampling.entry import SamplerEntry

MIN_DRAWS = 4
"""Minimum number of draws per chain: two in each half."""


FAR = 1.5
"""Distance of a pixel from 0.5 above which a sample does not count as an image."""


MARGIN = 2.0
"""A sample arrived if its level is at most this multiple of the 95 % quantile of real images."""


class Trace:
    """Recorder of chains: pass it to `Chains.run` as ``after``.

    ``summary`` maps positions (B, ...) to numbers (B, K) or (B,). One of ``every`` steps is
    recorded, after ``warm_up``.

    >>> trace = Trace(random_projections((1, 8, 8), 4))          # doctest: +SKIP
    >>> chains.run(500, generator, trace)                        # doctest: +SKIP
    >>> effective_size(trace.draws()[..., 0]), trace.acceptance  # doctest: +SKIP
    """

    def __init__(
        self, summary: Callable[[Tensor], Tensor], every: int = 1, warm_up: int = 0
    ) -> None:
        if every < 1:
            raise UserError(f"cannot record every {every} steps: take 1 or more")
        self.summary, self.every, self.warm_up = summary, every, warm_up
        self._draws: list[Tensor] = []
        self._accepted: list[Tensor] = []

    def __call__(self, state: State, info: Info) -> None:
        if info.accepted is not None:
            self._accepted.append(info.accepted.double().mean().cpu())
        if state.step > self.warm_up and state.step % self.every == 0:
            self._draws.append(self.summary(state.x).detach().double().cpu())

    def draws(self) -> Tensor:
        """Recorded numbers, (N, B, K) or (N, B), float64.

        Raises:
            UserError: if nothing was recorded.
        """
        if not self._draws:
            raise UserError(f"no step was recorded: run more than {self.warm_up} steps")
        return torch.stack(self._draws)

    @property
    def acceptance(self) -> float | None:
        """Mean share of accepted proposals; None for samplers without acceptance."""
        return float(torch.stack(self._accepted).mean()) if self._accepted else None


def random_projections(
    shape: tuple[int, ...], count: int, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """Summary (B, count) of images: projections onto ``count`` random unit directions."""
    generator = seeded_generator(seed)
    directions = torch.randn(math.prod(shape), count, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return lambda x: x.flatten(1) @ directions.to(x)


def split_rhat(draws: Tensor) -> float:
    """Rank-normalised split R-hat of ``draws`` (N, M); nan if all draws are equal.

    Raises:
        UserError: if a chain has fewer than 4 draws, or a draw is NaN or Inf.
    """
    halves = _halves(draws)
    folded = (halves - float(np.median(halves.cpu().numpy()))).abs()
    return max(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def effective_size(draws: Tensor, ranks: bool = True) -> float:
    """Effective sample size of ``draws`` (N, M) of M chains; nan if all draws are equal.

    ``ranks``: use the normal scores of the ranks, which are robust to heavy tails.

    Raises:
        UserError: if a chain has fewer than 4 draws, or a draw is NaN or Inf.
    """
    halves = _halves(draws)
    return _effective(_normal_scores(halves) if ranks else halves)


class Importance(NamedTuple):
    """Estimate from importance weights w of N chains.

    Attributes:
        log_z: log of the mean weight, the estimate of log Z, nats.
        standard_error: of ``log_z``, by the delta method; too small if ``effective_size`` is small.
        variance: variance of log w.
        effective_size: (sum w)^2 / sum w^2 (Kong 1992), from 1 to N.
    """

    log_z: float
    standard_error: float
    variance: float
    effective_size: float


def importance(log_weights: Tensor) -> Importance:
    """Estimates from the log-weights (N,) of annealed importance sampling, N of 2 or more.

    Raises:
        UserError: if there are fewer than two, or one is NaN or Inf.
    """
    logs, count = log_weights.double(), len(log_weights)
    if count < 2 or not bool(logs.isfinite().all()):
        raise UserError(f"{count} log-weights: take 2 or more, all finite")
    size = 1 / float(logs.softmax(0).square().sum())
    log_z = float(logs.logsumexp(0)) - math.log(count)
    error = math.sqrt(max(0.0, (count / size - 1) / (count - 1)))
    return Importance(log_z, error, float(logs.var()), size)


class Gap(NamedTuple):
    """Mean energy of samples minus that of data, in nats, and its standard error."""

    value: float
    standard_error: float


def energy_gap(samples: Tensor, data: Tensor) -> Gap:
    """Mean energy of samples (N,) minus that of data (M,), from their energies.

    Near 0: samples and data may have the same distribution. Far below 0: samples are nearer to the
    modes than data, or in regions where the model is wrong.

    Raises:
        UserError: if there are fewer than two of either.
    """
    if min(len(samples), len(data)) < 2:
        raise UserError(
            f"energies of {len(samples)} samples and {len(data)} images: take 2 or more of each"
        )
    a, b = samples.double(), data.double()
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    return Gap(float(a.mean() - b.mean()), float(error))


def _halves(draws: Tensor) -> Tensor:
    """Split each chain in two, (N // 2, 2M); the middle draw of an odd number is dropped."""
    if draws.ndim != 2 or len(draws) < MIN_DRAWS:
        raise UserError(
            f"draws must be (N, chains) with N of {MIN_DRAWS} or more, not {tuple(draws.shape)}"
        )
    if not bool(draws.isfinite().all()):
        bad = torch.nonzero(~draws.isfinite().all(0)).flatten().tolist()
        raise UserError(f"draws of chains {bad[:8]} are NaN or Inf: exclude these chains")
    half = len(draws) // 2
    return torch.cat([draws[:half], draws[-half:]], dim=1).double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Quantiles of the standard normal at the average ranks of draws, (r - 3/8) / (S + 1/4)."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(draws.cpu().numpy(), axis=None)).reshape(draws.shape)
    scores: Tensor = torch.special.ndtri((ranks - 0.375) / (draws.numel() + 0.25))
    return scores


def _rhat(chains: Tensor) -> float:
    n = len(chains)
    within = chains.var(0).mean()
    return float((((n - 1) / n * within + chains.mean(0).var()) / within).sqrt())


def _effective(chains: Tensor) -> float:
    n, count = chains.shape
    within = chains.var(0).mean()
    total = (n - 1) / n * within + (chains.mean(0).var() if count > 1 else 0.0)
    centred = chains - chains.mean(0)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * n, dim=0)[:n].mean(1) / n
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    if not bool(rho.isfinite().all()):
        return math.nan
    # Geyer: sums of neighbouring pairs up to the first non-positive one, made monotone
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(1)
    below = torch.nonzero(pairs <= 0).flatten()
    most = max(1, (n - 3) // 2)  # later lags have too few draws; Stan and ArviZ stop here
    length = min(int(below[0]) if len(below) else most, most)
    tau = float(-1 + 2 * pairs[:length].cummin(0).values.sum())
    if 2 * length < n:  # add the next lag if it is positive, as Stan and ArviZ do
        tau += max(0.0, float(rho[2 * length]))
    return n * count / max(tau, 1 / math.log10(n * count))


# --- entries of sampling.json --------------------------------------------------------------------


def chain_diagnostics(
    entry: SamplerEntry[Any] | None, draws: list[Tensor | None], finite: Tensor, every: int
) -> dict[str, Any]:
    """Effective size and split R-hat of the log-density, over the second half of the steps.

    ``entry`` is None if no step was taken. ``draws`` are the log-densities (N, B) of each batch,
    one of ``every`` steps; ``finite`` (all chains,) bool marks the chains that are included.
    """
    reason = "took no step" if entry is None else entry.no_stationary_distribution
    if reason:
        what = "effective size and R-hat need draws of one distribution, but this sampler"
        return {"meaning": f"{what} {reason}: they are undefined"}
    known = [d for d in draws if d is not None]
    if len(known) < len(draws):
        return {"meaning": "this model has no log-density, or no step was recorded"}
    recorded = torch.cat(known, dim=1)[:, finite]
    late = recorded[len(recorded) // 2 :]
    if len(late) < MIN_DRAWS or not late.shape[1]:
        return {"meaning": f"{len(late)} draws of each chain are too few: take more steps"}
    if not bool(late.isfinite().all()):
        return {"meaning": "log-densities of chains are NaN or Inf"}
    meaning = (
        "computed from log p along the second half of the chains; recommended are R-hat below 1.01 "
        "and an effective size of about 100 per chain"
    )
    return {
        "meaning": f"{meaning}; {entry.caveat}" if entry and entry.caveat else meaning,
        "draws": len(late),
        "every": every,
        "chains": late.shape[1],
        "effective_size": finite_or_none(effective_size(late)),
        "split_rhat": finite_or_none(split_rhat(late)),
    }


def energy_diagnostics(
    samples: Tensor | None, finite: Tensor, data: Tensor | None, note: str, level: float | None
) -> dict[str, Any]:
    """Mean log p of samples and of held-out images at noise ``level``, and their energy gap.

    ``samples`` (N,) and ``data`` (M,) are log-densities, None if there are none; ``note`` says why
    there are no held-out images."""
    if samples is None:
        return {"note": "this model is a plain denoiser and has no log-density"}
    own = samples[finite & samples.isfinite()].double()
    found: dict[str, Any] = {"sigma": level, "samples": len(own)}
    found["log_density_of_samples"] = finite_or_none(float(own.mean()))
    if data is None:
        return found | {"note": f"no held-out images to compare with: {note}"}
    found["log_density_of_data"] = finite_or_none(float(data.double().mean()))
    found["images"] = len(data)
    if min(len(own), len(data)) >= 2:
        gap, error = map(finite_or_none, energy_gap(-own, -data))
        found |= {"gap": gap, "gap_standard_error": error}
        found["meaning"] = "mean energy of samples minus that of held-out images, nats"
    return found


MIN_EFFECTIVE = 10
"""Effective sample size of importance weights below which log Z is not reliable."""


def importance_diagnostics(
    log_weights: Tensor,
    finite: Tensor,
    labels: Tensor | None,
    names: Sequence[str],
    level: float | None,
) -> dict[str, Any]:
    """Entry ``importance``: log Z of the density at noise ``level`` for each label, or for all.

    ``log_weights`` (N,) are of all samples, ``finite`` (N,) bool marks those that are included.
    """
    found: dict[str, Any] = {
        "meaning": "log of the integral of p at this noise level, nats: 0 for a normalised density "
        "without label, log p(c) with one",
        "sigma": level,
        "estimates": {},
    }
    for c in [-1] if labels is None else sorted(set(labels.tolist())):
        own = log_weights[finite if labels is None else finite & (labels == c)]
        if len(own) >= 2:
            estimate = importance(own)._asdict() | {"samples": len(own)}
            found["estimates"]["all" if c < 0 else names[c]] = estimate
    return found


def describe_importance(entry: dict[str, Any]) -> list[str]:
    """Sentences about the entry `importance_diagnostics`, one per label."""
    return [
        f"log Z{'' if name == 'all' else f' of {name}'} at noise {format_sigma(entry['sigma'])}: "
        f"{found['log_z']:.3f} +- {found['standard_error']:.3f} nats; log-weight variance "
        f"{found['variance']:.3g}, effective size {found['effective_size']:.1f} of "
        f"{found['samples']}"
        for name, found in entry["estimates"].items()
    ]


def importance_warnings(entry: dict[str, Any]) -> list[str]:
    """Warning if importance weights are dominated by few chains."""
    sizes = [found["effective_size"] for found in entry["estimates"].values()]
    if not sizes or min(sizes) >= MIN_EFFECTIVE:
        return []
    return [
        f"importance weights of effective size {min(sizes):.1f} are dominated by few chains, so "
        "log Z and weighted averages are not reliable: take more steps or more samples"
    ]


def estimates_level(model: ScoreModel) -> bool:
    """Whether ``model`` estimates noise levels: a blind model that was trained to denoise."""
    return not model.noise_conditional and trained_range(model) is not None


def noise_level(model: ScoreModel, x: Tensor, batch: int) -> Tensor:
    """Noise level (N,) of images on any device, image units, estimated by `estimates_level`."""
    device = device_of(model)
    with torch.no_grad():
        parts = [model.estimate_sigma(part.to(device)) for part in torch.split(x, batch)]
    return torch.cat(parts).float().cpu()


def level_reached(model: ScoreModel, x: Tensor, last: Tensor | None) -> Tensor:
    """Noise level (B,) that chains reached: that of their last images ``x``, or that of their last
    step, ``last`` (B,), if it is higher: the stochastic ascent denoises after its last step."""
    own = noise_level(model, x, len(x))
    return own if last is None else torch.fmax(own, last)


def arrival(
    model: ScoreModel, samples: Tensor, data: Tensor | None, lowest_limit: float = 0.0
) -> dict[str, Any]:
    """Entry ``noise`` of ``sampling.json``: median levels, and how many ``samples`` arrived.

    ``samples`` (N,) and ``data`` (M,) are levels of samples and of held-out images. Without images
    the limit is half of the highest level of training, and with images at most that level, as the
    estimates of a model that hardly learnt to denoise are far above it. It is at least
    ``lowest_limit``.
    """
    limits = trained_range(model)
    assert limits is not None
    of_data = limits[1] / 2 if data is None else MARGIN * float(data.quantile(0.95))
    limit = min(of_data, limits[1])
    limit = max(limit, lowest_limit)
    return {
        "meaning": "noise level by the model's own estimate, median; arrived: at most the limit",
        "level_of_samples": finite_or_none(float(samples.median())) if len(samples) else None,
        "level_of_data": None if data is None else finite_or_none(float(data.median())),
        "limit": finite_or_none(limit),
        "arrived": int((samples <= limit).sum()),
        "samples": len(samples),
    }


def describe_arrival(noise: dict[str, Any]) -> str:
    """Sentence about the entry `arrival`."""
    return (
        f"{noise['arrived']} of {noise['samples']} samples arrived at images; noise level by the "
        f"model's own estimate: samples {shown_level(noise['level_of_samples'])}, held-out images "
        f"{shown_level(noise['level_of_data'])}"
    )


def shown_level(level: float | None) -> str:
    """Format a noise level; None is unknown."""
    return "unknown" if level is None else format_sigma(level)


def is_out_of_range(x: Tensor) -> Tensor:
    """Mask (N,) bool of samples (N, C, H, W) with pixels farther than `FAR` from 0.5."""
    return (x - 0.5).abs().flatten(1).amax(1) > FAR


def finite_or_none(value: float) -> float | None:
    """Replace NaN and Inf, which JSON cannot represent, by None."""
    return value if math.isfinite(value) else None
