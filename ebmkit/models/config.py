"""Model configurations, the tables of networks, and `create_model`.

`BACKBONES` compute features, from which a head computes energies (`ebmkit.models.JointModel`).
`DENOISERS` are complete models: plain denoisers without a density, gradient-step denoisers, whose
density has no labels, and diffusion models. In addition, ``timm:NAME`` is the timm model NAME.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from torch import nn

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, unknown_name, validated
from ebmkit.models.base import (
    Backbone,
    BackboneConfig,
    DenoiserConfig,
    NetworkConfig,
    NoiseConditioned,
)
from ebmkit.models.class_reference import ClassReference
from ebmkit.models.diffusion import UNetConfig
from ebmkit.models.dncnn import DnCNNConfig, GraDnCNNConfig
from ebmkit.models.drunet import DRUNetConfig, GSDRUNetConfig
from ebmkit.models.gradresnet import GradResNetConfig
from ebmkit.models.heads import HeadConfig, find_head
from ebmkit.models.joint import JointModel, SizeScaling
from ebmkit.models.mlp import MLPConfig
from ebmkit.models.noise_conditional import LOWEST, PreconditionedModel
from ebmkit.models.resnet import ResNetConfig
from ebmkit.models.timm import TimmConfig
from ebmkit.models.unet_energy import UNetEnergyConfig
from ebmkit.models.wideresnet import WideResNetConfig
from ebmkit.registry import Preset, Table, find

N = TypeVar("N", bound=NetworkConfig)

NETWORKS: tuple[type[NetworkConfig], ...] = (
    GradResNetConfig,
    ResNetConfig,
    WideResNetConfig,
    MLPConfig,
    TimmConfig,
    DnCNNConfig,
    DRUNetConfig,
    GSDRUNetConfig,
    GraDnCNNConfig,
    UNetConfig,
    UNetEnergyConfig,
)
"""Configuration classes of all networks. A new network is a file with its presets, and an entry
here."""


def _presets(kind: str, base: type[N]) -> dict[str, Preset[N]]:
    own = (config.presets() for config in NETWORKS if issubclass(config, base))
    return Table(kind, {name: preset for presets in own for name, preset in presets.items()})


BACKBONES: dict[str, Preset[BackboneConfig]] = _presets("backbone", BackboneConfig)  # type: ignore[type-abstract]
DENOISERS: dict[str, Preset[DenoiserConfig]] = _presets("denoiser", DenoiserConfig)  # type: ignore[type-abstract]

TIMM = "timm:"
_ONE_SIDED = "linear-quadratic", "logit"
"""Heads whose log-density is bounded on one side, or is tied to the logits."""


def find_network(name: str) -> Preset[NetworkConfig]:
    """The backbone or denoiser called ``name``, which may be ``timm:NAME``.

    Raises:
        UserError: if there is none.
    """
    return DENOISERS[name] if name in DENOISERS else find_backbone(name, DENOISERS)


def find_backbone(name: str, others: Iterable[str] = ()) -> Preset[BackboneConfig]:
    """The backbone called ``name``, which may be ``timm:NAME``.

    Raises:
        UserError: if there is none; the message lists ``others`` as legal names, too.
    """
    if name.startswith(TIMM):
        own = name.removeprefix(TIMM)
        return Preset(TimmConfig(name=own), f"{own} of timm")
    if name not in BACKBONES:
        raise unknown_name("backbone", name, [*BACKBONES, *others, f"{TIMM}NAME"])
    return BACKBONES[name]


def _validate_by_kind(given: Any) -> Any:
    """Validate ``given`` as the configuration class of its ``kind``."""
    if not isinstance(given, Mapping):
        return given
    return NetworkConfig.class_for(given).model_validate(given)


def _validate_head(given: Any) -> Any:
    """Validate ``given`` as the configuration class of the head of its ``kind``."""
    if isinstance(given, HeadConfig):
        if isinstance(given, HeadConfig.class_for({"kind": given.kind})):
            return given
        given = given.model_dump()
    if not isinstance(given, Mapping):
        return given
    return HeadConfig.class_for(given).model_validate(given)


AnyNetworkConfig = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(_validate_by_kind)]
"""Configuration of any network, as the class of its ``kind``."""

AnyHeadConfig = Annotated[SerializeAsAny[HeadConfig], BeforeValidator(_validate_head)]
"""Configuration of any head, as the class of its ``kind``."""


class ModelConfig(BaseModel):
    """Configuration from which a model is built; saved in ``model.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: AnyNetworkConfig = Field(
        GradResNetConfig(), description="backbone: images to features"
    )
    head: AnyHeadConfig = Field(HeadConfig(), description="head: features to energies")
    in_channels: Literal[1, 3] = Field(3, description="number of channels: 1 gray, 3 colour")
    num_classes: int = Field(0, ge=0, description="number of classes; 0: density only")
    reference_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="reference size (height, width), up to which the log-density is the "
        "paper's formula",
    )
    size_scaling: SizeScaling = Field(
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
        description="sigma is an input of the backbone: it gets the variance-preserving image "
        "and a map of the noise level",
    )
    preconditioned: bool = Field(
        False,
        description="the density is a Gaussian and, at low noise, a network: with tsm or "
        "diffclf it is normalised; needs a backbone that takes sigma, and head linear",
    )
    sigma_min: float | None = Field(
        None,
        gt=0,
        description="preconditioned: lowest noise level, image units; null: that of the training",
    )
    reference_rank: int = Field(
        0,
        ge=0,
        description="preconditioned: rank of the covariances of a Gaussian per class, which the "
        "density is at high noise, for images of the reference size; 0: one isotropic Gaussian",
    )

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: Any) -> Any:
        """Accept ``extent``, the name of ``size_scaling`` in files from before December 2026."""
        if not isinstance(values, dict) or "extent" not in values:
            return values
        rest = {name: value for name, value in values.items() if name != "extent"}
        return {"size_scaling": values["extent"]} | rest

    @field_validator("input_std")
    @classmethod
    def _check_std(cls, std: float | tuple[float, ...]) -> float | tuple[float, ...]:
        numbers = std if isinstance(std, tuple) else (std,)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError("images are divided by it: numbers must be above 0, as in 0.25")
        return std

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.reference_rank and not self.preconditioned:
            raise UserError("model.reference_rank is for preconditioned models: leave it out")
        if self.preconditioned:
            self._check_preconditioned()
        if not self.noise_conditional:
            return self
        if isinstance(self.backbone, DenoiserConfig):
            raise UserError(
                f"model.noise_conditional needs a backbone, and {self.backbone.kind!r} is a "
                "complete model: leave it out"
            )
        if getattr(self.backbone, "noise_conditional", False):
            raise UserError("this backbone takes sigma already: leave out noise_conditional")
        if self.input_mean or self.input_std != 1:
            raise UserError(
                "a noise-conditional model scales its images by the noise level: leave out "
                "input_mean and input_std"
            )
        return self

    def _check_preconditioned(self) -> None:
        if self.noise_conditional or not getattr(self.backbone, "noise_conditional", False):
            raise UserError(
                f"model.preconditioned needs a backbone that takes sigma, and as it is set "
                f"{self.backbone.kind!r} is none: take unet-energy, gradresnet18-sigma or "
                "mlp-sigma, and leave out model.noise_conditional"
            )
        if isinstance(self.backbone, BackboneConfig) and self.head.kind in _ONE_SIDED:
            raise UserError(
                f"model.preconditioned needs a density that can be above and below the Gaussian's, "
                f"which head {self.head.kind!r} is not: take --head linear"
            )
        if isinstance(self.input_std, tuple):
            raise UserError("model.preconditioned needs one number as input_std, as in 0.25")

    def without_pretrained(self) -> ModelConfig:
        """This configuration, to be built without downloading weights."""
        return self.model_copy(update={"backbone": self.backbone.without_pretrained()})

    def build(self) -> ScoreModel:
        """Build the model: a `JointModel` for a backbone, or a denoiser."""
        model = self._build()
        model.built_from = self
        return model

    def _build(self) -> ScoreModel:
        if not self.preconditioned:
            model: ScoreModel = self._network(self.input_mean, self.input_std)
            return model
        assert not isinstance(self.input_std, tuple)
        network = self._network()  # whose images are scaled with the noise
        head = getattr(network, "head", None)
        if head is not None:
            for p in getattr(head, "density", head).parameters():
                nn.init.zeros_(p)  # at the start the density is the Gaussian's
        reference = None
        if self.reference_rank:
            shape = (self.in_channels, *(self.reference_size or (1, 1)))
            reference = ClassReference(max(1, self.num_classes), shape, self.reference_rank)
        pooled = isinstance(self.backbone, BackboneConfig)  # its features are means over positions
        return PreconditionedModel(
            network,
            self.input_mean,
            self.input_std,
            self.sigma_min or LOWEST,
            math.prod(self.reference_size or (1,)) if pooled else 1,
            gamma=0.0 if pooled else 1.0,
            reference=reference,
        )

    def _network(
        self, mean: float | tuple[float, ...] = 0.0, std: float | tuple[float, ...] = 1.0
    ) -> Any:
        """A `JointModel` for images with this mean and deviation, or a denoiser."""
        if isinstance(self.backbone, DenoiserConfig):
            return self.backbone.build_model(self.in_channels, self.num_classes)
        assert isinstance(self.backbone, BackboneConfig)
        backbone = self.backbone.build(self.in_channels + self.noise_conditional)
        if self.noise_conditional:
            backbone = NoiseConditioned(backbone)
        assert isinstance(backbone, Backbone)
        return JointModel(
            backbone,
            self.head.build(backbone.num_features, self.num_classes),
            in_channels=self.in_channels,
            reference_size=self.reference_size,
            size_scaling=self.size_scaling,
            input_mean=mean,
            input_std=std,
        )


