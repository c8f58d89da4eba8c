"""`train`: train a model on any data set, in one call, as ``ebmkit train`` does."""

from __future__ import annotations

import inspect
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ebmkit.data import AnyImages, DatasetRequest, ImageSet, Split, as_images
from ebmkit.data.convert import Column
from ebmkit.data.imagesets import shuffled, split_rows
from ebmkit.data.sets import find_source, write_parts
from ebmkit.distributed import join
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, shown
from ebmkit.models.config import preset_name
from ebmkit.registry import find
from ebmkit.storage.manifest import commit_files
from ebmkit.terminal import console
from ebmkit.training.callbacks import LOGGERS, Callback, TrainingBar
from ebmkit.training.config import TrainConfig, check_options, layer_of, resolve
from ebmkit.training.loop import Trainer, assemble
from ebmkit.training.metrics import learning_curves
from ebmkit.training.run_folder import RunFolder
from ebmkit.training.setup import config_of

CALLBACK_METHODS = [name for name in vars(Callback) if not name.startswith("_")]
"""Methods that the trainer calls."""

DATA = "data.h5"
"""File in a run folder with the images of a run that was started in Python."""


@dataclass(repr=False)
class TrainingResult:
    """What `train` returns.

    Attributes:
        model: the trained model (the averaged one if averaging is on), in evaluation mode.
        history: rows of metrics, as in ``metrics.jsonl``: dictionaries with ``kind`` ("train",
            "validation"), ``step`` and values.
        trainer: the trainer, with ``config``, ``train`` and ``validation``.
        run: run folder; None if nothing was saved.
    """

    model: ScoreModel
    history: list[dict[str, Any]]
    trainer: Trainer
    run: Path | None

    def plot(self, path: Path | str) -> None:
        """Write the learning curves as a PNG file."""
        learning_curves(self.history, Path(path))

    def __repr__(self) -> str:
        rows = [row for row in self.history if row["kind"] == "validation"]
        values = {k: v for row in rows[-1:] for k, v in row.items() if k not in ("kind", "step")}
        held_out = "".join(f", {name} {value:.4g}" for name, value in values.items())
        steps = f"{self.trainer.step:,} of {self.trainer.config.steps:,} steps"
        run = f", run {str(self.run)!r}" if self.run else ""
        return f"TrainingResult({self.model!r}, {steps}{held_out}{run})"


