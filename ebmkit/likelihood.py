r"""Likelihood of images in nats and bits per dimension, and classification by it.

Three ways compute :math:`\log p_{\sigma_0}(y)`, or :math:`\log p_{\sigma_0}(y \mid c)`, the density
of images with noise of the lowest level :math:`\sigma_0` that a model knows (0 for a closed form),
at a point y with d entries. It is normalised, so the results of different models and ways compare.

**Denoising errors** (`denoising_likelihood`; pointwise I-MMSE, Kong et al., arXiv 2302.03792). For
further noise :math:`\tau\epsilon`, let :math:`\sigma^2 = \sigma_0^2 + \tau^2` and
:math:`D(y') = y' + \tau^2 s_\sigma(y')`, which is :math:`E[y \mid y']`. With
:math:`g = 1/\tau^2`,

.. math::
    -\log p(y) = \tfrac d2 \log(2\pi e)
        - \tfrac12 \int_0^\infty \Bigl[\frac{d}{1 + g} - E\|y - D(y + \tau\epsilon)\|^2\Bigr] dg .

The same holds for a Gaussian q, whose density and denoiser are known. The difference, with
:math:`y - D = -\tau(\epsilon + \tau s)` and :math:`\tfrac12 dg = -\tau^{-2} d\log\tau`, is

.. math::
    -\log p(y) = -\log q_{\sigma_0}(y) + \int_{-\infty}^{\infty}
        E\bigl[\|\epsilon + \tau s_\sigma(y')\|^2 - \|\epsilon + \tau s^q_\sigma(y')\|^2\bigr]\,
        d\log\tau .

It is exact for every *reference* q and the smaller, the closer q is to p. The integrand falls as
:math:`\tau^2` for small tau, and for large tau as :math:`\tau^{-2}`, or :math:`\tau^{-4}` if the
means of p and q are equal. Tau is drawn from a law with these tails (stratified), so neither tail
is cut, and epsilon together with :math:`-\epsilon`. The second term under the integral has a known
mean, so it is a control variate, with the coefficient that suits each tau.

*Above the highest trained level* the score is that of q: noisy images are taken to be Gaussian
there. If s is the exact score of p below, the result exceeds the true value by
:math:`\mathrm{KL}(p_\sigma \| q_\sigma)` at that level, on average over p. For a network it is an
upper bound on the negative log-likelihood of the generative diffusion that starts from q at the
highest level (Kingma et al., arXiv 2107.00630). The integrand at the highest level, extrapolated
by :math:`\tau^{-2}` from those below and divided by 2 for its slowest decay, estimates the size of
this error (``range_error``).

**Probability-flow ODE** (`flow_likelihood`; Song et al., arXiv 2011.13456). Along
:math:`dy/d\sigma = -\sigma s_\sigma(y)`, up to the highest level T,

.. math:: \log p_{\sigma_0}(y) = \log q_T(y_T)
    - \int_{\sigma_0}^T \sigma\, \mathrm{tr}\,\nabla s_\sigma(y_\sigma)\, d\sigma .

**Energy** (`energy_likelihood`): the log-density of a normalised model, one forward pass.

**Bits per dimension.** For images v of L levels :math:`l_k`, apart by :math:`\delta = 1/(L - 1)` in
image units, :math:`-\log P(v)` is bounded with a density of *dequantised* images y, on average by

.. math::
    -\log P(v) \le -\log p(y) + d\log(L - 1), \qquad y = v + \delta(u - \tfrac12),\ u \sim U[0,1)^d

(uniform), because a cell has the volume :math:`\delta^d`, or by

.. math::
    -\log P(v) \le -\log p_{\sigma_0}(y) + \sum_i \log\sum_k \mathcal N(y_i; l_k, \sigma_0^2),
    \qquad y = v + \sigma_0\epsilon

(Gaussian: variational dequantisation with independent pixels; the sum is :math:`\log q(y \mid v) -
\log P(v \mid y)`). Bits per dimension are the right-hand side divided by :math:`d\log 2`. For 8
bits, the first is :math:`-\log_2 p(y)/d + \log_2 255`, with p a density per image unit. (With
:math:`(v + u)/256` in place of v/255, as often written, p is larger by :math:`(256/255)^d`, the
constant is 8, and the sum is the same.) A network trained on v plus noise knows the second form,
one trained on dequantised images the first.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ebmkit.analytic import Gaussian
from ebmkit.energy import NORMALIZED_WAYS, EnergyModel, LogDensity, ScoreModel, per_image, vjp
from ebmkit.errors import UserError
from ebmkit.noise import format_sigma, parse_sigma
from ebmkit.randomness import image_generators, image_noise

Dequantization = Literal["gaussian", "uniform"]

Progress = Callable[[int, int], None]

LARGEST_DIMENSION = 12_288
"""Maximum number of values of an image for a covariance matrix, which then takes 1.2 GB."""

TOLERANCE = 0.02
"""Standard error of the mean over images, nats per dimension, above which a result is reported as
not converged."""

EXACT_DIMENSIONS = 16
"""Largest number of dimensions in which `flow_likelihood` computes the exact divergence."""

FAR = 1000.0
"""Highest noise level of `flow_likelihood` for a model without a trained range, in units of the
reference's largest standard deviation."""


