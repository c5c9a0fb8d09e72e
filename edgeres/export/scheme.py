"""What one QuantizeLinear or DequantizeLinear says: its scale and zero point, and the integers that they are for.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 10 to 25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.artifacts import FileGrid

Q, DQ = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx", "com.microsoft")
INT8 = (-128, 127)


@dataclass(frozen=True)
class Scheme:
    """Scale and zero point of a Q or a DQ: float32 and int64, ``()`` or ``(C,)``; the integers' first and last."""

    scale: np.ndarray
    zero: np.ndarray
    first: int
    last: int
    kind: str
    axis: int

    @property
    def grid(self) -> FileGrid | None:
        """Return the grid of an activation; None where it has one per channel, or no whole numbers."""
        if self.scale.size != 1 or self.first == self.last:
            return None
        zero = int(self.zero.reshape(-1)[0])
        return FileGrid(float(self.scale.reshape(-1)[0]), self.first - zero, self.last - zero)

    @property
    def symmetric(self) -> bool:
        """Whether its steps run from −128 to 127 in every channel, as TensorRT's do."""
        low, high = self.first - self.zero, self.last - self.zero
        return bool((low == INT8[0]).all() and (high == INT8[1]).all())

    @property
    def from_zero(self) -> bool:
        """Whether it cuts at zero, in every channel."""
        return self.first != self.last and bool((self.zero == self.first).all())

    def fits(self, dims: list[int]) -> bool:
        """Whether there is one scale, or one for each place along the axis of a tensor of that shape."""
        return self.scale.size == 1 or (bool(dims) and dims[self.axis % len(dims)] == self.scale.size)

    def same(self, other: Scheme) -> bool:
        """Whether both stand for the same numbers; one scale may be a scalar here and a list of one there."""
        return np.array_equal(self.scale.reshape(-1), other.scale.reshape(-1)) and np.array_equal(
            self.zero.reshape(-1), other.zero.reshape(-1)
        )


def scheme_of(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], written: str = "") -> Scheme | str:
    """Return what a Q or a DQ says, or in words what is wrong with it.

    Args:
        constants: the graph's initializers, by name.
        written: the type of the integers that a DQ reads, such as ``int8``, where a Q wrote them.
    """
    names = [node.input[1], *(name for name in node.input[2:] if name)]
    if any(name not in constants for name in names):
        return "its scale or zero point is computed"
    scale = numpy_helper.to_array(constants[names[0]]).astype(np.float32)
    if not scale.size:
        return "it has no scale at all"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "a scale is zero, negative or not finite"
    if len(names) > 1:
        kind, points = _name(constants[names[1]].data_type), numpy_helper.to_array(constants[names[1]])
    else:
        stored = constants.get(node.input[0]) if node.op_type == DQ else None
        given = attribute(node, "output_dtype", 0) if node.op_type == Q else 0
        type_ = stored.data_type if stored is not None else given
        kind, points = _name(type_) if type_ else written or "uint8", np.zeros(scale.shape)
    if points.size not in (1, scale.size):
        return f"it has {scale.size} scales and {points.size} zero points"
    bits = int(kind.partition("int")[2] or 0)  # of float8e4m3fn and its like, 0
    whole = 2**bits - 1
    first = 0 if kind.startswith("u") or not bits else -(whole + 1) // 2
    points = np.asarray(points).astype(np.float64).astype(np.int64)
    return Scheme(scale, points, first, first + whole, kind, int(attribute(node, "axis", 1)))


def real(stored: np.ndarray, scheme: Scheme, node: onnx.NodeProto) -> np.ndarray | None:
    """Return the float32 numbers that stored ones stand for; None where scales and shape do not go together."""
    scale, zero, block = scheme.scale, scheme.zero, int(attribute(node, "block_size", 0))
    try:
        if block:
            size = stored.shape[scheme.axis]
            scale, zero = (np.repeat(x, block, scheme.axis).take(range(size), scheme.axis) for x in (scale, zero))
        elif scale.size > 1:
            shape = [-1 if i == scheme.axis % stored.ndim else 1 for i in range(stored.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        values = (stored.astype(np.float64) - zero) * scale.astype(np.float64)
        return values.astype(np.float32).reshape(stored.shape) if values.size == stored.size else None
    except (IndexError, ValueError, ZeroDivisionError):
        return None


def attribute(node: onnx.NodeProto, name: str, default: int) -> Any:
    """Return the value of a node's attribute, or the default where it is not written."""
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def _name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower()
