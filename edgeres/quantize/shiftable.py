"""Which tensors may be shifted to the full int8 range: what cannot be negative, and is read by layers that can cope."""

from __future__ import annotations

import numpy as np
import onnx

from edgeres.quantize.graph import RESHAPES, Graph, attribute
from edgeres.quantize.offset import carried, is_flat, shapes_of
from edgeres.quantize.placement import Placement

ALWAYS = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
OF_THE_FIRST = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Slice", "Identity", "Dropout", *RESHAPES)
OF_ALL = ("Add", "Mul", "Concat")


def shiftable(model: onnx.ModelProto, placement: Placement, free: bool = False) -> frozenset[str]:
    """Return the tensors of ``placement.tensors`` that may be shifted; whether one was seen negative is not asked here.

    All that reads one in int8 must be able to give the shift back. A convolution with padding needs its input's height
    and width for that; a residual addition passes the shift on; a Mul or a Sigmoid has no int8 form to begin with.

    Args:
        free: only those that biases alone give back, without a border map, and what the first convolution makes: its
            noise goes through all of the network.
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
    return frozenset(found)


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
