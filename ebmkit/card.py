"""What a model was trained for, so that later uses can warn or refuse outside it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ebmkit.plugins import Plugin

__all__ = ["ModelCard"]

Side = Annotated[int, Field(ge=1, le=2**14)]


class ModelCard(BaseModel):
    """What a model was trained for."""

    model_config = ConfigDict(extra="forbid")

    dataset: str = Field("", description="name of the training set")
    objective: str = Field("", description="as on the command line")
    steps: int = Field(0, description="optimiser steps done")
    image_size: tuple[Side, Side] | None = Field(None, description="height and width in training")
    channels: int = Field(3, ge=1, le=1024, description="1 gray, 3 colour")
    class_names: list[str] = Field([], description="by label; empty without labels")
    sigma_range: tuple[float, float] | None = Field(
        None, description="noise levels of the denoising stream, image units; None: not trained"
    )
    classifies: bool = Field(False, description="whether labels were trained")
    energies: Literal["model", "logits"] | None = Field(
        None,
        description="what E(y) is: the model's own density, or -logsumexp of the logits where only "
        "labels were trained; None: not said (see ebmkit.models.heads.energy_source)",
    )
    plugins: list[Plugin] = Field([], description="that its parts come from")
    attack: str = Field(
        "", description="norm and radius of the attack in training, as in l2 0.5; empty: none"
    )
