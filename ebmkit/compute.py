r"""Device, precision, compilation and memory.

Precision is that of matrix products and convolutions. Parameters, gradients and optimiser state are
always float32. Under autocast, statistics of norms, means over positions, the head (logits and
log-density), the residual :math:`\sigma\nabla\log p + \epsilon` and every loss also stay float32
(`upcast`, `without_autocast`).

========  ==================================================================================
fp32      float32 throughout
tf32      float32 storage, products rounded to a 10-bit mantissa; NVIDIA GPUs since Ampere
bf16      autocast: feature maps and products in bfloat16, sums in float32
========  ==================================================================================
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ebmkit.distributed import launch
from ebmkit.errors import UserError, unknown_name

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
COMPILE_MODES = ("auto", "on", "off")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MIN_SAFE_CHANNELS = 8
"""Minimum number of input channels for which oneDNN's 1x1 convolution kernel is correct (see
`subsample_before_1x1`): the number of float32 values in an AVX2 register."""


class ComputeConfig(BaseModel):
    """Settings of the training step; they change results only by rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """precision: fp32, tf32, bf16; auto: bf16 on CUDA, fp32 on CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the step: auto, on, off; auto: on CUDA, not on CPU"""
    accumulate: int = Field(1, ge=1)
    """number of parts that each batch is split into, to save memory"""
    recompute: bool = Field(
        False,
        description="activation checkpointing: less memory, a third more arithmetic for ce, twice "
        "as much for dsm",
    )


F = TypeVar("F", bound=Callable[..., Any])
_OPAQUE: dict[Callable[..., Any], bool] = {}


def opaque_to_compilers(function: F) -> F:
    """Decorator: compilers put calls of ``function`` into the graph untraced."""
    _OPAQUE[function] = False
    return function


def prepare_compiler() -> None:
    """Register the `opaque_to_compilers` functions with PyTorch's compiler. Call this before
    compiling a model; importing the compiler takes seconds."""
    for function, known in _OPAQUE.items():
        if not known:
            torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]
            _OPAQUE[function] = True


def compiler_is_prepared() -> bool:
    """Whether `prepare_compiler` was called; if not, compiled layers use PyTorch's functions."""
    return all(_OPAQUE.values())


@contextmanager
def limited_threads(most: int | None) -> Iterator[None]:
    """Context in which PyTorch uses at most ``most`` CPU threads; None: no change."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(before, most or before))
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto``: CUDA if available, else the CPU.

    Raises:
        UserError: if the name is unknown or the device is missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not on this machine: use cpu or auto")
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """The precision called ``name``; ``auto``: bf16 on CUDA devices that support it, else fp32.

    Raises:
        UserError: if the name is unknown, or ``device`` does not support it.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "bf16" if ampere else "fp32"
    if name not in PRECISIONS:
        raise unknown_name("precision", name, ["auto", *PRECISIONS])
    precision: Precision = name
    if not ampere and (precision == "tf32" or (precision == "bf16" and device.type == "cuda")):
        others = "fp32 or auto" if device.type == "cuda" else "fp32, bf16 or auto"
        raise UserError(
            f"precision {precision!r} needs an NVIDIA GPU of compute capability 8.0 or more, and "
            f"the device is {describe(device)}: use --precision {others}"
        )
    return precision


def pick_compile(name: str, device: torch.device) -> bool:
    """Whether to compile; ``auto``: on CUDA if a compiler is installed, not on a CPU, where
    compilation does not pay (docs: "Speed").

    Raises:
        UserError: if the mode is unknown, or ``on`` and the device has no compiler.
    """
    if name not in COMPILE_MODES:
        raise unknown_name("compile mode", name, COMPILE_MODES)
    if name == "off" or (name == "auto" and device.type != "cuda"):
        return False
    missing = _missing_compiler(device)
    if missing is not None and name == "on":
        raise UserError(
            f"--compile on needs {missing} on {describe(device)}: install it, or use --compile off"
        )
    return missing is None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context for a network's forward pass at ``precision``."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def set_tf32(device: torch.device, precision: Precision) -> None:
    """Allow TF32 on a CUDA ``device`` unless ``precision`` is fp32, for the whole process. By
    default PyTorch allows it in convolutions, but not in matrix products."""
    if device.type == "cuda":
        allowed = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def memory_format(device: torch.device, differentiate: bool) -> torch.memory_format:
    """The fastest memory format of images for a training step.

    Channels last, which matrix units prefer. The exception is a model that is differentiated with
    respect to its input on a CPU: second derivatives are slower there (``benchmarks/layout.py``).
    """
    if device.type == "cpu" and differentiate:
        return torch.contiguous_format
    return torch.channels_last


def flush_denormals(device: torch.device | None = None) -> None:
    """On a CPU, round results between 0 and the smallest normal number (1.2e-38 in float32) to 0.

    Processors compute up to a hundred times slower with these denormal numbers, which become
    frequent as training proceeds: without them a step takes about half the time (docs: "Denormal
    numbers"). This affects the current thread and threads that it starts later. PyTorch starts its
    threads in its first parallel operation, so call this before; the command line does.

    Args:
        device: device of the model; no effect if it is not a CPU. None: the CPU.
    """
    if device is None or device.type == "cpu":
        torch.set_flush_denormal(True)


