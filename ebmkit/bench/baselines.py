r"""The same work, twice: as the library does it, and as everyone writes it.

The plain eager step is

.. code-block:: python

    y.requires_grad_()
    (score,) = torch.autograd.grad(model(y).log_density.sum(), y, create_graph=True)
    loss = (sigma * score + eps).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with contiguous float32 tensors, PyTorch's own layers and ``torch.optim.AdamW(model.parameters())``.
It computes the same loss and the same gradients as the library's step (a test says so), and that is
what makes their times comparable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ebmkit.bench.timing import Step
from ebmkit.compile import laid_out, make_inference
from ebmkit.compute import ComputeConfig, Precision, pick_compile, set_tf32
from ebmkit.data import Batch, NoiseLaw
from ebmkit.energy import Energies, EnergyModel
from ebmkit.errors import UserError
from ebmkit.models.convolution import Conv2d
from ebmkit.models.gelu import GELU
from ebmkit.models.norms import GroupNorm
from ebmkit.objectives import BALANCE, Scale, Term, TrainingLoss, parse_objective
from ebmkit.training.config import OptimizerConfig
from ebmkit.training.optim import make_optimizer
from ebmkit.training.step import TrainingStep

__all__ = [
    "INFERENCES",
    "SIGMA",
    "Batches",
    "make_batch",
    "our_inference",
    "our_step",
    "plain_inference",
    "plain_loss",
    "plain_step",
    "timed_terms",
]

Batches = Callable[[], Mapping[str, Batch]]
"""Stream -> batch, at every call of a step."""

INFERENCES = ("logits", "score", "denoise")
SIGMA = 25 / 255
"""Noise level that is taken out where one is given, image units."""

# torch.optim.AdamW's own defaults, so that both sides make the same update
_ADAMW = OptimizerConfig(lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), decay_norms=True)


def timed_terms(objective: str) -> tuple[Term, ...]:
    """The terms of ``objective``, balanced ones in their mean form.

    Balancing multiplies a loss by a number and keeps a running mean of it; the mean form is what
    everyone writes, so both sides compute that.

    Raises:
        UserError: if it does not parse, or there is no plain eager form of a term.
    """
    terms = []
    for term in parse_objective(objective):
        name = f"{term.name}-mean" if term.objective.scale is Scale.BALANCED else term.name
        if name not in ("ce", "dsm-mean", "dsm-sum", "cdsm-mean", "cdsm-sum"):
            raise UserError(
                f"objective {term.name!r} has no plain eager form to compare with: use ce, dsm, "
                "cdsm, or a sum of them"
            )
        terms.append(Term(name, term.weight))
    return tuple(terms)


def make_batch(
    count: int,
    channels: int,
    image_size: int,
    num_classes: int,
    device: torch.device,
    generator: torch.Generator,
) -> Batch:
    """A batch of uniform random images with noise as in the paper's denoising stream.

    Args:
        count: images B.
        channels: C.
        image_size: height and width.
        num_classes: labels are drawn from 0 .. num_classes - 1.
        device: where the batch ends up.
        generator: on the CPU.
    """
    shape = (count, channels, image_size, image_size)
    law = NoiseLaw(kind="squared-uniform", min=1 / 255, max=100 / 255)
    x, eps = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    sigma = law.sample(count, generator, "cpu")
    labels = torch.randint(num_classes, (count,), generator=generator)
    soft = nn.functional.one_hot(labels, num_classes).float()
    y = x + sigma[:, None, None, None] * eps
    x, y, sigma, eps, labels, soft = (t.to(device) for t in (x, y, sigma, eps, labels, soft))
    return Batch(x, y, sigma, eps, labels, soft)


def plain_loss(model: EnergyModel, terms: tuple[Term, ...], batches: Mapping[str, Batch]) -> Tensor:
    """The loss of ``terms`` with scores by `torch.autograd.grad` with a graph; a scalar."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for stream in dict.fromkeys(term.objective.stream for term in terms):
        batch = batches[stream]
        own = [term for term in terms if term.objective.stream == stream]
        y = batch.y.detach()
        if any(term.objective.needs_score for term in own):
            y.requires_grad_()
        energies = model(y)
        for term in own:
            weight = 1.0 if term.weight is None else term.weight
            total = total + weight * _plain_term(term, energies, y, batch)
    return total


