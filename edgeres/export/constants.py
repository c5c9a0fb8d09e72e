"""What of a graph can be computed beforehand, and is: in seconds and in little memory, whatever the file holds."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeres.export.shapes import shapes_of

LARGEST_FOLDED = 1 << 24  # elements: folding an Expand into something huge would only bloat the file
FOLDED_PER_STORED = 2  # all that is folded at a time may have so many elements more for each of the file's
WORK = 1 << 28  # elements read and made, or products, at a time: seconds
WORK_PER_STORED = 8  # as many more for each element of the file
SELECTING = ("NonZero", "Compress", "Unique")  # nobody can say beforehand how much of its input comes out
PRODUCTS = ("MatMul", "Gemm")
# What onnx's evaluator computes element by element in Python, and how much longer one takes there.
SINGLY = ("Erf", "GatherElements", "GatherND", "ScatterElements", "ScatterND")
SLOWER = 1 << 8
# What exporters leave to be computed, and NumPy computes at once: of the others, such as Conv and GridSample, the
# evaluator computes some in minutes.
FOLDED = {
    *SELECTING,
    *PRODUCTS,
    *SINGLY,
    *("Constant", "ConstantOfShape", "EyeLike", "Range", "OneHot", "Shape", "Size", "Identity", "Dropout", "Cast"),
    *("CastLike", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Gather"),
    *("Expand", "Tile", "Pad", "Trilu", "DepthToSpace", "SpaceToDepth", "Where", "TopK", "ArgMax", "ArgMin", "CumSum"),
    *("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Sqrt", "Exp", "Log", "Reciprocal", "Sin", "Cos", "Tan", "Tanh"),
    *("Atan", "Sigmoid", "HardSigmoid", "Relu", "LeakyRelu", "Softplus", "Clip", "Softmax", "IsNaN", "IsInf"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean"),
    *("Not", "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
}


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace nodes whose inputs are all constant by their values, as onnx's reference evaluator computes them.

    Only what is quickly computed, and small, is: operators of ``FOLDED``, and no more than the limits above.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    stored = sum(values.size for values in constants.values())
    room, work = LARGEST_FOLDED + FOLDED_PER_STORED * stored, WORK + WORK_PER_STORED * stored
    kept = []
    for node in graph.node:
        foldable = (
            node.op_type in FOLDED
            and node.domain in ("", "ai.onnx")
            and all(not name or name in constants for name in node.input)
            and not outputs.intersection(node.output)
        )
        single = _alone(node, constants, model) if foldable else None
        cost = None if single is None else _cost(single, constants)
        values = None
        if single is not None and cost is not None and cost <= work:
            values, work = _evaluated(single), work - cost
        if values is None or sum(value.size for value in values) > room:
            kept.append(node)
        else:
            room -= sum(value.size for value in values)
            constants.update(zip(node.output, values, strict=True))
            graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in zip(node.output, values, strict=True))
    del graph.node[:]
    graph.node.extend(kept)


def _alone(node: onnx.NodeProto, constants: dict[str, np.ndarray], model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of one node, whose inputs are constant."""
    initializers = [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in node.output]
    return helper.make_model(
        helper.make_graph([node], "constant", [], outputs, initializers),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _cost(single: onnx.ModelProto, constants: dict[str, np.ndarray]) -> int | None:
    """Return how many elements a node reads and makes, or multiplies; None where what it makes is huge or not known."""
    node = single.graph.node[0]
    try:
        shapes = shapes_of(single)
    except MemoryError:
        raise
    except Exception:  # what onnx cannot infer it refuses in several ways; the node then simply stays
        return None
    known = [shapes.get(name, [None]) for name in node.output if name]
    read = [constants[name].size for name in node.input if name]
    if node.op_type in SELECTING:
        return sum(read)
    if not all(_is_small(shape) for shape in known):
        return None
    made = sum(math.prod(extent for extent in shape if isinstance(extent, int)) for shape in known)
    if node.op_type in PRODUCTS:
        return math.isqrt(math.prod(read[:2]) * made)  # (mk · kn · mn)^½ is m · n · k
    return (sum(read) + made) * (SLOWER if node.op_type in SINGLY else 1)


def _is_small(shape: list[int | str | None]) -> bool:
    """Whether a tensor is known to be small enough to be folded."""
    extents = [extent for extent in shape if isinstance(extent, int) and extent >= 0]
    return len(extents) == len(shape) and math.prod(extents) <= LARGEST_FOLDED


def _evaluated(single: onnx.ModelProto) -> list[np.ndarray] | None:
    """Return a node's outputs; None where onnx's evaluator cannot compute them."""
    try:
        return [np.asarray(value) for value in ReferenceEvaluator(single).run(None, {})]
    except MemoryError:
        raise
    except Exception:  # the evaluator raises whatever an operator's own code raises; the node then simply stays
        return None
