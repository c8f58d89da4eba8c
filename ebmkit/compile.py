r"""Compiled or reduced-precision inference, by wrappers around a model.

Every quantity of a model is one function of tensors, with forward pass and derivative,

.. math:: (y, \sigma, c) \mapsto f\bigl(\ell(y, \sigma),\; J_\ell(y, \sigma)^\top v\bigr),

so it is compiled as a whole, and no activations are stored for a backward pass. Noise levels and
labels are tensor inputs, so new values need no new compilation.

Compilation takes seconds on a CPU and about a minute on a GPU. So a function is compiled for an
input size only if it is called with this size *twice in a row*, as samplers and evaluations do, and
for at most `MAX_SIZES` sizes; other calls run eagerly. A smaller last batch is not compiled.
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
    upcast_energies,
    wants_grad,
)
from ebmkit.errors import UserError, first_line

MAX_SIZES = 8
"""Maximum number of compiled input sizes per function."""

COMPILE_THRESHOLD_SECONDS = 300.0
"""``auto`` compiles if more than this many seconds of eager work remain: compilation takes about a
minute, and may save less than half of the time."""

ISOLATED: dict[str, bool] = (  # otherwise several models share one recompilation limit
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

T = TypeVar("T")
M = TypeVar("M", bound=ScoreModel)
Mode = Literal["auto", "on", "off"]


class Inference:
    """Precision and compilation of models whose results need no gradient.

    Args:
        precision: precision of the network; results are float32.
        mode: ``on``: compile; ``off``: do not; ``auto``: compile after `expect` got enough seconds.
        backend: backend of `torch.compile`.

    Attributes:
        compiling: whether repeated sizes are compiled from now on.
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
        """In mode ``auto``, compile from now on if enough ``seconds`` of eager work remain."""
        if self.mode == "auto" and seconds > COMPILE_THRESHOLD_SECONDS:
            self.compiling = True

    def wrap(self, model: M) -> M:
        """Wrap ``model``: the wrapper has the same methods and shares the parameters."""
        if isinstance(model, CompositeModel):
            return cast("M", model.map_submodels(self.wrap))
        kind = WrappedEnergyModel if isinstance(model, EnergyModel) else WrappedModel
        return cast("M", kind(model, self))

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """Compile ``function`` for the input sizes of its first call."""
        prepare_compiler()
        self.compiled = True
        options: dict[str, Any] = {"backend": self._backend, **ISOLATED}
        return torch.compile(function, fullgraph=True, dynamic=False, **options)

    def give_up(self, error: Exception) -> None:
        """Stop compiling, with a warning.

        Raises:
            UserError: in mode ``on``.
        """
        if self.mode == "on":
            raise UserError(
                f"the model cannot be compiled: {first_line(error)}; use --compile off "
                "(compile='off')"
            ) from None
        warnings.warn(f"not compiled, running eagerly: {first_line(error)}", stacklevel=6)
        self.compiling = self.compiled = False


class CompositeModel(ABC):
    """A model composed of other models, which are wrapped separately."""

    @abstractmethod
    def map_submodels(self, wrap: Callable[[Any], Any]) -> Any:
        """A copy of this model in which ``wrap(part)`` replaces each part."""


