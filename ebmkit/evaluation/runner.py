"""Running suites: `evaluate` runs them and writes results, `evaluation_folder` chooses the folder.

A new evaluation replaces the files of the same suite in the same folder. The fields of the JSON
files are documented in docs/guide/evaluation-json.md. Several processes (`ebmkit.distributed`)
share the images; all of them return the same results, and only the first one writes files.

Results that cannot be compared go to different folders:

::

    RUN/evaluation/                   test split of the training data set, all or first images
    RUN/evaluation/cifar100-test/     other images or other weights
      classify.json  denoise.json  calibration.json  and plots
    RUN/evaluation/digits-test-steps=100/  changed settings of a suite
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel
from rich.table import Table
from torch import Tensor

from ebmkit.compile import device_of, make_inference, tf32_restored, unwrapped
from ebmkit.compute import environment
from ebmkit.data.imagesets import ImageSet, StreamedSet, fingerprint
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError, validated
from ebmkit.evaluation.adversarial import ADVERSARIAL
from ebmkit.evaluation.calibration import CALIBRATION
from ebmkit.evaluation.certify import CERTIFY
from ebmkit.evaluation.classify import CLASSIFY
from ebmkit.evaluation.corruptions import CORRUPTIONS_SUITE
from ebmkit.evaluation.denoise import DENOISE
from ebmkit.evaluation.diffusion_path import DIFFUSION_PATH
from ebmkit.evaluation.generation import GENERATION
from ebmkit.evaluation.generative_classifier import GENERATIVE_CLASSIFIER
from ebmkit.evaluation.jacobian import JACOBIAN
from ebmkit.evaluation.likelihood import LIKELIHOOD
from ebmkit.evaluation.linearity import LINEARITY
from ebmkit.evaluation.ood import OOD
from ebmkit.evaluation.robustness import ROBUSTNESS
from ebmkit.evaluation.robustness_grid import ROBUSTNESS_GRID
from ebmkit.evaluation.suite import NOISE_LEVELS, SIGMAS, EvaluationContext, Images, Suite
from ebmkit.pretrained import results_folder
from ebmkit.registry import Table as Registry
from ebmkit.registry import find
from ebmkit.storage import make_folder, remove_file, write_atomically
from ebmkit.storage.reading import read_bytes, read_document
from ebmkit.storage.tensors import LARGEST_FILE, parse_tensors
from ebmkit.terminal import COUNT, ProgressBar

SUITES: dict[str, Suite] = Registry(
    "suite",
    {
        "classify": CLASSIFY,
        "denoise": DENOISE,
        "calibration": CALIBRATION,
        "robustness": ROBUSTNESS,
        "robustness-grid": ROBUSTNESS_GRID,
        "certify": CERTIFY,
        "corruptions": CORRUPTIONS_SUITE,
        "jacobian": JACOBIAN,
        "linearity": LINEARITY,
        "adversarial": ADVERSARIAL,
        "ood": OOD,
        "likelihood": LIKELIHOOD,
        "generative-classifier": GENERATIVE_CLASSIFIER,
        "generation": GENERATION,
        "diffusion-path": DIFFUSION_PATH,
    },
)

FORMER_NAMES = {"shift": "corruptions"}
"""Former names of suites, as in older documents, and their current names."""

VALUES_PER_BATCH = 1_500_000
"""Maximum number of pixel values in a batch of the default size: 488 colour images of 32x32."""

SHOWN = 5
"""Maximum number of unreadable images whose errors a document lists."""

BATCH_COUNT_MULTIPLE = 8
"""The default number of batches is a multiple of this, so 2, 4 or 8 processes get equal shares."""


def find_suite(name: str) -> Suite:
    """Return the suite called ``name``.

    Raises:
        UserError: if ``name`` is unknown, or a former name.
    """
    if name in FORMER_NAMES:
        new = FORMER_NAMES[name]
        raise UserError(f"suite {name!r} is now called {new!r}: write --suite {new}")
    return find("suite", SUITES, name)


def parse_suites(text: str, model: ScoreModel, images: Images) -> list[str]:
    """Parse a list of suites, as in ``classify,denoise``.

    ``standard`` selects the quick suites that apply to model and images; ``all`` every suite that
    applies and has no required setting.

    Raises:
        UserError: if a name is unknown, a named suite does not apply to model and images, or no
            suite is left.
    """

    def applies(suite: Suite) -> bool:
        try:
            suite.check(model, images)
        except UserError:
            return False
        return True

    names = [name.strip() for name in text.split(",") if name.strip()]
    groups = {
        "standard": [name for name, suite in SUITES.items() if suite.standard],
        "all": [name for name, suite in SUITES.items() if not suite.needs],
    }
    if len(names) == 1 and names[0] in groups:
        names = [name for name in groups[names[0]] if applies(SUITES[name])]
    if not names:
        raise UserError(f"no suite to run: name some of {', '.join([*groups, *SUITES])}")
    for name in names:
        if name in groups:
            raise UserError(f"suite {name!r} cannot be combined with others: give it alone")
        find_suite(name).check(model, images)
    return list(dict.fromkeys(names))


def parse_options(
    options: Mapping[str, Mapping[str, Any]], chosen: Container[str]
) -> dict[type[BaseModel], BaseModel]:
    """Validate settings of suites and return them by settings class.

    Args:
        options: by suite name, the fields and their values.
        chosen: names of the suites that will run.

    Raises:
        UserError: if a suite does not exist, is not among ``chosen`` or has no settings, or a
            setting is not legal.
    """
    found: dict[type[BaseModel], BaseModel] = {}
    for name, values in options.items():
        kind = find_suite(name).options
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


@dataclass(frozen=True)
class Result:
    """Name of a suite, and content and path of its JSON file; its plots are in the same folder."""

    suite: str
    document: dict[str, Any]
    path: Path


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
    plots: bool = True,
    image_values: bool = False,
    progress: bool = False,
    world: DistributedContext | None = None,
    data_dir: Path | None = None,
) -> dict[str, Result]:
    """Run ``suites`` and write their JSON files and plots into ``out_dir``, each file atomically.

    Args:
        model: the model; runs in evaluation mode, without gradients of parameters.
        images: the whole split.
        suites: names from `SUITES`.
        out_dir: output folder, created if missing; see `ebmkit.evaluation.evaluation_folder`.
        limit: maximum number of images, from the first; None: all.
        seed: random seed of the noise.
        batch_size: images per batch; changes time and memory, not the results. None: up to 500
            images and about 1.5 million pixel values, with a multiple of 8 batches.
        sigmas: noise levels of the suite ``denoise``, image units.
        noise_levels: noise levels of the suite ``classify``, image units.
        weights: name of the model's weights (``last`` or ``best``), for the JSON files.
        precision: auto (fp32, so that results are comparable), fp32, tf32 or bf16.
        compile: on, off or auto (on CUDA, if minutes of work are left); see `ebmkit.optimize`. An
            existing wrapper of the model is ignored.
        options: settings by suite, as in ``{"robustness": {"steps": 10}}``.
        plots: write plots.
        image_values: write the values by image behind the means of the suites ``classify``,
            ``denoise`` and ``robustness``, for `read_image_values`.
        progress: show a progress bar.
        world: the processes that share the work; each must call this function.
        data_dir: folder of data sets, for suites that load further ones.

    Returns:
        Results by suite name, in the order of ``suites``.

    Raises:
        UserError: if a suite does not apply to model and images, a number is illegal, the device
            does not support the precision, or a file cannot be written. Finished files are kept.
    """
    world = world or DistributedContext()
    chosen = {name: find_suite(name) for name in suites}
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves no images: take 1 or more, or leave it out")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not legal: take a whole number from 0 to {2**63 - 1}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size} is not legal: take 1 or more")
    images = match_classes(model, images)
    used = images if limit is None else images.first(limit)
    _check_images(model, used)
    for suite in chosen.values():
        suite.check(model, used)
    own = parse_options(options or {}, chosen)
    for what, levels, lowest in (("sigmas", sigmas, 1e-6), ("noise levels", noise_levels, 0)):
        illegal = [str(s) for s in levels if not lowest <= s < math.inf]
        if illegal or not levels:
            shown = illegal[0] if illegal else "none"
            raise UserError(
                f"{what}: {shown} is not legal: give finite levels above 0, as in 25/255"
            )
    if batch_size is None:
        largest = min(500, max(1, VALUES_PER_BATCH // (used.channels * math.prod(used.image_size))))
        batches = BATCH_COUNT_MULTIPLE * math.ceil(len(used) / (BATCH_COUNT_MULTIPLE * largest))
        batch_size = math.ceil(len(used) / batches)
    device = device_of(model)
    results = {}
    bar = ProgressBar(f"{COUNT} images", show=progress and world.first)
    with tf32_restored(device), torch.no_grad(), bar, ExitStack() as stack:
        stack.callback(model.train, model.training)
        inference = make_inference(device, precision, compile)
        model = inference.wrap(unwrapped(model.eval()))
        protocol = seed, batch_size, tuple(sigmas), tuple(noise_levels), world, own, data_dir
        context = EvaluationContext(model, used, *protocol, inference=inference)
        circumstances = _common_fields(context, images, weights)
        _check_finite(model, used)
        for suite in chosen.values():
            suite.prepare(context)
        if world.first:
            make_folder(out_dir)
        for name, suite in chosen.items():
            context.left = suite.passes(context) * len(used)
            context.advance = partial(bar.advance, bar.add_task(name, total=context.left))
            start_time = time.perf_counter()
            context.image_values = {}
            measured = suite.run(context)
            how: dict[str, Any] = {
                "precision": inference.precision,
                "compiled": inference.compiled,
                "seconds": round(time.perf_counter() - start_time, 3),
            }
            if suite.options is not None:
                how["options"] = context.option(suite.options).model_dump(mode="json")
            document = {"suite": name, **circumstances, **how, "warnings": [], **measured}
            document = world.broadcast(document)
            if name == ("denoise" if "denoise" in chosen else suites[0]):  # once
                document["warnings"] = [*_pairing(model), *document["warnings"]]
            context.advance = lambda count: None
            path = out_dir / f"{name}.json"
            if world.first:
                document["pictures"] = _plot(suite, context, document, path) if plots else []
                values = context.image_values if image_values else {}
                document |= _write_image_values(values, path)
                write_atomically(path, json.dumps(document, indent=2, allow_nan=False).encode())
            results[name] = Result(name, document, path)
    return results


def _write_image_values(values: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Replace the values beside the document ``path``; return its field that has their digest.

    The digest shows whether both files are of the same evaluation.
    """
    file = path.with_suffix(".safetensors")
    if not values:
        if "image_values" in read_document(path):
            remove_file(file)
        return {}
    content = safetensors.torch.save({name: own.contiguous() for name, own in values.items()})
    write_atomically(file, content)
    return {"image_values": hashlib.sha256(content).hexdigest()}


