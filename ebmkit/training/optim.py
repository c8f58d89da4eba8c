r"""The optimiser, its rate, and the device it runs on.

The rate of step t of T is :math:`\eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T))` (CDN appendix A),
after an optional linear warm-up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ebmkit.errors import UserError
from ebmkit.training.config import OptimizerConfig

__all__ = ["learning_rate", "make_optimizer", "pick_device"]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step number ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; with ``decay_norms`` off, vectors and scalars are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in parameters if config.decay_norms or p.ndim > 1]
    free = [p for p in parameters if not config.decay_norms and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kept, "weight_decay": config.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is one.

    Raises:
        UserError: if it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not on this machine: use --device cpu or auto")
    return device
