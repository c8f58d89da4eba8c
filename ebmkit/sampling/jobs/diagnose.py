"""What can be said of chains that have run, and what cannot."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ebmkit.sampling.diagnostics import LEAST, effective_size, energy_gap, split_rhat

__all__ = ["CHAINS_AT_ONE_LEVEL", "chain_diagnostics", "energy_diagnostics", "lost_chains"]

CHAINS_AT_ONE_LEVEL = ("langevin", "mala", "hmc", "sgld")
"""Samplers that stay with one law, so that their draws can be compared with each other."""

_WHY = (
    "effective size and R-hat compare draws of one law, and this sampler {}: they have no meaning"
)


def chain_diagnostics(
    sampler: str, draws: list[Tensor | None], finite: Tensor, every: int
) -> dict[str, Any]:
    """Effective size and split R-hat of the log-density, over the second half of the steps.

    Args:
        sampler: its name.
        draws: of each batch, (N, B) log-densities, or None.
        finite: (all chains,) bool; others are left out.
        every: of how many steps one was kept.
    """
    if sampler not in CHAINS_AT_ONE_LEVEL:
        ways = {"buffer": "took no step", "ascent": "climbs"}
        return {"meaning": _WHY.format(ways.get(sampler, "goes down noise levels"))}
    if any(d is None for d in draws):
        return {"meaning": "this model has no log-density, or no step was kept: nothing to compare"}
    kept = torch.cat([d for d in draws if d is not None], dim=1)[:, finite]
    late = kept[len(kept) // 2 :]
    if len(late) < LEAST or not late.shape[1]:
        return {"meaning": f"{len(late)} draws of each chain say nothing: take more steps"}
    if not bool(late.isfinite().all()):
        return {"meaning": "log-densities of chains are not finite"}
    meaning = (
        "of log p along the chains, second half; R-hat below 1.01 and an effective size of 100 a "
        "chain or so are what one asks for before trusting them"
    )
    if sampler == "sgld":
        meaning += "; its noise does not belong to its step, so its law is not the model's"
    return {
        "meaning": meaning,
        "draws": len(late),
        "every": every,
        "chains": late.shape[1],
        "effective_size": _number(effective_size(late)),
        "split_rhat": _number(split_rhat(late)),
    }


def energy_diagnostics(
    samples: Tensor | None, finite: Tensor, data: Tensor | None, note: str, level: float | None
) -> dict[str, Any]:
    """Mean log p of samples and of held-out images, and the gap of their energies.

    Args:
        samples: (N,) log-densities of samples; None: the model has none.
        finite: (N,) which count.
        data: (M,) of held-out images, if any.
        note: why not.
        level: noise level at which both are taken.
    """
    if samples is None:
        return {"note": "this model is a plain denoiser and has no log-density"}
    own = samples[finite & samples.isfinite()].double()
    found: dict[str, Any] = {
        "sigma": level,
        "log_density_of_samples": _number(float(own.mean())) if len(own) else None,
        "samples": len(own),
    }
    if data is None:
        return found | {"note": f"no held-out images to compare with: {note}"}
    found["log_density_of_data"] = _number(float(data.double().mean()))
    found["images"] = len(data)
    if min(len(own), len(data)) >= 2:
        gap = energy_gap(-own, -data)
        found["gap"] = _number(gap.value)
        found["gap_standard_error"] = _number(gap.standard_error)
        found["meaning"] = "mean energy of samples minus that of held-out images, nats"
    return found


def lost_chains(died: Tensor) -> list[dict[str, int]]:
    """Which chains left the finite numbers and at which step, of (N,) steps or -1."""
    rows = torch.nonzero(died >= 0).flatten().tolist()
    return [{"chain": row, "step": int(died[row])} for row in rows]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
