r"""Whether chains have converged, and how much they say (Vehtari et al. 2021, arXiv 1903.08008).

All measures are of one scalar summary of the images, its log-density or a projection, as draws
(N, M) of M chains. Each chain is split in half, so that a drift shows as a difference.

With the mean W of the variances within the 2M halves, of n draws each, and the variance B/n of
their means,

.. math:: \hat R = \sqrt{\frac{\tfrac{n-1}{n} W + \tfrac1n B}{W}},

near 1 where the halves agree: below 1.01 is what the authors ask for. `split_rhat` takes the larger
of the one of the normal scores of the ranks, and the one of those of the distances from the median,
so that it notices differences of location and of scale, and no heavy tail hides them.

Chains of autocorrelations :math:`\rho_t` are worth :math:`N M / \tau` independent draws,

.. math:: \tau = 1 + 2 \sum_{t \ge 1} \rho_t ,

where the sum ends, and is smoothed, as Geyer's initial monotone sequence: sums of pairs
:math:`\rho_{2t} + \rho_{2t+1}` are positive and fall. `effective_size` is that of the ranks'
normal scores (the "bulk"), or of the draws themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.sampling.base import Info, State
from ebmkit.sampling.entry import SamplerEntry

MIN_DRAWS = 4
"""Draws of a chain without which nothing can be said of it: two in each half."""


FAR = 1.5
"""Distance of a pixel from 0.5 beyond which a sample is no image, for whatever reason."""


class Trace:
    """Records chains: pass it to `Chains.run` as ``after``.

    ``summary`` maps positions (B, ...) to numbers (B, K), or (B,); one of ``every`` steps is
    recorded, after the first ``warm_up``.

    >>> trace = Trace(random_projections((1, 8, 8), 4))          # doctest: +SKIP
    >>> chains.run(500, generator, trace)                        # doctest: +SKIP
    >>> effective_size(trace.draws()[..., 0]), trace.acceptance  # doctest: +SKIP
    """

    def __init__(
        self, summary: Callable[[Tensor], Tensor], every: int = 1, warm_up: int = 0
    ) -> None:
        if every < 1:
            raise UserError(f"every {every} steps none is recorded: take 1 or more")
        self.summary, self.every, self.warm_up = summary, every, warm_up
        self._draws: list[Tensor] = []
        self._accepted: list[Tensor] = []

    def __call__(self, state: State, info: Info) -> None:
        if info.accepted is not None:
            self._accepted.append(info.accepted.double().mean().cpu())
        if state.step > self.warm_up and state.step % self.every == 0:
            self._draws.append(self.summary(state.x).detach().double().cpu())

    def draws(self) -> Tensor:
        """What was recorded, (N, B, K) or (N, B), float64.

        Raises:
            UserError: if nothing was.
        """
        if not self._draws:
            raise UserError(f"no step was recorded: run more than {self.warm_up} steps")
        return torch.stack(self._draws)

    @property
    def acceptance(self) -> float | None:
        """Mean share of accepted proposals, None of samplers that accept all."""
        return float(torch.stack(self._accepted).mean()) if self._accepted else None


def random_projections(
    shape: tuple[int, ...], count: int, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """A summary (B, count) of images: projections on ``count`` random unit directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(math.prod(shape), count, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return lambda x: x.flatten(1) @ directions.to(x)


def split_rhat(draws: Tensor) -> float:
    """The rank-normalised split R-hat of ``draws`` (N, M); nan where none of them moved.

    Raises:
        UserError: if a chain has fewer than 4 draws, or a draw is not finite.
    """
    halves = _halves(draws)
    folded = (halves - float(np.median(halves.cpu().numpy()))).abs()
    return max(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def effective_size(draws: Tensor, ranks: bool = True) -> float:
    """How many independent draws ``draws`` (N, M) of M chains are worth; nan where none moved.

    It is that of the ``ranks``' normal scores, which heavy tails do not upset, or of the draws.

    Raises:
        UserError: if a chain has fewer than 4 draws, or a draw is not finite.
    """
    halves = _halves(draws)
    return _effective(_normal_scores(halves) if ranks else halves)


class Gap(NamedTuple):
    """Mean energy of samples minus that of data, in nats, and its standard error."""

    value: float
    standard_error: float


def energy_gap(samples: Tensor, data: Tensor) -> Gap:
    """How far the energies of samples (N,) lie above those of data (M,).

    Near 0 where the chains sample what the data are; far below 0, the samples lie nearer to the
    modes than data do, or where the model is wrong.

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
    """Each chain as two, (N // 2, 2M); the middle draw of an odd number is left out."""
    if draws.ndim != 2 or len(draws) < MIN_DRAWS:
        raise UserError(
            f"draws must be (N, chains) with N of {MIN_DRAWS} or more, not {tuple(draws.shape)}"
        )
    if not bool(draws.isfinite().all()):
        bad = torch.nonzero(~draws.isfinite().all(0)).flatten().tolist()
        raise UserError(f"draws of chains {bad[:8]} are not finite: leave these chains out")
    half = len(draws) // 2
    return torch.cat([draws[:half], draws[-half:]], dim=1).double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Quantiles of the standard normal at the draws' average ranks, (r - 3/8) / (S + 1/4)."""
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
    # Geyer: sums of neighbouring pairs, up to the first that is not positive, made to fall
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(1)
    below = torch.nonzero(pairs <= 0).flatten()
    most = max(1, (n - 3) // 2)  # the last lags rest on too few draws; Stan and ArviZ end here
    length = min(int(below[0]) if len(below) else most, most)
    tau = float(-1 + 2 * pairs[:length].cummin(0).values.sum())
    if 2 * length < n:  # the next one that is positive, as Stan and ArviZ add it
        tau += max(0.0, float(rho[2 * length]))
    return n * count / max(tau, 1 / math.log10(n * count))


# --- the entries of a report ---------------------------------------------------------------------


def chain_diagnostics(
    entry: SamplerEntry[Any] | None, draws: list[Tensor | None], finite: Tensor, every: int
) -> dict[str, Any]:
    """Effective size and split R-hat of the log-density, over the second half of the steps.

    ``entry`` is None where no step was taken; ``draws`` are log-densities (N, B) of each batch, one
    of ``every`` steps. Chains that are not ``finite`` (all chains,) are left out.
    """
    if no_law := "took no step" if entry is None else entry.no_law:
        what = "effective size and R-hat compare draws of one law, and this sampler"
        return {"meaning": f"{what} {no_law}: they have no meaning"}
    known = [d for d in draws if d is not None]
    if len(known) < len(draws):
        return {"meaning": "this model has no log-density, or no step was kept: nothing to compare"}
    recorded = torch.cat(known, dim=1)[:, finite]
    late = recorded[len(recorded) // 2 :]
    if len(late) < MIN_DRAWS or not late.shape[1]:
        return {"meaning": f"{len(late)} draws of each chain say nothing: take more steps"}
    if not bool(late.isfinite().all()):
        return {"meaning": "log-densities of chains are not finite"}
    meaning = (
        "of log p along the chains, second half; R-hat below 1.01 and an effective size of 100 a "
        "chain or so are what one asks for before trusting them"
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
    """Mean log p of ``samples`` (N,), if the model has one, and of held-out images ``data`` (M,),
    if any (``note``: why not), both at noise ``level``, and the gap of their energies."""
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


def far_from_images(x: Tensor) -> Tensor:
    """Which of the samples (N, C, H, W) have pixels beyond `FAR` from the middle, (N,) bool."""
    return (x - 0.5).abs().flatten(1).amax(1) > FAR


def finite_or_none(value: float) -> float | None:
    """``value`` as JSON can hold it."""
    return value if math.isfinite(value) else None
