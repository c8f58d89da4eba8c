r"""Sums of objectives, and how they are balanced.

The paper adds its two losses without a weight (CDN eq. 13). As a sum over the d entries of an image
the denoising loss drowns the classifier, as a mean it hardly starts. The default here is neither. A
Gaussian likelihood of the denoising residual with its variance *profiled out* is the logarithm of
the mean square,

.. math::
    L = L_{ce} + \lambda \log \bar L_{dsm}, \qquad
    \nabla L = \nabla L_{ce} + \frac{\lambda}{\bar L_{dsm}} \nabla \bar L_{dsm},

with :math:`\bar L_{dsm}` the mean over entries and images. It does not change with the number of
entries or the unit of the residual, so one :math:`\lambda` (`BALANCE`) serves every image size; at
the start it is the mean form times lambda, and as denoising gets better its weight grows.
Minimising the logarithm has the same minimiser as minimising the mean. The mean in the denominator
is a running one over the last steps (its state is part of a checkpoint), so the gradient is linear
in the batch and is the same however the batch is divided over devices.

Several balanced terms share lambda. An explicit coefficient, as in ``ce+0.5*dsm``, switches the
balancing of that term off: it is then 0.5 times the mean form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebmkit.compute import Precision, autocast, memory_format
from ebmkit.energy import (
    Energies,
    EnergyModel,
    LogDensity,
    Noise,
    ScoreModel,
    hessian_products,
    value_and_grads,
)
from ebmkit.errors import UserError
from ebmkit.objectives.settings import TermSettings, TradesConfig
from ebmkit.objectives.terms import (
    ALIASES,
    OBJECTIVES,
    AttackTarget,
    BatchLike,
    LogDensityOf,
    ModelOutput,
    Objective,
    Scale,
    divergence,
)
from ebmkit.registry import find

__all__ = ["BALANCE", "Losses", "Term", "TrainingLoss", "parse_objective"]

BALANCE = 2.0
"""lambda of the balanced form; how it was found is told in the docs ("The balance")."""

EMA_DECAY = 0.9
"""Weight of the past in the running mean of a balanced term."""

_TERM = re.compile(r"(?:(?P<weight>[^*]+)\*)?(?P<name>[^*]+)")


@dataclass(frozen=True)
class Term:
    """One summand: an objective by name, and its coefficient if one was given.

    Attributes:
        settings: of single objectives.
        objective: the entry of `OBJECTIVES`, under the settings.
    """

    name: str
    weight: float | None = None
    settings: TermSettings = field(default=TermSettings(), repr=False)
    objective: Objective = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entry = OBJECTIVES[self.name]
        own = entry if entry.under is None else entry.under(self.settings)
        object.__setattr__(self, "objective", own)

    @property
    def balanced(self) -> bool:
        """Whether the term enters as a logarithm."""
        return self.weight is None and self.objective.scale is Scale.BALANCED


def parse_objective(text: str) -> tuple[Term, ...]:
    """Read ``"ce+dsm"`` or ``"ce + 0.5*dsm"``.

    Raises:
        UserError: if it does not parse, an objective is unknown or named twice, or a coefficient is
            not a finite number above 0.

    >>> parse_objective("ce + 0.5*dsm")
    (Term(name='ce', weight=None), Term(name='dsm', weight=0.5))
    """
    terms: list[Term] = []
    for part in re.split(r"(?<!\d[eE])\+", text):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise UserError(
                f"objective {text!r} does not parse: write names joined by +, each with a "
                "coefficient before it or none, as in ce+0.5*dsm"
            )
        written = match["name"].strip()
        weight = _coefficient(match["weight"], text)
        for name in ALIASES.get(written, (written,)):
            find("objective", OBJECTIVES | ALIASES, name)  # an alias is suggested, too
            if any(term.name == name for term in terms):
                raise UserError(f"objective {text!r} names {name!r} twice: give it one coefficient")
            terms.append(Term(name, weight))
    return tuple(terms)


def _coefficient(written: str | None, text: str) -> float | None:
    if written is None:
        return None
    try:
        weight = float(written)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise UserError(
            f"coefficient {written.strip()!r} in objective {text!r} must be a number above 0"
        )
    return weight


class Losses(NamedTuple):
    """The total to differentiate, and each term's mean over the batch.

    Attributes:
        total: scalar; its gradient is that of the objective. With balanced terms its value is that
            of the linearised logarithm, so log `parts` instead.
        values: (number of terms,), detached: nats for ``ce``, the mean over entries (1 for a score
            of zero) for score matching in every form.
        names: of the terms.
    """

    total: Tensor
    values: Tensor
    names: tuple[str, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Name of the term -> its entry of ``values``, a scalar."""
        return dict(zip(self.names, self.values.unbind(), strict=True))


