"""Training: configuration, recipes, the loop, and the run folder it leaves behind."""

from ebmkit.training.config import (
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    parse_assignments,
    read_config,
    resolve,
)
from ebmkit.training.recipes import RECIPES
from ebmkit.training.runs import RunFolder
from ebmkit.training.stopping import Interrupted
from ebmkit.training.trainer import Reporter, Trainer

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
