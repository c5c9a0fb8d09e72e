"""The rules that every written graph keeps, and a check for each: TensorRT breaks most of them in silence.

A per-channel scale on the wrong axis, weights quantized without their input, a stray Q/DQ between a convolution and its
ReLU, or a pool with int8 on one side do not fail a build: the layer just runs in FP32. Zero points, uint8 and biases do
fail it, but only on the robot. Sources: ONNX opset 13–17; onnx-tensorrt's importers (8.5 to 11); NvInfer.h on
IQuantizeLayer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx

from edgeres.errors import LintError, first_line
from edgeres.quantize.audit import audit
from edgeres.quantize.graph import BRANCH_ENDS, POOLS, RESHAPES, Graph, attribute

MAX_OPSET, MIN_OPSET = 17, 13
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def check(model: onnx.ModelProto, where: str, kept: Collection[str] = (), fp32: onnx.ModelProto | None = None) -> None:
    """Refuse a graph that breaks a rule, or that is not valid ONNX; arguments as in :func:`lint`.

    Raises:
        LintError: every breach, one sentence each; ``where`` names the graph.
    """
    problems = lint(model, kept, fp32)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as problem:  # damaged names make the checker's bindings raise other kinds than its own two
        problems.append(f"edgeres wrote ONNX that is not valid ({first_line(problem)}). Report it with the FP32 model")
    if problems:
        raise LintError(where, problems)


def lint(model: onnx.ModelProto, kept: Collection[str] = (), fp32: onnx.ModelProto | None = None) -> list[str]:
    """Return every breach of the rules in ``model``, one sentence each; an empty list means that it is legal.

    Args:
        kept: names of nodes that are meant to run in float between int8 neighbours.
        fp32: what it was quantized from, where that is at hand: without it, nobody can tell what part of a bias gives a
            shift back.
    """
    graph = Graph(model)
    problems = list(_opset(model))
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            problems.extend(f"{node.name}: {problem}" for problem in _parameters(graph, node))
        if node.op_type == "QuantizeLinear":
            problems.extend(f"{node.name}: {problem}" for problem in _quantize(graph, node))
        if node.op_type == "DequantizeLinear":
            problems.extend(f"{node.name}: {problem}" for problem in _dequantize(graph, node))
        if node.op_type in WEIGHTED:
            problems.extend(f"{node.name}: {problem}" for problem in _weighted(graph, node))
        if node.op_type == "Add":
            problems.extend(f"{node.name}: {problem}" for problem in _addition(graph, node))
        if node.op_type in POOLS:
            problems.extend(f"{node.name}: {problem}" for problem in _pool(graph, node, node.name in kept))
        if node.op_type in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"):
            problems.append(f"{node.name}: TensorRT does not read {node.op_type}; use QuantizeLinear/DequantizeLinear")
    problems.extend(_byte_inputs(graph))
    problems.extend(audit(graph, fp32))
    return problems


def _opset(model: onnx.ModelProto) -> Iterator[str]:
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            used = [node.op_type for node in model.graph.node if node.domain == opset.domain]
            if used:
                yield f"operator {used[0]} is of domain {opset.domain}, not of standard ONNX"
        elif not MIN_OPSET <= opset.version <= MAX_OPSET:
            yield f"opset {opset.version}: per-channel Q/DQ needs {MIN_OPSET}, TensorRT 8.5 at most {MAX_OPSET}"


def _parameters(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Rules on scale and zero point of a Q or a DQ."""
    if len(node.input) != 3 or not node.input[2]:
        yield "no zero point is written; TensorRT 8.5 and 8.6 want all three inputs"
        return
    scale, zero = graph.constant(node.input[1]), graph.constant(node.input[2])
    if scale is None or zero is None:
        yield "scale and zero point must be constants"
        return
    if scale.dtype != np.float32:
        yield f"its scale is {scale.dtype}; TensorRT 8 wants float32"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "a scale is zero, negative or not finite"
    if zero.dtype != np.int8:
        yield f"its zero point is {zero.dtype}; only int8 is symmetric"
    elif zero.any():
        yield "a zero point is not zero; TensorRT quantizes symmetrically"
    if scale.shape != zero.shape:
        yield f"scale has shape {scale.shape}, zero point {zero.shape}"
    weights = graph.constant(node.input[0])
    if weights is None and (made := graph.producer.get(node.input[0])) is not None and made.op_type == "QuantizeLinear":
        weights = graph.constant(made.input[0])
    if weights is not None and scale.size > 1:
        axis = _axis(node)
        channels = weights.shape[axis] if -weights.ndim <= axis < weights.ndim else 0
        if scale.size != channels:
            yield f"it has {scale.size} scales for {channels} channels along axis {axis}"


