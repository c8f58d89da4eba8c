"""Data sets that come along with scikit-learn: no files to get, no network.

digits: 1,797 scans of handwritten digits, 8x8 gray, values 0..16 spread over 0..255. A fixed fifth,
stratified by class, is the test set; a tenth of the rest is held out for validation.

patches: two photographs of 427x640 pixels. Columns 0..447 give the training patches (overlapping
by three quarters), 448..511 the validation patches and 512..639, the right-hand fifth, the test
patches (both without overlap), so that no pixel is in two splits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from ebmkit.data.imagesets import ImageSet, Split
from ebmkit.errors import UserError

__all__ = ["digits", "patches"]

_COLUMNS: dict[Split, tuple[int, int]] = {
    "train": (0, 448),
    "validation": (448, 512),
    "test": (512, 640),
}


def digits(split: Split) -> ImageSet:
    """One split of scikit-learn's digits: (N, 1, 8, 8), labels 0..9."""
    pixels, labels, rows = _digits()
    return ImageSet(
        name="digits",
        split=split,
        images=torch.from_numpy(pixels[rows[split]]),  # a copy
        labels=torch.from_numpy(labels[rows[split]]),
        class_names=tuple("0123456789"),
    )


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, dict[Split, np.ndarray]]:
    """Pixels (N, 1, 8, 8), labels, and the rows of each split: read from the text file once."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        train, test_size=0.1, stratify=labels[train], random_state=0
    )
    pixels = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return (
        pixels,
        labels.astype(np.int64),
        {"train": train, "validation": validation, "test": test},
    )


def patches(split: Split, size: int = 32) -> ImageSet:
    """One split of the patches: (N, 3, size, size), no labels.

    Raises:
        UserError: if ``size`` does not fit the narrowest region, or is below 4.
    """
    from sklearn.datasets import load_sample_images

    if not 4 <= size <= 64:
        raise UserError(f"patches of {size}x{size} cannot be cut: take a size from 4 to 64")
    left, right = _COLUMNS[split]
    stride = max(1, size // 4) if split == "train" else size
    photographs = torch.from_numpy(np.stack(load_sample_images().images))  # (2, 427, 640, 3)
    region = photographs[:, :, left:right]
    windows = region.unfold(1, size, stride).unfold(2, size, stride)  # (2, rows, columns, 3, s, s)
    return ImageSet(
        name="patches", split=split, images=windows.reshape(-1, 3, size, size).contiguous()
    )
