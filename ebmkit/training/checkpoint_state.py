"""What the state in a checkpoint is made of, and whether a state that was read is that.

==============  ==================================================================
``step``        steps done
``seconds``     spent so far
``best``        least validation loss so far
``model``       parameters and buffers, by name
``optimizer``   as `torch.optim.Optimizer.state_dict`
``average``     the averaged weights, by name; none where averaging is off
``running``     running means of the balanced terms
``unreadable``  images left out: number in the set -> why
``precision``   that it was trained in, for tables
``watch``       breaches so far and states to go back to, for objectives that need negatives
==============  ==================================================================

A checkpoint may come from a stranger, and that its archive is sound says nothing of what is in it.
The optimiser's fused kernels take the lengths of its tensors at their word: moments of another
shape would have them read and write memory that is not theirs. So every entry is checked for its
type, every tensor for its shape before anything is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt
from torch import Tensor, nn

from ebmkit.errors import UserError, shown, validated
from ebmkit.training.divergence import MOST_STEPS, Divergence
from ebmkit.training.upgrade import upgraded

if TYPE_CHECKING:
    from ebmkit.training.trainer import Trainer

__all__ = [
    "SavedOptimizer",
    "SavedState",
    "SavedWatch",
    "check_tensor",
    "parts_of",
    "restore_module",
    "restore_optimizer",
    "restore_parts",
]

NonNegative = Annotated[FiniteFloat, Field(ge=0)]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class SavedOptimizer(_Schema):
    """An optimiser's state; what its groups are set to is the configuration's, not the file's."""

    state: dict[NonNegativeInt, dict[str, Tensor]]
    """Number of the parameter -> what the optimiser keeps of it."""


class SavedState(_Schema):
    """The part of a checkpoint that is the same for all objectives."""

    step: NonNegativeInt
    seconds: NonNegative
    best: Annotated[float, Field(ge=-torch.inf)]
    model: dict[str, Tensor]
    optimizer: SavedOptimizer
    average: dict[str, Tensor] | None
    running: Tensor
    unreadable: dict[NonNegativeInt, str] = {}


class SavedRemedies(_Schema):
    """What breaches have changed, as `ebmkit.training.divergence.Mitigations`."""

    rate: Annotated[FiniteFloat, Field(gt=0, le=1)]
    steps: Annotated[FiniteFloat, Field(ge=1, le=MOST_STEPS)]
    penalty: NonNegative


class SavedKept(NamedTuple):
    """A state to go back to.

    Attributes:
        step: after which it was kept.
        state: what `SavedState` is read from, then.
        chains: (M, C, H, W).
        best: bytes of the best weights by then.
    """

    step: NonNegativeInt
    state: dict[str, Any]
    chains: Tensor
    best: Tensor | None


class SavedWatch(_Schema):
    """What a checkpoint keeps of watch and chains, but for the chains, which have their file."""

    remedies: SavedRemedies
    history: list[Divergence]
    gap: float
    gradient: float
    attempt: NonNegativeInt
    kept: list[SavedKept] = []
    """Oldest first."""


def parts_of(trainer: Trainer) -> dict[str, Any]:
    """The part of a trainer's state that `restore_parts` takes."""
    return {
        "step": trainer.step,
        "seconds": trainer.seconds,
        "best": trainer.best.loss,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "average": trainer.average.state_dict() if trainer.average else None,
        "running": trainer.loss.running,
        "precision": trainer.update.precision,
        **trainer.left_out.state(),
    }


def restore_parts(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take a trainer back to a state of network, optimiser, averaged weights and running means.

    Raises:
        UserError: if it is of another run.
    """
    try:
        state = upgraded(state, trainer.loss.balanced)
    except (TypeError, ValueError, RuntimeError):
        raise UserError("the checkpoint is of no version of this program") from None
    saved = validated(SavedState, state, "the checkpoint")
    check_tensor("'running'", saved.running, trainer.loss.running)
    restore_module("model", trainer.model, saved.model)
    restore_optimizer(trainer.optimizer, saved.optimizer)
    if trainer.average is not None:
        restore_module("average", trainer.average, saved.average or {})
    trainer.loss.running.copy_(saved.running)
    trainer.best.loss, trainer.seconds_before = saved.best, saved.seconds
    trainer.left_out.restore(saved.unreadable)
    trainer.step = trainer.first_step = trainer.card.steps = saved.step
    trainer.update.reset()


def restore_module(what: str, module: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Take over the parameters and buffers of the same module.

    Raises:
        UserError: naming the first that is missing, is of another shape or type, or has no place.
    """
    own = module.state_dict()
    for name in [*own, *found]:
        if name not in found:
            raise _misfit(f"{what} {name!r} is missing")
        if name not in own:
            raise _misfit(f"{what} {shown(name)} is of another model")
        check_tensor(f"{what} {name!r}", found[name], own[name])
    module.load_state_dict(dict(found))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: SavedOptimizer) -> None:
    """Take over what an optimiser of the same kind kept of each parameter.

    Rates, decays and the like stay as they are: the configuration has them.

    Raises:
        UserError: if it is of another optimiser or of other parameters.
    """
    adam, momentum = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    groups = optimizer.param_groups
    names = [adam if "betas" in group else momentum for group in groups for _ in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, found in saved.state.items():
        if number >= len(parameters) or found.keys() != names[number]:
            raise _misfit(f"optimizer, parameter {number}, is of another optimiser or model")
        state[number] = {}
        for name, value in found.items():
            own = torch.zeros(()) if name == "step" else parameters[number]
            check_tensor(f"optimizer, parameter {number}, {name!r}", value, own)
            # the kernels want it dense, in the order of the parameter
            state[number][name] = torch.empty_like(own).copy_(value)
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})


def check_tensor(what: str, found: Tensor, own: Tensor) -> None:
    """Whether ``found`` may take the place of ``own``.

    Raises:
        UserError: if it is of another shape or type.
    """
    if found.layout != torch.strided or found.shape != own.shape or found.dtype != own.dtype:
        raise _misfit(f"{what} is {_told(found)}, and should be {_told(own)}")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _misfit(told: str) -> UserError:
    return UserError(f"the checkpoint does not fit this run: {told}")
