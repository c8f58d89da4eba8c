"""What is measured: training step and inference, by objective, backbone and size.

A measurement is a `Comparison` of candidates that do the same work, timed in one interleaved run
(`ebmkit.bench.timing`), and becomes one `Row` per candidate. Rows are called by what is done and
by whom, as in ``train dsm gradresnet18 w16 32x32 b64: ebmkit``. The batch is that of the denoising
stream; a joint objective classifies twice as many images, as the paper's 128 + 64.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from ebmkit.bench.baselines import (
    make_batch,
    our_inference,
    our_step,
    plain_inference,
    plain_step,
    timed_terms,
)
from ebmkit.bench.timing import Build, Ratio, held, interleave, ratio_to
from ebmkit.compute import ComputeConfig, pick_compile, pick_precision
from ebmkit.errors import UserError
from ebmkit.models import JointModel, create_model
from ebmkit.training.run_folder import environment
from ebmkit.training.step import OutOfMemory

__all__ = [
    "NUM_CLASSES",
    "OURS",
    "PLAIN",
    "Comparison",
    "Row",
    "Setting",
    "document",
    "inference",
    "measure",
    "network",
    "training",
]

OURS, PLAIN, PLAIN_TF32 = "ebmkit", "plain eager", "plain eager, TF32"
NUM_CLASSES = 10
"""Labels of the networks that are timed."""

SHORTEST = 0.05
"""Seconds that a timing takes at least; faster steps are called several times."""

PEERS = ("torchebm", "deepinv", "ebmkit")

_NAME = re.compile(r"(?P<what>.+) (?P<backbone>\S+) w(?P<width>\d+) (?P<size>\d+)x\d+ b(?P<b>\d+)")


class Setting(NamedTuple):
    """What is done, by which network, on how many images of which size.

    >>> str(Setting("train dsm", "gradresnet18", 16, 32, 64))
    'train dsm gradresnet18 w16 32x32 b64'
    """

    what: str
    backbone: str = "gradresnet18"
    width: int = 16
    image_size: int = 32
    batch: int = 64

    def __str__(self) -> str:
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.what} {self.backbone} w{self.width} {size} b{self.batch}"

    @classmethod
    def read(cls, name: str) -> Setting | None:
        """The setting in a row's name, without who did it; None if there is none."""
        match = _NAME.fullmatch(name.rpartition(": ")[0])
        if match is None:
            return None
        width, size, batch = (int(match[key]) for key in ("width", "size", "b"))
        return cls(match["what"], match["backbone"], width, size, batch)


@dataclass(frozen=True)
class Row:
    """One measurement, as it stands in the JSON file.

    Attributes:
        name: what was done, colon, who did it.
        device: on what.
        median_s: median over rounds of the seconds of one step.
        images_per_s: images of one step by that median.
        peak_mb: most memory held, in 10^6 bytes (`ebmkit.bench.timing.held`).
        ratio: how many times as fast as the plain eager step in float32: median over rounds.
        ratio_range: lower and upper quartile of that over rounds.
        ratios: who else was in the comparison -> the same against them: median, quartiles.
        note: what a reader must know to compare.
    """

    name: str
    device: str
    median_s: float
    images_per_s: float
    peak_mb: float
    ratio: float | None
    ratio_range: tuple[float, float] | None
    ratios: dict[str, Ratio]
    note: str


