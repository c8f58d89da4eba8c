"""Random numbers as functions of a key, so that resuming needs no generator state.

================== ================================ =============================================
function           key                              draws
================== ================================ =============================================
`keyed_generator`  any values: seed, stream, step,  of a step or batch, in training and sampling,
                   ...; BLAKE2b                     on any device
`hashed_generator` texts and bytes; SHA-256         of an evaluated image, on the CPU, the same in
                                                    every batch
`seeded_generator` a seed alone                     made once: masks, signs, directions, splits
`bit_hash`         the bits of numbers              inside a loss, which may be compiled
================== ================================ =============================================

One of BLAKE2b and SHA-256 would do, but exchanging one would change the results of a seed. NumPy's
generators draw bootstrap samples and Lanczos vectors (a seed alone, `ebmkit.evaluation`) and the
training sets of the theory (`ebmkit.experiments.theory.fits`, a key with a CRC-32).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed_seed(*key: object) -> int:
    """Hash ``key`` to a 63-bit seed for a `torch.Generator`, the same on every machine.

    >>> keyed_seed(0, "ce", "noise", 7) == keyed_seed(0, "ce", "noise", 7)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(device: torch.device | str, *key: object) -> torch.Generator:
    """Create a generator on ``device``, seeded by ``key``."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def seeded_generator(seed: int) -> torch.Generator:
    """Create a CPU generator with ``seed`` alone, for numbers that are drawn once."""
    return torch.Generator().manual_seed(seed)


def hashed_generator(*key: str | bytes) -> torch.Generator:
    """Create a CPU generator, seeded by 56 bits of the SHA-256 of ``key``, joined by spaces."""
    text = b" ".join(part.encode() if isinstance(part, str) else part for part in key)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))


def image_generators(x: Tensor, key: str) -> list[torch.Generator]:
    """Create a generator for each image of ``x`` (B, ...), seeded by its content and ``key``.

    So the random numbers of an image do not depend on its batch.
    """
    return [hashed_generator(key, image.numpy().tobytes()) for image in x.detach().cpu()]


def image_noise(x: Tensor, draws: int, key: str) -> Tensor:
    """Draw standard normal noise (B, draws, C, H, W) for images ``x`` (B, C, H, W), one generator
    per image; dtype and device are those of ``x``."""
    shape = (draws, *x.shape[1:])
    return torch.stack([torch.randn(shape, generator=g) for g in image_generators(x, key)]).to(x)


def bit_hash(numbers: Tensor) -> Tensor:
    """Hash the bits of each entry of ``numbers`` (float32 or float64) to 0 .. 2^32 - 1, int64.

    The hash is the same on every device, under every compiler, and for every division of a batch.
    """
    low = 0xFFFFFFFF
    wide = numbers.dtype == torch.float64
    bits = numbers.contiguous().view(torch.int64 if wide else torch.int32).to(torch.int64)
    bits = (bits ^ (bits >> 32)) & low
    for factor, shift in ((0x5BD1E995, 15), (0x2C1B3C6D, 13), (0x297A2D39, 16)):
        bits = (bits * factor) & low  # below 2^63: the factors are below 2^31
        bits = bits ^ (bits >> shift)
    return bits
