"""Which folder results belong in: another one wherever they cannot be compared.

::

    RUN/evaluation/                   test images of the data set trained on, all or the first
    RUN/evaluation/cifar100-test/     anything else: other images, other weights
      classify.json  denoise.json  calibration.json  and pictures
    RUN/evaluation/digits-test-steps=100/  settings of a suite's own
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ebmkit.energy import ScoreModel
from ebmkit.evaluation.data import Images, fingerprint
from ebmkit.storage.reading import read_json

__all__ = ["evaluation_folder"]


def evaluation_folder(
    run: Path,
    model: ScoreModel,
    images: Images,
    limit: int | None = None,
    weights: str = "last",
    options: Mapping[type[BaseModel], BaseModel] | None = None,
) -> Path:
    """Where results of this model on these images belong; not made yet.

    ``RUN/evaluation`` for the test split of the data set that the model was trained on, else a
    folder in it that is named by what differs. Results of more images are never replaced by those
    of fewer: these go to a folder named by the limit. A folder that holds results of other images
    of the same name (two image folders, say) is left alone: the name gets the images' fingerprint.
    Results with settings of their own go to a folder that is named by these settings.

    Args:
        run: the run folder.
        model: its ``card`` says what it was trained on.
        images: the whole split.
        limit: how many of them are used; None: all.
        weights: ``last`` or ``best``.
        options: settings of suites by their class, as `parse_options` makes them.
    """
    home = run / "evaluation"
    used = len(images) if limit is None else min(limit, len(images))
    parts = [images.name, images.split]
    if weights != "last":
        parts.append(weights)
    changed = _changed(options or {})
    name = re.sub(r"[^\w.-]+", "_", "-".join(parts)).lstrip(".")
    trained_on = model.card.dataset if model.card else None
    folder = home if parts == [trained_on, "test"] else home / name
    if changed:
        name = f"{name}-{changed}"
        folder = home / name
    mark = fingerprint(images)
    if _holds(folder, lambda old: old.get("fingerprint", mark) != mark):
        folder = home / f"{name}-{mark}"
    if _holds(folder, lambda old: old.get("images", 0) > used):
        folder = home / f"{name}-limit{used}"
    return folder


def _changed(options: Mapping[type[BaseModel], BaseModel]) -> str:
    """Settings that are not the defaults, as in ``images=5-steps=2``; a digest if they are long."""
    fields = {
        name: value
        for kind, given in options.items()
        for name, value in given.model_dump(mode="json").items()
        if value != kind().model_dump(mode="json")[name]
    }
    text = "-".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    short = re.sub(r"[^\w.=-]+", "_", text).strip("_")
    if len(short) <= 60:
        return short
    return "-".join([*fields, hashlib.sha256(text.encode()).hexdigest()[:8]])[-60:].lstrip("-_.")


def _holds(folder: Path, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether ``folder`` holds results of some suite that are as ``wanted``."""
    for path in folder.glob("*.json"):
        try:
            document = read_json(path)
        except (OSError, ValueError):  # not ours to read
            continue
        if isinstance(document, dict) and "suite" in document and wanted(document):
            return True
    return False