def _plain_term(term: Term, energies: Energies, y: Tensor, batch: Batch) -> Tensor:
    if term.name == "ce":
        assert batch.soft is not None
        return nn.functional.cross_entropy(energies.logits, batch.soft)
    log_density = energies.log_density
    if term.objective.needs_labels:
        assert batch.labels is not None
        log_density = energies.log_joint().gather(1, batch.labels[:, None])
    (score,) = torch.autograd.grad(log_density.sum(), y, create_graph=True)
    squares = (batch.sigma[:, None, None, None] * score + batch.eps).square()
    if term.objective.scale is Scale.SUM:
        return squares.flatten(1).sum(1).mean()
    return squares.mean()


def plain_step(
    model: EnergyModel, objective: str, batches: Batches, precision: Precision = "fp32"
) -> Step:
    """The training step that everyone writes, on a copy of ``model``.

    Args:
        model: copied, contiguous.
        objective: as `timed_terms` reads it.
        batches: called by each step.
        precision: ``fp32``, with TF32 off for convolutions too, or ``tf32``.

    Returns:
        A step that returns its loss; its attribute ``model`` is the copy that it trains.
    """
    return _PlainStep(model, timed_terms(objective), batches, precision)


class _PlainStep:
    def __init__(
        self, model: EnergyModel, terms: tuple[Term, ...], batches: Batches, precision: Precision
    ) -> None:
        self.model = _plain(model).train()
        self.terms, self.batches, self.precision = terms, batches, precision
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def __call__(self) -> Tensor:
        set_tf32(self.device, self.precision)
        loss = plain_loss(self.model, self.terms, self.batches())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


def our_step(
    model: EnergyModel, objective: str, batches: Batches, compute: ComputeConfig | None = None
) -> Step:
    """The library's training step, on a copy of ``model``; see `plain_step`.

    Raises:
        UserError: as `TrainingStep` does.
    """
    return _OurStep(model, timed_terms(objective), batches, compute or ComputeConfig())


class _OurStep:
    def __init__(
        self,
        model: EnergyModel,
        terms: tuple[Term, ...],
        batches: Batches,
        compute: ComputeConfig,
    ) -> None:
        self.model = copy.deepcopy(model).train()
        self.batches = batches
        optimizer = make_optimizer(self.model, _ADAMW)
        self.step = TrainingStep(TrainingLoss(self.model, terms, BALANCE), optimizer, compute)

    @property
    def how(self) -> str:
        """Precision, and whether it was compiled in the end."""
        return f"{self.step.precision}, {'compiled' if self.step.compiled else 'eager'}"

    def __call__(self) -> None:
        set_tf32(self.step.device, self.step.precision)
        self.step(self.batches(), rate=_ADAMW.lr)


def our_inference(
    model: EnergyModel, what: str, y: Tensor, compute: ComputeConfig | None = None
) -> Step:
    """``model.logits``, ``.score`` or ``.denoise`` of ``y``, as with a loaded (frozen) model.

    Args:
        model: copied, frozen.
        what: one of `INFERENCES`.
        y: noisy images.
        compute: precision and compilation; ``auto`` precision is float32, ``auto`` compilation
            compiles where training does.

    Raises:
        UserError: if the device lacks the precision or a compiler.
    """
    compute = compute or ComputeConfig()
    own = copy.deepcopy(model).eval().requires_grad_(False)
    mode = "on" if pick_compile(compute.compile, y.device) else "off"
    inference = make_inference(y.device, compute.precision, mode)
    own, precision = laid_out(own, inference), inference.precision
    calls = {
        "logits": lambda: own.logits(y),
        "score": lambda: own.score(y),
        "denoise": lambda: own.denoise(y, SIGMA),
    }

    def step() -> Tensor:
        set_tf32(y.device, precision)
        with torch.no_grad():
            return calls[what]()

    return step


def plain_inference(
    model: EnergyModel, what: str, y: Tensor, precision: Precision = "fp32"
) -> Step:
    """The same by `torch.autograd.grad`, as everyone writes it."""
    own = _plain(model).eval()

    def step() -> Tensor:
        set_tf32(y.device, precision)
        if what == "logits":
            with torch.no_grad():
                return own(y).logits
        leaf = y.detach().requires_grad_()
        (score,) = torch.autograd.grad(own(leaf).log_density.sum(), leaf)
        return score if what == "score" else y + SIGMA**2 * score

    return step


def _plain(model: EnergyModel) -> EnergyModel:
    """A contiguous copy, of PyTorch's own layers and derivatives."""
    own = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in own.modules():
        if isinstance(module, Conv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
        elif isinstance(module, GELU):
            module.__class__ = nn.GELU  # type: ignore[assignment]
        elif isinstance(module, GroupNorm):
            module.plain = True
    return own
