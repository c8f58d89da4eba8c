"""Images from trained models: samples, and restored pictures, with all that belongs beside them."""

from ebmkit.sampling.jobs.baselines import baselines_of
from ebmkit.sampling.jobs.diagnose import CHAINS_AT_ONE_LEVEL
from ebmkit.sampling.jobs.guiding import (
    GuidedRun,
    default_folder,
    guidance_asked,
    guide_by,
    mean_energies,
)
from ebmkit.sampling.jobs.job import Interrupted, SamplingJob
from ebmkit.sampling.jobs.keeping import SamplingFolder
from ebmkit.sampling.jobs.labels import parse_label, parse_labels
from ebmkit.sampling.jobs.restore import Restored, restore
from ebmkit.sampling.jobs.results import write_results
from ebmkit.sampling.jobs.settings import SamplingSettings, default_sampler, make_settings
from ebmkit.sampling.jobs.sources import Sources, at_hand, buffer_of, sources_for
from ebmkit.sampling.jobs.tasks import TASKS, Degraded, Task, TaskOptions, find_task

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
