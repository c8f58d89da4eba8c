"""Randomness that is a function of a key: to go on with anything needs no generator's state."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = [
    "hashed_generator",
    "image_generators",
    "image_noise",
    "keyed_generator",
    "keyed_seed",
]


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for a `torch.Generator`, the same everywhere for the same key.

    >>> keyed_seed(0, "ce", "noise", 7) == keyed_seed(0, "ce", "noise", 7)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(device: torch.device | str, *key: object) -> torch.Generator:
    """A generator on ``device`` that is a function of ``key`` alone."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def hashed_generator(*key: str | bytes) -> torch.Generator:
    """A generator on the CPU from the first 56 bits of the SHA-256 of ``key``, joined by spaces."""
    text = b" ".join(part.encode() if isinstance(part, str) else part for part in key)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))


def image_generators(x: Tensor, key: str) -> list[torch.Generator]:
    """A generator for each image of ``x`` (B, ...), a function of its content and ``key``.

    So what an image gets does not depend on the batch that it is in.
    """
    return [hashed_generator(key, image.numpy().tobytes()) for image in x.detach().cpu()]


def image_noise(x: Tensor, draws: int, key: str) -> Tensor:
    """Standard normal noise for each image of ``x`` (B, C, H, W) by its own generator:
    (B, draws, C, H, W), of the type of x and on its device."""
    shape = (draws, *x.shape[1:])
    return torch.stack([torch.randn(shape, generator=g) for g in image_generators(x, key)]).to(x)
