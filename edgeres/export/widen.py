"""A file in float16, written in float32: the same numbers, computed with more digits."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

HALF = TensorProto.FLOAT16
COMPUTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def widen(model: onnx.ModelProto) -> bool:
    """Make all that is float16 in a model float32, in place; return whether it computes, or takes images, in float16.

    Casts to half precision become casts to float32. Inner graphs are left alone: control flow is refused elsewhere.
    """
    graph, found = model.graph, False
    halved = _computes_in_half(model)
    for tensor in graph.initializer:
        found |= _widen(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            found = True
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                found |= _widen(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i == HALF:
                attribute.i = TensorProto.FLOAT
                found = True
    if found:
        del graph.value_info[:]
        _drop_casts(model)
    return halved


def is_bfloat(model: onnx.ModelProto) -> bool:
    """Whether anything in a model is bfloat16."""
    graph, kind = model.graph, TensorProto.BFLOAT16
    values = [*graph.input, *graph.output, *graph.value_info]
    found = [tensor.data_type for tensor in graph.initializer] + [v.type.tensor_type.elem_type for v in values]
    for node in graph.node:
        found.extend(each.t.data_type for each in node.attribute if each.type == onnx.AttributeProto.TENSOR)
        found.extend(each.i for each in node.attribute if each.name in ("to", "dtype", "output_dtype"))
    return kind in found


def _computes_in_half(model: onnx.ModelProto) -> bool:
    """Whether a layer reads float16, or the model takes or gives it; weights that are only stored so do not count."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    ends = [value for value in (*graph.input, *graph.output) if value.type.tensor_type.elem_type == HALF]
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == HALF}
    return bool(ends) or any(node.op_type in COMPUTED and node.input[0] in halves for node in graph.node)


def _widen(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != HALF:
        return False
    values = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def _drop_casts(model: onnx.ModelProto) -> None:
    """Make each cast from float32 to float32 an Identity."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info)}
    kinds.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    for node in model.graph.node:
        to = next((found.i for found in node.attribute if found.name == "to"), 0)
        if node.op_type == "Cast" and to == TensorProto.FLOAT == kinds.get(node.input[0]):
            node.op_type = "Identity"
            del node.attribute[:]
