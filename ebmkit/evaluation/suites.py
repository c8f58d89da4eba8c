"""The table of suites, and `evaluate`, which runs them and writes what they find.

Results are derived data: evaluating again replaces the files of the same suite in the same folder.
`ebmkit.evaluation.folders` says which folder that is.

Every JSON file holds, beside what its suite measures: ``suite``, ``dataset``, ``split``, ``images``
(how many were used), ``of`` (how many the split has) and their ``fingerprint``; ``seed`` and
``sigmas`` (image units); ``model`` (objective, steps, training set) and ``weights``;
``environment`` (versions, git commit, command), ``device``, ``precision``, ``compiled`` (whether
anything was), ``processes``, ``batch_size``, ``seconds``, ``warnings``, and
``pictures``, the names of those beside it that belong to it.

Several processes (`ebmkit.distributed`) share the images; all of them get the same results, and the
first alone writes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel

from ebmkit.compile import device_of, make_inference, tf32_restored, unwrapped
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation.adversarial import ADVERSARIAL
from ebmkit.evaluation.calibration import CALIBRATION
from ebmkit.evaluation.certify import CERTIFY
from ebmkit.evaluation.classify import CLASSIFY
from ebmkit.evaluation.context import NOISE_LEVELS, SIGMAS, EvaluationContext, Suite
from ebmkit.evaluation.data import Images, fingerprint
from ebmkit.evaluation.denoise import DENOISE
from ebmkit.evaluation.diffusion_path import DIFFUSION_PATH
from ebmkit.evaluation.generation import GENERATION
from ebmkit.evaluation.jacobian import JACOBIAN
from ebmkit.evaluation.linearity import LINEARITY
from ebmkit.evaluation.ood import OOD
from ebmkit.evaluation.robustness import ROBUSTNESS
from ebmkit.evaluation.robustness_grid import ROBUSTNESS_GRID
from ebmkit.evaluation.shift import SHIFT
from ebmkit.registry import find
from ebmkit.storage import remove_file, write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.training.run_folder import environment
from ebmkit.validation import validated

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SUITES", "Result", "evaluate", "parse_options", "parse_suites", "tables"]

SUITES: dict[str, Suite] = {
    "classify": CLASSIFY,
    "denoise": DENOISE,
    "calibration": CALIBRATION,
    "robustness": ROBUSTNESS,
    "robustness-grid": ROBUSTNESS_GRID,
    "certify": CERTIFY,
    "shift": SHIFT,
    "jacobian": JACOBIAN,
    "linearity": LINEARITY,
    "adversarial": ADVERSARIAL,
    "ood": OOD,
    "generation": GENERATION,
    "diffusion-path": DIFFUSION_PATH,
}

VALUES_PER_BATCH = 1_500_000
"""Pixel values in a batch at most, where the caller does not say: 488 colour images of 32x32."""

SHOWN = 5
"""Images left out whose reasons a document keeps."""

SHARES = 8
"""The number of batches is a multiple of this, so that 2, 4 or 8 processes have equal shares."""


@dataclass(frozen=True)
class Result:
    """What a suite found.

    Attributes:
        suite: its name.
        document: what the JSON file holds.
        path: the JSON file; the pictures are beside it.
    """

    suite: str
    document: dict[str, Any]
    path: Path


def parse_suites(text: str, model: ScoreModel, images: Images) -> list[str]:
    """The suites that ``text`` names, as in ``classify,denoise``.

    ``standard``: the quick ones that apply; ``all``: every one that applies and needs no setting.

    Raises:
        UserError: if a name is unknown, a suite named does not suit model and images, or none does.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    groups = {
        "standard": [name for name, suite in SUITES.items() if suite.standard],
        "all": [name for name, suite in SUITES.items() if not suite.needs],
    }
    if len(names) == 1 and names[0] in groups:
        names = [name for name in groups[names[0]] if _applies(SUITES[name], model, images)]
    if not names:
        raise UserError(f"no suite to run: name some of {', '.join([*groups, *SUITES])}")
    for name in names:
        if name in groups:
            raise UserError(f"suite {name!r} stands alone: leave out the others, or leave it out")
        find("suite", SUITES, name).check(model, images)
    return list(dict.fromkeys(names))


