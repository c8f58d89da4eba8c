r"""Export to files that run without ebmkit: torch.export (``.pt2``) and ONNX (``.onnx``).

A denoiser contains a gradient, :math:`y + \sigma^2 \nabla_y \log p(y)`, and exporters do not
support `torch.func.vjp`. So `make_fx` traces the function, including the vector-Jacobian product,
with fake tensors to a graph of ordinary operations. ONNX has no operation for the gradient of a
convolution; with respect to the input, it is the transposed convolution with the same weight,

.. math:: \bar x = \operatorname{conv}^{\!\top}(\bar z, w), \qquad
    \text{output padding} = n_x - \bigl((n_z - 1)\,s - 2p + d\,(k - 1) + 1\bigr),

whose output padding restores the rows and columns that a stride :math:`s > 1` drops by rounding.

For inputs and outputs of each kind of file see the docs, "Export a model". Tensors are float32. B
is dynamic unless ``batch`` is set; C, H and W are fixed. The classifier of a noise-conditional
model takes sigma.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ebmkit.energy import ScoreModel, classifies
from ebmkit.errors import UserError, first_line, unknown_name
from ebmkit.storage import write_atomically

What = Literal["classifier", "denoiser", "blind-denoiser"]

MEDIAN, LARGEST = 1e-4, 1e-2
"""Limits of the difference to the model, relative to an image's largest value: of the median and of
the maximum over images.

