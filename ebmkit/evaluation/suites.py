"""The table of suites, and what a command line names of them: suites and their settings."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from pydantic import BaseModel

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, validated
from ebmkit.evaluation.adversarial import ADVERSARIAL
from ebmkit.evaluation.calibration import CALIBRATION
from ebmkit.evaluation.certify import CERTIFY
from ebmkit.evaluation.classify import CLASSIFY
from ebmkit.evaluation.context import Images
from ebmkit.evaluation.corruptions import CORRUPTIONS_SUITE
from ebmkit.evaluation.denoise import DENOISE
from ebmkit.evaluation.diffusion_path import DIFFUSION_PATH
from ebmkit.evaluation.generation import GENERATION
from ebmkit.evaluation.jacobian import JACOBIAN
from ebmkit.evaluation.linearity import LINEARITY
from ebmkit.evaluation.ood import OOD
from ebmkit.evaluation.robustness import ROBUSTNESS
from ebmkit.evaluation.robustness_grid import ROBUSTNESS_GRID
from ebmkit.evaluation.suite import Suite
from ebmkit.registry import Table, find

SUITES: dict[str, Suite] = Table(
    "suite",
    {
        "classify": CLASSIFY,
        "denoise": DENOISE,
        "calibration": CALIBRATION,
        "robustness": ROBUSTNESS,
        "robustness-grid": ROBUSTNESS_GRID,
        "certify": CERTIFY,
        "corruptions": CORRUPTIONS_SUITE,
        "jacobian": JACOBIAN,
        "linearity": LINEARITY,
        "adversarial": ADVERSARIAL,
        "ood": OOD,
        "generation": GENERATION,
        "diffusion-path": DIFFUSION_PATH,
    },
)

FORMER_NAMES = {"shift": "corruptions"}
"""Of suites, as in older documents, with the names of today."""


def find_suite(name: str) -> Suite:
    """The suite called ``name``.

    Raises:
        UserError: if there is none, or it has another name now.
    """
    if name in FORMER_NAMES:
        new = FORMER_NAMES[name]
        raise UserError(f"suite {name!r} is now called {new!r}: write --suite {new}")
    return find("suite", SUITES, name)


def parse_suites(text: str, model: ScoreModel, images: Images) -> list[str]:
    """The suites that ``text`` names, as in ``classify,denoise``.

    ``standard``: the quick ones that apply; ``all``: every one that applies and needs no setting.

    Raises:
        UserError: if a name is unknown, a suite named does not suit model and images, or none does.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    groups = {
        "standard": [name for name, suite in SUITES.items() if suite.standard],
        "all": [name for name, suite in SUITES.items() if not suite.needs],
    }
    if len(names) == 1 and names[0] in groups:
        names = [name for name in groups[names[0]] if _applies(SUITES[name], model, images)]
    if not names:
        raise UserError(f"no suite to run: name some of {', '.join([*groups, *SUITES])}")
    for name in names:
        if name in groups:
            raise UserError(f"suite {name!r} stands alone: leave out the others, or leave it out")
        find_suite(name).check(model, images)
    return list(dict.fromkeys(names))


def parse_options(
    options: Mapping[str, Mapping[str, Any]], chosen: Container[str]
) -> dict[type[BaseModel], BaseModel]:
    """Settings of suites, by their class.

    Args:
        options: by suite, fields and their values.
        chosen: the suites that will run.

    Raises:
        UserError: if there is no such suite, it is not among ``chosen``, it has no settings, or one
            is not legal.
    """
    found: dict[type[BaseModel], BaseModel] = {}
    for name, values in options.items():
        kind = find_suite(name).options
        if kind is None:
            having = [n for n, suite in SUITES.items() if suite.options is not None]
            raise UserError(f"suite {name!r} has no settings: those that do: {', '.join(having)}")
        if name not in chosen:
            raise UserError(f"settings of suite {name!r}, which does not run: --suite {name}")
        if not isinstance(values, Mapping):
            fields = ", ".join(kind.model_fields)
            raise UserError(f"settings of suite {name!r} must name a field: {fields}")
        found[kind] = validated(kind, dict(values), f"settings of suite {name!r}")
    return found


def _applies(suite: Suite, model: ScoreModel, images: Images) -> bool:
    try:
        suite.check(model, images)
    except UserError:
        return False
    return True