def evaluate(
    model: ScoreModel,
    images: Images,
    suites: Sequence[str],
    out_dir: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    sigmas: Sequence[float] = SIGMAS,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    weights: str = "last",
    precision: str = "auto",
    compile: str = "auto",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    pictures: bool = True,
    progress: bool = False,
    world: DistributedContext | None = None,
    data_dir: Path | None = None,
) -> dict[str, Result]:
    """Run ``suites`` and write their JSON files and pictures into ``out_dir``, each in one move.

    Args:
        model: any energy model; evaluated in evaluation mode, without gradients.
        images: the whole split.
        suites: names from `SUITES`.
        out_dir: made if it is not there; see `ebmkit.evaluation.evaluation_folder`.
        limit: use only the first so many images.
        seed: of the noise.
        batch_size: images at a time; changes time and memory, not the results. None: up to 500
            and up to about 1.5 million pixel values, in a number of batches that 8 divides.
        sigmas: noise levels of the suite ``denoise``, image units.
        noise_levels: noise levels of the suite ``classify``, image units.
        weights: which of the run's weights the model has; only written down.
        precision: auto (fp32, so that results can be compared), fp32, tf32 or bf16.
        compile: on, off or auto: on CUDA, once minutes of work are left; see
            `ebmkit.optimize`. A wrapper that the model has already is left out.
        options: by suite, settings of its own, as in ``{"robustness": {"steps": 10}}``.
        pictures: draw them, too.
        progress: show a progress bar.
        world: the processes that share the work, all of which must call this.
        data_dir: where the data set's files are; the suite ``ood`` looks for others there.

    Returns:
        The results by suite, in the order asked for.

    Raises:
        UserError: if a suite does not suit model and images, a number is illegal, the device lacks
            the precision, or a file cannot be written. Suites already done stay written.
    """
    world = world or DistributedContext()
    chosen = {name: find("suite", SUITES, name) for name in suites}
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves no images: take 1 or more, or leave it out")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size} is not legal: take 1 or more")
    used = images if limit is None else images.first(limit)
    _check_images(model, used)
    for suite in chosen.values():
        suite.check(model, used)
    own = parse_options(options or {}, chosen)
    batch_size = batch_size or _batch_size(used)
    levels = (_levels(sigmas, 1e-6, "sigmas"), _levels(noise_levels, 0, "noise levels"))
    results = {}
    with (
        tf32_restored(device_of(model)),
        _evaluation_mode(model),
        torch.no_grad(),
        _bar(progress and world.first) as start,
    ):
        inference = make_inference(device_of(model), precision, compile)
        model = inference.wrap(unwrapped(model))
        setting = EvaluationContext(model, used, seed, batch_size, *levels, world, own, data_dir)
        setting.inference = inference
        common = _common(setting, images, weights)
        _check_finite(model, used)
        for suite in chosen.values():
            suite.ready(setting)
        if world.first:
            _make(out_dir)
        for name, suite in chosen.items():
            setting.left = suite.passes(setting) * len(used)
            setting.advance = start(name, setting.left)
            begun = time.perf_counter()
            found = suite.run(setting)
            how: dict[str, Any] = {
                "precision": inference.precision,
                "compiled": inference.compiled,
                "seconds": round(time.perf_counter() - begun, 3),
            }
            if suite.options is not None:
                how["options"] = setting.option(suite.options).model_dump(mode="json")
            document = {"suite": name, **common, **how, "warnings": [], **found}
            document = world.broadcast(document)
            path = out_dir / f"{name}.json"
            setting.advance = lambda count: None
            if world.first:
                drawn = _draw(suite, setting, document, path) if pictures else []
                document["pictures"] = drawn
                write_atomically(path, json.dumps(document, indent=2, allow_nan=False).encode())
            results[name] = Result(name, document, path)
    return results


def parse_options(
    options: Mapping[str, Mapping[str, Any]], chosen: Container[str]
) -> dict[type[BaseModel], BaseModel]:
    """Settings of suites, by their class.

    Args:
        options: by suite, fields and their values.
        chosen: the suites that will run.

    Raises:
        UserError: if there is no such suite, it is not among ``chosen``, it has no settings, or one
            is not legal.
    """
    found: dict[type[BaseModel], BaseModel] = {}
    for name, values in options.items():
        kind = find("suite", SUITES, name).options
        if kind is None:
            having = [n for n, suite in SUITES.items() if suite.options is not None]
            raise UserError(f"suite {name!r} has no settings: those that do: {', '.join(having)}")
        if name not in chosen:
            raise UserError(f"settings of suite {name!r}, which does not run: --suite {name}")
        if not isinstance(values, Mapping):
            fields = ", ".join(kind.model_fields)
            raise UserError(f"settings of suite {name!r} must name a field: {fields}")
        found[kind] = validated(kind, dict(values), f"settings of suite {name!r}")
    return found


