r"""The optimiser and its rate.

The rate of step t of T is :math:`\eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T))` (CDN appendix A),
after an optional linear warm-up. JEM's rate falls by a factor at milestones instead. Schedule
``linear`` is :math:`\eta_t = \eta\,(1 - t/T)`; ``warmup-stable-decay``, which decays over the
last share s of the steps, is :math:`\eta_t = \eta \min(1, (T - t) / sT)`.

SGD takes :math:`v \leftarrow \mu v + \nabla L + \lambda\theta,\ \theta \leftarrow \theta - \eta v`.
For Muon see `ebmkit.training.muon`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ebmkit.errors import UserError, shown
from ebmkit.training.config import OptimizerConfig
from ebmkit.training.muon import STEPS, Muon, as_matrix, by_products

__all__ = ["learning_rate", "make_optimizer", "optimizer_flops", "set_rate", "states_of"]

MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
"""Layers whose weights Muon moves; ConvTranspose1d and 3d are left to AdamW."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step number ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule == "milestones":
        passed = sum(step >= round(share * steps) for share in config.milestones)
        return config.lr * warm * config.milestone_factor**passed
    if config.schedule == "linear":
        return config.lr * warm * (1 - step / steps)
    if config.schedule == "warmup-stable-decay":
        assert config.decay_share is not None
        return config.lr * warm * min(1.0, (steps - step) / (config.decay_share * steps))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW or SGD over all parameters, or Muon for matrices and AdamW for the rest.

    Matrices are the weights of convolutions and linear layers, but for the module that the model
    calls ``head``; ``adamw_for`` leaves more of them to AdamW, as a head of another name. Vectors
    and scalars decay only with ``decay_norms``. All skip the update where the engine says that a
    gradient is not finite.

    Raises:
        UserError: if Muon finds no matrices, or ``adamw_for`` names none of them.
    """
    matrices = _matrices(model, config) if config.kind == "muon" else []
    own = {id(p) for p in matrices}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    kept = [p for p in parameters if config.decay_norms or p.ndim > 1]
    free = [p for p in parameters if not config.decay_norms and p.ndim <= 1]
    groups: list[dict[str, Any]] = []
    if kept:
        groups.append({"params": kept, "weight_decay": config.weight_decay})
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    assert config.adamw_lr is not None
    for group in groups:
        group["rate_scale"] = config.adamw_lr / config.lr
    return Muon(
        matrices,
        groups,
        config.lr,
        config.momentum,
        bool(config.nesterov),
        config.weight_decay,
        config.betas,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; that of Muon's AdamW in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def optimizer_flops(model: nn.Module, config: OptimizerConfig) -> int:
    """FLOPs of the matrix products of an update: Muon orthogonalises each matrix once."""
    total = 0
    for matrix in _matrices(model, config) if config.kind == "muon" else ():
        small, large = sorted(as_matrix(matrix))
        if by_products(matrix, small, large):
            total += 4 * small**2 * large + (8 * STEPS - 6) * small**3
        else:
            total += STEPS * (4 * small**2 * large + 2 * small**3)
    return total


def states_of(model: nn.Module, config: OptimizerConfig) -> Fraction:
    """Numbers that the optimiser keeps of a parameter on average, averaged weights among them."""
    own = 2 if config.kind == "adamw" else int(config.momentum > 0)
    kept = Fraction(own + (config.ema is not None))
    if config.kind != "muon":
        return kept
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = count - sum(p.numel() for p in _matrices(model, config))
    return kept + Fraction(rest, count)


def _matrices(model: nn.Module, config: OptimizerConfig) -> list[nn.Parameter]:
    """What Muon moves: weights of convolutions and linear layers, but for the module ``head``.

    Raises:
        UserError: if there are none, or ``adamw_for`` names none of them.
    """
    part = getattr(model, "head", None)
    seen = {id(p) for p in part.parameters()} if isinstance(part, nn.Module) else set()
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, MATRIX_LAYERS):
            weight = module.weight  # a tensor that is no parameter where it is computed
            if isinstance(weight, nn.Parameter) and weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))  # layers may share it
                found[f"{name}.weight"] = weight
    for part in config.adamw_for:
        if not any(part in name for name in found):
            raise UserError(
                f"optimizer.adamw_for names {shown(part)}, which is part of no matrix's name: "
                f"they are {', '.join(found) or 'none'}"
            )
    chosen = [p for name, p in found.items() if not any(n in name for n in config.adamw_for)]
    if not chosen:
        raise UserError(
            "optimizer.kind=muon moves weight matrices of convolutions and linear layers, and "
            "none is left beside the head: use optimizer.kind=adamw"
        )
    return chosen
