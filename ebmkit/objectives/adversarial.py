r"""Adversarial training and TRADES: cross-entropy with an inner maximisation by PGD.

With :math:`y'` in a ball of radius eps about y,

.. math::
    \text{adv:}    & \quad -\log p(c \mid y'), \qquad
                      y' = \arg\max_{\|y' - y\| \le \epsilon} -\log p(c \mid y') \\
    \text{trades:} & \quad -\log p(c \mid y) + \beta\, KL(p(\cdot \mid y) \,\|\, p(\cdot \mid y')),
                      \qquad y' = \arg\max KL .

The first is adversarial training (Madry et al., arXiv 1706.06083; RCG eq. 2.28-2.30), the second
TRADES (Zhang et al., arXiv 1901.08573, eq. 5).

Projected gradient descent (PGD) increases a sum of log-posteriors with fixed weights w,

.. math::
    y_{t+1} = \Pi\bigl(y_t + \alpha\, n\bigl(\nabla_y \textstyle\sum_c w_c \log p(c \mid y_t)\bigr)
    \bigr), \qquad
    w = \begin{cases} -q & \text{away from the labels } q \\
                      e_{c'} & \text{towards another label } c' \\
                      -p(\cdot \mid y) & \text{TRADES: the divergence, up to a constant,}
        \end{cases}

with n the normalised gradient (:math:`\ell_2`) or its sign (:math:`\ell_\infty`) and :math:`\Pi`
the projection onto the ball of radius :math:`\epsilon` about y, and for images without noise onto
:math:`[0, 1]^d` (`ebmkit.attacks`).

The starting point is uniform in the ball. TRADES starts at y plus Gaussian noise of standard
deviation `TRADES_START_STD`, since the gradient of the divergence is 0 at y. During the attack
the network is in evaluation mode, as in the `robustness` package: BatchNorm uses its running
statistics without updating them, and images do not influence each other. The loss is computed in
training mode.

The input of a diffusion model is :math:`u = \sqrt{\bar\alpha}\, y` with
:math:`\bar\alpha = 1 / (1 + (2\sigma)^2)`. With ``variance_preserving``, :math:`\epsilon` and the
step size are lengths of u, :math:`1/\sqrt{\bar\alpha}` times as long in image units. Together with
``early_stop`` this trains the time-dependent robust classifier of Kawar et al. (2023, arXiv
2208.08664). Their radius 0.5 is a length of :math:`x_t = \sqrt{\bar\alpha}\,(2x - 1) +
\sqrt{1 - \bar\alpha}\,\epsilon`, which is 2 u up to a constant: eps = 0.25 here.

All random numbers are drawn for the whole batch from a generator keyed by (seed, stream, step); a
process attacks its share. So they do not depend on the number of processes, and checkpoints need no
state of the attack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ebmkit.attacks import moved_start, projected_gradient_descent, unit_ball
from ebmkit.data import Batch
from ebmkit.energy import Energies, EnergyModel, WeightedLogProbability, per_image
from ebmkit.errors import UserError
from ebmkit.noise import Radius
from ebmkit.objectives.base import ExtraPasses, ModelOutput, Objective, ObjectiveConfig, RunContext
from ebmkit.objectives.classification import cross_entropy
from ebmkit.randomness import keyed_generator

__all__ = [
    "ADV",
    "TRADES",
    "TRADES_START_STD",
    "AdversarialConfig",
    "TradesConfig",
    "TrainingAttack",
    "divergence",
]

TRADES_START_STD = 0.001
"""Standard deviation of the noise that TRADES adds to its starting point, image units."""


class AdversarialConfig(ObjectiveConfig):
    """The attack of adversarial training (RCG eq. 2.28-2.30)."""

    norm: Literal["l2", "linf"] = Field("l2", description="norm of the ball: l2 or linf")
    eps: Radius = Field(
        0.5, description="radius of the ball, image units, for example 0.5 or 8/255; 0: no attack"
    )
    steps: int = Field(7, ge=1, description="number of PGD steps; 1 without a random start is FGSM")
    step_size: Annotated[Radius, Field(gt=0)] | None = Field(
        None, description="length of a step, image units; null: 2.5 eps / steps"
    )
    random_start: bool = Field(True, description="start at a random point of the ball")
    warmup_steps: int = Field(
        0, ge=0, description="training steps over which eps grows from 0, for large radii"
    )
    targeted: bool = Field(
        False, description="attack towards a random other label instead of away from the true one"
    )
    early_stop: bool = Field(
        False, description="stop moving an image once it is misclassified (Kawar et al. 2023)"
    )
    variance_preserving: bool = Field(
        False,
        description="measure eps and step_size on sqrt(abar) y, abar = 1 / (1 + (2 "
        "sigma)^2), the input of a diffusion model; lengths of x_t, images in [-1, 1], are twice "
        "these",
    )

    @property
    def step(self) -> float:
        """Length of a step, image units."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def at(self, step: int) -> Self:
        """The settings at training step ``step`` (from 0): warm-up scales eps and step size."""
        share = (step + 1) / (self.warmup_steps + 1)
        if share >= 1:
            return self
        return self.model_copy(update={"eps": share * self.eps, "step_size": share * self.step})


