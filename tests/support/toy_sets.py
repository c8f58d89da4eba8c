"""Small data sets for tests."""

import torch

from ebmkit.data import ImageSet, StreamedSet
from ebmkit.errors import UserError


class MemoryReader:
    """Reads rows of a tensor like files; raises an error for ``damaged`` rows."""

    def __init__(self, images, damaged=()):
        self.images, self.damaged = images, damaged

    def read(self, rows):
        for row in rows:
            if row in self.damaged:
                raise UserError(f"'image{row}.png' is damaged")
        return self.images[torch.as_tensor(rows)]


def make_set(count=23, size=6, classes=4, channels=3):
    g = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, channels, size, size), generator=g).to(torch.uint8)
    labels = torch.arange(count) % classes if classes else None
    return ImageSet(images, labels, tuple("abcdefgh"[:classes]), "toy")


def as_streamed(source, damaged=()):
    return StreamedSet(
        MemoryReader(source.images, damaged),
        torch.arange(len(source)),
        source.channels,
        source.image_size,
        source.labels,
        source.class_names,
        source.name,
        source.split,
    )


def drawn(batch):
    """The columns of a batch from a stream, without ``extra``."""
    return list(batch)[:6]