def keep_freed_memory(device: torch.device) -> None:
    """On Linux, keep the memory of freed CPU tensors in this process.

    By default glibc returns much of it to the system, which must map and clear it again in each
    step (``benchmarks/layout.py``). This affects the whole process, but not its peak memory.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc; other C libraries have no such setting
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_MMAP_THRESHOLD, 2**30)


def subsample_before_1x1(model: nn.Module) -> None:
    """Work around a oneDNN bug in the strided 1x1 convolutions of ``model``, in place.

    In PyTorch 2.15, on processors with AVX2 but without AVX-512, the weight gradient of a
    convolution writes out of bounds if it is 1x1, strided, without padding, with one group and
    fewer than 8 input channels, on at least two channels-last images and one thread (docs:
    "oneDNN: strided 1x1 convolutions"). Up to rounding, values and gradients do not change with

        conv(x, stride=s) = conv(x[:, :, ::s, ::s], stride=1),

    which uses a correct kernel. So the stride moves to a forward pre-hook. Parameters keep their
    names and values. A second call has no effect, nor does a call with oneDNN disabled
    (`torch.backends.mkldnn`). Calls of `torch.nn.functional.conv2d` are not replaced.

    >>> from torch import nn
    >>> conv = nn.Conv2d(4, 8, 1, stride=2)
    >>> subsample_before_1x1(conv)
    >>> conv.stride, len(conv._forward_pre_hooks)
    ((1, 1), 1)
    """
    if not torch.backends.mkldnn.enabled:
        return
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        strided = tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) != (1, 1)
        plain = conv.padding in ((0, 0), "valid") and conv.groups == 1
        if strided and plain and conv.in_channels < MIN_SAFE_CHANNELS:
            rows, columns = conv.stride
            conv.stride = (1, 1)
            conv.register_forward_pre_hook(partial(_subsample, rows=rows, columns=columns))


def _subsample(
    conv: nn.Module, inputs: tuple[Tensor, ...], *, rows: int, columns: int
) -> tuple[Tensor, ...]:
    x, *others = inputs
    return (x[..., ::rows, ::columns], *others)


def upcast(x: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32; return other types unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def to_weights(x: Tensor, network: nn.Module) -> Tensor:
    """Convert ``x`` to the type of the first parameter of ``network``, as after `half`."""
    first = next(network.parameters(), None)
    return x if first is None or not first.is_floating_point() else x.to(first.dtype)


def in_functional_transform() -> bool:
    """Whether a `torch.func` transform is active: these forbid `requires_grad_`."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which operations on ``x`` keep its dtype, even under autocast."""
    if x.device.type not in ("cpu", "cuda"):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _missing_compiler(device: torch.device) -> str | None:
    """What is missing to compile for ``device``; None if nothing."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "a C++ compiler (g++)"
    lacks_triton = device.type == "cuda" and find_spec("triton") is None
    return "the package triton" if lacks_triton else None


def describe(device: torch.device) -> str:
    """Name of ``device`` for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def matrix_rate(device: torch.device, precision: Precision = "fp32") -> float:
    """Measure the FLOP/s of a square matrix product: 8192 x 8192 on CUDA, 1024 x 1024 on a CPU.

    The result is the median over about 0.3 seconds of products of random matrices, after warm-up,
    by `torch.utils.benchmark`.
    """
    from torch.utils.benchmark import Timer

    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    names = {"mm": torch.mm, "a": a, "b": b, "out": torch.empty_like(a)}
    timer = Timer("mm(a, b, out=out)", globals=names, num_threads=torch.get_num_threads())
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = precision == "tf32"
        with torch.inference_mode():
            seconds: float = timer.blocked_autorange(min_run_time=0.3).median
    finally:
        matmul.allow_tf32 = before
    return 2 * size**3 / seconds


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the tensors on a CUDA device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on ``device``; None if unknown.

    On CUDA: memory that is free on the device or cached by PyTorch's allocator. On a CPU: memory
    available without swapping, within the limits of the process's control groups.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [*_system_free(), *_group_free()]
    return max(0, min(limits)) if limits else None


def _system_free() -> Iterator[int]:
    """Available memory of the machine on Linux, its total memory elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
                return
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_free(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Free bytes within each control group of this process; page cache counts as free."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names, top = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "memory"
        else:
            continue
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group == top or top in group.parents:
                yield from _room(group, *names)


def _room(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return
    yield most - used + sum(int(value) for name, value in pairs if name == cache)


def environment() -> dict[str, Any]:
    """Versions, device, git commit and command of this process."""
    import ebmkit

    cuda = torch.cuda.is_available()
    return {
        "ebmkit": ebmkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "git_commit": _git_commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "launch": launch(),
        "command": ["ebmkit", *sys.argv[1:]],
    }


def _git_commit() -> str | None:
    """Git commit of the running code; None outside a checkout."""
    source = Path(__file__).resolve().parents[1]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
