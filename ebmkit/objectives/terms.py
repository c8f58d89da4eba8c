r"""The single objectives.

With :math:`y = x + \sigma\epsilon` (CDN eq. 5 and 13),

.. math::
    \text{ce:}   & \quad -\log p(c \mid y) \\
    \text{dsm:}  & \quad \|\sigma\,\nabla_y \log p(y) + \epsilon\|^2 \\
    \text{cdsm:} & \quad \|\sigma\,\nabla_y \log p(y \mid c) + \epsilon\|^2 \\
    \text{ml:}   & \quad \log p(\tilde y) - \log p(y) \\
    \text{cml:}  & \quad \log p(\tilde y \mid c) - \log p(y \mid c) .

The first is cross-entropy, the second denoising score matching (Vincent, 2011): a regression whose
minimiser at one sigma is the score of the noisy images, since
:math:`\sigma\nabla\log p + \epsilon = (D(y) - x)/\sigma`; the third is the same for the
class-conditional denoiser.

A fourth learns the same score without the noise in its formula, implicit score matching
(Hyvarinen, 2005; the thesis's eq. 2.5),

.. math::
    J(y) = \tfrac12 \|s(y)\|^2 + \operatorname{tr} \nabla s(y), \qquad
    E\,J = \tfrac12 E\|s(y) - \nabla\log p_\sigma(y)\|^2 + \text{constant}, \qquad
    \text{ism:} \quad d + 2\sigma^2 J(y) .

So scaled it equals dsm in expectation, for every score and at every sigma, because
:math:`E[\epsilon^\top s] = \sigma E[\operatorname{tr}\nabla s]` (Stein). The trace is exact up to
`EXACT_TRACE` entries, one product with the Hessian H each; beyond, it is estimated without bias
from one product, :math:`v^\top H v` with random signs v (Hutchinson; sliced score matching, Song et
al. 2019). The signs must be independent of y, which the image's own noise is not:
:math:`E[\epsilon^\top H \epsilon \mid y]` is no trace. So they are hashed from the *bits* of the
noise (`rademacher_probes`): keyed as the noise is, and each image's own however a batch is divided.

A diffusion model is trained by noise prediction at the levels of its schedule (Ho et al. 2020, eq.
14; RCG eq. 2.15),

.. math:: \text{ddpm:} \quad \|\hat\epsilon - \epsilon\|^2, \qquad
    \hat\epsilon = -\sigma\,\nabla_y \log p_\sigma(y),

averaged over entries: dsm of any model under the noise law ``diffusion``. With class dropout it is
of :math:`\log p(y \mid c)`, but for a share of images whose label is hidden, so that one network
learns both scores (Ho & Salimans, arXiv 2207.12598). Which images is hashed from their noise, too
(`label_dropout`).

The paper does not say whether :math:`\|\cdot\|^2` is the sum over the d entries of an image or
their mean; both are here by name (``dsm-sum``, ``dsm-mean``), and so is the balanced form that is
the default (``dsm``): see `ebmkit.objectives.combine`.

The last two are maximum likelihood. The gradient of :math:`-\log p(y)` by the parameters contains
that of the constant nobody computes, which is an expectation over the model itself,
:math:`-E_{\tilde y \sim p}[\nabla_\theta \log \tilde p(\tilde y)]` with the unnormalised
:math:`\tilde p`. So the loss is a difference, whose value says nothing (it should stay near 0) and
whose gradient is right if the *negatives* :math:`\tilde y` are samples of the model; whoever trains
draws them (`ebmkit.training.negatives`), an objective does not sample. JEM (arXiv 1912.03263, eq.
6-8) is ``ce+ml``, for short ``jem``. Both may carry a penalty
:math:`\alpha\,(e^2(y) + e^2(\tilde y))` of the energies (Du & Mordatch, arXiv 1903.08689, eq. 7),
which pulls them together when they run away.

Two more are cross-entropy under attack, with :math:`y'` in a ball of radius eps about y,

.. math::
    \text{adv:}    & \quad -\log p(c \mid y'), \qquad
                      y' = \arg\max_{\|y' - y\| \le \epsilon} -\log p(c \mid y') \\
    \text{trades:} & \quad -\log p(c \mid y) + \beta\, KL(p(\cdot \mid y) \,\|\, p(\cdot \mid y')),
                      \qquad y' = \arg\max KL .

The first is adversarial training (Madry et al., arXiv 1706.06083; RCG eq. 2.28-2.30), the second
TRADES (Zhang et al., arXiv 1901.08573, eq. 5). An objective does not attack, either: whoever trains
does (`ebmkit.training.attacks`), by projected gradient descent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebmkit.energy import Energies
from ebmkit.errors import UserError
from ebmkit.objectives.probes import label_dropout, rademacher_probes
from ebmkit.objectives.settings import TermSettings

__all__ = [
    "ALIASES",
    "EXACT_TRACE",
    "OBJECTIVES",
    "AttackTarget",
    "BatchLike",
    "ModelOutput",
    "Objective",
    "Scale",
    "divergence",
    "hyvarinen",
    "trace_vectors",
]

EXACT_TRACE = 16
"""Up to how many entries of an image `hyvarinen` takes the trace exactly."""


class Scale(Enum):
    """How a loss of one number per image entry is brought to the scale of one per image."""

    PLAIN = "plain"  # a loss per image as it stands
    MEAN = "mean"  # averaged over the d entries
    SUM = "sum"  # summed over the d entries
    BALANCED = "balanced"  # the logarithm of the average (see combine)


class AttackTarget(Enum):
    """What an attack on an objective's images raises."""

    LOSS = "loss"  # the loss, which is taken at the attacked images
    DIVERGENCE = "divergence"  # KL(p(clean) || p(attacked)), which is added to the loss


