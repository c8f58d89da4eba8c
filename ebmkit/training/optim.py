r"""The optimiser and its rate.

The rate of step t of T is :math:`\eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T))` (CDN appendix A),
after an optional linear warm-up. JEM's rate falls by a factor at milestones instead.

SGD takes :math:`v \leftarrow \mu v + \nabla L + \lambda\theta,\ \theta \leftarrow \theta - \eta v`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ebmkit.training.config import OptimizerConfig

__all__ = ["learning_rate", "make_optimizer", "states_of"]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step number ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule == "milestones":
        passed = sum(step >= round(share * steps) for share in config.milestones)
        return config.lr * warm * config.milestone_factor**passed
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW or SGD over all parameters; vectors and scalars decay only with ``decay_norms``.

    Both skip the update where the engine says that a gradient is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in parameters if config.decay_norms or p.ndim > 1]
    free = [p for p in parameters if not config.decay_norms and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kept, "weight_decay": config.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def states_of(config: OptimizerConfig) -> int:
    """Numbers that the optimiser keeps of each parameter, averaged weights among them."""
    own = 2 if config.kind == "adamw" else int(config.momentum > 0)
    return own + (config.ema is not None)
