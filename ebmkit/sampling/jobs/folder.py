"""The folder of a job that an interrupted process resumes: samples, or restorations of images.

While the job runs, its folder holds ``unfinished/`` with ``settings.json``, all that the results
depend on, and tensors that were saved (``state`` is the chains that are under way), each with a
digest of itself. `JobFolder.finish` removes it. Every file is written in one move.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.models.saving import digest
from ebmkit.storage import held, make_folder, write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.storage.tensors import read_tensors
from ebmkit.training.config import difference

UNFINISHED, SETTINGS, STATE = "unfinished", "settings.json", "state"


class JobFolder:
    """The files of a job in ``path``; nothing is touched before `begin`.

    Args:
        path: the folder.
        results: what the job makes, for messages: ``samples``.
        done: name of the document that a finished job leaves, which has its folder to itself;
            empty: the job shares its folder.
    """

    def __init__(self, path: Path, results: str = "samples", done: str = "sampling.json") -> None:
        self.path, self.home, self.results, self.done = path, path / UNFINISHED, results, done

    def resumes(self, settings: BaseModel | dict[str, Any]) -> bool:
        """Whether an interrupted job of the same ``settings`` is there; a model upgrades its own.

        Raises:
            UserError: if one of other settings is.
        """
        known = self.home / SETTINGS
        if not known.is_file():
            return False
        try:
            old = read_json(known)
        except UserError:
            old = None
        if not isinstance(old, dict):
            raise UserError(f"{str(known)!r} is damaged: it does not parse; choose another --out")
        if isinstance(settings, BaseModel):
            with contextlib.suppress(ValidationError):  # later fields have defaults
                old = type(settings).model_validate(old).model_dump(mode="json")
        found = difference(old, _plain(settings))
        if found is not None:
            key, before, now = found
            raise UserError(
                f"{str(self.path)!r} holds unfinished {self.results} of other settings: {key} was "
                f"{before!r} and is now {now!r}; resume with the former, or choose another --out"
            )
        return True

    def begin(self, settings: BaseModel | dict[str, Any]) -> None:
        """Make the folder, or resume the job that `resumes` finds there.

        Raises:
            UserError: as `resumes`; if the folder cannot be made; or, of a job that has it to
                itself, if finished results or other files are there.
        """
        path = self.path
        if self.done and (path / self.done).exists():
            raise UserError(f"{str(path)!r} holds finished {self.results}: choose another --out")
        if self.resumes(settings):
            return
        if self.done and path.exists() and (not path.is_dir() or any(self._foreign())):
            raise UserError(
                f"{str(path)!r} holds something else than {self.results} of an interrupted run: "
                "choose another --out"
            )
        make_folder(path)
        make_folder(self.home)
        content = json.dumps(_plain(settings), indent=2).encode()
        write_atomically(self.home / SETTINGS, content)

    def _foreign(self) -> Iterator[Path]:
        """What is not of a job that was stopped before it began."""
        for entry in self.path.iterdir():
            if entry != self.home or not entry.is_dir():
                yield entry
            else:
                yield from (p for p in entry.iterdir() if not p.name.startswith("."))

    def alone(self, doing: str = "sampling") -> contextlib.AbstractContextManager[None]:
        """Within, no other process works in the folder.

        Raises:
            Busy: if one does.
        """
        return held(self.home, doing)

    def file(self, name: str) -> Path:
        """Where tensors are saved under ``name``."""
        return self.home / f"{name}.safetensors"

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write ``tensors`` under ``name``.

        Raises:
            UserError: if the disk is full or not writable.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = safetensors.torch.save(state, metadata={"sha256": digest(state)})
        write_atomically(self.file(name), content)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under ``name``, on the CPU; None if nothing was.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.file(name)
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

    def finish(self, document: dict[str, Any] | None = None) -> None:
        """Write ``document`` as the one that says so, and remove what only resuming needs."""
        if document is not None:
            content = json.dumps(document, indent=1, allow_nan=False).encode()
            write_atomically(self.path / self.done, content)
        shutil.rmtree(self.home, ignore_errors=True)


def _plain(settings: BaseModel | dict[str, Any]) -> dict[str, Any]:
    return settings if isinstance(settings, dict) else settings.model_dump(mode="json")