class BatchLike(Protocol):
    """What objectives read of a batch (`ebmkit.data.Batch` is one)."""

    @property
    def x(self) -> Tensor: ...  # clean images (B, C, H, W)
    @property
    def y(self) -> Tensor: ...  # noisy images
    @property
    def sigma(self) -> Tensor: ...  # (B,), image units
    @property
    def eps(self) -> Tensor: ...  # the noise, y = x + sigma * eps
    @property
    def labels(self) -> Tensor | None: ...  # (B,) int64
    @property
    def soft(self) -> Tensor | None: ...  # (B, C): one-hot, or mixed by MixUp / CutMix
    @property
    def negatives(self) -> Tensor | None: ...  # (B, C, H, W), samples of the model
    @property
    def attacked(self) -> Tensor | None: ...  # (B, C, H, W), y after an attack


class ModelOutput(NamedTuple):
    """What a loss reads of the model at the images of a batch.

    Attributes:
        energies: of a model that has them.
        score: of the labels that `Objective.score_labels` names; None where no score is needed.
        hessian_products: H v for each of `Objective.hessian_vectors`.
    """

    energies: Energies | None
    score: Tensor | None = None
    hessian_products: Sequence[Tensor] = ()


class Loss(Protocol):
    def __call__(self, output: ModelOutput, batch: BatchLike, /) -> Tensor: ...


class LogDensityOf(Protocol):
    """The log-density that maximum likelihood raises, (B,), of energies and labels (B,)."""

    def __call__(self, energies: Energies, labels: Tensor | None, /) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """One objective: its needs and its loss.

    Attributes:
        about: one line.
        stream: name of the data stream it draws from unless told otherwise.
        loss: from what the model says and a batch, the loss of each image (B,), unreduced over the
            batch; summed terms are *means* over the d entries, `scale` says what becomes of them.
        needs_labels: whether data and model must have labels.
        needs_hard_labels: whether labels may not be mixed.
        needs_score: whether the loss differentiates the model by its input.
        score_labels: from a batch to the labels (B,) whose score is needed, -1 for none; None: the
            score of log p(y).
        hessian_vectors: from a batch to the vectors that the Hessian is multiplied with; None
            where the loss does not differentiate twice.
        scale: how the loss enters the total.
        likelihood: the log-density whose maximum likelihood this is. Then the batch must bring
            negatives, samples of the model, and ``loss`` is of the images alone: what
            `TrainingLoss` adds is the same log-density of the negatives.
        under: from settings of single objectives to what this one is under them; None: they do not
            change it.
        attack: what an attack raises, whose images the batch must bring. Then ``loss`` is taken at
            these (`AttackTarget.LOSS`), or at y, and `TrainingLoss` adds the divergence
            (`AttackTarget.DIVERGENCE`).
    """

    description: str
    stream: str
    loss: Loss
    needs_labels: bool = False
    needs_hard_labels: bool = False
    needs_score: bool = False
    score_labels: Callable[[BatchLike], Tensor] | None = None
    hessian_vectors: Callable[[BatchLike], list[Tensor]] | None = None
    scale: Scale = Scale.PLAIN
    likelihood: LogDensityOf | None = None
    under: Callable[[TermSettings], Objective] | None = None
    attack: AttackTarget | None = None


