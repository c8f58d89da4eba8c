"""Pretrained models in the package: names, model cards and folders.

``ebmkit/weights/NAME`` is a run folder without checkpoints: the weights as float16 safetensors,
``model.json``, ``config.yaml``, a manifest with the SHA-256 of each file, and ``card.json``, the
`PretrainedCard`. `benchmarks/publish_weights.py` makes it from a run. Results of these models, and
of models on the hub, are written to the folder ``runs/pretrained`` in the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ebmkit.errors import UserError, shown, unknown_name, validated
from ebmkit.hub import PREFIX, cache_of, locate_model
from ebmkit.storage import read_together
from ebmkit.storage.reading import parse_json

WEIGHTS = Path(__file__).parent / "weights"

CARD = "card.json"

DEFAULTS = {
    "classify": "digits-joint",
    "demo": "digits-joint",
    "denoise": "photos-gray",
    "restore": "photos-gray",
    "sample": "digits-joint",
}
"""The model of each command that is called without one."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Part):
    """A measured figure of the weights as they are stored.

    Attributes:
        name: what was measured.
        value: the figure: of an accuracy a share, of a PSNR decibels.
        low: lower end of its 95 % interval; None without an interval.
        high: upper end.
        unit: ``%`` (of a share), ``dB`` or empty.
        images: number of test images.
        noisy: PSNR of the noisy images, dB; None for other figures.
        float32: the same figure of the float32 weights of the run; None: not measured.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: Literal["%", "dB", ""] = ""
    images: int
    noisy: float | None = None
    float32: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self._ends()})"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self._number(self.value)}{unit}{interval}"

    def _number(self, value: float, digits: int = 2) -> str:
        return f"{100 * value if self.unit == '%' else value:.{digits}f}"

    def _ends(self) -> str:
        assert self.low is not None
        assert self.high is not None
        return f"{self._number(self.low)} to {self._number(self.high)}"

    def float16_cost(self) -> str:
        """Difference that the float16 weights make; a hyphen if it was not measured."""
        if self.float32 is None:
            return "-"
        change = self.value - self.float32
        return f"{100 * change if self.unit == '%' else change:+.4f}"


class Training(_Part):
    """How a model was trained.

    Attributes:
        recipe: name of the recipe.
        command: the command line.
        objective: objective.
        steps: steps of the stored weights.
        of: steps of the whole run; more than ``steps``: it had not ended.
        averaged: decay of the averaged weights that are stored; 0: the last weights.
        seed: random seed.
        flops: FLOPs of these steps; None: not counted.
        seconds: time of these steps.
        hardware: cores, threads and GPU.
        torch: version of PyTorch.
        commit: git commit of ebmkit.
    """

    recipe: str
    command: str
    objective: str
    steps: int
    of: int
    averaged: float
    seed: int
    flops: float | None
    seconds: float
    hardware: str
    torch: str
    commit: str


class PretrainedCard(_Part):
    """The model card of a pretrained model.

    Attributes:
        format: version of this document.
        description: what the model is, in a line.
        task: kind of model.
        data: the data it was trained on, with their source and splits.
        parameters: number of parameters.
        training: how it was trained.
        figures: measured figures, the most important first.
        measured: how they were measured.
        limits: what the model is not good for, one sentence each.
        licence: licence of the weights.
    """

    format: Literal[1] = 1
    description: str
    task: Literal["joint", "classifier", "denoiser", "diffusion"]
    data: str
    parameters: int
    training: Training
    figures: list[Figure]
    measured: str
    limits: list[str]
    licence: str


def list_models() -> list[str]:
    """Names of the pretrained models, for `ebmkit.load` and ``--pretrained``.

    >>> "digits-joint" in list_models()
    True
    """
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CARD}"))


def find_model(name: str) -> Path:
    """The folder of the pretrained model ``name``.

    Raises:
        UserError: if there is none, with the most similar name.
    """
    if name not in list_models():
        raise unknown_name("pretrained model", name, list_models())
    return WEIGHTS / name


def read_card(name: str) -> PretrainedCard:
    """The model card of the pretrained model ``name``.

    Raises:
        UserError: if there is no such model, or its card is damaged.
    """
    folder = find_model(name)
    what = repr(str(folder / CARD))
    values = parse_json(read_together(folder, [CARD])[CARD], what, finite=True)
    return validated(PretrainedCard, values if isinstance(values, dict) else {}, what)


def locate(run: str | os.PathLike[str]) -> Path:
    """The folder of ``run``: itself if it exists, that of a pretrained model, or a download.

    Args:
        run: a folder, the name of a pretrained model, or ``hub:owner/name``.

    Raises:
        UserError: if it is none of these, or the download fails.
    """
    name, folder = os.fspath(run), Path(run)
    if folder.is_dir():
        return folder
    if name.startswith(PREFIX):
        return locate_model(name)
    if not folder.exists() and name in list_models():
        return WEIGHTS / name
    if len(folder.parts) > 1 or folder.exists():
        raise UserError(f"there is no run folder {shown(name)}")
    hint = str(unknown_name("pretrained model", name, list_models())).partition(": ")[2]
    raise UserError(f"there is no run folder or pretrained model {shown(name)}: {hint}")


def name_of(folder: Path) -> str:
    """What ``folder`` is called in results: the pretrained model, ``hub:owner/name``, or itself."""
    if folder.parent == WEIGHTS:
        return folder.name
    cache = cache_of(folder)
    if cache is not None and cache.name.startswith("models--"):
        return PREFIX + cache.name.removeprefix("models--").replace("--", "/")
    return str(folder)


def results_folder(folder: Path) -> Path:
    """The folder that results of the model in ``folder`` are written to: ``folder`` itself, except
    for models in the package and in the hub's cache."""
    name = name_of(folder)
    if name == str(folder):
        return folder
    return Path("runs", "pretrained", name.removeprefix(PREFIX).replace("/", "--"))


