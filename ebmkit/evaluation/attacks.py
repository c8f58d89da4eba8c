r"""Defences of a classifier, and attacks through them: PGD (`ebmkit.attacks`) and AutoAttack.

A defence is one of five ways in which a joint model classifies an image x, with
:math:`\epsilon_i` standard normal:

================= ==================================================================
``direct``        :math:`p(c \mid x)` of the network
``noise``         :math:`\frac1n \sum_i p(c \mid x + \sigma\epsilon_i)`
``denoise``       :math:`p(c \mid D(x))`, with the same network's denoiser D
``denoise+noise`` :math:`\frac1n \sum_i p(c \mid D(x + \sigma\epsilon_i))`
``refine``        :math:`\frac1n \sum_i p(c \mid x^{(i)}_k)`, with n Langevin chains from x
================= ==================================================================

If the defence adds noise, D gets its sigma. If not, a blind model estimates the level itself, and a
noise-conditional model gets sigma. Noisy and denoised images are not clipped: clipped values have
no gradient, which would weaken attacks. The noise draws with which an image is classified depend on
its content and a seed; they are the same at every strength.

A chain of ``refine`` (JEM, arXiv 1912.03263, section 5.3) starts at the image, :math:`x_0 = x`, and
makes k steps :math:`x_{j+1} = x_j + a\, s(x_j) + b\, \xi_j` (`ebmkit.sampling.langevin_move`).
JEM's images u = 2x - 1 are in [-1, 1], with :math:`u' = u + \nabla_u \log p + 0.01\, \xi`. The
gradient by u is half the gradient by x, and x moves half as far as u: :math:`a = 1/4` and
:math:`b = 0.005`. This step suits JEM's density, which is nearly flat. The log-density of a model
trained to denoise at sigma has curvature up to :math:`1/\sigma^2`, and chains diverge if a exceeds
:math:`2\sigma^2`.

An attack of strength :math:`\epsilon` searches for a misclassified image :math:`x'` in
:math:`[0, 1]^d` with :math:`\|x' - x\| \le \epsilon`, by the gradient of
:math:`-\log p(c \mid x')` of the true label c, through the defence. The gradient of a denoiser
contains second derivatives of the model. If the defence adds noise, each gradient is that of an
average over new draws (expectation over transformation, Athalye et al. 2018): the attacker knows
the defence, but not its draws. Random starts depend on the content of the image and a seed.

AutoAttack (Croce and Hein, arXiv 2003.01690) is a parameter-free ensemble of attacks, used in its
version for randomised classifiers against defences that add noise. It needs pyautoattack:
``pip install 'ebmkit-vision[autoattack]'``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ebmkit.attacks import (
    Norm,
    gradient_of,
    minimal_epsilons,
    noise_of_norm,
    projected_gradient_descent,
    random_start,
)
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.noise import in_255ths
from ebmkit.randomness import hashed_generator, image_generators
from ebmkit.sampling import langevin_move
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP

STEPSIZE = 0.2
"""Step size of PGD relative to the strength. In 40 steps of the usual 0.03 or 0.06, PGD did not
break some images of digits that it breaks with this step size, as AutoAttack does."""

AUTOATTACK_TARGETS = 9
"""Maximum number of target labels of AutoAttack."""


DefenceName = Literal["direct", "noise", "denoise", "denoise+noise", "refine"]

DEFENCES: tuple[DefenceName, ...] = get_args(DefenceName)


@dataclass(frozen=True)
class Defence:
    """A defence; see the table of the module."""

    name: DefenceName
    sigma: float = 0.0
    """level of the added noise, or given to a noise-conditional denoiser, image units; not used by
    ``direct`` and ``refine``"""
    steps: int = 0
    """number of steps k of the chains of ``refine``; 0 leaves images unchanged"""
    step_size: float = JEM_STEP
    """step size a of ``refine``, squared image units; default: JEM's"""
    noise_std: float = JEM_NOISE
    """standard deviation b of the noise of each step of ``refine``, image units; default: JEM's"""

    def __post_init__(self) -> None:
        if self.steps and self.name != "refine":
            raise UserError(f"defence {self.name!r} takes no steps: only 'refine' does")

    @property
    def random(self) -> bool:
        """Whether the defence adds noise and so averages over draws."""
        chains = self.steps > 0 and self.noise_std > 0
        return self.name in ("noise", "denoise+noise") or chains

    @property
    def noises(self) -> int:
        """Number of noise images per draw: one per step of a chain, otherwise one."""
        return max(1, self.steps)

    @property
    def denoises(self) -> bool:
        """Whether the defence denoises images before classification."""
        return self.name in ("denoise", "denoise+noise")

    def description(self, noise_conditional: bool) -> str:
        """The defence in words, for a noise-conditional or a blind model."""
        level = f"{in_255ths(self.sigma)}/255"
        how = f"given {level}" if noise_conditional else "at its own estimate of the noise"
        return {
            "direct": "the network's label",
            "noise": f"noise {level}, probabilities averaged",
            "denoise": f"denoised by the same network, {how}",
            "denoise+noise": f"noise {level}, denoised, probabilities averaged",
            "refine": f"Langevin, steps of {self.step_size:g}, probabilities averaged",
        }[self.name]


