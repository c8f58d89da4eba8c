r"""Guided models: a base model of images with a guide, as a model of images of a label.

The score for a label is :math:`s(y) + s\,w\,\nabla_y h_c(v(y))` (`ebmkit.guidance.score`), without
a label that of the base. A guided model is a `ebmkit.energy.ScoreModel` and works with every
sampler that works with the base.

If the base has a log-density, the guided model has the log-density
:math:`\log p(y) + s\,w\,h_c(v(y))` up to a constant, for samplers that accept or reject.

The guide ``dual`` needs the mean energies of each label's images. They are computed once and stored
in the guide's run, in ``RUN/energies/DATASET-FINGERPRINT.json`` with the fingerprint of the images
and the digest of the weights; if the weights change, they are computed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ebmkit.card import ModelCard
from ebmkit.compile import CompositeModel, device_of
from ebmkit.energy import (
    DensityModel,
    Energies,
    EnergyModel,
    Noise,
    ScoreModel,
    upcast_energies,
)
from ebmkit.errors import UserError
from ebmkit.guidance.guides import CLASSIFIER_FREE, check_guide
from ebmkit.guidance.score import (
    Guidance,
    GuidanceConfig,
    active_guidances,
    classifier_free,
    guidance_term,
    guided_denoiser,
    guided_score,
)
from ebmkit.models.heads import LogitEnergy
from ebmkit.noise import make_schedule, require_sigma
from ebmkit.pretrained import results_folder
from ebmkit.sampling.base import clean_level, label_density_of, root_mean_square
from ebmkit.storage import make_folder, write_atomically
from ebmkit.storage.reading import read_json


def guided_model(
    base: ScoreModel,
    guide: EnergyModel | None,
    config: GuidanceConfig | None = None,
    means: Sequence[float] | None = None,
) -> GuidedModel:
    """Guide ``base``; the result has a log-density if the base has one, except for view x0_hat.

    Args:
        base: model to sample.
        guide: classifier or joint model; None for classifier-free guidance.
        config: settings of guidance; the default is joint energy at scale 1.
        means: (C,) mean E over each label's training images, if the guide needs them.

    Raises:
        UserError: if base and guide differ in image size, channels or number of labels, there are
            no labels, the guide needs means and gets none, or the view does not suit it.

    >>> guided = guided_model(base, robust, make_guidance(scale=4))      # doctest: +SKIP
    >>> SAMPLERS["ddim"].build(guided, c=3)                              # doctest: +SKIP
    """
    config = config or GuidanceConfig()
    dense = isinstance(base, DensityModel) and config.view != "x0_hat"
    return (GuidedDensityModel if dense else GuidedModel)(base, guide, config, means)


class GuidedModel(CompositeModel, ScoreModel):
    """A model whose samples are guided to labels; `guided_model` creates it.

    Attributes:
        base: as in `guided_model`, as are ``guide``, ``config`` and ``means``.
        view: input of the guide.
        schedule: noise levels of a diffusion base, else None.
    """

    def __init__(
        self,
        base: ScoreModel,
        guide: EnergyModel | None,
        config: GuidanceConfig,
        means: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.guide, self.config = base, guide, config
        self.means = None if means is None else tuple(map(float, means))
        self.noise_conditional, self.is_energy_based = base.noise_conditional, base.is_energy_based
        self.schedule = base.schedule
        self._diffusion = base.schedule or make_schedule()
        self.view = self.guidance(0).view  # raises for settings that do not suit the guide
        if guide is not None:
            _check_fit(base, guide)
        elif base.num_classes == 0:
            raise UserError(
                f"{CLASSIFIER_FREE} guidance needs a model that was trained with labels, and "
                "this one was not: give a guide"
            )
        labelled = base if guide is None else guide
        self.num_classes, self.card = labelled.num_classes, _with_labels(base.card, labelled)

    def guidance(self, c: Tensor | int) -> Guidance:
        """The guidance to labels ``c``, an integer or (B,)."""
        return self.config.build(self.guide, c, self.means, self._diffusion)

    def map_submodels(self, wrap: Callable[[Any], Any]) -> GuidedModel:
        guide = None if self.guide is None else wrap(self.guide)
        return type(self)(wrap(self.base), guide, self.config, self.means)

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        if c is None:
            return self.base.score(y, sigma)
        guidance = self.guidance(c)
        if self.guide is not None:
            return guided_score(self.base.score, guidance)(y, sigma)
        conditional, unconditional = (partial(self.base.score, y, sigma, own) for own in (c, None))
        return classifier_free(conditional, unconditional, guidance.weight(sigma))()

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """The guided estimate of the clean image, shape of y; without ``c`` the base's."""
        if c is None:
            return self.base.denoise(y, sigma)
        y, sigma, labels = self.inputs(y, sigma, c)
        assert labels is not None
        guidance = self.guidance(labels)
        if self.guide is not None:
            return guided_denoiser(self.base.denoise, guidance)(y, sigma)
        plain = self.base.denoise(y) if sigma is None else None
        mixed: Callable[[], Tensor] = classifier_free(
            lambda: self.base.denoise(y, sigma, labels),
            lambda: self.base.denoise(y, sigma) if plain is None else plain,
            guidance.weight(sigma if plain is None else root_mean_square(plain - y)),
        )
        return mixed()

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if c is None:
            return self.base.denoise_blind(y, None, sigma_range)
        y, _, c = self.inputs(y, None, c)
        sigma = self.base.estimate_sigma(y)
        if sigma_range is not None:
            sigma = sigma.clamp(*sigma_range)
        return self.denoise(y, sigma, c), sigma

    def estimate_sigma(self, y: Tensor) -> Tensor:
        return self.base.estimate_sigma(y)


