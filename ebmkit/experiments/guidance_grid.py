"""What the experiment ``guidance`` is made of: networks, guidance methods, and how much of each.

The networks are of four groups, all trained on one data set: a *diffusion model* with label dropout
of a tenth, so that its unconditional and its conditional prediction are one network's; the
*guides*, classifiers and joint models, plain, robust (l2 0.25, 0.5, 1.0 as in RCG section 4.2) or
trained on noise; the two *rivals* that the thesis argues against, a time-dependent classifier and a
robust one of Kawar et al. 2023; and the *evaluation classifier* (``judge``), of another
architecture, which guides nothing.

The methods are the thesis's, with its schedules and eta where it gives them, and one common setting
(``common``) in which guides, and their input, are compared with each other. Scales are the thesis's
times the `Amount.strength` of a scale of reproduction, for what moves an image of another size, and
classifiers trained for minutes, is another number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ebmkit.experiments.runs import Variant
from ebmkit.experiments.scales import read_data

_DATA = read_data("guidance.yaml")
_NETWORKS = {
    name: Variant(name, family="guidance", **fields) for name, fields in _DATA["networks"].items()
}
NETWORKS = tuple(_NETWORKS.values())
"""All networks, in the order in which they are trained."""
DIFFUSION, EVALUATION_CLASSIFIER, PLAIN = (
    _NETWORKS[name] for name in ("diffusion", "judge", "plain")
)
ROBUST = tuple(_NETWORKS[f"robust-{eps}"] for eps in ("0.25", "0.5", "1"))
ON_GRID = (PLAIN, *ROBUST, _NETWORKS["robust-dsm"])
"""Networks of the robustness grid."""
ON_PATH = (*ON_GRID, *(_NETWORKS[name] for name in ("joint", "of-time", "kawar")))
"""Networks of the curves along the diffusion."""


@dataclass(frozen=True)
class GuidanceMethod:
    """One way to draw images of a label.

    Attributes:
        name: short, unique; of its files, too.
        description: in words.
        guide: name of the network that guides; None: none does.
        settings: fields of `ebmkit.guidance.GuidanceConfig`; empty: unguided.
        eta: of DDIM.
        base: name of the network that is guided.
        group: of the report.
        fixed: whether the scale is not multiplied with `Amount.strength`.
    """

    name: str
    description: str
    guide: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.8
    base: str = "diffusion"
    group: str = "thesis"
    fixed: bool = False

    def times(self, strength: float) -> GuidanceMethod:
        """The same with its scale multiplied, unless it is fixed."""
        if self.fixed or not self.settings:
            return self
        return replace(self, settings={**self.settings, "scale": strength * self.settings["scale"]})


METHODS = tuple(GuidanceMethod(**fields) for fields in _DATA["methods"])
GROUPS: dict[str, str] = _DATA["groups"]
"""Titles in the report, of groups of methods."""
TABLE_2_1: dict[float, dict[int, float]] = _DATA["table_2_1"]
"""FID of DDIM on CIFAR-10 by eta and steps (RCG table 2.1, of Song et al. 2021)."""


@dataclass(frozen=True)
class Amount:
    """How much is trained, drawn and measured at a scale.

    Attributes:
        per_class: images of each class that a method draws.
        steps: of DDIM.
        strength: what scales of guidance are multiplied with.
        real: test images that measures compare with, at the most.
        etas: of the table of DDIM.
        lengths: its numbers of steps.
        path: settings of the suite ``diffusion-path``.
        grid: settings of the suite ``robustness-grid``.
        path_images: test images of the first.
        networks: names of those trained; empty: all.
        methods: names of those drawn; empty: all.
    """

    per_class: int
    steps: int
    strength: float
    real: int
    etas: Sequence[float]
    lengths: Sequence[int]
    path: Mapping[str, Any]
    grid: Mapping[str, Any]
    path_images: int | None = None
    networks: Sequence[str] = ()
    methods: Sequence[str] = ()


AMOUNTS = {name: Amount(**fields) for name, fields in _DATA["amounts"].items()}
"""By the name of a scale."""
