"""Rows as run folders: trained once, gone on with where they were, evaluated once.

::

    OUT/rows/joint/                      a run folder like any other: ebmkit evaluate OUT/rows/joint
    OUT/rows/joint/evaluation/table/     what the tables read: classify.json, denoise.json
    OUT/table1.md  table1.json  table1.png

A row is finished when its checkpoint and its model are of the last step, and a suite when its JSON
file is whole and says that it was measured as asked. Whatever is less is done again: a model that
is missing, damaged or of an earlier step is written again from the checkpoint; a run whose
configuration or checkpoint does not read is moved aside, to ``rows/joint.broken-1``, and trained
anew. A run of another configuration is never touched. A row that cannot be finished, because it
diverged, leaves its reason in ``rows/ROW.stopped.txt``, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebmkit.compute import pick_device
from ebmkit.data import AnyImages
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import evaluate
from ebmkit.experiments.keeping import Busy, Protocol, alone, fresh, holds, wanted_of, whole
from ebmkit.experiments.rows import Row
from ebmkit.experiments.scales import Scale
from ebmkit.models import load
from ebmkit.storage import write_atomically
from ebmkit.storage.reading import MIB, read_json, read_text
from ebmkit.training import DataConfig, RunFolder, TrainConfig, Trainer, resolve
from ebmkit.training.config import difference
from ebmkit.training.cost import format_seconds
from ebmkit.training.loop import assemble
from ebmkit.training.setup import Split, images_of

__all__ = ["Rows"]


def _just_fit(trainer: Trainer, name: str) -> None:
    trainer.fit()


Fit = Callable[[Trainer, str], None]
"""Trains what it is given (`Trainer.fit`), showing progress under a name."""

Tell = Callable[[str], None]
"""Told, in one sentence, of what is being done."""


@dataclass
class Rows:
    """The runs of a reproduction.

    Args:
        out: where everything goes.
        scale: how large.
        data_dir: where CIFAR-10 is, for scales that need it.
        imagenet_dir: where ImageNet is, for table 2 at full scale.
        device: as of `TrainConfig`.
        seed: of all runs.
        precision: of training; None: the scale's.
        fit: trains, showing progress.
        tell: told of what is being done.
        progress: whether evaluations show bars.
        stopped: rows that could not be finished, and why.
    """

    out: Path
    scale: Scale
    data_dir: Path | None = None
    device: str = "auto"
    seed: int = 0
    precision: str | None = None
    fit: Fit = _just_fit
    tell: Tell = lambda sentence: None
    progress: bool = False
    imagenet_dir: Path | None = None
    stopped: dict[str, str] = field(default_factory=dict)
    _test: dict[tuple[str, int | None], AnyImages] = field(default_factory=dict)

    def folder(self, row: Row) -> Path:
        """The run folder of ``row``."""
        return self.out / "rows" / row.folder

    def config(self, row: Row, family: str) -> TrainConfig:
        """The whole configuration of ``row``, which must be one with a run of its own."""
        given: dict[str, Any] = {"seed": self.seed, "device": self.device}
        data_dir = self.imagenet_dir if self._needs_imagenet(family) else self.data_dir
        if data_dir is not None:
            given["dataset"] = {"data_dir": data_dir.absolute()}
        if self.precision is not None:
            given["compute"] = {"precision": self.precision}
        layers = [self.scale.layer[family], self.scale.by_task.get(row.task, {}), row.layer]
        if self.scale.name == "full":
            layers.append(row.at_full)
        return resolve(*layers, given, recipe=self.scale.recipe[family])

    def command(self, target: str) -> str:
        """What was typed, with names for the folders of this machine."""
        words = ["ebmkit reproduce", target, "--scale", self.scale.name]
        words += ["--data-dir DIR"] if self.data_dir is not None else []
        words += ["--imagenet-dir DIR"] if self.imagenet_dir is not None else []
        words += ["--precision", self.precision] if self.precision is not None else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return " ".join(words)

    def _needs_imagenet(self, family: str) -> bool:
        return family == "imagenet" and self.scale.name == "full"

    def try_measure(self, row: Row, family: str, protocol: Protocol) -> None:
        """`measure`, or a note of why ``row`` cannot be finished, in `stopped`; others go on."""
        self._try(row, lambda: self.measure(row, family, protocol))

    def try_train(self, row: Row, family: str) -> bool:
        """`train`, or a note as of `try_measure`; whether it is trained."""
        return self._try(row, lambda: self.train(row, family))

    def _try(self, row: Row, what: Callable[[], object]) -> bool:
        note = self._note(row)
        note.unlink(missing_ok=True)
        try:
            what()
        except UserError as error:
            self.tell(f"{row.name}: stopped: {error}")
            self.stopped[row.name] = str(error)
            if note.parent.is_dir() and not isinstance(error, Busy):
                write_atomically(note, f"{error}\n".encode())
            return False
        return True

    def why_stopped(self, row: Row) -> str | None:
        """Why ``row`` could not be finished when it was last tried; None if it was not tried."""
        try:
            return read_text(self._note(row), MIB).strip()
        except UserError:
            return None

    def _note(self, row: Row) -> Path:
        folder = self.folder(row)
        return folder.with_name(f"{folder.name}.stopped.txt")

    def check(self, rows: Sequence[Row], family: str) -> None:
        """All mistakes first: whether data, models and memory suit every row not yet trained.

        Raises:
            UserError: if one does not, or a run folder holds another run.
        """
        if self._needs_imagenet(family) and self.imagenet_dir is None:
            raise UserError("table2 at full scale needs ImageNet: name its folder, --imagenet-dir")
        for row in rows:
            config = self.config(row, family)
            if self._state(row, config) == "finished":
                continue
            trainer = assemble(config)
            if self.scale.name == "smoke":
                continue
            try:
                trainer.budget.check()
            except UserError as error:
                smaller = "" if self.scale.name == "cpu" else "; or a smaller --scale"
                raise UserError(
                    f"row {row.name}, scale {self.scale.name}: {error}{smaller}"
                ) from None
            if self.scale.name == "full" and trainer.device.type == "cpu":
                seconds = trainer.budget.cost(config.steps).least_seconds
                self.tell(f"{row.name}: at least {format_seconds(seconds)} on this CPU")

    def train(self, row: Row, family: str) -> RunFolder:
        """The finished run of ``row``, trained now as far as it is not.

        Raises:
            Interrupted: if training was; calling again goes on.
            UserError: if it cannot be trained, or the folder holds another run.
        """
        config = self.config(row, family)
        folder = self.folder(row)
        if self._state(row, config) == "finished":
            return RunFolder.open(folder)
        with alone(folder):
            state = self._state(row, config)
            if state == "broken":
                aside = fresh(folder)
                self.tell(f"{folder} does not read: moved to {aside.name}, and trained anew")
                folder.rename(aside)
                state = "new"
            if state == "finished":
                return RunFolder.open(folder)
            run = RunFolder.create(folder, config) if state == "new" else RunFolder.open(folder)
            trainer = assemble(config, run)
            if trainer.step < config.steps:
                self.fit(trainer, row.name)
            trainer.save()
        return run

    def measure(self, row: Row, family: str, protocol: Protocol) -> dict[str, dict[str, Any]]:
        """What the suites of ``protocol`` find of ``row``, trained and measured now if need be.

        Returns:
            The documents by suite.
        """
        run = self.train(row, family)
        config = self.config(row, family)
        folder = run.path / "evaluation" / protocol.name
        model: ScoreModel | None = None
        images = self._images(config.dataset)
        found = {}
        for name in protocol.suites:
            wanted = wanted_of(name, protocol, len(images))
            document = whole(folder / f"{name}.json", wanted)
            if document is None:
                model = model or load(run.path, device=str(pick_device(self.device)))
                self.tell(f"{row.name}: measuring {name}")
                results = evaluate(
                    model,
                    images,
                    [name],
                    folder,
                    limit=protocol.images.get(name),
                    sigmas=protocol.sigmas,
                    noise_levels=protocol.noise_levels,
                    options={n: o for n, o in protocol.options.items() if n == name},
                    progress=self.progress,
                )
                document = results[name].document
            found[name] = document
        return found

    def finished(self, row: Row, family: str, protocol: Protocol) -> bool:
        """Whether ``row`` is trained and all suites of ``protocol`` are measured."""
        config = self.config(row, family)
        if self._state(row, config) != "finished":
            return False
        folder = self.folder(row) / "evaluation" / protocol.name
        images = self._images(config.dataset)
        return all(
            whole(folder / f"{name}.json", wanted_of(name, protocol, len(images))) is not None
            for name in protocol.suites
        )

    def facts(self, row: Row, family: str) -> dict[str, Any]:
        """How ``row`` was trained: seconds, steps, parameters, precision, machine, commit."""
        run = RunFolder.open(self.folder(row))
        state = run.load_checkpoint()
        assert state is not None
        config, own_config = self.config(row, family), resolve(run.config())
        own = read_json(run.path / "environment.json")
        names = ("git_commit", "torch", "gpu", "threads", "cores", "platform")
        return {
            "seconds": state.get("seconds"),
            "steps": state["step"],
            "parameters": sum(p.numel() for p in load(run.path).parameters()),
            "precision": state.get("precision", own_config.compute.precision),  # older: as asked
            "seed": config.seed,
            "lr": config.optimizer.lr,
            **{name: own.get(name) for name in names},
        }

    def _images(self, data: DataConfig) -> AnyImages:
        key = (data.name, data.image_size)
        if key not in self._test:
            self._test[key] = images_of(data, "test")
        return self._test[key]

    def trained(self, row: Row, family: str) -> bool:
        """Whether ``row`` is trained to its end.

        Raises:
            UserError: if the folder holds a run of another configuration.
        """
        return self._state(row, self.config(row, family)) == "finished"

    def images(self, row: Row, family: str, split: Split) -> AnyImages:
        """The images of ``split`` that ``row`` is trained or measured on."""
        data = self.config(row, family).dataset
        return self._images(data) if split == "test" else images_of(data, split)

    def _state(self, row: Row, config: TrainConfig) -> str:
        """``new``, ``begun``, ``finished`` or ``broken``.

        Raises:
            UserError: if the folder holds a run of another configuration.
        """
        folder = self.folder(row)
        if not folder.exists():
            return "new"
        try:
            run = RunFolder.open(folder)
            saved = resolve(run.config())
            checkpoint = run.load_checkpoint()
            environment = read_json(folder / "environment.json")
        except (UserError, OSError, ValueError):
            return "broken"
        if not isinstance(environment, dict):
            return "broken"
        found = difference(saved.model_dump(mode="json"), config.model_dump(mode="json"))
        if found is not None:
            key, old, new = found
            if not holds(run.config(), key):  # cut short
                return "broken"
            raise UserError(
                f"{str(folder)!r} holds row {row.folder!r} of another configuration: {key} was "
                f"{old!r} and would be {new!r}; choose another --out, or move that folder away"
            )
        if checkpoint is None or checkpoint["step"] < config.steps:
            return "begun"
        try:
            card = load(folder).card
        except UserError:
            return "begun"  # the checkpoint has it all: the model is written again
        saved_all = card is not None and card.steps == checkpoint["step"]
        return "finished" if saved_all else "begun"
