r"""Guided scores, denoisers, noise predictions and log-densities.

A guide h gets one of three views v(y) of the noisy image :math:`y = x + \sigma\epsilon`. With the
diffusion model's image range [a, b], :math:`\bar\alpha = 1 / (1 + (b - a)^2 \sigma^2)`:

========== ======================================= =============================================
view       v                                       gradient by y of h(v(y))
========== ======================================= =============================================
``noisy``  y, for guides trained on noisy images   :math:`\nabla h`
``x_t``    :math:`(u_t - a)/(b - a)`, the          :math:`\sqrt{\bar\alpha}\,\nabla h`
           diffusion model's coordinates mapped
           to [0, 1]: darker at high noise (the
           input in RCG)
``x0_hat`` D(y), the predicted clean image         :math:`\sqrt{\bar\alpha}\,\nabla h`, or with
                                                   ``backpropagate`` :math:`J_D(y)^\top \nabla h`
========== ======================================= =============================================

Without ``backpropagate`` the Jacobian of x_t replaces that of D(y) (a straight-through gradient),
so ``x0_hat`` and ``x_t`` have similar scales.

Guidance at scale s adds :math:`p = s\,w\,\nabla_y h(v(y))` to the score; by Tweedie's formula

.. math::
    \hat s(y) = s(y) + p, \qquad \hat D(y) = D(y) + \sigma^2 p, \qquad
    \hat\epsilon = \epsilon - \sigma p
        = \epsilon - s\, g(t)\, \nabla_{u_t} h ,

with the weight w = :math:`g(t) / \sqrt{1 - \bar\alpha_t}`, since
:math:`\nabla_y = \sqrt{\bar\alpha}\,(b - a)\,\nabla_{u_t}`. So guidance shifts the mean of a
reverse step by s times the *variance* of the step times the gradient (RCG eq. 2.17 has the standard
deviation). The terms of several guides add up.

Classifier-free guidance mixes two predictions at a weight w (Ho & Salimans, 2207.12598),
:math:`\hat\epsilon = \epsilon_u + w\,(\epsilon_c - \epsilon_u)`: w = 0 is unconditional, w = 1
conditional. w is the ``guidance_scale`` of `diffusers`, and 1 + s of RCG's algorithm 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from ebmkit.energy import EnergyModel, Noise, per_image, tweedie, vjp
from ebmkit.errors import UserError, validated
from ebmkit.guidance.guides import (
    CLASSIFIER_FREE,
    GUIDES,
    GuidanceSchedule,
    check_guide,
    parse_schedule,
)
from ebmkit.noise import Schedule, check_positive, make_schedule
from ebmkit.registry import find
from ebmkit.sampling.base import (
    DenoiserFunction,
    DensityFunction,
    ScoreFunction,
    root_mean_square,
)
from ebmkit.sampling.diffusion import NoisePredictor

View = Literal["noisy", "x_t", "x0_hat"]

RENAMED = {"late": "start", "through": "backpropagate", "shrunk": "x_t", "clean": "x0_hat"}
"""Earlier names of fields and views, still accepted in saved settings."""


class GuidanceConfig(BaseModel):
    """Settings of guidance."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    guidance: str = Field("energy", description="a name from `ebmkit list guidance`")
    options: dict[str, Any] = Field({}, description="resolved settings of the guide")
    scale: float = Field(1.0, ge=0, description="guidance scale s; 0: unguided")
    schedule: str = Field(
        "exact", description="guidance schedule g(t), for example sigmoid:t0=500,y0=0.05,k=0.02"
    )
    view: View | None = Field(
        None,
        description="input of the guide: noisy, x_t or x0_hat; null: noisy if the guide takes "
        "the noise level, else x_t",
    )
    backpropagate: bool = Field(
        False, description="view x0_hat: backpropagate through the denoiser"
    )
    start: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the noise levels without guidance, from the noisiest down (RCG "
        "section 4.3)",
    )

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        view = values.get("view")
        return values | {"view": RENAMED.get(view, view)} if isinstance(view, str) else values

    @field_validator("schedule")
    @classmethod
    def _written(cls, text: str) -> str:
        return str(parse_schedule(text))

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        kind = find("guidance", GUIDES, self.guidance).settings
        own = validated(kind, self.options, f"settings of guide {self.guidance!r}")
        object.__setattr__(self, "options", own.model_dump(mode="json", by_alias=True))
        if self.backpropagate and self.view != "x0_hat":
            raise ValueError("backpropagate goes through the denoiser: it needs the view x0_hat")
        if self.guidance == CLASSIFIER_FREE and self.view is not None:
            raise ValueError(f"{CLASSIFIER_FREE} guidance has no guide: leave the view out")
        return self

    @property
    def needs_means(self) -> bool:
        """Whether the guide needs the mean energies of each label's training images."""
        return "dual" in (self.guidance, self.options.get("inner"))

    def build(
        self,
        guide: EnergyModel | None,
        c: Tensor | int,
        means: Sequence[float] | None,
        diffusion: Schedule,
    ) -> Guidance:
        """The guidance to labels ``c``, an integer or (B,); classifier-free without ``guide``.

        Raises:
            UserError: if a required guide is missing, classifier-free guidance gets one, the guide
                does not have the labels, needs ``means`` and gets none, or cannot take the view.
        """
        how, entry = (self.backpropagate, self.start, diffusion), GUIDES[self.guidance]
        if guide is None:
            if entry.make is not None:
                raise UserError(f"guidance {self.guidance!r} needs a guide: give a classifier")
            return Guidance(None, self.scale, self.schedule, "noisy", *how)
        if entry.make is None:
            raise UserError(f"{CLASSIFIER_FREE} guidance takes no guide: leave it out")
        own = entry.settings.model_validate(self.options)
        function = entry.make(check_guide(guide), c, own, means)
        view: View = self.view or ("noisy" if guide.noise_conditional else "x_t")
        if guide.noise_conditional and view == "x_t":
            reason = "this guide takes the noise level and scales images itself"
            raise UserError(f"{reason}: use the view noisy")
        return Guidance(function, self.scale, self.schedule, view, *how)


