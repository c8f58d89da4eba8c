"""Settings of guidance, and the table of the guides that have a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.guidance.combine import View
from ebmkit.guidance.guides import (
    DUAL_WEIGHT,
    PGD_STEP_SIZE,
    PGD_STEPS,
    accumulated_guide,
    classifier_guide,
    dual_guide,
    energy_guide,
    pgd_guide,
)
from ebmkit.guidance.schedules import parse_schedule
from ebmkit.registry import find
from ebmkit.sampling.target import DensityFunction
from ebmkit.validation import validated

__all__ = [
    "CLASSIFIER_FREE",
    "GUIDES",
    "AccumulatedSettings",
    "DualSettings",
    "GuidanceConfig",
    "GuideEntry",
    "GuideSettings",
    "PGDSettings",
    "make_guidance",
]

CLASSIFIER_FREE = "classifier-free"
"""The way that needs no guide: the sampled model itself knows labels."""

Inner = Literal["classifier", "energy", "dual"]

_INNER = "inner guide that is increased: classifier, energy or dual"
_LAMBDA = "dual: weight of |mean E of the label - E(v)|"
_GAMMA = "l2 length of an ascent step, image units"


class GuideSettings(BaseModel):
    """Settings of guides that have none."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


class DualSettings(GuideSettings):
    """Settings of ``dual``."""

    lambda_: float = Field(DUAL_WEIGHT, ge=0, alias="lambda", description=_LAMBDA)


class PGDSettings(DualSettings):
    """Settings of ``pgd``."""

    n: int = Field(PGD_STEPS, ge=0, description="number of ascent steps; 0 is the inner guide")
    gamma: float = Field(PGD_STEP_SIZE, ge=0, description=_GAMMA)
    inner: Inner = Field("energy", description=_INNER)


class AccumulatedSettings(DualSettings):
    """Settings of ``accumulated``."""

    n: int = Field(
        5,
        ge=1,
        description="number of accumulated gradients; 1 is the inner guide (RCG gives no number)",
    )
    gamma: float = Field(PGD_STEP_SIZE, ge=0, description=_GAMMA)
    inner: Inner = Field("classifier", description=_INNER)


S = TypeVar("S", bound=GuideSettings)
Labels = Tensor | int
Means = Sequence[float] | None


@dataclass(frozen=True)
class GuideEntry(Generic[S]):
    """A way to guide that has a name.

    Attributes:
        name: of the table.
        about: one line.
        config: its settings.
        make: guide model, labels, settings and mean energies (C,) to the guide; None where there
            is no guide.
    """

    name: str
    description: str
    config: type[S]
    make: Callable[[EnergyModel, Labels, S, Means], DensityFunction] | None

    def needs_means(self, settings: GuideSettings) -> bool:
        """Whether the guide needs the mean energies of each label's training images."""
        return self.name == "dual" or getattr(settings, "inner", "") == "dual"


def _dual(model: EnergyModel, c: Labels, settings: DualSettings, means: Means) -> DensityFunction:
    if means is None:
        raise UserError(
            "guide dual needs the mean energy of each label's training images: give means, as "
            "ebmkit.guidance.class_energies computes them"
        )
    return dual_guide(model, c, means, settings.lambda_)


def _inner(
    model: EnergyModel, c: Labels, settings: PGDSettings | AccumulatedSettings, means: Means
) -> DensityFunction:
    if settings.inner == "dual":
        return _dual(model, c, settings, means)
    return (energy_guide if settings.inner == "energy" else classifier_guide)(model, c)


GUIDES: dict[str, GuideEntry[Any]] = {
    entry.name: entry
    for entry in (
        GuideEntry(
            "classifier",
            "log p(c|x): classifier guidance (Dhariwal & Nichol 2021)",
            GuideSettings,
            lambda model, c, settings, means: classifier_guide(model, c),
        ),
        GuideEntry(
            "energy",
            "log p(x, c) = -E(x, c): joint energy (RCG section 4.6)",
            GuideSettings,
            lambda model, c, settings, means: energy_guide(model, c),
        ),
        GuideEntry(
            "dual",
            "-E(x, c) - lambda |mean E of the label - E(x)| (RCG section 4.8)",
            DualSettings,
            _dual,
        ),
        GuideEntry(
            "pgd",
            "a guide's gradient after n normalised steps up it (RCG section 4.9)",
            PGDSettings,
            lambda model, c, settings, means: pgd_guide(
                _inner(model, c, settings, means), settings.n, settings.gamma
            ),
        ),
        GuideEntry(
            "accumulated",
            "the sum of a guide's gradients along n normalised steps up it (RCG section 4.3)",
            AccumulatedSettings,
            lambda model, c, settings, means: accumulated_guide(
                _inner(model, c, settings, means), settings.n, settings.gamma
            ),
        ),
        GuideEntry(
            CLASSIFIER_FREE,
            "by the sampled model's own labels, w = scale: 0 without, 1 with (Ho & Salimans 2021)",
            GuideSettings,
            None,
        ),
    )
}
"""All ways to guide, by name."""


class GuidanceConfig(BaseModel):
    """How samples are guided."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    guidance: str = Field("energy", description="a name from `ebmkit list guidance`")
    options: dict[str, Any] = Field({}, description="resolved settings of the guide")
    scale: float = Field(1.0, ge=0, description="guidance scale s; 0: unguided")
    schedule: str = Field(
        "exact", description="guidance schedule g(t), for example sigmoid:t0=500,y0=0.05,k=0.02"
    )
    view: View | None = Field(
        None,
        description="input of the guide: noisy, shrunk or clean; null: noisy if the guide "
        "takes the noise level, else shrunk",
    )
    through: bool = Field(False, description="view clean: backpropagate through the denoiser")
    late: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the noise levels without guidance, from the noisiest down",
    )

    @field_validator("schedule")
    @classmethod
    def _written(cls, text: str) -> str:
        return str(parse_schedule(text))

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        own = validated(self.entry.config, self.options, f"settings of guide {self.guidance!r}")
        object.__setattr__(self, "options", own.model_dump(mode="json", by_alias=True))
        if self.through and self.view != "clean":
            raise ValueError("through goes back through the denoiser: it needs the view clean")
        if self.guidance == CLASSIFIER_FREE and self.view is not None:
            raise ValueError(f"{CLASSIFIER_FREE} shows no guide anything: leave the view out")
        return self

    @property
    def entry(self) -> GuideEntry[Any]:
        """The way to guide.

        Raises:
            UserError: if there is none of this name.
        """
        return find("guidance", GUIDES, self.guidance)

    @property
    def settings(self) -> Any:
        """The guide's own settings."""
        return self.entry.config.model_validate(self.options)

    @property
    def needs_means(self) -> bool:
        """Whether the guide needs the mean energies of each label's training images."""
        return self.entry.needs_means(self.settings)


def make_guidance(**values: Any) -> GuidanceConfig:
    """`GuidanceConfig` of ``values``.

    Raises:
        UserError: if one is not legal.

    >>> make_guidance(guidance="pgd", options={"n": 20}).options["gamma"]
    0.01
    """
    return validated(GuidanceConfig, values, "guidance")
