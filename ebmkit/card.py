"""Model card: what a model was trained for, to warn about or refuse other uses."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ebmkit.registry import Plugin

LABEL_OBJECTIVES = {"ce", "adv", "trades"}
"""Objectives without a density, in cards that do not record `ModelCard.energies`."""

Side = Annotated[int, Field(ge=1, le=2**14)]

Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelCard(BaseModel):
    """Data, classes, objective and noise levels that a model was trained for."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    dataset: str = Field("", description="name of the training set")
    objective: str = Field("", description="objective, as on the command line")
    steps: int = Field(0, description="number of optimiser steps done")
    image_size: tuple[Side, Side] | None = None
    """height and width of the training images, pixels"""
    channels: int = Field(3, ge=1, le=1024, description="number of channels: 1 gray, 3 colour")
    class_names: list[str] = Field([])
    """class names in label order; empty without labels"""
    sigma_range: tuple[float, float] | None = Field(
        None,
        description="lowest and highest noise level of the denoising stream, image units; "
        "None: not trained to denoise, or unknown",
    )
    published_denoiser: bool = False
    """whether it is a published denoiser, trained to denoise even if its range is unknown"""
    classifies: bool = Field(False, description="whether the model was trained on labels")
    energies: Literal["model", "logits"] | None = Field(
        None,
        description="definition of E(y): model (its own density) or logits (-logsumexp, if "
        "only labels were trained); None: not recorded (see "
        "ebmkit.models.heads.energy_source)",
    )
    plugins: list[Plugin] = Field([], description="plugins that define its components")
    sigma_calibration: list[tuple[Level, Level]] = Field(
        [],
        max_length=64,
        description="(estimate of the noise level, calibrated level) in increasing order, image "
        "units (see ebmkit.blind); empty: estimates are used as they are",
    )
    log_density_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None,
        description="estimated error of the constant of log p(y), nats, for a normalised density "
        "(see ebmkit.models.noise_conditional); None: the constant is unknown",
    )
    attack: str = ""
    """norm and radius of the attack in training, for example l2 0.5; empty: no attack"""

    @field_validator("sigma_calibration")
    @classmethod
    def _increasing(cls, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        if any(b[0] <= a[0] or b[1] < a[1] for a, b in itertools.pairwise(points)):
            raise ValueError("the points must increase")
        return points

    @property
    def denoises(self) -> bool:
        """Whether the model was trained to denoise."""
        return self.sigma_range is not None or self.published_denoiser

    @property
    def energy_source(self) -> Literal["model", "logits"]:
        """``energies``, or if it is not recorded, that of the objective."""
        if self.energies is not None:
            return self.energies
        names = {term.rpartition("*")[2].strip() for term in self.objective.split("+")}
        return "logits" if names <= LABEL_OBJECTIVES else "model"
