"""Images from trained models: samples, and restored pictures, with all that belongs beside them."""

from ebmkit.generation.baselines import baselines_of
from ebmkit.generation.diagnose import CHAINS_AT_ONE_LEVEL
from ebmkit.generation.guiding import (
    GuidedRun,
    default_folder,
    guidance_asked,
    guide_by,
    mean_energies,
)
from ebmkit.generation.job import Interrupted, SamplingJob
from ebmkit.generation.keeping import SamplingFolder
from ebmkit.generation.labels import parse_label, parse_labels
from ebmkit.generation.restore import Restored, restore
from ebmkit.generation.results import write_results
from ebmkit.generation.settings import SamplingSettings, default_sampler, make_settings
from ebmkit.generation.sources import Sources, at_hand, buffer_of, sources_for
from ebmkit.generation.tasks import TASKS, Degraded, Task, TaskOptions, find_task

__all__ = [
    "CHAINS_AT_ONE_LEVEL",
    "TASKS",
    "Degraded",
    "GuidedRun",
    "Interrupted",
    "Restored",
    "SamplingFolder",
    "SamplingJob",
    "SamplingSettings",
    "Sources",
    "Task",
    "TaskOptions",
    "at_hand",
    "baselines_of",
    "buffer_of",
    "default_folder",
    "default_sampler",
    "find_task",
    "guidance_asked",
    "guide_by",
    "make_settings",
    "mean_energies",
    "parse_label",
    "parse_labels",
    "restore",
    "sources_for",
    "write_results",
]
