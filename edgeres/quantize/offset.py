"""How far a tensor is from its true value once activations are shifted, and what the layers behind it make of that.

A shifted tensor holds x − 128·scale in the place of x. What is missing is its *offset*, a constant: one number, one per
channel, or a map over the image. Linear layers turn it into another constant, layers that only move or pick values pass
it on, and all others need the true value. Offsets are float64, in the tensor's own units, and broadcast against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from edgeres.affine import dequantize, quantize
from edgeres.quantize.graph import RESHAPES, WEIGHTED, Graph, attribute

Shape = tuple[int | None, ...]

ZERO = np.zeros((), np.float64)
SCALAR_KEEPING = (*RESHAPES, "Slice", "Pad", "Transpose", "ReduceMean")
CHANNEL_KEEPING = ("MaxPool", "GlobalAveragePool", "AveragePool")


SHIFTS_KEY = "edgeres.shifts"
"""Of a model's metadata: what is missing behind each shifted QuantizeLinear, by its name."""


def shifts_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return, by the name of its QuantizeLinear, what each shifted tensor lacks: ``()``, or ``(1, C, 1, …)``."""
    texts = [entry.value for entry in model.metadata_props if entry.key == SHIFTS_KEY]
    return {name: np.asarray(values, np.float64) for name, values in (json.loads(texts[0]) if texts else {}).items()}


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return each tensor's shape, None where a dimension is open; what cannot be inferred is left out."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, Shape] = {}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    return shapes


def weights_of(graph: Graph, node: onnx.NodeProto) -> np.ndarray | None:
    """Return a weighted node's weights, float32, as Q and DQ leave them; None where they are not constant."""
    made = graph.producer.get(node.input[1])
    if made is None:
        return graph.constant(node.input[1])
    source = graph.producer.get(made.input[0]) if made.op_type == "DequantizeLinear" else None
    if source is None or source.op_type != "QuantizeLinear":
        return None
    values, scale = graph.constant(source.input[0]), graph.constant(source.input[1])
    if values is None or scale is None:
        return None
    axis = integer(source, "axis", 1) if scale.ndim else None
    return dequantize(quantize(values, scale, axis), scale, axis)


def is_flat(offset: np.ndarray) -> bool:
    """Whether an offset is the same all over the image."""
    return offset.ndim < 4 or offset.shape[2:] == (1, 1)


def carried(graph: Graph, node: onnx.NodeProto, offset: np.ndarray, shapes: Mapping[str, Shape]) -> np.ndarray | None:
    """Return the offset of a node's output where its first input has ``offset``; None where it needs the true value.

    A Pad is taken for one that pads with what stands for zero in its input, which is minus the offset.
    """
    if node.op_type in ("Identity", "Cast"):
        return offset
    if not is_flat(offset):
        return None
    if node.op_type in WEIGHTED:
        weights = weights_of(graph, node)
        if weights is None:
            return None
        if node.op_type == "Conv":
            return convolved(node, weights, offset.reshape(-1), shapes.get(node.input[0], ()))
        return multiplied(node, weights, offset.reshape(-1))
    if node.op_type in CHANNEL_KEEPING and not _averages_padding(node):
        return offset
    return offset if offset.ndim == 0 and node.op_type in SCALAR_KEEPING else None


def multiplied(node: onnx.NodeProto, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return what a Gemm or MatMul makes of a constant input, float64 ``(1, N)``, without its bias.

    Args:
        weights: float32 ``(K, N)``, or ``(N, K)`` where the Gemm transposes.
        offset: float64 ``(1,)`` or ``(K,)``.
    """
    matrix = weights.astype(np.float64)
    if node.op_type == "Gemm" and integer(node, "transB", 0):
        matrix = matrix.T
    return np.asarray(np.broadcast_to(offset, matrix.shape[:1]) @ matrix).reshape(1, -1)


def convolved(node: onnx.NodeProto, weights: np.ndarray, offset: np.ndarray, shape: Shape) -> np.ndarray | None:
    """Return what a 2-D convolution makes of an input that is ``offset`` all over, without its bias.

    Without padding that is one number per output channel. Padding is with zeros, not with the offset, so near the
    border a window sees less of it; how much less depends on the row and on the column, each for itself.

    Args:
        weights: float32 ``(K, C / groups, kh, kw)``.
        offset: float64 ``(1,)`` or ``(C,)``.
        shape: the input's, ``(N, C, H, W)``.

    Returns:
        float64 ``(1, K, 1, 1)``, or with padding ``(1, K, H', W')``; None where that needs a size that is not known.
    """
    if weights.ndim != 4:
        return None
    count, groups = weights.shape[0], integer(node, "group", 1)
    if offset.size == 1:
        taps = weights.sum(1, dtype=np.float64) * offset.reshape(())
    else:
        grouped = weights.astype(np.float64).reshape(groups, count // groups, *weights.shape[1:])
        taps = np.einsum("gkcij,gc->gkij", grouped, offset.reshape(groups, -1)).reshape(count, *weights.shape[2:])
    size = tuple(shape[2:]) if len(shape) == 4 else (None, None)
    seen = [_seen(node, axis, weights.shape[2 + axis], size[axis]) for axis in (0, 1)]
    rows, columns = seen
    if rows is None or columns is None:
        return None
    if rows.all() and columns.all():
        return np.asarray(taps.sum((1, 2))).reshape(1, -1, 1, 1)
    return np.asarray(np.einsum("khw,ih,jw->kij", taps, rows, columns, optimize=True))[np.newaxis]


def _seen(node: onnx.NodeProto, axis: int, kernel: int, size: int | None) -> np.ndarray | None:
    """Return which taps lie on the image and not on padding, float64 ``(outputs, kernel)``, along one axis.

    Where there is no padding, all do, everywhere: one row says so.
    """
    stride, dilation = integers(node, "strides", (1, 1))[axis], integers(node, "dilations", (1, 1))[axis]
    reach = (kernel - 1) * dilation + 1
    mode = attribute(node, "auto_pad", b"NOTSET")
    before, after = integers(node, "pads", (0, 0, 0, 0))[axis::2]
    if mode == b"VALID":
        before = after = 0
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        if size is None:
            return None
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        before = total // 2 if mode == b"SAME_UPPER" else total - total // 2
        after = total - before
    if not before and not after:
        return np.ones((1, kernel))
    if size is None:
        return None
    outputs = (size + before + after - reach) // stride + 1
    places = np.arange(outputs)[:, np.newaxis] * stride - before + np.arange(kernel) * dilation
    return ((places >= 0) & (places < size)).astype(np.float64)


def _averages_padding(node: onnx.NodeProto) -> bool:
    """Whether an average pool counts zeros from beyond the border, so that a constant's mean is less than it."""
    if node.op_type != "AveragePool" or not integer(node, "count_include_pad", 0):
        return False
    fixed = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    return not fixed or any(integers(node, "pads", (0,))) or bool(integer(node, "ceil_mode", 0))


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an attribute that is a whole number."""
    value: Any = attribute(node, name, default)
    return int(value)


def integers(node: onnx.NodeProto, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """Return an attribute that is a list of whole numbers."""
    value: Any = attribute(node, name, default)
    return tuple(int(one) for one in value)
