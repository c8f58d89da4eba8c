r"""Energies of images and labels, and quantities derived from them.

A joint model of a noisy image :math:`y = x + \sigma\epsilon` and a label c is one function of y
with two outputs, the class logits and the log-density:

.. math::
    \log p(y, c) = \log p(c \mid y) + \log p(y)
                 = \operatorname{logits}_c - \operatorname{logsumexp}(\operatorname{logits})
                   + \log p(y) .

:math:`p(c \mid y)` is the classifier. The gradients with respect to the image are the *scores*

.. math::
    s(y) = \nabla_y \log p(y), \qquad s(y, c) = \nabla_y \log p(y \mid c) = \nabla_y \log p(y, c),

which give the denoisers by the identity of Tweedie and Miyasawa (CDN eq. 6-7),

.. math::
    D_u(y) = y + \sigma^2 s(y), \qquad D_c(y, c) = y + \sigma^2 s(y, c) .

At a noise-conditional model's other input, the *time score* (arXiv 2506.05310) follows from the
derivative of the Gaussian kernel,

.. math::
    \frac{\partial}{\partial \log\sigma} \log p_\sigma(y)
        = E\bigl[\|\epsilon\|^2 - d \mid y\bigr]
        = \sigma^2 \bigl(\|s(y)\|^2 + \operatorname{tr} \nabla s(y)\bigr) .

The difference of the scores is the gradient of the classifier, :math:`\nabla_y \log p(c \mid y) =
(D_c - D_u)/\sigma^2` (eq. 9). Since :math:`\|\sigma s(y)\|^2` concentrates around the number of
dimensions d, the noise level can be estimated: :math:`\hat\sigma = \sqrt d / \|s(y)\|`.

Signs and units: energy = -log_density in nats; score = *plus* the gradient of the log-density, per
image unit; sigma in image units; log-densities are known up to a constant independent of y, unless
the model is normalised.

CDN stands for "Classification-denoising networks" (arXiv 2410.03505) here and in all docstrings.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard, TypeVar, cast, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ebmkit.blind import calibrated, reliability_warnings
from ebmkit.card import ModelCard
from ebmkit.class_gaussians import ClassGaussians
from ebmkit.compute import in_functional_transform, upcast
from ebmkit.errors import UserError
from ebmkit.hub import HubMixin
from ebmkit.inputs import class_labels, image_batch, noise_level
from ebmkit.noise import Schedule, check_trained, require_sigma

Noise = float | Tensor
"""A noise level in image units: a float for the whole batch, or a tensor (B,)."""

NORMALIZED_WAYS = (
    "train a noise-conditional model with model.preconditioned=true, the objective tsm or diffclf, "
    "and noise up to 5 standard deviations of the data, or estimate the likelihood by denoising "
    "(ebmkit.likelihood.denoising_likelihood)"
)
"""The two ways to a normalised log-density, for errors."""

V = TypeVar("V", bound=float | Tensor)
S = TypeVar("S", bound=Noise | None)


class Energies(NamedTuple):
    """Output of a forward pass; all other quantities are derived from it.

    Attributes:
        logits: log p(c|y) up to a constant in c, (B, C). C is 0 for a model without labels.
        log_density: log p(y) in nats, up to a constant in y, (B,).
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
        """log p(c|y) of the labels ``c`` (B,), shape (B,); 0 for label -1 (no label)."""
        log_posterior = self.log_posterior()
        own = log_posterior.gather(1, c.clamp_min(0)[:, None]).squeeze(1)
        return own.masked_fill(c < 0, 0.0)


# --- derivatives ---------------------------------------------------------------------------------
# All derivatives by images are computed here (tests/test_layers.py lists the exceptions).


class Target(Protocol):
    """Function of energies with one value per image, (B,); `value_and_grads` differentiates it."""

    def __call__(self, energies: Energies, /) -> Tensor: ...


class LogDensity(NamedTuple):
    """log p(y), or log p(y|c) up to a constant; its gradient is the score.

    Attributes:
        labels: labels c (B,); -1: log p(y) for that image; None: log p(y) for all images.
    """

    labels: Tensor | None = None

    def __call__(self, energies: Energies) -> Tensor:
        if self.labels is None:
            return energies.log_density
        return energies.log_density + energies.at_label(self.labels)


class LabelLogProbability(NamedTuple):
    """log p(c|y) of the labels c (B,)."""

    labels: Tensor

    def __call__(self, energies: Energies) -> Tensor:
        return energies.at_label(self.labels)