def train(
    model: str | nn.Module = "gradresnet18",
    dataset: Any = "digits",
    objective: str | None = None,
    *,
    validation: Any = None,
    test: Any = None,
    image: Column | None = None,
    label: Column | None = None,
    class_names: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    recipe: str | None = None,
    epochs: float | None = None,
    callbacks: Sequence[Any] = (),
    on_step: Callable[[Trainer], None] | None = None,
    on_validation: Callable[[Trainer, dict[str, Any]], None] | None = None,
    on_end: Callable[[Trainer], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> TrainingResult:
    """Train a model; with the same data and settings, it gets the same weights as ``ebmkit train``.

    Args:
        model: name of a backbone or denoiser, or ``timm:NAME``; a backbone, which is a module that
            maps images (B, C, H, W) to `ebmkit.models.Features` or to features (B, K); or a model
            of ebmkit, which is trained further from its weights, in place.
        dataset: a name from `ebmkit list datasets`; the path of an image folder or HDF5 file; a
            data set of PyTorch, torchvision or Hugging Face; an iterable of items, of which the
            first ``limit`` are read into memory; a pair (images, labels) of tensors or arrays; or
            an `ImageSet` (see `ebmkit.data.convert` for items and values). 2 % of the images, at
            most 1000, are held out.
        objective: objectives joined by +, for example ce+0.5*dsm. Default: that of the recipe.
        validation: held-out images, as for ``dataset``; then none of ``dataset`` are held out.
        test: test images, which are only stored in the run folder, for `ebmkit evaluate`.
        image, label: columns of the items with image and label. Default: found by type or name.
        class_names: one name per class, in label order. Default: those of the data set.
        out: run folder to create, which `ebmkit evaluate` and `ebmkit train --resume` can use.
            Images given as Python objects are stored in it as ``data.h5`` if they are in memory.
            None: nothing is saved.
        resume: resume the run in ``out``.
        recipe: name of a recipe. Default: that of the data set; for own data that of ``hdf5``.
        epochs: length of the run in passes over the training images, in place of ``steps``.
        callbacks: objects with methods of `ebmkit.training.Callback`, or names of loggers:
            "tensorboard" and "csv", which write into the run folder, and "wandb".
        on_step: called with the trainer after each step.
        on_validation: called with the trainer and the metrics of each validation.
        on_end: called with the trainer at the end. All three may call ``trainer.stop()``.
        progress: say what is trained, and show a progress bar; lines of text if it can not be
            drawn.
        **options: fields of `ebmkit.training.TrainConfig`, such as ``steps=500``, ``seed=1`` or
            ``optimizer={"lr": 1e-3}``, with dots as in ``**{"streams.denoise.noise.max": 0.2}``, or
            one of ``width``, ``lr``, ``batch_size`` (of every stream), ``ema``, ``data_dir``,
            ``image_size``, ``limit``, ``workers``, ``precision``, ``compile``.

    Raises:
        UserError: if the data, the model and the settings do not fit together.
        Interrupted: on Ctrl-C, after saving to ``out``.

    >>> images, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 4
    >>> result = ebmkit.train("gradresnet18", dataset=(images, labels), steps=50)  # doctest: +SKIP
    """
    callbacks = [
        find("logger", LOGGERS, own)() if isinstance(own, str) else own for own in callbacks
    ]
    for own in callbacks:
        if isinstance(own, type) or not any(hasattr(own, name) for name in CALLBACK_METHODS):
            raise UserError(
                f"{shown(own, 60)} is no callback: give an object with a method such as on_step, "
                f"or a name: {', '.join(LOGGERS)}"
            )
    check_options(options, inspect.signature(train).parameters)
    if epochs is not None and "steps" in options:
        raise UserError(f"epochs = {epochs:g} and steps exclude each other: give one")
    network = model if isinstance(model, nn.Module) else None
    known = network.card.class_names if isinstance(network, ScoreModel) and network.card else []
    given: Any = {"backbone": model} if network is None else _layer_of(network)
    given |= {"objective": objective} if objective is not None else {}
    layers = [given, layer_of(options)]
    columns = {"image": image, "label": label}
    with join() as world, ExitStack() as stack:
        sets: dict[str, AnyImages] = {}
        if isinstance(dataset, (str, os.PathLike)):
            name, path = find_source(dataset)
            layers.insert(1, layer_of({"dataset": name} | ({"data_dir": path} if path else {})))
            unused = {"validation": validation, "test": test, **columns}
            unused |= {"class_names": class_names or None}
            if wrong := [name for name, value in unused.items() if value is not None]:
                raise UserError(f"{wrong[0]} is for data given as objects, not as {dataset!r}")
            config = resolve(*layers, recipe=recipe)
        else:
            folder = {"data_dir": Path(out).absolute() / DATA} if out is not None else {}
            layers.insert(1, layer_of({"dataset": "hdf5", **folder}))
            config = resolve(*layers, recipe=recipe)
            reading: dict[str, Any] = {"image_size": config.dataset.image_size, **columns}
            reading |= {"progress": progress and world.first}
            limit = config.dataset.limit
            given_sets: dict[Split, Any] = {
                "train": dataset,
                "validation": validation,
                "test": test,
            }
            for split, source in given_sets.items():
                if source is not None:
                    like, names = sets.get("train"), class_names if split == "train" else ()
                    found = as_images(
                        source, split, like=like, class_names=names, limit=limit, **reading
                    )
                    if validation is not None and split != "test" and found is not source:
                        found = found.select(shuffled(len(found)))  # may be sorted by class
                    if split == "train" and {*found.class_names} <= {*known}:
                        found = found.with_classes(known)  # numbered as in the model
                    named = found.name if out is None else "hdf5"
                    sets[split] = replace(found, name=named, split=split)
        data = _training_data(sets, config) if sets else None
        run = None
        if resume:
            if out is None:
                raise UserError("resume=True needs the run folder: give out")
            run = RunFolder.open(Path(out)) if world.first else None
            if run is not None:
                config = resolve(run.config(), *layers)
                run.check_config(config)
                stack.enter_context(run.held())
        more: dict[str, Any] = {"data": data, "network": network, "epochs": epochs}
        trainer = assemble(config, run, (), progress, world, **more)
        if out is not None and run is None and world.first:  # data and model are legal
            trainer.run = run = RunFolder.create(Path(out), trainer.config)
            stack.enter_context(run.held())
            _store(sets, run)
        history: list[dict[str, Any]] = [] if run is None else run.metrics()
        functions = {"on_step": on_step, "on_validation": on_validation, "on_end": on_end}
        if world.first:
            bars = [TrainingBar()] if progress else []
            for sentence in trainer.sentences() if progress else ():
                console.say(sentence)
            trainer.callbacks = [SimpleNamespace(report=history.append), *bars, *callbacks,
                                 SimpleNamespace(**functions)]  # fmt: skip
        trained = trainer.fit()
        return TrainingResult(trained, history, trainer, None if out is None else Path(out))


def _layer_of(network: nn.Module) -> dict[str, Any]:
    """The configuration layer of a model or backbone: its settings, if it was built from some."""
    config = config_of(network) if isinstance(network, ScoreModel) else None
    if config is None:
        return {}
    own = config.model_dump(mode="json", exclude={"in_channels", "num_classes"})
    return {
        "backbone": preset_name(config.backbone),
        "head": config.head.kind,
        "model": own,
    }


def _training_data(
    sets: Mapping[str, AnyImages], config: TrainConfig
) -> tuple[AnyImages, AnyImages | None]:
    """Training and held-out images, the same that ``hdf5`` reads from a file of the ``sets``."""
    whole = sets["train"]
    if "validation" in sets:
        return whole, sets["validation"]

    def part(split: Any) -> AnyImages:
        request = DatasetRequest(whole.name, split, hold_out=config.dataset.hold_out)
        rows = split_rows(request, len(whole), f"data set {whole.name!r}")
        return replace(whole.select(rows), split=split)

    return part("train"), part("validation") if config.dataset.hold_out else None


def _store(sets: Mapping[str, AnyImages], run: RunFolder) -> None:
    """Write the ``sets`` to the run folder; warn if they are too large to be in memory."""
    import h5py

    if not sets:
        return
    if not all(isinstance(own, ImageSet) for own in sets.values()):
        warnings.warn(
            f"the images are too large to be stored in {str(run.path)!r}: to evaluate or resume "
            "the run on the command line, pack them into an HDF5 file and name it by --data-dir",
            stacklevel=3,
        )
        return
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        write_parts(file, sets)
    commit_files(run.path, {DATA: content.getvalue()})
