"""Convolutions in groups, ResNeXt's and depthwise ones, which a target may run faster in float16 than in int8."""

from __future__ import annotations

from edgeres.quantize.graph import Graph, attribute

SLOWER = "convolution in {} groups: TensorRT is reported to run those slower in int8 than in float16 (NVIDIA/TensorRT"
SLOWER += " issue 4529). Measure the other: --grouped int8"


def grouped_nodes(graph: Graph) -> dict[str, str]:
    """Return the convolutions of more than one group, by name, and why they may be left in float."""
    groups = {node.name: attribute(node, "group", 1) for node in graph.nodes if node.op_type == "Conv"}
    return {name: SLOWER.format(count) for name, count in groups.items() if count != 1}
