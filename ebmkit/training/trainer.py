r"""The training loop.

One step draws a batch from each stream, takes the gradient of the sum of the objectives
(`ebmkit.objectives.TrainingLoss`) and moves the parameters by AdamW with the rate

.. math:: \eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T)) .

Everything drawn is a function of (seed, stream, step), so a run continued from a checkpoint does
the same arithmetic as one that was never stopped: on a CPU the bits are equal.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebmkit.card import ModelCard
from ebmkit.core import EnergyModel
from ebmkit.data import Batch, ImageSet, Stream, StreamConfig, StreamedSet
from ebmkit.errors import UserError
from ebmkit.metrics import psnr
from ebmkit.models import ModelConfig, save_model, save_weights
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.objectives.terms import check_labels
from ebmkit.training.config import TrainConfig
from ebmkit.training.optim import learning_rate, make_optimizer, pick_device
from ebmkit.training.runs import RunFolder

__all__ = ["Interrupted", "Reporter", "Trainer"]

VALIDATION_BATCH = 100

Images = ImageSet | StreamedSet


class Interrupted(Exception):
    """Training was stopped by a signal, after its state was saved; ``step`` says where."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


class Reporter(Protocol):
    """Who is told how training goes (a progress bar, TensorBoard)."""

    def report(self, row: dict[str, Any]) -> None: ...


