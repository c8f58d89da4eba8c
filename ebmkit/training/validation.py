"""Validation: losses, accuracy and PSNR on held-out images, with the same noise every time.

Objectives that train under attack are measured so, too: the held-out images are attacked as in
training, from the same starts every time, and the loss stands under the objective's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ebmkit.data import AnyImages, Batch, Stream, StreamConfig
from ebmkit.data.schedule import Stage
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel
from ebmkit.metrics import predict, psnr
from ebmkit.objectives import TrainingLoss

BATCH = 100
SIGMA = 25 / 255


@dataclass
class Validation:
    """Measures the model of a loss on held-out images, in equal batches that processes share out.

    Images are whole, but for streams whose crops change along the run: those see the middle, of the
    size that is trained at the time.

    Args:
        loss: what is measured, of the model to measure: without objectives that need negatives,
            which have no value on held-out images.
        images: the held-out images.
        noise: stream -> its configuration in training; the noise law is kept, not the augmentation.
        classifies: whether accuracy means anything.
        device: where the model is.
        world: the processes that share the work; all of them get the same means.
    """

    loss: TrainingLoss
    images: AnyImages
    noise: dict[str, StreamConfig]
    classifies: bool
    device: torch.device
    world: DistributedContext

    def __post_init__(self) -> None:
        matching = [term.name for term in self.loss.terms if term.objective.needs_score]
        self.denoise_stream = self.loss.stream_of[matching[0]] if matching else None
        count = len(self.images)
        self.steps = math.ceil(count / BATCH)
        size = math.ceil(count / self.steps)
        self.streams = {
            name: Stream(
                self.images,
                StreamConfig(batch_size=size, noise=config.noise),
                f"validation-{name}",
                0,
                self.device,
            )
            for name, config in self.noise.items()
        }

    @torch.no_grad()
    def __call__(self, stage: Stage | None = None) -> dict[str, float]:
        """Means over the images: each term by name, and where they apply ``accuracy``,
        ``accuracy_attacked`` (under the attack of training) and ``psnr_25``.

        The model must be in evaluation mode. Without a ``stage`` of the run images are whole.
        """
        crops = {n: s.crop_size for n, s in stage.spans.items()} if stage else {}
        crops = {n: side for n, side in crops.items() if n in self.noise and self.noise[n].phases}
        totals: dict[str, float] = {}
        preparations = self.loss.preparations(validating=True)
        for step in range(self.world.rank, self.steps, self.world.size):
            batches = {n: next(s.batches(step, step + 1)) for n, s in self.streams.items()}
            batches = {n: _middle(batch, crops.get(n)) for n, batch in batches.items()}
            batches = self.loss.prepared(preparations, batches, step)
            for name, value in self._measure(batches).items():
                totals[name] = totals.get(name, 0.0) + value / self.steps
        everyone = self.world.gather(totals)
        names = next(own for own in everyone if own)
        return {name: sum(own.get(name, 0.0) for own in everyone) for name in names}

    def _measure(self, batches: dict[str, Batch]) -> dict[str, float]:
        model = self.loss.model
        row = {name: float(mean) for name, mean in self.loss(batches).parts.items()}
        if self.classifies:
            batch = next(iter(batches.values()))
            assert batch.labels is not None
            assert isinstance(model, EnergyModel)
            right = predict(model.logits(batch.x)).eq(batch.labels)
            row["accuracy"] = float(right.float().mean())
            for own in batches.values():
                for column in (c for name, c in own.extra.items() if name.endswith(".attacked")):
                    assert own.labels is not None
                    label = predict(model.logits(column, own.sigma))
                    row.setdefault("accuracy_attacked", float(label.eq(own.labels).float().mean()))
        if self.denoise_stream is not None:
            batch = batches[self.denoise_stream]
            clean = model.denoise(batch.x + SIGMA * batch.eps, SIGMA)
            row["psnr_25"] = float(psnr(clean.clamp(0, 1), batch.x).mean())
        return row


def _middle(batch: Batch, side: int | None) -> Batch:
    """The same batch with its images cut to a square of ``side``."""
    if side is None:
        return batch
    top, left = ((n - side) // 2 for n in batch.x.shape[-2:])
    x, y, eps = (
        t[..., top : top + side, left : left + side] for t in (batch.x, batch.y, batch.eps)
    )
    return batch._replace(x=x, y=y, eps=eps)
