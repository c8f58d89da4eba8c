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
from typing import Any, Literal, NamedTuple, Self, TypeVar

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
    PGDSettings,
    check_guide,
    parse_schedule,
)
from ebmkit.models.denoisers import implied_sigma
from ebmkit.noise import Schedule, check_positive, make_schedule
from ebmkit.registry import find
from ebmkit.sampling.base import (
    DenoiserFunction,
    DensityFunction,
    ScoreFunction,
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
        entry = GUIDES[self.guidance]
        own = entry.settings.model_validate(self.options)
        return entry.needs_means or (isinstance(own, PGDSettings) and own.inner_guide.needs_means)

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
    0.005
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
        self,
        y: Tensor,
        sigma: Noise | None,
        x0_hat: Tensor | None = None,
        product: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h(v(y)) (B,) and its gradient by ``y`` (B, ...), without scale and weight.

        The view ``x0_hat`` needs the denoised images ``x0_hat`` (B, ...), and for ``backpropagate``
        ``product``, which maps a gradient by ``x0_hat`` to a gradient by ``y``.
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
            assert x0_hat is not None
            value, gradient = self.guide(x0_hat, None)
            if not self.backpropagate:
                return value, per_image(shrink, y) * gradient
            assert product is not None
            return value, product(gradient)
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


class GuidanceTerm(NamedTuple):
    """What guidance adds to a log-density, (B,), and to the score, (B, ...)."""

    log_density: Tensor
    score: Tensor


def guidance_term(
    active: Active,
    y: Tensor,
    sigma: Noise | None,
    x0_hat: Tensor | None = None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> GuidanceTerm:
    """Sum of the terms of the guidances of `active_guidances`, which are one or more.

    ``x0_hat`` and ``product`` are as in `Guidance.value_and_gradient`.
    """
    values, gradients = [], []
    for guidance, weight in active:
        value, gradient = guidance.value_and_gradient(y, sigma, x0_hat, product)
        values.append(weight * value)
        gradients.append(per_image(weight, y) * gradient)
    return GuidanceTerm(sum(values[1:], values[0]), sum(gradients[1:], gradients[0]))


def active_guidances(guidance: Guidances, sigma: Noise | None) -> Active:
    """The guidances with a nonzero weight for any image, and their weights."""
    weighted = [(g, g.weight(sigma)) for g in _listed(guidance) if g.scale]
    return [(g, w) for g, w in weighted if (bool(w.any()) if isinstance(w, Tensor) else w)]


def guided_score(score: ScoreFunction, guidance: Guidances) -> ScoreFunction:
    """Guided score s(y) + s w grad_y h; without sigma, y is a clean image.

    Here and below ``guidance`` is one `Guidance`, or several, whose terms add up. Where no guidance
    is active, the result is that of the unguided function, bit for bit.
    """
    return lambda y, sigma=None: _guided(score, y, sigma, active_guidances(guidance, sigma))[0]


def guided_density(density: DensityFunction, guidance: Guidances) -> DensityFunction:
    """Guided log-density log p(y) + s w h(v(y)), and the guided score.

    The guided score is its gradient if the guide gives the gradient of its value, except for the
    view ``x0_hat`` without ``backpropagate``. A Metropolis-adjusted sampler samples this density in
    any case.
    """

    def guided(y: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        values: list[Tensor] = []

        def score(y: Tensor, sigma: Noise | None = None) -> Tensor:
            value, gradient = density(y, sigma)
            values.append(value)
            return gradient

        found, term = _guided(score, y, sigma, active_guidances(guidance, sigma))
        return values[-1] if term is None else values[-1].detach() + term.log_density, found

    return guided


def guided_denoiser(denoiser: DenoiserFunction, guidance: Guidances) -> DenoiserFunction:
    """Denoiser by Tweedie's formula from the guided score; sigma must be above 0.

    Without sigma, for blind denoisers, the level is the root mean square of D(y) - y.
    """

    def guided(y: Tensor, sigma: Noise | None = None) -> Tensor:
        clean = denoiser(y, None) if sigma is None else None
        level = implied_sigma(clean - y) if clean is not None else sigma
        active = active_guidances(guidance, level)
        if not active:
            return denoiser(y, sigma) if clean is None else clean
        if any(g.backpropagate for g, _ in active):
            clean = None  # computed again, with a graph

        def score(y: Tensor, level: Noise | None = None) -> Tensor:
            assert level is not None
            own = denoiser(y, None if sigma is None else level) if clean is None else clean
            return (own - y) / per_image(level, y) ** 2

        assert level is not None
        return tweedie(y, _guided(score, y, level, active)[0], level)

    return guided


def guided_noise(
    predictor: NoisePredictor, schedule: Schedule, guidance: Guidances
) -> NoisePredictor:
    """Noise prediction -sigma s(y) from the guided score, eps - s g(t) grad_u h.

    ``schedule`` is the network's; it replaces ``diffusion`` of each guidance.
    """
    using = [replace(g, diffusion=schedule) for g in _listed(guidance)]

    def guided(u: Tensor, t: int) -> Tensor:
        active = [(g, weight) for g in using if (weight := g.weight_at(t))]
        if not active:
            return predictor(u, t)
        image, sigma = schedule.to_image_units(u, t), schedule.sigma(t)

        def score(y: Tensor, level: Noise | None = None) -> Tensor:
            own = u if y is image else schedule.from_image_units(y, t)  # without rounding
            return -predictor(own, t) / sigma

        return -sigma * _guided(score, image, sigma, active)[0]

    return guided


def _guided(
    score: ScoreFunction, y: Tensor, sigma: Noise | None, active: Active
) -> tuple[Tensor, GuidanceTerm | None]:
    """The guided score at ``y``, and the term in it; None if no guidance is ``active``."""
    if not active:
        return score(y, sigma), None
    outputs: list[Tensor] = []

    def x0_hat_of(y: Tensor) -> Tensor:
        level = sigma.clone() if isinstance(sigma, Tensor) else sigma
        outputs.append(score(y, level))
        return y if level is None else tweedie(y, outputs[0], level)

    product: Callable[[Tensor], Tensor] | None = None
    if any(g.backpropagate for g, _ in active):
        x0_hat, product = vjp(x0_hat_of, y)
    else:
        x0_hat = x0_hat_of(y)
    own = outputs[0].detach() if product else outputs[0]
    term = guidance_term(active, y, sigma, x0_hat, product)
    return own + term.score, term


def _listed(guidance: Guidances) -> Sequence[Guidance]:
    return [guidance] if isinstance(guidance, Guidance) else guidance


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
