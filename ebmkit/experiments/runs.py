"""Run folders of experiment variants: training, resume and evaluation, at several scales.

A variant has the fields in which its configuration differs from that of its scale, and the paper's
values. Variants with the same configuration share a run: "joint" of table 1 is the first row of
table 3, and is trained once.

========= ============================== ================== =============================
scale     data                           network            training of a variant
========= ============================== ================== =============================
smoke     scikit-learn's digits, 8x8     width 8            60 steps: seconds
cpu       CIFAR-10                       width 16           400 steps of our short recipe
cpu-cdn   CIFAR-10                       width 16           400 steps, the paper's settings
full      CIFAR-10 (table 2: ImageNet)   width 64           the published recipes, on a GPU
========= ============================== ================== =============================

The configuration of a variant is one complete recipe (``ebmkit list recipes``) and the fields that
differ from it, which the scale, the kind of variant and the variant itself list; nothing else is
inherited. ``ebmkit reproduce TARGET --scale SCALE --show`` prints both for every row.

::

    OUT/rows/joint/                      a run folder like any other: ebmkit evaluate OUT/rows/joint
    OUT/rows/joint/evaluation/table/     input of the tables: classify.json, denoise.json
    OUT/rows/joint/facts.json            seconds, steps, parameters and precision of training
    OUT/rows/joint-seed-1/               the same row with seed 1
    OUT/table1.md  table1.json  table1.png

A variant is finished if its checkpoint and its model are of the last step, a suite if its JSON file
is complete and has the requested settings. Everything else is repeated: a model that is missing,
damaged or of an earlier step is rewritten from the checkpoint; a run whose configuration or
checkpoint is unreadable is moved to ``rows/joint.broken-1`` and trained again. A run of another
configuration is never changed. If a variant cannot be finished, for example because it diverged,
the reason is in ``rows/NAME.stopped.txt``, and the other variants continue.

A folder with only ``config.yaml``, ``environment.json``, ``facts.json`` and ``evaluation/`` holds
the results of a finished variant. Reports use them, so a table can be written again or extended by
seeds without its networks (``benchmarks/row_results.py`` copies such folders).

Several processes, on several machines with shared storage, may work in one folder: each claims the
variant that it trains and evaluates (``rows/NAME.claim``, see `ebmkit.storage.claims`).
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor

from ebmkit.compute import pick_device
from ebmkit.data import AnyImages
from ebmkit.errors import UserError
from ebmkit.evaluation import SIGMAS, SUITES, evaluate, parse_options, read_image_values
from ebmkit.experiments.seeds import format_seeds
from ebmkit.models import load
from ebmkit.storage import Claim, FolderLocked, make_folder, write_atomically
from ebmkit.storage.reading import MIB, read_document, read_json, read_text
from ebmkit.training import RunFolder, TrainConfig, Trainer, resolve
from ebmkit.training.config import current_names, difference, differences, flat, merge
from ebmkit.training.cost import format_seconds
from ebmkit.training.loop import assemble
from ebmkit.training.setup import Split, images_of

REPORTED = {
    "classify": ("accuracy", "accuracy_interval"),
    "denoise": ("denoisers", "knows_sigma"),
    "calibration": ("ece",),
    "robustness": ("curves", "epsilons", "options"),
    "robustness-grid": ("columns", "epsilons"),
    "linearity": ("levels",),
    "jacobian": ("per_image", "paper"),
}
"""By suite, the fields of its document that reports use."""


@dataclass(frozen=True)
class ExperimentScale:
    """Settings that all variants of an experiment share."""

    name: str
    description: str
    size: str  # key of budgets that are no training settings: smoke, cpu or full
    recipe: Mapping[str, str]  # by family of variants (cifar10, imagenet, guidance)
    layer: Mapping[str, Mapping[str, Any]]  # by family, fields that differ from its recipe
    images: Mapping[str, int] = field(default_factory=dict)  # by suite, max. test images
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by task, further ones
    recipe_of_task: Mapping[str, str] = field(default_factory=dict)  # by task, over the family's
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of suites, for figures
    threads: int | None = None  # maximum number of CPU threads; None: all

    def recipe_of(self, variant: Variant) -> str:
        """Name of the recipe of ``variant``."""
        return self.recipe_of_task.get(variant.task, self.recipe[variant.family])

    def differences(self, variant: Variant) -> dict[str, Any]:
        """The fields of ``variant`` that differ from its recipe (nested as in `TrainConfig`)."""
        shared = self.recipe_of(variant) == self.recipe[variant.family]
        scale = (self.layer[variant.family] if shared else {}, self.by_task.get(variant.task, {}))
        return merge(*scale, variant.layer, variant.at.get(self.name, {}))


def read_data(name: str) -> Any:
    """Read a YAML file of this package."""
    text = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


SCALES: dict[str, ExperimentScale] = {
    name: ExperimentScale(name, **fields)
    for name, fields in read_data("scales.yaml")["scales"].items()
}


@dataclass(frozen=True)
class Variant:
    """One configuration of an experiment.

    Attributes:
        name: name for ``--only``, and of the run's folder if ``run`` is None.
        label: description in reports.
        task: classification, denoising or joint; or another key of `ExperimentScale.by_task`.
        layer: fields that differ from the recipe (nested fields of `TrainConfig`).
        paper: the paper's values, by `ebmkit.experiments.tables.METRICS`; may be empty.
        run: variant whose run this one uses; None: its own run.
        reads: denoiser of the suite ``denoise`` whose PSNR is reported.
        at: further fields that differ from the recipe, by scale.
        family: group of the scale's settings for training: cifar10, imagenet or guidance.
        only_at: sizes of the scales that have this row (`ExperimentScale.size`); empty: all.
    """

    name: str
    label: str
    task: str
    layer: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    run: Variant | None = None
    reads: str = "unconditional"
    at: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    family: str = "cifar10"
    only_at: tuple[str, ...] = ()

    @property
    def shown_task(self) -> str:
        """The task in reports: classification, denoising or joint (JEM is joint)."""
        return "joint" if self.task == "jem" else self.task

    @property
    def folder(self) -> str:
        """The run's folder below ``rows``; guidance has its own, as its names are not unique."""
        if self.run is not None:
            return self.run.folder
        return f"guidance/{self.name}" if self.family == "guidance" else self.name


