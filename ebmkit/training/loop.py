"""The training loop.

Each step draws a batch from each stream, computes the gradient of the sum of the objectives
(`ebmkit.objectives.TrainingLoss`) and updates the parameters (`ebmkit.training.optim`). All random
numbers are functions of (seed, stream, step), those of dropout also of the process. So a run that
is resumed from a checkpoint equals an uninterrupted one: on a CPU it is bit-identical.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ebmkit.compile import make_inference
from ebmkit.compute import describe, peak_memory, pick_device
from ebmkit.data import AnyImages, Batch, ImageSet, Stream, as_images
from ebmkit.data.schedule import images_between, stage_at, stages
from ebmkit.data.streams import prefetch
from ebmkit.data.workers import translate_worker_errors
from ebmkit.distributed import DistributedContext, device_of_rank
from ebmkit.energy import ScoreModel
from ebmkit.errors import Interrupted, UserError
from ebmkit.models import ModelConfig
from ebmkit.models.initial import Initialization, initialize, read_weights
from ebmkit.models.saving import model_files
from ebmkit.objectives import parse_objective
from ebmkit.objectives.likelihood import Negatives
from ebmkit.objectives.loss import check_labels
from ebmkit.randomness import keyed_seed
from ebmkit.storage.reading import read_document
from ebmkit.training import nonfinite
from ebmkit.training.config import TrainConfig
from ebmkit.training.cost import Budget, RunStats, Stopwatch
from ebmkit.training.metrics import Validation
from ebmkit.training.optim import (
    SAM,
    exponential_average,
    learning_rate,
    make_optimizer,
    optimizer_flops,
    state_values_per_parameter,
)
from ebmkit.training.rollback import Rollback
from ebmkit.training.run_folder import RunFolder
from ebmkit.training.setup import (
    build_model,
    calibrate_sigma,
    check_classes,
    check_compiled,
    check_terms,
    config_of,
    fit_class_gaussians,
    fit_reference,
    images_of,
    make_card,
    make_loss,
    model_config,
    normalize,
    shapes,
    steps_of_epochs,
    training_image_size,
    warn_if_at_chance,
)
from ebmkit.training.state import SkippedSamples, TrainingState
from ebmkit.training.step import OutOfMemory, StepStats, TrainingStep, translate_out_of_memory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """Stop flag and the signal that set it; calling the object returns the flag."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Within the context, the first of `SIGNALS` only sets a flag, so that the step is completed.

    A later SIGINT raises ``KeyboardInterrupt`` at once. SIGHUP stays ignored if it was ignored
    before, as under ``nohup``.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        if stop() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signum

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled_signals = [s for s in SIGNALS if not (ignored and s == signal.SIGHUP)]
    before = {s: signal.signal(s, handle) for s in handled_signals}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@dataclass(repr=False)
