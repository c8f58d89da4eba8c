r"""Guides: functions of an image, with their gradients, that guidance increases.

A classifier's logits are energies (RCG eq. 2.32-2.38), :math:`E(v, c) = -\log p(v, c)` and
:math:`E(v) = -\log p(v)`, whose difference classifies,
:math:`\log p(c \mid v) = E(v) - E(v, c)`. With them a guide h of a label c is

=============== ================================================================================
guide           h(v), to be increased, in nats
=============== ================================================================================
``classifier``  :math:`\log p(c \mid v)`
``energy``      :math:`\log p(v, c) = -E(v, c)` (RCG section 4.6)
``dual``        :math:`-\bigl(E(v, c) + \lambda\, |\bar E_c - E(v)|\bigr)` (eq. 4.5-4.6), with
                :math:`\bar E_c` the mean of E over training images of the label
``pgd``         :math:`h(v_n)` with the gradient there (section 4.9)
``accumulated`` the sum of :math:`h(v_i)` and of the gradients there, i from 0 to n - 1
                (section 4.3)
=============== ================================================================================

The energies of a model that was trained to classify alone are those of its logits
(`ebmkit.models.heads.LogitEnergy`). The last two take an inner guide h and n normalised steps up
it,

.. math:: v_0 = v, \qquad v_{i+1} = v_i + \gamma \frac{\nabla h(v_i)}{\|\nabla h(v_i)\|_2} ,

where RCG does not say how its intermediate images arise. Neither is the gradient of its value: the
path from v to :math:`v_n` is not differentiated.

For ``dual`` the means are computed once and stored with the guide's run,
``RUN/energies/DATASET-FINGERPRINT.json`` of the images' fingerprint. The file names the digest of
the weights; with other weights it is computed anew.

A guide is a `ebmkit.sampling.base.DensityFunction`: v (B, ...) and the noise level of v in image
units, or None, to the value (B,) and the gradient. RCG is the thesis "Classifier-free Diffusion
Guidance with a Robust Energy-Based Classifier" (Sapienza, 2024) here and in all docstrings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ebmkit.compile import device_of
from ebmkit.energy import Energies, EnergyModel, Noise, classifies, upcast_energies
from ebmkit.errors import UserError
from ebmkit.models.heads import LogitEnergy
from ebmkit.registry import Table
from ebmkit.sampling.base import (
    DensityFunction,
    check_positive,
    clean_level,
    density_of,
    label_density_of,
    unit_length,
)
from ebmkit.storage import make_folder, write_atomically
from ebmkit.storage.reading import read_json

CLASSIFIER_FREE = "classifier-free"
"""Guidance that needs no guide: the sampled model itself knows labels."""

Labels = Tensor | int
Means = Sequence[float] | None
Inner = Literal["classifier", "energy", "dual"]
_INNER = "inner guide that is increased: classifier, energy or dual"


def classifier_guide(model: EnergyModel, c: Labels) -> DensityFunction:
    """log p(c|v) of labels ``c``, a number or (B,): classifier guidance.

    Raises:
        UserError: if the model has no labels that were trained, or one is out of range.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_clean_level(model, label_density_of(model, c))


def energy_guide(model: EnergyModel, c: Labels) -> DensityFunction:
    """log p(v, c) = -E(v, c), up to a constant: joint-energy guidance (RCG section 4.6).

    Raises:
        UserError: as `classifier_guide`.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_clean_level(model, density_of(model, c))


def dual_guide(
    model: EnergyModel, c: Labels, means: Tensor | Means, weight: float = 0.15
) -> DensityFunction:
    """-(E(v, c) + weight |means[c] - E(v)|): images as likely as the label's own (RCG eq. 4.6).

    ``means`` (C,) are those of E over training images of each label, nats
    (`ebmkit.guidance.class_energies`); ``weight`` is lambda, 0 or more (RCG section 4.8).

    Raises:
        UserError: as `classifier_guide`, or if there is not one finite mean for each label.
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


def pgd_guide(inner: DensityFunction, steps: int = 100, step_size: float = 0.01) -> DensityFunction:
    """``inner`` and its gradient after ``steps`` normalised steps up it (RCG section 4.9).

    ``steps``, n, may be 0: ``inner`` itself. ``step_size`` is gamma, the l2 length of a step, in
    image units of the guide's input.

    Raises:
        UserError: if a number is not legal.
    """
    _check_steps(steps, 0, step_size)
    return lambda v, sigma=None: _ascent(inner, v, sigma, steps, step_size)[-1]


