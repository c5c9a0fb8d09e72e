"""Images with their channels last, as TensorFlow has them, fed with their channels first."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

FIRST = [0, 3, 1, 2]


def channels_first(model: onnx.ModelProto) -> bool:
    """Let a model whose images are (N, h, w, 3) and are turned first of all take (N, 3, h, w), in place.

    Returns whether it was one: its only input has three channels behind, and all that reads it is a Transpose.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        return False
    name, dims = inputs[0].name, inputs[0].type.tensor_type.shape.dim
    readers = [node for node in graph.node if name in node.input]
    turned = all(node.op_type == "Transpose" and _permutation(node) == FIRST for node in readers)
    if not (readers and turned and len(dims) == 4 and dims[3].dim_value == 3 and dims[1].dim_value != 3):
        return False
    shape = [onnx.TensorShapeProto.Dimension.FromString(dims[i].SerializeToString()) for i in FIRST]
    del dims[:]
    dims.extend(shape)
    for node in readers:
        node.op_type = "Identity"
        del node.attribute[:]
    del graph.value_info[:]
    return True


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(helper.get_attribute_value(found)) for found in node.attribute if found.name == "perm"), [])
