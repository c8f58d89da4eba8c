"""Training: configuration, recipes, training loop and run folder."""

from ebmkit.errors import Interrupted
from ebmkit.training.config import (
    RECIPES,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    parse_assignments,
    read_config,
    resolve,
)
from ebmkit.training.loop import Reporter, Trainer
from ebmkit.training.run_folder import RunFolder

__all__ = [
    "RECIPES",
    "DataConfig",
    "Interrupted",
    "OptimizerConfig",
    "Reporter",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "parse_assignments",
    "read_config",
    "resolve",
]
