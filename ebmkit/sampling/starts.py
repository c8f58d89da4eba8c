r"""Where chains start: Gaussians of the data, and the replay buffer.

**Gaussian of each class** (Santurkar et al., arXiv 1906.09453; JEM++, arXiv 2109.09032),

.. math:: x_0 \sim \mathcal N(\mu_c, \Sigma_c), \qquad c \sim p(c)

with the mean and covariance of the images of class c. Of n images in d dimensions the covariance is
never formed: with the centred images :math:`X \in \mathbb R^{n \times d}`,

.. math:: x_0 = \mu_c + X^\top z / \sqrt{n - 1}, \qquad z \sim \mathcal N(0, I_n)

has just that covariance, of whatever rank.

**Replay buffer.** Persistent contrastive divergence (Tieleman 2008) continues its chains between
training steps instead of starting them anew; JEM stores 10,000 of them and continues a random batch
at each step. With labels the slots are divided among the classes, class c owning the slots
:math:`cM/C \dots (c+1)M/C - 1`, so a chain of p(x|c) continues as one of p(x|c). A batch takes
different slots as long as there are enough, so that writing it back does not depend on any order;
memory is bounded by M images of float32.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array

FITTED = 1000
"""Images of a class that its Gaussian is fitted to, at the most, evenly through the set."""


class ClassGaussians:
    """The Gaussians of each class of ``images``, or of all together.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64; None: one Gaussian.

    Raises:
        UserError: if a class has fewer than two images.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        count = int(labels.max()) + 1 if labels is not None else 1
        self.means, self.spreads, shares = [], [], []
        for c in range(count):
            own = images if labels is None else images[labels == c]
            if len(own) < 2:
                raise UserError(
                    f"class {c} has {len(own)} image(s), too few to fit a Gaussian to: start "
                    "chains from uniform noise"
                )
            shares.append(len(own))
            rows = torch.arange(min(len(own), FITTED), device=own.device)
            fitted = own[rows * len(own) // len(rows)]
            self.means.append(fitted.mean(0))
            self.spreads.append((fitted - fitted.mean(0)).flatten(1) / (len(fitted) - 1) ** 0.5)
        self.shares = torch.tensor(shares, dtype=images.dtype, device=images.device)

    def sample(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Starting points (count, C, H, W), not clipped.

        Args:
            count: how many.
            generator: on the device of the images.
            labels: (count,), which Gaussians; None: classes as often as they are in the set.

        Raises:
            UserError: if there were no images of a label.
        """
        if labels is not None and len(labels) and int(labels.max()) >= len(self.means):
            raise UserError(
                f"label {int(labels.max())} has 0 images to fit a Gaussian to, the largest label "
                f"among them is {len(self.means) - 1}: start chains from uniform noise"
            )
        if labels is None:
            labels = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        kind: dict[str, Any] = {"dtype": self.shares.dtype, "device": self.shares.device}
        largest = max(len(spread) for spread in self.spreads)
        z = torch.randn(count, largest, generator=generator, **kind)
        out = torch.empty((count, *self.means[0].shape), **kind)
        for c, (mean, spread) in enumerate(zip(self.means, self.spreads, strict=True)):
            rows = torch.nonzero(labels == c).flatten()
            if len(rows):
                drawn = z[rows, : len(spread)] @ spread
                out[rows] = mean + drawn.reshape(-1, *mean.shape)
        return out


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
