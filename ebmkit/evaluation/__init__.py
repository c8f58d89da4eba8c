"""Evaluation suites: metrics with confidence intervals, as JSON files, tables and plots."""

from ebmkit.evaluation.runner import (
    SUITES,
    Result,
    evaluate,
    evaluation_folder,
    parse_options,
    parse_suites,
    read_image_values,
    tables,
)
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.suite import NOISE_LEVELS, SIGMAS, EvaluationContext, Images, Suite

__all__ = [
    "NOISE_LEVELS",
    "SIGMAS",
    "SUITES",
    "Estimate",
    "EvaluationContext",
    "Images",
    "Result",
    "Suite",
    "evaluate",
    "evaluation_folder",
    "parse_options",
    "parse_suites",
    "read_image_values",
    "tables",
]
