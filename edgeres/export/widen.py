"""A file in half precision, written in float32: the same numbers, computed with more digits."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widen(model: onnx.ModelProto) -> bool:
    """Make all that is float16 or bfloat16 in a model float32, in place; return whether anything was.

    Casts to half precision become casts to float32. Inner graphs are left alone: control flow is refused elsewhere.
    """
    graph, found = model.graph, False
    for tensor in graph.initializer:
        found |= _widen(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            found = True
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                found |= _widen(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
                found = True
    if found:
        del graph.value_info[:]
        _drop_casts(model)
    return found


def _widen(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in HALVES:
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