class Trainer:
    """Trains a model with `fit`.

    Args:
        model: any `ScoreModel`; the command line builds the one of ``config.model``.
        config: resolved configuration.
        train: training images, as an `ImageSet`, or anything that `ebmkit.data.as_images` converts:
            a data set of PyTorch or Hugging Face, a pair of tensors, a folder, ...
        validation: held-out images, as for ``train``; None: no validation.
        run: run folder to save to; None: nothing is saved.
        built_from: configuration that builds the model, for ``model.json``; None: a custom model.
        callbacks: objects with methods of `ebmkit.training.Callback`.
        world: processes that train together. Only the first should have a run and callbacks.

    Attributes:
        state: the part of a checkpoint that is the same for all objectives.
        preparations: objective -> function that adds columns to its batches.
        rollback: divergence detection, if an objective needs negatives.
        initial: what `assemble` loaded from ``config.init``, if anything.

    Raises:
        UserError: if the images do not fit the model or an objective, a batch cannot be divided
            among processes and parts, or the device does not support the compute settings.
    """

    model: ScoreModel
    config: TrainConfig
    train: Any
    validation: Any = None
    run: RunFolder | None = None
    built_from: ModelConfig | None = None
    callbacks: Sequence[Any] = ()
    world: DistributedContext = field(default_factory=DistributedContext)

    def __post_init__(self) -> None:
        config, model, world = self.config, self.model, self.world
        size = config.dataset.image_size
        self.train = as_images(self.train, image_size=size)
        if self.validation is not None:
            options = {"image_size": size, "like": self.train}
            self.validation = as_images(self.validation, "validation", **options)
        self.device = device = device_of_rank(pick_device(config.device))
        fit_reference(model, self.train, training_image_size(config, self.train))
        model.to(device)
        self.loss = make_loss(model, config).to(device)
        check_terms(self.loss, config, self.train)
        if isinstance(self.train, ImageSet):
            self.train = self.train.to(device)  # once, for all streams
        if isinstance(self.validation, ImageSet):
            self.validation = self.validation.to(device)
        settings = {name: config.stream(name) for name in self.loss.streams}
        reading = {"workers": config.dataset.workers, "parts": config.compute.accumulate}
        reading |= {"rank": world.rank, "world_size": world.size, "steps": config.steps}
        self.streams = {
            name: Stream(self.train, own, name, config.seed, device, **reading)
            for name, own in settings.items()
        }
        self.stages, rho = stages(settings, config.steps), config.optimizer.sharpness
        self.update = TrainingStep(
            self.loss,
            make_optimizer(model, config.optimizer),
            config.compute,
            config.optimizer.clip_norm,
            exponential_average(model, config.optimizer.ema, config.optimizer.ema_warmup),
            world,
            sam=None if rho is None else SAM(rho, config.optimizer.sharpness_adaptive),
        )
        if self.update.compiled:
            check_compiled(self.stages)
        self.state = TrainingState(self.update, SkippedSamples(self.train, self.streams, world))
        self.first_step, self.stopwatch, self._stopped = 0, Stopwatch(), False
        self.initial: Initialization | None = None
        self.budget = Budget(
            self.loss,
            [(stage, shapes(stage, self.train, world.size)) for stage in self.stages],
            state_values_per_parameter(model, config.optimizer),
            config.compute.accumulate,
            world.size,
            1 if rho is None else 2,
            optimizer_flops(model, config.optimizer),
        )
        self.card = make_card(self.loss, config, self.train)
        model.card = self.trained.card = self.card
        self._drawn: dict[str, Batch] = {}
        self.preparations = self.loss.preparations(
            seed=config.seed,
            inference=make_inference(device, self.update.precision, config.compute.compile),
            world=world,
            parts=config.compute.accumulate,
            images=self.train,
            streams=settings,
        )
        chains = {n: p for n, p in self.preparations.items() if isinstance(p, Negatives)}
        if len(chains) > 1:
            raise UserError(
                f"objectives {' and '.join(chains)} need negatives of different densities: choose "
                "one of them"
            )
        self.rollback: Rollback | None = None
        for name, negatives in chains.items():
            self.rollback = Rollback(config.rollback, name, negatives, self.state)
        self.validator: Validation | None = None
        measured = make_loss(self.trained, config, training=False).to(device)
        if self.validation is not None and len(self.validation) and measured.terms:
            laws, classifies = {n: config.stream(n) for n in measured.streams}, self.card.classifies
            self.validator = Validation(measured, self.validation, laws, classifies, device, world)

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.state.step

    @property
    def trained(self) -> ScoreModel:
        """The trained model: the averaged one if averaging is on."""
        if self.update.average is None:
            return self.model
        averaged = self.update.average.module
        assert isinstance(averaged, ScoreModel)
        return averaged

    def __repr__(self) -> str:
        steps = f"step {self.step:,} of {self.config.steps:,}"
        where = "" if self.run is None else f", run {str(self.run.path)!r}"
        return f"Trainer({self.config.objective}, {self.model!r}, {self.train!r}, {steps}{where})"

    @property
    def where(self) -> str:
        """Device, precision and number of processes."""
        step = self.update
        compiled = ", compiled" if step.compiled else ""
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        return f"{self.device} ({step.precision}{compiled}{processes})"

    def sentences(self) -> Iterator[str]:
        """What was loaded, what is trained, and from which step."""
        config, own = self.config, self.model
        for part in ("backbone", "network"):
            own = getattr(own, part, own)
        if self.initial is not None:
            yield self.initial.sentence()
        name = type(own).__name__ if self.built_from is None else config.backbone
        parameters = sum(p.numel() for p in self.model.parameters())
        yield (
            f"{config.objective} on {self.train.name} ({len(self.train):,} images), "
            f"{name} with {parameters:,} parameters, {config.steps:,} steps on {self.where}"
            + ("" if self.run is None else f", in {self.run.path}")
        )
        if self.step >= config.steps:
            yield f"this run is finished: {self.step} of {config.steps} steps are done"
        elif self.step:
            yield f"resuming after step {self.step}"

    def stop(self) -> None:
        """End `fit` after the current step, with the state saved; for callbacks."""
        self._stopped = True

    def fit(self) -> ScoreModel:
        """Train from the current step to ``config.steps``; return the model in evaluation mode.

        A callback may end training earlier by `stop`; then `fit` can be called again.

        Raises:
            Interrupted: on Ctrl-C or a request to terminate, after saving.
            UserError: if a loss or the gradient is NaN or Inf (before the update), the run diverges
                too often, or the disk is full.
        """
        config = self.config
        batches = self.batches(self.step, config.steps)
        ends = {stage.stop for stage in self.stages}
        self.first_step = self.step
        self.state.start_clock()
        self.stopwatch.restart()
        self.model.train()
        self._stopped = False
        alone = self.world.size == 1  # several processes agree on the last step when they read
        holding = nullcontext() if self.run is None else self.run.held()
        where_saved = (lambda: "") if self.run is None else self.run.where_saved
        with (
            translate_worker_errors(where_saved), holding, stop_requested() as stop,
            self._calling_back(),
        ):  # fmt: skip
            if self.initial is not None and self.run is not None:
                self.run.write_document("init.json", self.initial._asdict())
            while self.step < config.steps:
                self._advance(batches, stop() or self._stopped)
                log, validate, save = (
                    self.step % every == 0 or self.step == config.steps
                    for every in (config.log_every, config.validate_every, config.checkpoint_every)
                )
                log = log or self.step in ends  # a measured speed must not cover two stages
                if self.rollback is not None and self._rolled_back(self.rollback):
                    batches = self.batches(self.step, config.steps)
                    self.stopwatch.restart()
                    continue
                due = log or validate or save or (alone and stop())
                # else, reading would make the host wait for the device
                stats = self._read() if self.device.type == "cpu" or due else None
                if log and stats:
                    self._log_step(stats)
                if validate:
                    self._validate()
                self._call("on_step", self)
                stopping = (
                    stop() or self._stopped if alone else bool(stats and stats.stop_requested)
                )
                if stopping and not stats:
                    self._read()
                requested = stopping and any(self.world.gather(stop()))
                if save or stopping:
                    self.state.skipped.update()  # all processes reach this line
                    self.save(ended=stopping and not requested)
                if validate or save:
                    self.stopwatch.restart()
                if requested:
                    raise Interrupted(self.step, self.config.steps, stop.signal)
                if stopping:
                    break
        return self.trained.eval()

    def try_steps(self, count: int) -> None:
        """Time up to ``count`` steps of each stage. Afterwards only the stopwatch is usable; it
        then estimates the whole run."""
        self.model.train()
        for number, stage in enumerate(self.stages):
            self.state.step = stage.start
            stop = min(stage.start + count, stage.stop)
            batches = self.batches(stage.start, stop)
            with translate_worker_errors():
                while self.step < stop:
                    self._advance(batches, False)
                    self._read()
                    self.stopwatch.stop(number)
        self.stopwatch.lengths = {n: s.stop - s.start for n, s in enumerate(self.stages)}

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume, without the replay buffer: tensors and plain values."""
        rollback = self.rollback.state_dict() if self.rollback else None
        return {**self.state.state_dict(), "rollback": rollback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint: a `state_dict`, with the replay buffer if there is one.

        Raises:
            UserError: if it belongs to another run.
        """
        self.state.load_state_dict(state)
        if self.step > self.config.steps:
            raise UserError(
                f"the checkpoint is at step {self.step}, but the run ends at {self.config.steps}"
            )
        self.card.steps = self.step
        if self.rollback is not None:
            self.rollback.load_state_dict(state.get("rollback"), state.get("buffer"))
        if self.run is not None:
            self.run.truncate_metrics(self.step)
            self.state.best.restore(self.run)

    def save(
        self, rolled_back: tuple[int, dict[str, Any]] | None = None, ended: bool = False
    ) -> None:
        """Write the checkpoint, the model and the best weights so far, all or nothing.

        After the last step, or if a callback ``ended`` the run before it, first calibrate the noise
        levels that the model estimates, normalise its density, and fit the Gaussians that chains
        start from. ``rolled_back`` is that of `RunFolder.save_checkpoint`.

        Raises:
            UserError: if they cannot be written; the earlier files stay intact.
        """
        self.card.steps, self.card.sigma_calibration = self.step, []
        self.card.log_density_error = None
        self.trained.class_gaussians = None
        if ended or self.step == self.config.steps:
            # in all processes alike, as all evaluate with the model
            held_out = self.validation
            images = self.train if held_out is None or not len(held_out) else held_out
            calibrate_sigma(self.trained, images, self.card)
            normalize(self.loss, self.trained, self.train, self.card)
            self.trained.class_gaussians = fit_class_gaussians(self.trained, self.train, self.card)
        if self.run is None:
            return
        best = self.state.best
        files = model_files(self.trained, self.built_from, self.card) | best.files()
        buffer = self.rollback.negatives.buffer.to_bytes() if self.rollback else None
        keep = self.config.keep_checkpoints
        self.run.save_checkpoint(self.state_dict(), buffer, files, keep, rolled_back)
        best.written()

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Batch]]:
        """Yield a batch of each stream for each of the steps ``start`` .. ``stop`` - 1."""
        streams = {name: stream.batches(start, stop) for name, stream in self.streams.items()}
        return prefetch(streams, self.device)

    def rate_at(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        return rate if self.rollback is None else rate * self.rollback.monitor.mitigations.rate

    def report(self, row: dict[str, Any], written: bool = False) -> None:
        """Write a row of metrics, unless it is already ``written``; pass it to the callbacks."""
        if self.run is not None and not written:
            self.run.log(row)
        self._call("report", row)

    def _call(self, name: str, *arguments: Any, of: Sequence[Any] | None = None) -> None:
        """Call the method ``name`` of each callback that has it."""
        for callback in self.callbacks if of is None else of:
            if (method := getattr(callback, name, None)) is not None:
                method(*arguments)

    @contextmanager
    def _calling_back(self) -> Iterator[None]:
        """Context that calls ``on_start``, and at its end, also after an error, ``on_end``.

        A callback that could not start is not ended; those before it are.
        """
        started: list[Any] = []
        try:
            for callback in self.callbacks:
                self._call("on_start", self, of=[callback])
                started.append(callback)
            yield
        finally:
            self._call("on_end", self, of=started)

    def run_stats(self) -> RunStats:
        """Measured cost of the steps so far."""
        peak = peak_memory(self.device)  # before counting, which needs memory too
        first, last, seconds = self.first_step, self.step, self.stopwatch.seconds
        cost = self.budget.cost(last, first)
        return RunStats(
            steps=sum(stretch.steps for stretch in self.stopwatch.stretches),
            step_seconds=seconds,
            images_per_s=images_between(self.stages, first, last) / (last - first) / seconds,
            data_share=self.stopwatch.data_share,
            peak_memory=peak,
            flops=cost.flops,
            matrix_rate=cost.rate,
            share=cost.mfu(seconds),
            precision=self.update.precision,
            compiled=self.update.compiled,
            processes=self.world.size,
            device=describe(self.device),
        )

    def diagnose(self, step: int, stats: StepStats) -> dict[str, Any]:
        """Find the cause of NaN or Inf in ``step``, counted from 1; all processes must call this.

        The parameters must be those before the step; ``stats`` are those of the step.
        """
        update = self.update

        def find() -> dict[str, Any]:
            drawn = self._drawn  # the chains have been updated since
            if self.rollback is None:
                drawn = next(self.batches(step - 1, step))
                drawn = self.loss.prepared(self.preparations, drawn, step - 1)
            gradients = None
            if self.step == step and update.clip_norm is None:  # gradients of this step, unclipped
                named = self.model.named_parameters()
                gradients = {name: p.grad for name, p in named if p.grad is not None} or None
            self._seed_layers(step - 1)
            parts = self.config.compute.accumulate
            return nonfinite.diagnose(self.loss, drawn, parts, gradients, update.sam)

        how = {"precision": update.precision, "compiled": update.compiled}
        lr = self.rate_at(step - 1)
        return nonfinite.report(find, step, stats, self.streams, self.world, lr=lr, **how)

    def _seed_layers(self, step: int) -> None:
        """Seed random layers, such as dropout, by the step."""
        torch.manual_seed(keyed_seed(self.config.seed, "dropout", step, self.world.rank))

    def _advance(self, batches: Iterator[dict[str, Batch]], stop: bool) -> None:
        """Take one step."""
        rate = self.rate_at(self.step)
        self._seed_layers(self.step)
        start_time = time.perf_counter()
        drawn = next(batches)
        self.stopwatch.step(time.perf_counter() - start_time)
        if self.rollback is not None and not self.rollback.monitor.snapshots:
            self.rollback.snapshot()
        try:
            with translate_out_of_memory():
                drawn = self.loss.prepared(self.preparations, drawn, self.step)
                if self.rollback is not None:
                    self._drawn = drawn
            self.update(drawn, rate, stop)
        except OutOfMemory:
            pass  # reported outside the handler, which keeps the tensors of the step alive
        else:
            self.state.step += 1
            return
        optimizer = self.update.optimizer
        optimizer.zero_grad(set_to_none=True)
        states = [v for own in optimizer.state.values() for v in own.values()]
        held = [*self.loss.parameters(), *(v for v in states if torch.is_tensor(v))]
        raise self.budget.out_of_memory(sum(t.nbytes for t in held), self.step)

    def _read(self) -> StepStats:
        """Statistics of the last step. If it or an earlier step was NaN or Inf, save the state
        before that step and raise a `UserError`."""
        stats = self.update.read()
        if not stats.failed:
            self.card.steps = self.step
            return stats
        done = self.step - stats.skipped
        found = self.diagnose(done + 1, stats)
        self.update.undo_skipped(self.rate_at(done - 1) if done else self.config.optimizer.lr)
        self.state.step = self.card.steps = done
        where = ""
        if self.run is not None:
            where = f"; the state before it is saved in {str(self.run.path)!r}"
            try:
                self.save()
            except UserError as error:
                where = f"; {error}"
            where += f"; {nonfinite.write_report(self.run.path, found)}"
        sentence = f"{stats.fault} at step {done + 1}: stopped before the update"
        raise UserError(sentence + where, [*nonfinite.describe(found), nonfinite.advice(found)])

    def _rolled_back(self, rollback: Rollback) -> bool:
        """If the run diverged in the last step, roll back, save and report it, and return True.
        Raises a `UserError` with the history after too many rollbacks."""
        stats = self.update.read()
        reason = rollback.check(stats)
        if reason is None:
            return False
        detail, path = None, self.run.path if self.run is not None else None
        if stats.fault is not None:
            found = self.diagnose(self.step, stats)
            detail = nonfinite.describe(found)
            if path is not None:
                detail.append(nonfinite.write_report(path, found))
        divergence = rollback.restore_snapshot(reason)
        self.first_step = self.step
        row = rollback.row(divergence, detail)
        self.save((len(rollback.monitor.history), row))
        self.report(row, written=True)
        if divergence.change is None:
            raise rollback.too_many_rollbacks(path, detail)
        return True

    def _log_step(self, stats: StepStats) -> None:
        number, skipped = stage_at(self.stages, self.step - 1), self.state.skipped
        speed = self.stages[number].images_per_step / self.stopwatch.stop(number)
        row = {"step": self.step, "lr": self.rate_at(self.step - 1), "grad_norm": stats.grad_norm}
        if self.rollback is not None:
            row["sample_rms"] = self.rollback.sample_rms()
        skipped.update()
        if skipped:
            row["unreadable_images"] = len(skipped)
        self.report({"kind": "train", **row, **stats.parts, "images_per_s": speed})
        if skipped and self.step == self.config.steps:
            self.report(skipped.row(self.step))

    def _validate(self) -> None:
        """Evaluate the held-out images; keep the weights if they are the best so far."""
        if self.validator is None:
            return
        model, best, loss = self.trained.eval(), self.state.best, self.validator.loss
        stage = self.stages[stage_at(self.stages, self.step - 1)]
        means = self.validator(stage)
        row = {"kind": "validation", "step": self.step, **means}
        self.report(row)
        self._call("on_validation", self, row)
        self.model.train()
        if self.step == self.config.steps and self.world.first:
            warn_if_at_chance(means, loss, model.num_classes, self.config)
        summary = loss.summary({term.name: means[term.name] for term in loss.terms})
        every = self.config.validate_every
        if 0 < stage.start >= (self.step - 1) // every * every:
            best.loss = math.inf  # first validation of a stage: other crop sizes do not compare
        best.offer(summary, model, saves=self.run is not None)


def assemble(
    config: TrainConfig,
    run: RunFolder | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = False,
    world: DistributedContext | None = None,
    *,
    data: tuple[AnyImages, AnyImages | None] | None = None,
    network: nn.Module | None = None,
    epochs: float | None = None,
) -> Trainer:
    """Load the data, build model and trainer, and resume from the run's checkpoint.

    Arguments are those of `Trainer`, and the following. Raises a `UserError` if a step does.

    Args:
        progress: show progress bars while data is downloaded or read.
        data: training and held-out images; None: load those of ``config.dataset``.
        network: model, or backbone for the head of the configuration; None: build that of
            ``config.model``.
        epochs: length of the run in passes over the training images; None: ``config.steps``.
    """
    world = world or DistributedContext()
    if not world.first:
        world.broadcast(None)  # the first process alone downloads data
    train = data[0] if data else images_of(config.dataset, "train", progress)
    if world.first:
        world.broadcast(None)
    if (limit := config.dataset.limit) is not None:
        balanced = config.dataset.subset == "balanced"
        train = train.sample(limit, config.seed) if balanced else train.first(limit)
    if epochs is not None:
        steps = steps_of_epochs(epochs, len(train), config)
        config = config.model_copy(update={"steps": steps})
        if run is not None:
            run.check_config(config)
    for term in parse_objective(config.objective):  # before the head, which may need labels
        check_labels(term.name, term.objective, train.num_classes)
    validation = None
    if config.validation_images:
        held_out = data[1] if data else images_of(config.dataset, "validation")
        validation = None if held_out is None else held_out.first(config.validation_images)
    model = build_model(config, train, network)
    built_from = config_of(model) if network is not None else model_config(config, train)
    with run.held() if run is not None else nullcontext():
        checkpoint = world.broadcast(run.load_checkpoint() if run is not None else None)
    initial = None
    if config.init is not None and checkpoint is None:
        state = world.broadcast(read_weights(config.init) if world.first else None)
        initial = initialize(model, config.init, state or {})
    trainer = Trainer(model, config, train, validation, run, built_from, callbacks, world)
    trainer.initial = initial
    if trainer.device.type == "cpu":  # where the system kills a process that runs out of memory
        trainer.budget.check()
    with run.held() if run is not None else nullcontext():
        if checkpoint is not None:
            if run is not None:
                check_classes(read_document(run.path / "model.json"), train)
            trainer.load_state_dict(checkpoint)
        elif run is not None:
            run.truncate_metrics(0)
    return trainer
