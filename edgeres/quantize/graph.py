"""Questions about an ONNX graph: who makes a tensor, who reads it, which tensors are constant."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

WEIGHTED = ("Conv", "Gemm", "MatMul")
POOLS = ("GlobalAveragePool", "AveragePool", "ReduceMean")
RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
BRANCH_ENDS = ("Conv", "BatchNormalization", "Mul")  # what a residual addition fuses into, or what ends a gated branch


class Graph:
    """An index of a model's graph. It does not follow later changes: build a new one after surgery."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.initializers]
        self.outputs = [value.name for value in model.graph.output]
        self.consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name:
                    self.consumers.setdefault(name, []).append((node, index))

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes that read ``tensor``, in graph order."""
        return [node for node, _ in self.consumers.get(tensor, [])]

    def uses(self, tensor: str) -> list[tuple[onnx.NodeProto, int]]:
        """Return (node, input index) of all that read a tensor's values; Shape and Size ask for its dimensions only."""
        return [use for use in self.consumers.get(tensor, []) if use[0].op_type not in ("Shape", "Size")]

    def constant(self, tensor: str) -> np.ndarray | None:
        """Return an initializer's values, or None where ``tensor`` is computed."""
        found = self.initializers.get(tensor)
        return None if found is None else numpy_helper.to_array(found)

    def values(self, initializer: str) -> np.ndarray:
        """Return an initializer's values, which must be there."""
        return numpy_helper.to_array(self.initializers[initializer])

    def set_values(self, initializer: str, values: np.ndarray) -> None:
        """Give an initializer other values, in its own data type."""
        tensor = self.initializers[initializer]
        kind = numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=kind), initializer))

    def is_activation(self, tensor: str) -> bool:
        """Whether ``tensor`` depends on the network's input (a name that nobody makes is not)."""
        return bool(tensor) and tensor not in self.initializers and (tensor in self.producer or tensor in self.inputs)

    @cached_property
    def convolutions_above(self) -> dict[str, int]:
        """For each tensor, the most convolutions on any path from the input to it; computed once."""
        depth: dict[str, int] = dict.fromkeys(self.inputs, 0)
        for node in self.nodes:
            above = max((depth.get(name, 0) for name in node.input), default=0)
            for output in node.output:
                depth[output] = above + (node.op_type in ("Conv", "ConvTranspose"))
        return depth


def free_name(model: onnx.ModelProto, stem: str) -> str:
    """Return ``stem``, with a number behind it where a tensor or a node of the model has that name already."""
    graph = model.graph
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    taken.update(name for node in graph.node for name in (node.name, *node.input, *node.output))
    return unused(stem, taken)


def unused(stem: str, taken: Collection[str]) -> str:
    """Return ``stem``, with a number behind it where that is among the names that are ``taken``."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    """Return an attribute's value, or ``default`` where the node does not set it."""
    for found in node.attribute:
        if found.name == name:
            return onnx.helper.get_attribute_value(found)
    return default
