"""Measuring speed and memory: the library against what everyone writes (``ebmkit bench``)."""

from ebmkit.bench.baselines import (
    INFERENCES,
    SIGMA,
    make_batch,
    our_inference,
    our_step,
    plain_inference,
    plain_loss,
    plain_step,
    timed_terms,
)
from ebmkit.bench.curves import SCALING, scaling, scaling_plot, scaling_settings
from ebmkit.bench.measurements import (
    NUM_CLASSES,
    OURS,
    PLAIN,
    Comparison,
    Row,
    Setting,
    document,
    inference,
    measure,
    network,
    training,
)
from ebmkit.bench.timing import Ratio, held, interleave, ratio_to

__all__ = [
    "INFERENCES",
    "NUM_CLASSES",
    "OURS",
    "PLAIN",
    "SCALING",
    "SIGMA",
    "Comparison",
    "Ratio",
    "Row",
    "Setting",
    "document",
    "held",
    "inference",
    "interleave",
    "make_batch",
    "measure",
    "network",
    "our_inference",
    "our_step",
    "plain_inference",
    "plain_loss",
    "plain_step",
    "ratio_to",
    "scaling",
    "scaling_plot",
    "scaling_settings",
    "timed_terms",
    "training",
]
