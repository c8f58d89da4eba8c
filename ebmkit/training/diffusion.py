"""What objective ``ddpm`` asks of the rest of a configuration: one schedule for all of its parts.

The schedule is said once, as ``objective.ddpm.schedule``. The noise law of the objective's stream
draws the levels of that schedule, and a UNet is told the timesteps of it; whether the UNet knows
labels follows from ``objective.ddpm.class_dropout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebmkit.errors import UserError
from ebmkit.objectives import parse_objective
from ebmkit.objectives.diffusion import DiffusionConfig

__all__ = ["diffusion_settings"]


def diffusion_settings(raw: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from objective ``ddpm``, to lay over a configuration; nothing without it.

    Args:
        raw: the whole configuration, before it is validated.
        given: what was said beside the recipe.

    Raises:
        UserError: if something else was said.
    """
    objective = raw.get("objective")
    named = parse_objective(objective) if isinstance(objective, str) else ()
    if "ddpm" not in {term.name for term in named}:
        return {}
    defaults = DiffusionConfig()
    own = _at(raw, "terms", "ddpm")
    schedule = own.get("schedule", defaults.schedule)
    conditional = own.get("class_dropout", defaults.class_dropout) is not None
    draws = raw.get("draw_from")
    stream = draws.get("ddpm", "denoise") if isinstance(draws, Mapping) else "denoise"
    law = {"kind": "diffusion", "schedule": schedule}
    for field, value in _at(given, "streams", stream, "noise").items():
        if field in law and value != law[field]:
            raise UserError(
                f"objective 'ddpm' trains at the noise levels of its schedule, {schedule}, and "
                f"streams.{stream}.noise.{field} is {value!r}: leave that out and choose by "
                "objective.ddpm.schedule, or take --objective dsm-mean, which has any noise"
            )
    found: dict[str, Any] = {"streams": {stream: {"noise": law}}}
    if _at(raw, "model", "backbone").get("kind") == "unet":
        network = {"schedule": schedule, "class_conditional": conditional}
        if conditional:
            network["null_label"] = True
        says = {
            "schedule": f"objective.ddpm.schedule={schedule}",
            "class_conditional": "objective.ddpm.class_dropout",
            "null_label": "objective.ddpm.class_dropout",
            "timesteps": "the noise law, which has 1000",
            "image_range": "the noise law, which is of images in [-1, 1]",
            "betas": "the noise law",
        }
        fixed = network | {"timesteps": 1000, "image_range": [-1, 1], "betas": [1e-4, 0.02]}
        for field, value in _at(given, "model", "backbone").items():
            if field in fixed and _plain(value) != _plain(fixed[field]):
                raise UserError(
                    f"model.backbone.{field} = {value!r} contradicts {says[field]}: leave it out"
                )
        found["model"] = {"backbone": network}
    return found


def _at(values: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path``; empty where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, list | tuple) else value
