r"""A guided model: a model of images and a guide, together a model of images of a label.

Its score of a label is that of `ebmkit.guidance.combine`, :math:`s(y) + s\,w\,\nabla_y h_c(v(y))`,
and without a label that of the base alone. It is a `ebmkit.energy.ScoreModel`, so every sampler
that can drive the base drives it.

If the base has a log-density, so has the guided model, :math:`\log p(y) + s\,w\,h_c(v(y))` up to a
constant, for samplers that accept or reject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.compile import HasParts
from ebmkit.energy import Energies, EnergyModel, Noise, ScoreModel, upcast_energies
from ebmkit.errors import UserError
from ebmkit.guidance.combine import Guidance, View, guided_denoiser, guided_density, guided_score
from ebmkit.guidance.config import CLASSIFIER_FREE, GuidanceConfig
from ebmkit.guidance.free import classifier_free
from ebmkit.guidance.guides import check_guide
from ebmkit.noise import make_schedule
from ebmkit.sampling.base import per_chain, root_mean_square
from ebmkit.sampling.target import label_density_of

__all__ = ["GuidedDensityModel", "GuidedModel", "guided_model"]


def guided_model(
    base: ScoreModel,
    guide: EnergyModel | None,
    config: GuidanceConfig | None = None,
    means: Sequence[float] | None = None,
) -> GuidedModel:
    """``base`` guided by ``guide``: with a log-density if the base has one and the view allows.

    Args:
        base: what is sampled.
        guide: what knows the labels; None for classifier-free guidance.
        config: how; joint energy at scale 1 by default.
        means: (C,) mean E of each label's training images, where the guide needs them.

    Raises:
        UserError: if the two do not fit, or a setting does not.

    >>> guided = guided_model(base, robust, make_guidance(scale=4))      # doctest: +SKIP
    >>> SAMPLERS["ddim"].build(guided, c=3)                              # doctest: +SKIP
    """
    config = config or GuidanceConfig()
    dense = isinstance(base, EnergyModel) and config.view != "clean"
    return (GuidedDensityModel if dense else GuidedModel)(base, guide, config, means)


class GuidedModel(HasParts, ScoreModel):
    """A model of images whose samples are guided to labels; made by `guided_model`.

    Args:
        base: what is sampled.
        guide: what knows the labels; None for classifier-free guidance, where the base does.
        config: how.
        means: (C,) mean E of each label's training images, where the guide needs them.

    Attributes:
        base: as given.
        guide: as given.
        config: as given.
        view: what the guide sees.
        schedule: of the diffusion model that the base is; None of other bases.

    Raises:
        UserError: if base and guide differ in image size, channels or number of labels, there are
            no labels, the guide needs means and gets none, or the view does not suit it.
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
        self.view: View = "noisy"
        if config.guidance == CLASSIFIER_FREE:
            if guide is not None:
                raise UserError(f"{CLASSIFIER_FREE} guidance takes no guide: leave it out")
            if base.num_classes == 0:
                raise UserError(
                    f"{CLASSIFIER_FREE} guidance needs a model that was trained with labels, and "
                    "this one was not: give a guide"
                )
            self.num_classes, self.card = base.num_classes, _with_labels(base.card, base)
        else:
            if guide is None:
                raise UserError(f"guidance {config.guidance!r} needs a guide: give a classifier")
            check_guide(guide)
            _check_fit(base, guide)
            self.num_classes, self.card = guide.num_classes, _with_labels(base.card, guide)
            self.view = config.view or ("noisy" if guide.noise_conditional else "shrunk")
            if guide.noise_conditional and self.view == "shrunk":
                raise UserError(
                    "this guide takes the noise level and shrinks images itself: take the view "
                    "noisy"
                )
            self.guidance(0)  # settings that need more are refused

    def guidance(self, c: Tensor | int) -> Guidance:
        """The guidance to labels ``c``, a number or (B,)."""
        how, guide = self.config, self.guide
        make = how.entry.make
        assert guide is not None
        assert make is not None
        return Guidance(
            make(guide, c, how.settings, self.means),
            how.scale,
            how.schedule,
            self.view,
            how.through,
            how.late,
            self._diffusion,
        )

    def with_parts(self, wrap: Callable[[Any], Any]) -> GuidedModel:
        guide = None if self.guide is None else wrap(self.guide)
        return type(self)(wrap(self.base), guide, self.config, self.means)

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        if c is None:
            return self.base.score(y, sigma)
        if self.guide is None:
            return _mixed(
                self._mixing(sigma),
                lambda: self.base.score(y, sigma),
                lambda: self.base.score(y, sigma, c),
            )
        return guided_score(self.base.score, self.guidance(c))(y, sigma)

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """The guided estimate of the clean image, or without ``c`` the base's; shape of y.

        Raises:
            UserError: if the guide does not know a label, or the base needs sigma.
        """
        if c is None:
            return self.base.denoise(y, sigma)
        labels = self.check_labels(c, y)
        if self.guide is None:
            if sigma is None:
                plain = self.base.denoise(y)
                weight = self._mixing(root_mean_square(plain - y))
                return _mixed(weight, lambda: plain, lambda: self.base.denoise(y, None, labels))
            return _mixed(
                self._mixing(sigma),
                lambda: self.base.denoise(y, sigma),
                lambda: self.base.denoise(y, sigma, labels),
            )
        return guided_denoiser(self.base.denoise, self.guidance(labels))(y, sigma)

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

    def _mixing(self, sigma: Noise | None) -> float | Tensor:
        """w of classifier-free guidance at a noise level."""
        how = self.config
        return Guidance(_nothing, how.scale, how.schedule, late=how.late,
                        diffusion=self._diffusion).weight(sigma)  # fmt: skip


