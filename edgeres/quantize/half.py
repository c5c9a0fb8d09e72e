"""FP16 as a property of the graph: float16 weights and arithmetic, float32 at the network's two ends."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeres.artifacts import LayerPlan
from edgeres.errors import QuantizationError

# These read a float tensor as numbers that must not lose digits, or whose type the operator fixes to float32.
FLOAT32_INPUTS = {"Resize": (1, 2)}
LARGEST = float(np.finfo(np.float16).max)


def write_fp16(model: onnx.ModelProto, modules: dict[str, str]) -> tuple[onnx.ModelProto, tuple[LayerPlan, ...]]:
    """Return a copy of ``model`` that computes in float16 between two Casts, and what was decided for each node.

    Args:
        model: the FP32 graph, with float32 input and output, which stay float32.
        modules: node name → torch module.

    Raises:
        QuantizationError: a weight is beyond float16's largest number, 65504.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    keep = {node.input[i] for node in graph.node for i in FLOAT32_INPUTS.get(node.op_type, ()) if i < len(node.input)}
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in keep}
    for node in graph.node:
        for found in node.attribute:
            if node.op_type == "Cast" and found.name == "to" and found.i == TensorProto.FLOAT:
                found.i = TensorProto.FLOAT16
            elif found.type == onnx.AttributeProto.TENSOR:
                tensors[f"{node.name}.{found.name}"] = found.t
    large = [where for where, tensor in tensors.items() if not _halve(tensor)]
    if large:
        raise QuantizationError(
            f"{', '.join(large)}: beyond float16's largest number, {LARGEST:.0f}. Use fp32 or int8."
        )
    _cast_ends(graph)
    del graph.value_info[:]
    reason = "all arithmetic in float16; input and output are float32"
    layers = (LayerPlan(n.name, n.op_type, modules.get(n.name, ""), "fp16", reason) for n in model.graph.node)
    return result, tuple(layers)


def _halve(tensor: onnx.TensorProto) -> bool:
    """Make a float32 tensor float16, in place; return False where a number in it is too large for that."""
    if tensor.data_type == TensorProto.FLOAT:
        values = numpy_helper.to_array(tensor)
        if values.size and np.abs(values).max() > LARGEST:
            return False
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    return True


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Put a Cast behind each float32 input and in front of each float32 output."""
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            half = f"{value.name}_fp16"
            for node in graph.node:
                node.input[:] = [half if name == value.name else name for name in node.input]
            cast = helper.make_node("Cast", [value.name], [half], name=f"{value.name}_Cast", to=TensorProto.FLOAT16)
            graph.node.insert(0, cast)
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            half = f"{value.name}_fp16"
            for node in graph.node:
                node.input[:] = [half if name == value.name else name for name in node.input]
                node.output[:] = [half if name == value.name else name for name in node.output]
            graph.node.append(
                helper.make_node("Cast", [half], [value.name], name=f"{value.name}_Cast", to=TensorProto.FLOAT)
            )
