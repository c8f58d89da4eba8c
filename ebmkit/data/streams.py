r"""Streams of training batches, a function of the step alone.

Everything random is drawn from generators keyed by (seed, stream name, purpose, step), hashed to 63
bits: the order of each epoch, flips and crops, mixing, noise levels and noise. So step t has the
same batch whoever asks, in whatever order: continuing a run needs no state, the number of workers
changes nothing, and with several processes ("ranks") each takes its share of the same global batch.

Samples are numbered through: step t holds numbers :math:`tB, \dots, tB + B - 1`, number n is entry
:math:`n \bmod N` of the permutation of epoch :math:`\lfloor n / N \rfloor`. No remainder is
dropped, and a set may be smaller than a batch.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset

from ebmkit.data.augment import (
    Augmentation,
    Rows,
    cutmix,
    flip,
    mixup,
    mixup_or_cutmix,
    padded_crop,
    random_crop,
)
from ebmkit.data.imagesets import ImageSet, StreamedSet, to_floats
from ebmkit.data.noise import NoiseLaw
from ebmkit.errors import UserError

__all__ = ["Batch", "Stream", "StreamConfig", "keyed_seed", "prefetched"]

_MIX = {"mixup": mixup, "cutmix": cutmix, "both": mixup_or_cutmix}


class StreamConfig(BaseModel):
    """What an objective asks of its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(64, ge=1, description="images per step, over all processes")
    augmentation: Augmentation = Field(Augmentation(), description="flips, crops, mixing")
    noise: NoiseLaw = Field(NoiseLaw(), description="law of the noise level")