def accumulated_guide(
    inner: DensityFunction, steps: int, step_size: float = 0.01
) -> DensityFunction:
    """The sums of ``inner`` and of its gradient along normalised steps up it (RCG section 4.3).

    ``steps``, n, is the number of gradients added; 1 is ``inner`` itself. The rest is as of
    `pgd_guide`.
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
    """h and its gradient at v_0, ..., v_steps; where the gradient is 0 nothing moves."""
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
    means: Tensor  # (B,), mean E of training images of these labels, nats
    weight: Tensor  # lambda, a scalar

    def __call__(self, energies: Energies) -> Tensor:
        density = energies.log_density
        distance = (self.means + density).abs()  # |mean energy - E(v)|
        return density + energies.at_label(self.labels) - self.weight * distance


def check_guide(model: object) -> EnergyModel:
    """``model``, which can be a guide.

    Raises:
        UserError: if it gives no energies, or has no labels that were trained.
    """
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} gives no energies and cannot guide: take a classifier or a "
            "joint model, or wrap a network that gives logits in ebmkit.guidance.LogitModel"
        )
    if not classifies(model):
        known = "a guide must know labels, and this model was trained without"
        raise UserError(f"{known}: take one that was trained to classify")
    return model


def _at_clean_level(model: EnergyModel, guide: DensityFunction) -> DensityFunction:
    """``guide`` at `clean_level` where no noise level is given."""
    lowest = clean_level(model)
    if lowest is None:
        return guide
    return lambda v, sigma=None: guide(v, lowest if sigma is None else sigma)


class LogitModel(EnergyModel):
    """Any network that gives logits, as a model with energies: E(x, c) = -logits[c].

    Images come in [0, 1]; what the network wants instead, the range [-1, 1] or a mean and deviation
    of each channel, is done inside, so that gradients are per image unit.

    Args:
        network: images (B, C, H, W) to logits (B, num_classes); with ``noise_conditional`` it is
            called as network(images, sigma), sigma (B,) in image units.
        num_classes: number of labels.
        mean: of each channel, subtracted from images in [0, 1]; a number or one for each.
        std: of each channel, divided by after that.
        signed: whether the network takes images in [-1, 1]; it excludes mean and std.
        in_channels: channels that images must have; None does not check.
        noise_conditional: whether the network needs the noise level.

    Raises:
        UserError: if mean, std and signed do not go together.

    >>> model = LogitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, signed=True)
    >>> model.log_joint(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        signed: bool = False,
        in_channels: int | None = None,
        noise_conditional: bool = False,
    ) -> None:
        super().__init__()
        if signed and not (mean is None and std is None):
            raise UserError("images in [-1, 1] have mean and std 0.5: give signed, or mean and std")
        if num_classes < 1:
            raise UserError(f"{num_classes} labels are none: take 1 or more")
        default = 0.5 if signed else None
        self.network, self.num_classes, self.in_channels = network, num_classes, in_channels
        self.noise_conditional = noise_conditional
        for name, values in (("mean", default or mean or 0.0), ("std", default or std or 1.0)):
            found = torch.as_tensor(values, dtype=torch.float32)
            found = found.reshape(-1, 1, 1) if found.ndim else found
            if in_channels is not None and found.ndim and len(found) not in (1, in_channels):
                raise UserError(f"{name} has {len(found)} numbers for {in_channels} channel(s)")
            self.register_buffer(name, found)
        if bool((self.std <= 0).any()):
            raise UserError(f"std {self.std.flatten().tolist()} must be above 0")

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of ``y`` (B, C, H, W) in [0, 1].

        Raises:
            UserError: if images or logits have another shape than was said, or sigma is needed.
        """
        if self.in_channels is not None and y.shape[1] != self.in_channels:
            raise UserError(
                f"this model takes images of {self.in_channels} channel(s), not {y.shape[1]}"
            )
        rest: list[Any] = []
        if self.noise_conditional:
            if sigma is None:
                raise UserError("this model takes the noise level as an input: give sigma")
            rest = [torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))]
        logits: Tensor = self.network((y - self.mean.to(y)) / self.std.to(y), *rest)
        if logits.shape != (len(y), self.num_classes):
            raise UserError(
                f"the network gives {tuple(logits.shape)} for {len(y)} images, not logits "
                f"{(len(y), self.num_classes)}"
            )
        return Energies(logits, logits.logsumexp(1))

    def warn_if_rough(self) -> None:
        """Nothing: it was never meant to denoise."""


# --- by name -------------------------------------------------------------------------------------


class GuideSettings(BaseModel):
    """Settings of guides that have none."""

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
    gamma: float = Field(0.01, ge=0, description="l2 length of an ascent step, image units")
    inner: Inner = Field("energy", description=_INNER)


class AccumulatedSettings(PGDSettings):
    """Settings of ``accumulated``."""

    n: int = Field(
        5,
        ge=1,
        description="number of accumulated gradients; 1 is the inner guide (RCG gives no number)",
    )
    inner: Inner = Field("classifier", description=_INNER)


class Guide(NamedTuple):
    """A guidance method that has a name.

    ``make`` takes the guiding model, labels, settings and mean energies (C,) or None to the guide;
    it is None where there is no guide.
    """

    description: str
    settings: type[GuideSettings]
    make: Callable[[EnergyModel, Labels, Any, Means], DensityFunction] | None


def _inner(model: EnergyModel, c: Labels, own: PGDSettings, means: Means) -> DensityFunction:
    make = GUIDES[own.inner].make
    assert make is not None
    return make(model, c, own, means)


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
        ),
        "pgd": Guide(
            "a guide's gradient after n normalised steps up it (RCG section 4.9)",
            PGDSettings,
            lambda model, c, own, means: pgd_guide(_inner(model, c, own, means), own.n, own.gamma),
        ),
        "accumulated": Guide(
            "the sum of a guide's gradients along n normalised steps up it (RCG section 4.3)",
            AccumulatedSettings,
            lambda model, c, own, means: accumulated_guide(
                _inner(model, c, own, means), own.n, own.gamma
            ),
        ),
        CLASSIFIER_FREE: Guide(
            "by the sampled model's own labels, w = scale: 0 without, 1 with (Ho & Salimans 2021)",
            GuideSettings,
            None,
        ),
    },
)
"""All guidance methods, by name."""


class ClassEnergies(BaseModel):
    """Means and standard deviations over the images of each label, (C,), in nats."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    energy: list[float] = Field(description="mean of E(x)")
    joint: list[float] = Field(description="mean of E(x, c) with the image's own label c")
    energy_std: list[float] = Field(description="standard deviation of E(x)")
    joint_std: list[float] = Field(description="standard deviation of E(x, c)")
    images: list[int] = Field(description="number of images of the label")


