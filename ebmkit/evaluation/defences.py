r"""Defences: ways in which a joint model classifies an image that may have been attacked.

One of five, with :math:`\epsilon_i` standard normal:

================= ==================================================================
``direct``        :math:`p(c \mid x)`, as the network says
``noise``         :math:`\frac1n \sum_i p(c \mid x + \sigma\epsilon_i)`
``denoise``       :math:`p(c \mid D(x))`, with the same network's denoiser D
``denoise+noise`` :math:`\frac1n \sum_i p(c \mid D(x + \sigma\epsilon_i))`
``refine``        :math:`\frac1n \sum_i p(c \mid x^{(i)}_k)`, with n Langevin chains from x
================= ==================================================================

D is told sigma where noise is added. Where none is, a blind model estimates the level itself, and a
noise-conditional one is told sigma. Neither noisy nor denoised images are clipped: a clipped value
has no gradient, which would hide the attack's way.

A chain of ``refine`` (JEM, arXiv 1912.03263, section 5.3) starts at the image, :math:`x_0 = x`, and
makes k steps :math:`x_{j+1} = x_j + a\, s(x_j) + b\, \xi_j` (`ebmkit.sampling.langevin_move`).
JEM's images u = 2x - 1 are in [-1, 1], with :math:`u' = u + \nabla_u \log p + 0.01\, \xi`. The
gradient by u is half the one by x, and x moves by half of what u does: :math:`a = 1/4` and
:math:`b = 0.005`. This step suits JEM's density, which is nearly flat. The log-density of a model
that was trained to denoise at sigma is curved by up to :math:`1/\sigma^2`, and chains diverge where
a exceeds :math:`2\sigma^2`.

An image is judged on draws of its own, the same at every strength, from its content and a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ebmkit.energy import EnergyModel
from ebmkit.noise import in_255ths
from ebmkit.randomness import hashed_generator
from ebmkit.sampling import langevin_move
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP

DefenceName = Literal["direct", "noise", "denoise", "denoise+noise", "refine"]

DEFENCES: tuple[DefenceName, ...] = get_args(DefenceName)


@dataclass(frozen=True)
class Defence:
    """How an image is classified; see the module's text.

    Args:
        name: one of `DEFENCES`.
        sigma: level of the noise that is added, or that a noise-conditional denoiser is told; image
            units. No matter to ``direct`` and ``refine``.
        steps: k of the chains of ``refine``; 0 leaves images as they are.
        step_size: their a, of which the score is taken, squared image units; JEM's.
        noise_std: their b, of the noise added in each step, image units; JEM's.
    """

    name: DefenceName
    sigma: float = 0.0
    steps: int = 0
    step_size: float = JEM_STEP
    noise_std: float = JEM_NOISE

    @property
    def random(self) -> bool:
        """Whether noise is added, so that draws are averaged over."""
        noisy_chains = self.steps > 0 and self.noise_std > 0
        return self.name in ("noise", "denoise+noise") or noisy_chains

    @property
    def noises(self) -> int:
        """How many images of noise one draw takes: a chain takes one in each step."""
        return max(1, self.steps)

    @property
    def denoises(self) -> bool:
        """Whether images are denoised before they are classified."""
        return self.name in ("denoise", "denoise+noise")

    def description(self, noise_conditional: bool) -> str:
        """What it does, in words, to a model that is told the noise level or is not."""
        level = f"{in_255ths(self.sigma)}/255"
        told = f"told {level}" if noise_conditional else "at its own estimate of the noise"
        return {
            "direct": "the network's label",
            "noise": f"noise {level}, probabilities averaged",
            "denoise": f"denoised by the same network, {told}",
            "denoise+noise": f"noise {level}, denoised, probabilities averaged",
            "refine": f"Langevin, steps of {self.step_size:g}, probabilities averaged",
        }[self.name]


class DefendedClassifier(nn.Module):
    """A defence as a plain classifier: images (B, C, H, W) in, log-probabilities (B, K) out.

    Called, it is what an attacker can differentiate: each call averages over ``draws`` new draws of
    noise, the same for all images. `log_posterior` averages over given ones.

    Args:
        model: in evaluation mode, with labels.
        defence: how it classifies.
        draws: how many draws of noise, or chains, each call averages over; no matter without noise.
        seed: of these draws; see `restart`.
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
        """Draw anew from ``seed``, any text."""
        self._generator = hashed_generator(seed)

    def forward(self, x: Tensor) -> Tensor:
        """log of the class probabilities, (B, K)."""
        if not self.defence.random:
            return self.log_posterior(x, None)
        count = self.draws * self.defence.noises
        return self.log_posterior(x, torch.randn(count, *x.shape[1:], generator=self._generator))

    def log_posterior(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """log of the class probabilities (B, K), averaged over draws of ``noise``.

        Args:
            x: images (B, C, H, W).
            noise: standard normal, (n, C, H, W) for all images or (B, n, C, H, W) for each its own;
                n k for n chains of k steps; not looked at by a defence that adds none.
        """
        y, told, draws = x, None, 1
        if self.defence.steps:
            y = self.purify(x, noise if self.defence.random else None)
            draws = len(y) // len(x)
        elif self.defence.random:
            assert noise is not None
            draws, told = noise.shape[-4], self.defence.sigma
            y = (x[:, None] + told * noise.to(x)).flatten(0, 1)
        if self.defence.denoises:
            if self.model.noise_conditional:
                told = self.defence.sigma
            y, told = self.model.denoise(y, told), None
        log_p = self.model.logits(y, told).log_softmax(dim=1)
        log_p = log_p.reshape(len(x), draws, -1)
        return log_p.logsumexp(dim=1) - math.log(draws)

    def purify(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Where n Langevin chains from each image end, (B n, C, H, W), those of an image together.

        Args:
            x: images (B, C, H, W).
            noise: standard normal, (n k, C, H, W) or (B, n k, C, H, W), a chain's steps together;
                None: one chain without noise.
        """
        chain = self.defence
        if noise is None:
            noise = x.new_zeros(chain.steps, *x.shape[1:])
        xi = noise.to(x).reshape(*noise.shape[:-4], -1, chain.steps, *x.shape[1:])
        xi = xi.expand(len(x), *xi.shape[-5:]).flatten(0, 1)
        y = x.repeat_interleave(len(xi) // len(x), dim=0)
        for step in range(chain.steps):
            score = self.model.score(y)
            y = langevin_move(y, score, chain.step_size, chain.noise_std, xi[:, step])
        return y


def predicted_labels(target: DefendedClassifier, x: Tensor, noise: Tensor | None) -> Tensor:
    """The label (B,) that images are given; -1, never right, where there is no finite one."""
    draws = 1 if noise is None else noise.shape[1] // target.defence.noises
    size = max(1, len(x) * target.draws // draws)  # as many rows at a time as in an attack
    labels = []
    with torch.no_grad():
        for at in range(0, len(x), size):
            rows = slice(at, at + size)
            log_p = target.log_posterior(x[rows], None if noise is None else noise[rows])
            labels.append(log_p.argmax(dim=1).where(log_p.isfinite().any(dim=1), -1))
    return torch.cat(labels)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, gradients are on, and no parameter needs one (AutoAttack calls ``backward``)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