MAX_EVALUATIONS = 5000
"""Number of evaluations after which `flow_likelihood` gives up."""


class _NoConvergence(Exception):
    """The integration of the probability-flow ODE failed."""


class Likelihood(NamedTuple):
    """Log-densities of images.

    Attributes:
        log_density: log p(y) or log p(y|c) at noise level ``sigma``, (B,) float64, nats.
        standard_error: its Monte Carlo standard error, (B,), nats; 0: no random numbers.
        sigma: noise level of the density, image units.
        evaluations: number of network evaluations per image.
        edge: what the images add to `range_error`, (B,): the integrand extrapolated to the highest
            trained level; 0 for other ways and models without a highest level.
        converged: whether `mean_error` per dimension is at most `TOLERANCE`, and the integrator
            succeeded. If the integrator did not, the log-density is NaN.
    """

    log_density: Tensor
    standard_error: Tensor
    sigma: float
    evaluations: int
    edge: Tensor
    converged: bool = True

    @property
    def range_error(self) -> float:
        """Estimated size of the mean error of the Gaussian assumption above the trained range,
        nats; 0 for other ways and models without a highest level."""
        return 0.5 * abs(float(self.edge.mean()))

    @property
    def mean_error(self) -> float:
        """Monte Carlo standard error of the mean log-density over the images, nats."""
        return float(self.standard_error.square().sum().sqrt()) / len(self.standard_error)


def trained_range(model: ScoreModel) -> tuple[float, float]:
    """Lowest and highest noise level of a model, image units; (0, inf) without card and schedule.

    Raises:
        UserError: if the model was not trained to denoise.
    """
    card, schedule = model.card, model.schedule
    if card is not None and card.sigma_range is not None:
        return card.sigma_range
    if schedule is not None:
        return schedule.sigma_range
    if card is not None and not card.denoises:
        raise UserError(
            f"this model was not trained to denoise (its objective is {card.objective!r}), so it "
            "has no likelihood: add dsm to the objective"
        )
    return 0.0, math.inf


def density_level(model: ScoreModel, sigma: float | str | None = None) -> float:
    """The noise level of a density: the lowest trained one, or ``sigma``, image units.

    Raises:
        UserError: if ``sigma`` is outside the trained range, or the model was not trained to
            denoise.
    """
    low, high = trained_range(model)
    if sigma is None:
        return low
    level = parse_sigma(sigma, allow_zero=True)
    if not low * (1 - 1e-6) <= level < high:
        raise UserError(
            f"sigma {format_sigma(level)} is outside the range that this model was trained for, "
            f"{format_sigma(low)} to {format_sigma(high)}: give a level within it, or none"
        )
    return level


