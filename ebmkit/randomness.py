"""Randomness that is a function of a key: to go on with anything needs no generator's state."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["keyed_generator", "keyed_seed"]


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