@dataclass
class Trainer:
    """Trains a model; `fit` does it.

    Args:
        model: any `EnergyModel`; of `config.model` if the command line built it.
        config: the resolved configuration.
        train: training images.
        validation: held-out images; None: no validation.
        run: where to save; None: nowhere.
        built_from: what builds the model, for ``model.json``; None for one composed by hand.
        reporter: who is told of each row of metrics.

    Raises:
        UserError: if the images do not suit model or objective.
    """

    model: EnergyModel
    config: TrainConfig
    train: Images
    validation: Images | None = None
    run: RunFolder | None = None
    built_from: ModelConfig | None = None
    reporter: Reporter | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.device = pick_device(config.device)
        self.model.to(self.device)
        if self.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)
        self.loss = self._loss(self.model)
        self._check_terms()
        if isinstance(self.train, ImageSet):
            self.train = self.train.to(self.device)  # once, for all streams
        if isinstance(self.validation, ImageSet):
            self.validation = self.validation.to(self.device)
        self.streams = {name: self._stream(name) for name in self.loss.streams}
        self.optimizer = make_optimizer(self.model, config.optimizer)
        decay = config.optimizer.ema
        self.average = (
            AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
                use_buffers=False,
            )
            if decay
            else None
        )
        self.step = 0
        self.best = math.inf
        matching = [t.name for t in self.loss.terms if t.objective.needs_score]
        self.denoise_stream = self.loss.stream_of[matching[0]] if matching else None
        self.card = ModelCard(
            dataset=self.train.name,
            objective=config.objective,
            image_size=trained_size(config, self.train),
            channels=self.train.channels,
            class_names=list(self.train.class_names),
            sigma_range=(
                self._stream_config(self.denoise_stream).noise.range
                if self.denoise_stream
                else None
            ),
            classifies=any(term.objective.needs_labels for term in self.loss.terms),
        )
        self.model.card = self.trained.card = self.card

    def fit(self) -> EnergyModel:
        """Train from the present step to ``config.steps``; the model, in evaluation mode.

        Raises:
            Interrupted: on Ctrl-C or a request to terminate, after saving.
            UserError: if a loss is not finite (before the update it would have spoilt), or the
                disk is full.
        """
        config = self.config
        batches = {n: s.batches(self.step, config.steps) for n, s in self.streams.items()}
        mark, seen = time.perf_counter(), 0
        self.model.train()
        with _stop_requested() as stop:
            while self.step < config.steps:
                drawn = {name: next(stream) for name, stream in batches.items()}
                row = self._update(drawn)
                seen += sum(len(batch.x) for batch in drawn.values())
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    row["images_per_s"] = seen / (now - mark)
                    mark, seen = now, 0
                    self._log({"kind": "train", **row})
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    self._validate()
                    mark, seen = time.perf_counter(), 0
                asked = stop()
                if asked or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save()
                if asked:
                    raise Interrupted(self.step)
        return self.trained.eval()

    @property
    def trained(self) -> EnergyModel:
        """The model to use: the averaged one, where averaging is on."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, EnergyModel)
        return averaged

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as tensors and plain values."""
        return {
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "running": dict(self.loss.running),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`.

        Raises:
            UserError: if it is of another model.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError):
            raise UserError("the checkpoint does not fit this model and optimiser") from None
        self.loss.running = dict(state["running"])
        self.step, self.best = state["step"], state["best"]
        self.card.steps = self.step
        if self.run is not None:
            self.run.forget_after(self.step)

    def save(self) -> None:
        """Write the checkpoint and the model, each in one move."""
        if self.run is None:
            return
        self.run.save_checkpoint(self.state())
        save_model(self.run.path, self.trained, self.built_from, self.card)

    def _update(self, batches: dict[str, Batch]) -> dict[str, Any]:
        """One optimiser step; the row of metrics that tells of it."""
        config = self.config.optimizer
        rate = learning_rate(config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total, parts = self.loss(batches)
        self._check_finite(total, parts)
        total.backward()
        row: dict[str, Any] = {"step": self.step + 1, "lr": rate}
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._stop_at(f"the gradient's norm is {float(norm)}")
        row["grad_norm"] = float(norm)
        if config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.loss.remember(parts)
        self.step += 1
        self.card.steps = self.step
        row |= {name: float(mean) for name, mean in parts.items()}
        return row

    def _check_finite(self, total: Tensor, parts: dict[str, Tensor]) -> None:
        bad = [name for name, mean in parts.items() if not torch.isfinite(mean)]
        if bad or not torch.isfinite(total):
            name = bad[0] if bad else "the total"
            self._stop_at(f"loss {name!r} is {float(parts[bad[0]] if bad else total)}")

    def _stop_at(self, what: str) -> NoReturn:
        saved = f"; the last checkpoint is in {str(self.run.path)!r}" if self.run else ""
        raise UserError(
            f"{what} at step {self.step + 1}: stopped before the update{saved}; try a lower "
            "optimizer.lr or optimizer.clip_norm=1"
        )

    def _check_terms(self) -> None:
        """Whether each objective can learn from its stream."""
        for term in self.loss.terms:
            name = self.loss.stream_of[term.name]
            stream = self._stream_config(name)
            mixes = stream.augmentation.mix != "none"
            check_labels(term.name, term.objective, self.train.num_classes, mixes, name)
            if term.objective.needs_score and stream.noise.range[1] == 0:
                raise UserError(
                    f"objective {term.name!r} learns from noise, and stream {name!r} has none: set "
                    f"streams.{name}.noise.kind and max, as in squared-uniform and 100/255"
                )

    @torch.no_grad()
    def _validate(self) -> None:
        """Losses, accuracy and PSNR at 25/255 on the held-out images, with fixed noise."""
        if self.validation is None or len(self.validation) == 0:
            return
        model = self.trained.eval()
        loss = self._loss(model)
        rows = [self._measure(model, loss, batches) for batches in self._held_out(loss.streams)]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        row: dict[str, Any] = {"kind": "validation", "step": self.step, **means}
        self.model.train()
        self._log(row)
        summary = loss.summary({term.name: means[term.name] for term in loss.terms})
        if summary < self.best:
            self.best = summary
            if self.run is not None:
                save_weights(self.run.path / "checkpoints" / "best.safetensors", model)

    def _held_out(self, names: tuple[str, ...]) -> Iterator[dict[str, Batch]]:
        """The held-out images in equal batches, not augmented, with the same noise every time."""
        assert self.validation is not None
        count = len(self.validation)
        steps = math.ceil(count / VALIDATION_BATCH)
        streams = []
        for name in names:
            plain = StreamConfig(
                batch_size=math.ceil(count / steps), noise=self._stream_config(name).noise
            )
            stream = Stream(self.validation, plain, f"validation-{name}", 0, self.device)
            streams.append(stream.batches(0, steps))
        for drawn in zip(*streams, strict=True):
            yield dict(zip(names, drawn, strict=True))

    def _measure(
        self, model: EnergyModel, loss: TrainingLoss, batches: dict[str, Batch]
    ) -> dict[str, float]:
        row = {name: float(mean) for name, mean in loss(batches).parts.items()}
        if self.card.classifies:
            batch = next(iter(batches.values()))
            assert batch.labels is not None
            right = model.logits(batch.x).argmax(1).eq(batch.labels)
            row["accuracy"] = float(right.float().mean())
        if self.denoise_stream is not None:
            batch, sigma = batches[self.denoise_stream], 25 / 255
            clean = model.denoise(batch.x + sigma * batch.eps, sigma)
            row["psnr_25"] = float(psnr(clean.clamp(0, 1), batch.x).mean())
        return row

    def _loss(self, model: EnergyModel) -> TrainingLoss:
        config = self.config
        terms = parse_objective(config.objective)
        return TrainingLoss(model, terms, config.balance, config.draw_from)

    def _stream_config(self, name: str) -> StreamConfig:
        config: StreamConfig = getattr(self.config.streams, name)
        return config

    def _stream(self, name: str) -> Stream:
        config = self.config
        return Stream(
            self.train,
            self._stream_config(name),
            name,
            config.seed,
            self.device,
            workers=config.dataset.workers,
        )

    def _log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log(row)
        if self.reporter is not None:
            self.reporter.report(row)


def trained_size(config: TrainConfig, images: Images) -> tuple[int, int]:
    """Height and width that the network sees in training: of the crops, where there are any.

    Those of the stream that score matching draws from, or else of the classifying one.
    """
    terms = parse_objective(config.objective)
    first = next((t for t in terms if t.objective.needs_score), terms[0])
    name = config.draw_from.get(first.name, first.objective.stream)
    stream: StreamConfig = getattr(config.streams, name)
    crop = stream.augmentation.crop_size
    return images.image_size if crop is None else (crop, crop)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM only raises a flag, so that no step is cut in half.

    The second SIGINT interrupts at once.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(signum: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, old in before.items():
            signal.signal(number, old)
