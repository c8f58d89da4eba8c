r"""Attacks on the images of a batch, for objectives that are taken there: PGD inside the loss.

Projected gradient descent (Madry et al., arXiv 1706.06083; RCG eq. 2.28-2.30) raises a weighted sum
of log-posteriors with weights w that stay fixed,

.. math::
    y_{t+1} = \Pi\bigl(y_t + \alpha\, n\bigl(\nabla_y \textstyle\sum_c w_c \log p(c \mid y_t)\bigr)
    \bigr), \qquad
    w = \begin{cases} -q & \text{away from the labels } q \\
                      e_{c'} & \text{towards another label } c' \\
                      -p(\cdot \mid y) & \text{TRADES: the divergence, up to a constant,}
        \end{cases}

with n the direction (:math:`\ell_2`) or the sign (:math:`\ell_\infty`) and :math:`\Pi` the
projection on the ball of radius :math:`\epsilon` about y, and on :math:`[0, 1]^d` where the image
carries no noise. One step from y itself is the fast gradient method. The steps are those of
`ebmkit.sampling.Ascent`.

Starts are uniform in the ball; TRADES, whose divergence has no gradient at y, starts at Gaussian
noise of `NUDGE`. The network is in evaluation mode meanwhile, so that a BatchNorm uses its running
statistics, no image sees another, and the statistics do not move (as the `robustness` package has
it); the loss itself is taken in training mode.

A diffusion model sees :math:`u = \sqrt{\bar\alpha}\, y` with
:math:`\bar\alpha = 1 / (1 + (2\sigma)^2)`. With ``variance_preserving``, :math:`\epsilon` and the
step are lengths there, :math:`1/\sqrt{\bar\alpha}` times as long in image units. With
``early_stop`` besides, that is the training of the time-dependent robust classifier of Kawar et al.
(2023, arXiv 2208.08664).

Everything random is drawn for the whole batch from a generator keyed by (seed, stream, step); a
process attacks its share. So the number of processes does not change what is drawn, and a
checkpoint needs nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ebmkit.compile import Inference
from ebmkit.data import Batch
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, Noise, WeightedLogProbability, upcast_energies
from ebmkit.errors import UserError
from ebmkit.objectives import AdversarialConfig, AttackTarget, Term, TrainingLoss
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.ascent import Ascent
from ebmkit.sampling.base import per_chain

__all__ = ["NUDGE", "Attacks", "attack_passes", "attack_terms"]

NUDGE = 0.001
"""Deviation of the Gaussian noise that TRADES starts at, image units."""


def attack_terms(loss: TrainingLoss) -> dict[str, Term]:
    """Stream -> the term of ``loss`` that attacks its images.

    Raises:
        UserError: if two want different attacks on the images of one stream.
    """
    found: dict[str, Term] = {}
    for term in loss.terms:
        if term.objective.attack is None:
            continue
        stream = loss.stream_of[term.name]
        if stream in found:
            raise UserError(
                f"objectives {found[stream].name!r} and {term.name!r} need different attacks on "
                f"the images of stream {stream!r}: choose one, or draw_from.{term.name}=another "
                "stream"
            )
        found[stream] = term
    return found


def attack_passes(loss: TrainingLoss) -> tuple[int, int]:
    """How often the attack on one stream takes the gradient, and a forward pass beside.

    Args:
        loss: of which one term attacks.

    Raises:
        UserError: as `attack_terms` does.
    """
    (term,) = attack_terms(loss).values()
    config = loss.settings.attack(term.name)
    if config.eps == 0:
        return 0, 0
    return config.steps, int(term.objective.attack is AttackTarget.DIVERGENCE)


class Attacks:
    """Attacks the images of a run's batches.

    Args:
        loss: model and objectives, on their device.
        seed: the run's.
        inference: precision and compilation of the gradient.
        world: the processes that share each batch.
        parts: that a process attacks its share in, one after the other, to need less memory.
        warm: whether warm-up is over: attacks are at full strength whatever the step.

    Attributes:
        terms: stream -> the term that attacks its images.

    Raises:
        UserError: if two objectives want different attacks on one stream, the network has no
            labels, or a single one and the attack a target.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        seed: int,
        inference: Inference | None = None,
        world: DistributedContext | None = None,
        parts: int = 1,
        warm: bool = False,
    ) -> None:
        self.terms, self.warm = attack_terms(loss), warm
        model = loss.model
        if not isinstance(model, EnergyModel) or model.num_classes == 0:
            names = " and ".join(repr(term.name) for term in self.terms.values())
            raise UserError(
                f"objective {names} needs a classifier, and this network knows no labels: choose "
                "a backbone, and images with labels"
            )
        for term in self.terms.values():
            if model.num_classes == 1 and loss.settings.attack(term.name).targeted:
                raise UserError(
                    f"objective.{term.name}.targeted needs a label to aim at, and there is but one "
                    "class: set it to false"
                )
        self.model: EnergyModel = model
        self.settings, self.seed, self.parts = loss.settings, seed, parts
        self.computed, self.world = (
            (inference or Inference()).wrap(model),
            world or DistributedContext(),
        )

    def join(self, batches: Mapping[str, Batch], step: int) -> dict[str, Batch]:
        """``batches`` of ``step`` with attacked images in those that need them."""
        attacked = {
            stream: batches[stream]._replace(attacked=self.attack(stream, batches[stream], step))
            for stream in self.terms
            if stream in batches
        }
        return {**batches, **attacked}

    def attack(self, stream: str, batch: Batch, step: int) -> Tensor:
        """The images y of ``batch`` after the attack, (B, C, H, W); y itself at eps 0.

        They carry no gradient. The network is as it was afterwards.
        """
        term = self.terms[stream]
        config, aim = self.settings.attack(term.name), term.objective.attack
        config = config if self.warm else config.at(step)
        assert aim is not None
        if config.eps == 0:
            return batch.y
        generator = keyed_generator(batch.y.device, self.seed, "attack", stream, step)
        start, other = self._drawn(batch, config, aim, generator)
        size = -(-len(batch.y) // self.parts)
        found = []
        with _in_eval_mode(self.model), torch.no_grad():
            for first in range(0, len(batch.y), size):
                rows = slice(first, first + size)
                own = Batch(*(None if c is None else c[rows] for c in batch))  # type: ignore[arg-type]
                target = None if other is None else other[rows]
                found.append(self._climb(own, start[rows], target, config, aim))
        return torch.cat(found)

    def _drawn(
        self, batch: Batch, config: AdversarialConfig, aim: AttackTarget, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Where the images start, shape of y, and the labels they are to take, (B,), if any."""
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
        if aim is AttackTarget.DIVERGENCE:
            nudge = torch.randn(shape, generator=generator, device=y.device, dtype=y.dtype)
            return _kept(y + NUDGE * nudge[own], batch), other
        radius = per_chain(config.eps * _scale(batch, config), y)
        offset = _in_unit_ball(shape, config.norm, generator, y)
        return _kept(y + radius * offset[own], batch), other

    def _climb(
        self,
        batch: Batch,
        start: Tensor,
        other: Tensor | None,
        config: AdversarialConfig,
        aim: AttackTarget,
    ) -> Tensor:
        """The images that the steps lead to from ``start``."""
        weights, labels = self._weights(batch, other, aim), _labels(batch)
        scale = _scale(batch, config)

        def density(y: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
            target = WeightedLogProbability(weights)
            energies, (gradient,) = self.computed.value_and_grads(y, batch.sigma, target)
            if config.early_stop:
                label = energies.logits.argmax(dim=1)
                gradient = gradient * per_chain(label == labels, gradient)
            return target(upcast_energies(energies)), gradient

        sampler = Ascent(
            density,
            config.step * scale,
            "sign" if config.norm == "linf" else "l2",
            config.eps * scale,
            config.norm,
            _bounds(batch),
        )
        state = sampler.init(batch.y)._replace(x=start)
        for _ in range(config.steps):
            state, _ = sampler.step(state, _UNUSED)
        return state.x

    def _weights(self, batch: Batch, other: Tensor | None, aim: AttackTarget) -> Tensor:
        """w (B, C), of the log-posteriors whose sum is raised."""
        assert batch.soft is not None
        if aim is AttackTarget.DIVERGENCE:
            return -self.computed.energies(batch.y, batch.sigma).logits.softmax(dim=1)
        if other is not None:
            chosen = torch.nn.functional.one_hot(other, self.model.num_classes)
            return chosen.to(batch.soft)
        return -batch.soft


_UNUSED = torch.Generator()
"""An ascent draws nothing."""


def _in_unit_ball(
    shape: tuple[int, ...], norm: str, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Points spread uniformly over the ball of radius 1, of ``shape`` (B, ...)."""
    device, dtype = like.device, like.dtype
    if norm == "linf":
        return 2 * torch.rand(shape, generator=generator, device=device, dtype=dtype) - 1
    # d of the d + 2 entries of a point on a sphere (Voelker et al. 2017)
    wide = (shape[0], like[0].numel() + 2)
    normal = torch.randn(wide, generator=generator, device=device, dtype=dtype)
    normal = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    points: Tensor = normal[:, :-2].reshape(shape)
    return points


def _labels(batch: Batch) -> Tensor:
    """The label of each image (B,); of a mixed one, the larger part's."""
    assert batch.soft is not None
    return batch.soft.argmax(dim=1)


def _scale(batch: Batch, config: AdversarialConfig) -> Tensor:
    """What lengths of the attack are multiplied with in image units, (B,)."""
    if config.variance_preserving:
        return (1 + (2 * batch.sigma.to(batch.y)).square()).sqrt()
    return torch.ones(len(batch.y), device=batch.y.device, dtype=batch.y.dtype)


def _bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """What each image is clipped to, (B,) twice: [0, 1] where it carries no noise."""
    noisy = batch.sigma > 0
    zero = torch.zeros_like(batch.sigma, dtype=batch.y.dtype)
    return zero.masked_fill(noisy, -torch.inf), (zero + 1).masked_fill(noisy, torch.inf)


def _kept(start: Tensor, batch: Batch) -> Tensor:
    low, high = (per_chain(bound, start) for bound in _bounds(batch))
    return torch.clamp(start, low, high)  # type: ignore[arg-type]


@contextmanager
def _in_eval_mode(model: EnergyModel) -> Iterator[None]:
    """Within, ``model`` is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
