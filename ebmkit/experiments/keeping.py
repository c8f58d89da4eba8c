"""What is kept of a row, and whether it is whole: locks, folders, documents of suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebmkit.evaluation import SIGMAS, SUITES, parse_options
from ebmkit.storage import Busy, held
from ebmkit.storage.reading import read_json

__all__ = ["Busy", "Protocol", "alone", "fresh", "holds", "wanted_of", "whole"]

REPORTED = {
    "classify": ("accuracy", "accuracy_interval"),
    "denoise": ("denoisers", "knows_sigma"),
    "robustness": ("curves", "epsilons", "options"),
    "linearity": ("levels",),
    "jacobian": ("per_image", "paper"),
}
"""By suite, what reports are made of."""


@dataclass(frozen=True)
class Protocol:
    """How a trained row is measured.

    Attributes:
        name: of the folder of results.
        suites: those to run, which must suit the model.
        sigmas: noise levels of the suite ``denoise``, image units.
        images: by suite, test images at most; all where it is not named.
        noise_levels: of the suite ``classify``, image units.
        options: settings of suites.
    """

    name: str
    suites: tuple[str, ...]
    sigmas: tuple[float, ...] = SIGMAS
    images: Mapping[str, int] = field(default_factory=dict)
    noise_levels: tuple[float, ...] = (0.0,)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training the row in ``folder``; a dead one's lock is free.

    Raises:
        Busy: if one does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.parent, "training", name=folder.name):
        yield


def holds(values: Any, key: str) -> bool:
    """Whether nested ``values`` have the field called ``key``, with dots."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def fresh(folder: Path) -> Path:
    """A name beside ``folder`` that nothing has."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.broken-{number}")).exists():
        number += 1
    return aside


def whole(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document at ``path``, if it is whole and all entries are as ``wanted``."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    same = all(document.get(key) == value for key, value in wanted.items())
    reported = REPORTED.get(wanted["suite"], ())
    return document if same and all(document.get(k) is not None for k in reported) else None


def wanted_of(suite: str, protocol: Protocol, of: int) -> dict[str, Any]:
    """Entries that a document must have to be the one asked for."""
    wanted: dict[str, Any] = {
        "suite": suite,
        "of": of,
        "seed": 0,
    }
    if suite == "denoise":
        wanted["sigmas"] = list(protocol.sigmas)
    if suite == "classify":
        wanted["sigmas"] = sorted({0.0, *protocol.noise_levels})
    kind = SUITES[suite].options
    if kind is None:
        wanted["images"] = min(of, protocol.images.get(suite, of))
    else:  # its settings say how many
        given = parse_options({suite: protocol.options.get(suite, {})}, [suite])[kind]
        wanted["options"] = given.model_dump(mode="json")
    return wanted