def make_guidance(**values: Any) -> GuidanceConfig:
    """Create a `GuidanceConfig` from ``values``.

    Raises:
        UserError: if a value is invalid.

    >>> make_guidance(guidance="pgd", options={"n": 20}).options["gamma"]
    0.01
    """
    return validated(GuidanceConfig, values, "guidance")


@dataclass(frozen=True)
class Guidance:
    """A guide and its settings; the other fields are those of `GuidanceConfig`.

    Args:
        guide: function to increase; it gets its input and the noise level of that (image units;
            None for a clean image). None if only the weight is used.
        diffusion: schedule that maps noise levels to timesteps and abar; `guided_noise` uses its
            own instead.

    Raises:
        UserError: if a value is invalid.
    """

    guide: DensityFunction | None
    scale: float = 1.0
    schedule: GuidanceSchedule | str = "exact"
    view: View = "noisy"
    backpropagate: bool = False
    start: float = 0.0
    diffusion: Schedule = field(default_factory=make_schedule, compare=False)

    def __post_init__(self) -> None:
        names = ("scale", "view", "backpropagate", "start")
        make_guidance(**{name: getattr(self, name) for name in names})
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", parse_schedule(self.schedule))

    def weight(self, sigma: Noise | None) -> float | Tensor:
        """s w at noise level ``sigma``, image units, float or (B,); None means no noise, w = 1."""
        level = torch.as_tensor(0.0 if sigma is None else sigma, dtype=torch.float64)
        weight = self._weight(self._timestep(level), self._abar(level))
        return weight.to(sigma) if isinstance(sigma, Tensor) and sigma.ndim else float(weight)

    def weight_at(self, t: int) -> float:
        """s w at timestep ``t`` of ``diffusion``."""
        at = torch.tensor([float(t), self.diffusion.abar(t)], dtype=torch.float64)
        return float(self._weight(at[0], at[1]))

    def value_and_gradient(
        self, y: Tensor, sigma: Noise | None, x0_hat: Tensor, vjp: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """h(v(y)) (B,) and its gradient by ``y`` (B, ...), without scale and weight.

        ``vjp`` maps a gradient by the denoised images ``x0_hat`` to a gradient by ``y``.
        """
        assert self.guide is not None
        if self.view == "noisy":
            return self.guide(y, sigma)
        shrink: float | Tensor
        if isinstance(sigma, Tensor):
            shrink = self._abar(sigma).sqrt()
        else:
            shrink = math.sqrt(float(self._abar(torch.tensor(sigma or 0.0, dtype=torch.float64))))
        if self.view == "x0_hat":
            value, gradient = self.guide(x0_hat, None)
            return value, vjp(gradient) if self.backpropagate else per_image(shrink, y) * gradient
        low, high = self.diffusion.image_range
        dark = low / (high - low)
        v = per_image(shrink, y) * (y + dark) - dark
        value, gradient = self.guide(v, None if sigma is None else shrink * sigma)
        return value, per_image(shrink, y) * gradient

    def _abar(self, sigma: Tensor) -> Tensor:
        low, high = self.diffusion.image_range
        return 1 / (1 + ((high - low) * sigma) ** 2)

    def _weight(self, t: Tensor, abar: Tensor) -> Tensor:
        assert isinstance(self.schedule, GuidanceSchedule)
        total = len(self.diffusion)
        on = t < total * (1 - self.start)
        return self.scale * torch.where(on, self.schedule.weight(t, abar, total), 0.0)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of each level, may be fractional; -1 without noise."""
        known, level = self._log_levels, sigma.detach().cpu().log().numpy()
        found = torch.as_tensor(np.interp(level, known, np.arange(len(known))), device=sigma.device)
        # rounding: the level of a timestep maps to exactly that timestep, also in float32
        return torch.where(sigma > 0, found.round(decimals=3), -1.0)

    @cached_property
    def _log_levels(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.diffusion.sigmas.log().numpy()
        return found


Guidances = Guidance | Sequence[Guidance]
Active = list[tuple[Guidance, Any]]  # with its weight s w, a float or (B,)


def guided_score(score: ScoreFunction, guidance: Guidances) -> ScoreFunction:
    """Guided score s(y) + s w grad_y h; without sigma, y is a clean image.

    Here and below ``guidance`` is one `Guidance`, or several, whose terms add up.
    """
    density = guided_density(lambda y, sigma=None: (y.new_zeros(()), score(y, sigma)), guidance)
    return lambda y, sigma=None: density(y, sigma)[1]


def guided_density(density: DensityFunction, guidance: Guidances) -> DensityFunction:
    """Guided log-density log p(y) + s w h(v(y)) and its gradient.

    The gradient is exact if that of the guide is, except for the view ``x0_hat`` without
    ``backpropagate``. A Metropolis-adjusted sampler samples this density in any case.
    """

    def guided(y: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        values: list[Tensor] = []

        def score(y: Tensor) -> Tensor:
            value, gradient = density(y, sigma)
            values.append(value)
            return gradient

        def x0_hat_of(y: Tensor, score: Tensor) -> Tensor:
            return y if sigma is None else tweedie(y, score, sigma)

        own, added = _evaluate(score, x0_hat_of, _active(guidance, sigma), y, y, sigma)
        if added is None:
            return values[-1], own
        return values[-1].detach() + added[0], own + added[1]

    return guided


def guided_denoiser(denoiser: DenoiserFunction, guidance: Guidances) -> DenoiserFunction:
    """Guided denoiser D(y) + sigma^2 s w grad_y h.

    Without sigma, for blind denoisers, the level is the root mean square of D(y) - y.
    """

    def guided(y: Tensor, sigma: Noise | None = None) -> Tensor:
        denoise, level = lambda y: denoiser(y, sigma), sigma
        if level is None:
            clean = denoiser(y, None)
            level = root_mean_square(clean - y).clamp_min(torch.finfo(y.dtype).tiny)
            if not any(g.backpropagate for g in _listed(guidance)):
                denoise = lambda y: clean  # noqa: E731
        own, added = _evaluate(
            denoise, lambda y, clean: clean, _active(guidance, level), y, y, level
        )
        return own if added is None else own + per_image(level, y) ** 2 * added[1]

    return guided


def guided_noise(
    predictor: NoisePredictor, schedule: Schedule, guidance: Guidances
) -> NoisePredictor:
    """Guided noise prediction eps - s g(t) grad_u h of a diffusion network.

    ``schedule`` is the network's; it replaces ``diffusion`` of each guidance.
    """
    using = [replace(g, diffusion=schedule) for g in _listed(guidance)]
    low, high = schedule.image_range

    def guided(u: Tensor, t: int) -> Tensor:
        sigma, width = schedule.sigma(t), (high - low) * math.sqrt(schedule.abar(t))
        noise, added = _evaluate(
            lambda u: predictor(u, t),
            lambda u, noise: schedule.to_image_units(u, t) - sigma * noise,
            [(g, weight) for g in using if (weight := g.weight_at(t))],
            u,
            schedule.to_image_units(u, t),
            sigma,
            width,
        )
        return noise if added is None else noise - sigma * added[1]

    return guided


def _listed(guidance: Guidances) -> Sequence[Guidance]:
    return [guidance] if isinstance(guidance, Guidance) else guidance


def _active(guidance: Guidances, sigma: Noise | None) -> Active:
    """The guidances with a nonzero weight for any image, and their weights."""
    weighted = [(g, g.weight(sigma)) for g in _listed(guidance) if g.scale]
    return [(g, w) for g, w in weighted if (bool(w.any()) if isinstance(w, Tensor) else w)]


def _evaluate(
    model: Callable[[Tensor], Tensor],
    x0_hat_of: Callable[[Tensor, Tensor], Tensor],
    active: Active,
    x: Tensor,
    y: Tensor,
    sigma: Noise | None,
    width: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The model's output at ``x``, and the guidance terms of log-density (B,) and score (B, ...).

    The terms are None if no guidance is active. ``x`` is ``y`` in the model's coordinates, with
    dx / dy = ``width``; ``x0_hat_of`` maps x and the output to denoised images.
    """
    if not active:
        return model(x), None
    outputs = []

    def x0_hat_at(x: Tensor) -> Tensor:
        outputs.append(model(x))
        return x0_hat_of(x, outputs[0])

    if any(g.backpropagate for g, _ in active):
        x0_hat, product = vjp(x0_hat_at, x)
        out = outputs[0].detach()
    else:
        x0_hat, product = x0_hat_at(x), None
        out = outputs[0]

    def by_y(gradient: Tensor) -> Tensor:
        assert product is not None
        return width * product(gradient)

    values, gradients = [], []
    for guidance, weight in active:
        value, gradient = guidance.value_and_gradient(y, sigma, x0_hat, by_y)
        values.append(weight * value)
        gradients.append(per_image(weight, y) * gradient)
    return out, (sum(values[1:], values[0]), sum(gradients[1:], gradients[0]))


# --- classifier-free -----------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


def classifier_free(conditional: F, unconditional: F, weight: float | Tensor) -> F:
    """Mix noise predictions, scores or denoisers: out_u + w (out_c - out_u).

    Args:
        conditional: function with the label.
        unconditional: function without the label, of the same arguments.
        weight: w, or one per image (B,); the numbers 0 and 1 return ``unconditional`` and
            ``conditional`` unchanged.

    Raises:
        UserError: if the weight is a number below 0, NaN or Inf.
    """
    if not isinstance(weight, Tensor):
        check_positive("scale", weight, zero=True)
        if weight in (0, 1):
            return conditional if weight else unconditional

    def mixed(*arguments: Any) -> Any:
        base = unconditional(*arguments)
        return base + per_image(weight, base) * (conditional(*arguments) - base)

    return mixed  # type: ignore[return-value]