class DefendedClassifier(nn.Module):
    """A defended model as a classifier: images (B, C, H, W) to log-probabilities (B, K).

    ``forward``, which attackers differentiate, averages over ``draws`` new draws of noise, the same
    for all images. `log_posterior` averages over given draws.

    Args:
        model: the model, with labels, in evaluation mode.
        defence: the defence.
        draws: number of noise draws, or chains, per call.
        seed: random seed of these draws, any text.
    """

    def __init__(
        self, model: EnergyModel, defence: Defence, draws: int = 1, seed: str = ""
    ) -> None:
        super().__init__()
        self.model = model
        self.defence = defence
        self.draws = draws
        self.restart(seed)
        self.eval()

    def restart(self, seed: str) -> None:
        """Restart the noise draws from ``seed``, any text."""
        self._generator = hashed_generator(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, K) of images x (B, C, H, W)."""
        if not self.defence.random:
            return self.log_posterior(x, None)
        count = self.draws * self.defence.noises
        return self.log_posterior(x, torch.randn(count, *x.shape[1:], generator=self._generator))

    def log_posterior(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Log of the class probabilities (B, K) averaged over draws of ``noise``.

        Args:
            x: images (B, C, H, W).
            noise: standard normal, (n, C, H, W) shared by all images or (B, n, C, H, W) per image;
                n k in place of n for n chains of k steps; ignored if the defence adds no noise.
        """
        y, sigma, draws = x, None, 1
        if self.defence.steps:
            y = self.purify(x, noise if self.defence.random else None)
            draws = len(y) // len(x)
        elif self.defence.random:
            assert noise is not None
            draws, sigma = noise.shape[-4], self.defence.sigma
            y = rearrange(x[:, None] + sigma * noise.to(x), "b n c h w -> (b n) c h w")
        if self.defence.denoises:
            if self.model.noise_conditional:
                sigma = self.defence.sigma
            y, sigma = self.model.denoise(y, sigma), None
        log_p = self.model.logits(y, sigma).log_softmax(dim=1)
        log_p = rearrange(log_p, "(b n) k -> b n k", n=draws)
        return log_p.logsumexp(dim=1) - math.log(draws)

    def purify(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """End points (B n, C, H, W) of n Langevin chains from each image, grouped by image.

        Args:
            x: images (B, C, H, W).
            noise: standard normal, (n k, C, H, W) or (B, n k, C, H, W), grouped by chain; None: one
                chain without noise.
        """
        chain = self.defence
        if noise is None:
            noise = x.new_zeros(chain.steps, *x.shape[1:])
        noise = noise.to(x).expand(len(x), *noise.shape[-4:])
        xi = rearrange(noise, "b (n k) c h w -> (b n) k c h w", k=chain.steps)
        y = repeat(x, "b c h w -> (b n) c h w", n=len(xi) // len(x))
        for step in range(chain.steps):
            score = self.model.score(y)
            y = langevin_move(y, score, chain.step_size, chain.noise_std, xi[:, step])
        return y


def predicted_labels(target: DefendedClassifier, x: Tensor, noise: Tensor | None) -> Tensor:
    """Predicted labels (B,); -1, which is never correct, if no log-probability is finite."""
    draws = 1 if noise is None else noise.shape[1] // target.defence.noises
    size = max(1, len(x) * target.draws // draws)  # so that a call is no larger than in an attack
    labels = []
    with torch.no_grad():
        for at in range(0, len(x), size):
            rows = slice(at, at + size)
            log_p = target.log_posterior(x[rows], None if noise is None else noise[rows])
            labels.append(log_p.argmax(dim=1).where(log_p.isfinite().any(dim=1), -1))
    return torch.cat(labels)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context with gradients enabled and parameters frozen (AutoAttack calls ``backward``)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Attack:
    """An attack on a classifier of images in [0, 1]."""

    norm: Norm
    """norm of the strength"""
    kind: Literal["pgd", "one-step", "noise"] = "pgd"
    """``pgd``; ``one-step``, the fast gradient method from the image itself; or ``noise``, noise of
    full strength without gradients, uniform for l_inf and Gaussian for l_2"""
    steps: int = 40
    """number of steps of PGD"""
    restarts: int = 1
    """number of starts of PGD, or of noise draws; each attacks only the images not yet broken"""
    stepsize: float | None = None
    """step size of PGD, relative to the strength; None: the larger of `STEPSIZE` and 2.5 / steps,
    which crosses the ball in few steps"""

    def succeeds(
        self,
        target: DefendedClassifier,
        x: Tensor,
        labels: Tensor,
        epsilon: float,
        noise: Tensor | None = None,
        seed: str = "",
    ) -> Tensor:
        """Whether each image is misclassified after the attack, (B,) bool.

        Args:
            target: the classifier.
            x: images (B, C, H, W) in [0, 1].
            labels: true labels (B,).
            epsilon: strength, image units.
            noise: noise with which attacked images are classified, (B, n, C, H, W); see
                `DefendedClassifier.log_posterior`.
            seed: random seed of the starts and the attacker's draws, any text.

        Raises:
            UserError: if ``x`` has values outside [0, 1].
        """
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            raise UserError(
                f"images with values from {low:.4g} to {high:.4g} cannot be attacked: they must be "
                "within [0, 1]"
            )
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for number in range(self.restarts):
            left = torch.nonzero(~broken).squeeze(1)
            if len(left) == 0:
                break
            key = f"{seed} {self.norm} {self.kind} {epsilon:.9g} {number}"
            found = self.perturbed(target, x[left], labels[left], epsilon, key)
            own = None if noise is None else noise[left]
            broken[left] = predicted_labels(target, found, own) != labels[left]
        return broken

    def perturbed(
        self, target: DefendedClassifier, x: Tensor, labels: Tensor, epsilon: float, seed: str = ""
    ) -> Tensor:
        """Attacked images (B, C, H, W) in [0, 1], from one start of the attack."""
        generators = image_generators(x, seed)
        if self.kind == "noise":
            return noise_of_norm(x, epsilon, self.norm, generators)

        def loss(y: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(target(y), labels, reduction="none")

        start, steps, stepsize = None, 1, 1.0
        if self.kind == "pgd":
            start = random_start(x, epsilon, self.norm, generators)
            steps, stepsize = self.steps, self.stepsize or max(STEPSIZE, 2.5 / self.steps)
        target.restart(seed)
        with frozen(target):
            return projected_gradient_descent(
                gradient_of(loss),
                x,
                epsilon,
                self.norm,
                steps=steps,
                step_size=stepsize * epsilon,
                start=start,
            )

    def minimal_epsilons(
        self,
        target: DefendedClassifier,
        x: Tensor,
        labels: Tensor,
        epsilons: Sequence[float],
        noise: Tensor | None = None,
        seed: str = "",
        done: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """`ebmkit.attacks.minimal_epsilons` of each image, (B,) float64, by `succeeds`."""

        def succeeds(rows: Tensor, epsilon: float) -> Tensor:
            own = None if noise is None else noise[rows]
            return self.succeeds(target, x[rows], labels[rows], epsilon, own, seed)

        wrong = predicted_labels(target, x, noise) != labels
        return minimal_epsilons(succeeds, wrong, epsilons, done)


def check_autoattack() -> None:
    """Raise `UserError` if pyautoattack is not installed."""
    if find_spec("pyautoattack") is None:
        raise UserError(
            "AutoAttack needs the package pyautoattack, which is not installed: "
            "pip install 'ebmkit-vision[autoattack]', or turn autoattack off"
        )


def autoattack(
    target: DefendedClassifier,
    norm: Norm,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    noise: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Whether each image is misclassified after AutoAttack, (B,) bool; see `Attack.succeeds`.

    Images that are misclassified without an attack are not attacked. Attacks with a margin loss are
    skipped below three classes, four if targeted, and Square in l2 below five pixels per side.
    Random numbers come from torch's global generator, so they depend on the batch; its state is
    restored afterwards.

    Raises:
        UserError: if pyautoattack is not installed.
    """
    check_autoattack()
    from pyautoattack import AutoAttack

    broken = predicted_labels(target, x, noise) != labels
    left = torch.nonzero(~broken).squeeze(1)
    if len(left) == 0:
        return broken
    logging.getLogger("auto-attack").addHandler(logging.NullHandler())  # it logs its steps
    classes, least = target.model.num_classes, {"apgd-dlr": 3, "apgd-t": 4}
    tiny = norm == "l2" and min(x.shape[-2:]) < 5
    target.restart(f"autoattack {seed}")
    with torch.random.fork_rng([x.device] if x.is_cuda else []), frozen(target):
        adversary = AutoAttack(
            target,
            device=x.device,
            eps=epsilon,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            seed=seed,
            version="rand" if target.defence.random else "standard",
        )
        adversary.attacks_to_run = [
            name
            for name in adversary.attacks_to_run
            if classes >= least.get(name, 2) and not (tiny and name == "square")
        ]
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(AUTOATTACK_TARGETS, classes - 1)
        found = adversary.run_standard_evaluation(x[left], labels[left], batch_size=len(left))[0]
    own = None if noise is None else noise[left]
    broken[left] = predicted_labels(target, found.detach().clamp(0, 1), own) != labels[left]
    return broken
