r"""Energies of images and labels, and everything that follows from them.

A joint model of a noisy image :math:`y = x + \sigma\epsilon` and a label c is one function of y
with two outputs, the class logits and the log-density:

.. math::
    \log p(y, c) = \log p(c \mid y) + \log p(y)
                 = \operatorname{logits}_c - \operatorname{logsumexp}(\operatorname{logits})
                   + \log p(y) .

Conditioning classifies. Differentiating with respect to the image gives the *scores*

.. math::
    s(y) = \nabla_y \log p(y), \qquad s(y, c) = \nabla_y \log p(y \mid c) = \nabla_y \log p(y, c),

which denoise through the identity of Tweedie and Miyasawa (CDN eq. 6-7),

.. math::
    D_u(y) = y + \sigma^2 s(y), \qquad D_c(y, c) = y + \sigma^2 s(y, c),

and whose difference is the gradient of the classifier, :math:`\nabla_y \log p(c \mid y) =
(D_c - D_u)/\sigma^2` (eq. 9). Since :math:`\|\sigma s(y)\|^2` concentrates at the number of
dimensions d, the noise level itself can be read off: :math:`\hat\sigma = \sqrt d / \|s(y)\|`.

Signs and units: energy = -log_density in nats; score = *plus* the gradient of the log-density, per
image unit; sigma in image units; log-densities hold up to one constant that never depends on y.

CDN stands for "Classification-denoising networks" (arXiv 2410.03505) here and in all docstrings.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, Self, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ebmkit.card import ModelCard
from ebmkit.compiled import Inference, Wanted, device_of, make_inference
from ebmkit.compute import keep_freed_memory, widened
from ebmkit.errors import UserError
from ebmkit.linearization import (
    Energies,
    Estimate,
    Linearization,
    Noise,
    forward_only,
    linearize,
    per_image,
    sigma_of_score,
)
from ebmkit.onednn import subsample_before_1x1
from ebmkit.schedules import Schedule

__all__ = [
    "Denoiser",
    "Energies",
    "EnergyModel",
    "Estimate",
    "Linearization",
    "Noise",
    "ScoreModel",
    "check_sigma",
    "classifies",
    "linearize",
    "per_image",
    "sigma_of_score",
]

T = TypeVar("T")


@runtime_checkable
class Denoiser(Protocol):
    """Anything that estimates clean images. A `ScoreModel` is one."""

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """Estimate x (B, C, H, W) from y = x + sigma * eps; no ``sigma``: blind."""
        ...


class ScoreModel(nn.Module, ABC):
    """A model of noisy images that gives their score, and so denoises them; subclasses say `at`.

    An `EnergyModel` gives it as the gradient of its log-density, a plain denoiser
    (`ebmkit.models.DirectDenoiser`) as (D(y) - y) / sigma^2.

    Attributes:
        num_classes: number of labels C; 0 for a model without labels.
        noise_conditional: whether the network uses sigma. The paper's are blind (False): they take
            sigma and ignore it, so that samplers can treat all models alike.
        differentiates: whether the score is a gradient, so that training it differentiates twice.
        denoises_unaided: whether `denoise` makes no use of sigma, even where it is given.
        schedule: the noise levels that it has, where it is a diffusion model; None for others.
        card: what the model was trained for; None before it was.
        weights_sha256: SHA-256 of the file that the weights were loaded from, if they were.
        inference: how scores and the like are computed (`set_inference`).
    """

    num_classes: int = 0
    noise_conditional: bool = False
    differentiates: bool = True
    denoises_unaided: bool = False
    schedule: Schedule | None = None
    card: ModelCard | None = None
    weights_sha256: str | None = None
    inference: Inference = Inference()

    @abstractmethod
    def at(
        self,
        y: Tensor,
        sigma: Noise | None = None,
        differentiate: bool = True,
        recorded: bool = False,
    ) -> Linearization:
        """One forward pass at noisy images ``y`` (B, C, H, W), of which everything is made.

        Args:
            y: noisy images in image units.
            sigma: their noise level, a float or (B,).
            differentiate: whether scores will be asked for.
            recorded: how they are taken; see `linearize`.
        """

    def set_inference(self, precision: str = "fp32", compile: str = "off") -> Self:
        """Choose how scores, denoised images and energies are computed; returns the model.

        The choice holds where no gradient is wanted: under `torch.no_grad`, or in a frozen model,
        as `ebmkit.load` gives. `forward` and `linearize`, and so training, are not touched.
        Parameters are laid out channels last, in which values differ in their last bits.

        Args:
            precision: of products: fp32, tf32, bf16 (results are float32); auto is fp32. Whether
                an NVIDIA GPU may round float32 products to TF32 is a setting of the whole process.
            compile: on: compile what is called with the same size twice in a row
                (`ebmkit.compiled`); off; auto: on CUDA, where enough work is known to lie ahead.

        Raises:
            UserError: if a name is unknown, or the device lacks the precision or a compiler.

        >>> model = load("runs/cifar10", device="cuda")                  # doctest: +SKIP
        >>> model.set_inference("bf16", compile="on").score(y)           # doctest: +SKIP
        """
        self.inference = make_inference(self, precision, compile)
        keep_freed_memory(device_of(self))
        subsample_before_1x1(self)
        return self.to(memory_format=torch.channels_last)

    def infer(
        self,
        wanted: Wanted[T],
        y: Tensor,
        sigma: Noise | None = None,
        c: Tensor | None = None,
        differentiate: bool = True,
    ) -> T:
        """``wanted(at, sigma, c)`` of one forward pass ``at`` at ``y``, as `set_inference` says.

        What `score`, `denoise` and `logits` are made of, for whoever wants several of them at once.

        Args:
            wanted: a function without side effects, the same object at each call; when compiled it
                gets sigma as (B,).
            y: noisy images (B, C, H, W).
            sigma: a float or (B,).
            c: labels (B,), checked.
            differentiate: whether it takes scores.
        """
        return self.inference(wanted, self, differentiate, y, sigma, c)

    def score(self, y: Tensor, c: Tensor | int | None = None, sigma: Noise | None = None) -> Tensor:
        """grad log p(y), or grad log p(y|c) if ``c`` (B,) is given; shape of y, per image unit.

        Raises:
            UserError: if a label is out of range, or the model has no labels.
        """
        return self.infer(_score, y, sigma, None if c is None else self.check_labels(c, y))

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """E[x|y] by Tweedie's formula (CDN eq. 7), shape of y; not clipped.

        Args:
            y: noisy images (B, C, H, W).
            sigma: noise level in image units, a float or (B,). Without it the level is estimated
                from the score itself (`estimate_sigma`), which only a blind model can do.
            c: labels (B,) for the class-conditional denoiser.

        Raises:
            UserError: if a label is out of range, a float sigma is not above 0, or a
                noise-conditional model is not given sigma.
        """
        if sigma is None and self.noise_conditional:
            raise UserError("this model takes the noise level as an input: give sigma")
        check_sigma(sigma)
        return self.infer(_denoise, y, sigma, None if c is None else self.check_labels(c, y))

    def estimate_sigma(self, y: Tensor) -> Tensor:
        """The noise level that the score of a blind model implies, sqrt(d) / ||score||, (B,).

        Raises:
            UserError: if the model is noise-conditional, for it would need the answer as an input.
        """
        if self.noise_conditional:
            raise UserError(
                "this model takes the noise level as an input and cannot estimate it: give sigma"
            )
        return self.infer(_noise_level, y)

    def check_labels(self, c: Tensor | int, y: Tensor) -> Tensor:
        """Labels as a tensor (B,) int64 on y's device, checked.

        Raises:
            UserError: if the model has no labels, or one is outside 0 .. num_classes - 1.
        """
        if self.num_classes == 0:
            raise UserError("this model was trained without labels: leave the label out")
        labels = torch.as_tensor(c, device=y.device)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise UserError(f"labels must be whole numbers, not {labels.dtype}")
        labels = labels.long().reshape(-1).expand(len(y)) if labels.ndim == 0 else labels.long()
        if labels.shape != y.shape[:1]:
            raise UserError(f"{len(y)} images need {len(y)} labels, not {tuple(labels.shape)}")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise UserError(
                f"label {int(outside[0])} is out of range: this model knows "
                f"0 to {self.num_classes - 1}"
            )
        return labels

    @property
    def has_batch_norm(self) -> bool:
        """Whether a BatchNorm is among the modules, whose training mode mixes a batch's images."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())