class TradesConfig(AdversarialConfig):
    """TRADES (Zhang et al., arXiv 1901.08573): the attack maximises the divergence."""

    random_start: bool = Field(
        True, description="always true: TRADES starts at Gaussian noise of 0.001"
    )
    beta: float = Field(6.0, gt=0, description="beta, the weight of the divergence")

    @model_validator(mode="after")
    def _check(self) -> TradesConfig:
        if self.targeted:
            raise UserError("the divergence of trades has no target: use adv, or targeted=false")
        if not self.random_start:
            raise UserError(
                "the divergence of trades has no gradient at the image itself: omit random_start, "
                "or set it to true"
            )
        return self


class TrainingAttack:
    """Attacks the images of a run's batches; returned by `Objective.prepare` of adv and trades.

    Args:
        context: facts of the run.
        config: settings of the attack.
        on_divergence: maximise the divergence from the clean image (TRADES) instead of the loss.

    Raises:
        UserError: if the network has no labels, or only one and the attack is targeted.
    """

    def __init__(
        self, context: RunContext, config: AdversarialConfig, on_divergence: bool = False
    ) -> None:
        model = context.model
        if not isinstance(model, EnergyModel) or model.num_classes == 0:
            raise UserError(
                f"objective {context.term!r} needs a classifier, and this network has no labels: "
                "choose a backbone, and images with labels"
            )
        if model.num_classes == 1 and config.targeted:
            raise UserError(
                f"objective.{context.term}.targeted needs another class as target, and there is "
                "only one class: set it to false"
            )
        self.model: EnergyModel = model
        self.config, self.on_divergence = config, on_divergence
        self.seed, self.stream, self.parts = context.seed, context.stream, context.parts
        self.warm, self.world = context.validating, context.world
        self.computed = context.inference.wrap(model)

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The column ``attacked`` for ``batch`` at training step ``step``."""
        return {"attacked": self.attack(batch, step)}

    def attack(self, batch: Batch, step: int) -> Tensor:
        """The images y of ``batch`` after the attack, (B, C, H, W); y itself if eps is 0.

        They carry no gradient. The mode of the network is restored.
        """
        config = self.config if self.warm else self.config.at(step)
        if config.eps == 0:
            return batch.y
        generator = keyed_generator(batch.y.device, self.seed, "attack", self.stream, step)
        start, other = self._drawn(batch, config, generator)
        size = -(-len(batch.y) // self.parts)
        found = []
        with _in_eval_mode(self.model), torch.no_grad():
            for first in range(0, len(batch.y), size):
                rows = slice(first, first + size)
                own = batch.rows(rows)
                target = None if other is None else other[rows]
                found.append(self._pgd(own, start[rows], target, config))
        return torch.cat(found)

    def _drawn(
        self, batch: Batch, config: AdversarialConfig, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Starting points, shape of y, and target labels (B,), or None if untargeted."""
        y, world = batch.y, self.world
        total = len(y) * world.size
        own = slice(world.rank * len(y), (world.rank + 1) * len(y))
        other = None
        if config.targeted:
            classes = self.model.num_classes
            ahead = torch.randint(1, classes, (total,), generator=generator, device=y.device)
            other = (_labels(batch) + ahead[own]) % classes
        if not config.random_start:
            return y, other
        shape = (total, *y.shape[1:])
        if self.on_divergence:
            nudge = torch.randn(shape, generator=generator, device=y.device, dtype=y.dtype)
            return moved_start(y, TRADES_START_STD, nudge[own], _bounds(batch)), other
        radius = config.eps * _scale(batch, config)
        offset = unit_ball(config.norm, shape, generator, y.dtype)
        return moved_start(y, radius, offset[own], _bounds(batch)), other

    def _pgd(
        self,
        batch: Batch,
        start: Tensor,
        other: Tensor | None,
        config: AdversarialConfig,
    ) -> Tensor:
        """Images after the steps of PGD from ``start``."""
        weights, labels = self._weights(batch, other), _labels(batch)
        scale = _scale(batch, config)

        def gradient(y: Tensor) -> Tensor:
            target = WeightedLogProbability(weights)
            energies, (found,) = self.computed.value_and_grads(y, batch.sigma, target)
            if config.early_stop:  # an image with zero gradient does not move
                found = found * per_image(energies.logits.argmax(dim=1) == labels, found)
            return found

        return projected_gradient_descent(
            gradient,
            batch.y,
            config.eps * scale,
            config.norm,
            steps=config.steps,
            step_size=config.step * scale,
            start=start,
            bounds=_bounds(batch),
        )

    def _weights(self, batch: Batch, other: Tensor | None) -> Tensor:
        """Weights w (B, C) of the log-posteriors whose sum is maximised."""
        assert batch.soft is not None
        if self.on_divergence:
            return -self.computed.energies(batch.y, batch.sigma).logits.softmax(dim=1)
        if other is not None:
            chosen = torch.nn.functional.one_hot(other, self.model.num_classes)
            return chosen.to(batch.soft)
        return -batch.soft