class TrainingLoss(nn.Module):
    """Model and objectives in one module, whose forward returns the loss.

    Scores are taken inside, so this is the module that compilers and data parallelism wrap. Terms
    of one stream share its batch and one forward pass, and each score is taken once; what is taken
    at attacked images is one more pass.

    Args:
        model: the model to train.
        terms: the summands (`parse_objective`).
        balance: lambda of the balanced terms together.
        streams: name of a term -> stream to draw from, where it is not the objective's own. Terms
            on one stream see the same batch.
        settings: of single terms.

    Attributes:
        precision: what the network computes in; scores, residuals and losses are float32 always.
        separate: whether each stream is to go backward before the next goes forward, so that no two
            are kept at once; for who calls this module, which sums over the streams it is given.
        use_autograd: whether scores are taken by `torch.autograd.grad`, not by `torch.func.vjp`;
            the same values (see `ebmkit.energy.value_and_grads`).
        differentiates: whether the loss differentiates the model by its input.
        penalty: alpha of the energy penalty of maximum likelihood; 0 for none.
        balanced: names of the balanced terms.
        running: (len(balanced),) their running means.
    """

    running: Tensor

    def __init__(
        self,
        model: ScoreModel,
        terms: Sequence[Term],
        balance: float = BALANCE,
        streams: Mapping[str, str] | None = None,
        settings: TermSettings | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings or TermSettings()
        self.terms = tuple(replace(term, settings=self.settings) for term in terms)
        self.balance = balance
        self.stream_of = {term.name: term.objective.stream for term in terms} | dict(streams or {})
        self.precision: Precision = "fp32"
        self.separate, self.use_autograd = False, True
        self.penalty = 0.0
        matching = any(term.objective.needs_score for term in terms)
        self.differentiates = matching and model.is_energy_based
        self.balanced = tuple(term.name for term in terms if term.balanced)
        self.register_buffer("running", torch.ones(len(self.balanced)), persistent=False)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that batches are needed of."""
        return tuple(dict.fromkeys(self.stream_of[term.name] for term in self.terms))

    @property
    def needs_negatives(self) -> bool:
        """Whether a batch must bring samples of the model."""
        return any(term.objective.likelihood is not None for term in self.terms)

    @property
    def needs_attack(self) -> bool:
        """Whether a batch must bring attacked images."""
        return any(term.objective.attack is not None for term in self.terms)

    def forward(self, batches: Mapping[str, BatchLike]) -> Losses:
        """Losses of one batch per stream; of the streams given alone, if some are left out."""
        total: Tensor | float = 0.0
        means: dict[str, Tensor] = {}
        for stream in (stream for stream in self.streams if stream in batches):
            own = [term for term in self.terms if self.stream_of[term.name] == stream]
            batch = batches[stream]
            outputs = self._outputs(own, batch)
            attacked = None
            if any(term.objective.attack is not None for term in own):
                assert batch.attacked is not None
                attacked = self._energies(batch.attacked, batch.sigma)
            for term in own:
                output = outputs[term.name]
                if term.objective.attack is AttackTarget.LOSS:
                    output = ModelOutput(attacked)
                losses = term.objective.loss(output, batch)
                if term.objective.attack is AttackTarget.DIVERGENCE:
                    assert output.energies is not None
                    assert attacked is not None
                    beta = self._trades(term).beta
                    losses = losses + beta * divergence(output.energies, attacked)
                if term.objective.likelihood is not None:
                    losses, penalty = self._contrasted(term.objective.likelihood, losses, batch)
                    total = total + self._factor(term, batch) * penalty
                mean = losses.mean()
                means[term.name] = mean.detach()
                total = total + self._factor(term, batch) * mean
        assert isinstance(total, Tensor)
        # not the means themselves: a compiler takes one for the total where they are equal, and
        # detaching one then detaches both
        names = tuple(term.name for term in self.terms if term.name in means)
        return Losses(total, torch.stack([means[name] for name in names]), names)

    def summary(self, parts: Mapping[str, Tensor | float]) -> float:
        """One number to compare states of a run by, lower is better.

        The means of plain terms plus lambda times the logarithms of score-matching means, whatever
        the weights in training are. The difference that maximum likelihood lowers says nothing.
        """
        means = {name: torch.as_tensor(mean, dtype=torch.float64) for name, mean in parts.items()}
        matching = [t.name for t in self.terms if t.objective.scale is not Scale.PLAIN]
        telling = [t for t in self.terms if t.objective.likelihood is None]
        plain = sum(float(means[t.name]) for t in telling if t.name not in matching)
        logs = sum(float(means[name].log()) for name in matching)
        return plain + self.balance * logs / max(1, len(matching))

    def remember(self, parts: Mapping[str, Tensor]) -> None:
        """Update the running means of balanced terms; call once after each optimiser step."""
        if self.balanced:
            means = torch.stack([parts[name] for name in self.balanced])
            self.running.lerp_(means.to(self.running), 1 - EMA_DECAY)

    def _contrasted(
        self, likelihood: LogDensityOf, energies: Tensor, batch: BatchLike
    ) -> tuple[Tensor, Tensor | float]:
        """Energies of images (B,) minus those of negatives, (B,), and the penalty, a scalar."""
        assert batch.negatives is not None
        negative = -likelihood(self._forward(batch.negatives, None), batch.labels)
        penalty: Tensor | float = 0.0
        if self.penalty:
            penalty = self.penalty * (energies.square() + negative.square()).mean()
        return energies - negative, penalty

    def _trades(self, term: Term) -> TradesConfig:
        config = self.settings.attack(term.name)
        assert isinstance(config, TradesConfig)
        return config

    def _outputs(self, terms: Sequence[Term], batch: BatchLike) -> dict[str, ModelOutput]:
        """What each of ``terms`` reads of the model at the images of ``batch``."""
        matching = {term.name: term.objective for term in terms if term.objective.needs_score}
        if not matching:
            needed = any(term.objective.attack is not AttackTarget.LOSS for term in terms)
            energies = self._energies(batch.y, batch.sigma) if needed else None
            return {term.name: ModelOutput(energies) for term in terms}
        labels = [o.score_labels and o.score_labels(batch) for o in matching.values()]
        products = [o.hessian_vectors for o in matching.values() if o.hessian_vectors]
        vectors = products[0](batch) if products else []
        y = self._laid_out(batch.y, differentiate=True)
        energies, scores, found = self._scores(y, batch.sigma, labels, vectors)
        by_name = dict(zip(matching, scores, strict=True))
        return {t.name: ModelOutput(energies, by_name.get(t.name), found) for t in terms}

    def _scores(
        self, y: Tensor, sigma: Tensor, labels: list[Tensor | None], vectors: list[Tensor]
    ) -> tuple[Energies | None, list[Tensor], list[Tensor]]:
        """Energies, the score for each of ``labels``, products of the Hessian with ``vectors``."""
        model = self.model
        if not isinstance(model, EnergyModel):
            with autocast(y.device, self.precision):
                return None, [model._score(y, sigma, c) for c in labels], []
        model.warn_if_rough()
        targets = [LogDensity(c) for c in labels if c is not None]
        marginal: list[Tensor] = []
        products: list[Tensor] = []
        scores: list[Tensor] = []
        energies = None
        if vectors:
            energies, score, products = hessian_products(
                self._forward, y, sigma, vectors, self.use_autograd
            )
            marginal = [score]
        elif len(targets) < len(labels):
            targets.append(LogDensity())
        if targets:
            energies, scores = value_and_grads(
                self._forward, y, sigma, *targets, use_autograd=self.use_autograd
            )
            marginal = marginal or scores[-1:]
        conditional = iter(scores)
        return energies, [marginal[0] if c is None else next(conditional) for c in labels], products

    def _energies(self, y: Tensor, sigma: Tensor) -> Energies | None:
        """Energies where no score is needed; None of a plain denoiser."""
        if not isinstance(self.model, EnergyModel):
            return None
        return self._forward(self._laid_out(y, differentiate=False), sigma)

    def _forward(self, y: Tensor, sigma: Noise | None) -> Energies:
        """The model's forward pass at the precision of training."""
        with autocast(y.device, self.precision):
            energies: Energies = self.model(y, sigma)
        return energies

    def _laid_out(self, y: Tensor, differentiate: bool) -> Tensor:
        layout = memory_format(y.device, differentiate)
        if y.ndim == 4 and layout != memory_format(y.device, self.differentiates):
            return y.contiguous(memory_format=layout)  # else the parameters' layout decides
        return y

    def _factor(self, term: Term, batch: BatchLike) -> Tensor | float:
        """What the mean over entries is multiplied with in the total."""
        if term.balanced:
            running = self.running[self.balanced.index(term.name)]
            return self.balance / len(self.balanced) / running
        weight = 1.0 if term.weight is None else term.weight
        return weight * (batch.x[0].numel() if term.objective.scale is Scale.SUM else 1.0)
