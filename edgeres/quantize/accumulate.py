"""What a quantized layer of a Q/DQ graph adds up in integers, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from edgeres.affine import dequantize, quantize
from edgeres.quantize.graph import Graph
from edgeres.quantize.offset import Shape, convolved, integer, integers, is_flat
from edgeres.quantize.shift import effective_bias

HALF = 128
"""What is added to an int8 to make it an unsigned byte."""
LARGEST_BIAS = 2.0**30
EMPTY = 2.0**20
"""So many steps are the bias of a channel without weights."""
FLAT = 1e-5
"""Of the larger of two maps: how far float32 lets their difference vary where it stands for a constant."""


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: ``name`` holds uint8, channels last where it is an image; its value is (code − zero) · scale.

    ``shift`` is what the file took from the true value before it was quantized, ``top`` the largest code.
    """

    name: str
    scale: np.float32
    zero: int
    shift: np.ndarray
    top: int = 255


@dataclass(frozen=True)
class Layer:
    """A weighted node on bytes. Its value is ``scale`` · ``steps`` · Σ (code − ``zero``) · weight + ``bias`` +
    ``border``, padding being with the code ``zero``.

    ``weights`` are int8, ``(K, C / groups, kh, kw)`` or ``(K, D)``; ``steps`` and ``bias`` float64 ``(K,)``;
    ``border`` is a map ``(1, K, H, W)`` that no constant makes up for, or None.
    """

    node: onnx.NodeProto
    codes: Codes
    weights: np.ndarray
    steps: np.ndarray
    bias: np.ndarray
    zero: int
    border: np.ndarray | None = None

    @property
    def groups(self) -> int:
        return integer(self.node, "group", 1)

    def whole(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the weights' steps, float64 ``(K,)``, and the bias in steps of the sum, int32 ``(K,)``; None where a
        bias is none that 32 bits hold beside the sum.

        A channel whose weights are all zero is its bias; its step is one that tells it well.
        """
        empty = ~self.weights.reshape(len(self.weights), -1).any(axis=1) & (self.bias != 0)
        steps = np.where(empty, np.abs(self.bias) / EMPTY / float(self.codes.scale), self.steps)
        steps = steps.astype(np.float32).astype(np.float64)  # as it is stored
        unit = steps * float(self.codes.scale)
        if not (unit > 0).all() or not (np.abs(self.bias / unit) < LARGEST_BIAS).all():
            return None
        return steps, np.rint(self.bias / unit).astype(np.int32)


@dataclass(frozen=True)
class Tail:
    """What follows a convolution up to its Q: a border map that is added, nodes that bytes imply or let pass, the Q.

    ``tensor`` is what the last node that was taken along puts out; ``quantizer`` is None where a float is read.
    """

    tensor: str
    border: np.ndarray | None
    taken: tuple[onnx.NodeProto, ...]
    quantizer: onnx.NodeProto | None

    @property
    def pools(self) -> list[onnx.NodeProto]:
        return [node for node in self.taken if node.op_type == "MaxPool"]

    @property
    def is_rectified(self) -> bool:
        return any(node.op_type == "Relu" for node in self.taken)


def tail_of(graph: Graph, node: onnx.NodeProto) -> Tail:
    """Return what of the nodes behind a convolution goes with it."""
    tensor, border = node.output[0], None
    taken: list[onnx.NodeProto] = []
    after = _only_reader(graph, tensor)
    if after is not None and after.op_type == "Add":
        other = graph.constant(after.input[1] if after.input[0] == tensor else after.input[0])
        if other is not None and other.ndim == 4:
            tensor, border, taken = after.output[0], other.astype(np.float64), [after]
    short = Tail(tensor, border, tuple(taken), None)
    while (after := _only_reader(graph, tensor)) is not None:
        if after.op_type == "QuantizeLinear":
            return Tail(tensor, border, tuple(taken), after)
        if after.op_type not in ("Relu", "MaxPool") or len(after.output) != 1:
            break
        tensor = after.output[0]
        taken.append(after)
    return short


def _only_reader(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    readers = graph.readers(tensor)
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def layer_of(graph: Graph, node: onnx.NodeProto, codes: Codes) -> Layer | None:
    """Return a Conv, Gemm or MatMul on bytes; None where its weights are not quantized, or its bias is computed."""
    made = graph.producer.get(node.input[1])
    source = graph.producer.get(made.input[0]) if made is not None and made.op_type == "DequantizeLinear" else None
    if source is None or source.op_type != "QuantizeLinear":
        return None
    values, steps = graph.constant(source.input[0]), graph.constant(source.input[1])
    named = len(node.input) > 2 and bool(node.input[2])
    bias = graph.constant(node.input[2]) if named else None
    if values is None or steps is None or (named and bias is None):
        return None
    axis = integer(source, "axis", 1) if steps.ndim else None
    weights = quantize(values.astype(np.float32), steps, axis)
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not integer(node, "transB", 0)):
        weights, axis = weights.T, None if axis is None else 1 - axis
    if weights.ndim not in (2, 4) or axis not in (None, 0):
        return None
    count = (len(weights),)
    added = np.broadcast_to(effective_bias(node, bias), count)
    return Layer(node, codes, weights, np.broadcast_to(steps.astype(np.float64), count), added, codes.zero)


def with_border(layer: Layer, border: np.ndarray | None, shape: Shape) -> Layer:
    """Return a convolution with what a map adds to it; what only gives a shifted input back becomes its bias.

    Args:
        border: float64 ``(1, K, H, W)`` or ``(1, K, 1, 1)``, or None.
        shape: its input's, as in the file.
    """
    if border is None or is_flat(border):
        return replace(layer, bias=layer.bias if border is None else layer.bias + border.reshape(-1))
    if is_whole(layer.codes):
        given = convolved(layer.node, _reals(layer), layer.codes.shift.reshape(-1), shape)
        if given is not None and given.shape == border.shape:
            rest = border - given
            flat = rest.mean((2, 3), keepdims=True)
            if np.abs(rest - flat).max() <= FLAT * max(np.abs(border).max(), np.abs(given).max()):
                return replace(layer, bias=layer.bias + flat.reshape(-1), zero=0)
    return replace(layer, border=border)


def is_whole(codes: Codes) -> bool:
    """Whether a shift is such that the byte 0 stands for the true value 0."""
    whole = codes.shift.ndim == 0 and np.isclose(codes.shift, HALF * np.float64(codes.scale), rtol=1e-6)
    return bool(whole) and codes.zero == HALF


def _reals(layer: Layer) -> np.ndarray:
    return dequantize(layer.weights, layer.steps.astype(np.float32), 0)


def output_size(layer: Layer, shape: Shape) -> tuple[int, int] | None:
    """Return the height and width of a convolution's output; None where they are not known, or pads not written out."""
    size, kernel = shape[2:], layer.weights.shape[2:]
    if len(shape) != 4 or None in size or any(one.name == "auto_pad" for one in layer.node.attribute):
        return None
    pads, strides = integers(layer.node, "pads", (0, 0, 0, 0)), integers(layer.node, "strides", (1, 1))
    dilations = integers(layer.node, "dilations", (1, 1))
    height, width = (
        (int(size[axis] or 0) + pads[axis] + pads[axis + 2] - (kernel[axis] - 1) * dilations[axis] - 1)
        // strides[axis] + 1
        for axis in (0, 1)
    )  # fmt: skip
    return height, width
