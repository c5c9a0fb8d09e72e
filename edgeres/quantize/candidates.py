"""What can be given back to float as one: a layer, a skip, a pool, or a residual block with all that is in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

from edgeres.quantize.graph import POOLS, WEIGHTED, Graph
from edgeres.quantize.placement import Placement


@dataclass(frozen=True)
class Candidate:
    """Some nodes that are given back together; ``weighted`` is how many of them have weights."""

    name: str
    nodes: tuple[str, ...]
    weighted: int


def candidates(model: onnx.ModelProto, modules: Mapping[str, str], placement: Placement) -> tuple[Candidate, ...]:
    """Return everything in int8 that can be given back: layers by their torch modules, then blocks; each name once.

    Args:
        model: the float graph that the plan is for.
        modules: node name → torch module; a node without one goes by its own name.
    """
    int8 = {layer.node: layer.op for layer in placement.layers if layer.precision.startswith("int8")}
    units: dict[str, list[str]] = {}
    for node, op in int8.items():
        name = modules.get(node) or node
        if op in WEIGHTED:
            units.setdefault(name, []).append(node)
        elif op == "Add":
            units.setdefault(f"{name} (skip)", []).append(node)
        elif op in POOLS:
            units.setdefault(f"{name} (pool)", []).append(node)
    singles = [Candidate(name, tuple(nodes), sum(int8[n] in WEIGHTED for n in nodes)) for name, nodes in units.items()]
    graph = Graph(model)
    blocks: list[Candidate] = []
    for node in graph.nodes:
        if node.op_type == "Add":
            inside = _block(graph, node)
            members = [one for one in singles if inside.issuperset(one.nodes)]
            weighted = sum(one.weighted for one in members)
            if weighted > 1:
                nodes = tuple(name for one in members for name in one.nodes)
                name = modules.get(node.name) or f"block of {node.name}"
                blocks.append(Candidate(_unlike({one.name for one in (*singles, *blocks)}, name), nodes, weighted))
    return (*singles, *blocks)


def _unlike(taken: Collection[str], name: str) -> str:
    """Return a name that none has yet: what is given back is told by it."""
    others = (f"{name} (block{number})" for number in ("", *range(2, len(taken) + 3)))
    return next(other for other in (name, *others) if other not in taken)


def _block(graph: Graph, addition: onnx.NodeProto) -> set[str]:
    """Return the nodes of a residual block: those on both of its ways, from where they part to the addition."""
    if not all(graph.is_activation(name) for name in addition.input):
        return set()
    one, other = (_above(graph, name) for name in addition.input)
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    parting = max((order[name] for name in one & other), default=-1)
    return {name for name in one | other if order[name] > parting} | {addition.name}


def _above(graph: Graph, tensor: str) -> set[str]:
    """Return the nodes that a tensor is computed from."""
    found: set[str] = set()
    waiting = [tensor]
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return found
