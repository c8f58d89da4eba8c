"""Evaluation: suites of measures with confidence intervals, as JSON, tables and pictures."""

from ebmkit.evaluation.context import NOISE_LEVELS, SIGMAS, EvaluationContext, Suite
from ebmkit.evaluation.data import Images
from ebmkit.evaluation.folders import evaluation_folder
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.suites import (
    SUITES,
    Result,
    evaluate,
    parse_options,
    parse_suites,
    tables,
)

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
    "tables",
]
