"""UNets of `diffusers` that predict noise (Ho et al., arXiv 2006.11239), by configuration.

A network of L levels halves the image L - 1 times. Each level has ``blocks`` residual blocks, told
the timestep by an embedding of sines and cosines, down and one more up; some levels have
self-attention after each block. The network itself is `diffusers.UNet2DModel`, so that weights of
its pipelines fit (`ebmkit.models.import_unet`).
"""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import nn

from ebmkit.errors import UserError
from ebmkit.models.diffusion import DiffusionModel, PredictionType
from ebmkit.noise import SCHEDULES, Schedule, linear_betas

__all__ = ["UNetConfig"]

INSTALL = 'uv sync --extra diffusion, or pip install "ebmkit-vision[diffusion]"'


class UNetConfig(BaseModel):
    """Shape of a noise-predicting UNet, and the diffusion that it is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["unet"] = "unet"
    width: int = Field(32, ge=1, description="channels of the first level")
    multipliers: tuple[PositiveInt, ...] = Field(
        (1, 2, 2), min_length=1, description="channels of each level, as multiples of width"
    )
    blocks: int = Field(2, ge=1, description="residual blocks per level, on the way down")
    attention: tuple[int, ...] = Field(
        (),
        description="levels with self-attention; 0 is full resolution; the middle block "
        "always has it",
    )
    head_channels: int | None = Field(
        None, ge=1, description="channels per attention head; null: one head"
    )
    norm_groups: int = Field(
        8, ge=1, description="groups per group norm; must divide all channel numbers"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")
    class_conditional: bool = Field(
        False, description="the label is an input; objective.ddpm.class_dropout turns this on"
    )
    null_label: bool = Field(
        True, description="add a null label, so that one network is conditional and unconditional"
    )
    prediction: PredictionType = Field(
        "epsilon", description="prediction type: epsilon, v_prediction or sample"
    )
    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule")
    betas: tuple[float, float] = Field(
        (1e-4, 0.02), description="first and last variance of the linear schedule"
    )
    timesteps: int = Field(1000, ge=2, le=100_000, description="T, the number of timesteps")
    image_range: tuple[float, float] = Field(
        (-1.0, 1.0), description="range of clean images in the network's coordinates"
    )
    options: dict[str, Any] = Field(
        {},
        description="further arguments of diffusers' UNet2DModel; they override the fields above",
    )

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        levels = len(self.multipliers)
        outside = [level for level in self.attention if not 0 <= level < levels]
        if outside:
            raise UserError(
                f"attention at level {outside[0]} of {levels}: levels are 0 to {levels - 1}"
            )
        if self.width % self.norm_groups and "norm_num_groups" not in self.options:
            raise UserError(
                f"norm_groups {self.norm_groups} must divide width {self.width}: take a multiple "
                f"as width, as {self.norm_groups * max(1, round(self.width / self.norm_groups))}"
            )
        self.build_schedule()
        return self

    def build_schedule(self) -> Schedule:
        """The noise levels.

        Raises:
            UserError: if variances or the range are not legal.
        """
        if self.schedule == "linear":
            return Schedule(linear_betas(self.timesteps, *self.betas), self.image_range)
        return Schedule(SCHEDULES[self.schedule](self.timesteps), self.image_range)

    def arguments(self, in_channels: int, num_classes: int) -> dict[str, Any]:
        """Those of `diffusers.UNet2DModel`, for images of C channels and labels, if it has any."""
        attended = [level in self.attention for level in range(len(self.multipliers))]
        plain: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": in_channels,
            "block_out_channels": [self.width * factor for factor in self.multipliers],
            "down_block_types": [_block("Down", attends) for attends in attended],
            "up_block_types": [_block("Up", attends) for attends in reversed(attended)],
            "layers_per_block": self.blocks,
            "attention_head_dim": self.head_channels,
            "norm_num_groups": self.norm_groups,
            "dropout": self.dropout,
        }
        if self.class_conditional:
            plain["num_class_embeds"] = num_classes + self.null_label
        return plain | self.options

    def build_network(self, in_channels: int, num_classes: int) -> nn.Module:
        """The network, with fresh weights.

        Raises:
            UserError: if `diffusers` is not installed, or does not know an argument or refuses it.
        """
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise UserError(f"a UNet is built by diffusers, which is missing: {INSTALL}") from None
        arguments = self.arguments(in_channels, num_classes)
        try:
            network = UNet2DModel(**arguments)  # type: ignore[no-untyped-call]
        except (TypeError, ValueError) as error:
            raise UserError(f"diffusers makes no such UNet: {error}") from None
        return cast(nn.Module, network)

    def build_model(self, in_channels: int, num_classes: int) -> DiffusionModel:
        """The model, with fresh weights.

        Raises:
            UserError: as `build_network`; or if it is to know labels and there are none.
        """
        if self.class_conditional and num_classes == 0:
            raise UserError("a class-conditional UNet needs labels, and there are none")
        return DiffusionModel(
            self.build_network(in_channels, num_classes),
            self.build_schedule(),
            in_channels,
            num_classes if self.class_conditional else 0,
            self.null_label,
            self.prediction,
            multiple=2 ** (len(self.multipliers) - 1),
        )


def _block(way: str, attends: bool) -> str:
    return f"{'Attn' if attends else ''}{way}Block2D"
