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
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ebmkit.card import ModelCard
from ebmkit.errors import UserError

__all__ = [
    "Denoiser",
    "Energies",
    "EnergyModel",
    "Linearization",
    "linearize",
    "sigma_of_score",
]

Noise = float | Tensor
"""A noise level in image units: a float for the whole batch, or a tensor (B,)."""


class Energies(NamedTuple):
    """What one forward pass gives; the rest is derived.

    Attributes:
        logits: (B, C), log p(c|y) up to a constant in c. C is 0 for a model without labels.
        log_density: (B,), log p(y) in nats, up to a constant in y.
    """

    logits: Tensor
    log_density: Tensor

    def log_posterior(self) -> Tensor:
        """log p(c|y), (B, C) (CDN eq. 10)."""
        return self.logits.log_softmax(dim=1)

    def log_joint(self) -> Tensor:
        """log p(y, c) up to a constant, (B, C) (CDN eq. 12)."""
        return self.log_posterior() + self.log_density[:, None]

    def at_label(self, c: Tensor) -> Tensor:
        """log p(c|y) of the labels ``c`` (B,), (B,)."""
        return self.log_posterior().gather(1, c[:, None]).squeeze(1)


class Linearization:
    """One forward pass at ``y``, whose gradients are pulled back on demand, each at most once.

    Asking for the score and the conditional score costs one forward and two backward passes.
    Everything stays differentiable in the parameters, so this is what objectives train through.
    Made by `linearize`.
    """

    def __init__(self, y: Tensor, energies: Energies, pull: _Pull) -> None:
        self.y = y
        self.energies = energies
        self._pull = pull
        self._score: Tensor | None = None

    def score(self) -> Tensor:
        """grad_y log p(y), shape of y."""
        if self._score is None:
            self._score = self._pull(
                Energies(
                    torch.zeros_like(self.energies.logits),
                    torch.ones_like(self.energies.log_density),
                )
            )
        return self._score

    def label_score(self, c: Tensor) -> Tensor:
        """grad_y log p(c|y), shape of y."""
        return self._pull(
            Energies(
                self._at_label_cotangent(c),
                torch.zeros_like(self.energies.log_density),
            )
        )

    def conditional_score(self, c: Tensor) -> Tensor:
        """grad_y log p(y|c) = grad_y log p(y, c), shape of y."""
        return self._pull(
            Energies(self._at_label_cotangent(c), torch.ones_like(self.energies.log_density))
        )

    def _at_label_cotangent(self, c: Tensor) -> Tensor:
        """Derivative of log p(c|y) by the logits: one-hot minus posterior, (B, C)."""
        posterior = self.energies.logits.softmax(dim=1)
        one_hot = nn.functional.one_hot(c, posterior.shape[1]).to(posterior.dtype)
        return one_hot - posterior


class _Pull(Protocol):
    def __call__(self, cotangent: Energies, /) -> Tensor: ...


def linearize(model: EnergyModel, y: Tensor, sigma: Noise | None = None) -> Linearization:
    """Evaluate ``model`` at ``y`` (B, C, H, W) so that scores can be pulled back.

    The gradient is taken by `torch.func.vjp`, which compilers understand. A BatchNorm in training
    mode cannot be differentiated that way (it updates its running statistics in place), so such a
    model goes through `torch.autograd.grad` with a graph; that path is for the paper's ablation
    only, and the "score" it gives mixes the images of the batch.
    """
    if torch.is_inference_mode_enabled():
        return _linearize_outside_inference(model, y, sigma)
    model._warn_if_rough()
    if model.training and model._has_batch_norm():
        leaf = y.detach().requires_grad_()
        energies = model(leaf, sigma)

        def pull_eager(cotangent: Energies) -> Tensor:
            # without labels the logits are constant
            used = [i for i, output in enumerate(energies) if output.requires_grad]
            outputs, weights = [energies[i] for i in used], [cotangent[i] for i in used]
            (gradient,) = torch.autograd.grad(outputs, leaf, weights, create_graph=True)
            return gradient

        return Linearization(y, energies, pull_eager)

    energies, pull = torch.func.vjp(lambda image: model(image, sigma), y)[:2]
    return Linearization(y, energies, lambda cotangent: pull(cotangent)[0])


