"""What an ONNX file says about itself: each layer's precision, as its Q/DQ pairs and types have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from edgeres.errors import ExportError, first_line
from edgeres.quantize.graph import Graph
from edgeres.quantize.lint import lint
from edgeres.quantize.offset import shifts_of
from edgeres.quantize.pairs import kind_of, ranges_of
from edgeres.quantize.shift import activation_range
from edgeres.toolmarks import tool_of

PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Constant")
TYPES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
}


def describe_file(path: Path) -> dict[str, Any]:
    """Return an ONNX file's opset, input, layers (name, type, precision), ranges, and breaches of TensorRT's rules.

    ``quantized_by`` is the tool that a quantized file looks like; ``ranges`` are those of its Q/DQ pairs, by tensor.

    ``activation_range`` is as of :func:`edgeres.quantize.shift.activation_range`, and ``shifted`` counts the tensors
    that are quantized over the full int8 range; the input, with a shift for each channel, does not count.

    Raises:
        ExportError: the file cannot be read as ONNX.
    """
    try:
        model = onnx.load(path)
    except Exception as problem:  # protobuf's, onnx's and the file system's errors share no base but Exception
        raise ExportError(f"{path} cannot be read as ONNX: {first_line(problem)}") from None
    if not model.graph.node:
        raise ExportError(f"{path} holds no operators: it is empty or not an ONNX model")
    try:
        return _facts(model)
    except Exception:
        _check(model, path)  # what is wrong with a valid file is a bug of ours
        raise


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that is not valid ONNX."""
    try:
        onnx.checker.check_model(model)
    except Exception as problem:  # damaged names make the checker's bindings raise other kinds than its own two
        raise ExportError(f"{path} is not valid ONNX: {first_line(problem)}") from None


def _facts(model: onnx.ModelProto) -> dict[str, Any]:
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"  # a breach must say where it is
    graph = Graph(model)
    layers = [
        {"name": node.name, "type": node.op_type, "precision": _precision(graph, node)}
        for node in graph.nodes
        if node.op_type not in PLUMBING
    ]
    pairs = [node for node in graph.nodes if node.op_type == "DequantizeLinear"]
    tool = tool_of(model.producer_name, [entry.key for entry in model.metadata_props], [x.output[0] for x in pairs])
    return {
        "opset": next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None),
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "layers": layers,
        "activation_range": activation_range(model),
        "shifted": sum(not shift.ndim for shift in shifts_of(model).values()),
        "quantized_by": tool if pairs else "",
        "ranges": ranges_of(graph),
        "lint": lint(model),
    }


def _precision(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the integers' type where the data comes from DequantizeLinear, else a float initializer's, or ``fp32``."""
    made = [graph.producer.get(name) for name in node.input[:2] if name]
    pairs = [pair for pair in made if pair is not None and pair.op_type == "DequantizeLinear"]
    if pairs:
        whole = len(pairs) == len(made) or node.op_type not in ("Conv", "Gemm", "MatMul", "Add")
        return kind_of(graph, pairs[0]) if whole else "mixed"
    kinds = {graph.initializers[name].data_type for name in node.input if name in graph.initializers}
    found = [TYPES[kind] for kind in kinds if kind in TYPES]
    return found[0] if found else "follows"