@dataclass(frozen=True)
class Protocol:
    """Evaluation settings of a variant."""

    name: str  # name of the folder of results
    suites: tuple[str, ...]
    sigmas: tuple[float, ...] = SIGMAS  # levels of the suite ``denoise``, image units
    images: Mapping[str, int] = field(default_factory=dict)  # by suite, max. test images
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by suite
    image_values: tuple[str, ...] = ()  # suites whose values by image are needed

    def load_document(self, folder: Path, suite: str, of: int) -> dict[str, Any] | None:
        """The document of ``suite`` on ``of`` images, if complete and with these settings."""
        expected: dict[str, Any] = {"suite": suite, "of": of, "seed": 0}
        sigmas = {"denoise": list(self.sigmas), "classify": [0.0]}
        if suite in sigmas:
            expected["sigmas"] = sigmas[suite]
        kind = SUITES[suite].options
        document = read_document(folder / f"{suite}.json")
        if kind is not None:
            given = parse_options({suite: self.options.get(suite, {})}, [suite])[kind]
            expected["options"] = given.model_dump(mode="json")
            document.setdefault("options", kind().model_dump(mode="json"))  # it had no settings yet
        if kind is None or "images" not in kind.model_fields:  # the number is no setting
            expected["images"] = min(of, self.images.get(suite, of))
        complete = all(document.get(k) is not None for k in REPORTED.get(suite, ()))
        return document if complete and expected.items() <= document.items() else None


T = TypeVar("T")

FACTS = "facts.json"
"""File with the facts of training that reports show."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between attempts to claim work of other processes; each pause doubles the last."""

NOTICE = 300.0
"""Seconds between messages of a waiting process."""


