"""Training objectives: their requirements, their losses, and the sum of several objectives.

A new objective needs a module in this package, or in a plugin, and an entry in
`ebmkit.objectives.loss`.
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
    ALIASES,
    BALANCE,
    OBJECTIVES,
    Losses,
    Term,
    TermSettings,
    TrainingLoss,
    parse_objective,
)

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