def preset_name(config: NetworkConfig) -> str:
    """Name for `find_network` of the preset of the same class that is most like ``config``."""
    if isinstance(config, TimmConfig):
        return f"{TIMM}{config.name}"
    own, fields = {**BACKBONES, **DENOISERS}, config.model_dump().items()
    of_class = [name for name, preset in own.items() if type(preset.config) is type(config)]
    return max(of_class, key=lambda name: len(fields & own[name].config.model_dump().items()))


def create_model(
    backbone: str = "gradresnet18",
    num_classes: int = 10,
    in_channels: int = 3,
    head: str = "linear-quadratic",
    image_size: tuple[int, int] | int | None = None,
    size_scaling: SizeScaling = "tiles",
    **options: Any,
) -> JointModel:
    """Create a joint model, newly initialised, from the names of its components.

    Args:
        backbone: a name from `ebmkit list backbones`, or ``timm:NAME``.
        num_classes: number of labels C; 0: density only.
        in_channels: 1 for gray, 3 for colour.
        head: a name from `ebmkit list heads`.
        image_size: reference size, (height, width) or one number for both, up to which the
            log-density is the plain formula. None: the plain formula at every size.
        size_scaling: log-density of images larger than the reference size (see `JointModel`).
        **options: fields of the backbone's configuration, for example ``width=16``.

    Raises:
        UserError: on an unknown name or an illegal option.

    >>> model = create_model("gradresnet18", num_classes=10, in_channels=3, width=16)
    """
    if backbone in DENOISERS:
        raise UserError(
            f"{backbone!r} is a denoiser and has no head: make it by create_denoiser({backbone!r})"
        )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    config = {
        "backbone": _with_options(find_backbone(backbone).config, options, f"backbone {backbone}"),
        "head": find_head(head),
        "in_channels": in_channels,
        "num_classes": num_classes,
        "reference_size": size,
        "size_scaling": size_scaling,
    }
    model = validated(ModelConfig, config, "model").build()
    assert isinstance(model, JointModel)
    return model


def create_denoiser(name: str, in_channels: int = 3, **options: Any) -> ScoreModel:
    """Create a plain or gradient-step denoiser or a diffusion model, newly initialised.

    Args:
        name: a name from `ebmkit list denoisers`.
        in_channels: 1 for gray, 3 for colour.
        **options: fields of the denoiser's configuration, for example ``width=16``.

    Raises:
        UserError: on an unknown name or an illegal option.

    >>> denoiser = create_denoiser("drunet", in_channels=3, width=16)
    """
    shape = _with_options(find("denoiser", DENOISERS, name).config, options, f"denoiser {name}")
    config = {"backbone": shape, "in_channels": in_channels}
    return validated(ModelConfig, config, "model").build()


def _with_options(preset: NetworkConfig, options: dict[str, Any], what: str) -> NetworkConfig:
    """``preset`` with ``options`` replaced and validated."""
    return validated(type(preset), {**preset.model_dump(), **options}, what)
