"""Training objectives: what they need of data and model, their losses, and how they add up."""

from ebmkit.objectives.combine import BALANCE, Losses, Term, TrainingLoss, parse_objective
from ebmkit.objectives.settings import (
    AdversarialConfig,
    ClassificationConfig,
    DiffusionConfig,
    TermSettings,
    TradesConfig,
)
from ebmkit.objectives.terms import (
    ALIASES,
    OBJECTIVES,
    AttackTarget,
    BatchLike,
    ModelOutput,
    Objective,
    Scale,
)

__all__ = [
    "ALIASES",
    "BALANCE",
    "OBJECTIVES",
    "AdversarialConfig",
    "AttackTarget",
    "BatchLike",
    "ClassificationConfig",
    "DiffusionConfig",
    "Losses",
    "ModelOutput",
    "Objective",
    "Scale",
    "Term",
    "TermSettings",
    "TradesConfig",
    "TrainingLoss",
    "parse_objective",
]
