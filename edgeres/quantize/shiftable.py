"""Which tensors may be shifted to the full int8 range: what cannot be negative, and is read by layers that can cope.

And for which of these that comes for nothing: no operation more on any image, a constant in a bias and a ReLU less.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgeres.quantize.graph import RESHAPES, Graph, attribute
from edgeres.quantize.offset import carried, is_flat, shapes_of
from edgeres.quantize.placement import Placement

ALWAYS = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
OF_THE_FIRST = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Slice", "Identity", "Dropout", *RESHAPES)
OF_ALL = ("Add", "Mul", "Concat")
GLOBAL = ("GlobalAveragePool", "ReduceMean")  # of which ``carried`` has refused those that need the true value


def shiftable(model: onnx.ModelProto, placement: Placement, free: bool = False) -> frozenset[str]:
    """Return the tensors of ``placement.tensors`` that may be shifted; whether one was seen negative is not asked here.

    All that reads one in int8 must be able to give the shift back. A convolution with padding needs its input's height
    and width for that; a residual addition passes the shift on; a Mul or a Sigmoid has no int8 form to begin with.

    Args:
        free: only those whose shift biases take, in front and behind, without a border map, and what the first
            convolution makes, with a map: its noise goes through all of the network.
    """
    graph, shapes = Graph(model), shapes_of(model)
    nodes = {node.name: node for node in graph.nodes}
    found = nonnegative(graph).intersection(placement.tensors)
    for point in placement.points:
        for name, index in point.readers:
            node = nodes[name]
            if node.op_type == "Add":
                continue
            offset = None if index else carried(graph, node, np.ones(()), shapes)
            maps = free and graph.convolutions_above[point.tensor] > 1
            if offset is None or (maps and not is_flat(offset)):
                found.discard(point.range_of)
    return _Free(graph, nodes, placement).of(found) if free else frozenset(found)


class _Free:
    """Finds what is shifted for nothing. ``layers`` are the nodes in int8 that have a bias, by name."""

    def __init__(self, graph: Graph, nodes: dict[str, onnx.NodeProto], placement: Placement) -> None:
        self.graph, self.nodes, self.placement = graph, nodes, placement
        weighted = {name for weight in placement.weights for name, _ in weight.readers}
        self.layers = {name for name in weighted if nodes[name].op_type in ("Conv", "Gemm")}

    def of(self, tensors: set[str]) -> frozenset[str]:
        """Return those of some shiftable tensors that cost nothing; what is pooled over the image, where its pool reads
        such a one: an addition to one value per channel stands between the two steps anyway."""
        given = {name for name in tensors if self.is_given_back(name)}
        images = {name for name in given if self.is_taken(name)}
        return frozenset(images | {name for name in given if self.pooled(name) in images})

    def is_given_back(self, tensor: str) -> bool:
        """Whether all that reads a tensor does so in int8, and a bias behind it gives the shift back."""
        uses = {(node.name, index) for node, index in self.graph.uses(tensor)}
        points = [point for point in self.placement.points if point.range_of == tensor]
        own = {use for point in points if point.tensor == tensor for use in point.readers}
        readers = [(self.nodes[name], index) for point in points for name, index in point.readers]
        return uses == own and tensor not in self.graph.outputs and all(self.can_give(*reader) for reader in readers)

    def can_give(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether a reader's output gets the shift back from a bias, or is what else may be shifted for nothing."""
        if node.op_type == "Add":
            return self.is_layer(node.input[1 - index])
        return node.name in self.layers or node.op_type in (*GLOBAL, "Slice", "Pad")

    def is_taken(self, tensor: str) -> bool:
        """Whether a bias in front takes the shift: of a layer, or of one that a skip is added to, and then at most a
        ReLU and a maximum, with nobody else who reads what lies between."""
        node = self.graph.producer.get(tensor)
        while node is not None and node.op_type in ("Relu", "MaxPool"):
            if not self.is_alone(node.input[0]):
                return False
            node = self.graph.producer.get(node.input[0])
        if node is not None and node.op_type == "Add":
            return any(map(self.is_layer, node.input))
        return node is not None and node.name in self.layers

    def is_layer(self, tensor: str) -> bool:
        """Whether a tensor comes from a layer in int8 with a bias, for one reader."""
        node = self.graph.producer.get(tensor)
        return node is not None and node.name in self.layers and self.is_alone(tensor)

    def is_alone(self, tensor: str) -> bool:
        return len(self.graph.readers(tensor)) == 1 and tensor not in self.graph.outputs

    def pooled(self, tensor: str) -> str:
        """Return what a tensor is the mean of over the image; empty where it is no such mean."""
        node = self.graph.producer.get(tensor)
        while node is not None and node.op_type in RESHAPES and self.is_alone(node.input[0]):
            node = self.graph.producer.get(node.input[0])
        return node.input[0] if node is not None and node.op_type in GLOBAL else ""


def nonnegative(graph: Graph) -> set[str]:
    """Return the tensors that cannot be negative whatever the network's input is, by what makes them."""
    found: set[str] = set()

    def never(tensor: str) -> bool:
        constant = graph.constant(tensor)
        return tensor in found if constant is None else bool((constant >= 0).all())

    for node in graph.nodes:
        if node.op_type in ALWAYS:
            sure = True
        elif node.op_type in OF_THE_FIRST:
            sure = never(node.input[0])
        elif node.op_type in OF_ALL:
            sure = all(never(name) for name in node.input)
        elif node.op_type == "Clip":
            lower, upper = ([*node.input, "", ""])[1:3]
            sure = (never(lower) if lower else never(node.input[0])) and (not upper or never(upper))
        elif node.op_type == "Pad":
            constant = attribute(node, "mode", b"constant") == b"constant"
            value = node.input[2] if len(node.input) > 2 and constant else ""
            sure = never(node.input[0]) and (not value or never(value))
        else:
            sure = False
        if sure:
            found.add(node.output[0])
    return found
