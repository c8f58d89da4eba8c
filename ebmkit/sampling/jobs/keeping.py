"""The folder of a sampling job, from its first step to its last file.

::

    DIR/
      unfinished/settings.json             what the samples depend on
      unfinished/batch-00000.safetensors   a batch of chains at its end, with its traces
      unfinished/state.safetensors         the batch that is under way
      samples.h5  samples.png  path.png  path.gif  sampling.json

``unfinished`` goes when ``sampling.json`` is there. Every file is written in one move, and those of
tensors carry a digest of themselves.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.models.saving import digest
from ebmkit.sampling.jobs.settings import SamplingSettings
from ebmkit.storage import held, write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.storage.tensors import read_tensors
from ebmkit.training.config import difference

__all__ = ["SamplingFolder"]

UNFINISHED, SETTINGS, STATE, DONE = "unfinished", "settings.json", "state", "sampling.json"


class SamplingFolder:
    """The files of one sampling job; nothing is touched before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / UNFINISHED

    def begin(self, settings: SamplingSettings) -> None:
        """Make the folder, or go on with the one that an interrupted job with ``settings`` left.

        Raises:
            UserError: if samples are finished there, something else is, or the settings were
                others; or it cannot be made.
        """
        path, known = self.path, self.home / SETTINGS
        if (path / DONE).exists():
            raise UserError(f"{str(path)!r} holds finished samples: choose another --out")
        if known.is_file():
            self._check_same(settings)
            return
        if path.exists() and (not path.is_dir() or any(_foreign(path))):
            raise UserError(
                f"{str(path)!r} holds something else than samples of an interrupted run: choose "
                "another --out"
            )
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make folder {str(path)!r}: {error.strerror}") from None
        write_atomically(known, json.dumps(settings.model_dump(mode="json"), indent=2).encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process works in the folder.

        Raises:
            Busy: if one does.
        """
        with held(self.home, "sampling"):
            yield

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write ``tensors`` under ``name``.

        Raises:
            UserError: if the disk is full or not writable.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = safetensors.torch.save(state, metadata={"sha256": digest(state)})
        write_atomically(self._file(name), content)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under ``name``, on the CPU; None if nothing was.

        Raises:
            UserError: if the file is damaged.
        """
        path = self._file(name)
        if not path.is_file():
            return None
        try:
            state, metadata = read_tensors(path)
        except UserError:
            state, metadata = {}, {}
        if not state or metadata.get("sha256") != digest(state):
            raise UserError(
                f"{str(path)!r} is damaged: remove it, and its batch of chains is drawn anew"
            )
        return state

    def has(self, name: str) -> bool:
        """Whether something was saved under ``name``."""
        return self._file(name).is_file()

    def forget(self, name: str) -> None:
        """Remove what was saved under ``name``."""
        self._file(name).unlink(missing_ok=True)

    def finish(self, document: dict[str, Any]) -> None:
        """Write ``sampling.json``, and remove what was only needed to go on."""
        content = json.dumps(document, indent=1, allow_nan=False).encode()
        write_atomically(self.path / DONE, content)
        shutil.rmtree(self.home, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.home / f"{name}.safetensors"

    def _check_same(self, settings: SamplingSettings) -> None:
        try:
            old = read_json(self.home / SETTINGS)
        except UserError:
            old = None
        if not isinstance(old, dict):
            raise UserError(
                f"{str(self.home / SETTINGS)!r} is damaged: it does not parse; choose another --out"
            )
        with contextlib.suppress(ValidationError):  # fields that came later have their defaults
            old = type(settings).model_validate(old).model_dump(mode="json")
        found = difference(old, settings.model_dump(mode="json"))
        if found is not None:
            key, before, now = found
            raise UserError(
                f"{str(self.path)!r} holds unfinished samples of other settings: {key} was "
                f"{before!r} and is now {now!r}; go on with the former, or choose another --out"
            )


def _foreign(path: Path) -> Iterator[Path]:
    """What lies in ``path`` and is not of a job that was stopped before it began."""
    for entry in path.iterdir():
        if entry.name != UNFINISHED or not entry.is_dir():
            yield entry
        else:
            yield from (p for p in entry.iterdir() if not p.name.startswith("."))