def tables(results: dict[str, Result]) -> list[Table]:
    """One table for the terminal per suite: measures, values, 95 % intervals."""
    return [SUITES[name].table(result.document) for name, result in results.items()]


def _applies(suite: Suite, model: ScoreModel, images: Images) -> bool:
    try:
        suite.check(model, images)
    except UserError:
        return False
    return True


def _check_images(model: ScoreModel, images: Images) -> None:
    if len(images) == 0:
        raise UserError(f"data set {images.name!r} has no images in split {images.split!r}")
    wanted = model.card.channels if model.card else getattr(model, "in_channels", None)
    if wanted is not None and images.channels != wanted:
        raise UserError(
            f"data set {images.name!r} has images of {images.channels} channel(s) and this model "
            f"takes {wanted}: choose a data set with {wanted}"
        )


def _check_finite(model: ScoreModel, images: Images) -> None:
    """Whether the model gives numbers at all: of a few images at a little noise."""
    few = images.first(min(4, len(images)))
    x = next(iter(few.batches(len(few))))[0].to(device_of(model))
    found = []
    if model.card is None or model.card.sigma_range is not None:
        found.append(model.denoise(x, 25 / 255))
    if isinstance(model, EnergyModel):
        found.append(model.energies(x, 25 / 255).logits)
    if not all(output.isfinite().all() for output in found):
        raise UserError(
            "this model gives values that are not finite: its training diverged, or its weights "
            "are damaged"
        )


def _draw(
    suite: Suite, setting: EvaluationContext, document: dict[str, Any], path: Path
) -> list[str]:
    """Put the pictures of ``document`` beside ``path``, in place of those of the one there.

    Returns:
        Their names.
    """
    with tempfile.TemporaryDirectory(prefix="ebmkit-drawing-") as name:
        aside = Path(name)
        suite.draw(setting, document, aside)
        drawn = sorted(picture.name for picture in aside.iterdir())
        for old in set(_pictures_of(path)) - {*drawn}:
            remove_file(path.parent / old)
        for picture in drawn:  # before the document: who finds it finds its pictures
            write_atomically(path.parent / picture, (aside / picture).read_bytes())
    return drawn


def _pictures_of(path: Path) -> list[str]:
    """Names of the pictures that the document at ``path`` says are its own."""
    try:
        names = read_json(path).get("pictures", [])
    except (OSError, ValueError, AttributeError):  # none there, or not ours to read
        return []
    return [n for n in names if isinstance(n, str) and Path(n).name == n and n.endswith(".png")]


def _batch_size(images: Images) -> int:
    pixels = images.channels * images.image_size[0] * images.image_size[1]
    largest = min(500, max(1, VALUES_PER_BATCH // pixels))
    batches = SHARES * math.ceil(len(images) / (SHARES * largest))
    return math.ceil(len(images) / batches)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(folder)!r}: {error.strerror}") from None


def _levels(sigmas: Sequence[float], lowest: float, what: str) -> tuple[float, ...]:
    bad = [s for s in sigmas if not lowest <= s < float("inf")]
    if bad or not sigmas:
        shown = bad[0] if bad else "none"
        raise UserError(f"{what}: {shown} is not legal: give finite levels above 0, as in 25/255")
    return tuple(sigmas)


def _common(setting: EvaluationContext, split: Images, weights: str) -> dict[str, Any]:
    """What every JSON file says of the circumstances."""
    card = setting.model.card
    trained = card and {"objective": card.objective, "steps": card.steps, "dataset": card.dataset}
    lost = getattr(split, "left_out", ())
    return {
        "dataset": setting.images.name,
        "split": setting.images.split,
        "images": len(setting.images),
        "of": len(split),
        "fingerprint": fingerprint(split),
        "seed": setting.seed,
        "model": trained,
        "weights": weights,
        "environment": environment(),
        "device": str(setting.device),
        "processes": setting.world.size,
        "batch_size": setting.batch_size,
        **({"unreadable": {"count": len(lost), "reasons": list(lost[:SHOWN])}} if lost else {}),
    }


@contextmanager
def _evaluation_mode(model: ScoreModel) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields a function (name, total) -> advance that begins a bar for a suite."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("images,"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        disable=not shown,
    )
    with bar:

        def start(name: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(name, total=total)
            return lambda count: bar.advance(task, count)

        yield start
