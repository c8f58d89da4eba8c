r"""Guides: functions of an image, with their gradients, that guidance increases.

The logits of a classifier define energies (RCG eq. 2.32-2.38), :math:`E(v, c) = -\log p(v, c)` and
:math:`E(v) = -\log p(v)`; their difference is the label posterior,
:math:`\log p(c \mid v) = E(v) - E(v, c)`. The guides h of a label c are

=============== ================================================================================
guide           h(v), in nats; guidance increases it
=============== ================================================================================
``classifier``  :math:`\log p(c \mid v)`
``energy``      :math:`\log p(v, c) = -E(v, c)` (RCG section 4.6)
``dual``        :math:`-\bigl(E(v, c) + \lambda\, |\bar E_c - E(v)|\bigr)` (eq. 4.5-4.6), with
                :math:`\bar E_c` the mean of E over training images of the label
``pgd``         :math:`h(v_n)` and the gradient there (section 4.9)
``accumulated`` the sums of :math:`h(v_i)` and of the gradients there, i from 0 to n - 1
                (section 4.3)
=============== ================================================================================

For a model that was trained only to classify, both energies come from its logits
(`ebmkit.models.heads.LogitEnergy`). ``pgd`` and ``accumulated`` make normalised gradient ascent
steps on an inner guide h,

.. math:: v_0 = v, \qquad v_{i+1} = v_i + \gamma \frac{\nabla h(v_i)}{\|\nabla h(v_i)\|_2} .

gamma is a length of v, image units. RCG's steps have the length 0.01 in x_t, whose clean images are
in [-1, 1]: gamma = 0.005 in the view ``x_t``. In the view ``noisy`` the same step of x_t would be
:math:`0.005 / \sqrt{\bar\alpha_t}` long. RCG does not define the steps of ``accumulated``. Neither
gradient is the gradient of the value: the path from v to :math:`v_n` is not differentiated.

A schedule g(t) sets the strength of guidance at each timestep (`ebmkit.guidance.score`). If h is
the exact log-posterior of the noisy image and s = 1, :math:`g = \sqrt{1 - \bar\alpha_t}` gives the
exact conditional noise. ``constant`` and ``step`` multiply this factor (RCG section 4.5: s = 30,
then 11 from the middle of the chain, ``low`` = 11/30); the other schedules replace it (section
4.7), ``sigmoid`` by :math:`(1 - y_0) / (1 + e^{-k (t - t_0)}) + y_0` (eq. 4.4).

A guide is a `ebmkit.sampling.base.DensityFunction`: it maps v (B, ...) and its noise level (image
units, or None) to the value (B,) and the gradient. In all docstrings RCG is the thesis
"Classifier-free Diffusion Guidance with a Robust Energy-Based Classifier" (Sapienza, 2024).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from ebmkit.energy import Energies, EnergyModel, Noise, classifies, upcast_energies
from ebmkit.errors import UserError, unknown_name, validated
from ebmkit.models.heads import LogitEnergy
from ebmkit.noise import check_positive, parse_fraction
from ebmkit.registry import Table
from ebmkit.sampling.base import (
    DensityFunction,
    clean_level,
    density_of,
    label_density_of,
    unit_length,
)

CLASSIFIER_FREE = "classifier-free"
"""Guidance by the labels of the sampled model itself, without a guide."""

Labels = Tensor | int
Means = Sequence[float] | None
_INNER = "inner guide of the ascent: classifier, energy, dual or a custom guide"


def classifier_guide(model: EnergyModel, c: Labels) -> DensityFunction:
    """Classifier guidance: log p(c|v) of labels ``c``, an integer or (B,).

    Raises:
        UserError: if the model was trained without labels, or a label is out of range.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_clean_level(model, label_density_of(model, c))


