"""Training objectives: what they need of data and model, their losses, and how they add up.

A new objective is a file of this folder, or one of a plugin, and a line in
`ebmkit.objectives.table`.
"""

from ebmkit.objectives.base import (
    ExtraPasses,
    ModelOutput,
    Objective,
    ObjectiveConfig,
    RunContext,
    Scale,
)
from ebmkit.objectives.loss import (
    BALANCE,
    Losses,
    Term,
    TermSettings,
    TrainingLoss,
    parse_objective,
)
from ebmkit.objectives.table import ALIASES, OBJECTIVES

__all__ = [
    "ALIASES",
    "BALANCE",
    "OBJECTIVES",
    "ExtraPasses",
    "Losses",
    "ModelOutput",
    "Objective",
    "ObjectiveConfig",
    "RunContext",
    "Scale",
    "Term",
    "TermSettings",
    "TrainingLoss",
    "parse_objective",
]