class GuidedDensityModel(GuidedModel, DensityModel):
    """A `GuidedModel` with the guided log-density of a base that has one."""

    base: DensityModel

    def density_and_score(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The guided log-density (B,), up to a constant, and the guided score, shape of y."""
        y, sigma, c = self.inputs(y, sigma, c, at_zero=True)
        value, score = self.base.density_and_score(y, sigma)
        if c is None:
            return value, score
        added, gradient = self.label_density_and_score(y, c, sigma)
        return value + added, score + gradient

    def log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """The guided log-density, up to a constant, (B,), in nats; without ``c`` the base's."""
        y, sigma, c = self.inputs(y, sigma, c, at_zero=True)
        value = self.base.log_density(y, sigma)
        return value if c is None else value + self.label_density_and_score(y, c, sigma)[0]

    def label_density_and_score(
        self, y: Tensor, c: Tensor | int, sigma: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """The terms that guidance to ``c`` adds to log-density, (B,), and score, shape of y."""
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        assert labels is not None
        guidance = self.guidance(labels)
        if self.guide is None:  # guidance by the classifier of the base is classifier-free
            guidance = replace(guidance, guide=label_density_of(self.base, labels))
        active = active_guidances(guidance, sigma)
        if not active:
            return y.new_zeros(len(y)), torch.zeros_like(y)
        return guidance_term(active, y, sigma)

    def unguided_energies(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """The base's log-density and the guide's logits of ``y`` (B, C, H, W), without guidance."""
        if self.guide is None and isinstance(self.base, GuidedDensityModel):
            return self.base.unguided_energies(y, sigma)
        if self.guide is None:
            assert isinstance(self.base, EnergyModel)
            return upcast_energies(self.base.energies(y, sigma))
        logits = self.guide.energies(y, sigma).logits
        return upcast_energies(Energies(logits, self.base.log_density(y, sigma)))


def _with_labels(card: ModelCard | None, labelled: ScoreModel) -> ModelCard | None:
    """The base's card with the class names of ``labelled``."""
    if card is None:
        return None
    names = labelled.card.class_names if labelled.card else card.class_names
    names = names if len(names) == labelled.num_classes else []
    return card.model_copy(update={"class_names": names, "classifies": True})


def _check_fit(base: ScoreModel, guide: EnergyModel) -> None:
    def of(model: ScoreModel) -> dict[str, str | int | None]:
        card = model.card
        size = "{}x{}".format(*card.image_size) if card and card.image_size else None
        channels = card.channels if card else model.in_channels
        names = card.class_names if card and model is base else []
        labels = model.num_classes or len(names) or None
        return {"images of size": size, "channels": channels, "labels": labels}

    theirs = of(guide)
    for what, a in of(base).items():
        b = theirs[what]
        if a is not None and b is not None and a != b:
            raise UserError(
                f"the sampled model has {what} {a} and the guide {b}: use two that were trained "
                "on the same kind of images"
            )


class LogitModel(EnergyModel):
    """Wrap a network that returns logits as an energy model: E(x, c) = -logits[c].

    Inputs are images in [0, 1]. The model maps them to the network's range, [-1, 1] or normalised
    by mean and standard deviation per channel, so gradients are per image unit.

    Args:
        network: maps images (B, C, H, W) to logits (B, num_classes); with ``noise_conditional`` it
            is called as network(images, sigma), sigma (B,) in image units.
        num_classes: number of labels.
        mean: value subtracted from images in [0, 1]; a number, or one per channel.
        std: divisor after that; a number, or one per channel.
        signed: whether the network takes images in [-1, 1]; excludes mean and std.
        in_channels: image channels; None: not checked.
        noise_conditional: whether the network needs the noise level.

    Raises:
        UserError: if ``signed`` is combined with mean or std, or a value is invalid.

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
            raise UserError(f"num_classes is {num_classes}: it must be 1 or more")
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
            UserError: if images or logits have the wrong shape, or a required sigma is missing.
        """
        if self.in_channels is not None and y.shape[1] != self.in_channels:
            raise UserError(
                f"this model takes images of {self.in_channels} channel(s), not {y.shape[1]}"
            )
        rest: list[Any] = []
        if self.noise_conditional:
            sigma = require_sigma(sigma)
            rest = [torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))]
        logits: Tensor = self.network((y - self.mean.to(y)) / self.std.to(y), *rest)
        if logits.shape != (len(y), self.num_classes):
            raise UserError(
                f"the network gives {tuple(logits.shape)} for {len(y)} images, not logits "
                f"{(len(y), self.num_classes)}"
            )
        return Energies(logits, logits.logsumexp(1))

    def warn_about_layers(self) -> None:
        """Do nothing: the model is not a denoiser."""


# --- mean energies ------------------------------------------------------------------------------


class ClassEnergies(BaseModel):
    """Means and standard deviations of each label's energies, (C,), in nats."""

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
    """Energies of each label's images at `ebmkit.sampling.base.clean_level` (RCG figure 4.12).

    ``images`` is a data set as in `ebmkit.data`, with ``len`` and ``batches(size)``; ``progress``
    is called with (images done, total images).

    Raises:
        UserError: if model or images have no labels, an image's label is not the model's, one
            of its labels has no image, or an energy is NaN or Inf.
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
        raise UserError(f"{lacking}: use the one that the guide was trained on")
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
    """Load mean energies from the guide's folder ``run``, or ``compute`` and store them.

    Stored energies are used if ``dataset``, ``fingerprint`` of the images, ``digest`` of the
    weights and ``sigma`` are the same.

    Raises:
        UserError: if ``compute`` raises it, or the file cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", f"{dataset}-{fingerprint}")
    path = results_folder(run) / "energies" / f"{name}.json"
    facts = {"dataset": dataset, "fingerprint": fingerprint, "digest": digest, "sigma": sigma}
    try:
        stored = read_json(path)
        if facts.items() <= stored.items():
            return ClassEnergies.model_validate(stored)
    except (OSError, ValueError, AttributeError):  # missing or damaged
        pass
    found = compute()
    make_folder(path.parent)
    write_atomically(path, json.dumps(facts | found.model_dump(), indent=1).encode())
    return found
