r"""A guided model: a model of images and a guide, together a model of images of a label.

Its score of a label is that of `ebmkit.guidance.score`, :math:`s(y) + s\,w\,\nabla_y h_c(v(y))`,
and without a label that of the base alone. It is a `ebmkit.energy.ScoreModel`, so every sampler
that can drive the base drives it.

If the base has a log-density, so has the guided model, :math:`\log p(y) + s\,w\,h_c(v(y))` up to a
constant, for samplers that accept or reject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.compile import HasParts
from ebmkit.energy import Energies, EnergyModel, Noise, ScoreModel, upcast_energies
from ebmkit.errors import UserError
from ebmkit.guidance.guides import CLASSIFIER_FREE
from ebmkit.guidance.score import (
    Guidance,
    GuidanceConfig,
    classifier_free,
    guided_denoiser,
    guided_density,
    guided_score,
)
from ebmkit.noise import make_schedule
from ebmkit.sampling.base import label_density_of, per_chain, root_mean_square


def guided_model(
    base: ScoreModel,
    guide: EnergyModel | None,
    config: GuidanceConfig | None = None,
    means: Sequence[float] | None = None,
) -> GuidedModel:
    """``base`` guided by ``guide``: with a log-density if the base has one and the view allows.

    Args:
        base: what is sampled.
        guide: what knows the labels; None for classifier-free guidance, where the base does.
        config: how; joint energy at scale 1 by default.
        means: (C,) mean E of each label's training images, where the guide needs them.

    Raises:
        UserError: if base and guide differ in image size, channels or number of labels, there are
            no labels, the guide needs means and gets none, or the view does not suit it.

    >>> guided = guided_model(base, robust, make_guidance(scale=4))      # doctest: +SKIP
    >>> SAMPLERS["ddim"].build(guided, c=3)                              # doctest: +SKIP
    """
    config = config or GuidanceConfig()
    dense = isinstance(base, EnergyModel) and config.view != "x0_hat"
    return (GuidedDensityModel if dense else GuidedModel)(base, guide, config, means)


class GuidedModel(HasParts, ScoreModel):
    """A model of images whose samples are guided to labels; made by `guided_model`.

    Attributes:
        base: as of `guided_model`, like ``guide``, ``config`` and ``means``.
        view: the guide's input.
        schedule: of the diffusion model that the base is; None of other bases.
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
        self.view = self.guidance(0).view  # settings that do not suit the guide are refused
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
        """The guidance to labels ``c``, a number or (B,)."""
        return self.config.build(self.guide, c, self.means, self._diffusion)

    def with_parts(self, wrap: Callable[[Any], Any]) -> GuidedModel:
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
        """The guided estimate of the clean image, or without ``c`` the base's; shape of y."""
        if c is None:
            return self.base.denoise(y, sigma)
        labels = self.check_labels(c, y)
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
        sigma = self.base.estimate_sigma(y)
        if sigma_range is not None:
            sigma = sigma.clamp(*sigma_range)
        return self.denoise(y, sigma, c), sigma

    def estimate_sigma(self, y: Tensor) -> Tensor:
        return self.base.estimate_sigma(y)

    def check_labels(self, c: Tensor | int, y: Tensor) -> Tensor:
        try:
            return super().check_labels(c, y)
        except UserError as error:
            names = self.card.class_names if self.card else []
            if "out of range" not in str(error) or not names:
                raise
            raise UserError(f"{error} ({', '.join(names)})") from None


class GuidedDensityModel(GuidedModel, EnergyModel):
    """A `GuidedModel` whose base has a log-density; its logits are those of the guide."""

    base: EnergyModel

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """The base's log-density of ``y`` (B, C, H, W), the guide's logits of the same image.

        The guided log-density of a label is that of `density_and_score`.
        """
        base = self.base(y, sigma)
        logits = base.logits if self.guide is None else self.guide(y, sigma).logits
        return upcast_energies(Energies(logits, base.log_density))

    def density_and_score(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        value, score = self.base.density_and_score(y, sigma)
        if c is None:
            return value, score
        added, gradient = self._added(y, sigma, c)
        return value + added, score + gradient

    def log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        value = self.base.log_density(y, sigma)
        return value if c is None else value + self._added(y, sigma, c)[0]

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """What guidance to ``c`` adds to the score; shape of y."""
        return self._added(y, sigma, c)[1]

    def _added(self, y: Tensor, sigma: Noise | None, c: Tensor | int) -> tuple[Tensor, Tensor]:
        """What guidance to ``c`` adds to log-density (B,) and score."""
        labels = self.check_labels(c, y)
        guidance = self.guidance(labels)
        if self.guide is not None:
            zero = y.new_zeros(len(y)), torch.zeros_like(y)
            return guided_density(lambda y, sigma=None: zero, guidance)(y, sigma)
        weight = guidance.weight(sigma)
        value, gradient = label_density_of(self.base, labels)(y, sigma)
        return weight * value, per_chain(weight, y) * gradient


def _with_labels(card: ModelCard | None, labelled: ScoreModel) -> ModelCard | None:
    """The base's card with the labels of the model that knows them."""
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
                f"the sampled model has {what} {a} and the guide {b}: take two that were trained "
                "on the same kind of images"
            )
