r"""Models that are computed compiled, or at another precision: wrappers around a model.

Every quantity of a model is a function of tensors, forward pass and derivative together,

.. math:: (y, \sigma, c) \mapsto f\bigl(\ell(y, \sigma),\; J_\ell(y, \sigma)^\top v\bigr),

so a compiler gets it whole, and nothing is kept for a backward pass. Noise levels and labels enter
as tensors: another level is not another function.

A compilation takes seconds on a CPU and about a minute on a GPU, so not every size is worth one. A
function is compiled for a size that it is called with *twice in a row*, as a sampler or an
evaluation does, up to `MAX_SIZES` sizes; any other call runs eagerly. A last, smaller batch never
costs a compilation.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ebmkit.compute import (
    Precision,
    autocast,
    flush_denormals,
    keep_freed_memory,
    pick_compile,
    pick_precision,
    prepare_compiler,
    set_tf32,
    subsample_before_1x1,
)
from ebmkit.energy import (
    Energies,
    EnergyModel,
    Noise,
    ScoreModel,
    Target,
    check_sigma,
    upcast_energies,
    wants_grad,
)
from ebmkit.errors import UserError, first_line

MAX_SIZES = 8
"""For how many sizes each function is compiled at most."""

COMPILE_THRESHOLD_SECONDS = 300.0
"""Seconds of eager work ahead from which on ``auto`` compiles: a compilation takes about a minute,
and less than half of the time may be saved."""

ISOLATED: dict[str, bool] = (  # otherwise functions of several models share one count
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

T = TypeVar("T")
M = TypeVar("M", bound=ScoreModel)
Mode = Literal["auto", "on", "off"]


class Inference:
    """How models are computed where no gradient of their values is wanted.

    Args:
        precision: what the network computes in; results are float32.
        mode: ``on`` compiles; ``auto`` compiles once `expect` got enough seconds.
        backend: what `torch.compile` compiles with.

    Attributes:
        compiling: whether sizes that repeat are compiled from now on.
        compiled: whether anything was compiled so far.
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
        self.compiled = False
        self._backend = backend

    def expect(self, seconds: float) -> None:
        """Compile from now on if ``seconds`` of eager work lie ahead, enough for it to pay."""
        if self.mode == "auto" and seconds > COMPILE_THRESHOLD_SECONDS:
            self.compiling = True

    def wrap(self, model: M) -> M:
        """``model`` so computed: a wrapper that shares its parameters and has its methods."""
        if isinstance(model, HasParts):
            return cast("M", model.with_parts(self.wrap))
        kind = WrappedEnergyModel if isinstance(model, EnergyModel) else WrappedModel
        return cast("M", kind(model, self))

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """``function``, compiled for the sizes that it will be called with first."""
        prepare_compiler()
        self.compiled = True
        options: dict[str, Any] = {"backend": self._backend, **ISOLATED}
        return torch.compile(function, fullgraph=True, dynamic=False, **options)

    def give_up(self, error: Exception) -> None:
        """No longer compile.

        Raises:
            UserError: if it was asked for.
        """
        if self.mode == "on":
            raise UserError(
                f"the model cannot be compiled: {first_line(error)}; use --compile off "
                "(compile='off')"
            ) from None
        warnings.warn(f"not compiled, running eagerly: {first_line(error)}", stacklevel=6)
        self.compiling = self.compiled = False


class HasParts(ABC):
    """A model that is made of others, each of which is wrapped by itself."""

    @abstractmethod
    def with_parts(self, wrap: Callable[[Any], Any]) -> Any:
        """A copy of this model with ``wrap(part)`` in place of each part."""


