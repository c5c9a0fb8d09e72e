"""The form for strongly typed TensorRT (10.12 and newer): int8 where the Q/DQ graph says so, all else in FP16.

Such a builder takes every type from the graph: what the Q/DQ model leaves in float32 would run in float32, where older
builders choose FP16 themselves. Here each node that is no part of an int8 layer computes in float16, between Casts. An
int8 layer keeps its float32 scales, and with them bias, ReLU and addition in float32: it holds those numbers in
registers, as the int8 kernels of weakly typed builders do, and no Cast comes between it and its Q and DQ.

FP16 inside the int8 layers too was tried with TensorRT for RTX 1.7, by Casts behind every DQ (opset 17) and by float16
scales (opset 19): the layers, and the types that convolutions read and write, came out the same, so nothing was gained.
But a bias or a sum in float16 moves values across the rounding borders of the next Q, by a whole step each: ResNet-20
came within 32 and 30 dB of the Q/DQ model, which this form equals bit for bit where all layers are in int8.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeres.errors import QuantizationError
from edgeres.quantize.graph import POOLS, RESHAPES, WEIGHTED, Graph
from edgeres.quantize.half import FLOAT32_INPUTS, LARGEST
from edgeres.quantize.lint import check
from edgeres.quantize.offset import shifts_of
from edgeres.quantize.placement import MOVES

QDQ = ("QuantizeLinear", "DequantizeLinear")
FOLLOWING = ("Relu", "Clip", "MaxPool", *MOVES, *RESHAPES)  # these fuse behind an int8 layer, or run on its integers
TYPELESS = ("Shape", "Size")  # these look at a tensor, not at its values

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def write_mixed(int8_model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a Q/DQ model whose float layers compute in float16; linted.

    Input and output stay float32, the opset stays what it is. A model whose layers are all in int8 comes back as it is.

    Args:
        int8_model: what :func:`edgeres.quantize.insert.write_int8` wrote.

    Raises:
        QuantizationError: a number in a float layer is beyond float16's largest, 65504.
        LintError: the result breaks a rule (a bug, never the user's fault).
    """
    graph, types = Graph(int8_model), _types(int8_model)
    inside = _int8_layers(graph)
    draft = _Draft(graph, {name for name, kind in types.items() if kind == FLOAT}, set(types))
    for original in graph.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        kept = node.op_type in QDQ or node.name in inside
        keep = FLOAT32_INPUTS.get(node.op_type, ())
        if node.op_type not in TYPELESS:
            node.input[:] = [
                draft.typed(name, FLOAT if kept or i in keep else FLOAT16) for i, name in enumerate(node.input)
            ]
        if not kept:
            _halve_attributes(node)
            draft.half.update(draft.floats.intersection(node.output))
        draft.nodes.append(node)
    _cast_outputs(draft)
    result = onnx.ModelProto()
    result.CopyFrom(int8_model)
    del result.graph.node[:], result.graph.value_info[:], result.graph.initializer[:]
    result.graph.node.extend(draft.nodes)
    read = {name for node in draft.nodes for name in node.input} | set(graph.outputs)
    result.graph.initializer.extend(
        tensor for tensor in (*int8_model.graph.initializer, *draft.weights) if tensor.name in read
    )
    check(result, "model.mixed.onnx")
    return result


@dataclass
class _Draft:
    """The new graph while it grows. ``floats`` were float32; those in ``half`` are float16 by now."""

    graph: Graph
    floats: set[str]
    taken: set[str]
    half: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)

    def typed(self, tensor: str, to: int) -> str:
        """Return the name that ``tensor`` has in the wanted float type: its own, a Cast's, or a converted weight's."""
        if tensor not in self.floats or (to == FLOAT16) == (tensor in self.half):
            return tensor
        if tensor not in self.other:
            name = self.name(tensor, to)
            weight = self.graph.initializers.get(tensor)
            if weight is None:
                self.nodes.append(helper.make_node("Cast", [tensor], [name], name=f"{name}_Cast", to=to))
            else:
                self.weights.append(_halved(weight, name))
            self.other[tensor] = name
        return self.other[tensor]

    def name(self, tensor: str, to: int) -> str:
        """Return a name that nothing has yet."""
        name = f"{tensor}_fp16" if to == FLOAT16 else f"{tensor}_fp32"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of each tensor."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in model.graph.initializer}}


def _int8_layers(graph: Graph) -> set[str]:
    """Return the names of the nodes that are an int8 layer or fuse into one: they read a DQ, or one another.

    What shifts a tensor for its Q is a part of rounding: float16 would put x − 128·scale into coarser steps than x.
    """
    layers: set[str] = set()
    shifted = shifts_of(graph.model).keys()
    for node in graph.nodes:
        made = [graph.producer.get(name) for name in node.input if graph.is_activation(name)]
        dequantized = [maker is not None and maker.op_type == "DequantizeLinear" for maker in made]
        fused = [maker is not None and maker.name in layers for maker in made]
        if node.op_type in WEIGHTED:
            found = len(made) == 2 and all(dequantized)
        elif node.op_type in POOLS:
            found = all(dequantized)
        elif node.op_type == "Add":
            found = all(map(any, zip(dequantized, fused, strict=True))) and (len(made) == 1 or any(dequantized))
            found = found or (len(made) == 1 and _is_shift(graph, node, shifted))
        elif node.op_type == "Mul" and len(made) == 1:  # an input's pixel steps, on their way to a shift
            found = all(reader.op_type == "Add" and _is_shift(graph, reader, shifted)
                        for reader in graph.readers(node.output[0]))  # fmt: skip
        else:
            found = node.op_type in FOLLOWING and all(map(any, zip(dequantized, fused, strict=True)))
        if found and made:
            layers.add(node.name)
    return layers


def _is_shift(graph: Graph, node: onnx.NodeProto, shifted: Collection[str]) -> bool:
    """Whether all that reads a node's output are QuantizeLinear of shifted tensors, by name."""
    return {reader.name for reader in graph.readers(node.output[0])} <= set(shifted)


def _halve_attributes(node: onnx.NodeProto) -> None:
    """Let a float16 node's own numbers be float16, and a Cast to float a Cast to float16."""
    for found in node.attribute:
        if node.op_type == "Cast" and found.name == "to" and found.i == FLOAT:
            found.i = FLOAT16
        elif found.type == onnx.AttributeProto.TENSOR and found.t.data_type == FLOAT:
            found.t.CopyFrom(_halved(found.t, found.t.name))


def _halved(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if values.size and not np.abs(values).max() <= LARGEST:
        raise QuantizationError(
            f"{tensor.name}: beyond float16's largest number, {LARGEST:.0f}. Quantize its layer, or use fp32."
        )
    return numpy_helper.from_array(values.astype(np.float16), name)


def _cast_outputs(draft: _Draft) -> None:
    """Let each of the network's outputs that is float16 by now go by another name, with a Cast back behind it."""
    for value in draft.graph.outputs:
        if value in draft.half:
            half = draft.name(value, FLOAT16)
            for node in draft.nodes:
                node.input[:] = [half if name == value else name for name in node.input]
                node.output[:] = [half if name == value else name for name in node.output]
            draft.nodes.append(helper.make_node("Cast", [half], [value], name=f"{value}_Cast", to=FLOAT))
