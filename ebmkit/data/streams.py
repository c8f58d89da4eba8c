r"""Streams of training batches; each batch is a function of the step.

All random numbers come from generators keyed by (seed, stream name, purpose, step), hashed to 63
bits: the order of each epoch, flips and crops, mixing, noise levels and noise. So the batch of step
t does not depend on earlier steps: resuming a run needs no state, the number of workers does not
change the batches, and with several processes ("ranks") each takes its share of the same global
batch.

Samples are numbered consecutively (see `ebmkit.data.schedule` if batch sizes change). Sample n is
entry :math:`n \bmod N` of the permutation of epoch :math:`\lfloor n / N \rfloor`. No remainder is
dropped, and a set may be smaller than a batch.

The process that reads whole images also crops them (`ebmkit.data.workers`), with random numbers
from the request. All other operations run on the batch, on the device of the stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ebmkit.data.augment import (
    RANDOM_NUMBERS_PER_CROP,
    Cut,
    Rows,
    crop_boxes,
    cutout,
    flip,
    mirror,
    mix,
    pad_images,
    random_crop,
    resize_boxes,
)
from ebmkit.data.imagesets import AnyImages, ImageSet, StreamedSet, to_floats
from ebmkit.data.schedule import Span, StreamConfig, span_at
from ebmkit.data.workers import read_batches
from ebmkit.errors import UserError
from ebmkit.randomness import keyed_generator, keyed_seed

MAX_WARNINGS = 10
"""Maximum number of skipped images with a warning each."""


class Batch(NamedTuple):
    """Images of one step on the stream's device; B is this process's share of the batch.

    Attributes:
        x: (B, C, H, W) float32, clean (augmented) images in [0, 1].
        y: (B, C, H, W), noisy images, x + sigma * eps.
        sigma: (B,) noise levels, image units.
        eps: (B, C, H, W) standard normal noise; zeros if the noise law has no noise.
        labels: (B,) int64, before mixing; None without labels.
        soft: (B, K) label probabilities, mixed as the images are; None without labels.
        extra: columns (B, ...) added by objectives (`ebmkit.objectives.Objective.prepare`), with
            keys OBJECTIVE.COLUMN such as "adv.attacked".
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    eps: Tensor
    labels: Tensor | None
    soft: Tensor | None
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # never modified

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        *own, extra = self
        return [column for column in (*own, *extra.values()) if column is not None]

    def rows(self, rows: slice) -> Batch:
        """The part of this batch at ``rows``."""
        *columns, extra = self
        own = [None if column is None else column[rows] for column in columns]
        return Batch._make([*own, {name: column[rows] for name, column in extra.items()}])

    def of(self, objective: str) -> Batch:
        """This batch with only the columns of ``objective`` in ``extra``, without the prefix."""
        if not self.extra:
            return self
        own = f"{objective}."
        found = {n.removeprefix(own): c for n, c in self.extra.items() if n.startswith(own)}
        return self._replace(extra=found)

    def with_columns(self, objective: str, columns: Mapping[str, Tensor]) -> Batch:
        """This batch with ``columns`` of ``objective`` added to ``extra``."""
        own = {f"{objective}.{name}": column for name, column in columns.items()}
        return self._replace(extra={**self.extra, **own})


