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
    inferred = _inferred(bare, False)
    _cut_lists(bare, inferred)
    shapes = _dims(_inferred(bare, True))
    shapes.update((tensor.name, list(tensor.dims)) for tensor in model.graph.initializer)
    return shapes


def _cut_lists(bare: onnx.ModelProto, inferred: dict[str, onnx.ValueInfoProto]) -> None:
    """Make inputs of what nodes make as long lists: onnx follows lists number by number, however long they are."""
    kept = []
    for node in bare.graph.node:
        made = [inferred[name] for name in node.output if name in inferred]
        if any(_is_long(value) for value in made):
            bare.graph.input.extend(made)
        else:
            kept.append(node)
    del bare.graph.node[:]
    bare.graph.node.extend(kept)


def _is_long(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 1 and dims[0].dim_value > LONGEST_SHAPE


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


def _inferred(model: onnx.ModelProto, by_value: bool) -> dict[str, onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=by_value).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value for value in values if value.type.tensor_type.HasField("shape")}


def _dims(values: dict[str, onnx.ValueInfoProto]) -> dict[str, list[int | str | None]]:
    return {
        name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None  # a dimension may say neither
            for dim in value.type.tensor_type.shape.dim
        ]
        for name, value in values.items()
    }