class WrappedModel(ScoreModel):
    """A model whose values are computed as an `Inference` says; made by `Inference.wrap`.

    Where a gradient of the result is wanted it is computed eagerly.

    Args:
        model: shared, not copied.
        inference: how.
    """

    def __init__(self, model: ScoreModel, inference: Inference) -> None:
        super().__init__()
        self.model = model
        self.inference = inference
        self.training = model.training
        self.num_classes, self.noise_conditional = model.num_classes, model.noise_conditional
        self.is_energy_based, self.ignores_sigma = model.is_energy_based, model.ignores_sigma
        self.in_channels, self.schedule = model.in_channels, model.schedule
        self.card, self.weights_sha256 = model.card, model.weights_sha256
        self._compiled: dict[object, dict[object, Callable[..., Any]]] = {}  # by function and size
        self._last: dict[object, object] = {}

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        return self._run(self.model._score, y, sigma, c)

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        check_sigma(sigma)
        if sigma is None:
            return self.denoise_blind(y, c)[0]
        return self._run(self.model.denoise, y, sigma, self._labels(c, y))

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()

        def blind(y: Tensor, sigma: Noise | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.model.denoise_blind(y, c, sigma_range)

        return self._run(blind, y, None, self._labels(c, y), key=("denoise_blind", sigma_range))

    def estimate_sigma(self, y: Tensor) -> Tensor:
        self._check_blind()
        return self._run(lambda y, sigma: self.model.estimate_sigma(y), y, None, key=("sigma",))

    def _run(
        self,
        function: Callable[..., T],
        y: Tensor,
        sigma: Noise | None,
        *others: Any,
        key: tuple[object, ...] | None = None,
    ) -> T:
        """``function(y, sigma, *others)``, compiled if that pays; ``key`` names it."""
        inference, model = self.inference, self.model
        with autocast(y.device, inference.precision):
            if wants_grad(model, y, sigma):
                return function(y, sigma, *others)
            with torch.no_grad():  # a frozen model keeps nothing, whether or not its user says so
                if inference.compiling and not (model.training and model.has_batch_norm):
                    key = key or (function.__name__,)
                    kind = (*key, sigma is None, *(_kind(other) for other in others))
                    size = (y.shape, y.stride(), y.dtype, y.device, model.training)
                    by_size = self._compiled.setdefault(kind, {})
                    again, self._last[kind] = self._last.get(kind) == size, size
                    if again and size not in by_size and len(by_size) < MAX_SIZES:
                        by_size[size] = inference.compile(function)
                    if call := by_size.get(size):
                        try:
                            with torch.inference_mode(False), torch.no_grad():
                                return cast("T", call(*_as_tensors(y, sigma, others)))
                        except Exception as error:  # a compiler fails in ways of its own
                            if isinstance(error, (torch.OutOfMemoryError, UserError)):
                                raise
                            inference.give_up(error)
                            self._compiled.clear()
                return function(y, sigma, *others)


class WrappedEnergyModel(WrappedModel, EnergyModel):
    """A `WrappedModel` around an `EnergyModel`."""

    model: EnergyModel

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units, float32 at least."""
        return self._run(self._forward, y, sigma)

    def value_and_grads(
        self, y: Tensor, sigma: Noise | None, *targets: Target
    ) -> tuple[Energies, list[Tensor]]:
        return self._run(self._value_and_grads, y, sigma, *targets)

    def _forward(self, y: Tensor, sigma: Noise | None) -> Energies:
        return upcast_energies(self.model(y, sigma))

    def _value_and_grads(
        self, y: Tensor, sigma: Noise | None, *targets: Target
    ) -> tuple[Energies, list[Tensor]]:
        energies, grads = self.model.value_and_grads(y, sigma, *targets)
        return upcast_energies(energies), grads


def optimize(model: M, precision: str = "fp32", compile: str = "off") -> M:
    """``model`` at another precision, or compiled, where no gradient of its values is wanted.

    Args:
        model: shared, not copied; its parameters are laid out channels last, in which values differ
            in their last bits.
        precision: of products: fp32, tf32, bf16 (results are float32); auto is fp32. Whether an
            NVIDIA GPU may round float32 products to TF32 is a setting of the whole process.
        compile: on: compile what is called with the same size twice in a row; off; auto: on CUDA,
            where enough work is known to lie ahead.

    Raises:
        UserError: if a name is unknown, or the device lacks the precision or a compiler.

    >>> fast = optimize(load("runs/cifar10", device="cuda"), "bf16", "on")   # doctest: +SKIP
    >>> fast.score(y)                                                         # doctest: +SKIP
    """
    return laid_out(model, make_inference(device_of(model), precision, compile))


def laid_out(model: M, inference: Inference) -> M:
    """``inference.wrap(model)``, with parameters laid out channels last."""
    flush_denormals(device_of(model))
    keep_freed_memory(device_of(model))
    subsample_before_1x1(model)
    return inference.wrap(model.to(memory_format=torch.channels_last))


def make_inference(device: torch.device, precision: str, compile: str) -> Inference:
    """The `Inference` of these names on ``device``; see `optimize`.

    Raises:
        UserError: if a name is unknown, or the device lacks the precision or a compiler.
    """
    chosen = pick_precision("fp32" if precision == "auto" else precision, device)
    possible = pick_compile(compile, device)
    set_tf32(device, chosen)
    return Inference(chosen, "off" if not possible else "on" if compile == "on" else "auto")


def unwrapped(model: M) -> M:
    """The model that is computed eagerly and in float32, whose wrapper ``model`` may be."""
    if isinstance(model, HasParts):
        return cast("M", model.with_parts(unwrapped))
    return cast("M", model.model) if isinstance(model, WrappedModel) else model


@contextmanager
def tf32_restored(device: torch.device) -> Iterator[None]:
    """Restore, at the end, whether float32 products may be rounded to TF32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = (cuda.allow_tf32, cudnn.allow_tf32) if device.type == "cuda" else None
    try:
        yield
    finally:
        if allowed is not None:
            cuda.allow_tf32, cudnn.allow_tf32 = allowed


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Within, float32 products on ``device`` are not rounded to TF32."""
    with tf32_restored(device):
        set_tf32(device, "fp32")
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` is; the CPU if it has neither parameters nor buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _kind(argument: object) -> object:
    """What distinguishes one compiled function from another: None, a tensor, a target."""
    if isinstance(argument, tuple):
        return type(argument), *(field is None for field in argument)
    return argument is None


def _as_tensors(y: Tensor, sigma: Noise | None, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as a compiler takes them, the noise level as (B,), like y."""
    if sigma is not None:
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y)).contiguous()
    return tuple(map(_without_inference_mode, (y.detach(), sigma, *others)))


def _without_inference_mode(argument: Any) -> Any:
    """A copy of what was made in inference mode, where nothing can be differentiated."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_without_inference_mode, argument))
    if isinstance(argument, Tensor) and argument.is_inference():
        return argument.clone()
    return argument