class WrappedModel(ScoreModel):
    """A wrapper that applies an `Inference` to a model; see `Inference.wrap`.

    Calls whose result needs a gradient run eagerly.

    Args:
        model: model to wrap, shared, not copied.
        inference: precision and compilation.
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
        if sigma is None:
            return self._denoise_blind_checked(y, c)
        return self._run(self.model.denoise, *self.inputs(y, sigma, c))

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()
        y, _, labels = self.inputs(y, None, c)

        def blind(y: Tensor, sigma: Noise | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.model.denoise_blind(y, c, sigma_range)

        return self._run(blind, y, None, labels, key=("denoise_blind", sigma_range))

    def estimate_sigma(self, y: Tensor) -> Tensor:
        self._check_blind()
        y, *_ = self.inputs(y, None)
        return self._run(lambda y, sigma: self.model.estimate_sigma(y), y, None, key=("sigma",))

    def _run(
        self,
        function: Callable[..., T],
        y: Tensor,
        sigma: Noise | None,
        *others: Any,
        key: tuple[object, ...] | None = None,
    ) -> T:
        """Call ``function(y, sigma, *others)``, compiled if the size repeats; ``key`` names it."""
        inference, model = self.inference, self.model
        with autocast(y.device, inference.precision):
            if wants_grad(model, y, sigma):
                return function(y, sigma, *others)
            with torch.no_grad():  # store no graph for a frozen model, in any grad mode
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
                        except Exception as error:  # compilers raise errors of many types
                            if isinstance(error, (torch.OutOfMemoryError, UserError)):
                                raise
                            inference.give_up(error)
                            self._compiled.clear()
                return function(y, sigma, *others)


class WrappedEnergyModel(WrappedModel, EnergyModel):
    """A `WrappedModel` around an `EnergyModel`."""

    model: EnergyModel

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units, in float32 at least."""
        return self._run(self._forward, y, sigma)

    @property
    def normalized(self) -> bool:
        return self.model.normalized

    @property
    def log_prior(self) -> Tensor:
        return self.model.log_prior

    def _time_score(self, y: Tensor, sigma: Noise, c: Tensor | None) -> Tensor:
        return self._run(self.model._time_score, y, sigma, c)

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
    """Wrap ``model`` for inference with compilation or at another precision.

    Calls whose result needs a gradient are not compiled.

    Args:
        model: model to wrap, shared, not copied. Its parameters become channels last, which
            changes the last bits of results.
        precision: precision of matrix products and convolutions: fp32, tf32, bf16 (results are
            float32); auto: fp32. TF32 on an NVIDIA GPU is a setting of the whole process.
        compile: on: compile functions that are called with the same size twice in a row; off;
            auto: on CUDA, if enough work is known to remain.

    Raises:
        UserError: if a name is unknown, or the device lacks the precision or a compiler.

    >>> fast = optimize(load("runs/cifar10", device="cuda"), "bf16", "on")   # doctest: +SKIP
    >>> fast.score(y)                                                         # doctest: +SKIP
    """
    return wrap_channels_last(model, make_inference(device_of(model), precision, compile))


def wrap_channels_last(model: M, inference: Inference) -> M:
    """Return ``inference.wrap(model)``, with parameters in channels-last layout."""
    flush_denormals(device_of(model))
    keep_freed_memory(device_of(model))
    subsample_before_1x1(model)
    return inference.wrap(model.to(memory_format=torch.channels_last))


def make_inference(device: torch.device, precision: str, compile: str) -> Inference:
    """Create the `Inference` for ``device`` from option values; see `optimize`.

    Raises:
        UserError: if a name is unknown, or the device lacks the precision or a compiler.
    """
    chosen = pick_precision("fp32" if precision == "auto" else precision, device)
    possible = pick_compile(compile, device)
    set_tf32(device, chosen)
    return Inference(chosen, "off" if not possible else "on" if compile == "on" else "auto")


def unwrapped(model: M) -> M:
    """The model inside the wrapper ``model``; ``model`` itself if it is not a wrapper."""
    if isinstance(model, CompositeModel):
        return cast("M", model.map_submodels(unwrapped))
    return cast("M", model.model) if isinstance(model, WrappedModel) else model


@contextmanager
def tf32_restored(device: torch.device) -> Iterator[None]:
    """Context that restores PyTorch's TF32 settings on exit."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = (cuda.allow_tf32, cudnn.allow_tf32) if device.type == "cuda" else None
    try:
        yield
    finally:
        if allowed is not None:
            cuda.allow_tf32, cudnn.allow_tf32 = allowed


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Context in which float32 products on ``device`` are not rounded to TF32."""
    with tf32_restored(device):
        set_tf32(device, "fp32")
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of ``model``; the CPU if it has neither parameters nor buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _kind(argument: object) -> object:
    """Cache key of an argument: the type of a target, and what is None."""
    if isinstance(argument, tuple):
        return type(argument), *(field is None for field in argument)
    return argument is None


def _as_tensors(y: Tensor, sigma: Noise | None, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the arguments for a compiled call; the noise level becomes (B,), of y's type."""
    if sigma is not None:
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y)).contiguous()
    return tuple(map(_without_inference_mode, (y.detach(), sigma, *others)))


def _without_inference_mode(argument: Any) -> Any:
    """Clone tensors created in inference mode, which cannot be differentiated."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_without_inference_mode, argument))
    if isinstance(argument, Tensor) and argument.is_inference():
        return argument.clone()
    return argument
