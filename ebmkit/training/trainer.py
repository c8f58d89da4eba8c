r"""The training loop.

One step draws a batch from each stream, takes the gradient of the sum of the objectives
(`ebmkit.objectives.TrainingLoss`) and moves the parameters by AdamW with the rate

.. math:: \eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T)) .

Everything drawn is a function of (seed, stream, step), and dropout also of the process, so a run
continued from a checkpoint does the same arithmetic as one that was never stopped: on a CPU the
bits are equal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch.nn.modules.dropout import _DropoutNd

from ebmkit.compute import describe, pick_device
from ebmkit.data import AnyImages, Batch, ImageSet
from ebmkit.data.loading import told_of_readers
from ebmkit.data.schedule import images_between, stage_at, stages
from ebmkit.data.streams import prefetched
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.models import ModelConfig
from ebmkit.models.saving import model_files
from ebmkit.objectives.likelihood import Negatives
from ebmkit.parallel import DistributedContext, device_of_rank
from ebmkit.randomness import keyed_seed
from ebmkit.training.best import Best
from ebmkit.training.checkpoint_state import parts_of, restore_parts
from ebmkit.training.checks import check_compiled, check_learnt, check_terms
from ebmkit.training.config import TrainConfig
from ebmkit.training.engine import OutOfMemory, StepStats, TrainingStep, translate_out_of_memory
from ebmkit.training.nonfinite import stopped
from ebmkit.training.optim import learning_rate, make_optimizer
from ebmkit.training.parts import (
    make_average,
    make_budget,
    make_card,
    make_loss,
    make_preparations,
    make_stream,
    stream_config,
)
from ebmkit.training.rollback import Recovery
from ebmkit.training.run_stats import RunStats, Stopwatch, peak_memory
from ebmkit.training.runs import RunFolder
from ebmkit.training.sharpness import Sharpness
from ebmkit.training.skipped import SkippedSamples
from ebmkit.training.stopping import Interrupted, stop_requested
from ebmkit.training.validation import Validation

__all__ = ["Reporter", "Trainer"]


class Reporter(Protocol):
    """Who is told how training goes (a progress bar, TensorBoard)."""

    def report(self, row: dict[str, Any]) -> None: ...


@dataclass
class Trainer:
    """Trains a model; `fit` does it.

    Args:
        model: any `ScoreModel`; of `config.model` if the command line built it.
        config: the resolved configuration.
        train: training images.
        validation: held-out images; None: no validation.
        run: where to save; None: nowhere.
        built_from: what builds the model, for ``model.json``; None for one composed by hand.
        reporter: who is told of each row of metrics.
        world: the processes that train together. Only the first should have a run and a reporter.

    Raises:
        UserError: if the images do not suit model or objective, the batches do not divide among
            processes and parts, or the device cannot compute as asked.
    """

    model: ScoreModel
    config: TrainConfig
    train: AnyImages
    validation: AnyImages | None = None
    run: RunFolder | None = None
    built_from: ModelConfig | None = None
    reporter: Reporter | None = None
    world: DistributedContext = field(default_factory=DistributedContext)

    def __post_init__(self) -> None:
        config = self.config
        self.device = device_of_rank(pick_device(config.device))
        self.model.to(self.device)
        self.loss = make_loss(self.model, config).to(self.device)
        check_terms(self.loss, config, self.train)
        if isinstance(self.train, ImageSet):
            self.train = self.train.to(self.device)  # once, for all streams
        if isinstance(self.validation, ImageSet):
            self.validation = self.validation.to(self.device)
        names, world = self.loss.streams, self.world
        self.streams = {n: make_stream(config, n, self.train, self.device, world) for n in names}
        self.left_out = SkippedSamples(self.train, self.streams, world)
        self.stages = stages({n: stream_config(config, n) for n in names}, config.steps)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.average = make_average(self.model, config)
        self.update = TrainingStep(
            self.loss,
            self.optimizer,
            config.compute,
            config.optimizer.clip_norm,
            self.average,
            world,
            sharpness=Sharpness.of(config.optimizer),
        )
        if self.update.compiled:
            check_compiled(self.stages)
        self.watch = Stopwatch()
        self.budget = make_budget(
            self.loss, config, self.stages, self.train, world, self.built_from
        )
        self.step = self.first_step = 0
        self.begun, self.seconds_before = time.perf_counter(), 0.0
        self.best = Best()
        self.card = make_card(self.loss, config, self.train)
        self.model.card = self.trained.card = self.card
        self.recovery, self.drawn = None, dict[str, Batch]()
        self.preparations = make_preparations(self.loss, config, self.train, self.update, world)
        chains = [p for p in self.preparations.values() if isinstance(p, Negatives)]
        if len(chains) > 1:
            terms = [n for n, p in self.preparations.items() if isinstance(p, Negatives)]
            raise UserError(
                f"objectives {' and '.join(terms)} need negatives of different densities: choose "
                "one of them"
            )
        if chains:
            self.recovery = Recovery(self, chains[0])
        told = make_loss(self.model, config, training=False)
        laws = {name: stream_config(config, name) for name in told.streams}
        classifies = self.card.classifies
        self.measure = Validation.of(told, self.validation, laws, classifies, self.device, world)
        dropouts = [m for m in self.model.modules() if isinstance(m, _DropoutNd)]
        self.drops = any(dropout.p > 0 for dropout in dropouts)

    def fit(self) -> ScoreModel:
        """Train from the present step to ``config.steps``; the model, in evaluation mode.

        Raises:
            Interrupted: on Ctrl-C or a request to terminate, after saving.
            UserError: if a loss is not finite (before the update it would have spoilt), or the
                disk is full.
        """
        config = self.config
        batches = self.batches(self.step, config.steps)
        ends = {stage.stop for stage in self.stages}
        self.first_step = self.step
        self.begun = time.perf_counter()
        self.watch.restart()
        self.model.train()
        holding = nullcontext() if self.run is None else self.run.held()
        with told_of_readers(self._where_saved), holding, stop_requested() as stop:
            while self.step < config.steps:
                self._advance(batches, stop())
                due = [
                    self.step % every == 0 or self.step == config.steps
                    for every in (config.log_every, config.validate_every, config.checkpoint_every)
                ]
                due[0] = due[0] or self.step in ends  # so that no speed is of two stages
                alone = self.world.size == 1  # several agree on where to stop by reading
                if self.recovery is not None and self.recovery.look(self.update.read()):
                    batches = self.batches(self.step, config.steps)
                    self.watch.restart()
                    continue
                if self.device.type != "cpu" and not any(due) and not (alone and stop()):
                    continue  # reading would make the host wait for the device
                reading = self._read()
                if due[0]:
                    self._log_step(reading)
                if due[1]:
                    self._validate()
                asked = stop() if alone else reading.asked_to_stop
                if due[2] or asked:
                    self.left_out.look()  # here, where all processes come by
                    self.save()
                if due[1] or due[2]:
                    self.watch.restart()
                if asked:
                    raise Interrupted(self.step, stop.signal)
        return self.trained.eval()

    @property
    def seconds(self) -> float:
        """Time spent in `fit` so far, that of earlier processes up to their checkpoints included;
        validations and checkpoints count."""
        return self.seconds_before + time.perf_counter() - self.begun

    def try_steps(self, count: int) -> None:
        """Take ``count`` steps of each stage for the time they take, up to its length.

        The trainer is of no use afterwards, but for its watch, which then tells of the whole run.
        """
        self.model.train()
        for number, stage in enumerate(self.stages):
            self.step = stage.start
            stop = min(stage.start + count, stage.stop)
            batches = self.batches(stage.start, stop)
            with told_of_readers():
                while self.step < stop:
                    self._advance(batches, False)
                    self._read()
                    self.watch.stop(number)
        self.watch.lengths = {n: stage.stop - stage.start for n, stage in enumerate(self.stages)}

    @staticmethod
    def clock() -> float:
        """Now, in seconds; what `begun` is set from."""
        return time.perf_counter()

    @property
    def trained(self) -> ScoreModel:
        """The model to use: the averaged one, where averaging is on."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, ScoreModel)
        return averaged

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as tensors and plain values."""
        watch = self.recovery.state() if self.recovery else None
        return {**parts_of(self), "watch": watch}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint: a `state`, and the replay buffer where there is one.

        Raises:
            UserError: if it is of another run.
        """
        restore_parts(self, state)
        if self.step > self.config.steps:
            raise UserError(
                f"the checkpoint is of step {self.step}, and this run has {self.config.steps}"
            )
        if self.recovery is not None:
            self.recovery.restore(state.get("watch"), state.get("buffer"))
        if self.run is not None:
            self.run.forget_after(self.step)
            self.best.restore(self.run)

    def save(self, gone_back: tuple[int, dict[str, Any]] | None = None) -> None:
        """Write the checkpoint, the model and the best weights so far, all or nothing.

        Args:
            gone_back: as of `RunFolder.save_checkpoint`.

        Raises:
            UserError: if they cannot be written; the earlier ones are whole.
        """
        if self.run is None:
            return
        files = model_files(self.trained, self.built_from, self.card) | self.best.files()
        buffer = self.recovery.buffer() if self.recovery else None
        keep = self.config.keep_checkpoints
        self.run.save_checkpoint(self.state(), buffer, files, keep, gone_back)
        self.best.written()

    def _advance(self, batches: Iterator[dict[str, Batch]], stop: bool) -> None:
        """Take one step."""
        rate = self.rate_at(self.step)
        if self.drops:
            torch.manual_seed(keyed_seed(self.config.seed, "dropout", self.step, self.world.rank))
        begun = time.perf_counter()
        drawn = next(batches)
        self.watch.step(time.perf_counter() - begun)
        fits = True
        try:
            with translate_out_of_memory():
                if self.recovery is not None:
                    self.recovery.keep_first()
                drawn = self.loss.prepared(self.preparations, drawn, self.step)
                if self.recovery is not None:
                    self.drawn = drawn
            self.update(drawn, rate, stop)
        except OutOfMemory:
            fits = False
        if not fits:  # out of the handler, which would keep what the step held
            self._explain_memory()
        self.step += 1

    def _where_saved(self) -> str:
        if self.run is None:
            return ""
        last = self.run.last_checkpoint()
        return f"; {'the last checkpoint is ' + last if last else 'there is no checkpoint yet'}"

    def _explain_memory(self) -> NoReturn:
        self.optimizer.zero_grad(set_to_none=True)
        states = [v for own in self.optimizer.state.values() for v in own.values()]
        held = [*self.loss.parameters(), *(v for v in states if torch.is_tensor(v))]
        raise self.budget.too_large(sum(t.nbytes for t in held), self.step)

    def _log_step(self, reading: StepStats) -> None:
        number = stage_at(self.stages, self.step - 1)
        speed = self.stages[number].images_per_step / self.watch.stop(number)
        row = {"step": self.step, "lr": self.rate_at(self.step - 1), "grad_norm": reading.grad_norm}
        if self.recovery is not None:
            row["sample_rms"] = self.recovery.measures(reading).sample
        self.left_out.look()
        if self.left_out:
            row["unreadable_images"] = len(self.left_out)
        self.report({"kind": "train", **row, **reading.parts, "images_per_s": speed})
        if self.left_out and self.step == self.config.steps:
            self.report(self.left_out.row(self.step))

    def rate_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        return rate if self.recovery is None else self.recovery.learning_rate(rate)

    def _read(self) -> StepStats:
        """What the last step did.

        Raises:
            UserError: if it, or one before, was not finite.
        """
        reading = self.update.read()
        if reading.failed:
            raise stopped(self, reading)
        self.card.steps = self.step
        return reading

    def account(self) -> RunStats:
        """What the steps so far really took."""
        peak = peak_memory(self.device)  # before the counting, which takes some too
        steps = self.step - self.first_step
        return RunStats.of(
            self.budget.cost(self.step, self.first_step),
            self.watch,
            images_between(self.stages, self.first_step, self.step) / steps,
            peak_memory=peak,
            precision=self.update.precision,
            compiled=self.update.compiled,
            processes=self.world.size,
            device=describe(self.device),
        )

    def _validate(self) -> None:
        """Measure on the held-out images; keep the weights if they are the best so far."""
        if self.measure is None:
            return
        model = self.trained.eval()
        loss = make_loss(model, self.config, training=False).to(self.device)
        stage = self.stages[stage_at(self.stages, self.step - 1)]
        means = self.measure(model, loss, stage)
        self.model.train()
        self.report({"kind": "validation", "step": self.step, **means})
        if self.step == self.config.steps and self.world.first:
            check_learnt(means, loss, model.num_classes, self.config)
        summary = loss.summary({term.name: means[term.name] for term in loss.terms})
        every = self.config.validate_every
        if 0 < stage.start >= (self.step - 1) // every * every:
            self.best.loss = math.inf  # the first of a stage: crops of other sizes do not compare
        self.best.offer(summary, model, saves=self.run is not None)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Batch]]:
        """One batch of each stream for the steps ``start`` .. ``stop`` - 1."""
        streams = {name: stream.batches(start, stop) for name, stream in self.streams.items()}
        return prefetched(streams, self.device)

    def report(self, row: dict[str, Any], written: bool = False) -> None:
        """Write a row of metrics, unless it is ``written``, and show it."""
        if self.run is not None and not written:
            self.run.log(row)
        if self.reporter is not None:
            self.reporter.report(row)
