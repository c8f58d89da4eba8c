r"""Functions of tensors, gradients inside, as files: torch.export (``.pt2``) and ONNX (``.onnx``).

Exporters refuse `torch.func.vjp`. `make_fx` runs a function on tensors without values and writes
down every operation, those of a pull-back too, so that what is left is a graph of ordinary
operations. ONNX has none for the gradient of a convolution; with respect to the input it is the
transposed convolution with the same weight,

.. math:: \bar x = \operatorname{conv}^{\!\top}(\bar z, w), \qquad
    \text{output padding} = n_x - \bigl((n_z - 1)\,s - 2p + d\,(k - 1) + 1\bigr),

whose output padding restores the rows and columns that a stride :math:`s > 1` rounded away.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ebmkit.errors import UserError

__all__ = ["Task", "run_onnx", "run_pt2", "to_onnx", "to_pt2"]

_TRACED_BATCH = 67
"""A free batch while tracing, where equal sizes become one: a number that layers rarely have."""


class Task(NamedTuple):
    """A function of tensors, the names of its inputs and outputs, and the shapes it is traced at.

    ``size`` is (C, H, W); a ``batch`` of None is free.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    size: tuple[int, int, int]
    batch: int | None


class _Traced(NamedTuple):
    """A task as a graph of tensor operations, and what both exporters ask beside it."""

    graph: GraphModule
    arguments: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...] | None


def _trace(task: Task, table: Mapping[Any, Callable[..., Any]] | None = None) -> _Traced:
    """The task with its gradients written out; ``table`` replaces operations."""
    free = task.batch is None
    count = task.batch or _TRACED_BATCH
    shapes = [(count, *task.size) if name == "y" else (count,) for name in task.inputs]
    arguments = tuple(torch.empty(shape) for shape in shapes)  # their values are never looked at

    def call(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        # as whole numbers, so that a model's own arithmetic on H and W is done here and now
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
            "the number of images became a constant while the model was traced, as len(tensor) and "
            "nn.Linear with a bias on (B, M, K) make it: export with a fixed batch, or write "
            "tensor.shape[0] there"
        )
    for node, name in zip(inputs, task.inputs, strict=True):
        node.target = name
    graph.recompile()
    batch = torch.export.Dim("batch", min=1)
    return _Traced(graph.eval(), arguments, tuple({0: batch} for _ in shapes) if free else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about themselves: old parts, names of axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_pt2(task: Task, description: str) -> bytes:
    """The task as the bytes of a ``.pt2`` file."""
    graph, arguments, shapes = _trace(task)
    file = io.BytesIO()
    with _quiet():
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=False)
        program.example_inputs = None  # a file has no use for the tensors that it was traced at
        torch.export.save(program, file, extra_files={"ebmkit.json": description})
    return file.getvalue()


def run_pt2(content: bytes, task: Task, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with _quiet():
        outputs: tuple[Tensor, ...] = torch.export.load(io.BytesIO(content)).module()(*arguments)
    return outputs


def to_onnx(task: Task, description: str) -> bytes:
    """The task as the bytes of an ``.onnx`` file."""
    backward = torch.ops.aten.convolution_backward.default
    graph, arguments, shapes = _trace(task, {backward: _convolution_backward})
    with _quiet():
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


def run_onnx(content: bytes, task: Task, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
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
    """The gradient of a convolution by its input; no other is asked of a frozen network."""
    if transposed or mask[1] or mask[2]:
        return NotImplemented  # leaves the operation as it is
    extra = [
        n_x - ((n_z - 1) * s - 2 * p + d * (k - 1) + 1)
        for n_x, n_z, s, p, d, k in zip(
            x.shape[2:],
            gradient.shape[2:],
            stride,
            padding,
            dilation,
            weight.shape[2:],
            strict=True,
        )
    ]
    back = torch.ops.aten.convolution.default(
        gradient, weight, None, stride, padding, dilation, True, extra, groups
    )
    return back, None, None
