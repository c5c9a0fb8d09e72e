"""Squeeze-and-excitation gates in a graph, whoever exported it: they stay in float.

A gate works on one value for each channel, so that int8 saves it nothing, and its error does not average out: it scales
a whole channel. In int8 each of its layers also needs a kernel that quantizes its input: TensorRT for RTX builds
SE-ResNeXt-50 from 209 kernels so, and from 168 with gates in float.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018 (arXiv:1709.01507), section 3, equations 2 to 4.
"""

from __future__ import annotations

import onnx

from edgeres.quantize.graph import RESHAPES, Graph, attribute

LAYERS = ("Conv", "Gemm", "MatMul", "Add", "BatchNormalization")
BOUNDED = ("Sigmoid", "HardSigmoid", "Clip", "Softmax", "Tanh")
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "HardSwish", "Mul", "Div", "Dropout", "Identity")
RANK = 4  # of images, (N, C, H, W)
INSIDE = "part of a squeeze-and-excitation gate: on one value for each channel int8 saves nothing, and its error scales"
INSIDE += " the whole channel"
SCALES = "multiplies each channel by its gate, in float with it"


def gates(graph: Graph) -> dict[str, str]:
    """Return the nodes that belong to a gate, by name, and why they stay in float.

    A gate is what lies between the global pools of a tensor, mean or maximum, and the multiplication of that same
    tensor; its last step is one that is bounded. Attention that keeps an image's size is none: int8 pays there.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type != "Mul":
            continue
        for gated, gate in (node.input, reversed(node.input)):
            inside = _between(graph, gated, gate) if _is_bounded(graph, gate) else set()
            if inside:
                found.update(dict.fromkeys(inside, INSIDE))
                found[node.name] = SCALES
    return found


def _is_bounded(graph: Graph, gate: str) -> bool:
    """Whether the last step of what makes a tensor is bounded; what only gives it another shape is no step."""
    node = graph.producer.get(gate)
    while node is not None and node.op_type in RESHAPES:
        node = graph.producer.get(node.input[0])
    return node is not None and node.op_type in BOUNDED


def _between(graph: Graph, gated: str, gate: str) -> set[str]:
    """Return the nodes from the global pools of ``gated`` to ``gate``; none where there is another way to get there."""
    inside: set[str] = set()
    pooled, open_ends = False, [gate]
    while open_ends:
        name = open_ends.pop()
        if not graph.is_activation(name):
            continue
        node = graph.producer.get(name)
        if name == gated or node is None:
            return set()
        if node.name in inside:
            continue
        inside.add(node.name)
        if _pools_all(graph, node) and node.input[0] == gated:
            pooled = True
        elif node.op_type in (*LAYERS, *BOUNDED, *ACTIVATIONS, *RESHAPES):
            open_ends.extend(node.input)
        else:
            return set()
    return inside if pooled else set()


def _pools_all(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node leaves one value of each channel, by taking the mean or the maximum over the image."""
    if node.op_type in ("ReduceMean", "ReduceMax"):
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1:
            axes = graph.constant(node.input[1])
        return axes is not None and sorted(int(axis) % RANK for axis in axes) == [2, 3]  # type: ignore[attr-defined]
    return node.op_type in ("GlobalAveragePool", "GlobalMaxPool")