def _linearize_outside_inference(
    model: EnergyModel, y: Tensor, sigma: Noise | None
) -> Linearization:
    """`linearize` under `torch.inference_mode`, where older releases differentiate to zeros.

    Tensors made in that mode can never be differentiated, so they are copied outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        level = sigma.clone() if isinstance(sigma, Tensor) else sigma
        at = linearize(model, y.clone(), level)

    def pull(cotangent: Energies) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return at._pull(Energies(*(c.clone() for c in cotangent)))

    return Linearization(at.y, at.energies, pull)


@runtime_checkable
class Denoiser(Protocol):
    """Anything that estimates clean images. An `EnergyModel` is one."""

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """Estimate x (B, C, H, W) from y = x + sigma * eps; no ``sigma``: blind."""
        ...


class EnergyModel(nn.Module, ABC):
    """A joint model of noisy images and labels; subclasses say `forward`.

    Attributes:
        num_classes: number of labels C; 0 for a density without labels.
        noise_conditional: whether `forward` uses sigma. The paper's networks are blind (False):
            they take sigma and ignore it, so that samplers can treat all models alike.
        card: what the model was trained for; None before it was.
    """

    num_classes: int = 0
    noise_conditional: bool = False
    card: ModelCard | None = None
    _warned: bool = False

    @abstractmethod
    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units."""

    if TYPE_CHECKING:  # what nn.Module does not say of calling it

        def __call__(self, y: Tensor, sigma: Noise | None = None) -> Energies: ...

    def log_density(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(y) up to a constant, (B,), in nats."""
        return self(y, sigma).log_density

    def energy(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """-log p(y) up to a constant, (B,), in nats."""
        return -self.log_density(y, sigma)

    def logits(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(c|y) up to a constant in c, (B, C)."""
        return self(y, sigma).logits

    def log_joint(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(y, c) up to a constant, (B, C), in nats."""
        return self(y, sigma).log_joint()

    def score(self, y: Tensor, c: Tensor | int | None = None, sigma: Noise | None = None) -> Tensor:
        """grad log p(y), or grad log p(y|c) if ``c`` (B,) is given; shape of y, per image unit.

        Raises:
            UserError: if a label is out of range, or the model has no labels.
        """
        at = linearize(self, y, sigma)
        return at.score() if c is None else at.conditional_score(self.check_labels(c, y))

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """grad log p(c|y), "the adversarial gradient" (CDN eq. 9); shape of y.

        Raises:
            UserError: if a label is out of range, or the model has no labels.
        """
        return linearize(self, y, sigma).label_score(self.check_labels(c, y))

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
        at = linearize(self, y, sigma)
        if sigma is None:
            sigma = sigma_of_score(at.score())
        score = at.score() if c is None else at.conditional_score(self.check_labels(c, y))
        return y + _per_image(sigma, y) ** 2 * score

    def estimate_sigma(self, y: Tensor) -> Tensor:
        """The noise level that the score of a blind model implies, sqrt(d) / ||score||, (B,).

        Raises:
            UserError: if the model is noise-conditional, for it would need the answer as an input.
        """
        if self.noise_conditional:
            raise UserError(
                "this model takes the noise level as an input and cannot estimate it: give sigma"
            )
        return sigma_of_score(self.score(y))

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

    def _has_batch_norm(self) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    def _warn_if_rough(self) -> None:
        """Warn, once, when a score is taken through layers that the paper found to break it."""
        if self._warned:
            return
        self._warned = True
        if self._has_batch_norm():
            warnings.warn(
                "a score is differentiated through BatchNorm: in training mode it mixes the images "
                "of a batch. The paper's ablation (table 3) fell to 11.9 % and 24.33 dB at 15/255",
                stacklevel=4,
            )
        if any(isinstance(m, nn.ReLU) for m in self.modules()):
            warnings.warn(
                "a score is differentiated through ReLU, whose derivative jumps. The paper's "
                "ablation (table 3) fell to 92.0 % and 29.59 dB at 15/255; GELU is smooth",
                stacklevel=4,
            )


def check_sigma(sigma: Noise | None) -> None:
    """Whether a float ``sigma`` is a noise level; tensors are not looked into.

    Raises:
        UserError: if it is not a finite number above 0.
    """
    if isinstance(sigma, (int, float)) and not 0 < sigma < math.inf:
        raise UserError(f"sigma {sigma} must be a finite number above 0, as in 25 / 255")


def _per_image(sigma: Noise, y: Tensor) -> Noise:
    """A noise level (B,) shaped to multiply images ``y``; a float stays one."""
    if isinstance(sigma, Tensor) and sigma.ndim > 0:
        return sigma.to(y).reshape(-1, *[1] * (y.ndim - 1))
    return sigma


def sigma_of_score(score: Tensor) -> Tensor:
    """sqrt(d) / ||score||, (B,); finite even at a score of 0, which then moves no image."""
    norm = torch.linalg.vector_norm(score.flatten(1), dim=1)
    sigma: Tensor = math.sqrt(score[0].numel()) / norm.clamp_min(torch.finfo(score.dtype).eps ** 2)
    return sigma