def read_image_values(document: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Read the values by image behind the means of ``document``, whose file is in ``folder``.

    Returns:
        Columns (N,) in image order: ``right/SIGMA`` of the suite ``classify`` (bool),
        ``DENOISER/SIGMA`` of ``denoise`` (PSNR, dB), sigma in 255ths, and ``NORM/DEFENCE`` of
        ``robustness`` (the smallest strength that breaks the image, image units). Empty if they
        were not written, or are damaged or of another evaluation.
    """
    path = folder / f"{document['suite']}.safetensors"
    try:
        content = read_bytes(path, LARGEST_FILE)
        if hashlib.sha256(content).hexdigest() == document.get("image_values"):
            return parse_tensors(content, path)[0]
    except UserError:
        pass
    return {}


def tables(results: dict[str, Result]) -> list[Table]:
    """One table for the terminal per suite: metrics, values and 95 % intervals."""
    return [
        SUITES[FORMER_NAMES.get(name, name)].table(result.document)
        for name, result in results.items()
    ]


def evaluation_folder(
    run: Path,
    model: ScoreModel,
    images: Images,
    limit: int | None = None,
    weights: str = "last",
    options: Mapping[type[BaseModel], BaseModel] | None = None,
) -> Path:
    """Return the folder for results of ``model`` on ``images``, without creating it.

    This is ``RUN/evaluation`` for the test split of the data set that the model was trained on,
    otherwise a subfolder named after the data set and split, the weights if they are not ``last``,
    and changed settings. If the folder holds results of other images of the same name (from another
    image folder), the name gets the fingerprint of the images. If it holds results of more images,
    the name gets the number of images.

    Args:
        run: the run folder.
        model: the model, whose ``card`` names its training data.
        images: the whole split.
        limit: number of images used; None: all.
        weights: ``last`` or ``best``.
        options: settings of suites by class, from `parse_options`.
    """
    home = results_folder(run) / "evaluation"
    used = len(images) if limit is None else min(limit, len(images))
    words = [images.name, images.split, *([weights] if weights != "last" else [])]
    name = re.sub(r"[^\w.-]+", "_", "-".join(words)).lstrip(".")
    trained_on = model.card.dataset if model.card else None
    folder = home if words == [trained_on, "test"] else home / name
    if changed := _settings_suffix(options or {}):
        name = f"{name}-{changed}"
        folder = home / name
    mark = fingerprint(images)

    def results(folder: Path) -> list[dict[str, Any]]:
        documents = map(read_document, folder.glob("*.json"))
        return [document for document in documents if "suite" in document]

    if any(old.get("fingerprint", mark) != mark for old in results(folder)):
        folder = home / f"{name}-{mark}"
    if any(old.get("images", 0) > used for old in results(folder)):
        folder = home / f"{name}-limit{used}"
    return folder


def _settings_suffix(options: Mapping[type[BaseModel], BaseModel]) -> str:
    """Settings that differ from the defaults, as in ``images=5-steps=2``; hashed if long."""
    fields = {
        name: value
        for kind, given in options.items()
        for name, value in given.model_dump(mode="json").items()
        if value != kind().model_dump(mode="json")[name]
    }
    text = "-".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    short = re.sub(r"[^\w.=-]+", "_", text).strip("_")
    if len(short) <= 60:
        return short
    return "-".join([*fields, hashlib.sha256(text.encode()).hexdigest()[:8]])[-60:].lstrip("-_.")


def match_classes(model: ScoreModel, images: Images) -> Images:
    """``images`` with labels numbered as in the training data, see `ImageSet.with_classes`."""
    names = model.card.class_names if model.card else []
    return images.with_classes(names) if isinstance(images, (ImageSet, StreamedSet)) else images


def _pairing(model: ScoreModel) -> list[str]:
    """A warning if the model's network and objective are known not to work together."""
    card = model.card
    if card is None or card.sigma_range is None or not isinstance(model, EnergyModel):
        return []
    if not model.has_batch_norm:
        return []
    return [
        f"this model has BatchNorm, and its objective {card.objective!r} trains a score: a pair "
        "known not to work (11.9 % and 24.33 dB at 15/255 in the paper's table 3); train a network "
        "with another norm, or without dsm"
    ]


def _check_images(model: ScoreModel, images: Images) -> None:
    if len(images) == 0:
        raise UserError(f"data set {images.name!r} has no images in split {images.split!r}")
    channels = model.card.channels if model.card else getattr(model, "in_channels", None)
    if channels is not None and images.channels != channels:
        raise UserError(
            f"data set {images.name!r} has images with {images.channels} channel(s) and this model "
            f"takes {channels}: choose a data set with {channels}"
        )


def _check_finite(model: ScoreModel, images: Images) -> None:
    first = images.first(min(4, len(images)))
    x = next(iter(first.batches(len(first))))[0].to(device_of(model))
    found = []
    if model.card is None or model.card.denoises:
        found.append(model.denoise(x, 25 / 255))
    if isinstance(model, EnergyModel):
        found.append(model.energies(x, 25 / 255).logits)
    if not all(output.isfinite().all() for output in found):
        raise UserError(
            "outputs of this model are NaN or Inf: its training diverged, or its weights are "
            "damaged"
        )


def _plot(
    suite: Suite, context: EvaluationContext, document: dict[str, Any], path: Path
) -> list[str]:
    """Replace the plots beside the file ``path`` by those of ``document``; return their names."""
    old = read_document(path).get("pictures", [])
    with tempfile.TemporaryDirectory(prefix="ebmkit-plots-") as folder:
        suite.plot(context, document, Path(folder))
        new = sorted(plot.name for plot in Path(folder).iterdir())
        for name in old:
            own = isinstance(name, str) and Path(name).name == name and name.endswith(".png")
            if own and name not in new:
                remove_file(path.parent / name)
        for name in new:  # before the document, so that the plots of every document exist
            write_atomically(path.parent / name, (Path(folder) / name).read_bytes())
    return new


def _common_fields(context: EvaluationContext, split: Images, weights: str) -> dict[str, Any]:
    """The fields common to all JSON files: data, seed, model, environment and device."""
    card = context.model.card
    trained = card and {"objective": card.objective, "steps": card.steps, "dataset": card.dataset}
    lost = getattr(split, "excluded", ())
    return {
        "dataset": context.images.name,
        "split": context.images.split,
        "images": len(context.images),
        "of": len(split),
        "fingerprint": fingerprint(split),
        "seed": context.seed,
        "model": trained,
        "weights": weights,
        "environment": environment(),
        "device": str(context.device),
        "processes": context.world.size,
        "batch_size": context.batch_size,
        **({"unreadable": {"count": len(lost), "reasons": list(lost[:SHOWN])}} if lost else {}),
    }