def _labels(batch: Batch) -> Tensor:
    """Label of each image (B,); for a mixed image, the one of larger weight."""
    assert batch.soft is not None
    return batch.soft.argmax(dim=1)


def _scale(batch: Batch, config: AdversarialConfig) -> Tensor:
    """Factors (B,) that convert lengths of the attack to image units."""
    if config.variance_preserving:
        return (1 + (2 * batch.sigma.to(batch.y)).square()).sqrt()
    return torch.ones(len(batch.y), device=batch.y.device, dtype=batch.y.dtype)


def _bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of each image, (B,) each: 0 and 1 without noise, else infinite."""
    noisy = batch.sigma > 0
    zero = torch.zeros_like(batch.sigma, dtype=batch.y.dtype)
    return zero.masked_fill(noisy, -torch.inf), (zero + 1).masked_fill(noisy, torch.inf)


@contextmanager
def _in_eval_mode(model: EnergyModel) -> Iterator[None]:
    """Set ``model`` to evaluation mode within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def divergence(clean: Energies, attacked: Energies) -> Tensor:
    """KL(p(c|y) || p(c|y')), (B,), in nats; differentiable in both (TRADES eq. 5)."""
    log_p, log_q = clean.log_posterior(), attacked.log_posterior()
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _passes(config: AdversarialConfig, forwards: int) -> ExtraPasses | None:
    if config.eps == 0:
        return None
    return ExtraPasses(f"{config.steps} attack steps", config.steps, True, forwards)


def _attack_text(config: AdversarialConfig) -> dict[str, str]:
    """Norm and radius of the attack for the model card, as in "l2 0.5"; empty without attack."""
    return {"attack": f"{config.norm} {config.eps:.6g}"} if config.eps else {}


def adversarial_training(config: AdversarialConfig) -> Objective:
    """Cross-entropy of the attacked images (Madry et al. 2018)."""

    def loss(output: ModelOutput, batch: Batch) -> Tensor:
        attacked = output.energies_at(batch.extra["attacked"], batch.sigma)
        return cross_entropy(ModelOutput(attacked), batch)

    return Objective(
        description="cross-entropy of attacked images (PGD), for a robust classifier",
        stream="classify",
        loss=loss,
        family="adversarial",
        needs_labels=True,
        needs_energies=False,
        prepare=lambda context: TrainingAttack(context, config),
        columns=("attacked",),
        extra_passes=_passes(config, 0),
        card=_attack_text(config),
        config=AdversarialConfig,
        configure=adversarial_training,
    )


def trades(config: TradesConfig) -> Objective:
    """Cross-entropy plus beta times the divergence under attack (Zhang et al. 2019)."""

    def loss(output: ModelOutput, batch: Batch) -> Tensor:
        attacked = output.energies_at(batch.extra["attacked"], batch.sigma)
        assert output.energies is not None
        return cross_entropy(output, batch) + config.beta * divergence(output.energies, attacked)

    return Objective(
        description="cross-entropy plus the divergence between clean and attacked "
        "predictions (TRADES)",
        stream="classify",
        loss=loss,
        family="adversarial",
        needs_labels=True,
        prepare=lambda context: TrainingAttack(context, config, on_divergence=True),
        columns=("attacked",),
        extra_passes=_passes(config, 1),
        card=_attack_text(config),
        config=TradesConfig,
        configure=trades,
    )


ADV = adversarial_training(AdversarialConfig())
TRADES = trades(TradesConfig())
