r"""Sums of objectives, and their balance.

The paper adds its two losses without a weight (CDN eq. 13). If the denoising loss is a sum over the
d entries of an image, the classifier hardly learns; if it is a mean, the denoiser hardly learns.
The default is a third form. The Gaussian likelihood of the denoising residual with *profiled*
variance is the logarithm of the mean square,

.. math::
    L = L_{ce} + \lambda \log \bar L_{dsm}, \qquad
    \nabla L = \nabla L_{ce} + \frac{\lambda}{\bar L_{dsm}} \nabla \bar L_{dsm},

with :math:`\bar L_{dsm}` the mean over entries and images. Its gradient does not depend on the
number of entries or the unit of the residual, so one :math:`\lambda` (`BALANCE`) works for every
image size. At the start it is the mean form times lambda; as denoising improves, its weight grows.
The logarithm has the same minimiser as the mean. The denominator is a running mean over the last
steps (stored in checkpoints), so the gradient is linear in the batch and does not depend on how the
batch is divided over devices.

Several balanced terms share lambda. An explicit coefficient, as in ``ce+0.5*dsm``, turns balancing
off for that term: it is then 0.5 times the mean form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, create_model, model_validator
from torch import Tensor, nn

from ebmkit.compute import Precision, autocast, memory_format
from ebmkit.data import Batch
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
from ebmkit.noise import parse_fraction
from ebmkit.objectives.adversarial import ADV, TRADES
from ebmkit.objectives.base import (
    ModelOutput,
    Objective,
    ObjectiveConfig,
    Prepare,
    RunContext,
    Scale,
)
from ebmkit.objectives.classification import CE
from ebmkit.objectives.diffusion import DDPM
from ebmkit.objectives.likelihood import CML, ML
from ebmkit.objectives.score_matching import ISM, denoising
from ebmkit.objectives.time_score import DIFFCLF, TSM
from ebmkit.registry import Table, find

__all__ = [
    "ALIASES",
    "BALANCE",
    "OBJECTIVES",
    "Losses",
    "Term",
    "TermSettings",
    "TrainingLoss",
    "check_labels",
    "parse_objective",
]

OBJECTIVES: dict[str, Objective] = Table(
    "objective",
    {
        "ce": CE,
        "adv": ADV,
        "trades": TRADES,
        "dsm": denoising(),
        "dsm-mean": denoising(Scale.MEAN),
        "dsm-sum": denoising(Scale.SUM),
        "cdsm": denoising(conditional=True),
        "cdsm-mean": denoising(Scale.MEAN, conditional=True),
        "cdsm-sum": denoising(Scale.SUM, conditional=True),
        "ml": ML,
        "cml": CML,
        "ism": ISM,
        "tsm": TSM,
        "diffclf": DIFFCLF,
        "ddpm": DDPM,
    },
)

ALIASES: dict[str, tuple[str, ...]] = {"jem": ("ce", "ml")}
"""Short names of sums of objectives."""

BALANCE = 2.0
"""lambda of the balanced form; docs/concepts/balance.md describes how it was chosen."""

EMA_DECAY = 0.9
"""Weight of the past in the running mean of a balanced term."""

_TERM = re.compile(r"(?:(?P<weight>[^*]+)\*)?(?P<name>[^*]+)")


class TermSettings(BaseModel):
    """Settings by name of the objective, as ``{"ce": {"label_smoothing": 0.1}}``.

    Objectives that are not named have default settings.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _of_the_table(cls, given: Any) -> Any:
        kind = cls.class_for(given)
        found = kind.model_validate(given)
        return {name: getattr(found, name) for name in kind.model_fields}

    @classmethod
    def class_for(cls, given: Any) -> type[BaseModel]:
        """Model class with a field for each objective that has settings here."""
        kinds = ((n, o.config) for n, o in OBJECTIVES.items() if o.config and o.section is None)
        return _settings_model(tuple(kinds))

    def of(self, name: str) -> ObjectiveConfig | None:
        """Settings of the objective ``name``; None if it has no settings here."""
        found: ObjectiveConfig | None = (self.model_extra or {}).get(name)
        return found


