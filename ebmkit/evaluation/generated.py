"""Samples that `ebmkit sample` wrote, as an HDF5 file; and real images to set beside them.

::

    images       (N, H, W, C) uint8
    finite       (N,) bool: whether the chain ended with finite numbers
    labels       (N,) int64, the label that was asked for (optional)

with the attributes ``source`` (fresh or buffer), ``sampler``, ``settings``, ``seed``, ``run`` and
``filter`` (what was left out before they were written; optional).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation.context import Images
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array, read_attribute

__all__ = ["Generated", "other_split", "read_samples"]

ATTRIBUTES = ("source", "sampler", "settings", "seed", "run", "filter")


@dataclass(frozen=True)
class Generated:
    """Samples whose numbers are finite.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 that were asked for, or None.
        left_out: how many were not finite.
        about: what the file says of them.
    """

    images: Tensor
    labels: Tensor | None
    left_out: int
    description: dict[str, Any]


def read_samples(path: Path, like: Images, context: str = "generation.samples") -> Generated:
    """The samples in ``path``, to be compared with images ``like``.

    Args:
        path: the HDF5 file.
        like: images of the wanted shape.
        context: which context names the file, for errors.

    Raises:
        UserError: if the file is missing, damaged, or none of `ebmkit sample`'s, its images have
            another shape, or none is finite.
    """
    from ebmkit.data.hdf5 import read_contents

    if not path.is_file():
        raise UserError(
            f"{context}: there is no file {str(path)!r}: make one by `ebmkit sample RUN --out DIR`"
        )
    contents = read_contents(path)
    shape = (*like.image_size, like.channels)
    if contents.shape[1:] != shape:
        raise UserError(
            f"{context}: {str(path)!r} holds images of {_shape(contents.shape[1:])} and "
            f"{like.name!r} of {_shape(shape)}: compare with a data set of the same shape"
        )
    images, finite, description = _read(path)
    if finite.shape != (len(images),):
        raise UserError(f"{str(path)!r}: 'finite' must have one entry for each of {len(images)}")
    kept = torch.from_numpy(finite)
    if not kept.any():
        raise UserError(f"{str(path)!r}: none of {len(images)} samples is finite: sample anew")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    labels = None if contents.labels is None else contents.labels[kept]
    digest = hashlib.sha256(images.tobytes()).hexdigest()[:8]
    description = {"file": path.name, "fingerprint": digest} | description
    return Generated(pixels[kept], labels, int((~kept).sum()), description)


def other_split(images: Images, data_dir: Path | None) -> Images | None:
    """Training images of the data set of ``images`` (test images, if it is those), if found."""
    from ebmkit.data import DATASETS, load_dataset

    if images.name not in DATASETS:
        return None
    sized = images.name in ("folder", "imagenet", "patches")
    try:
        other = load_dataset(
            images.name,
            data_dir,
            "test" if images.split == "train" else "train",
            image_size=images.image_size[0] if sized else None,
            download=False,
            progress=False,
        )
    except UserError:
        return None
    same = (other.channels, other.image_size) == (images.channels, images.image_size)
    return other if same else None


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    what = repr(str(path))
    with open_hdf5(path) as file:
        found, marks = find_array(file, "images", what), find_array(file, "finite", what)
        assert found is not None  # its contents were read
        images = read_array(found, what)
        finite = np.ones(len(images), bool)
        if marks is not None:
            finite = read_array(marks, what).astype(bool)
        said = {name: read_attribute(file, name, what) for name in ATTRIBUTES}
    description = {name: value for name, value in said.items() if value is not None}
    if "source" not in description:
        raise UserError(
            f"{str(path)!r} does not say where its samples come from: it must have the attribute "
            "'source', fresh or buffer, as `ebmkit sample RUN --out DIR` writes it"
        )
    if isinstance(description.get("settings"), str):
        with contextlib.suppress(ValueError):  # it stays text
            description["settings"] = json.loads(description["settings"])
    return images, finite, description


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