def size_of(name: str) -> int:
    """Bytes of the files of the pretrained model ``name``."""
    return sum(path.stat().st_size for path in find_model(name).iterdir())


def as_markdown(name: str, card: PretrainedCard) -> str:
    """The model card as text in Markdown."""
    training = card.training
    steps = f"{training.steps:,} steps"
    if training.steps < training.of:
        steps = f"step {training.steps:,} of {training.of:,}: the run had not ended"
    weights = "last weights"
    if training.averaged:
        weights = f"averaged weights (decay {training.averaged:g})"
    flops = "FLOPs not counted" if training.flops is None else f"{training.flops / 1e12:,.3g} TFLOP"
    compared = any(figure.float32 is not None for figure in card.figures)
    heading = ["figure", "value (95 % interval)", "noisy images", "test images"]
    lines = [
        f"## {name}",
        "",
        f"{card.description[0].upper()}{card.description[1:]}.",
        "",
        f"- Task: {card.task}; {card.parameters:,} parameters, {size_of(name) / 1e6:.1f} MB",
        f"- Data: {card.data}",
        f"- Training: recipe `{training.recipe}`, objective `{training.objective}`, {steps}, "
        f"{weights}, seed {training.seed}; `{training.command}`",
        f"- Cost: {flops}, {training.seconds / 60:.1f} minutes on {training.hardware}, PyTorch "
        f"{training.torch}, code at {training.commit}",
        *(f"- Limit: {limit}" for limit in card.limits),
        f"- Licence: {card.licence}",
        "",
        f"| {' | '.join([*heading, *(['float16 - float32'] if compared else [])])} |",
        "|---|---|" + "---:|" * (3 if compared else 2),
    ]
    for figure in card.figures:
        noisy = "-" if figure.noisy is None else f"{figure.noisy:.2f} dB"
        cells = [figure.name, str(figure), noisy, f"{figure.images:,}"]
        cells += [figure.float16_cost()] if compared else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", card.measured])