@cache
def _settings_model(kinds: tuple[tuple[str, type[ObjectiveConfig]], ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {name: (kind, kind()) for name, kind in kinds}
    return create_model("TermSettings", __config__=ConfigDict(extra="forbid"), **fields)


@dataclass(frozen=True)
class Term:
    """One summand: name of an objective, and its coefficient (``weight``) if one was given.

    Attributes:
        settings: settings of the objective; None: defaults.
        objective: entry of `OBJECTIVES` with these settings.
    """

    name: str
    weight: float | None = None
    settings: ObjectiveConfig | None = field(default=None, repr=False)
    objective: Objective = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entry = OBJECTIVES[self.name]
        if entry.configure is not None and self.settings is not None:
            entry = entry.configure(self.settings)
        object.__setattr__(self, "objective", entry)

    @property
    def balanced(self) -> bool:
        """Whether the term enters as a logarithm."""
        return self.weight is None and self.objective.scale is Scale.BALANCED

    def for_validation(self) -> Term | None:
        """The term for held-out images; None if its value on them is not meaningful."""
        if not self.objective.validates:
            return None
        loss = self.objective.validation_loss or self.objective.loss
        term = replace(self)
        object.__setattr__(term, "objective", replace(self.objective, loss=loss))
        return term


def parse_objective(
    text: str, settings: Mapping[str, ObjectiveConfig | None] | TermSettings | None = None
) -> tuple[Term, ...]:
    """Read ``"ce+dsm"`` or ``"ce + 0.5*dsm"``.

    Args:
        text: names of `OBJECTIVES` or `ALIASES`, joined by +, with optional coefficients.
        settings: name -> settings of the objective; others have default settings.

    Raises:
        UserError: if ``text`` does not parse, an objective is unknown or named twice, or a
            coefficient is not a finite number above 0.

    >>> parse_objective("ce + 0.5*dsm")
    (Term(name='ce', weight=None), Term(name='dsm', weight=0.5))
    """
    own = settings.of if isinstance(settings, TermSettings) else (settings or {}).get
    terms: list[Term] = []
    for part in re.split(r"(?<!\d[eE])\+", text):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise UserError(
                f"objective {text!r} does not parse: write names joined by +, each with a "
                "coefficient before it or none, as in ce+0.5*dsm"
            )
        written, own_name = match["weight"], match["name"].strip()
        weight = None if written is None or "/" in written else parse_fraction(written)
        if written is not None and (weight is None or not 0 < weight < float("inf")):
            raise UserError(
                f"coefficient {written.strip()!r} in objective {text!r} must be a number above 0"
            )
        for name in ALIASES.get(own_name, (own_name,)):
            find("objective", OBJECTIVES | ALIASES, name)  # an error suggests aliases, too
            if any(term.name == name for term in terms):
                raise UserError(f"objective {text!r} names {name!r} twice: give it one coefficient")
            terms.append(Term(name, weight, own(name)))
    return tuple(terms)


class Losses(NamedTuple):
    """The total to differentiate, and each term's mean over the batch.

    Attributes:
        total: scalar, whose gradient is that of the objective. With balanced terms its value is
            that of the linearised logarithm, so log `parts` instead.
        values: mean of each term, (number of terms,), detached: in nats for ``ce``, the mean over
            entries (1 for a zero score) for every form of score matching.
        names: names of the terms.
    """

    total: Tensor
    values: Tensor
    names: tuple[str, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Name of a term -> its entry of ``values``, a scalar."""
        return dict(zip(self.names, self.values.unbind(), strict=True))


class TrainingLoss(nn.Module):
    """Model and objectives in one module, whose forward returns the loss.

    It computes the scores, so it is the module for `torch.compile` and data parallelism. Terms of
    one stream share its batch and one forward pass, and each score is computed once.

    Args:
        model: model to train.
        terms: summands (`parse_objective`).
        balance: lambda, shared by all balanced terms.
        streams: name of a term -> stream to draw from, if not the objective's default. Terms on one
            stream see the same batch.

    Attributes:
        precision: precision of the network; scores, residuals and losses are always float32.
        separate: whether the caller should run forward and backward for one stream at a time, so
            that activations of only one are kept; this module sums over the streams it is given.
        use_autograd: whether to compute scores by `torch.autograd.grad` instead of
            `torch.func.vjp`; the values are equal (see `ebmkit.energy.value_and_grads`).
        needs_input_gradient: whether the loss differentiates the model with respect to its input.
        balanced: names of the balanced terms.
        running: running means of the balanced terms, (len(balanced),).
    """

    running: Tensor

    def __init__(
        self,
        model: ScoreModel,
        terms: Sequence[Term],
        balance: float = BALANCE,
        streams: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.terms = tuple(terms)
        self.balance = balance
        self.stream_of = {term.name: term.objective.stream for term in terms} | dict(streams or {})
        self.precision: Precision = "fp32"
        self.separate, self.use_autograd = False, True
        matching = any(t.objective.needs_score or t.objective.needs_time_score for t in terms)
        self.needs_input_gradient = matching and model.is_energy_based
        self.balanced = tuple(term.name for term in terms if term.balanced)
        self.register_buffer("running", torch.ones(len(self.balanced)), persistent=False)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the terms draw from."""
        return tuple(dict.fromkeys(self.stream_of[term.name] for term in self.terms))

    def preparations(self, **run: Any) -> dict[str, Prepare]:
        """Term -> function that adds columns to its batches, for the terms that need one.

        Args:
            **run: fields of `RunContext` other than model, term and stream.
        """
        return {
            t.name: t.objective.prepare(
                RunContext(self.model, t.name, self.stream_of[t.name], **run)
            )
            for t in self.terms
            if t.objective.prepare is not None
        }

    def prepared(
        self, preparations: Mapping[str, Prepare], batches: Mapping[str, Batch], step: int
    ) -> dict[str, Batch]:
        """``batches`` of training step ``step`` with the columns that ``preparations`` add."""
        found = dict(batches)
        for name, prepare in preparations.items():
            stream = self.stream_of[name]
            if stream in found:
                found[stream] = found[stream].with_columns(name, prepare(batches[stream], step))
        return found

    def forward(self, batches: Mapping[str, Batch]) -> Losses:
        """Losses of one batch per stream; streams without a batch are skipped."""
        total: Tensor | float = 0.0
        means: dict[str, Tensor] = {}
        for stream in (stream for stream in self.streams if stream in batches):
            own = [term for term in self.terms if self.stream_of[term.name] == stream]
            batch = batches[stream]
            outputs = self._outputs(own, batch)
            for term in own:
                found = term.objective.loss(outputs[term.name], batch.of(term.name))
                losses, penalty = found if isinstance(found, tuple) else (found, None)
                if losses.ndim != 1:
                    raise UserError(
                        f"objective {term.name!r} returns a loss of shape {tuple(losses.shape)}: "
                        "it must return one number per image, (B,)"
                    )
                factor = self._factor(term, batch)
                if penalty is not None:
                    total = total + factor * penalty
                mean = losses.mean()
                means[term.name] = mean.detach()
                total = total + factor * mean
        assert isinstance(total, Tensor)
        # a stack, not the means themselves: a compiler may merge a mean with an equal total, and
        # detaching one would detach both
        names = tuple(term.name for term in self.terms if term.name in means)
        return Losses(total, torch.stack([means[name] for name in names]), names)

    def summary(self, parts: Mapping[str, Tensor | float]) -> float:
        """One number that compares states of a run; lower is better.

        The means of plain terms plus lambda times the mean logarithm of score-matching terms,
        independent of the training weights, without terms whose `Objective.validates` is False.
        """
        means = {name: torch.as_tensor(mean, dtype=torch.float64) for name, mean in parts.items()}
        matching = [t.name for t in self.terms if t.objective.scale is not Scale.PLAIN]
        telling = [t for t in self.terms if t.objective.validates]
        plain = sum(float(means[t.name]) for t in telling if t.name not in matching)
        logs = sum(float(means[name].log()) for name in matching)
        return plain + self.balance * logs / max(1, len(matching))

    def update_running(self, parts: Mapping[str, Tensor]) -> None:
        """Update the running means of balanced terms; call once after each optimiser step."""
        if self.balanced:
            means = torch.stack([parts[name] for name in self.balanced])
            self.running.lerp_(means.to(self.running), 1 - EMA_DECAY)

    def _outputs(self, terms: Sequence[Term], batch: Batch) -> dict[str, ModelOutput]:
        """Model outputs for each of ``terms`` at the images of ``batch``."""
        matching = {term.name: term.objective for term in terms if term.objective.needs_score}
        timed = any(term.objective.needs_time_score for term in terms)
        if not matching and not timed:
            needed = any(term.objective.needs_energies for term in terms)
            energies = None
            if needed and isinstance(self.model, EnergyModel):
                energies = self._energies(batch.y, batch.sigma)
            return {t.name: ModelOutput(energies, forward=self._energies) for t in terms}
        labels = [o.score_labels and o.score_labels(batch) for o in matching.values()]
        products = [o.hessian_vectors for o in matching.values() if o.hessian_vectors]
        vectors = products[0](batch) if products else []
        y = self._to_memory_format(batch.y, differentiate=True)
        energies, scores, found, time_score = self._scores(y, batch.sigma, labels, vectors, timed)
        by_name = dict(zip(matching, scores, strict=True))
        return {
            t.name: ModelOutput(energies, by_name.get(t.name), found, time_score, self._energies)
            for t in terms
        }

    def _scores(
        self,
        y: Tensor,
        sigma: Tensor,
        labels: list[Tensor | None],
        vectors: list[Tensor],
        timed: bool,
    ) -> tuple[Energies | None, list[Tensor], list[Tensor], Tensor | None]:
        """Energies, score for each of ``labels``, Hessian-vector products with ``vectors``, and if
        ``timed`` the time score of log p(y)."""
        model = self.model
        if not isinstance(model, EnergyModel):
            with autocast(y.device, self.precision):
                return None, [model._score(y, sigma, c) for c in labels], [], None
        model.warn_about_layers()
        targets = [LogDensity(c) for c in labels if c is not None]
        marginal: list[Tensor] = []
        products: list[Tensor] = []
        scores: list[Tensor] = []
        energies, time_score = None, None
        if vectors:
            energies, score, products = hessian_products(
                self._forward, y, sigma, vectors, self.use_autograd
            )
            marginal = [score]
        if timed or (len(targets) < len(labels) and not vectors):
            targets.append(LogDensity())
        if targets:
            energies, scores = value_and_grads(
                self._forward,
                y,
                sigma,
                *targets,
                use_autograd=self.use_autograd,
                by_log_sigma=timed,
            )
            if timed:
                time_score, scores = scores[-1], scores[: len(targets)]
            marginal = marginal or scores[-1:]
        conditional = iter(scores)
        found = [marginal[0] if c is None else next(conditional) for c in labels]
        return energies, found, products, time_score

    def _energies(self, y: Tensor, sigma: Tensor | None) -> Energies:
        """Energies without a score."""
        return self._forward(self._to_memory_format(y, differentiate=False), sigma)

    def _forward(self, y: Tensor, sigma: Noise | None) -> Energies:
        """Forward pass of the model at the training precision."""
        with autocast(y.device, self.precision):
            energies: Energies = self.model(y, sigma)
        return energies

    def _to_memory_format(self, y: Tensor, differentiate: bool) -> Tensor:
        layout = memory_format(y.device, differentiate)
        if y.ndim == 4 and layout != memory_format(y.device, self.needs_input_gradient):
            return y.contiguous(memory_format=layout)  # else the parameters' layout decides
        return y

    def _factor(self, term: Term, batch: Batch) -> Tensor | float:
        """Factor of the mean over entries in the total."""
        if term.balanced:
            running = self.running[self.balanced.index(term.name)]
            return self.balance / len(self.balanced) / running
        weight = 1.0 if term.weight is None else term.weight
        return weight * (batch.x[0].numel() if term.objective.scale is Scale.SUM else 1.0)


def check_labels(
    name: str, objective: Objective, num_classes: int, mixes: bool = False, stream: str = ""
) -> None:
    """Check that the data of ``stream`` has the labels that ``objective`` needs.

    Raises:
        UserError: if the objective needs labels and there are none, or needs hard labels and they
            are mixed.
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
