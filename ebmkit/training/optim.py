r"""The optimiser and its rate.

The rate of step t of T is :math:`\eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T))` (CDN appendix A),
after an optional linear warm-up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ebmkit.training.config import OptimizerConfig

__all__ = ["learning_rate", "make_optimizer"]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step number ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters; vectors and scalars decay only with ``decay_norms``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in parameters if config.decay_norms or p.ndim > 1]
    free = [p for p in parameters if not config.decay_norms and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kept, "weight_decay": config.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
