r"""Activation checkpointing that works inside a score.

A block :math:`h = f(x, \theta)` and its vector-Jacobian product (VJP), the gradient that the score
needs, are

.. math::
    g_x = \Bigl(\frac{\partial f}{\partial x}\Bigr)^{\!\top} g =: P(g, x, \theta).

A score-matching loss differentiates the score, so autograd keeps the intermediate tensors of f
*and* of P until the outer backward pass. Checkpointing (Chen et al., arXiv 1604.06174) keeps only
the inputs of f and runs f again when it is differentiated; this module does the same for P:

=============== ======================== ====================================================
differentiating keeps                    computes, when the gradient arrives
=============== ======================== ====================================================
f               :math:`x, \theta`        f again, and its VJP: a call of P
P               :math:`g, x, \theta`     f and P again, and the VJP of P
=============== ======================== ====================================================

This keeps one tensor per block and direction. `torch.utils.checkpoint` cannot do it:
`torch.func.vjp` refuses its saved-tensor hooks, and under `torch.autograd.grad(create_graph=True)`
the tensors recomputed for the score are recorded, and so kept. The cost is three more evaluations
of f and one more of P.

Under `torch.compile` the block is called directly, because the tracer refuses such functions in a
score. The compiler has its own setting, `torch._functorch.config.activation_memory_budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.errors import UserError

DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout
Run = Callable[..., Tensor]
Autocast = Callable[[], AbstractContextManager[object]]


def recompute(block: nn.Module, *x: Tensor) -> Tensor:
    """``block(*x)`` with activation checkpointing: activations are recomputed, not kept.

    Value and derivatives of every order equal those of ``block(*x)``; memory is saved up to second
    order. Works in `torch.func.vjp`, `torch.autograd.grad` and ``backward``, and under autocast,
    whose state is restored. Forward-mode derivatives are not supported. A parameter that the loss
    does not depend on gets a zero gradient, where ``block(*x)`` leaves None.

    Args:
        block: module from tensors to one tensor, the same function at each call: its forward
            must neither draw random numbers nor change buffers. Its hooks run at each call.
        x: inputs of the block, of any shape.

    Raises:
        UserError: if the block updates running statistics or drops activations in training mode.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        out: Tensor = block(*x)
        return out
    _check(block)
    named = dict(block.named_parameters())
    autocast, count = _autocast(x[0].device.type), len(x)  # `run` must not keep x

    def run(*tensors: Tensor) -> Tensor:
        with autocast():
            values = dict(zip(named, tensors[count:], strict=True))
            result: Tensor = torch.func.functional_call(block, values, tensors[:count])
            return result

    out = _Forward.apply(run, *x, *named.values())
    return out


def _check(block: nn.Module) -> None:
    for module in block.modules():
        if not module.training:
            continue
        if getattr(module, "track_running_stats", False):  # of batch and instance norms
            what = "would update its running statistics each time: use another norm (norm=group)"
        elif isinstance(module, (*DROPOUTS, nn.FeatureAlphaDropout)) and module.p > 0:
            what = "would drop other activations each time: set its p to 0"
        else:
            continue
        raise UserError(
            f"activation checkpointing runs each block several times, and {type(module).__name__} "
            f"in training mode {what}, or switch activation checkpointing off"
        )


def _autocast(device_type: str) -> Autocast:
    """A factory of context managers that restore the current autocast state of the device type."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    # a cache would keep the casts of each run
    return lambda: torch.autocast(device_type, dtype, enabled, cache_enabled=False)


def _vjp(
    function: Callable[..., Any], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> Callable[[Any], tuple[Tensor, ...]]:
    """VJP of ``function`` at ``inputs`` with respect to the ``needed`` ones, for one call."""
    chosen = [i for i, want in enumerate(needed) if want]

    def of_chosen(*values: Tensor) -> Any:
        every = list(inputs)
        for i, value in zip(chosen, values, strict=True):
            every[i] = value
        return function(*every)

    vjp = torch.func.vjp(of_chosen, *(inputs[i] for i in chosen))[1]
    return partial(vjp, retain_graph=False)  # frees the graph


def _fill_none(
    gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """``gradients`` of the ``needed`` inputs, and None for the other inputs."""
    left = iter(gradients)
    return tuple(next(left) if want else None for want in needed)


class _Forward(torch.autograd.Function):
    """h = f(x, parameters); saves x and the parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Run, *inputs: Tensor) -> Tensor:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.run = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[1:])
        autocast = _autocast(gradient.device.type)
        gradients = _BlockVjp.apply(ctx.run, autocast, needed, gradient, *ctx.saved_tensors)
        return (None, *_fill_none(gradients, needed))


class _BlockVjp(torch.autograd.Function):
    """The needed gradients of P(g, x, parameters); saves g, x and the parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        run: Run, autocast: Autocast, needed: tuple[bool, ...], gradient: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return _vjp(run, inputs, needed)(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, ctx.autocast, ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        arrived = tuple(g for g in gradients if g is not None)
        if not arrived:
            return (None,) * len(ctx.needs_input_grad)
        used = tuple(g is not None for g in _fill_none(gradients, ctx.needed))

        def vjp(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            vjp_block = _vjp(ctx.run, inputs, used)
            with ctx.autocast():
                return vjp_block(gradient)

        needed = ctx.needs_input_grad[3:]
        again = _vjp(vjp, ctx.saved_tensors, needed)
        found = again(arrived)
        return (None, None, None, *_fill_none(found, needed))