class WeightedLogProbability(NamedTuple):
    """sum_c w_c log p(c|y) with constant weights w (B, C)."""

    weights: Tensor

    def __call__(self, energies: Energies) -> Tensor:
        return (self.weights * energies.log_posterior()).sum(dim=1)


def value_and_grads(
    model: Callable[[Tensor, Noise | None], Energies],
    y: Tensor,
    sigma: Noise | None,
    *targets: Target,
    record: bool = True,
    use_autograd: bool = True,
    by_log_sigma: bool = False,
) -> tuple[Energies, list[Tensor]]:
    """Compute energies and the gradient of each target with respect to ``y``, in one forward pass.

    This function and `hessian_products` use `torch.autograd.grad`, or `torch.func.vjp` under
    compilers and `torch.func` transforms, which do not support the former; values are the same.

    Args:
        model: function from ``(y, sigma)`` to energies, for example `EnergyModel.forward`.
        y: noisy images (B, C, H, W).
        sigma: noise level of ``y``, a float or (B,).
        targets: functions from energies to (B,).
        record: whether the results can be differentiated, by parameters and by ``y``.
        use_autograd: False: always use `torch.func.vjp`; with activation checkpointing, it
            recomputes only what the gradients need. BatchNorm in training mode does not support it.
        by_log_sigma: also differentiate by log sigma, in the same pass; needs ``sigma``.

    Returns:
        Energies, and one gradient per target, of the shape of ``y``; with ``by_log_sigma`` then
        one derivative by log sigma per target, (B,), which is 0 for a blind model.
    """
    if torch.compiler.is_compiling() or not use_autograd or in_functional_transform():
        return _by_vjp(model, y, sigma, targets, by_log_sigma)
    if torch.is_inference_mode_enabled():  # tensors made in that mode can never be differentiated
        with torch.inference_mode(False), torch.no_grad():
            sigma = sigma.clone() if isinstance(sigma, Tensor) else sigma
            return value_and_grads(
                model, y.clone(), sigma, *targets, record=False, by_log_sigma=by_log_sigma
            )
    record = record and torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = y.view_as(y) if record and y.requires_grad else y.detach().requires_grad_()
        inputs = [leaf]
        if by_log_sigma:
            inputs.append(y.new_zeros(len(y)).requires_grad_())
            sigma = _shifted(sigma, inputs[1])
        energies = model(leaf, sigma)
        values = [target(energies) for target in targets]
    last = len(values) - 1
    grads = [
        torch.autograd.grad(
            value,
            inputs,
            torch.ones_like(value),
            create_graph=record,
            retain_graph=record or i < last,
            allow_unused=by_log_sigma,
            materialize_grads=by_log_sigma,
        )
        for i, value in enumerate(values)
    ]
    found = [own[k] for k in range(len(inputs)) for own in grads]
    return energies if record else Energies(*(e.detach() for e in energies)), found


def _shifted(sigma: Noise | None, t: Tensor) -> Tensor:
    """Noise levels sigma e^t (B,), whose derivative by t (B,) at 0 is that by log sigma."""
    assert sigma is not None
    return torch.as_tensor(sigma, dtype=t.dtype, device=t.device) * t.exp()


