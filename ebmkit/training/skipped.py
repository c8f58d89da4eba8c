"""Images that training leaves out because they cannot be read (``dataset.unreadable: skip``).

Each process meets its own; all know of all whenever metrics or a checkpoint are written, and the
checkpoint keeps them, so that a run that goes on counts as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebmkit.data import AnyImages, Stream, StreamedSet
from ebmkit.parallel import DistributedContext

__all__ = ["SkippedSamples"]

SHOWN = 5
"""Reasons that are written to the metrics."""


class SkippedSamples:
    """What was left out so far.

    Args:
        images: the training images; those left out when they were loaded count too.
        streams: what reads them.
        world: the processes that share the batches.

    Attributes:
        found: number of an image in the set -> why it cannot be read.
    """

    def __init__(
        self, images: AnyImages, streams: Mapping[str, Stream], world: DistributedContext
    ) -> None:
        self.before = images.left_out
        self.found: dict[int, str] = {}
        self._streams, self._world = streams, world
        self._may = isinstance(images, StreamedSet) and images.skip

    def __len__(self) -> int:
        return len(self.before) + len(self.found)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each was left out."""
        return (*self.before, *self.found.values())

    def look(self) -> None:
        """Learn what was left out since; all processes must do so together."""
        if not self._may:
            return
        own = {n: why for stream in self._streams.values() for n, why in stream.skipped.items()}
        for found in self._world.gather(own):
            self.found |= found
        self.found = dict(sorted(self.found.items()))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"unreadable": self.found} if self.found else {}

    def restore(self, found: Mapping[int, str]) -> None:
        """Go back to what a checkpoint had found."""
        self.found = dict(found)

    def row(self, step: int) -> dict[str, Any]:
        """For the end of the metrics: how many, and why the first ones."""
        return {
            "kind": "unreadable",
            "step": step,
            "count": len(self),
            "reasons": list(self.reasons[:SHOWN]),
        }