@torch.no_grad()
def class_energies(
    model: EnergyModel,
    images: Any,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 256,
) -> ClassEnergies:
    """Energies of each label's images, at `ebmkit.sampling.base.clean_level` (RCG figure 4.12).

    ``images`` are a data set, as of `ebmkit.data`: ``len`` and ``batches(size)``; ``progress`` is
    called with (images done, images in all).

    Raises:
        UserError: if model or images have no labels, an image's label is not the model's, one of
            the model's labels has no image, or an energy is NaN or Inf.
    """
    model = LogitEnergy.of(check_guide(model))
    device, sigma, done = device_of(model), clean_level(model), 0
    sums = torch.zeros(5, model.num_classes, dtype=torch.float64)
    for x, labels in images.batches(batch_size):
        if labels is None:
            raise UserError("mean energies of labels need images with labels, and these have none")
        c = model.check_labels(labels.to(device), x)
        energies = model.energies(x.to(device), sigma)
        free = -energies.log_density.double()
        joint = free - energies.at_label(c).double()
        columns = torch.stack([torch.ones_like(free), free, free**2, joint, joint**2])
        sums.index_add_(1, c.cpu(), columns.cpu())
        done += len(x)
        if progress is not None:
            progress(done, len(images))
    count = sums[0]
    empty = torch.nonzero(count == 0).flatten().tolist()
    if empty:
        lacking = f"labels {empty} have no image in this data set"
        raise UserError(f"{lacking}: take the one that the guide was trained on")
    if not bool(sums.isfinite().all()):
        raise UserError("an energy of the guide is NaN or Inf: its training diverged")
    free, free2, joint, joint2 = sums[1:] / count
    return ClassEnergies(
        energy=free.tolist(),
        joint=joint.tolist(),
        energy_std=(free2 - free**2).clamp_min(0).sqrt().tolist(),
        joint_std=(joint2 - joint**2).clamp_min(0).sqrt().tolist(),
        images=count.long().tolist(),
    )


def stored_energies(
    run: Path,
    dataset: str,
    fingerprint: str,
    digest: str,
    compute: Callable[[], ClassEnergies],
    sigma: float | None = None,
) -> ClassEnergies:
    """The energies stored in the guide's folder ``run``, or those that ``compute`` gives, which are
    stored then: of a ``dataset`` with a ``fingerprint``, weights with a ``digest``, at ``sigma``.

    Raises:
        UserError: if ``compute`` does, or the file cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", f"{dataset}-{fingerprint}")
    path = run / "energies" / f"{name}.json"
    facts = {"dataset": dataset, "fingerprint": fingerprint, "digest": digest, "sigma": sigma}
    try:
        stored = read_json(path)
        if facts.items() <= stored.items():
            return ClassEnergies.model_validate(stored)
    except (OSError, ValueError, AttributeError):  # none yet, or damaged
        pass
    found = compute()
    make_folder(path.parent)
    write_atomically(path, json.dumps(facts | found.model_dump(), indent=1).encode())
    return found