def _quantize(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Rules on what may be quantized, and how finely."""
    source, scale = node.input[0], graph.constant(node.input[1])
    if scale is not None and scale.size > 1 and graph.is_activation(source):
        yield "an activation is quantized per channel; TensorRT runs such a layer in float"
    readers = graph.readers(node.output[0])
    if not readers or any(reader.op_type != "DequantizeLinear" for reader in readers):
        yield "its output is not read by DequantizeLinear alone"
    made = graph.producer.get(source)
    if made is not None and made.op_type in ("Conv", "Add"):
        behind = [after.op_type for reader in readers for after in graph.readers(reader.output[0])]
        fused = [op_type for op_type in behind if op_type in ("Relu", "Clip", "BatchNormalization")]
        if fused:
            yield f"it stands between {made.op_type} {made.name} and its {fused[0]}, which would no longer fuse"
    along = _axis(node) if scale is not None and scale.size > 1 and not graph.is_activation(source) else None
    others = [reader for reader in graph.readers(source) if reader.op_type == "QuantizeLinear" and reader is not node]
    if any(along is None or _axis(other) == along for other in others):
        yield f"tensor {source} is quantized twice; one tensor has one scale"


def _dequantize(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Rules on what a DQ may undo, and for whom."""
    made = graph.producer.get(node.input[0])
    if made is not None and made.op_type == "QuantizeLinear" and list(made.input[1:]) != list(node.input[1:]):
        written, read = (graph.constant(pair.input[1]) for pair in (made, node))
        if written is None or read is None or not np.array_equal(written, read):
            yield f"its scale is not that of {made.name}"
    scale = graph.constant(node.input[1])
    per_channel = made is not None and made.op_type == "QuantizeLinear" and scale is not None and scale.ndim > 0
    if made is not None and per_channel and _axis(made) != _axis(node):
        yield f"it dequantizes along axis {_axis(node)} what {made.name} quantizes along axis {_axis(made)}"
    for reader, index in graph.consumers.get(node.output[0], []):
        if reader.op_type in ("Conv", "Gemm") and index == 2:
            yield f"it feeds the bias of {reader.name}; TensorRT keeps biases in float"


def _weighted(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Rules on a weighted layer: both inputs or neither, and channels on the axis that TensorRT fuses."""
    pairs = [graph.producer.get(name) for name in node.input[:2]]
    quantized = [pair is not None and pair.op_type == "DequantizeLinear" for pair in pairs]
    if quantized[0] != quantized[1]:
        yield "only its " + ("input" if quantized[0] else "weights") + " is quantized: TensorRT runs it in float"
    if not quantized[1] or pairs[1] is None:
        return
    scale = graph.constant(pairs[1].input[1])
    if scale is None or scale.size == 1:
        return
    wanted = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
    axis = _axis(pairs[1])
    if axis != wanted:
        yield f"its weights are quantized along axis {axis}, its output channels are axis {wanted}: it runs in float"


def _addition(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """The convolution's side of a residual addition stays in high precision, so that the addition fuses into it."""
    pairs = [graph.producer.get(name) for name in node.input]
    quantized = [pair is not None and pair.op_type == "DequantizeLinear" for pair in pairs]
    if all(quantized):
        if any(pair is not None and graph.is_activation(pair.input[0]) for pair in pairs):
            yield "both inputs are quantized; quantize the skip input only"
        return
    if not any(quantized):
        return
    branch, skip = (0, 1) if quantized[0] else (1, 0)
    depth = graph.convolutions_above
    deeper = depth.get(node.input[branch], 0) > depth.get(node.input[skip], 0)
    if deeper and graph.is_activation(node.input[skip]) and _source(graph, node.input[branch]) in BRANCH_ENDS:
        yield "its branch is quantized and its skip input is not; quantize the skip input only"


def _source(graph: Graph, tensor: str) -> str:
    """Return the type of the operator that makes a tensor, before it was quantized and dequantized."""
    made = graph.producer.get(tensor)
    while made is not None and made.op_type in ("QuantizeLinear", "DequantizeLinear"):
        made = graph.producer.get(made.input[0])
    return "" if made is None else made.op_type


def _pool(graph: Graph, node: onnx.NodeProto, kept: bool) -> Iterator[str]:
    """An average pool has int8 on both sides or on neither; what moves no data, or shifts it, may stand behind it."""
    made = graph.producer.get(node.input[0])
    quantized = made is not None and made.op_type == "DequantizeLinear"
    behind = _ends(graph, node.output[0])
    if quantized and set(behind) != {"QuantizeLinear"}:
        yield "its input is quantized, but not all that reads its output: TensorRT runs it in float"
    if not quantized and graph.is_activation(node.input[0]) and set(behind) == {"QuantizeLinear"} and not kept:
        yield "its output is quantized, but not its input: TensorRT runs it in float"


def _ends(graph: Graph, tensor: str) -> list[str]:
    """Return the operators that read a tensor's values, looking through what moves no data, and through an addition of
    a constant; "" is a graph output."""
    ends = [""] if tensor in graph.outputs else []
    for reader, index in graph.uses(tensor):
        shifts = reader.op_type == "Add" and not all(graph.is_activation(name) for name in reader.input)
        through = shifts or (reader.op_type in RESHAPES and index == 0)
        ends.extend(_ends(graph, reader.output[0]) if through else [reader.op_type])
    return ends


def _axis(node: onnx.NodeProto) -> int:
    """Return the axis that a Q or a DQ has its scales along; it matters where there are several."""
    axis = attribute(node, "axis", 1)
    assert isinstance(axis, int)
    return axis


def _byte_inputs(graph: Graph) -> Iterator[str]:
    for value in graph.model.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
            others = [reader for reader in graph.readers(value.name) if reader.op_type != "Cast"]
            if others:
                yield f"uint8 input {value.name} is read by {others[0].op_type}; TensorRT wants a Cast first"