In float32, another order of additions causes measured differences of 1e-7 to 1e-5. Where log p is
flat, cancellation in the score makes a few images in a hundred exceed 1e-4. A wrong operation
causes differences of order 1 on every image.
"""

IMAGES = 5
"""Minimum number of random images that a file is tested on, in one or several batches."""

_TRACED_BATCH = 67
"""Batch size for tracing a dynamic batch. Tracing merges equal sizes, so it must be a rare size."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportTask(NamedTuple):
    """The function to export, names of its inputs and outputs, and shapes for tracing.

    ``size`` is (C, H, W); ``batch`` None is dynamic.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    size: tuple[int, int, int]
    batch: int | None


class Difference(NamedTuple):
    """Difference of a file to its model: per image, largest difference over largest value."""

    median: float
    largest: float


class Exported(NamedTuple):
    """Result of `export`.

    Attributes:
        path: path of the file.
        inputs: input shapes by name, in order; a dynamic batch is "batch".
        batches: sizes of the batches of random images on which file and model were compared.
        differences: differences to the model by output, in order.
    """

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    batches: tuple[int, ...]
    differences: dict[str, Difference]


def export(
    model: ScoreModel,
    path: str | os.PathLike[str],
    what: What = "denoiser",
    image_size: tuple[int, int] | int | None = None,
    channels: int | None = None,
    batch: int | None = None,
) -> Exported:
    """Write ``model`` to a file for PyTorch (``.pt2``) or an ONNX runtime (``.onnx``).

    Before it is written, the content is loaded, run on random images and compared with the model,
    so a file with wrong values never exists. The model is not changed.

    Args:
        model: a trained model.
        path: file to create; the suffix determines the format.
        what: classifier, denoiser or blind-denoiser.
        image_size: height and width, or one number for both; None: the training size.
        channels: 1 gray, 3 colour; None: as in training.
        batch: fixed batch size; None: any.

    Raises:
        UserError: if the file exists or cannot be written, the suffix or ``what`` is unknown, the
            model does not support ``what``, its image size is unknown, the extra ``onnx`` is not
            installed, PyTorch cannot export the model, or file and model differ.

    >>> export(model, "denoiser.onnx").differences                       # doctest: +SKIP
    {'denoised': Difference(median=1.2e-06, largest=4.3e-06)}
    """
    path = Path(path)
    _check_path(path)
    if batch is not None and batch < 1:
        raise UserError(f"batch {batch} must be at least 1, or omitted for any number of images")
    size = _image_shape(model, image_size, channels)
    frozen = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    task = _task(frozen, what, size, batch)
    description = {"what": what, "card": model.card.model_dump(mode="json") if model.card else None}
    to_bytes, run = (to_pt2, run_pt2) if path.suffix == ".pt2" else (to_onnx, run_onnx)
    try:
        content = to_bytes(task, json.dumps(description))
    except RuntimeError as error:  # a UserError is not a RuntimeError
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"PyTorch {torch.__version__} cannot write this {what} as {path.suffix}: "
            f"{first_line(cause)}"
        ) from error
    batches = (1, IMAGES) if batch is None else (batch,) * math.ceil(IMAGES / batch)
    differences = _compare(task, frozen, batches, lambda images: run(content, task, images))
    for name, (median, largest) in differences.items():
        if not (median <= MEDIAN and largest <= LARGEST):  # true for NaN, too
            raise UserError(
                f"{str(path)!r} was not written, because its {name} differs from the model's by "
                f"{median:.1e} of an image's largest value at the median and {largest:.1e} at "
                f"most; {MEDIAN:.0e} and {LARGEST:.0e} are allowed"
            )
    write_atomically(path, content)
    first = "batch" if batch is None else batch
    shapes: dict[str, tuple[int | str, ...]] = {
        name: (first, *size) if name == "y" else (first,) for name in task.inputs
    }
    return Exported(path, shapes, batches, differences)


def _check_path(path: Path) -> None:
    """Check that the file can be written."""
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(
            f"{str(path)!r} has no suffix that ebmkit can export to: use .pt2 for PyTorch, or "
            ".onnx for ONNX runtimes"
        )
    if path.exists():
        raise UserError(f"{str(path)!r} exists: choose another name, or move it away")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} for {path.name!r}: make it first")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'ebmkit-vision[onnx]'")


def _image_shape(
    model: ScoreModel, image_size: tuple[int, int] | int | None, channels: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of the images, from the arguments or else from training."""
    card = model.card
    if image_size is None:
        image_size = card.image_size if card else getattr(model, "reference_size", None)
    if channels is None:
        channels = card.channels if card else getattr(model, "in_channels", None)
    if image_size is None or channels is None:
        lacking = "image_size" if image_size is None else "channels"
        raise UserError(f"this model does not say what images it was trained for: give {lacking}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width, channels) < 1:
        raise UserError(
            f"images of {channels} channel(s) and {height}x{width} pixels: each must be at least 1"
        )
    return channels, height, width


def _task(
    model: ScoreModel, what: str, size: tuple[int, int, int], batch: int | None
) -> ExportTask:
    """The task ``what`` of ``model``."""

    def classify(y: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, ...]:
        energies = model(y, sigma)
        return energies.log_posterior(), energies.log_density

    if what not in get_args(What):
        raise unknown_name("kind of export", what, get_args(What))
    if what == "denoiser":

        def denoise(y: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
            return (model.denoise(y, sigma),)

        return ExportTask(("y", "sigma"), ("denoised",), denoise, size, batch)
    if what == "blind-denoiser":
        if model.noise_conditional:
            raise UserError("this model takes the noise level as an input: export a denoiser")
        return ExportTask(("y",), ("denoised", "sigma"), model.denoise_blind, size, batch)
    if not classifies(model):
        raise UserError("this model was trained without labels: it cannot classify")
    inputs = ("y", "sigma") if model.noise_conditional else ("y",)
    return ExportTask(inputs, ("log_probabilities", "log_density"), classify, size, batch)


def _compare(
    task: ExportTask,
    model: ScoreModel,
    batches: Sequence[int],
    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
) -> dict[str, Difference]:
    """Compare ``run`` with the task on random images; differences by output.

    For a blind model, sigma is chosen such that sigma^2 ||score|| = sqrt(d). So the score
    contributes as much to the denoised image as the image itself, even if the score is small.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in task.outputs}
    with torch.no_grad():
        for count in batches:
            y = torch.rand(count, *task.size, generator=generator)
            blind = "sigma" in task.inputs and not model.noise_conditional
            sigma = model.estimate_sigma(y).sqrt() if blind else torch.full((count,), 0.1)
            arguments = [y, sigma][: len(task.inputs)]
            outputs = zip(task.outputs, run(arguments), task.call(*arguments), strict=True)
            for name, got, value in outputs:
                found[name].append(_by_image(got, value))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {n: Difference(float(d.median()), float(d.max())) for n, d in joined.items()}


def _by_image(got: Tensor, value: Tensor) -> Tensor:
    """Largest difference over largest value of each image, (B,); infinite if shapes differ."""
    if got.shape != value.shape:
        return torch.full((len(value),), math.inf)
    difference, value = (t.abs().reshape(len(t), -1).amax(1) for t in (got - value, value))
    return difference / value.clamp_min(1e-30)


# --- formats -------------------------------------------------------------------------------------


def _trace(
    task: ExportTask, table: Mapping[Any, Callable[..., Any]] | None = None
) -> tuple[GraphModule, tuple[Tensor, ...], tuple[dict[int, Any], ...] | None]:
    """Trace the task and its gradients; return graph, arguments and dynamic shapes.

    ``table`` has replacements of operations.
    """
    free = task.batch is None
    count = task.batch or _TRACED_BATCH
    shapes = [(count, *task.size) if name == "y" else (count,) for name in task.inputs]
    arguments = tuple(torch.empty(shape) for shape in shapes)  # values are not used

    def call(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        # sizes as Python integers, so that the model's arithmetic on H and W is not traced
        return task.call(y.view(y.shape[0], *task.size), *rest)

    tracer = make_fx(
        call,
        decomposition_table=table,
        tracing_mode="symbolic" if free else "fake",
        _allow_non_fake_inputs=True,  # the weights: they become constants of the graph
    )
    with torch.no_grad():
        graph: GraphModule = tracer(*arguments)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if free and is_concrete_int(inputs[0].meta["val"].shape[0]):
        raise UserError(
            "the number of images became a constant during tracing, because of len(tensor) or "
            "nn.Linear with a bias on (B, M, K): export with a fixed batch, or write "
            "tensor.shape[0] there"
        )
    for node, name in zip(inputs, task.inputs, strict=True):
        node.target = name
    graph.recompile()
    batch = torch.export.Dim("batch", min=1)
    return graph.eval(), arguments, tuple({0: batch} for _ in shapes) if free else None


def to_pt2(task: ExportTask, description: str) -> bytes:
    """Export the task to the bytes of a ``.pt2`` file."""
    graph, arguments, shapes = _trace(task)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # exporters warn about their internals
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=False)
        program.example_inputs = None  # the file does not need the tensors used for tracing
        torch.export.save(program, file, extra_files={"ebmkit.json": description})
    return file.getvalue()


def run_pt2(content: bytes, task: ExportTask, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with warnings.catch_warnings(action="ignore"):
        outputs: tuple[Tensor, ...] = torch.export.load(io.BytesIO(content)).module()(*arguments)
    return outputs


def to_onnx(task: ExportTask, description: str) -> bytes:
    """Export the task to the bytes of an ``.onnx`` file."""
    backward = torch.ops.aten.convolution_backward.default
    graph, arguments, shapes = _trace(task, {backward: _convolution_backward})
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            graph,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=task.inputs,
            output_names=task.outputs,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["ebmkit"] = description
    content: bytes = program.model_proto.SerializeToString()
    return content


def run_onnx(content: bytes, task: ExportTask, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(task.inputs, arguments, strict=True)}
    return tuple(torch.from_numpy(array) for array in session.run(list(task.outputs), feed))


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> Any:
    """Gradient of a convolution by its input, the only one that a frozen network needs."""
    if transposed or mask[1] or mask[2]:
        return NotImplemented  # keeps the operation
    sizes = (x.shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:])
    extra = [
        n_x - ((n_z - 1) * s - 2 * p + d * (k - 1) + 1)
        for n_x, n_z, s, p, d, k in zip(*sizes, strict=True)
    ]
    back = torch.ops.aten.convolution.default(
        gradient, weight, None, stride, padding, dilation, True, extra, groups
    )
    return back, None, None
