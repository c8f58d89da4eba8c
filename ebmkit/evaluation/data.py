r"""What every suite sees: images, and the same noise for every model.

Noise at level sigma is drawn on the CPU, image after image, from one generator per (seed, sigma).
So the n-th image gets the same noise whatever the model, the device, the batch size, or a limit on
the number of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ebmkit.data.identity import fingerprint
from ebmkit.distributed import DistributedContext

__all__ = ["Batch", "Images", "fingerprint", "noise_generator", "noisy_batches"]


class Images(Protocol):
    """The side of a set of images that an evaluation needs; `ebmkit.data.ImageSet` is one."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def num_classes(self) -> int: ...
    def __len__(self) -> int: ...
    def first(self, n: int, /) -> Self: ...
    def batches(self, size: int, /) -> Iterable[tuple[Tensor, Tensor | None]]: ...


class Batch(NamedTuple):
    """Images x, noisy images y = x + sigma * eps, both (B, C, H, W), and labels (B,), if any."""

    x: Tensor
    y: Tensor
    labels: Tensor | None


def noise_generator(seed: int, sigma: float) -> torch.Generator:
    """The generator of the noise at level ``sigma`` (image units)."""
    key = hashlib.sha256(f"evaluation noise {seed} {sigma:.9g}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7]))


def noisy_batches(
    images: Images,
    sigma: float,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    world: DistributedContext | None = None,
) -> Iterator[Batch]:
    """All ``images`` in order, noisy at level ``sigma``, on ``device``; at 0 the clean ones.

    Of several processes each gets every W-th batch; the noise of the others is drawn all the same.
    """
    world = world or DistributedContext()
    generator = noise_generator(seed, sigma)
    for number, (x, labels) in enumerate(images.batches(batch_size)):
        y = x
        if sigma:
            eps = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in x])
            y = x + sigma * eps.to(x)
        if number % world.size == world.rank:
            yield Batch(x.to(device), y.to(device), None if labels is None else labels.to(device))
