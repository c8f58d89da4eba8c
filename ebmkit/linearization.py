r"""One forward pass, and the gradients that are pulled back through it.

With the two outputs of a model at y, logits and log-density, and a cotangent v of both, a pull-back
is :math:`J(y)^\top v`:

===================================================== ========================================
v of (logits, log-density)                            gives
===================================================== ========================================
(0, 1)                                                the score :math:`\nabla\log p(y)`
(one-hot(c) - posterior, 0)                           :math:`\nabla\log p(c \mid y)`
(one-hot(c) - posterior, 1)                           :math:`\nabla\log p(y \mid c)`
(w - sum(w) posterior, 0)                             :math:`\nabla\sum_c w_c \log p(c \mid y)`
===================================================== ========================================

Asking for several costs one forward pass. `ebmkit.core` says what is made of them.

The score is differentiated once more along vectors v, :math:`H(y)\,v` with the Hessian
:math:`H = \nabla^2 \log p(y)`, for the objective that needs its trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ebmkit.core import EnergyModel

__all__ = [
    "Energies",
    "Estimate",
    "Linearization",
    "Noise",
    "autocast_of",
    "forward_only",
    "linearize",
    "per_image",
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

    def __init__(
        self, y: Tensor, energies: Energies, pull: _Pull, curve: _Curve | None = None
    ) -> None:
        self.y = y
        self.energies = energies
        self._pull = pull
        self._curve = curve
        self._score: Tensor | None = None
        self._product: _Product | None = None

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

    def hessian_product(self, v: Tensor) -> Tensor:
        """H(y) v of the Hessian H of log p(y), for each image with its own ``v``; shape of y.

        The product is pulled back through the score, so H is taken to be symmetric and no image to
        see another. Where a network has kinks (ReLU), H is what it is beside them.
        """
        if self._product is None:
            assert self._curve is not None, "a plain denoiser has no density to differentiate twice"
            self._product = self._curve(self.score())
        return self._product(v)

    def label_score(self, c: Tensor) -> Tensor:
        """grad_y log p(c|y), shape of y."""
        return self._pull(
            Energies(
                self._at_label_cotangent(c),
                torch.zeros_like(self.energies.log_density),
            )
        )

    def posterior_score(self, weights: Tensor) -> Tensor:
        """grad_y sum_c w_c log p(c|y) with weights w (B, C) that do not move; shape of y."""
        posterior = self.energies.logits.softmax(dim=1)
        weights = weights.to(posterior)
        return self._pull(
            Energies(
                weights - weights.sum(1, keepdim=True) * posterior,
                torch.zeros_like(self.energies.log_density),
            )
        )

    def conditional_score(self, c: Tensor, hidden: Tensor | None = None) -> Tensor:
        """grad_y log p(y|c) = grad_y log p(y, c), shape of y.

        Args:
            c: labels (B,).
            hidden: (B,) bool, images whose label is left out, for which it is grad_y log p(y).
        """
        of_label = self._at_label_cotangent(c)
        if hidden is not None:
            of_label = of_label.masked_fill(hidden[:, None], 0.0)
        return self._pull(Energies(of_label, torch.ones_like(self.energies.log_density)))

    def noise_level(self) -> Tensor:
        """The noise level that the score implies, sqrt(d) / ||score||, (B,)."""
        return sigma_of_score(self.score())

    def denoised(self, sigma: Noise | None = None, c: Tensor | None = None) -> Tensor:
        """y + sigma^2 score, of the conditional score with labels ``c`` (CDN eq. 7); shape of y.

        Without ``sigma``: at the `noise_level`.
        """
        level = self.noise_level() if sigma is None else sigma
        score = self.score() if c is None else self.conditional_score(c)
        return self.y + per_image(level, self.y) ** 2 * score

    def _at_label_cotangent(self, c: Tensor) -> Tensor:
        """Derivative of log p(c|y) by the logits: one-hot minus posterior, (B, C)."""
        posterior = self.energies.logits.softmax(dim=1)
        one_hot = nn.functional.one_hot(c, posterior.shape[1]).to(posterior.dtype)
        return one_hot - posterior


class _Pull(Protocol):
    def __call__(self, cotangent: Energies, /) -> Tensor: ...


class _Product(Protocol):
    def __call__(self, v: Tensor, /) -> Tensor: ...


class _Curve(Protocol):
    """From the score at y to products with the Hessian."""

    def __call__(self, score: Tensor, /) -> _Product: ...


class Estimate(Linearization):
    r"""What a plain denoiser says at ``y``: an estimate D of the clean image, and no density.

    Its score is Tweedie's formula read backwards, :math:`s = (D - y)/\sigma^2`, and the noise level
    it implies is :math:`\hat\sigma = \|D - y\|/\sqrt d`, which stands in where sigma is not given.

    Args:
        y: noisy images (B, C, H, W).
        clean: D(y), of the same shape.
        sigma: their noise level, a float or (B,), if it is known.
    """

    def __init__(self, y: Tensor, clean: Tensor, sigma: Noise | None) -> None:
        nothing = Energies(y.new_zeros(len(y), 0), y.new_full((len(y),), math.nan))
        super().__init__(y, nothing, _no_labels)
        self.clean = clean
        self.sigma = sigma

    def score(self) -> Tensor:
        level = self.noise_level() if self.sigma is None else self.sigma
        return (self.clean - self.y) / per_image(level, self.y) ** 2

    def noise_level(self) -> Tensor:
        change = (self.clean - self.y).flatten(1)
        norm = torch.linalg.vector_norm(change, dim=1) / math.sqrt(change.shape[1])
        level: Tensor = norm.clamp_min(torch.finfo(change.dtype).eps)
        return level

    def denoised(self, sigma: Noise | None = None, c: Tensor | None = None) -> Tensor:
        return self.clean


def _no_labels(cotangent: Energies) -> Tensor:
    raise AssertionError("a plain denoiser has no labels")


def forward_only(model: EnergyModel, y: Tensor, sigma: Noise | None = None) -> Linearization:
    """The energies at ``y`` alone, for who takes no score."""
    return Linearization(y, model(y, sigma), _no_gradient)


def _no_gradient(cotangent: Energies) -> Tensor:
    raise AssertionError("what takes a score must say so: needs_score, differentiate=True")


def linearize(
    model: EnergyModel, y: Tensor, sigma: Noise | None = None, recorded: bool = False
) -> Linearization:
    """Evaluate ``model`` at ``y`` (B, C, H, W) so that scores can be pulled back.

    The gradient is taken by `torch.func.vjp`, which compilers understand. The other way,
    `torch.autograd.grad`, is for three cases. One is a BatchNorm in training mode, which vjp cannot
    differentiate as it updates its running statistics in place: the paper's ablation, whose "score"
    mixes the images of a batch. The others are an eager training step and an eager score that
    nobody differentiates, where vjp's bookkeeping of each operation is up to a quarter of a small
    network's time.

    Args:
        model: the model.
        y: noisy images.
        sigma: their noise level, a float or (B,).
        recorded: take the second way where it gives the same: gradients are enabled, and none is
            wanted by y.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and torch.is_inference_mode_enabled():
        return _linearize_outside_inference(model, y, sigma)
    if not compiling:
        model._warn_if_rough()
    transformed = torch._C._are_functorch_transforms_active()
    if not (compiling or torch.is_grad_enabled() or transformed):
        return _linearize_for_values(model, y, sigma)
    recorded = recorded and torch.is_grad_enabled() and not y.requires_grad
    if recorded or (model.training and model.has_batch_norm):
        leaf = y.detach().requires_grad_()
        energies = model(leaf, sigma)

        def pull_eager(cotangent: Energies) -> Tensor:
            # without labels the logits are constant
            used = [i for i, output in enumerate(energies) if output.requires_grad]
            outputs, weights = [energies[i] for i in used], [cotangent[i] for i in used]
            (gradient,) = torch.autograd.grad(outputs, leaf, weights, create_graph=True)
            return gradient

        def curve_eager(score: Tensor) -> _Product:
            options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
            return lambda v: torch.autograd.grad(score, leaf, v, **options)[0]

        return Linearization(y, energies, pull_eager, curve_eager)

    energies, pull = torch.func.vjp(lambda image: model(image, sigma), y)[:2]
    precision = autocast_of(y)

    def curve(score: Tensor) -> _Product:
        def of_image(image: Tensor) -> Tensor:
            log_density, pull = torch.func.vjp(lambda z: model(z, sigma).log_density, image)[:2]
            gradient: Tensor = pull(torch.ones_like(log_density))[0]
            return gradient

        with precision():
            pull_score = torch.func.vjp(of_image, y)[1]
        return lambda v: pull_score(v)[0]

    return Linearization(y, energies, lambda cotangent: pull(cotangent)[0], curve)