def hessian_products(
    model: Callable[[Tensor, Noise | None], Energies],
    y: Tensor,
    sigma: Noise | None,
    vectors: Sequence[Tensor],
    use_autograd: bool = True,
) -> tuple[Energies, Tensor, list[Tensor]]:
    """Compute energies, the score, and H v for each of ``vectors``, with H the Hessian of log p(y).

    For the arguments see `value_and_grads`; vectors have the shape of ``y``. Each image has its own
    H and v. H is assumed symmetric, and each output to depend on its own image only. At kinks of
    the network (ReLU), H ignores the kink. Results can be differentiated by the parameters.
    """
    if torch.compiler.is_compiling() or not use_autograd or in_functional_transform():

        def score_of(image: Tensor) -> tuple[Tensor, Energies]:
            energies, (score,) = _by_vjp(model, image, sigma, (LogDensity(),))
            return score, energies

        score, vjp, energies = torch.func.vjp(score_of, y, has_aux=True)  # type: ignore[misc]
        return energies, score, [vjp(v)[0] for v in vectors]
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        energies = model(leaf, sigma)
        ones = torch.ones_like(energies.log_density)
        (score,) = torch.autograd.grad(energies.log_density, leaf, ones, create_graph=True)
        # a score that is constant in y has no graph to y: its products are 0
        take = partial(
            torch.autograd.grad, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return energies, score, [take(score, leaf, v)[0] for v in vectors]


def vjp(
    function: Callable[[Tensor], Tensor], y: Tensor, once: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute ``function(y)``, and return it with the product v -> J^T v, J its Jacobian at ``y``.

    The results have no graph. For eager code in any grad mode, also in inference mode.

    Args:
        function: function of a tensor.
        y: its argument, for example images (B, C, H, W).
        once: whether the product is computed only once, which frees the graph.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = y.detach().clone().requires_grad_()
        value = function(leaf)

    def product(v: Tensor) -> Tensor:
        with torch.inference_mode(False):
            own = v.detach().clone().to(value)
            return torch.autograd.grad(value, leaf, own, retain_graph=not once)[0]

    return value.detach(), product


def jvp(function: Callable[[Tensor], Tensor], y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``function(y)`` and J v, with J its Jacobian at ``y``; differentiates twice."""
    with torch.inference_mode(False):
        jvp = torch.autograd.functional.jvp
        return jvp(function, y.clone(), v)  # type: ignore[no-untyped-call,no-any-return]


def _by_vjp(
    model: Callable[[Tensor, Noise | None], Energies],
    y: Tensor,
    sigma: Noise | None,
    targets: Sequence[Target],
    by_log_sigma: bool = False,
) -> tuple[Energies, list[Tensor]]:
    def values_of(image: Tensor, *t: Tensor) -> tuple[tuple[Tensor, ...], Energies]:
        energies = model(image, _shifted(sigma, t[0]) if t else sigma)
        return tuple(target(energies) for target in targets), energies

    inputs = (y, y.new_zeros(len(y))) if by_log_sigma else (y,)
    values, vjp, energies = torch.func.vjp(values_of, *inputs, has_aux=True)  # type: ignore[misc]
    grads = [
        vjp(tuple(torch.full_like(v, float(i == k)) for k, v in enumerate(values)))
        for i in range(len(targets))
    ]
    return energies, [own[k] for k in range(len(inputs)) for own in grads]


# --- models --------------------------------------------------------------------------------------


@runtime_checkable
class Denoiser(Protocol):
    """Protocol of models that estimate clean images, such as `ScoreModel`."""

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """Estimate x (B, C, H, W) from y = x + sigma * eps; blind if ``sigma`` is None."""
        ...


KINKED = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Threshold),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink),
)
"""Activations whose derivative is discontinuous."""


class ScoreModel(HubMixin, nn.Module, ABC):
    """Base class of models that compute the score of noisy images, and denoise with it.

    The score of an `EnergyModel` is the gradient of its log-density; that of a plain denoiser
    (`ebmkit.models.DirectDenoiser`) is (D(y) - y) / sigma^2. Methods take noisy images y
    (B, C, H, W), their noise level sigma (a float or (B,), in image units; optional for a blind
    model), and labels c (an integer or class name, or (B,)). They convert 8-bit tensors, NumPy
    arrays and PIL images (`ebmkit.inputs`); `forward` does not. They raise `UserError` for other
    types, for a sigma such as 25 in place of 25/255, if a label is out of range or the model has no
    labels, and if a noise-conditional model denoises or estimates the noise level without sigma.

    Denoising with an `EnergyModel` is one forward pass and one gradient of log p(y) with respect to
    y: `denoise` calls `_score`, which calls the function `value_and_grads`, which calls `forward`;
    then `tweedie` computes the image. `forward` is called directly, so forward hooks of the model
    itself do not run. A compiled wrapper (`ebmkit.compile`) adds one call, chosen at run time.

    Attributes:
        num_classes: number of labels C; 0 for a model without labels.
        noise_conditional: whether the network uses sigma. The paper's networks are blind (False):
            they accept sigma and ignore it, so that samplers can treat all models alike.
        is_energy_based: whether the score is a gradient, so that training differentiates twice.
        ignores_sigma: whether `denoise` ignores sigma.
        in_channels: number of image channels; None if unknown.
        schedule: noise levels of a diffusion model; None for other models.
        card: what the model was trained for; None before training.
        class_gaussians: Gaussian of each class's training images, to start chains from; None: not
            stored (`ebmkit.class_gaussians`).
        built_from: `ebmkit.models.ModelConfig` that built the model; None: composed by hand.
        weights_sha256: SHA-256 of the file that the weights were loaded from, if any.
    """

    num_classes: int = 0
    noise_conditional: bool = False
    is_energy_based: bool = True
    ignores_sigma: bool = False
    in_channels: int | None = None
    schedule: Schedule | None = None
    card: ModelCard | None = None
    class_gaussians: ClassGaussians | None = None
    built_from: BaseModel | None = None
    weights_sha256: str | None = None

    def __repr__(self) -> str:
        network = getattr(self, "backbone", None) or getattr(self, "network", self)
        kind = getattr(getattr(self.built_from, "backbone", None), "kind", type(network).__name__)
        facts = [f"{kind}, {sum(p.numel() for p in self.parameters()):,} parameters"]
        facts += [f"{self.in_channels} channel(s)"] if self.in_channels else []
        facts += [f"{self.num_classes} classes"] if self.num_classes else []
        if self.card is not None:
            facts.append(f"{self.card.objective} on {self.card.dataset}, {self.card.steps:,} steps")
        return f"{type(self).__name__}({', '.join(facts)})"

    @abstractmethod
    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        """`score` for checked labels (B,): -1: of log p(y) for that image; None: for all images."""

    def score(self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None) -> Tensor:
        """grad log p(y) or grad log p(y|c), per image unit; same shape as y."""
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        return self._score(y, sigma, labels)

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """E[x|y] or E[x|y, c] by Tweedie's formula (CDN eq. 7), not clipped; same shape as y.

        Without sigma, the noise level is estimated from the score (`estimate_sigma`), with a
        warning if that is unreliable (`ebmkit.blind`).

        Raises:
            UserError: also if a float sigma is not above 0.
        """
        if sigma is None:
            return self._denoise_blind_checked(y, c)
        y, level, labels = self.inputs(y, sigma, c)
        return tweedie(y, self._score(y, level, labels), level)

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """E[x|y] or E[x|y, c] at the estimated noise level, and that level, (B,).

        ``sigma_range`` limits the estimate, which is large if the score is small. Results are not
        checked; `denoise` and `ebmkit.inference.denoise_image` warn if they are unreliable.
        """
        self._check_blind()
        y, _, labels = self.inputs(y, None, c)
        score = self._score(y, None, None)
        sigma = calibrated(sigma_of_score(score), y, self.card)
        if sigma_range is not None:
            sigma = sigma.clamp(*sigma_range)
        if labels is not None:
            score = self._score(y, None, labels)
        return tweedie(y, score, sigma), sigma

    def estimate_sigma(self, y: Tensor) -> Tensor:
        """Noise level estimated from the score of a blind model, sqrt(d) / ||score||, (B,).

        It is calibrated if the card has a calibration (`ebmkit.blind`).
        """
        return self.denoise_blind(y)[1]

    def inputs(
        self, y: Tensor, sigma: S, c: Tensor | int | None = None, at_zero: bool = False
    ) -> tuple[Tensor, S, Tensor | None]:
        """Convert and check the arguments of a public method; ``at_zero``: sigma may be 0."""
        like = next(itertools.chain(self.parameters(), self.buffers()), None)
        y = image_batch(y, self.in_channels, like)
        known = self.card.sigma_range or (0.0, 1.0) if self.card and not self.schedule else None
        level = noise_level(sigma, y.shape[0], at_zero, known[1] if known else None)
        return y, cast("S", level), None if c is None else self.check_labels(c, y)

    @property
    def denoises_by_score(self) -> bool:
        """Whether `denoise` uses Tweedie's formula, and not a denoiser that ignores sigma."""
        return self.is_energy_based and not self.ignores_sigma

    def _denoise_blind_checked(self, y: Tensor, c: Tensor | int | None) -> Tensor:
        """`denoise_blind`, with a warning if the result is unreliable."""
        y, _, labels = self.inputs(y, None, c)
        clean, sigma = self.denoise_blind(y, labels)
        if not (torch.compiler.is_compiling() or in_functional_transform()):
            found = reliability_warnings(self.card, y, clean, sigma, self.denoises_by_score)
            for sentence in found:
                warnings.warn(sentence, stacklevel=3)
        return clean

    def check_labels(self, c: Tensor | int, y: Tensor) -> Tensor:
        """Check labels (an integer or class name, or (B,)); return int64 (B,) on y's device.

        Raises:
            UserError: if the model has no labels, or a label is unknown or out of range.
        """
        names = self.card.class_names if self.card else ()
        return class_labels(c, y, self.num_classes, names)

    def _check_blind(self) -> None:
        if self.noise_conditional:
            raise UserError(
                "this model takes the noise level as an input and cannot estimate it: give sigma"
            )

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model has BatchNorm, which in training mode couples a batch's images."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        return any(isinstance(m, kinds) for m in self.modules())

    @property
    def kinked_activation(self) -> str | None:
        """The first activation layer with a discontinuous derivative, such as ReLU; or None."""
        return next((type(m).__name__ for m in self.modules() if isinstance(m, KINKED)), None)


class DensityModel(ScoreModel):
    """Base class of models whose score belongs to a log-density, for samplers that need both.

    An `EnergyModel`, or one that is guided.
    """

    @abstractmethod
    def log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """log p(y) or log p(y|c), up to a constant, (B,), in nats."""

    @abstractmethod
    def density_and_score(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(y) or log p(y|c), up to a constant, (B,), in nats, and the score, shape of y."""

    @abstractmethod
    def label_density_and_score(
        self, y: Tensor, c: Tensor | int, sigma: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(c|y), (B,), in nats, and its gradient, shape of y: the differences that ``c`` makes
        to `density_and_score`, up to a constant."""

    def energy(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """-log p(y) up to a constant, (B,), in nats."""
        return -self.log_density(y, sigma)

    def label_score(self, y: Tensor, c: Tensor | int, sigma: Noise | None = None) -> Tensor:
        """grad log p(c|y), "the adversarial gradient" (CDN eq. 9); same shape as y."""
        return self.label_density_and_score(y, c, sigma)[1]


class EnergyModel(DensityModel):
    """A joint model of noisy images and labels; subclasses define `forward`."""

    _warned: bool = False

    @abstractmethod
    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units."""

    if TYPE_CHECKING:  # the type of a call, which nn.Module does not declare

        def __call__(self, y: Tensor, sigma: Noise | None = None) -> Energies: ...

    def value_and_grads(
        self, y: Tensor, sigma: Noise | None, *targets: Target
    ) -> tuple[Energies, list[Tensor]]:
        """`value_and_grads` of this model, with a graph if a parameter or input requires grad."""
        record = wants_grad(self, y, sigma)
        return value_and_grads(self.forward, y, sigma, *targets, record=record)

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        self.warn_about_layers()
        record = wants_grad(self, y, sigma)
        return value_and_grads(self.forward, y, sigma, LogDensity(c), record=record)[1][0]

    def density_and_score(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(y) or log p(y|c), up to a constant, (B,), and its gradient, in one forward pass."""
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        target = LogDensity(labels)
        energies, (score,) = self.value_and_grads(y, sigma, target)
        return target(upcast_energies(energies)), score

    @property
    def normalized(self) -> bool:
        """Whether log-densities are normalised, at every noise level."""
        return False

    @property
    def log_prior(self) -> Tensor:
        """log p(c), (C,), for `normalized_log_density`."""
        return torch.full((self.num_classes,), -math.log(max(1, self.num_classes)))

    def normalized_log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """log p(y) or log p(y|c) in nats, normalised, (B,); no sigma: at the lowest noise level.

        Raises:
            UserError: also if the model is not normalised, or was not trained for sigma.
        """
        if not self.normalized:
            raise UserError(
                f"this model's density is known up to a constant only: {NORMALIZED_WAYS}"
            )
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        if sigma is not None and self.card is not None:
            for level in torch.as_tensor(sigma).aminmax():
                check_trained(float(level), self.card.sigma_range)
        log_density = LogDensity(labels)(upcast_energies(self(y, sigma)))
        if labels is None:
            return log_density
        return log_density - self.log_prior.to(log_density)[labels]

    def time_score(self, y: Tensor, sigma: Noise, c: Tensor | int | None = None) -> Tensor:
        """d log p(y) / d log sigma or d log p(y|c) / d log sigma, nats, (B,).

        Raises:
            UserError: also if the model is blind.
        """
        if not self.noise_conditional:
            raise UserError(
                "this model is blind, so that its density has no derivative by sigma: train a "
                "noise-conditional model"
            )
        y, sigma, labels = self.inputs(y, require_sigma(sigma), c)
        if self.card is not None:
            for level in torch.as_tensor(sigma).aminmax():
                check_trained(float(level), self.card.sigma_range)
        return self._time_score(y, sigma, labels)

    def _time_score(self, y: Tensor, sigma: Noise, c: Tensor | None) -> Tensor:
        """`time_score` for checked labels."""
        record = wants_grad(self, y, sigma)
        target = LogDensity(c)
        return value_and_grads(
            self.forward, y, sigma, target, record=record, by_log_sigma=True
        )[1][1]  # fmt: skip

    def energies(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """The output of `forward`, in float32 at least."""
        y, sigma, _ = self.inputs(y, sigma, at_zero=True)
        return upcast_energies(self(y, sigma))

    def log_density(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """log p(y) or log p(y|c), up to a constant, (B,), in nats."""
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        return LogDensity(labels)(upcast_energies(self(y, sigma)))

    def logits(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(c|y) up to a constant in c, (B, C)."""
        return self.energies(y, sigma).logits

    def log_joint(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """log p(y, c) up to a constant, (B, C), in nats."""
        return self.energies(y, sigma).log_joint()

    def label_density_and_score(
        self, y: Tensor, c: Tensor | int, sigma: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        y, sigma, labels = self.inputs(y, sigma, c, at_zero=True)
        assert labels is not None
        target = LabelLogProbability(labels)
        energies, (gradient,) = self.value_and_grads(y, sigma, target)
        return target(upcast_energies(energies)), gradient

    def warn_about_layers(self) -> None:
        """Warn once of BatchNorm and kinked activations, which impair a score (CDN table 3)."""
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        rough = "a score is differentiated through {}. The paper's ablation{} (table 3) fell to {}"
        if self.has_batch_norm:
            why = "BatchNorm: in training mode it mixes the images of a batch"
            warnings.warn(rough.format(why, "", "11.9 % and 24.33 dB at 15/255"), stacklevel=4)
        kinked = [m for m in self.modules() if isinstance(m, KINKED)]
        kinked = [m for m in kinked if not isinstance(m, nn.LeakyReLU)]  # JEM's published networks
        if kinked:
            why = f"{type(kinked[0]).__name__}, whose derivative is discontinuous"
            figures = "92.0 % and 29.59 dB at 15/255; GELU is smooth"
            warnings.warn(rough.format(why, " with ReLU", figures), stacklevel=4)


def wants_grad(model: nn.Module, y: Tensor, sigma: Noise | None) -> bool:
    """Whether results of ``model`` at ``y`` need a gradient."""
    if torch.compiler.is_compiling() or in_functional_transform():
        return True
    if not torch.is_grad_enabled():
        return False
    inputs = [y, sigma] if isinstance(sigma, Tensor) else [y]
    return any(t.requires_grad for t in (*inputs, *model.parameters()))


# --- formulas ------------------------------------------------------------------------------------


def tweedie(y: Tensor, score: Tensor, sigma: Noise) -> Tensor:
    """E[x|y] = y + sigma^2 score (CDN eq. 6-7), for images and scores (B, ...)."""
    return y + per_image(sigma, y) ** 2 * score


def sigma_of_score(score: Tensor) -> Tensor:
    """sqrt(d) / ||score||, (B,); finite even for a score of 0, with which nothing is denoised."""
    norm = torch.linalg.vector_norm(score.flatten(1), dim=1)
    sigma: Tensor = math.sqrt(score[0].numel()) / norm.clamp_min(torch.finfo(score.dtype).eps ** 2)
    return sigma


def per_image(value: V, y: Tensor) -> V:
    """Reshape a value per image or chain (B,) to broadcast with ``y`` (B, ...); keep a number.

    Floating-point values get the dtype and device of ``y``.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    own = value.to(y) if value.is_floating_point() else value
    return own.reshape(-1, *[1] * (y.ndim - 1))  # type: ignore[return-value]


def upcast_energies(energies: Energies) -> Energies:
    """Convert ``energies`` to float32 at least."""
    return Energies(upcast(energies.logits), upcast(energies.log_density))


def classifies(model: ScoreModel) -> TypeGuard[EnergyModel]:
    """Whether ``model`` has labels and, if it has a card, was trained on them."""
    trained = model.card is None or model.card.classifies
    return isinstance(model, EnergyModel) and model.num_classes > 0 and trained