def energy_guide(model: EnergyModel, c: Labels) -> DensityFunction:
    """Joint-energy guidance: log p(v, c) = -E(v, c), up to a constant (RCG section 4.6).

    Raises:
        UserError: as in `classifier_guide`.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_clean_level(model, density_of(model, c))


def dual_guide(
    model: EnergyModel, c: Labels, means: Tensor | Means, weight: float = 0.15
) -> DensityFunction:
    """Dual guidance: -(E(v, c) + weight |means[c] - E(v)|) (RCG eq. 4.6).

    ``means`` (C,) is the mean E over the training images of each label, in nats
    (`ebmkit.guidance.class_energies`); ``weight`` is lambda, 0 or more (RCG section 4.8).

    Raises:
        UserError: as in `classifier_guide`, or if ``means`` is not one finite number per label.
    """
    model = LogitEnergy.of(check_guide(model))
    check_positive("lambda", weight, zero=True)
    if means is None:
        raise UserError(
            "guide dual needs the mean energy of each label's training images: give means, as "
            "ebmkit.guidance.class_energies computes them"
        )
    by_label = torch.as_tensor(means, dtype=torch.float64).flatten()
    if by_label.shape != (model.num_classes,) or not bool(by_label.isfinite().all()):
        raise UserError(
            f"mean energies must be one finite number for each of {model.num_classes} labels, not "
            f"{by_label.tolist()}"
        )
    density_of(model, c)  # checks the labels

    def guide(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        labels = model.check_labels(c, v)
        target = DualTarget(labels, by_label.to(v)[labels], torch.tensor(weight).to(v))
        energies, (gradient,) = model.value_and_grads(v, sigma, target)
        return target(upcast_energies(energies)), gradient

    return _at_clean_level(model, guide)


RCG_STEP = 0.005
"""RCG's step of PGD guidance, gamma = 0.01 in x_t with clean images in [-1, 1], in image units."""


def pgd_guide(
    inner: DensityFunction, steps: int = 100, step_size: float = RCG_STEP
) -> DensityFunction:
    """``inner`` and its gradient after normalised gradient ascent (RCG section 4.9).

    ``steps`` is n, 0 or more; 0 is ``inner`` itself. ``step_size`` is gamma, the l2 length of a
    step of the guide's input v (B, ...), image units (clean images in [0, 1]). RCG's gamma = 0.01
    is a length of x_t, whose clean images are in [-1, 1]: half of it, the default, with the view
    ``x_t`` (module docstring).

    Raises:
        UserError: if ``steps`` or ``step_size`` is invalid.
    """
    _check_steps(steps, 0, step_size)
    return lambda v, sigma=None: _ascent(inner, v, sigma, steps, step_size)[-1]


def accumulated_guide(
    inner: DensityFunction, steps: int, step_size: float = RCG_STEP
) -> DensityFunction:
    """Sums of ``inner`` and of its gradient along normalised gradient ascent (RCG section 4.3).

    ``steps`` is n, the number of gradients in the sum; 1 is ``inner`` itself. ``step_size`` and
    errors are as in `pgd_guide`.
    """
    _check_steps(steps, 1, step_size)

    def guide(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        found = _ascent(inner, v, sigma, steps - 1, step_size)
        values, gradients = [value for value, _ in found], [gradient for _, gradient in found]
        return sum(values[1:], values[0]), sum(gradients[1:], gradients[0])

    return guide


def _ascent(
    inner: DensityFunction, v: Tensor, sigma: Noise | None, steps: int, step_size: float
) -> list[tuple[Tensor, Tensor]]:
    """h and its gradient at v_0, ..., v_steps; a step along a zero gradient is zero."""
    found = [inner(v, sigma)]
    for _ in range(steps):
        v = v + step_size * unit_length(found[-1][1])
        found.append(inner(v, sigma))
    return found


def _check_steps(steps: int, least: int, step_size: float) -> None:
    if steps < least:
        raise UserError(f"n = {steps} is not a number of steps: take {least} or more")
    check_positive("gamma", step_size, zero=True)


class DualTarget(NamedTuple):
    """-(E(v, c) + lambda |mean - E(v)|) (RCG eq. 4.6)."""

    labels: Tensor  # c (B,)
    means: Tensor  # (B,), mean E over the training images of each label, nats
    weight: Tensor  # lambda, a scalar

    def __call__(self, energies: Energies) -> Tensor:
        density = energies.log_density
        distance = (self.means + density).abs()  # |mean energy - E(v)|
        return density + energies.at_label(self.labels) - self.weight * distance


def check_guide(model: object) -> EnergyModel:
    """Return ``model`` if it can be a guide.

    Raises:
        UserError: if it has no energies, or was trained without labels.
    """
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} gives no energies and cannot guide: use a classifier or a "
            "joint model, or wrap a network that returns logits in ebmkit.guidance.LogitModel"
        )
    if not classifies(model):
        known = "a guide needs labels, and this model was trained without them"
        raise UserError(f"{known}: use one that was trained to classify")
    return model


