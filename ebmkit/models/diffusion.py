r"""Diffusion models: noise-predicting networks as score models in image units.

The input of a diffusion network is a noisy image :math:`u_t` in variance-preserving coordinates,
with clean images in [a, b]; it predicts the noise :math:`\epsilon`. In image units (`ebmkit.noise`)
the noisy image is :math:`y = x + \sigma\epsilon`, and

.. math::
    u = \frac{(b - a)\,y + a}{\sqrt{1 + (b - a)^2\sigma^2}}, \qquad
    D(y, \sigma) = y - \sigma\,\hat\epsilon(u, t), \qquad
    s(y) = \nabla_y \log p_\sigma(y) = -\hat\epsilon(u, t) / \sigma,

where t is the timestep whose noise level is nearest to sigma on a logarithmic scale; at the levels
of the schedule this is exact. Denoising score matching of s is noise prediction,
:math:`\|\sigma s + \epsilon\|^2 = \|\hat\epsilon - \epsilon\|^2`.

The network may predict another quantity, from which the noise is computed: ``v_prediction``
(Salimans & Ho 2022) is :math:`v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1 - \bar\alpha}\,u_0`, and
``sample`` is the clean image :math:`u_0`:

.. math::
    \hat\epsilon = \sqrt{\bar\alpha}\,\hat v + \sqrt{1 - \bar\alpha}\,u, \qquad
    \hat\epsilon = (u - \sqrt{\bar\alpha}\,\hat u_0) / \sqrt{1 - \bar\alpha} .

A class-conditional network has an embedding for each label and one for the *null label*, which
means no label. So the same weights model :math:`\log p(y \mid c)` and :math:`\log p(y)`; their
difference is the implicit classifier of classifier-free guidance (Ho & Salimans 2022).

**Levels outside the schedule.** Below the lowest level, clean images included, the score is that of
the lowest level, and D tends to y as sigma tends to 0. Above the highest level the network gets the
last timestep, and u keeps its variance. Samplers stay within `ebmkit.ModelCard.sigma_range`.

**UNets** are built by `diffusers` from a configuration, so weights of its pipelines fit
(`ebmkit.models.import_unet`). A network with L levels halves the image size L - 1 times. Each level
has ``blocks`` residual blocks on the way down and one more on the way up, with a sinusoidal
embedding of the timestep; some levels have self-attention after each block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1, to_weights
from ebmkit.energy import Noise, ScoreModel, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import DenoiserConfig, check_images, pad_to_multiple
from ebmkit.noise import SCHEDULES, Schedule, linear_betas, require_sigma

INSTALL = 'uv sync --extra diffusion, or pip install "ebmkit-vision[diffusion]"'

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class DiffusionModel(ScoreModel):
    """A `ScoreModel` in image units from a noise-predicting network.

    Args:
        network: maps (u, t), or with labels (u, t, c), to its prediction; u (B, C, H, W), t and c
            (B,) int64. It returns a tensor, or an object with a tensor ``sample``, as `diffusers`
            does. Of 2C output channels the second half, a variance, is ignored.
        schedule: noise levels, and range of the network's clean images.
        in_channels: required number of channels C; None: any.
        num_classes: number of labels; 0: no labels.
        null_label: whether the network has a null label, with the number ``num_classes``.
        prediction: what the network predicts: ``epsilon`` (the noise), ``v_prediction`` or
            ``sample`` (the clean image).
        multiple: number that must divide the height and width of the network's input; other images
            are padded by replication, and the output is cropped.

    Raises:
        UserError: if the prediction is unknown.
    """

    noise_conditional = True
    is_energy_based = False
    schedule: Schedule

    log_edges: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        in_channels: int | None = None,
        num_classes: int = 0,
        null_label: bool = True,
        prediction: PredictionType = "epsilon",
        multiple: int = 1,
    ) -> None:
        super().__init__()
        if prediction not in _TO_NOISE:
            raise UserError(f"unknown prediction {prediction!r}: known: {', '.join(_TO_NOISE)}")
        self.network = network
        subsample_before_1x1(self)
        self.schedule = schedule
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.null_label = null_label
        self.prediction = prediction
        self.multiple = multiple
        self._lowest = schedule.sigma_range[0]
        logs = schedule.sigmas.log()
        edges = ((logs[1:] + logs[:-1]) / 2).float()
        self.register_buffer("log_edges", edges, persistent=False)

    def forward(self, y: Tensor, sigma: Noise | None = None, c: Tensor | None = None) -> Tensor:
        """Predicted noise in ``y``, of standard deviation 1; shape of ``y``.

        Args:
            y: noisy images (B, C, H, W), image units.
            sigma: noise level, a float or (B,).
            c: labels (B,), where ``num_classes`` is the null label; None: no labels.

        Raises:
            UserError: if ``y`` is not a batch of images with C channels, sigma is missing, or the
                network requires labels.
        """
        check_images(y, self.in_channels)
        level = self._levels(y, sigma)[1]
        low, high = self.schedule.image_range
        spread = (high - low) * per_image(level, y)
        assert isinstance(spread, Tensor)
        root_abar = (1 + spread.square()).rsqrt()
        root_rest = spread * root_abar
        u = ((high - low) * y + low) * root_abar
        predicted = self._predict(to_weights(u, self), self.timestep(level), c).to(y.dtype)
        noise: Tensor = _TO_NOISE[self.prediction](predicted, u, root_abar, root_rest)
        return noise

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        level = self._levels(y, sigma)[1]
        if c is not None and self.null_label:
            c = torch.where(c < 0, self.num_classes, c)
        score: Tensor = -self(y, sigma, c) / per_image(level, y)
        return score

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """D(y, sigma) = y - sigma * noise, shape of ``y``, not clipped.

        Raises:
            UserError: if sigma is missing or not above 0, or a label is out of range.
        """
        y, sigma, labels = self.inputs(y, sigma, c)
        given, level = self._levels(y, sigma)
        change = per_image(given, y) ** 2 / per_image(level, y)
        clean: Tensor = y - change * self(y, sigma, labels)
        return clean

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """grad log p(c|y) of the implicit classifier, the difference of two scores; shape of ``y``.

        Raises:
            UserError: if a label is out of range, or the model has no labels or no null label.
        """
        return self.score(y, sigma, c) - self.score(y, sigma)

    def _levels(self, y: Tensor, sigma: Noise | None) -> tuple[Tensor, Tensor]:
        """The noise levels (B,) as given, and clamped to the lowest level of the schedule."""
        sigma = require_sigma(sigma)
        given = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))
        return given, given.clamp_min(self._lowest)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps (B,), int64, whose noise levels are nearest to ``sigma`` (B,) by ratio."""
        return torch.bucketize(sigma.log().to(self.log_edges), self.log_edges)

    def _predict(self, u: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        height, width = u.shape[-2:]
        u = pad_to_multiple(u, self.multiple)
        if self.num_classes == 0:
            out = self.network(u, t)
        else:
            if c is None and not self.null_label:
                raise UserError(
                    "this diffusion model was trained with labels only and has no null label: "
                    "give a label, as --label 3"
                )
            out = self.network(u, t, torch.full_like(t, self.num_classes) if c is None else c)
        predicted: Tensor = out if isinstance(out, Tensor) else out.sample
        return predicted[:, : u.shape[1], :height, :width]


_TO_NOISE: Mapping[str, Callable[..., Tensor]] = {
    "epsilon": lambda f, u, root_abar, root_rest: f,
    "v_prediction": lambda f, u, root_abar, root_rest: root_abar * f + root_rest * u,
    "sample": lambda f, u, root_abar, root_rest: (u - root_abar * f) / root_rest,
}
"""Prediction type -> function from the prediction f for u to the noise."""


class UNetConfig(DenoiserConfig):
    """Configuration of a noise-predicting UNet and its noise schedule."""

    kind: Literal["unet"] = "unet"
    PRESETS: ClassVar = {
        "unet": (
            "a small diffusion UNet that predicts noise; the timestep is an input; by diffusers",
            {"width": 32, "multipliers": (1, 2, 2)},
        ),
        "unet-cifar10": (
            "Ho et al. 2020 for 32x32 images: 35.7 M parameters, attention at 16x16; by diffusers",
            {
                "width": 128,
                "multipliers": (1, 2, 2, 2),
                "attention": (1,),
                "norm_groups": 32,
                "dropout": 0.1,
                "options": {
                    "downsample_padding": 0,
                    "flip_sin_to_cos": False,
                    "freq_shift": 1,
                    "norm_eps": 1e-6,
                },
            },
        ),
    }
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
        """The noise schedule.

        Raises:
            UserError: if the variances or the image range are not legal.
        """
        if self.schedule == "linear":
            return Schedule(linear_betas(self.timesteps, *self.betas), self.image_range)
        return Schedule(SCHEDULES[self.schedule](self.timesteps), self.image_range)

    def arguments(self, in_channels: int, num_classes: int) -> dict[str, Any]:
        """Arguments of `diffusers.UNet2DModel` for images of C channels and labels, if any."""
        attends = ["Attn" * (level in self.attention) for level in range(len(self.multipliers))]
        plain: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": in_channels,
            "block_out_channels": [self.width * factor for factor in self.multipliers],
            "down_block_types": [f"{attn}DownBlock2D" for attn in attends],
            "up_block_types": [f"{attn}UpBlock2D" for attn in reversed(attends)],
            "layers_per_block": self.blocks,
            "attention_head_dim": self.head_channels,
            "norm_num_groups": self.norm_groups,
            "dropout": self.dropout,
        }
        if self.class_conditional:
            plain["num_class_embeds"] = num_classes + self.null_label
        return plain | self.options

    def build_network(self, in_channels: int, num_classes: int) -> nn.Module:
        """Build the network.

        Raises:
            UserError: if `diffusers` is not installed or refuses an argument.
        """
        try:
            return unet_class()(**self.arguments(in_channels, num_classes))
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"diffusers cannot build this UNet: {error}") from None

    def build_model(self, in_channels: int, num_classes: int = 0) -> DiffusionModel:
        """Build the model.

        Raises:
            UserError: as `build_network`, or if it is class-conditional and there are no labels.
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


def unet_class() -> type[nn.Module]:
    """`diffusers.UNet2DModel`; `UserError` where `diffusers` is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise UserError(f"a UNet is built by diffusers, which is missing: {INSTALL}") from None
    return cast("type[nn.Module]", UNet2DModel)