def cross_entropy(output: ModelOutput, batch: BatchLike) -> Tensor:
    """-sum_c q_c log p(c|y) with the (soft) labels q, (B,), in nats (CDN eq. 13)."""
    assert batch.soft is not None
    assert output.energies is not None
    return -(batch.soft * output.energies.log_posterior()).sum(dim=1)


def divergence(clean: Energies, attacked: Energies) -> Tensor:
    """KL(p(c|y) || p(c|y')), (B,), in nats; differentiable in both (TRADES eq. 5)."""
    log_p, log_q = clean.log_posterior(), attacked.log_posterior()
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def denoising_score_matching(output: ModelOutput, batch: BatchLike) -> Tensor:
    """Mean over entries of (sigma * score + eps)^2, (B,); 1 for a score of zero (CDN eq. 13)."""
    score = output.score
    assert score is not None
    sigma = batch.sigma.reshape(-1, *[1] * (score.ndim - 1))
    return (sigma * score + batch.eps).square().flatten(1).mean(dim=1)


def labels_of(batch: BatchLike) -> Tensor:
    """The labels (B,), for the class-conditional score (CDN section 3.3)."""
    assert batch.labels is not None
    return batch.labels


def log_density(energies: Energies, labels: Tensor | None) -> Tensor:
    """log p(y) up to a constant, (B,), nats."""
    return energies.log_density


def class_log_density(energies: Energies, labels: Tensor | None) -> Tensor:
    """log p(y|c) up to a constant for each label, (B,), nats."""
    assert labels is not None
    return energies.log_density + energies.at_label(labels)


def _likelihood(likelihood: LogDensityOf, what: str, conditional: bool) -> Objective:
    def loss(output: ModelOutput, batch: BatchLike) -> Tensor:
        assert output.energies is not None
        return -likelihood(output.energies, batch.labels)

    return Objective(
        description=f"maximum likelihood of {what} with negatives by Langevin dynamics",
        stream="generate",
        loss=loss,
        needs_labels=conditional,
        needs_hard_labels=conditional,
        likelihood=likelihood,
    )


def implicit_score_matching(output: ModelOutput, batch: BatchLike) -> Tensor:
    """1 + 2 sigma^2 J / d, (B,): in expectation what dsm is, but below 0 at times."""
    assert output.score is not None
    J = hyvarinen(output.score, trace_vectors(batch), output.hessian_products)
    return 1 + 2 * batch.sigma**2 * J / batch.y[0].numel()


def trace_vectors(batch: BatchLike) -> list[Tensor]:
    """Vectors v, each (B, ...), so that the mean of the sum of v^T H v is the trace of H.

    The unit vectors up to `EXACT_TRACE` entries of an image; beyond, one of random signs, taken
    from the bits of the noise (`rademacher_probes`).
    """
    y, entries = batch.y, batch.y[0].numel()
    if entries > EXACT_TRACE:
        return [rademacher_probes(batch.eps).to(y)]
    units = torch.eye(entries, dtype=y.dtype, device=y.device).reshape(entries, *y.shape[1:])
    return [unit.expand(y.shape) for unit in units]