@dataclass
class ExperimentRuns:
    """The runs of all experiments in the folder ``out``, on ``device``, one per row and seed.

    Methods for one run, such as `folder` and `train`, use the first of ``seeds``; `each_seed` has
    the runs of every seed.

    Args:
        scale: scale of the experiments.
        data_dir: folder of CIFAR-10, for scales that need it.
        precision: training precision; None: the scale's.
        fit: function that trains (`Trainer.fit`) and shows progress under a name.
        log: function called with a sentence about the current work.
        progress: show progress of evaluations and sampling.
        imagenet_dir: folder of ImageNet, for table 2 at full scale.
        inception: file of the Inception weights, for FID; None: those in PyTorch's cache, if any.
        waits: whether `share` waits for the work of other processes.
        stopped: variants that could not be finished, with the reasons.
    """

    out: Path
    scale: ExperimentScale
    data_dir: Path | None = None
    device: str = "auto"
    seeds: tuple[int, ...] = (0,)
    precision: str | None = None
    fit: Callable[[Trainer, str], object] = lambda trainer, name: trainer.fit()
    log: Callable[[str], None] = lambda sentence: None
    progress: bool = False
    imagenet_dir: Path | None = None
    inception: Path | None = None
    waits: bool = True
    stopped: dict[str, str] = field(default_factory=dict)
    _test: dict[tuple[str, int | None], AnyImages] = field(default_factory=dict)
    _claims: dict[Path, Claim] = field(default_factory=dict)
    _old_notes: dict[Path, int | None] | None = None  # times of failures of earlier commands

    def __post_init__(self) -> None:
        if self._old_notes is None:
            every = itertools.chain.from_iterable(
                self.out.glob(pattern) for pattern in ("rows/*.stopped.txt", "rows/*/*.stopped.txt")
            )
            self._old_notes = {path: _modified(path) for path in every}

    @property
    def seed(self) -> int:
        """The first seed."""
        return self.seeds[0]

    def at(self, seed: int) -> ExperimentRuns:
        """The runs of ``seed`` alone; ``stopped`` is shared."""
        return replace(self, seeds=(seed,))

    def each_seed(self) -> list[ExperimentRuns]:
        """The runs of each seed, in the order of ``seeds``."""
        return [self.at(seed) for seed in self.seeds]

    def folder(self, variant: Variant) -> Path:
        """The run folder of ``variant``: ``rows/NAME`` for seed 0, else ``rows/NAME-seed-SEED``.

        Earlier versions used ``rows/NAME`` for any seed: it belongs to the seed of its run.
        """
        folder = self.out / "rows" / variant.folder
        own = self.seed == _seed_of(folder)
        return folder if own else folder.with_name(f"{folder.name}-seed-{self.seed}")

    def config(self, variant: Variant) -> TrainConfig:
        """The resolved configuration of ``variant``, which must have its own run."""
        given: dict[str, Any] = {"seed": self.seed, "device": self.device}
        data_dir = self.imagenet_dir if self._needs_imagenet(variant) else self.data_dir
        if data_dir is not None:
            given["dataset"] = {"data_dir": data_dir.absolute()}
        if self.precision is not None:
            given["compute"] = {"precision": self.precision}
        recipe = self.scale.recipe_of(variant)
        return resolve(self.scale.differences(variant), given, recipe=recipe)

    def differences(self, variant: Variant) -> dict[str, tuple[Any, Any]]:
        """Fields in which ``variant`` differs from its recipe: name -> (the recipe's, its own).

        Settings that follow from the name of a backbone or head are left out, and so are fields
        that change no result (`ebmkit.training.config.FREE_TO_CHANGE`) and the seed.
        """
        recipe = resolve(recipe=self.scale.recipe_of(variant))
        found = differences(*(c.model_dump(mode="json") for c in (recipe, self.config(variant))))
        listed = flat(self.scale.differences(variant)).keys()
        implied = [f"model.{part}." for part in ("backbone", "head") if part in listed]
        return {
            key: pair
            for key, pair in found.items()
            if key != "seed" and (key in listed or not key.startswith(tuple(implied)))
        }

    def distinct(self, variants: Sequence[Variant]) -> list[Variant]:
        """The ``variants`` of this scale, without those whose configuration an earlier one has."""
        found: list[Variant] = []
        seen: list[TrainConfig] = []
        for variant in variants:
            if variant.only_at and self.scale.size not in variant.only_at:
                continue
            if variant.run is None:
                config = self.config(variant)
                if config in seen:
                    continue
                seen.append(config)
            found.append(variant)
        return found

    def command(self, target: str) -> str:
        """The command line of ``target``, with placeholders for folders."""
        words = ["ebmkit reproduce", target, "--scale", self.scale.name]
        words += ["--data-dir DIR"] if self.data_dir is not None else []
        words += ["--imagenet-dir DIR"] if self.imagenet_dir is not None else []
        words += ["--precision", self.precision] if self.precision is not None else []
        words += ["--seeds", format_seeds(self.seeds)] if self.seeds != (0,) else []
        return " ".join(words)

    def _needs_imagenet(self, variant: Variant) -> bool:
        return variant.family == "imagenet" and self.scale.size == "full"

    @contextmanager
    def claimed(self, path: Path) -> Iterator[None]:
        """Claim the work on ``path``, for example a run folder, for this process.

        Raises:
            FolderLocked: if another process works on it; see `share`.
        """
        make_folder(path.parent)
        claim = self._claims.setdefault(path, Claim(path))
        with claim.held():
            yield

    def share(self, work: Iterable[tuple[str, Callable[[], T]]]) -> dict[str, T]:
        """Do all of ``work`` (name, function), together with other processes that do the same.

        What another process works on (the function raises `FolderLocked`) is tried again after the
        rest, until that process has finished it or died. So a function should only read its result
        if that is finished. Without `waits`, all functions are tried once.

        Returns:
            What the functions return, by name.

        Raises:
            FolderLocked: without `waits`, if other processes work on some of it.
        """
        left, found = list(work), dict[str, T]()
        pause, start_time, last_notice = FIRST_PAUSE, time.monotonic(), -math.inf
        while True:
            taken: list[tuple[str, Callable[[], T]]] = []
            reason: FolderLocked | None = None
            for name, function in left:
                try:
                    found[name] = function()
                except FolderLocked as error:
                    taken.append((name, function))
                    reason = error
            if reason is None:
                return found
            if not self.waits:
                raise reason
            pause = FIRST_PAUSE if len(taken) < len(left) else min(2 * pause, LONGEST_PAUSE)
            left, now = taken, time.monotonic()
            if now >= last_notice + NOTICE:
                names = ", ".join(name for name, _ in taken)
                since = f" since {format_seconds(now - start_time)}" if last_notice > 0 else ""
                self.log(f"waiting{since} for {names}: {reason}")
                last_notice = now
            time.sleep(pause)

    def try_run(self, variant: Variant, protocol: Protocol | None) -> None:
        """`measure`, or without a protocol `train`; the reason of a failure goes to `stopped`.

        What failed since this object was made, also in another process, is not tried again.

        Raises:
            FolderLocked: if another process works on ``variant``.
        """
        note = self._note(variant)
        with self.claimed(self.folder(variant)):
            name = self.named(variant)
            if _modified(note) not in (None, (self._old_notes or {}).get(note)):
                self.stopped[name] = self.stop_reason(variant) or "for an unknown reason"
                return
            note.unlink(missing_ok=True)
            try:
                if protocol is None:
                    self.train(variant)
                else:
                    self.measure(variant, protocol)
            except FolderLocked:
                raise
            except UserError as error:
                self.log(f"{name}: stopped: {error}")
                self.stopped[name] = str(error)
                write_atomically(note, f"{error}\n".encode())

    def stop_reason(self, variant: Variant) -> str | None:
        """Why the last attempt to finish ``variant`` failed; None if it did not fail."""
        try:
            return read_text(self._note(variant), MIB).strip()
        except UserError:
            return None

    def named(self, variant: Variant) -> str:
        """Name of the run of ``variant`` in messages."""
        return f"{variant.name}, seed {self.seed}" if self.seed else variant.name

    def _note(self, variant: Variant) -> Path:
        folder = self.folder(variant)
        return folder.with_name(f"{folder.name}.stopped.txt")

    def check(self, variants: Sequence[Variant]) -> None:
        """Check data, models and memory for all variants with unfinished runs, before training any.

        Raises:
            UserError: if a check fails, or a run folder holds another run.
        """
        for variant in variants:
            if self._needs_imagenet(variant) and self.imagenet_dir is None:
                raise UserError(
                    "table2 at full scale needs ImageNet: give its folder with --imagenet-dir"
                )
            config = self.config(variant)
            states = [runs._state(variant, runs.config(variant)) for runs in self.each_seed()]
            if set(states) == {"finished"}:
                continue
            trainer = assemble(config)
            if self.scale.size == "smoke":
                continue
            try:
                trainer.budget.check()
            except UserError as error:
                smaller = "" if self.scale.size == "cpu" else "; or a smaller --scale"
                where = f"row {variant.name}, scale {self.scale.name}"
                raise UserError(f"{where}: {error}{smaller}") from None
            if self.scale.size == "full" and trainer.device.type == "cpu":
                seconds = trainer.budget.cost(config.steps).least_seconds
                self.log(f"{variant.name}: at least {format_seconds(seconds)} on this CPU")

    def train(self, variant: Variant) -> RunFolder:
        """Train ``variant`` as far as it is not finished; return its run.

        Raises:
            FolderLocked: if another process works on it.
            Interrupted: if training is interrupted; the same call resumes it.
            UserError: if it cannot be trained, or the folder holds another run.
        """
        config, folder = self.config(variant), self.folder(variant)
        if self._state(variant, config) == "finished":
            return RunFolder.open(folder)
        with self.claimed(folder):
            state = self._state(variant, config)
            if state == "broken":
                names = (f"{folder.name}.broken-{number}" for number in itertools.count(1))
                aside = next(p for name in names if not (p := folder.with_name(name)).exists())
                self.log(f"{folder} cannot be read: moved to {aside.name} and trained again")
                folder.rename(aside)
                state = "new"
            if state == "finished":
                return RunFolder.open(folder)
            run = RunFolder.create(folder, config) if state == "new" else RunFolder.open(folder)
            trainer = assemble(config, run)
            if trainer.step < config.steps:
                self.fit(trainer, self.named(variant))
            trainer.save()
        return run

    def measure(self, variant: Variant, protocol: Protocol) -> dict[str, dict[str, Any]]:
        """Train and evaluate ``variant`` if needed; return its documents by suite.

        A suite is also repeated if its values by image are needed and missing.

        Raises:
            FolderLocked, Interrupted, UserError: as `train`.
        """
        with self.claimed(self.folder(variant)):
            return self._measure(variant, protocol)

    def _measure(self, variant: Variant, protocol: Protocol) -> dict[str, dict[str, Any]]:
        run = self.train(variant)
        found, model = self._documents(variant, protocol), None
        values = self.image_values(variant, protocol, found)
        incomplete = [n for n, d in found.items() if d is None or values.get(n) == {}]
        for suite in incomplete:
            model = model or load(run.path, device=str(pick_device(self.device)))
            self.log(f"{self.named(variant)}: measuring {suite}")
            results = evaluate(
                model,
                self.images(variant, "test"),
                [suite],
                run.path / "evaluation" / protocol.name,
                limit=protocol.images.get(suite),
                sigmas=protocol.sigmas,
                noise_levels=(0.0,),
                options={n: o for n, o in protocol.options.items() if n == suite},
                image_values=suite in protocol.image_values,
                progress=self.progress,
            )
            found[suite] = results[suite].document
        return found

    def measured(self, variant: Variant, protocol: Protocol | None) -> dict[str, Any] | None:
        """The documents of ``variant`` by suite if it is trained and evaluated, else None.

        Raises:
            UserError: if the folder holds a run of another configuration.
        """
        if self._state(variant, self.config(variant)) != "finished":
            return None
        found = self._documents(variant, protocol) if protocol else {}
        return None if None in found.values() else found

    def image_values(
        self, variant: Variant, protocol: Protocol, documents: Mapping[str, Any]
    ) -> dict[str, dict[str, Tensor]]:
        """`read_image_values` of ``documents``, for the suites whose values ``protocol`` needs."""
        folder = self.folder(variant) / "evaluation" / protocol.name
        chosen = {n: d for n, d in documents.items() if d and n in protocol.image_values}
        return {suite: read_image_values(found, folder) for suite, found in chosen.items()}

    def _documents(self, variant: Variant, protocol: Protocol) -> dict[str, Any]:
        """The complete documents by suite; None for incomplete ones."""
        folder = self.folder(variant) / "evaluation" / protocol.name
        count = len(self.images(variant, "test"))
        return {suite: protocol.load_document(folder, suite, count) for suite in protocol.suites}

    def facts(self, variant: Variant) -> dict[str, Any]:
        """Facts about training: seconds, steps, parameters, precision, machine, commit."""
        run = RunFolder.open(self.folder(variant))
        config, own_config = self.config(variant), resolve(run.config())
        stored, state = run.path / FACTS, run.load_checkpoint()
        if state is not None:
            trained = {
                "seconds": state.get("seconds"),
                "steps": state["step"],
                "parameters": sum(p.numel() for p in load(run.path).parameters()),
                "precision": state.get("precision", own_config.compute.precision),  # older: as set
            }
            if read_document(stored) != trained:
                write_atomically(stored, json.dumps(trained, indent=2).encode())
        own = read_json(run.path / "environment.json")
        names = ("git_commit", "torch", "gpu", "threads", "cores", "platform")
        return {
            "recipe": self.scale.recipe_of(variant),
            "differences": self.differences(variant),
            **read_json(stored),
            "seed": config.seed,
            "lr": config.optimizer.lr,
            **{name: own.get(name) for name in names},
        }

    def images(self, variant: Variant, split: Split) -> AnyImages:
        """The images of ``split`` for training or evaluation of ``variant``."""
        data = self.config(variant).dataset
        if split != "test":
            return images_of(data, split)
        key = (data.name, data.image_size)
        if key not in self._test:
            self._test[key] = images_of(data, "test")
        return self._test[key]

    def _state(self, variant: Variant, config: TrainConfig) -> str:
        """State of the run: ``new``, ``begun``, ``finished`` or ``broken``.

        Raises:
            UserError: if the folder holds a run of another configuration.
        """
        folder = self.folder(variant)
        if not folder.exists():
            return "new"
        try:
            run = RunFolder.open(folder)
            saved = resolve(run.config())
            checkpoint = run.load_checkpoint()
        except (UserError, OSError, ValueError):
            return "broken"
        if not read_document(folder / "environment.json"):
            return "broken"
        found = difference(saved.model_dump(mode="json"), config.model_dump(mode="json"))
        if found is not None:
            key, old, new = found
            if not _has_field(current_names(run.config()), key):  # truncated
                return "broken"
            raise UserError(
                f"{str(folder)!r} holds row {variant.folder!r} of another configuration: {key} was "
                f"{old!r} and would be {new!r}; choose another --out, or move that folder away"
            )
        if checkpoint is None and read_document(folder / FACTS).get("steps") == config.steps:
            return "finished"  # only its results are here
        if checkpoint is None or checkpoint["step"] < config.steps:
            return "begun"
        try:
            card = load(folder).card
        except UserError:
            return "begun"  # the model can be rewritten from the checkpoint
        return "finished" if card is not None and card.steps == checkpoint["step"] else "begun"


def _seed_of(folder: Path) -> int:
    """The seed of the run in ``folder``; 0 if there is none, or it cannot be read."""
    try:
        return int(RunFolder.open(folder).config()["seed"])
    except (UserError, OSError, LookupError, ValueError, TypeError):
        return 0


def _modified(path: Path) -> int | None:
    """Time of the last change of a file, in ns; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _has_field(values: Any, key: str) -> bool:
    """Whether nested ``values`` have the field ``key``, written with dots."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