def autocast_of(y: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """What autocast is now, to be entered again."""
    kind = y.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def _linearize_for_values(model: EnergyModel, y: Tensor, sigma: Noise | None) -> Linearization:
    """`linearize` where gradients are disabled: nothing it gives can be differentiated again."""
    leaf = y.detach().requires_grad_()
    with torch.enable_grad():
        energies = model(leaf, sigma)

    def pull(cotangent: Energies) -> Tensor:
        used = [i for i, output in enumerate(energies) if output.requires_grad]
        outputs, weights = [energies[i] for i in used], [cotangent[i] for i in used]
        # several gradients may be pulled back, so what they need is kept as long as this is
        (gradient,) = torch.autograd.grad(outputs, leaf, weights, retain_graph=True)
        return gradient

    def curve(score: Tensor) -> _Product:
        with torch.enable_grad():
            total = energies.log_density.sum()
            (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return lambda v: torch.autograd.grad(slope, leaf, v, **options)[0]

    return Linearization(y, Energies(*(output.detach() for output in energies)), pull, curve)


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

    def curve(score: Tensor) -> _Product:
        def product(v: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return at.hessian_product(v.clone())

        return product

    return Linearization(at.y, at.energies, pull, curve)


def per_image(sigma: Noise, y: Tensor) -> Noise:
    """A noise level (B,) shaped to multiply images ``y``; a float stays one."""
    if isinstance(sigma, Tensor) and sigma.ndim > 0:
        return sigma.to(y).reshape(-1, *[1] * (y.ndim - 1))
    return sigma


def sigma_of_score(score: Tensor) -> Tensor:
    """sqrt(d) / ||score||, (B,); finite even at a score of 0, which then moves no image."""
    norm = torch.linalg.vector_norm(score.flatten(1), dim=1)
    sigma: Tensor = math.sqrt(score[0].numel()) / norm.clamp_min(torch.finfo(score.dtype).eps ** 2)
    return sigma
