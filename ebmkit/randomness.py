"""Randomness that is a function of a key: to resume anything needs no generator's state."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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


def bit_hash(numbers: Tensor) -> Tensor:
    """A hash of the bits of each entry of ``numbers`` (float32 or float64), 0 to 2^32 - 1, int64.

    What is decided by it is keyed as the numbers are: the same on every device, under every
    compiler, and however a batch of them is divided.
    """
    low = 0xFFFFFFFF
    wide = numbers.dtype == torch.float64
    bits = numbers.contiguous().view(torch.int64 if wide else torch.int32).to(torch.int64)
    bits = (bits ^ (bits >> 32)) & low
    for factor, shift in ((0x5BD1E995, 15), (0x2C1B3C6D, 13), (0x297A2D39, 16)):
        bits = (bits * factor) & low  # below 2^63: the factors are below 2^31
        bits = bits ^ (bits >> shift)
    return bits
