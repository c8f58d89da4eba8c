r"""Guidance as a combinator: a score, a denoiser or a noise prediction in, a guided one out.

A guide h sees the noisy image :math:`y = x + \sigma\epsilon` through one of three views v(y). With
the diffusion model's range [a, b] of images, :math:`\bar\alpha = 1 / (1 + (b - a)^2 \sigma^2)`:

=========== ======================================= ============================================
view        v                                       gradient by y of h(v(y))
=========== ======================================= ============================================
``noisy``   y, as models trained on noise take it   :math:`\nabla h`
``shrunk``  :math:`(u_t - a)/(b - a)`, the          :math:`\sqrt{\bar\alpha}\,\nabla h`
            diffusion model's own coordinates
            brought to the image range: darkened
            at high noise (what RCG feeds)
``clean``   D(y), the predicted clean image         :math:`\sqrt{\bar\alpha}\,\nabla h`, or with
                                                    ``through`` :math:`J_D(y)^\top \nabla h`
=========== ======================================= ============================================

Without ``through`` the clean image is taken to move as the shrunk one does (a straight-through
gradient), so that scales of the two are alike; with it the gradient goes back through the denoiser.

Guidance at scale s adds :math:`p = s\,w\,\nabla_y h(v(y))` to the score,

.. math::
    \hat s(y) = s(y) + p, \qquad \hat D(y) = D(y) + \sigma^2 p, \qquad
    \hat\epsilon = \epsilon - \sigma p
        = \epsilon - s\, g(t)\, \nabla_{u_t} h ,

the same thing three times, with the weight w = :math:`g(t) / \sqrt{1 - \bar\alpha_t}` of
`ebmkit.guidance.schedules`, since :math:`\nabla_y = \sqrt{\bar\alpha}\,(b - a)\,\nabla_{u_t}` and
:math:`\sigma = \sqrt{(1 - \bar\alpha)/\bar\alpha}\,/\,(b - a)`. So the mean of a reverse step moves
by s times the *variance* of that step times the gradient (RCG eq. 2.17 has its deviation). Several
guidances add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ebmkit.energy import Noise
from ebmkit.errors import UserError
from ebmkit.guidance.schedules import Exact, GuidanceSchedule, parse_schedule
from ebmkit.noise import Schedule, make_schedule
from ebmkit.sampling.base import per_chain, root_mean_square
from ebmkit.sampling.diffusion import NoisePredictor
from ebmkit.sampling.target import DenoiserFunction, DensityFunction, ScoreFunction

__all__ = [
    "Guidance",
    "View",
    "guided_denoiser",
    "guided_density",
    "guided_noise",
    "guided_score",
]

View = Literal["noisy", "shrunk", "clean"]

EXACT = Exact()


@dataclass(frozen=True)
class Guidance:
    """One guide, and how it is used.

    Args:
        guide: a function that is raised; it gets the noise level of what it sees, image units, or
            None of a clean image.
        scale: s, 0 or more.
        schedule: g(t), or its written form.
        view: what the guide sees.
        through: whether the gradient of ``clean`` goes back through the denoiser.
        late: share of the T noise levels, from the noisiest down, at which guidance is off (late
            activation, RCG section 4.3).
        diffusion: says which timestep and which abar a noise level is; `guided_noise` takes its
            own instead.

    Raises:
        UserError: if a value is not legal.
    """

    guide: DensityFunction
    scale: float = 1.0
    schedule: GuidanceSchedule | str = EXACT
    view: View = "noisy"
    through: bool = False
    late: float = 0.0
    diffusion: Schedule = field(default_factory=make_schedule, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"scale {self.scale} must be a finite number of 0 or more")
        if not 0 <= self.late <= 1:
            raise UserError(f"late {self.late} must be a share of the noise levels, from 0 to 1")
        if self.view not in get_args(View):
            raise UserError(f"unknown view {self.view!r}: known: {', '.join(get_args(View))}")
        if self.through and self.view != "clean":
            raise UserError(f"through is for the view clean, not for {self.view}: leave it out")
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", parse_schedule(self.schedule))

    def weight(self, sigma: Noise | None) -> float | Tensor:
        """s w at a noise level in image units, a float or (B,); None is no noise, w = 1."""
        if isinstance(sigma, Tensor) and sigma.ndim:
            level = sigma.double()
            return self._weight(self._timestep(level), self._abar(level)).to(sigma)
        level = torch.tensor(0.0 if sigma is None else float(sigma), dtype=torch.float64)
        return float(self._weight(self._timestep(level), self._abar(level)))

    def weight_at(self, t: int) -> float:
        """s w at timestep ``t`` of ``diffusion``."""
        at = torch.tensor([float(t), self.diffusion.abar(t)], dtype=torch.float64)
        return float(self._weight(at[0], at[1]))

    def pull(
        self, y: Tensor, sigma: Noise | None, clean: Tensor, back: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The guide's value (B,) and its gradient by ``y`` (B, ...), without scale and weight.

        Args:
            y: noisy images.
            sigma: their noise level; None: no noise.
            clean: the denoised images, for the view ``clean``.
            back: pulls a gradient by ``clean`` back to one by ``y``, for ``through``.
        """
        if self.view == "noisy":
            return self.guide(y, sigma)
        shrink = self._shrink(sigma)
        if self.view == "clean":
            value, gradient = self.guide(clean, None)
            return value, back(gradient) if self.through else per_chain(shrink, y) * gradient
        low, high = self.diffusion.image_range
        dark = low / (high - low)
        v = per_chain(shrink, y) * (y + dark) - dark
        value, gradient = self.guide(v, None if sigma is None else shrink * sigma)
        return value, per_chain(shrink, y) * gradient

    def _shrink(self, sigma: Noise | None) -> float | Tensor:
        """sqrt(abar)."""
        if isinstance(sigma, Tensor):
            return self._abar(sigma).sqrt()
        return math.sqrt(float(self._abar(torch.tensor(sigma or 0.0, dtype=torch.float64))))

    def _abar(self, sigma: Tensor) -> Tensor:
        low, high = self.diffusion.image_range
        return 1 / (1 + ((high - low) * sigma) ** 2)

    def _weight(self, t: Tensor, abar: Tensor) -> Tensor:
        assert isinstance(self.schedule, GuidanceSchedule)
        total = len(self.diffusion)
        on = t < total * (1 - self.late)
        return self.scale * torch.where(on, self.schedule.weight(t, abar, total), 0.0)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of each level, between two where the level is; -1 of no noise."""
        known = self._log_levels.to(sigma.device)
        level = sigma.log().clamp(known[0], known[-1])
        above = torch.searchsorted(known, level).clamp(1, max(1, len(known) - 1))
        if len(known) == 1:
            found = torch.zeros_like(level)
        else:
            start, end = known[above - 1], known[above]
            found = above - 1 + (level - start) / (end - start)
        # a level that is a timestep's, perhaps in float32, is that timestep
        return torch.where(sigma > 0, (found * 1e3).round() / 1e3, -1.0)

    @cached_property
    def _log_levels(self) -> Tensor:
        """log sigma(t), (T,) float64."""
        return self.diffusion.sigmas.log()


Guidances = Guidance | Sequence[Guidance]


def guided_noise(
    predictor: NoisePredictor, schedule: Schedule, guidance: Guidances
) -> NoisePredictor:
    """eps - s g(t) grad_u h: guidance of a diffusion network, for DDIM and its kind.

    Args:
        predictor: (u_t, t) to the noise.
        schedule: the network's; it takes the place of the guidances' own.
        guidance: one, or several, which add up.
    """
    using = [replace(g, diffusion=schedule) for g in _listed(guidance)]
    low, high = schedule.image_range

    def predict(u: Tensor, t: int) -> Tensor:
        active = [(g, w) for g in using if (w := g.weight_at(t))]
        if not active:
            return predictor(u, t)
        sigma, width = schedule.sigma(t), (high - low) * math.sqrt(schedule.abar(t))

        def clean_of(u: Tensor, noise: Tensor) -> Tensor:
            return schedule.to_image_units(u, t) - sigma * noise

        noise, clean, back = _forward(lambda u: predictor(u, t), clean_of, u, active)
        y = schedule.to_image_units(u, t)
        _, push = _total(active, y, sigma, clean, lambda g: width * back(g))
        return noise - sigma * push

    return predict


def guided_score(score: ScoreFunction, guidance: Guidances) -> ScoreFunction:
    """s(y) + s w grad_y h, for samplers that take a score; without sigma there is no noise."""
    using = _listed(guidance)

    def guided(y: Tensor, sigma: Noise | None = None) -> Tensor:
        active = _active(using, sigma)
        if not active:
            return score(y, sigma)

        def clean_of(y: Tensor, own: Tensor) -> Tensor:
            return y if sigma is None else y + per_chain(sigma, y) ** 2 * own

        own, clean, back = _forward(lambda y: score(y, sigma), clean_of, y, active)
        return own + _total(active, y, sigma, clean, back)[1]

    return guided


def guided_denoiser(denoiser: DenoiserFunction, guidance: Guidances) -> DenoiserFunction:
    """D(y) + sigma^2 s w grad_y h, for samplers that take a denoiser.

    Without sigma, as of a blind denoiser, the level is the root mean square of D(y) - y.
    """
    using = _listed(guidance)

    def guided(y: Tensor, sigma: Noise | None = None) -> Tensor:
        if not any(g.scale for g in using):
            return denoiser(y, sigma)
        if sigma is None:
            return _blindly(denoiser, using, y)
        active = _active(using, sigma)
        if not active:
            return denoiser(y, sigma)
        own, clean, back = _forward(lambda y: denoiser(y, sigma), lambda y, d: d, y, active)
        _, push = _total(active, y, sigma, clean, back)
        return own + per_chain(sigma, y) ** 2 * push

    return guided


def guided_density(density: DensityFunction, guidance: Guidances) -> DensityFunction:
    """log p(y) + s w h(v(y)) and its gradient, for samplers that take a density.

    The gradient is that of the value where the guide's is, and the view is not ``clean`` without
    ``through``; a Metropolis-adjusted sampler keeps the law of the value in any case.
    """
    using = _listed(guidance)

    def guided(y: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        active = _active(using, sigma)
        if not active:
            return density(y, sigma)
        values: list[Tensor] = []

        def score(y: Tensor) -> Tensor:
            value, gradient = density(y, sigma)
            values.append(value.detach())
            return gradient

        def clean_of(y: Tensor, own: Tensor) -> Tensor:
            return y if sigma is None else y + per_chain(sigma, y) ** 2 * own

        own, clean, back = _forward(score, clean_of, y, active)
        value, push = _total(active, y, sigma, clean, back)
        return values[-1] + value, own + push

    return guided


def _blindly(denoiser: DenoiserFunction, using: list[Guidance], y: Tensor) -> Tensor:
    """The guided denoiser at the level that the residual has."""
    every = [(g, 1.0) for g in using if g.scale]
    own, clean, back = _forward(lambda y: denoiser(y, None), lambda y, d: d, y, every)
    sigma = root_mean_square(own - y).clamp_min(torch.finfo(y.dtype).tiny)
    active = _active(using, sigma)
    if not active:
        return own
    return own + per_chain(sigma, y) ** 2 * _total(active, y, sigma, clean, back)[1]  # type: ignore[operator]


def _listed(guidance: Guidances) -> list[Guidance]:
    return [guidance] if isinstance(guidance, Guidance) else list(guidance)


Active = list[tuple[Guidance, float | Tensor]]


def _active(using: Sequence[Guidance], sigma: Noise | None) -> list[Any]:
    """The guidances that are on at this level of any image, with their weights."""
    found: list[Any] = []
    for guidance in using:
        weight = guidance.weight(sigma) if guidance.scale else 0.0
        if bool((weight != 0).any()) if isinstance(weight, Tensor) else weight:
            found.append((guidance, weight))
    return found


def _total(
    active: Sequence[tuple[Guidance, float | Tensor]],
    y: Tensor,
    sigma: Noise | None,
    clean: Tensor,
    back: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The sums of s w h and of its gradient by y."""
    values, pushes = [], []
    for guidance, weight in active:
        value, gradient = guidance.pull(y, sigma, clean, back)
        values.append(weight * value)
        pushes.append(per_chain(weight, y) * gradient)
    return sum(values[1:], values[0]), sum(pushes[1:], pushes[0])


def _forward(
    model: Callable[[Tensor], Tensor],
    clean_of: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    active: Sequence[tuple[Guidance, float | Tensor]],
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """What ``model`` gives at ``y``, the clean image, and how gradients go back from that to y."""
    if not any(g.through for g, _ in active):
        out = model(y)
        return out, clean_of(y, out), _nowhere
    with torch.inference_mode(False), torch.enable_grad():
        leaf = y.detach().clone().requires_grad_()
        out = model(leaf)
        clean = clean_of(leaf, out)

    def back(gradient: Tensor) -> Tensor:
        with torch.inference_mode(False):
            own = gradient.detach().clone()
            (pulled,) = torch.autograd.grad(clean, leaf, own, retain_graph=True)
        return pulled

    return out.detach(), clean.detach(), back


def _nowhere(gradient: Tensor) -> Tensor:
    raise AssertionError("only guidance with through goes back through the denoiser")
