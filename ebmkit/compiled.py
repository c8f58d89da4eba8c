r"""How a model is computed where only its values are wanted: precision, and a compiled score.

Every quantity of `ebmkit.core` is a function of one forward pass and of what is pulled back through
it. A compiler sees the two together,

.. math:: (y, \sigma, c) \mapsto f\bigl(\ell(y, \sigma),\; J_\ell(y, \sigma)^\top v\bigr),

as one function of tensors without derivatives, so nothing is kept for a backward pass. Noise levels
and labels enter as tensors: another level is not another function.

A compilation takes seconds on a CPU and about a minute on a GPU, so not every size is worth one. A
function is compiled for a size that it is called with *twice in a row*, as a sampler or an
evaluation does, up to `SIZES` sizes; any other call runs eagerly. A last, smaller batch never costs
a compilation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ebmkit.compute import Precision, autocast, pick_compile, pick_precision, set_tf32
from ebmkit.errors import UserError
from ebmkit.linearization import Linearization, Noise

if TYPE_CHECKING:
    from ebmkit.core import ScoreModel

__all__ = ["PAYS", "SIZES", "Inference", "device_of", "inferring", "make_inference"]

SIZES = 8
"""For how many sizes each function is compiled at most."""

PAYS = 300.0
"""Seconds of eager work ahead from which on ``auto`` compiles: a compilation takes about a minute,
and less than half of the time may be saved."""

T = TypeVar("T")
R = TypeVar("R", covariant=True)

Mode = Literal["auto", "on", "off"]
_Key = tuple[object, ...]


class Wanted(Protocol[R]):
    """What is made of one forward pass; when compiled, it gets sigma as (B,)."""

    def __call__(self, at: Linearization, sigma: Noise | None, c: Tensor | None, /) -> R: ...


class Inference:
    """How one model's scores and the like are computed where no gradient of them is wanted.

    A copy of a model, and a model that is pickled, starts without: at float32, not compiled.

    Args:
        precision: what the network computes in; results are float32.
        mode: ``on`` compiles; ``auto`` compiles once `expect` was told of enough work.
        backend: what `torch.compile` compiles with.

    Attributes:
        precision: as given.
        mode: as given.
        compiling: whether sizes that repeat are compiled from now on.
    """

    def __init__(
        self,
        precision: Precision = "fp32",
        mode: Mode = "off",
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.precision = precision
        self.mode = mode
        self.compiling = mode == "on"
        self._backend = backend
        self._last: dict[_Key, _Key] = {}
        self._compiled: dict[_Key, dict[_Key, Callable[..., Any]]] = {}

    def __reduce__(self) -> tuple[type[Inference], tuple[()]]:
        return Inference, ()

    @property
    def compiled(self) -> bool:
        """Whether anything was compiled so far."""
        return any(self._compiled.values())

    def expect(self, seconds: float) -> None:
        """Compile from now on if ``seconds`` of eager work lie ahead, enough for it to pay."""
        if self.mode == "auto" and seconds > PAYS:
            self.compiling = True

    def __call__(
        self,
        wanted: Wanted[T],
        model: ScoreModel,
        differentiate: bool,
        y: Tensor,
        sigma: Noise | None,
        c: Tensor | None,
    ) -> T:
        """``wanted(at, sigma, c)`` of one forward pass ``at`` of ``model`` at ``y``.

        Eagerly and in float32 where a gradient of the result is wanted. The arguments are those of
        `ScoreModel.infer`.

        Raises:
            UserError: if it cannot be compiled and must be.
        """
        if torch.compiler.is_compiling():
            return _evaluate(wanted, model, self.precision, differentiate, y, sigma, c)
        if _gradient_wanted(model, y, sigma):
            return _evaluate(wanted, model, "fp32", differentiate, y, sigma, c)
        with torch.no_grad():  # a frozen model keeps nothing, whether or not its user says so
            if self.compiling and not (model.training and model.has_batch_norm):
                kind = (wanted, differentiate, sigma is None, c is None)
                size = (y.shape, y.stride(), y.dtype, y.device, model.training)
                call = self._compiled_for(kind, size)
                if call is not None:
                    arguments = (wanted, model, self.precision, differentiate)
                    try:
                        with torch.inference_mode(False), torch.no_grad():
                            found: T = call(*arguments, *_as_tensors(y, sigma, c))
                            return found
                    except torch._dynamo.exc.TorchDynamoException as error:
                        self._give_up(error)
            return _evaluate(wanted, model, self.precision, differentiate, y, sigma, c)

    def _compiled_for(self, kind: _Key, size: _Key) -> Callable[..., Any] | None:
        """The function compiled for this kind and size of arguments, if that is worth it."""
        sizes = self._compiled.setdefault(kind, {})
        again = self._last.get(kind) == size
        self._last[kind] = size
        if size not in sizes and again and len(sizes) < SIZES:
            # what was compiled is kept, and counted, by code object: each gets its own
            own = FunctionType(_evaluate.__code__.replace(), _evaluate.__globals__)
            sizes[size] = torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)
        return sizes.get(size)

    def _give_up(self, error: Exception) -> None:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if self.mode == "on":
            raise UserError(
                f"the model cannot be compiled: {reason}; use --compile off (compile='off')"
            ) from None
        warnings.warn(f"not compiled, running eagerly: {reason}", stacklevel=5)
        self.compiling = False
        self._compiled.clear()


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` is; the CPU if it has neither parameters nor buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def make_inference(model: ScoreModel, precision: str, compile: str) -> Inference:
    """The `Inference` of these names on the model's device; see `ScoreModel.set_inference`.

    Raises:
        UserError: if a name is unknown, or the device lacks the precision or a compiler.
    """
    device = device_of(model)
    chosen = pick_precision("fp32" if precision == "auto" else precision, device)
    possible = pick_compile(compile, device)
    mode: Mode = "off" if not possible else "on" if compile == "on" else "auto"
    set_tf32(device, chosen)
    return Inference(chosen, mode)


@contextmanager
def inferring(model: ScoreModel, precision: str, compile: str) -> Iterator[Inference]:
    """`ScoreModel.set_inference` for as long as the context lasts.

    Raises:
        UserError: as it does.
    """
    before = model.inference
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = (cuda.allow_tf32, cudnn.allow_tf32) if device_of(model).type == "cuda" else None
    inference = make_inference(model, precision, compile)
    if (inference.precision, inference.mode) == (before.precision, before.mode):
        inference = before  # with all that it has compiled
    model.inference = inference
    try:
        yield inference
    finally:
        model.inference = before
        if allowed is not None:
            cuda.allow_tf32, cudnn.allow_tf32 = allowed


def _evaluate(
    wanted: Wanted[T],
    model: ScoreModel,
    precision: Precision,
    differentiate: bool,
    y: Tensor,
    sigma: Noise | None,
    c: Tensor | None,
) -> T:
    """``wanted`` of one forward pass at ``precision``."""
    with autocast(y.device, precision):
        at = model.at(y, sigma, differentiate)
    return wanted(at, sigma, c)


def _gradient_wanted(model: ScoreModel, y: Tensor, sigma: Noise | None) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    inputs = [y, sigma] if isinstance(sigma, Tensor) else [y]
    return any(t.requires_grad for t in (*inputs, *model.parameters()))


def _as_tensors(
    y: Tensor, sigma: Noise | None, c: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments as a compiler takes them, the noise level as (B,), like y."""
    if sigma is not None:
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y)).contiguous()
    return _own(y.detach()), sigma if sigma is None else _own(sigma), c if c is None else _own(c)


def _own(x: Tensor) -> Tensor:
    """``x``, or a copy if it was made in inference mode, where nothing can be differentiated."""
    return x.clone() if x.is_inference() else x
