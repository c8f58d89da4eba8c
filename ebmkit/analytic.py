r"""Gaussian mixtures with exact densities and scores, the references of the tests.

If clean images follow a Gaussian mixture with labels,

.. math:: p(x, c) = \sum_{k:\, \ell_k = c} \pi_k\, \mathcal N(x;\, \mu_k, \Sigma_k),

then noisy images :math:`y = x + \sigma\epsilon` follow the same mixture with covariances
:math:`\Sigma_k + \sigma^2 I`. So the log-density, the class posterior, the scores and
:math:`E[x \mid y]` are exact for every sigma. `GaussianMixture.posterior_mean` computes the
denoiser by regression, without derivatives,

.. math::
    E[x \mid y, c] =
        \sum_k r_k(y)\,\bigl(\mu_k + \Sigma_k(\Sigma_k + \sigma^2 I)^{-1}(y - \mu_k)\bigr)

with the responsibilities :math:`r_k` of the components of label c. The first test of this library
checks that it equals Tweedie's :math:`y + \sigma^2 s(y, c)`.

A *blind* network does not take sigma as an input. For random sigma with distribution :math:`\pi`,
the minimiser of denoising score matching is then
:math:`E[\sigma^2 s_\sigma(y) \mid y] / E[\sigma^2 \mid y]`, with expectations over the posterior of
sigma given y (`GaussianMixture.blind_score`). It is the score of one density, the mixture
:math:`\int \pi(\sigma)\,\sigma^2 p_\sigma(y)\,d\sigma`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError


class GaussianMixture(EnergyModel):
    """Labelled Gaussian mixture on images (C, H, W) or vectors (d,), exact for every sigma.

    Log-densities are normalised: exp(log_density) integrates to 1.

    Args:
        means: component means (K, *shape), in image units.
        covariances: covariances (K, d, d), variances (K,) of isotropic components, or one variance
            for all; d is the number of entries of ``shape``.
        weights: mixing weights (K,), to be normalised; default: equal.
        labels: label of each component (K,), int64; default: k for component k.

    Raises:
        UserError: if shapes disagree, a weight is negative, a label has no component, or a
            covariance is not positive definite.
    """

    noise_conditional = True

    means: Tensor
    log_weights: Tensor
    labels: Tensor
    _variances: Tensor
    _axes: Tensor

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor | float = 1.0,
        weights: Tensor | Sequence[float] | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        count, dim = len(means), means[0].numel()
        covariances = torch.as_tensor(covariances, dtype=means.dtype)
        if covariances.ndim <= 1:
            eye = torch.eye(dim, dtype=means.dtype)
            covariances = covariances.expand(count)[:, None, None] * eye
        if covariances.shape != (count, dim, dim):
            raise UserError(
                f"{count} components in {dim} dimensions need covariances of shape "
                f"{(count, dim, dim)}, not {tuple(covariances.shape)}"
            )
        variances, axes = torch.linalg.eigh(covariances)
        if variances.min() <= 0:
            raise UserError(
                f"covariances must be positive definite; smallest variance {variances.min():.3g}"
            )
        pi = torch.as_tensor([1.0] * count if weights is None else weights, dtype=means.dtype)
        tags = torch.arange(count) if labels is None else torch.as_tensor(labels)
        if pi.shape != (count,) or tags.shape != (count,) or pi.min() < 0 or pi.sum() <= 0:
            raise UserError(f"{count} components need as many labels and non-negative weights")
        if sorted(set(tags.tolist())) != list(range(int(tags.max()) + 1)):
            raise UserError(
                f"labels {sorted(set(tags.tolist()))} must be 0, 1, ... without gaps: each label "
                "needs a component"
            )
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (pi / pi.sum()).log())
        self.register_buffer("labels", tags.long())
        self.register_buffer("_variances", variances)
        self.register_buffer("_axes", axes)
        self.num_classes = int(tags.max()) + 1

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Exact energies of ``y`` (B, *shape) at ``sigma``, a float or (B,); None means 0."""
        per_component = self._log_components(y, sigma)
        per_label = torch.stack(
            [
                per_component.masked_fill(self.labels != c, -torch.inf).logsumexp(1)
                for c in range(self.num_classes)
            ],
            dim=1,
        )
        return Energies(per_label, per_component.logsumexp(1))

    @property
    def normalized(self) -> bool:
        return True

    @property
    def log_prior(self) -> Tensor:
        """log p(c), (C,): the weights of the labels' components."""
        labels = [self.log_weights[self.labels == c] for c in range(self.num_classes)]
        return torch.stack([own.logsumexp(0) for own in labels])

    def posterior_mean(self, y: Tensor, sigma: Noise, c: Tensor | int | None = None) -> Tensor:
        """E[x|y] or E[x|y, c], by regression on each component; same shape as ``y``."""
        coordinates = self._coordinates(y)  # (B, K, d) of y - mean, along the axes
        shrink = self._variances / self._noisy_variances(y, sigma)
        offsets = torch.einsum("kde,bke->bkd", self._axes, shrink * coordinates)
        means = self.means.flatten(1) + offsets
        log_r = self._log_components(y, sigma)
        if c is not None:
            own = self.labels == self.check_labels(c, y)[:, None]
            log_r = log_r.masked_fill(~own, -torch.inf)
        return torch.einsum("bk,bkd->bd", log_r.softmax(1), means).reshape(y.shape)

    def blind_score(
        self,
        y: Tensor,
        sigmas: Tensor,
        weights: Tensor | None = None,
        c: Tensor | int | None = None,
    ) -> Tensor:
        """The score that denoising score matching with random sigma teaches a blind network.

        It is E[sigma^2 s_sigma(y) | y] / E[sigma^2 | y], the minimiser of E||sigma s(y) + eps||^2
        over functions s of y alone.

        Args:
            y: noisy images (B, *shape).
            sigmas: quadrature nodes (S,) of the distribution of sigma.
            weights: their probabilities (S,); default: equal.
            c: labels (B,) for the class-conditional score.
        """
        sigmas = sigmas.to(y)
        law = torch.ones_like(sigmas) if weights is None else weights.to(y)
        scores = torch.stack([self.score(y, float(s), c) for s in sigmas])
        evidence = torch.stack([self(y, float(s)).log_density for s in sigmas])
        if c is not None:
            labels = self.check_labels(c, y)
            evidence = evidence + torch.stack([self(y, float(s)).at_label(labels) for s in sigmas])
        posterior = (evidence + (law / law.sum()).log()[:, None]).softmax(0)  # p(sigma | y), (S, B)
        weight = posterior * sigmas[:, None] ** 2
        weight = weight / weight.sum(0)
        return torch.einsum("sb,sb...->b...", weight, scores)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``count`` clean images (count, *shape) and their labels (count,).

        ``generator`` must be on the device of the mixture.
        """
        k = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        white = torch.randn(
            count,
            self._axes.shape[1],
            dtype=self.means.dtype,
            device=self.means.device,
            generator=generator,
        )
        offsets = torch.einsum("bde,be->bd", self._axes[k], self._variances[k].sqrt() * white)
        return self.means[k] + offsets.reshape(self.means[k].shape), self.labels[k]

    def _noisy_variances(self, y: Tensor, sigma: Noise | None) -> Tensor:
        noise = torch.as_tensor(0.0 if sigma is None else sigma, dtype=y.dtype, device=y.device)
        return self._variances + noise.reshape(-1, 1, 1) ** 2  # (B or 1, K, d)

    def _coordinates(self, y: Tensor) -> Tensor:
        if y.shape[1:] != self.means.shape[1:]:
            raise UserError(
                f"this mixture has shape {tuple(self.means.shape[1:])}, not {tuple(y.shape[1:])}"
            )
        offsets = y.flatten(1)[:, None] - self.means.flatten(1)
        return torch.einsum("kde,bkd->bke", self._axes, offsets)

    def _log_components(self, y: Tensor, sigma: Noise | None) -> Tensor:
        """log pi_k N(y; mu_k, Sigma_k + sigma^2 I), (B, K)."""
        variances = self._noisy_variances(y, sigma)
        squares = self._coordinates(y).square() / variances
        log_norm = (2 * torch.pi * variances).log()
        return self.log_weights - 0.5 * (squares + log_norm).sum(-1)


class Gaussian(GaussianMixture):
    """A single Gaussian: a mixture of one component with label 0.

    Args:
        mean: mean (*shape), in image units.
        covariance: covariance (d, d), or variance of an isotropic Gaussian.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | float = 1.0) -> None:
        matrix = torch.as_tensor(covariance, dtype=mean.dtype)
        super().__init__(mean[None], matrix[None] if matrix.ndim else matrix)
