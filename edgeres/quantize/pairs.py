"""What a file's Q/DQ pairs say, whoever wrote them: of each tensor the role, the type, the range, the zero points."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from edgeres.quantize.graph import Graph, attribute

ROLES = {1: "weight", 2: "bias"}
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def ranges_of(graph: Graph) -> dict[str, dict[str, Any]]:
    """Return what each quantized tensor is quantized to, by its name; a stored integer's by its initializer's.

    Each has ``role`` (activation, weight, bias or constant), ``type``, ``channels`` (1: one range for all) along
    ``axis``, ``scale`` (the largest), ``zero_point`` (the different ones, sorted), and the reach in the tensor's own
    units, ``minimum`` and ``maximum``, which are None for types that are no whole numbers.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        stored = node.op_type == "DequantizeLinear" and node.input[0] in graph.initializers
        if stored or node.op_type == "QuantizeLinear":
            pair = _pair(graph, node)
            found[node.input[0]] = max(found.get(node.input[0], pair), pair, key=_reach)  # of equals, the first
    return found


def _reach(pair: dict[str, Any]) -> float:
    """Return how far a range reaches; of several on one tensor the one that reaches furthest is kept and shown."""
    return max(abs(float(pair[end] or 0.0)) for end in ("minimum", "maximum"))


def kind_of(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the type of the integers that a Q makes or a DQ reads, such as ``int8``; uint8 where nothing says it."""
    zero = graph.initializers.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None:
        return _name(zero.data_type)
    given = int(str(attribute(node, "output_dtype", 0))) if node.op_type == "QuantizeLinear" else 0
    if node.op_type == "DequantizeLinear":
        if node.input[0] in graph.initializers:
            return _name(graph.initializers[node.input[0]].data_type)
        written = next((each for each in graph.nodes if node.input[0] in each.output), None)
        if written is not None and written.op_type == "QuantizeLinear":
            return kind_of(graph, written)
    return _name(given) if given else "uint8"


def _name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def _pair(graph: Graph, node: onnx.NodeProto) -> dict[str, Any]:
    kind, scale = kind_of(graph, node), graph.constant(node.input[1])
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    facts: dict[str, Any] = {"role": _role(graph, node), "type": kind}
    if scale is None or not scale.size or zero is None or zero.size not in (1, scale.size):
        return {**facts, "channels": None, "axis": None, "scale": None, "zero_point": None,
                "minimum": None, "maximum": None}  # fmt: skip
    steps, zeros = scale.astype(np.float64).reshape(-1), zero.astype(np.float64).reshape(-1)
    bits = int(kind.partition("int")[2] or 0)
    first = 0 if kind.startswith("u") else -(2 ** (bits - 1)) if bits else 0
    ends = [(edge - zeros) * steps for edge in (first, first + 2**bits - 1)] if bits else [None, None]
    return {
        **facts,
        "channels": steps.size,
        "axis": int(str(attribute(node, "axis", 1))) if steps.size > 1 else None,
        "scale": float(steps.max(initial=0.0)),
        "zero_point": sorted({int(each) for each in zeros}),
        "minimum": None if ends[0] is None else float(ends[0].min()),
        "maximum": None if ends[1] is None else float(ends[1].max()),
    }


def _role(graph: Graph, node: onnx.NodeProto) -> str:
    """Return what a pair's tensor is to the layers that read it; a constant may be turned on the way to them."""
    if graph.is_activation(node.input[0]):
        return "activation"
    tensors = list(node.output)
    for name in tensors:
        for reader, index in graph.consumers.get(name, []):
            if reader.op_type in ("QuantizeLinear", "DequantizeLinear", "Transpose", "Cast"):
                tensors.extend(reader.output)
            elif reader.op_type in WEIGHTED and index in ROLES:
                return ROLES[index]
    return "constant"