class GuidedDensityModel(GuidedModel, EnergyModel):
    """A `GuidedModel` whose base has a log-density; its logits are those of the guide."""

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """The base's log-density of ``y`` (B, C, H, W), the guide's logits of the same image.

        The guided log-density of a label is that of `density_and_score`.
        """
        knows = self.base if self.guide is None else self.guide
        assert isinstance(knows, EnergyModel)
        assert isinstance(self.base, EnergyModel)
        base = self.base(y, sigma)
        logits = base.logits if knows is self.base else knows(y, sigma).logits
        return upcast_energies(Energies(logits, base.log_density))

    def density_and_score(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.base, EnergyModel)
        value, score = self.base.density_and_score(y, sigma)
        if c is None:
            return value, score
        added, gradient = self._guidance_at(y, sigma, self.check_labels(c, y))
        return value + added, score + gradient

    def log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        assert isinstance(self.base, EnergyModel)
        value = self.base.log_density(y, sigma)
        if c is None:
            return value
        return value + self._guidance_at(y, sigma, self.check_labels(c, y))[0]

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """What guidance to ``c`` adds to the score; shape of y.

        Raises:
            UserError: if the guide does not know a label.
        """
        return self._guidance_at(y, sigma, self.check_labels(c, y))[1]

    def _guidance_at(self, y: Tensor, sigma: Noise | None, c: Tensor) -> tuple[Tensor, Tensor]:
        """What guidance to ``c`` adds to log-density (B,) and score."""
        if self.guide is not None:
            zero = y.new_zeros(len(y)), torch.zeros_like(y)
            return guided_density(lambda y, sigma=None: zero, self.guidance(c))(y, sigma)
        assert isinstance(self.base, EnergyModel)
        weight = self._mixing(sigma)
        value, gradient = label_density_of(self.base, c)(y, sigma)
        return weight * value, per_chain(weight, y) * gradient


def _mixed(
    weight: float | Tensor, plain: Callable[[], Tensor], labelled: Callable[[], Tensor]
) -> Tensor:
    """`classifier_free` at a weight that may be one for each image (B,)."""
    if not isinstance(weight, Tensor):
        return classifier_free(labelled, plain, weight)()
    base = plain()
    return base + per_chain(weight, base) * (labelled() - base)


def _nothing(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
    raise AssertionError("classifier-free guidance has no guide")


def _with_labels(card: ModelCard | None, knows: ScoreModel) -> ModelCard | None:
    """The base's card with the labels of what knows them."""
    if card is None:
        return None
    names = knows.card.class_names if knows.card else card.class_names
    names = names if len(names) == knows.num_classes else []
    return card.model_copy(update={"class_names": names, "classifies": True})


def _check_fit(base: ScoreModel, guide: EnergyModel) -> None:
    for what, of_base, of_guide in (
        ("images of size", _size(base), _size(guide)),
        ("channels", _channels(base), _channels(guide)),
        ("labels", _labels(base), guide.num_classes),
    ):
        if of_base is not None and of_guide is not None and of_base != of_guide:
            raise UserError(
                f"the sampled model has {what} {of_base} and the guide {of_guide}: take two that "
                "were trained on the same kind of images"
            )


def _size(model: ScoreModel) -> str | None:
    size = model.card.image_size if model.card else None
    return f"{size[0]}x{size[1]}" if size else None


def _channels(model: ScoreModel) -> int | None:
    if model.card is not None:
        return model.card.channels
    found: int | None = getattr(model, "in_channels", None)
    return found


def _labels(model: ScoreModel) -> int | None:
    names = model.card.class_names if model.card else []
    return model.num_classes or len(names) or None