class Stream:
    """Training batches of a data set, indexed by step.

    An `ImageSet` is kept on ``device`` as one tensor (move it there first to share it between
    streams). A `StreamedSet` is read by ``workers`` processes, or by the main process for 0.

    Args:
        source: data set.
        config: batch size, augmentation, noise.
        name: name of the stream; streams with different names have independent random numbers.
        seed: random seed of the run.
        device: device of the batches.
        workers: number of worker processes, for a `StreamedSet`.
        rank: rank of this process, 0 .. ``world_size`` - 1.
        world_size: number of processes that share each batch.
        parts: number of parts that each process splits its share into.
        steps: number of steps of the run, which ``config.phases`` refer to; None without phases.

    Attributes:
        skipped: index -> error message of the unreadable images skipped so far.

    Raises:
        UserError: if the set is empty, has no labels to mix, has images smaller than a crop, or a
            batch size is not divisible by the number of processes times ``parts``.
    """

    def __init__(
        self,
        source: AnyImages,
        config: StreamConfig,
        name: str,
        seed: int,
        device: torch.device | str,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        steps: int | None = None,
    ) -> None:
        self.spans = config.spans(steps)
        self.device = torch.device(device)
        self.source = source.to(self.device) if isinstance(source, ImageSet) else source
        self.config = config
        self.name = name
        self.seed = seed
        self.workers = workers
        self.skipped: dict[int, str] = {}
        self.crops = source.crops if isinstance(source, StreamedSet) else None
        self.rank, self.world_size = rank, world_size
        self._check(parts)
        # Mixing also needs the image before the first one, which is dropped afterwards.
        self._extra = int(config.augmentation.mix != "none" and world_size > 1)
        self._generator = torch.Generator(self.device)
        self._orders: dict[tuple[int, torch.device], Tensor] = {}
        self._first_flips: Tensor | None = None
        self._held: dict[tuple[int, torch.device], Rows] = {}

    def _check(self, parts: int) -> None:
        """Check the settings against the data set; errors name the field of the phase."""
        source, options, crops = self.source, self.config.augmentation, self.crops
        (height, width), padding = source.image_size, options.crop_padding
        least, data = min(height, width), f"data set {source.name!r}"
        share = self.world_size * parts
        split = f" of {parts} parts each (compute.accumulate)" if parts > 1 else ""

        def check(passed: bool, sentence: str) -> None:
            if not passed:
                raise UserError(f"stream {self.name!r}: {sentence}")

        check(len(source) > 0, f"{data} has no {source.split} images")
        check(
            options.mix == "none" or source.labels is not None,
            f"{options.mix} mixes labels, and {data} has none: set mix to none",
        )
        check(
            crops is None or not padding,
            f"crop_padding needs images of one size, and {data} gives whole images: set "
            "crop_padding to 0",
        )
        check(
            options.crop_fill != "reflect" or padding < least,
            f"images of {height}x{width} cannot be reflected {padding} pixels wide: set "
            f"crop_padding to at most {least - 1}",
        )
        what, side = f"the images, {height}x{width}", least + 2 * padding
        if crops is not None:
            what, side = f"the shorter side of the images, {crops.side}", crops.side
        for span in self.spans:
            where, crop = span.field(self.name), span.crop_size
            check(
                span.batch_size % share == 0,
                f"a batch of {span.batch_size} does not divide among {self.world_size} "
                f"process(es){split}: set {where}.batch_size to a multiple of {share}",
            )
            check(
                crop is None or options.crop_scale is not None or crop <= side,
                f"crop_size {crop} is larger than {what}: take at most {side} in {where}",
            )
            seen = (height, width) if crop is None else (crop, crop)
            check(
                options.cutout < min(seen),
                f"cutout {options.cutout} can cover a whole image of {seen[0]}x{seen[1]}: set "
                f"streams.{self.name}.augmentation.cutout to at most {min(seen) - 1}, or to 0 for "
                "none",
            )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` .. ``stop`` - 1.

        Raises:
            UserError: if an image of a streamed set cannot be read.
        """
        if isinstance(self.source, StreamedSet):
            yield from self._streamed(self.source, start, stop)
            return
        for step in range(start, stop):
            yield self._prepare(step, *self.source.read(self._indices(step, self.device)))

    def _streamed(self, source: StreamedSet, start: int, stop: int) -> Iterator[Batch]:
        cuda, host = self.device.type == "cuda", torch.device("cpu")
        steps = range(start, stop)
        requests = (
            (
                self._indices(step, host).tolist(),
                self._cut(step) if self.crops is not None else None,
            )
            for step in steps
        )
        read = read_batches(source, requests, self.workers, cuda)
        for step, (images, labels, skipped) in zip(steps, read, strict=True):
            for number, reason in skipped.items():  # warn about the first, count all
                if number not in self.skipped and len(self.skipped) < MAX_WARNINGS:
                    warnings.warn(f"skipped in stream {self.name!r}: {reason}", stacklevel=2)
                self.skipped[number] = reason
            images = images.to(self.device, non_blocking=cuda)
            if labels is not None:
                labels = labels.to(self.device, non_blocking=cuda)
            yield self._prepare(step, images, labels)

    def numbers(self, step: int) -> list[int]:
        """Data set indices of the images in this process's batch of ``step``."""
        place = self.device if isinstance(self.source, ImageSet) else torch.device("cpu")
        found: list[int] = self._indices(step, place).tolist()
        return found[self._extra :]

    def _indices(self, step: int, device: torch.device) -> Tensor:
        """Data set indices (B,) on ``device`` of the images that this process needs at ``step``."""
        span, size = span_at(self.spans, step), len(self.source)
        begin = span.first + (step - span.start) * span.batch_size
        numbers = begin + self._rows(span, device).positions
        first, last = begin // size, (begin + span.batch_size - 1) // size
        chosen = self._order(first, device)[numbers % size]
        for epoch in range(first + 1, last + 1):
            chosen = torch.where(
                numbers // size == epoch, self._order(epoch, device)[numbers % size], chosen
            )
        self._orders = {key: own for key, own in self._orders.items() if key[0] >= last - 1}
        return chosen

    def _order(self, epoch: int, device: torch.device) -> Tensor:
        key = epoch, device
        if key not in self._orders:
            order = torch.randperm(len(self.source), generator=self._on_host("order", epoch))
            self._orders[key] = order.to(device)
        return self._orders[key]

    def _rows(self, span: Span, device: torch.device) -> Rows:
        """This process's rows of a global batch of ``span``."""
        key = span.batch_size, device
        if key not in self._held:
            share = span.batch_size // self.world_size
            rows = torch.arange(self.rank * share - self._extra, (self.rank + 1) * share)
            self._held[key] = Rows(span.batch_size, (rows % span.batch_size).to(device))
        return self._held[key]

    def _cut(self, step: int) -> Cut | None:
        """Crops drawn on the CPU: all crops of whole images, and resized crops; otherwise None."""
        options, span = self.config.augmentation, span_at(self.spans, step)
        if options.crop_scale is None and not (
            self.crops is not None and span.crop_size is not None
        ):
            return None
        side = span.crop_size
        size = self.source.image_size if side is None else (side, side)
        generator = self._on_host("crop", step)
        draws = torch.rand(
            span.batch_size, RANDOM_NUMBERS_PER_CROP, generator=generator, dtype=torch.float64
        )
        own = draws[self._rows(span, torch.device("cpu")).positions]
        return Cut(own, size, options.crop_scale, options.crop_ratio)

    def _keyed(self, purpose: str, step: int) -> torch.Generator:
        return self._generator.manual_seed(keyed_seed(self.seed, self.name, purpose, step))

    def _on_host(self, purpose: str, number: int) -> torch.Generator:
        return keyed_generator("cpu", self.seed, self.name, purpose, number)

    def _prepare(self, step: int, images: Tensor, labels: Tensor | None) -> Batch:
        """Make the batch of ``step`` from images (B, C, H, W) uint8: augment, mix and add noise."""
        options, span = self.config.augmentation, span_at(self.spans, step)
        rows = self._rows(span, self.device)
        generator = self._keyed("augment", step)
        if options.flip == "alternating":
            images = mirror(images, self._mirrored(step))
        elif options.flip:
            images = flip(images, generator, rows)
        if self.crops is not None:
            pass  # cropped by the reader
        elif (cut := self._cut(step)) is not None:
            boxes = crop_boxes(images.shape[2], images.shape[3], cut)
            images = resize_boxes(images, boxes, cut.size)
        elif span.crop_size is not None or options.crop_padding:
            size = span.crop_size or tuple(images.shape[-2:])
            wide = pad_images(images, options.crop_padding, options.crop_fill)
            images = random_crop(wide, size, generator, rows)
        x = to_floats(images)
        if options.cutout:
            x = cutout(x, options.cutout, generator, rows)
        soft = None if labels is None else one_hot(labels, self.source.num_classes).float()
        if options.mix != "none" and soft is not None and self._mixes(step):
            x, soft = mix(x, soft, options.mix, self._keyed("mix", step))
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

    def _mirrored(self, step: int) -> Tensor:
        """Mask (B,) bool of the images that alternating flips mirror at ``step``."""
        span, size = span_at(self.spans, step), len(self.source)
        begin = span.first + (step - span.start) * span.batch_size
        epochs = (begin + self._rows(span, self.device).positions) // size
        if self._first_flips is None:
            drawn = torch.randint(2, (size,), generator=self._on_host("flip", 0))
            self._first_flips = drawn.to(self.device)
        return (self._first_flips[self._indices(step, self.device)] + epochs) % 2 == 1

    def _mixes(self, step: int) -> bool:
        """Whether the batch of ``step`` is mixed."""
        share = self.config.augmentation.mix_probability
        if share == 1:
            return True
        return float(torch.rand((), generator=self._on_host("mix share", step))) < share

    def _noise(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of the noise levels (B,) and of the noise, shaped like ``x``."""
        span = span_at(self.spans, step)
        total = span.batch_size
        generator = self._keyed("noise", step)
        sigma = self.config.noise.sample(total, generator, self.device)
        if self.config.noise.range[1] == 0:
            return sigma[: len(x)], torch.zeros_like(x)
        eps = torch.randn((total, *x.shape[1:]), generator=generator, device=self.device)
        if len(x) == total:
            return sigma, eps
        own = self._rows(span, self.device).positions[self._extra :]
        return sigma[own], eps[own]


def prefetch(
    streams: Mapping[str, Iterator[Batch]], device: torch.device
) -> Iterator[dict[str, Batch]]:
    """Yield one batch of each stream per step, until the streams end.

    On CUDA the next batches are prepared on a separate CUDA stream while the current step runs, so
    their many small kernels overlap with it.
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
        for column in (column for batch in ahead for column in batch.tensors):
            column.record_stream(main)
        present, ahead = ahead, draw()
        yield dict(zip(streams, present, strict=True))