def fit_gaussian(images: Tensor, spacing: float = 0.0) -> Gaussian:
    """Gaussian of the mean and covariance of ``images`` (N, ...), in float64.

    With fewer than 10 images per dimension, the covariance is that of Ledoit and Wolf (2004).

    Args:
        images: training images, image units.
        spacing: distance of their levels; the variance of uniform dequantisation is added.

    Raises:
        UserError: if an image has more than `LARGEST_DIMENSION` values.
    """
    from sklearn.covariance import empirical_covariance, ledoit_wolf

    if images[0].numel() > LARGEST_DIMENSION:
        raise UserError(
            f"images of {images[0].numel():,} values need a covariance matrix that is too large: "
            f"use images of up to {LARGEST_DIMENSION:,}, for example 64x64 in colour"
        )
    x = images.detach().double().cpu()
    flat, dim = x.flatten(1).numpy(), x[0].numel()
    covariance = empirical_covariance(flat) if len(x) >= 10 * dim else ledoit_wolf(flat)[0]
    floor = max(spacing**2 / 12, 1e-8) * torch.eye(dim, dtype=torch.float64)
    return Gaussian(x.mean(0), torch.from_numpy(covariance) + floor).eval()


def denoising_likelihood(
    model: ScoreModel,
    y: Tensor,
    c: Tensor | int | None = None,
    *,
    sigma: float | str | None = None,
    reference: Gaussian | None = None,
    draws: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Likelihood:
    """log p(y) or log p(y|c) from denoising errors (pointwise I-MMSE), for every `ScoreModel`.

    Args:
        model: blind or noise-conditional model, or plain denoiser, in evaluation mode.
        y: images (B, ...) at noise level ``sigma``, image units.
        c: labels (B,), or one for all.
        sigma: noise level of the density; None: the lowest trained one.
        reference: density q near that of the clean images, such as `fit_gaussian` of the training
            images; None: of mean 1/2 and variance 1/12, as uniform pixels have. It determines the
            standard error and, above the trained range, the result.
        draws: number of noisy copies of each image, a multiple of 4.
        seed: random seed; the numbers also depend on the image, and not on its batch or label.
        progress: called with (evaluations done, all).

    Warns if the standard error is too large (`Likelihood.converged`).

    Raises:
        UserError: if sigma is outside the trained range, a label is out of range, or ``draws`` is
            not legal.
    """
    y, _, labels = model.inputs(y, None, c)
    twice = None if labels is None else labels.repeat(2)
    found = _denoising_errors(
        lambda noisy, level: [model.score(noisy, level, twice)],
        *(model, y, density_level(model, sigma), reference, draws, seed, progress),
    )
    values = found.values[..., 0]
    result = Likelihood(
        found.base - values.mean(0),
        _stratified_error(values),
        found.sigma,
        draws,
        found.edge,
    )
    return _checked(result, y[0].numel(), "more draws, or a reference fitted to training images")


def flow_likelihood(
    model: ScoreModel,
    y: Tensor,
    c: Tensor | int | None = None,
    *,
    sigma: float | str | None = None,
    reference: Gaussian | None = None,
    probes: int | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Likelihood:
    """log p(y) or log p(y|c) by the probability-flow ODE, for noise-conditional models.

    Integrated by `scipy.integrate.solve_ivp` (Dormand-Prince, order 5) over t with sigma =
    a sinh(t). Its error, which ``standard_error`` excludes, is up to about 25 times ``tolerance``
    nats per dimension (measured on mixtures).

    Args:
        model, y, c, sigma: as in `denoising_likelihood`.
        reference: density of the clean images at the highest trained level, as there.
        probes: number of Rademacher vectors of Hutchinson's estimator of the divergence (at least
            2, for the standard error); 0: exact, d products per step; None: exact if d is at most
            `EXACT_DIMENSIONS`, or else 4.
        tolerance: relative and absolute tolerance of the integrator.
        seed: random seed of the probes.

    Raises:
        UserError: if the model is blind, sigma is outside the trained range, a label is out of
            range, or ``probes`` is not legal.
    """
    from scipy.integrate import solve_ivp

    if not model.noise_conditional:
        raise UserError(
            "the probability-flow ODE needs the score of every noise level, and this model is "
            "blind: use the likelihood by denoising (ebmkit.likelihood.denoising_likelihood), or "
            "train a noise-conditional model"
        )
    if probes is not None and (probes < 0 or probes == 1):
        raise UserError(f"probes {probes} is not legal: take 0 (exact), or 2 or more")
    y, _, labels = model.inputs(y, None, c)
    low, high, reference = density_level(model, sigma), trained_range(model)[1], _own(reference, y)
    law = _TauLaw.of(low, math.inf, reference)
    high = min(high, FAR * law.b)
    count, size, dim = len(y), y.numel(), y[0].numel()
    if probes is None:
        probes = 0 if dim <= EXACT_DIMENSIONS else 4
    if probes:
        vectors = image_noise(y, probes, f"flow {seed}").sign().transpose(0, 1)
    else:
        vectors = torch.eye(dim, dtype=y.dtype, device=y.device)[:, None]
        vectors = vectors.expand(dim, count, dim).reshape(dim, *y.shape)

    count_of = itertools.count(1)

    def slope(t: float, state: object) -> object:
        level, speed = law.a * math.sinh(t), law.a * math.cosh(t)
        at = torch.as_tensor(state)[:size].reshape(y.shape).to(y)
        levels = y.new_full((count,), level)
        score, product = vjp(lambda x: model.score(x, levels, labels), at)
        traces = torch.stack([(v * product(v)).flatten(1).sum(1) for v in vectors]).double()
        traces = traces if probes else traces.sum(0, keepdim=True)
        moves = torch.cat([score.double().flatten(), traces.flatten()])
        if not moves.isfinite().all():
            raise _NoConvergence(f"the score is NaN or Inf at sigma {format_sigma(level)}")
        if next(count_of) > MAX_EVALUATIONS:
            raise _NoConvergence(f"more than {MAX_EVALUATIONS:,} evaluations")
        return (-level * speed * moves).cpu().numpy()

    start = torch.cat([y.double().flatten().cpu(), torch.zeros(max(1, probes) * count).double()])
    times = math.asinh(low / law.a), math.asinh(high / law.a)
    how: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "t_eval": times[1:]}
    try:
        found = solve_ivp(slope, times, start.numpy(), **how)
        if not found.success:
            raise _NoConvergence(found.message)
    except _NoConvergence as reason:
        warnings.warn(f"the probability-flow ODE did not converge: {reason}", stacklevel=2)
        unknown = torch.full((count,), math.nan, dtype=torch.float64)
        return Likelihood(unknown, unknown, low, next(count_of) - 1, 0 * unknown, converged=False)
    end = torch.from_numpy(found.y[:, -1])
    last = end[:size].reshape(y.shape).to(reference.means)
    base = reference.log_density(last, high)
    changes = end[size:].reshape(-1, count).to(base)
    spread = changes.std(0) / math.sqrt(len(changes)) if probes else torch.zeros_like(base)
    zero = torch.zeros_like(base)
    result = Likelihood(base + changes.mean(0), spread, low, int(found.nfev), zero)
    return _checked(result, dim, "more probes")


def energy_likelihood(
    model: ScoreModel,
    y: Tensor,
    c: Tensor | int | None = None,
    *,
    sigma: float | str | None = None,
) -> Likelihood:
    """log p(y) or log p(y|c) of a normalised energy model, in one forward pass.

    For the arguments see `denoising_likelihood`.

    Raises:
        UserError: if the density of the model is not normalised, sigma is outside the trained
            range, or a label is out of range.
    """
    if not is_normalized(model):
        raise UserError(
            f"the log-density of this model is known up to a constant: {NORMALIZED_WAYS}"
        )
    y, _, labels = model.inputs(y, None, c)
    level = density_level(model, sigma)
    found = model.normalized_log_density(y, level, labels).double()
    zero = torch.zeros_like(found)
    return Likelihood(found, zero, level, 1, zero)


def is_normalized(model: ScoreModel) -> TypeGuard[EnergyModel]:
    """Whether the log-density of ``model`` is normalised."""
    return isinstance(model, EnergyModel) and model.normalized


class ClassLikelihoods(NamedTuple):
    """Log-densities of images given each label, by `class_likelihoods`.

    Attributes:
        log_density: log p(y|c), (B, C) float64, nats.
        gap_error: Monte Carlo standard error of the difference between the two most likely labels,
            (B,), nats. The noise is common to the labels, so this is less than the error of either.
        sigma: noise level of the density, image units.
        evaluations: number of forward passes per image.
        gradients: number of gradients per image; 0 for plain denoisers.
    """

    log_density: Tensor
    gap_error: Tensor
    sigma: float
    evaluations: int
    gradients: int

    def log_posterior(self, log_prior: Tensor | None = None) -> Tensor:
        """log p(c|y), (B, C), by Bayes' rule; the prior is uniform, or ``log_prior`` (C,)."""
        prior = 0.0 if log_prior is None else log_prior.to(self.log_density)
        return (self.log_density + prior).log_softmax(1)


def class_likelihoods(
    model: ScoreModel,
    y: Tensor,
    *,
    sigma: float | str | None = None,
    reference: Gaussian | None = None,
    draws: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> ClassLikelihoods:
    """log p(y|c) of every label from denoising errors: a generative classifier.

    This is the diffusion classifier (Li et al., arXiv 2303.16203; Clark & Jaini, arXiv 2303.15233)
    with the weights of the likelihood. All labels see the same noise. An energy model evaluates all
    labels in one forward pass and C gradients, another model in C forward passes.

    For the arguments see `denoising_likelihood`.

    Raises:
        UserError: also if the model has no labels.
    """
    if not model.num_classes:
        raise UserError("this model was trained without labels, so it has no class likelihoods")
    y, _, _ = model.inputs(y, None)
    labels = [torch.full((2 * len(y),), c, device=y.device) for c in range(model.num_classes)]

    def scores(noisy: Tensor, level: Tensor) -> Sequence[Tensor]:
        if isinstance(model, EnergyModel):
            return model.value_and_grads(noisy, level, *map(LogDensity, labels))[1]
        return [model.score(noisy, level, own) for own in labels]

    found = _denoising_errors(
        scores, model, y, density_level(model, sigma), reference, draws, seed, progress
    )
    log_density = found.base[:, None] - found.values.mean(0)
    best = log_density.topk(min(2, model.num_classes), dim=1).indices
    pair = found.values.gather(2, best.expand(len(found.values), *best.shape))
    gap_error = _stratified_error(pair[..., 0] - pair[..., -1])
    per_draw = 1 if isinstance(model, EnergyModel) else model.num_classes
    gradients = model.num_classes if model.is_energy_based else 0
    return ClassLikelihoods(
        log_density, gap_error, found.sigma, draws * per_draw, draws * gradients
    )


# --- dequantisation ------------------------------------------------------------------------------


class Dequantized(NamedTuple):
    """Dequantised images y (B, C, H, W), and what their log-density adds to a bound on log P(v).

    log P(v) >= log p(y) - ``log_volume`` (B,), nats, on average over the noise.
    """

    images: Tensor
    log_volume: Tensor

    def bits_per_dimension(self, log_density: Tensor) -> Tensor:
        """Bits per dimension, (B,), from log p(y) (B,), in nats."""
        nats = self.log_volume.to(log_density) - log_density
        return nats / (self.images[0].numel() * math.log(2))


def image_levels(x: Tensor) -> Tensor | None:
    """The levels (L,) of quantised images ``x``, image units; None if they are not of 8 bits.

    L is the smallest number of equidistant levels, rounded to 8 bits, that includes all values: 256
    for photographs, 17 for scikit-learn's digits.
    """
    pixels = x.double() * 255
    values = torch.from_numpy(np.unique(pixels.round().cpu().numpy())).to(x.device)
    if (pixels - pixels.round()).abs().max() > 1e-3 or values.min() < 0 or values.max() > 255:
        return None
    for count in range(max(2, len(values)), 257):
        levels = torch.linspace(0, 255, count, dtype=torch.float64, device=x.device).round()
        if torch.isin(values, levels).all():
            return levels / 255
    return None


def dequantize(
    x: Tensor,
    levels: Tensor,
    how: Dequantization = "uniform",
    sigma: float = 0.0,
    seed: int = 0,
) -> Dequantized:
    """Dequantise images ``x`` (B, C, H, W) with the given ``levels`` (`image_levels`).

    Args:
        x: images in [0, 1].
        levels: the levels (L,), image units.
        how: ``uniform`` noise over a cell, or ``gaussian`` noise of level ``sigma``.
        sigma: noise level of the density that is evaluated, image units; above 0 for ``gaussian``.
        seed: random seed; the noise also depends on the image, and not on its batch.

    Raises:
        UserError: if images are outside [0, 1] or not on the levels, or sigma is 0.
    """
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise UserError(
            f"images must be in [0, 1], and these have values from {low:g} to {high:g}: divide "
            "8-bit levels by 255, and dequantise clean images"
        )
    levels = levels.to(x.device, torch.float64)
    own = torch.bucketize(x.double(), (levels[1:] + levels[:-1]) / 2)
    if (levels[own] - x.double()).abs().max() > 1e-3:
        raise UserError(
            f"these images are not of {len(levels)} levels: give the levels of the images "
            "(ebmkit.likelihood.image_levels)"
        )
    count, dim = len(levels), x[0].numel()
    if how == "uniform":
        generators = image_generators(x, f"uniform dequantization {seed}")
        u = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x)
        volume = x.new_full((len(x),), dim * math.log(count - 1), dtype=torch.float64)
        return Dequantized(((own + u - 0.5) / (count - 1)).to(x), volume)
    if not sigma > 0:
        raise UserError("Gaussian dequantisation needs a sigma above 0: take uniform")
    y = x + sigma * image_noise(x, 1, f"gaussian dequantization {seed}")[:, 0]
    kernel = -0.5 * ((y.double().flatten(1)[..., None] - levels) / sigma).square()
    kernel = kernel.logsumexp(2) - 0.5 * math.log(2 * math.pi * sigma**2)
    return Dequantized(y, kernel.sum(1))


# --- integration ---------------------------------------------------------------------------------


class _TauLaw(NamedTuple):
    """Law of log tau: flat between a and b, falling as (tau/a)^2 and (b/tau)^2 outside.

    Tau is at most ``top``, which may be Inf.
    """

    a: float
    b: float
    top: float

    @classmethod
    def of(cls, sigma: float, high: float, reference: Gaussian) -> _TauLaw:
        """The law for a density at level ``sigma`` and a model trained up to ``high``.

        The density is smooth on the scale of sigma; at 0, a tenth of the reference's smallest
        standard deviation stands for that scale.
        """
        variances = reference.principal_axes[0]
        b = math.sqrt(float(variances.max()))
        a = sigma or 0.1 * math.sqrt(float(variances.min()))
        return cls(min(a, b), b, math.sqrt(high**2 - sigma**2))

    @property
    def total(self) -> float:
        """Integral of `weight` up to ``top``."""
        flat = math.log(self.b / self.a)
        if self.top < self.a:
            return 0.5 * (self.top / self.a) ** 2
        if self.top < self.b:
            return 0.5 + math.log(self.top / self.a)
        return 1.0 + flat - 0.5 * (self.b / self.top) ** 2

    def quantile(self, u: Tensor) -> Tensor:
        """Tau at which the law reaches ``u``."""
        v, flat = u.double() * self.total, math.log(self.b / self.a)
        below = self.a * (2 * v).sqrt()
        middle = self.a * (v - 0.5).clamp(0, flat).exp()
        above = self.b / (2 * (1 + flat - v)).clamp(1e-8, 1).sqrt()
        return torch.where(v < 0.5, below, torch.where(v < 0.5 + flat, middle, above))

    def weight(self, tau: Tensor) -> Tensor:
        """Density of log tau, times `total`."""
        return torch.minimum((tau / self.a).clamp(max=1), (self.b / tau).clamp(max=1)).square()


class _Errors(NamedTuple):
    values: Tensor  # (strata, B, K): their mean over the strata is the integral
    base: Tensor  # (B,): log q(y)
    sigma: float
    edge: Tensor  # (B,): mean integrand at the highest level; 0 if there is none


@torch.no_grad()
def _denoising_errors(
    scores: Callable[[Tensor, Tensor], Sequence[Tensor]],
    model: ScoreModel,
    y: Tensor,
    sigma: float,
    reference: Gaussian | None,
    draws: int,
    seed: int,
    progress: Progress | None,
) -> _Errors:
    """The integral of the module docstring for K scores of noisy images (2B, ...)."""
    if draws < 4 or draws % 4:
        raise UserError(f"draws {draws} is not legal: take a multiple of 4")
    reference, high = _own(reference, y), trained_range(model)[1]
    law, strata = _TauLaw.of(sigma, high, reference), draws // 2
    variances, axes = reference.principal_axes
    offset = (y.to(axes) - reference.means[0]).flatten(1) @ axes
    generators = image_generators(y, f"likelihood {seed}")
    squares, controls, means, taus = [], [], [], []
    for k in range(strata):
        u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        eps = torch.stack([torch.randn(y.shape[1:], generator=g) for g in generators])
        tau = law.quantile((k + u) / strata).to(y.device)
        taus.append(tau)
        noise = torch.cat([eps, -eps]).to(axes)
        both, level = tau.repeat(2), (sigma**2 + tau.square()).sqrt()
        noisy = y.to(axes).repeat(2, *[1] * (y.ndim - 1)) + per_image(both, noise) * noise
        found = scores(noisy.to(y), level.repeat(2).to(y))
        own = [noise + per_image(both, noise) * score.to(axes) for score in found]
        squares.append(_mean_square(torch.stack(own, dim=1)))
        # eps + tau s^q in the axes of q: kept eps - pull, and the mean of its square
        pull = tau[:, None] / (variances + level.square()[:, None])
        kept, pull = 1 - tau[:, None] * pull, pull * offset
        residuals = torch.cat([kept, kept]) * (noise.flatten(1) @ axes) - torch.cat([pull, pull])
        controls.append(_mean_square(residuals[:, None])[:, 0])
        means.append((kept.square() + pull.square()).sum(1))
        if progress is not None:
            progress(2 * k + 2, draws)
    square, control = torch.stack(squares), torch.stack(controls)[..., None]
    mean, tau = torch.stack(means)[..., None], torch.stack(taus)[..., None]
    # the coefficient of the control variate is estimated in the next stratum, whose noise is
    # independent: no bias, and no correlation of strata; for small tau it is 1
    share = (square.mean(2, keepdim=True) / control).clamp(0, 1)
    share = share.roll(-1, 0).where(tau > law.a, 1.0)
    values = square - share * (control - mean) - mean
    edge = torch.zeros_like(values[0, :, 0])
    if math.isfinite(high):  # the integrand falls at least as 1 / tau^2 up to the highest level
        last, top = max(2, strata // 8), math.sqrt(max(high**2 - sigma**2, 0.0))
        edge = (values[-last:] * (tau[-last:] / top).square()).mean((0, 2))
    base = reference.log_density(y.to(reference.means), sigma)
    return _Errors(values * law.total / law.weight(tau), base, sigma, edge)


def _mean_square(residuals: Tensor) -> Tensor:
    """Squared norms of ``residuals`` (2B, K, ...), averaged over eps and -eps, (B, K)."""
    squares = residuals.flatten(2).square().sum(2)
    return squares.reshape(2, -1, squares.shape[1]).mean(0)


def _stratified_error(values: Tensor) -> Tensor:
    """Standard error of the mean of ``values`` (strata, B), one per stratum, (B,).

    From pairs of neighbouring strata, which slightly overestimates it (W. Cochran, Sampling
    Techniques, 1977, section 5A.12).
    """
    pairs = values[0::2] - values[1::2]
    return pairs.square().sum(0).sqrt() / len(values)


def _own(reference: Gaussian | None, y: Tensor) -> Gaussian:
    if reference is None:
        reference = Gaussian(torch.full(y.shape[1:], 0.5, dtype=torch.float64), 1 / 12)
    return reference.to(y.device)


def _checked(result: Likelihood, dim: int, advice: str) -> Likelihood:
    """``result``, with a warning and ``converged`` False if its error is too large."""
    error = result.mean_error / dim
    if error <= TOLERANCE:
        return result
    warnings.warn(
        f"the likelihood did not converge: its standard error is {error:.3g} nats per dimension, "
        f"above {TOLERANCE:g}: take {advice}",
        stacklevel=3,
    )
    return result._replace(converged=False)