def _at_clean_level(model: EnergyModel, guide: DensityFunction) -> DensityFunction:
    """``guide``, with `clean_level` as the default noise level."""
    lowest = clean_level(model)
    if lowest is None:
        return guide
    return lambda v, sigma=None: guide(v, lowest if sigma is None else sigma)


# --- by name -------------------------------------------------------------------------------------


class GuideSettings(BaseModel):
    """Base class of guide settings, without fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


class DualSettings(GuideSettings):
    """Settings of ``dual``."""

    lambda_: float = Field(
        0.15, ge=0, alias="lambda", description="dual: weight of |mean E of the label - E(v)|"
    )


class PGDSettings(DualSettings):
    """Settings of ``pgd``."""

    n: int = Field(100, ge=0, description="number of ascent steps; 0 is the inner guide")
    gamma: float = Field(
        RCG_STEP,
        ge=0,
        description="l2 length of an ascent step of the guide's input, images in [0, 1]; RCG's "
        "0.01 in x_t, images in [-1, 1], is 0.005 with the view x_t",
    )
    inner: str = Field("energy", description=_INNER)

    @field_validator("inner")
    @classmethod
    def _known(cls, name: str) -> str:
        legal = [
            other
            for other, guide in GUIDES.items()
            if guide.make is not None and not issubclass(guide.settings, PGDSettings)
        ]
        if name not in legal:
            raise unknown_name("inner guide", name, legal)
        return name

    @property
    def inner_guide(self) -> Guide:
        """The entry of ``inner`` in `GUIDES`."""
        return GUIDES[self.inner]


class AccumulatedSettings(PGDSettings):
    """Settings of ``accumulated``."""

    n: int = Field(
        5,
        ge=1,
        description="number of accumulated gradients; 1 is the inner guide (RCG gives no number)",
    )
    inner: str = Field("classifier", description=_INNER)


class Guide(NamedTuple):
    """A named guidance method.

    ``make`` maps the guiding model, labels, settings and mean energies ((C,) or None) to the guide;
    it is None for classifier-free guidance. With ``needs_means`` it gets the mean energies of each
    label's training images. As an inner guide it gets default settings, except for lambda.
    """

    description: str
    settings: type[GuideSettings]
    make: Callable[[EnergyModel, Labels, Any, Means], DensityFunction] | None
    needs_means: bool = False


def _inner(model: EnergyModel, c: Labels, own: PGDSettings, means: Means) -> DensityFunction:
    guide = own.inner_guide
    assert guide.make is not None
    shared = {"lambda": own.lambda_} if issubclass(guide.settings, DualSettings) else {}
    return guide.make(
        model, c, validated(guide.settings, shared, f"settings of inner guide {own.inner!r}"), means
    )


GUIDES: dict[str, Guide] = Table(
    "guidance",
    {
        "classifier": Guide(
            "log p(c|x): classifier guidance (Dhariwal & Nichol 2021)",
            GuideSettings,
            lambda model, c, own, means: classifier_guide(model, c),
        ),
        "energy": Guide(
            "log p(x, c) = -E(x, c): joint energy (RCG section 4.6)",
            GuideSettings,
            lambda model, c, own, means: energy_guide(model, c),
        ),
        "dual": Guide(
            "-E(x, c) - lambda |mean E of the label - E(x)| (RCG section 4.8)",
            DualSettings,
            lambda model, c, own, means: dual_guide(model, c, means, own.lambda_),
            needs_means=True,
        ),
        "pgd": Guide(
            "gradient of an inner guide after n normalised ascent steps (RCG section 4.9)",
            PGDSettings,
            lambda model, c, own, means: pgd_guide(_inner(model, c, own, means), own.n, own.gamma),
        ),
        "accumulated": Guide(
            "sum of n gradients of an inner guide along normalised ascent steps (RCG section 4.3)",
            AccumulatedSettings,
            lambda model, c, own, means: accumulated_guide(
                _inner(model, c, own, means), own.n, own.gamma
            ),
        ),
        CLASSIFIER_FREE: Guide(
            "no guide; w = scale: 0 unconditional, 1 conditional (Ho & Salimans 2021)",
            GuideSettings,
            None,
        ),
    },
)
"""All guidance methods, by name."""


# --- schedules ----------------------------------------------------------------------------------


class GuidanceSchedule(BaseModel, ABC):
    """A schedule g(t); a subclass defines ``name``, ``description``, a ``form`` and `factor`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    description: ClassVar[str]
    form: ClassVar[str]

    @abstractmethod
    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        """g(t), shape of ``t``: float64 timesteps from 0 to ``total`` - 1, may be fractional.

        ``abar`` is the cumulative product of 1 - beta at ``t``, of the same shape.
        """

    def weight(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        """w(t) = g(t) / sqrt(1 - abar), shape of ``t``; 1 without noise."""
        exact = (1 - abar).sqrt()
        return torch.where(exact > 0, self.factor(t, abar, total) / exact, 1.0)

    def __str__(self) -> str:
        """The text form that `parse_schedule` reads."""
        values = ",".join(f"{k}={v:g}" if float(f"{v:g}") == v else f"{k}={v!r}"
                          for k, v in self.model_dump().items())  # fmt: skip
        return f"{self.name}:{values}" if values else self.name


class Exact(GuidanceSchedule):
    name = form = "exact"
    description = "sqrt(1 - abar), exact for the posterior of noisy images at scale 1 (the default)"

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - abar).sqrt()


