r"""Noise levels: units, noise laws of training, diffusion schedules.

**Units.** In ebmkit, sigma is the standard deviation of the noise in *image units*: images are in
[0, 1]. The literature often writes "25" for :math:`25/255`. So options and configuration fields
accept fractions as text, and refuse a bare "25" with a suggestion. "25/1" means 25, and a float is
accepted unchanged, so that saved configurations can be loaded.

**Noise laws.** Training draws one :math:`\sigma` per image. The paper's law (CDN sec. 3.3) is the
square of a uniform variable, :math:`\sqrt\sigma \sim U[\sqrt{\min}, \sqrt{\max}]`. Its density is
proportional to :math:`1/\sqrt\sigma`, between those of the uniform and the log-uniform law
(:math:`1/\sigma`).

Over orders of magnitude, ``log-uniform`` draws all levels equally often, and ``log-normal`` (Karras
et al. 2022) the middle ones more often: :math:`\log\sigma` is normal, its mean is the middle of the
range, and its standard deviation a quarter of the range, to which it is restricted.

Diffusion models draw a timestep t uniformly from the T = 1000 levels of a schedule (Ho et al. 2020,
algorithm 1).

**Schedules.** A diffusion model with T steps adds noise of variance :math:`\beta_t` at step t. Its
noisy images are

.. math:: u_t = \sqrt{\bar\alpha_t}\, u_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
    \bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \qquad t = 0, \dots, T - 1.

Its clean images are in a range [a, b], usually [-1, 1]; ours, x = (u - a) / (b - a), in [0, 1]. So
the same noisy image in image units is

.. math::
    y = \frac{u_t / \sqrt{\bar\alpha_t} - a}{b - a} = x + \sigma_t \epsilon, \qquad
    \sigma_t = \frac{1}{b - a} \sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_t}} ,

with 1 / (b - a) = 1/2 for [-1, 1]. A sampler needs only this list of noise levels. The step t = -1
is the clean image, :math:`\bar\alpha_{-1} = 1`.

A sampler visits n of the T steps, from the noisiest to the cleanest, in a spacing with the name
that `diffusers` uses:

============ ====================================================================================
spacing      timesteps
============ ====================================================================================
``leading``  0, r, 2r, ... with r = T // n: ends at 0, excludes the noisiest steps
``linspace`` n steps at equal distances from T - 1 to 0, rounded
``trailing`` T - 1, T - 1 - T/n, ...: begins at T - 1, excludes the cleanest steps
============ ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral
from typing import Annotated, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.registry import find

N = TypeVar("N", bound=float | Tensor)


def parse_fraction(value: object) -> float | None:
    """Parse a number or a fraction such as ``25/255``; None for anything else.

    >>> parse_fraction("51/255"), parse_fraction(0.5), parse_fraction("1/0")
    (0.2, 0.5, None)
    """
    top, slash, bottom = str(value).partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        return None


def check_positive(
    name: str, value: float, zero: bool = False, text: str | None = None, example: str = ""
) -> float:
    """Return ``value``, called ``name`` in the error and read from ``text``, if it is legal.

    Raises:
        UserError: if it is not a finite number above 0 (or 0, if ``zero``), with the ``example``.
    """
    if not 0 <= value < math.inf or (value == 0 and not zero):
        legal = "of 0 or more" if zero else "above 0"
        example = example and f", as in {example}"
        shown = value if text is None else repr(text)
        raise UserError(f"{name} {shown} must be a finite number {legal}{example}")
    return value


def check_sigma(
    sigma: float | Tensor | None, at_zero: bool = False, trained_to: float | None = None
) -> None:
    """Check that ``sigma`` is a noise level or None; values of tensors are not checked.

    Args:
        sigma: noise level, image units.
        at_zero: whether 0 is legal.
        trained_to: highest level of the training, if known.

    Raises:
        UserError: if a number is not finite and above 0, or seems to be in 255ths: an integer above
            1, or a whole float above 1 and ``trained_to``; or if a tensor is not floating-point.
    """
    if isinstance(sigma, Tensor):
        if not sigma.is_floating_point():
            wrong = f"sigma must be a float or a tensor of floats, not {sigma.dtype}"
            raise UserError(f"{wrong}; pass labels as c=...")
    elif sigma is not None:
        check_positive("sigma", sigma, at_zero, example="25/255")
        beyond = isinstance(sigma, Integral) or (trained_to is not None and sigma > trained_to)
        if sigma > 1 and beyond and float(sigma).is_integer():
            raise UserError(
                f"sigma {sigma} is beyond the range of an image, 0 to 1: did you mean "
                f"{sigma:g}/255? (if not, pass torch.tensor({float(sigma)}))"
            )


def require_sigma(sigma: N | None) -> N:
    """Return ``sigma``.

    Raises:
        UserError: if it is None.
    """
    if sigma is None:
        raise UserError("this model takes the noise level as an input: give sigma")
    return sigma


def parse_sigma(value: object, allow_zero: bool = False) -> float:
    """Parse a noise level in image units from ``0.1``, ``"0.1"`` or ``"25/255"``.

    Raises:
        UserError: if the value does not parse, is not finite, is not above 0 (with ``allow_zero``:
            below 0), or is above 1 as an integer or as text without a slash.

    >>> parse_sigma("51/255")
    0.2
    """
    text = str(value).strip()
    sigma = parse_fraction(text)
    if sigma is None:
        raise UserError(
            f"sigma {text!r} is not a noise level: write a number or a fraction, as in 25/255"
        )
    check_positive("sigma", sigma, allow_zero, text, "25/255")
    if sigma > 1 and "/" not in text and not isinstance(value, float):
        raise UserError(
            f"sigma {text!r} is beyond the range of an image, 0 to 1: did you mean {text}/255? "
            f"(if not, write {text}/1)"
        )
    return sigma


def parse_radius(value: object) -> float:
    """Parse a radius in image units from a number, or text with a number or a fraction.

    A bare 2 is legal, because an l2 radius can be above 1.

    Raises:
        UserError: if the value does not parse or is not a finite number of 0 or more.

    >>> parse_radius("51/255"), parse_radius("2")
    (0.2, 2.0)
    """
    text = str(value).strip()
    radius = parse_fraction(text)
    if radius is None:
        raise UserError(f"{text!r} is not a radius: write a number or fraction, as in 0.5 or 8/255")
    return check_positive("radius", radius, True, text, "0.5 or 8/255")


def in_255ths(sigma: float) -> str:
    """Format a noise level in 255ths, for JSON keys and plots.

    >>> in_255ths(25 / 255)
    '25'
    """
    return f"{sigma * 255:.4g}"


def format_sigma(sigma: float) -> str:
    """Format a noise level as a fraction, ``25/255``."""
    return f"{in_255ths(sigma)}/255"


Sigma = Annotated[float, BeforeValidator(parse_sigma)]
"""Pydantic field type of a noise level; accepts what `parse_sigma` accepts."""

SigmaOrZero = Annotated[float, BeforeValidator(partial(parse_sigma, allow_zero=True))]
"""Like `Sigma`, but 0 is legal and means no noise."""

Radius = Annotated[float, BeforeValidator(parse_radius)]
"""Pydantic field type of a radius of 0 or more; accepts what `parse_radius` accepts."""


SLACK = 1e-6
"""Relative tolerance at the ends of a range, for levels such as 100/255 that files round."""


def outside_range(sigmas: Iterable[float], sigma_range: tuple[float, float] | None) -> list[float]:
    """The ``sigmas`` outside the range that a model was trained for.

    ``sigma_range`` is the range in the model's card, image units; None: no limit.

    >>> outside_range([0.1, 0.5, 1.0], (0.2, 0.5))
    [0.1, 1.0]
    """
    if sigma_range is None:
        return []
    low, high = sigma_range
    return [s for s in sigmas if not low * (1 - SLACK) <= s <= high * (1 + SLACK)]


def check_trained(sigma: float, sigma_range: tuple[float, float] | None) -> float:
    """Return ``sigma`` if it is in the range that a model was trained for.

    Raises:
        UserError: if it is not (`outside_range`), with the range.
    """
    if sigma_range is not None and outside_range([sigma], sigma_range):
        low, high = map(format_sigma, sigma_range)
        raise UserError(
            f"noise level {format_sigma(sigma)} is outside the range that this model was trained "
            f"for: use {low} to {high}, or train for a wider range"
        )
    return sigma


Spacing = Literal["leading", "linspace", "trailing"]


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Variances (T,), equally spaced from ``first`` to ``last``, float64 (Ho et al. 2020)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    r"""Variances (T,) float64 with :math:`\bar\alpha(t) \propto \cos^2(\frac{t/T + s}{1 + s}
    \frac\pi2)` and s = ``offset`` (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = ((t + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - abar[1:] / abar[:-1]).clamp_max(largest)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}
"""Functions from the number of steps T to the variances (T,), by name."""


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a diffusion model, by timestep.

    Args:
        betas: variances (T,) of the noise added at each step, above 0 and below 1.
        image_range: range of clean images in the model's coordinates.

    Raises:
        UserError: if a variance or the range is illegal.
    """

    betas: Tensor
    image_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or not len(self.betas):
            raise UserError(f"variances must be (T,), not {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise UserError("the variances of a schedule must lie between 0 and 1")
        low, high = self.image_range
        if not low < high:
            raise UserError(f"image range {low:g} to {high:g} must go up, as -1 to 1 does")
        abar = (1 - self.betas.double()).cumprod(0)
        object.__setattr__(self, "_abar", (1.0, *abar.tolist()))

    def __len__(self) -> int:
        return len(self.betas)

    def __deepcopy__(self, memo: dict[int, object]) -> Schedule:
        return self  # immutable

    def abar(self, t: int) -> float:
        """Share of the clean image in the variance after step ``t``; 1 at t = -1.

        Raises:
            UserError: if the schedule has no step ``t``.
        """
        if not -1 <= t < len(self):
            raise UserError(f"timestep {t} is out of range: this schedule has 0 to {len(self) - 1}")
        value: float = self._abar[t + 1]  # type: ignore[attr-defined]
        return value

    def sigma(self, t: int) -> float:
        """Noise level at timestep ``t``, image units; 0 at t = -1."""
        abar, (low, high) = self.abar(t), self.image_range
        return math.sqrt((1 - abar) / abar) / (high - low)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of all timesteps, (T,) float64, image units."""
        return torch.tensor([self.sigma(t) for t in range(len(self))], dtype=torch.float64)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level, image units."""
        return self.sigma(0), self.sigma(len(self) - 1)

    def nearest(self, sigma: float) -> int:
        """The timestep whose noise level is closest to ``sigma`` (image units), as a ratio.

        Raises:
            UserError: if sigma is not finite and above 0.
        """
        check_sigma(sigma)
        return min(range(len(self)), key=lambda t: abs(math.log(self.sigma(t) / sigma)))

    def to_image_units(self, u: Tensor, t: int) -> Tensor:
        """Convert noisy images ``u`` in the model's coordinates to y = x + sigma(t) * eps."""
        low, high = self.image_range
        return (u / math.sqrt(self.abar(t)) - low) / (high - low)

    def from_image_units(self, y: Tensor, t: int) -> Tensor:
        """Inverse of `to_image_units`: the input of the diffusion network at timestep ``t``."""
        low, high = self.image_range
        return (y * (high - low) + low) * math.sqrt(self.abar(t))

    def timesteps(self, count: int, spacing: Spacing = "trailing") -> tuple[int, ...]:
        """``count`` timesteps from the noisiest to the cleanest; see the table of the module.

        Raises:
            UserError: if the schedule has fewer timesteps, or the spacing is unknown.
        """
        total = len(self)
        if not 1 <= count <= total:
            raise UserError(f"cannot select {count} of {total} timesteps: use 1 to {total}")
        if spacing == "leading":
            chosen = [i * (total // count) for i in reversed(range(count))]
        elif spacing == "linspace":
            ratio = (total - 1) / (count - 1) if count > 1 else 0.0
            chosen = [round(i * ratio) for i in reversed(range(count))]
        elif spacing == "trailing":
            chosen = [round(total - i * (total / count)) - 1 for i in range(count)]
        else:
            raise UserError(f"unknown spacing {spacing!r}: known: {', '.join(get_args(Spacing))}")
        return tuple(chosen)

    def within(
        self, timesteps: Sequence[int], sigma_range: tuple[float, float] | None
    ) -> tuple[int, ...]:
        """The ``timesteps`` whose noise level is in the range that a model was trained for.

        Raises:
            UserError: if none is.
        """
        levels = [self.sigma(t) for t in timesteps]
        outside = outside_range(levels, sigma_range)
        if sigma_range is not None and len(outside) == len(levels):
            low, high = map(format_sigma, sigma_range)
            raise UserError(
                f"none of the {len(levels)} noise levels from {format_sigma(max(levels))} to "
                f"{format_sigma(min(levels))} is in the range that the model was trained for, "
                f"{low} to {high}: take more timesteps"
            )
        return tuple(t for t, sigma in zip(timesteps, levels, strict=True) if sigma not in outside)


def make_schedule(
    name: str = "linear", steps: int = 1000, image_range: tuple[float, float] = (-1.0, 1.0)
) -> Schedule:
    """Create the schedule called ``name`` in `SCHEDULES`.

    Raises:
        UserError: if the name is unknown.

    >>> schedule = make_schedule("linear")
    >>> schedule.nearest(schedule.sigma(400))
    400
    """
    return Schedule(find("schedule", SCHEDULES, name)(steps), image_range)


_NORMAL_SHARE = 0.5 * math.erfc(math.sqrt(2))
"""Probability of a normal variable beyond 2 standard deviations on one side."""

NoiseKind = Literal[
    "squared-uniform", "log-uniform", "log-normal", "uniform", "fixed", "diffusion", "none"
]


class NoiseLaw(BaseModel):
    """Distribution of noise levels, in image units; text such as ``25/255`` is accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NoiseKind = Field(
        "none",
        description="distribution: squared-uniform (the paper), log-uniform, log-normal, uniform, "
        "fixed (always max), diffusion (the levels of a diffusion schedule), none",
    )
    min: SigmaOrZero = Field(
        0.0, description="lowest noise level, image units; kind diffusion: set by the schedule"
    )
    max: SigmaOrZero = Field(
        0.0, description="highest noise level, image units; kind diffusion: set by the schedule"
    )
    schedule: Literal["linear", "cosine"] = Field(
        "linear",
        description="kind diffusion: schedule of the 1000 levels, which are drawn uniformly",
    )

    @model_validator(mode="after")
    def _check(self) -> NoiseLaw:
        if self.kind in ("none", "diffusion"):
            return self
        if self.max <= 0:
            raise UserError(f"a {self.kind} noise law needs max above 0, as in 100/255")
        if self.min > self.max:
            raise UserError(f"noise level min {self.min:g} is above max {self.max:g}: swap them")
        if self.kind in ("log-uniform", "log-normal") and self.min == 0:
            raise UserError(f"a {self.kind} noise law needs min above 0, as in 1/255")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest level that can be drawn, image units."""
        if self.kind == "none":
            return 0.0, 0.0
        if self.kind == "diffusion":
            return make_schedule(self.schedule).sigma_range
        return (self.max, self.max) if self.kind == "fixed" else (self.min, self.max)

    def sample(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw ``count`` independent levels, (count,) float32, image units.

        ``generator`` must be on ``device``, where the levels are created.
        """
        if self.kind == "diffusion":
            levels = _levels(self.schedule, str(device))
            chosen = torch.randint(len(levels), (count,), generator=generator, device=device)
            return levels[chosen]
        low, high = self.range
        if low == high:
            return torch.full((count,), high, device=device)
        u = torch.rand(count, generator=generator, device=device)
        if self.kind == "squared-uniform":
            first, last = math.sqrt(low), math.sqrt(high)
            return (first + (last - first) * u).square()
        if self.kind == "log-uniform":
            return low * torch.pow(high / low, u)
        if self.kind == "log-normal":
            z = torch.special.ndtri(_NORMAL_SHARE + (1 - 2 * _NORMAL_SHARE) * u)
            return math.sqrt(low * high) * torch.pow(high / low, z / 4)
        return low + (high - low) * u


@cache
def _levels(schedule: str, device: str) -> Tensor:
    """The noise levels of the schedule, (T,) float32, cached on the device."""
    return make_schedule(schedule).sigmas.float().to(device)
