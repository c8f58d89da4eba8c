"""Training: configuration, recipes, training loop and run folder."""

from ebmkit.errors import Interrupted
from ebmkit.training.callbacks import Callback, CSVLog, TensorBoard, WeightsAndBiases
from ebmkit.training.config import (
    RECIPES,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    parse_assignments,
    read_config,
    resolve,
)
from ebmkit.training.loop import Trainer
from ebmkit.training.run_folder import RunFolder

__all__ = [
    "RECIPES",
    "CSVLog",
    "Callback",
    "DataConfig",
    "Interrupted",
    "OptimizerConfig",
    "RunFolder",
    "TensorBoard",
    "TrainConfig",
    "Trainer",
    "WeightsAndBiases",
    "parse_assignments",
    "read_config",
    "resolve",
]