class Constant(Exact):
    name = form = "constant"
    description = "the same as exact: a constant scale"


class Step(GuidanceSchedule):
    name = "step"
    form = "step:at=500,low=0.37"
    description = "the exact factor, multiplied by low below timestep at (RCG section 4.5)"

    at: float = Field(500.0, ge=0, description="timestep below which low applies")
    low: float = Field(11 / 30, ge=0, description="factor below this timestep")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return self.weight(t, abar, total) * (1 - abar).sqrt()

    def weight(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return torch.where(t >= self.at, torch.ones_like(t), self.low)


class Linear(GuidanceSchedule):
    name = form = "linear"
    description = "t / T in place of the exact factor (RCG figure 4.17)"

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return t / total


class Power(GuidanceSchedule):
    name = "power"
    form = "power:k=2"
    description = "(1 - abar)^k in place of the exact factor, which has k = 0.5 (RCG section 4.7)"

    k: float = Field(0.5, ge=0, description="exponent; RCG shows 0.5, 2 and 8")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - abar) ** self.k


class Sigmoid(GuidanceSchedule):
    name = "sigmoid"
    form = "sigmoid:t0=500,y0=0.05,k=0.02"
    description = "from y0 up to 1 about timestep t0, in place of the exact factor (RCG eq. 4.4)"

    t0: float = Field(500.0, description="timestep of the midpoint")
    y0: float = Field(0.05, ge=0, le=1, description="value at the clean end")
    k: float = Field(0.02, description="steepness, per timestep")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - self.y0) * torch.sigmoid(self.k * (t - self.t0)) + self.y0


GUIDANCE_SCHEDULES: dict[str, type[GuidanceSchedule]] = {
    kind.name: kind for kind in (Exact, Constant, Step, Linear, Power, Sigmoid)
}
"""All guidance schedules, by name."""


def parse_schedule(text: str) -> GuidanceSchedule:
    """Parse a schedule such as ``sigmoid:t0=500,y0=0.05,k=0.02``.

    Omitted parameters have RCG's values; a number may be a fraction such as 11/30.

    Raises:
        UserError: if ``text`` is invalid; the message shows the form of each schedule.

    >>> str(parse_schedule("power:k=1/4"))
    'power:k=0.25'
    """
    name, colon, rest = text.strip().partition(":")
    forms = "write " + " or ".join(kind.form for kind in GUIDANCE_SCHEDULES.values())
    if name not in GUIDANCE_SCHEDULES:
        raise UserError(f"schedule {text!r} is none of those known: {forms}")
    kind = GUIDANCE_SCHEDULES[name]
    values: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in kind.model_fields:
            what = f"parameter {key!r}" if equals else repr(part)
            legal = ", ".join(kind.model_fields) or "none"
            raise UserError(
                f"schedule {text!r}: {what} is unknown; those of {name} are: {legal}; {forms}"
            )
        number = parse_fraction(value)
        if number is None or not math.isfinite(number) or key in values:
            wrong = "given twice" if key in values else "no number"
            raise UserError(f"schedule {text!r}: {key} = {value!r} is {wrong}; {forms}")
        values[key] = number
    return validated(kind, values, f"schedule {text!r}")
