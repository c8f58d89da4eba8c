r"""The replay buffer: chains that are kept between training steps.

Persistent contrastive divergence (Tieleman 2008) continues its chains instead of starting them
anew; JEM keeps 10,000 of them and continues a random batch at each step. With labels the slots are
divided among the classes, class c owning the slots :math:`cM/C \dots (c+1)M/C - 1`, so a chain of
p(x|c) goes on as one of p(x|c).

A batch takes different slots as long as there are enough, so that writing it back does not depend
on any order; memory is bounded by M images of float32.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """M images of float32, by class where there are labels.

    Args:
        images: (M, C, H, W), where the chains start.
        num_classes: among which the slots are divided; 0: they are not.

    Raises:
        UserError: if M is 0 or does not divide among the classes.
    """

    def __init__(self, images: Tensor, num_classes: int = 0) -> None:
        count = len(images)
        if count < 1:
            raise UserError("a replay buffer needs room for 1 image or more: negatives.buffer_size")
        if num_classes and count % num_classes:
            raise UserError(
                f"a replay buffer of {count} images does not divide among {num_classes} classes: "
                f"set negatives.buffer_size to a multiple of {num_classes}"
            )
        self.images = images
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor | None:
        """The label of each slot, (M,) int64; None without labels."""
        if not self.num_classes:
            return None
        each = len(self) // self.num_classes
        return torch.arange(len(self), device=self.images.device) // each

    def choose(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Slots (count,) int64, drawn at random, different ones as long as there are enough.

        Args:
            count: how many.
            generator: on the buffer's device.
            labels: (count,), whose slots to take; needed by a buffer with classes.
        """
        classes = self.num_classes or 1
        keys = torch.rand(
            classes, len(self) // classes, generator=generator, device=self.images.device
        )
        order = keys.argsort(dim=1)
        if not self.num_classes:
            places = torch.arange(count, device=order.device) % len(self)
            return order[0, places]
        assert labels is not None
        own = torch.nn.functional.one_hot(labels, classes)
        rank = (own.cumsum(0) * own).sum(1) - 1  # how many of its class come before it
        each = order.shape[1]
        return labels * each + order[labels, rank % each]

    def put(self, slots: Tensor, images: Tensor) -> None:
        """Replace the chains in ``slots`` (B,) by ``images`` (B, C, H, W)."""
        self.images[slots] = images.detach()

    def to_bytes(self) -> bytes:
        """The buffer as an HDF5 file: ``images`` (M, C, H, W) float32 and ``labels`` (M,)."""
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file["images"] = self.images.cpu().numpy()
            if self.labels is not None:
                file["labels"] = self.labels.cpu().numpy()
        return buffer.getvalue()

    @staticmethod
    def read_images(content: bytes, what: str) -> Tensor:
        """The images in an HDF5 file that `to_bytes` wrote, (M, C, H, W) float32.

        Args:
            content: of the file.
            what: names the file in messages.

        Raises:
            UserError: if it is not such a file.
        """
        with open_hdf5(content, what) as file:
            found = find_array(file, "images", what)
            if found is None or found.dtype != "float32" or found.ndim != 4:
                raise UserError(f"{what} is damaged: it holds no replay buffer")
            return torch.from_numpy(read_array(found, what))