class Batch(NamedTuple):
    """One step's images, on the stream's device; B is this process's share of the batch.

    Attributes:
        x: (B, C, H, W) float32, clean (augmented) images in [0, 1].
        y: (B, C, H, W), the noisy ones, x + sigma * eps.
        sigma: (B,) noise levels, image units.
        eps: (B, C, H, W) standard normal; zeros where the law says no noise.
        labels: (B,) int64, before mixing; None without labels.
        soft: (B, K) label probabilities, mixed where the images are; None without labels.
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    eps: Tensor
    labels: Tensor | None
    soft: Tensor | None


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for a `torch.Generator`, the same everywhere for the same key.

    >>> keyed_seed(0, "ce", "noise", 7) == keyed_seed(0, "ce", "noise", 7)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Stream:
    """Batches of ``source`` as ``config`` wants them, indexed by step.

    An `ImageSet` is kept on ``device`` as one tensor (pass it already there to share it between
    streams); a `StreamedSet` is read by ``workers`` processes, or by this one for 0.

    Args:
        source: the data set.
        config: batch size, augmentation, noise.
        name: the stream's; streams with different names draw independently.
        seed: the run's.
        device: where batches are made.
        workers: reading processes, for a `StreamedSet`.
        rank: this process's number among ``world_size``.
        world_size: number of processes that share each batch.
        parts: number of parts that each process splits its share into.

    Raises:
        UserError: if the set is empty, has no labels to mix, is smaller than the crop, or the batch
            does not divide among the processes and their parts.
    """

    def __init__(
        self,
        source: ImageSet | StreamedSet,
        config: StreamConfig,
        name: str,
        seed: int,
        device: torch.device | str,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> None:
        _check(source, config, name, world_size, parts)
        self.device = torch.device(device)
        self.source = source.to(self.device) if isinstance(source, ImageSet) else source
        self.config = config
        self.name = name
        self.seed = seed
        self.workers = workers
        share = config.batch_size // world_size
        # Mixing needs the image before the first one too; it is dropped afterwards.
        self._extra = int(config.augmentation.mix != "none" and world_size > 1)
        positions = torch.arange(rank * share - self._extra, (rank + 1) * share)
        positions = positions % config.batch_size
        self._rows = Rows(config.batch_size, positions.to(self.device))
        # the loader's sampler lists rows on the host; sets in memory are indexed where they are
        in_memory = isinstance(source, ImageSet)
        self._positions = self._rows.positions if in_memory else positions
        self._generator = torch.Generator(self.device)
        self._orders: dict[int, Tensor] = {}

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps ``start`` .. ``stop`` - 1.

        Raises:
            UserError: if an image of a streamed set cannot be read.
        """
        if isinstance(self.source, StreamedSet):
            yield from self._streamed(self.source, start, stop)
            return
        for step in range(start, stop):
            rows = self._indices(step)
            labels = None if self.source.labels is None else self.source.labels[rows]
            yield self._prepare(step, self.source.images[rows], labels)

    def _streamed(self, source: StreamedSet, start: int, stop: int) -> Iterator[Batch]:
        cuda = self.device.type == "cuda"
        loader = DataLoader(
            _Reading(source),
            batch_size=None,
            sampler=_Order(self, start, stop),
            num_workers=self.workers,
            pin_memory=cuda,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # leaves the process's own generator alone
        )
        for step, item in enumerate(loader, start):
            if isinstance(item, UserError):
                raise item
            images, labels = item
            images = images.to(self.device, non_blocking=cuda)
            if labels is not None:
                labels = labels.to(self.device, non_blocking=cuda)
            yield self._prepare(step, images, labels)

    def _indices(self, step: int) -> Tensor:
        """Which images of the set this process needs at ``step``, (B,), on the orders' device."""
        batch, size = self.config.batch_size, len(self.source)
        numbers = step * batch + self._positions
        first, last = step * batch // size, ((step + 1) * batch - 1) // size
        chosen = self._order(first)[numbers % size]
        for epoch in range(first + 1, last + 1):
            chosen = torch.where(
                numbers // size == epoch, self._order(epoch)[numbers % size], chosen
            )
        self._orders = {e: order for e, order in self._orders.items() if e >= last - 1}
        return chosen

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator()
            generator.manual_seed(keyed_seed(self.seed, self.name, "order", epoch))
            order = torch.randperm(len(self.source), generator=generator)
            self._orders[epoch] = order.to(self._positions.device)
        return self._orders[epoch]

    def _keyed(self, purpose: str, step: int) -> torch.Generator:
        return self._generator.manual_seed(keyed_seed(self.seed, self.name, purpose, step))

    def _prepare(self, step: int, images: Tensor, labels: Tensor | None) -> Batch:
        """Augment, mix and add noise: images (B, C, H, W) uint8 to the batch of ``step``."""
        options = self.config.augmentation
        generator = self._keyed("augment", step)
        if options.flip:
            images = flip(images, generator, self._rows)
        if options.crop_size is not None:
            padded = torch.nn.functional.pad(images, (options.crop_padding,) * 4)
            images = random_crop(padded, options.crop_size, generator, self._rows)
        elif options.crop_padding:
            images = padded_crop(images, options.crop_padding, generator, self._rows)
        x = to_floats(images)
        soft = None if labels is None else one_hot(labels, self.source.num_classes).float()
        if options.mix != "none" and soft is not None:
            x, soft = _MIX[options.mix](x, soft, self._keyed("mix", step))
        own = slice(self._extra, None)
        x = x[own]
        sigma, eps = self._noise(step, x)
        return Batch(
            x=x,
            y=x + sigma[:, None, None, None] * eps if self.config.noise.range[1] > 0 else x,
            sigma=sigma,
            eps=eps,
            labels=None if labels is None else labels[own],
            soft=None if soft is None else soft[own],
        )

    def _noise(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) and noise of x's shape: this process's share of the global draw."""
        total = self.config.batch_size
        generator = self._keyed("noise", step)
        sigma = self.config.noise.sample(total, generator, self.device)
        if self.config.noise.range[1] == 0:
            return sigma[: len(x)], torch.zeros_like(x)
        eps = torch.randn((total, *x.shape[1:]), generator=generator, device=self.device)
        if len(x) == total:
            return sigma, eps
        own = self._rows.positions[self._extra :]
        return sigma[own], eps[own]


def prefetched(
    streams: Mapping[str, Iterator[Batch]], device: torch.device
) -> Iterator[dict[str, Batch]]:
    """One batch of each stream at a time, until the first ends.

    On CUDA the next batches are drawn while the present step runs, on a stream of their own, so
    that their many small operations fill gaps of the step instead of following it.
    """
    drawn = zip(*streams.values(), strict=True)
    if device.type != "cuda":
        yield from (dict(zip(streams, batches, strict=True)) for batches in drawn)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    main = torch.cuda.current_stream(device)
    side.wait_stream(main)

    def draw() -> tuple[Batch, ...] | None:
        with torch.cuda.stream(side):
            return next(drawn, None)

    ahead = draw()
    while ahead is not None:
        main.wait_stream(side)
        for column in (column for batch in ahead for column in batch if column is not None):
            column.record_stream(main)
        present, ahead = ahead, draw()
        yield dict(zip(streams, present, strict=True))


class _Order:
    """The sampler of a loader: for each step, the images it needs."""

    def __init__(self, stream: Stream, start: int, stop: int) -> None:
        self._stream, self._steps = stream, range(start, stop)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield self._stream._indices(step).tolist()


class _Reading(Dataset[tuple[Tensor, Tensor | None] | UserError]):
    """What workers run: whole batches; a user's mistake is handed over without a traceback."""

    def __init__(self, source: StreamedSet) -> None:
        self._source = source

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor | None] | UserError:
        try:
            return self._source.read(indices)
        except UserError as error:
            return error


def _ignore_signals(worker: int) -> None:
    """Ctrl-C, and a launcher's request to end, reach every process of a group.

    The main one answers, and ends its workers in its own time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _check(
    source: ImageSet | StreamedSet, config: StreamConfig, name: str, world_size: int, parts: int
) -> None:
    if len(source) == 0:
        raise UserError(f"stream {name!r}: data set {source.name!r} has no {source.split} images")
    if config.augmentation.mix != "none" and source.labels is None:
        raise UserError(
            f"stream {name!r}: {config.augmentation.mix} mixes labels, and data set "
            f"{source.name!r} has none: set mix to none"
        )
    if config.batch_size % (world_size * parts):
        split = f" of {parts} parts each (compute.accumulate)" if parts > 1 else ""
        raise UserError(
            f"stream {name!r}: a batch of {config.batch_size} does not divide among {world_size} "
            f"process(es){split}: set streams.{name}.batch_size to a multiple of "
            f"{world_size * parts}"
        )
    crop, padding = config.augmentation.crop_size, config.augmentation.crop_padding
    if crop is not None and crop > min(source.image_size) + 2 * padding:
        height, width = source.image_size
        raise UserError(
            f"stream {name!r}: crop_size {crop} is larger than the images, {height}x{width}: "
            f"take at most {min(source.image_size) + 2 * padding}"
        )