@dataclass(frozen=True)
class Comparison:
    """Candidates that do the same work.

    Attributes:
        name: what they do.
        images: images that one step sees.
        candidates: who -> what builds its step.
        notes: who -> what a reader must know.
    """

    name: str
    images: int
    candidates: dict[str, Build]
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def measure(comparison: Comparison, device: torch.device, rounds: int) -> list[Row]:
    """Memory of each candidate, then the interleaved timing of all; one row each.

    Raises:
        UserError: if the memory does not suffice.
    """
    steps, peaks = {}, {}
    cuda = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if cuda else lambda: None
    try:
        for who, build in comparison.candidates.items():
            steps[who], peaks[who] = held(build, device)
        seconds = interleave(steps, rounds, warmup=1, shortest=SHORTEST, synchronize=synchronize)
    except (OutOfMemory, torch.OutOfMemoryError):
        raise UserError(
            f"{device} has too little memory for {comparison.name!r}: choose a smaller --batch, "
            "--width or --image-size"
        ) from None
    rows = []
    for who, own in seconds.items():
        ratios = {name: ratio_to(base, own) for name, base in seconds.items() if name != who}
        to_plain = Ratio(1.0, 1.0, 1.0) if who == PLAIN else ratios.get(PLAIN)
        median = statistics.median(own)
        rows.append(
            Row(
                name=f"{comparison.name}: {who}",
                device=str(device),
                median_s=median,
                images_per_s=comparison.images / median,
                peak_mb=peaks[who] / 1e6,
                ratio=to_plain.median if to_plain else None,
                ratio_range=(to_plain.low, to_plain.high) if to_plain else None,
                ratios=ratios,
                note=getattr(steps[who], "how", comparison.notes.get(who, "")),
            )
        )
    return rows


def network(setting: Setting, channels: int, device: torch.device) -> JointModel:
    """The network of ``setting``, with weights from a fixed seed.

    Raises:
        UserError: on an unknown backbone or an illegal width.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(
            setting.backbone,
            num_classes=NUM_CLASSES,
            in_channels=channels,
            image_size=setting.image_size,
            width=setting.width,
        )
    return model.to(device)


def training(
    setting: Setting,
    objective: str,
    channels: int,
    device: torch.device,
    compute: ComputeConfig | None = None,
) -> Comparison:
    """The training step of ``objective``: the library's against the plain eager one.

    Args:
        setting: network and sizes; its ``what`` names the comparison.
        objective: as ``ce+dsm``; balanced terms are timed in their mean form (`timed_terms`).
        channels: 1 gray, 3 colour.
        device: where.
        compute: precision and compilation of the library's step.

    Raises:
        UserError: on an unknown objective, backbone, width, precision or compile mode.
    """
    compute = compute or ComputeConfig()
    model = network(setting, channels, device)
    streams = list(dict.fromkeys(term.objective.stream for term in timed_terms(objective)))
    counts = dict.fromkeys(streams, setting.batch)
    if len(streams) > 1:
        counts["classify"] = 2 * setting.batch
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: make_batch(count, channels, setting.image_size, NUM_CLASSES, device, generator)
        for name, count in counts.items()
    }
    candidates: dict[str, Build] = {
        OURS: lambda: our_step(model, objective, lambda: drawn, compute),
        PLAIN: lambda: plain_step(model, objective, lambda: drawn),
    }
    if _has_tf32(device):
        candidates[PLAIN_TF32] = lambda: plain_step(model, objective, lambda: drawn, "tf32")
    notes = {OURS: _how(compute, device)}
    return Comparison(str(setting), sum(counts.values()), candidates, notes)


def inference(
    setting: Setting, channels: int, device: torch.device, compute: ComputeConfig | None = None
) -> Comparison:
    """The library's call of ``setting.what`` against the plain one; see `ebmkit.bench.INFERENCES`.

    Raises:
        UserError: as `training` does.
    """
    compute = compute or ComputeConfig()
    auto = compute.precision == "auto"
    inferred = compute.model_copy(update={"precision": "fp32"}) if auto else compute
    model = network(setting, channels, device)
    generator = torch.Generator().manual_seed(0)
    size = setting.image_size
    y = make_batch(setting.batch, channels, size, NUM_CLASSES, device, generator).y
    candidates: dict[str, Build] = {
        OURS: lambda: our_inference(model, setting.what, y, inferred),
        PLAIN: lambda: plain_inference(model, setting.what, y),
    }
    if _has_tf32(device):
        candidates[PLAIN_TF32] = lambda: plain_inference(model, setting.what, y, "tf32")
    return Comparison(str(setting), setting.batch, candidates, {OURS: _how(inferred, device)})


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """What the JSON file holds: the environment with the versions of peers, and the rows."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "environment": environment() | {"peers": versions},
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _how(compute: ComputeConfig, device: torch.device) -> str:
    compiled = "compiled" if pick_compile(compute.compile, device) else "eager"
    return f"{pick_precision(compute.precision, device)}, {compiled}"


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
