"""The shapes of a model's tensors, as onnx infers them: in little memory, whatever the model says."""

from __future__ import annotations

import math

import onnx
from onnx import helper

LONGEST_SHAPE = 1 << 10  # elements: no list of a tensor's dimensions, axes or sizes has as many


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Return tensors' shapes as onnx infers them: numbers, symbols such as ``batch``, or None for an unknown dimension.

    What the file itself claims of its intermediate tensors and outputs is left aside: it may be stale.
    """
    bare = _without_weights(model)
    shapes = _inferred(bare, False)
    # What follows the values of tensors has a node's output in memory, number by number, however long it is.
    if all(
        len(shape) > 1 or math.prod(n for n in shape if isinstance(n, int)) <= LONGEST_SHAPE
        for shape in shapes.values()
    ):
        shapes = _inferred(bare, True)
    shapes.update((tensor.name, list(tensor.dims)) for tensor in model.graph.initializer)
    return shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose large constants are inputs, and which claims no shapes but those of its inputs."""
    graph = model.graph
    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= LONGEST_SHAPE]
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = "shapes"
    bare.graph.node.extend(graph.node)
    bare.graph.initializer.extend(small)
    bare.graph.sparse_initializer.extend(graph.sparse_initializer)
    bare.graph.input.extend(graph.input)
    given = {value.name for value in graph.input} | {tensor.name for tensor in small}
    bare.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in given
    )
    for value in graph.output:
        bare.graph.output.add().CopyFrom(value)
        bare.graph.output[-1].type.tensor_type.ClearField("shape")
    return bare


def _inferred(model: onnx.ModelProto, by_value: bool) -> dict[str, list[int | str | None]]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=by_value).graph
    shapes: dict[str, list[int | str | None]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [
                d.dim_value if d.HasField("dim_value") else d.dim_param or None  # a dimension may say neither
                for d in dims
            ]
    return shapes