class EnergyModel(ScoreModel):
    """A joint model of noisy images and labels; subclasses say `forward`."""

    _warned: bool = False

    @abstractmethod
    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units."""

    if TYPE_CHECKING:  # what nn.Module does not say of calling it

        def __call__(self, y: Tensor, sigma: Noise | None = None) -> Energies: ...

    def at(
        self,
        y: Tensor,
        sigma: Noise | None = None,
        differentiate: bool = True,
        recorded: bool = False,
    ) -> Linearization:
        if differentiate:
            return linearize(self, y, sigma, recorded)
        return forward_only(self, y, sigma)

    def energies(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """What `forward` gives, as `set_inference` says."""
        return self.infer(_energies, y, sigma, differentiate=False)

    def log_density(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(y) up to a constant, (B,), in nats."""
        return self.energies(y, sigma).log_density

    def energy(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """-log p(y) up to a constant, (B,), in nats."""
        return -self.log_density(y, sigma)

    def logits(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(c|y) up to a constant in c, (B, C)."""
        return self.energies(y, sigma).logits

    def log_joint(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(y, c) up to a constant, (B, C), in nats."""
        return self.energies(y, sigma).log_joint()

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """grad log p(c|y), "the adversarial gradient" (CDN eq. 9); shape of y.

        Raises:
            UserError: if a label is out of range, or the model has no labels.
        """
        return self.infer(_label_score, y, sigma, self.check_labels(c, y))

    def _warn_if_rough(self) -> None:
        """Warn, once, when a score is taken through layers that the paper found to break it."""
        if self._warned:
            return
        self._warned = True
        if self.has_batch_norm:
            warnings.warn(
                "a score is differentiated through BatchNorm: in training mode it mixes the images "
                "of a batch. The paper's ablation (table 3) fell to 11.9 % and 24.33 dB at 15/255",
                stacklevel=8,
            )
        if any(isinstance(m, nn.ReLU) for m in self.modules()):
            warnings.warn(
                "a score is differentiated through ReLU, whose derivative jumps. The paper's "
                "ablation (table 3) fell to 92.0 % and 29.59 dB at 15/255; GELU is smooth",
                stacklevel=8,
            )


def check_sigma(sigma: Noise | None) -> None:
    """Whether a float ``sigma`` is a noise level; tensors are not looked into.

    Raises:
        UserError: if it is not a finite number above 0.
    """
    if isinstance(sigma, (int, float)) and not 0 < sigma < math.inf:
        raise UserError(f"sigma {sigma} must be a finite number above 0, as in 25 / 255")


def classifies(model: ScoreModel) -> TypeGuard[EnergyModel]:
    """Whether ``model`` has labels and, if it says what it was trained for, was trained on them."""
    trained = model.card is None or model.card.classifies
    return isinstance(model, EnergyModel) and model.num_classes > 0 and trained


def _energies(at: Linearization, sigma: Noise | None, c: Tensor | None) -> Energies:
    return Energies(widened(at.energies.logits), widened(at.energies.log_density))


def _score(at: Linearization, sigma: Noise | None, c: Tensor | None) -> Tensor:
    return at.score() if c is None else at.conditional_score(c)


def _label_score(at: Linearization, sigma: Noise | None, c: Tensor | None) -> Tensor:
    assert c is not None
    return at.label_score(c)


def _denoise(at: Linearization, sigma: Noise | None, c: Tensor | None) -> Tensor:
    return at.denoised(sigma, c)


def _noise_level(at: Linearization, sigma: Noise | None, c: Tensor | None) -> Tensor:
    return at.noise_level()
