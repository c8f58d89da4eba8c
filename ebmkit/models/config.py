"""From names and numbers to a model: configuration and `create_model`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)
from torch import nn

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.models.conditioned import NoiseConditioned
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.dncnn import DnCNNConfig
from ebmkit.models.drunet import DRUNetConfig
from ebmkit.models.gradientstep import GraDnCNNConfig, GSDRUNetConfig
from ebmkit.models.gradresnet import GradResNetConfig
from ebmkit.models.heads import HEADS, HeadConfig
from ebmkit.models.joint import Extent, JointModel
from ebmkit.models.mlp import MLPConfig
from ebmkit.models.parts import Backbone
from ebmkit.models.presets import BACKBONES, DENOISERS
from ebmkit.models.resnet import ResNetConfig
from ebmkit.models.unet import UNetConfig
from ebmkit.models.wideresnet import WideResNetConfig
from ebmkit.registry import find
from ebmkit.validation import validated

__all__ = ["BackboneConfig", "ModelConfig", "create_denoiser", "create_model"]


def _kind(config: Any) -> str:
    """Which configuration it is; those saved before there were several say nothing."""
    if isinstance(config, BaseModel):
        return str(getattr(config, "kind", ""))
    return str(config.get("kind", "gradresnet")) if isinstance(config, dict) else ""


BackboneConfig = Annotated[
    Annotated[GradResNetConfig, Tag("gradresnet")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[WideResNetConfig, Tag("wideresnet")]
    | Annotated[MLPConfig, Tag("mlp")]
    | Annotated[DnCNNConfig, Tag("dncnn")]
    | Annotated[DRUNetConfig, Tag("drunet")]
    | Annotated[GSDRUNetConfig, Tag("gs-drunet")]
    | Annotated[GraDnCNNConfig, Tag("gradncnn")]
    | Annotated[UNetConfig, Tag("unet")],
    Discriminator(_kind),
]
"""Every network's configuration; ``kind`` says which."""


_WHOLE = (DnCNNConfig, DRUNetConfig, GSDRUNetConfig, GraDnCNNConfig, UNetConfig)


class ModelConfig(BaseModel):
    """Everything that is needed to build a `JointModel` anew; saved in ``model.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: BackboneConfig = Field(GradResNetConfig(), description="backbone: images to features")
    head: HeadConfig = Field(HeadConfig(), description="head: features to energies")
    in_channels: Literal[1, 3] = Field(3, description="number of channels: 1 gray, 3 colour")
    num_classes: int = Field(0, ge=0, description="number of classes; 0: density only")
    reference_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="reference size (height, width), up to which the log-density is the "
        "paper's formula",
    )
    extent: Extent = Field(
        "tiles",
        description="log-density of larger images: tiles, factor or windows (see JointModel)",
    )
    input_mean: float | tuple[float, ...] = Field(
        0.0,
        description="mean subtracted from images, one number or one per channel; acts as a bias",
    )
    input_std: float | tuple[float, ...] = Field(
        1.0,
        description="standard deviation that images are divided by, one number or one per channel",
    )
    noise_conditional: bool = Field(
        False,
        description="sigma is an input of the backbone: it gets the variance-preserving "
        "image and a map of the noise level",
    )

    @field_validator("input_std")
    @classmethod
    def _above_zero(cls, found: float | tuple[float, ...]) -> float | tuple[float, ...]:
        numbers = found if isinstance(found, tuple) else (found,)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError("images are divided by it: numbers must be above 0, as in 0.25")
        return found

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if not self.noise_conditional:
            return self
        if isinstance(self.backbone, _WHOLE):
            raise UserError(
                f"model.noise_conditional is of backbones, and {self.backbone.kind!r} is a whole "
                "model: leave it out"
            )
        if getattr(self.backbone, "noise_conditional", False):
            raise UserError("this backbone is told sigma already: leave out noise_conditional")
        if self.input_mean or self.input_std != 1:
            raise UserError(
                "a noise-conditional model scales its images by the noise level: leave out "
                "input_mean and input_std"
            )
        return self

    def build(self) -> ScoreModel:
        """The model, with fresh weights: joint, of a backbone, or a denoiser."""
        backbone = self.backbone
        if isinstance(backbone, UNetConfig):
            return backbone.build_model(self.in_channels, self.num_classes)
        if isinstance(backbone, (DnCNNConfig, DRUNetConfig)):
            network = backbone.build(self.in_channels)
            told = isinstance(backbone, DRUNetConfig) and backbone.noise_map
            return DirectDenoiser(network, self.in_channels, noise_conditional=told)
        if isinstance(backbone, (GSDRUNetConfig, GraDnCNNConfig)):
            return backbone.build_model(self.in_channels)
        return self.build_joint(backbone)

    def build_joint(
        self, backbone: GradResNetConfig | ResNetConfig | WideResNetConfig | MLPConfig
    ) -> JointModel:
        """The joint model of ``backbone``."""
        if self.noise_conditional:
            features: Backbone = NoiseConditioned(backbone.build(self.in_channels + 1))
        else:
            features = backbone.build(self.in_channels)
        assert isinstance(features, nn.Module)
        return JointModel(
            features,
            self.head.build(features.num_features, self.num_classes),
            in_channels=self.in_channels,
            reference_size=self.reference_size,
            extent=self.extent,
            input_mean=self.input_mean,
            input_std=self.input_std,
        )


def create_model(
    backbone: str = "gradresnet18",
    num_classes: int = 10,
    in_channels: int = 3,
    head: str = "linear-quadratic",
    image_size: tuple[int, int] | int | None = None,
    extent: Extent = "tiles",
    **options: Any,
) -> JointModel:
    """A joint model by the names of its parts, with fresh weights.

    Args:
        backbone: a name from `ebmkit list backbones`.
        num_classes: labels C; 0 for a density alone.
        in_channels: 1 gray, 3 colour.
        head: a name from `ebmkit list heads`.
        image_size: the reference size, as (height, width) or one number for both; at it, and below,
            the log-density is the plain formula's. None: the plain formula at every size.
        extent: how the log-density grows beyond the reference size (see `JointModel`).
        **options: fields of the backbone's configuration, as in ``width=16``.

    Raises:
        UserError: on an unknown name or an illegal option.

    >>> model = create_model("gradresnet18", num_classes=10, in_channels=3, width=16)
    """
    if backbone in DENOISERS:
        raise UserError(
            f"{backbone!r} is a denoiser and has no head: make it by create_denoiser({backbone!r})"
        )
    preset = find("backbone", BACKBONES, backbone).config
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = validated(type(preset), {**preset.model_dump(), **options}, f"backbone {backbone}")
    config = {
        "backbone": shape,
        "head": find("head", HEADS, head).config,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "reference_size": size,
        "extent": extent,
    }
    return validated(ModelConfig, config, "model").build_joint(shape)


def create_denoiser(name: str, in_channels: int = 3, **options: Any) -> ScoreModel:
    """A plain or gradient-step denoiser, with fresh weights.

    Args:
        name: a name from `ebmkit list denoisers`.
        in_channels: 1 gray, 3 colour.
        **options: fields of its configuration, as in ``width=16``.

    Raises:
        UserError: on an unknown name or an illegal option.

    >>> denoiser = create_denoiser("drunet", in_channels=3, width=16)
    """
    preset = find("denoiser", DENOISERS, name).config
    shape = validated(type(preset), {**preset.model_dump(), **options}, f"denoiser {name}")
    config = {"backbone": shape, "in_channels": in_channels}
    return validated(ModelConfig, config, "model").build()
