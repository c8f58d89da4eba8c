r"""Parameter updates: learning rate, optimisers, averaged weights, sharpness-aware minimisation.

**Learning rate.** At step t of T it is :math:`\eta_t = \tfrac12 \eta\,(1 + \cos(\pi t / T))` (CDN
appendix A), after an optional linear warm-up. JEM multiplies the rate by a factor at milestones
instead. Schedule ``linear`` is :math:`\eta_t = \eta\,(1 - t/T)`; ``warmup-stable-decay``, which
decays over the last share s of the steps, is :math:`\eta_t = \eta \min(1, (T - t) / sT)`.

**SGD** is :math:`v \leftarrow \mu v + \nabla L + \lambda\theta,\ \theta \leftarrow \theta -
\eta v`. **Muon** (Jordan et al., 2024; Liu et al., 2502.16982) orthogonalises the momentum of
matrices. A weight of shape (R, ...) is a matrix W of R rows and C columns. Its rows are outputs of
the layer, or inputs of a transposed convolution, with weight (in, out, h, w). With gradient G,

.. math::
    M \leftarrow \mu M + (1 - \mu) G, \qquad U = \mu M + (1 - \mu) G, \qquad
    W \leftarrow (1 - \eta\lambda) W - 0.2 \sqrt{\max(R, C)}\; \eta\, \operatorname{NS}(U) ,

without Nesterov momentum :math:`U = M`. NS brings every singular value near 1 in five steps of
:math:`X \leftarrow a X + (b A + c A^2) X,\ A = X X^\top`, from :math:`X = U / \|U\|_F`; the factor
makes the update as large as AdamW's, 0.2 per entry. AdamW updates all other parameters. Since
:math:`X_{k+1} = P_k X_k` with :math:`P_k = aI + bA_k + cA_k^2`, and :math:`A_{k+1} = P_k A_k P_k`,
a matrix at least twice as long as wide needs two large products instead of ten: with its transpose
for :math:`A_0`, and with :math:`P_4 \cdots P_0`. This requires float32: in bfloat16, on CUDA,
:math:`A_0` would lose too much precision, so there the ten products are computed.
`torch.optim.Muon` takes matrices only. timm's Muon (1.0.31) takes convolutions and resumes
bit-identically, but multiplies in bfloat16 on every device, one matrix at a time, replaces AdamW by
NAdamW if the momentum is Nesterov's, and cannot skip an update by ``found_inf``.

**Averaged weights.** With decay d, the average :math:`\bar\theta` of t steps is updated by

.. math:: \bar\theta \leftarrow d_t \bar\theta + (1 - d_t)\,\theta, \qquad d_t = d .

With warm-up, :math:`d_t = \min(d, (1 + t) / (10 + t))` averages over a fixed share of the steps so
far until d is reached, so the initial weights soon lose their influence.

**Sharpness-aware minimisation** computes the gradient at a point of higher loss, at twice the cost
of a step (SAM, Foret et al., arXiv 2010.01412, eq. 2-4),

.. math::
    \hat\epsilon = \rho\, \frac{\nabla L(\theta)}{\|\nabla L(\theta)\|}, \qquad
    \theta \leftarrow \theta - \eta\, \nabla L(\theta + \hat\epsilon) .

The adaptive form (ASAM, Kwon et al., arXiv 2102.11600, eq. 8) perturbs each weight in units of its
own size, :math:`\hat\epsilon = \rho\, \theta^2 \nabla L / \| |\theta| \nabla L \|`. SADA-JEM
(arXiv 2209.07959) trains JEM with the adaptive form and rho 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebmkit.errors import UserError, shown
from ebmkit.training.config import OptimizerConfig

MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
"""Layers whose weights Muon updates; AdamW updates ConvTranspose1d and ConvTranspose3d."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
EPS = 1e-7

Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    rate = config.lr * warm
    match config.schedule:
        case "milestones":
            passed = sum(step >= round(share * steps) for share in config.milestones)
            return rate * config.milestone_factor**passed
        case "linear":
            return rate * (1 - step / steps)
        case "warmup-stable-decay":
            assert config.decay_share is not None
            return rate * min(1.0, (steps - step) / (config.decay_share * steps))
        case "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW or SGD over all parameters, or Muon for matrices and AdamW for the rest.

    Matrices are the weights of convolutions and linear layers outside the model's module ``head``;
    ``adamw_for`` assigns further ones to AdamW, for example a head of another name. Vectors and
    scalars have weight decay only with ``decay_norms``. Every optimiser skips the update if the
    training step has found NaN or Inf (attribute ``found_inf``).

    Raises:
        UserError: if Muon finds no matrices, or an entry of ``adamw_for`` matches none.
    """
    matrices = _matrices(model, config)
    own = {id(p) for p in matrices}
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        params = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        params = [p for p in params if (config.decay_norms or p.ndim > 1) == decays]
        if params:
            groups.append({"params": params, "weight_decay": decays * config.weight_decay})
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    assert config.adamw_lr is not None
    for group in groups:
        group["rate_scale"] = config.adamw_lr / config.lr
    settings = config.momentum, bool(config.nesterov), config.weight_decay, config.betas
    return Muon(matrices, groups, config.lr, *settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; the rate of Muon's AdamW changes in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def optimizer_flops(model: nn.Module, config: OptimizerConfig) -> int:
    """FLOPs of the matrix products of an update: Muon orthogonalises each matrix once."""
    total = 0
    for matrix in _matrices(model, config):
        small, large = sorted(to_matrix(matrix))
        if uses_factor_product(matrix, small, large):
            total += 4 * small**2 * large + (8 * NS_STEPS - 6) * small**3
        else:
            total += NS_STEPS * (4 * small**2 * large + 2 * small**3)
    return total


def state_values_per_parameter(model: nn.Module, config: OptimizerConfig) -> Fraction:
    """Mean number of optimiser state values per parameter, including averaged weights."""
    average, momentum = int(config.ema is not None), int(config.momentum > 0)
    if config.kind != "muon":
        return Fraction(average + (2 if config.kind == "adamw" else momentum))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = count - sum(p.numel() for p in _matrices(model, config))
    return average + momentum + Fraction(rest, count)


def _matrices(model: nn.Module, config: OptimizerConfig) -> list[nn.Parameter]:
    """Parameters that Muon updates: weights of convolutions and linear layers outside ``head``."""
    if config.kind != "muon":
        return []
    part = getattr(model, "head", None)
    seen = {id(p) for p in part.parameters()} if isinstance(part, nn.Module) else set()
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, MATRIX_LAYERS):
            weight = module.weight  # a plain tensor if a parametrization computes it
            if isinstance(weight, nn.Parameter) and weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))  # layers may share a weight
                found[f"{name}.weight"] = weight
    for part in config.adamw_for:
        if not any(part in name for name in found):
            raise UserError(
                f"optimizer.adamw_for names {shown(part)}, which matches no matrix: "
                f"the matrices are {', '.join(found) or 'none'}"
            )
    chosen = [p for name, p in found.items() if not any(n in name for n in config.adamw_for)]
    if not chosen:
        raise UserError(
            "optimizer.kind=muon updates weight matrices of convolutions and linear layers, and "
            "none is left beside the head: use optimizer.kind=adamw"
        )
    return chosen


class Muon(torch.optim.Optimizer):
    """Muon for matrices, fused AdamW for the rest; both skip the update if ``found_inf`` is set.

    Elementwise operations run on all weights as one vector, ordered by shape, so that weights of
    equal shape are adjacent and are multiplied as one batch.

    Args:
        matrices: weights of at least two dimensions; the first dimension is the rows.
        rest: parameter groups for AdamW.
        lr: learning rate of the matrices.
        momentum, nesterov, weight_decay: mu, whether to use Nesterov momentum, and lambda.
        betas: betas of AdamW.

    Attributes:
        found_inf: scalar on the device; above 0, parameters and states keep their values.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Sequence[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True) if rest else None
        self.found_inf = torch.zeros(())
        groups = self.adamw.param_groups if self.adamw else []
        super().__init__([{"params": [*matrices], **own}, *groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        group, *rest = self.param_groups
        self._move(group)
        if self.adamw is not None:  # loading a state replaces its containers
            self.adamw.param_groups, self.adamw.state = rest, self.state
            self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self.adamw.step()

    def _move(self, group: dict[str, Any]) -> None:
        weights = sorted((p for p in group["params"] if p.grad is not None), key=to_matrix)
        for p in (p for p in weights if "momentum_buffer" not in self.state[p]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if not weights:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        gradients = [p.grad for p in weights]
        w, m, g = (torch.cat([t.flatten() for t in own]) for own in (weights, buffers, gradients))
        mu, lr = group["momentum"], group["lr"]
        momentum = m.lerp(g, 1 - mu)
        update = g.lerp_(momentum, mu) if group["nesterov"] else momentum.clone()
        left = update
        for (rows, columns), same in itertools.groupby(weights, to_matrix):
            count = len(list(same)) * rows * columns
            part, left = left[:count].view(-1, rows, columns), left[count:]
            part.copy_(orthogonalize(part)).mul_(0.2 * max(rows, columns) ** 0.5)
        moved = (w * (1 - lr * group["weight_decay"])).sub_(update, alpha=lr)
        failed = self.found_inf.to(w.device) > 0
        for targets, new, old in ((weights, moved, w), (buffers, momentum, m)):
            parts = torch.split(torch.where(failed, old, new), [t.numel() for t in targets])
            for part, target in zip(parts, targets, strict=True):
                target.copy_(part.view(target.shape))


def orthogonalize(x: Tensor) -> Tensor:
    """Orthogonalise matrices (N, R, C): the same singular vectors, singular values of 0.7 to 1.2.

    Singular values below about a thousandth of the matrix's norm remain smaller. On CUDA the
    products are in bfloat16.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(EPS)
    if uses_factor_product(x, *x.shape[1:]):
        gram, product = x @ x.mT, torch.empty(0)
        for left in reversed(range(NS_STEPS)):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor @ product if left < NS_STEPS - 1 else factor
            gram = factor @ gram @ factor if left else gram
        return product @ x
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def uses_factor_product(x: Tensor, small: int, large: int) -> bool:
    """Whether NS multiplies matrices like ``x`` once, by the product of the five factors."""
    return not x.is_cuda and large >= 2 * small


def to_matrix(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of ``weight`` as a matrix."""
    return weight.shape[0], weight[0].numel()


def exponential_average(
    model: nn.Module, decay: float | None, warmup: bool = False
) -> AveragedModel | None:
    """Averaged weights of ``model``, with constant decay or warm-up; None without a decay."""
    if decay is None:
        return None

    def move(means: Tensors, now: Tensors, count: Tensor | int) -> None:
        t = int(count)
        own = min(decay, (1 + t) / (10 + t)) if warmup else decay
        get_ema_multi_avg_fn(own)(means, now, count)  # type: ignore[no-untyped-call]

    return AveragedModel(model, multi_avg_fn=move, use_buffers=False)


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module, failed: Tensor) -> None:
    """Move ``average`` towards ``model``, bit-identical to `AveragedModel.update_parameters`.

    If ``failed``, a scalar on the device, is above 0, the averaged weights keep their values,
    without synchronisation with the host. The step is counted in either case.
    """
    assert average.multi_avg_fn is not None
    own = [p.detach() for p in average.module.parameters()]
    ahead = [
        torch.where(failed > 0, mean, p) for mean, p in zip(own, model.parameters(), strict=True)
    ]
    if int(average.n_averaged) == 0:  # on the CPU
        for mean, p in zip(own, ahead, strict=True):
            mean.copy_(p)
    else:
        average.multi_avg_fn(own, ahead, average.n_averaged)
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        mean.copy_(buffer)
    average.n_averaged += 1


@dataclass(frozen=True)
class SAM:
    """Size ``rho`` of the perturbation, and whether (``adaptive``) in units of each weight."""

    rho: float
    adaptive: bool = False

    @contextmanager
    def perturbed(self, module: nn.Module) -> Iterator[None]:
        """Within the context, the parameters of ``module`` are perturbed along their gradients.

        Afterwards they are restored, bit for bit. Running statistics of BatchNorm do not change.
        """
        moved = [(p, p.grad) for p in module.parameters() if p.grad is not None]
        sizes = [p.detach().abs() if self.adaptive else torch.ones_like(p) for p, _ in moved]
        norm = nn.utils.get_total_norm([s * g for s, (_, g) in zip(sizes, moved, strict=True)])
        scale = self.rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        before = [p.detach().clone() for p, _ in moved]
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        momenta = [(m, m.momentum) for m in module.modules() if isinstance(m, kinds)]
        with torch.no_grad():
            for (p, gradient), size in zip(moved, sizes, strict=True):
                p.add_(scale * size.square() * gradient)
        for norm_layer, _ in momenta:
            norm_layer.momentum = 0.0
        try:
            yield
        finally:
            for norm_layer, momentum in momenta:
                norm_layer.momentum = momentum
            with torch.no_grad():
                for (p, _), old in zip(moved, before, strict=True):
                    p.copy_(old)