def hyvarinen(score: Tensor, vectors: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
    """J = |s|^2 / 2 + tr grad s, (B,), in squared image units to the -1 (Hyvarinen 2005; the
    thesis's eq. 2.5).

    Args:
        score: s, (B, ...).
        vectors: v, of the shape of the score (`trace_vectors`).
        products: H v for each.
    """
    trace = torch.zeros(len(score), dtype=score.dtype, device=score.device)
    for v, product in zip(vectors, products, strict=True):
        trace = trace + (v * product).flatten(1).sum(dim=1)
    return 0.5 * score.square().flatten(1).sum(dim=1) + trace


def _score_matching(conditional: bool, scale: Scale) -> Objective:
    what = "log p(y|c)" if conditional else "log p(y)"
    how = {
        Scale.BALANCED: "balanced against the other objectives",
        Scale.MEAN: "mean over the entries of an image, unweighted",
        Scale.SUM: "sum over the entries of an image, unweighted",
    }[scale]
    return Objective(
        description=f"denoising score matching of {what}; {how}",
        stream="denoise",
        loss=denoising_score_matching,
        needs_labels=conditional,
        needs_hard_labels=conditional,
        needs_score=True,
        score_labels=labels_of if conditional else None,
        scale=scale,
    )


def _noise_prediction(settings: TermSettings) -> Objective:
    """``ddpm``, of the conditional score where there is class dropout."""
    share = settings.ddpm.class_dropout
    if share is None:
        return OBJECTIVES["ddpm"]

    def some_labels(batch: BatchLike) -> Tensor:
        labels = labels_of(batch)
        return labels.masked_fill(label_dropout(batch.eps, share), -1) if share else labels

    return replace(
        OBJECTIVES["ddpm"], score_labels=some_labels, needs_labels=True, needs_hard_labels=True
    )


def _classification(settings: TermSettings) -> Objective:
    """``ce``, of smoothed labels where that is asked for."""
    share = settings.ce.label_smoothing
    if not share:
        return OBJECTIVES["ce"]

    def loss(output: ModelOutput, batch: BatchLike) -> Tensor:
        assert output.energies is not None
        log_posterior = output.energies.log_posterior()
        return (1 - share) * cross_entropy(output, batch) - share * log_posterior.mean(dim=1)

    return replace(OBJECTIVES["ce"], loss=loss)


OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(
        description="cross-entropy of the labels, -log p(c|y)",
        stream="classify",
        loss=cross_entropy,
        needs_labels=True,
        under=_classification,
    ),
    "adv": Objective(
        description="cross-entropy of images under attack (PGD), for a robust classifier",
        stream="classify",
        loss=cross_entropy,
        needs_labels=True,
        attack=AttackTarget.LOSS,
    ),
    "trades": Objective(
        description="cross-entropy plus the divergence that an attack makes (TRADES)",
        stream="classify",
        loss=cross_entropy,
        needs_labels=True,
        attack=AttackTarget.DIVERGENCE,
    ),
    "dsm": _score_matching(False, Scale.BALANCED),
    "dsm-mean": _score_matching(False, Scale.MEAN),
    "dsm-sum": _score_matching(False, Scale.SUM),
    "cdsm": _score_matching(True, Scale.BALANCED),
    "cdsm-mean": _score_matching(True, Scale.MEAN),
    "cdsm-sum": _score_matching(True, Scale.SUM),
    "ml": _likelihood(log_density, "log p(y)", False),
    "cml": _likelihood(class_log_density, "log p(y|c)", True),
    "ism": Objective(
        description="implicit score matching of log p(y), by the trace of its Hessian; unweighted",
        stream="denoise",
        loss=implicit_score_matching,
        needs_score=True,
        hessian_vectors=trace_vectors,
    ),
    "ddpm": Objective(
        description="noise prediction at the levels of a diffusion schedule; unweighted",
        stream="denoise",
        loss=denoising_score_matching,
        needs_score=True,
        scale=Scale.MEAN,
        under=_noise_prediction,
    ),
}

ALIASES: dict[str, tuple[str, ...]] = {"jem": ("ce", "ml")}
"""Names that stand for several objectives."""


def check_labels(
    name: str, objective: Objective, num_classes: int, mixes: bool = False, stream: str = ""
) -> None:
    """Whether the data of ``stream`` can serve ``objective``.

    Raises:
        UserError: if it needs labels and there are none, or mixed ones where it needs hard ones.
    """
    if objective.needs_labels and num_classes == 0:
        raise UserError(
            f"objective {name!r} needs labels, and this data set has none: use dsm, or other data"
        )
    if objective.needs_hard_labels and mixes:
        raise UserError(
            f"objective {name!r} needs one label per image, and its stream mixes images: set "
            f"streams.{stream}.augmentation.mix=none"
        )
