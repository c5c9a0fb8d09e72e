"""Passes over an ONNX graph that change its form and not its meaning. Each states what holds afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.errors import ExportError, first_line
from edgeres.export.constants import fold_constants
from edgeres.export.shapes import shapes_of


def simplify(model: onnx.ModelProto) -> None:
    """Fold constants and batch norms, drop what does nothing at inference; in place.

    Afterwards every node has a unique name, and something reads every node's output and every initializer. What can be
    computed beforehand has been, but for random numbers, huge tensors, long computations, and the graph's outputs. An
    Identity is left only where it makes a graph output, a Dropout also where it drops. A BatchNormalization is left
    where it trains, where it is not behind a Conv with constant weights, or where something else reads that Conv. There
    is no HardSwish, and no Reshape computes its shape from the batch, as far as onnx infers the other dimensions.
    """
    drop_identities(model)
    fold_constants(model)
    drop_identities(model)  # again: whether a Dropout is in training mode may have become a constant just now
    free_reshapes(model)
    split_hard_swishes(model)
    drop_unused(model)  # what only computed a shape may be the second reader of a convolution
    fold_batch_norms(model)
    drop_unused(model)
    name_nodes(model)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a unique name; those that have one keep it."""
    taken = {node.name for node in model.graph.node}
    seen = {""}
    for i, node in enumerate(model.graph.node):
        if node.name in seen:
            node.name = f"{node.op_type}_{i}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)


def fresh_name(model: onnx.ModelProto, name: str) -> str:
    """Return ``name``, lengthened until no tensor has it."""
    graph = model.graph
    taken = {value.name for value in (*graph.input, *graph.initializer)}
    taken.update(output for node in graph.node for output in node.output)
    while name in taken:
        name += "_"
    return name


def drop_identities(model: onnx.ModelProto) -> None:
    """Remove Identity and Dropout nodes (at inference both pass their input on) that do not make a graph output.

    A Dropout stays that is in training mode, or whose mask is read.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    off = {tensor.name for tensor in graph.initializer if not numpy_helper.to_array(tensor).any()} | {""}
    alias: dict[str, str] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [alias.get(name, name) for name in node.input]
        passes_on = node.op_type == "Identity" or (
            node.op_type == "Dropout" and off.issuperset(node.input[2:]) and read.isdisjoint(node.output[1:])
        )
        if passes_on and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def split_hard_swishes(model: onnx.ModelProto) -> None:
    """Write each HardSwish as ONNX defines it, x · HardSigmoid(x): older TensorRTs may read the parts alone."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "HardSwish" and node.domain in ("", "ai.onnx"):
            gate = fresh_name(model, f"{node.output[0]}_gate")
            nodes.append(
                helper.make_node(
                    "HardSigmoid", [node.input[0]], [gate], name=f"{node.name}_gate", alpha=1 / 6, beta=0.5
                )
            )
            node.op_type = "Mul"
            node.input.append(gate)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def fold_batch_norms(model: onnx.ModelProto) -> None:
    """Fold each BatchNormalization into the convolution in front of it, where nothing else reads that convolution.

    y = γ (Wx + b − μ) / √(σ² + ε) + β is a convolution with weights W γ/√(σ² + ε); computed in float64.
    """
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    outputs = {value.name for value in graph.output}
    producers = {output: node for node in graph.node for output in node.output}
    kept = []
    for node in graph.node:
        inference = node.op_type == "BatchNormalization" and not any(
            found.name == "training_mode" and found.i for found in node.attribute
        )
        conv = producers.get(node.input[0]) if inference else None
        alone = conv is not None and conv.op_type == "Conv" and readers[node.input[0]] == 1
        if conv is None or not alone or node.input[0] in outputs:
            kept.append(node)
            continue
        names = [*conv.input[1:], *node.input[1:5]]
        if any(name and name not in initializers for name in names):
            kept.append(node)
            continue
        _fold_one(graph, conv, node, initializers)
        producers[node.output[0]] = conv  # another batch norm may follow
    del graph.node[:]
    graph.node.extend(kept)


def _fold_one(
    graph: onnx.GraphProto, conv: onnx.NodeProto, norm: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]
) -> None:
    """Write the folded weights under new names (an old one may be shared) and let the convolution make the output."""
    gamma, beta, mean, variance = (numpy_helper.to_array(initializers[n]).astype(np.float64) for n in norm.input[1:5])
    epsilon = next((found.f for found in norm.attribute if found.name == "epsilon"), 1e-5)
    weights = numpy_helper.to_array(initializers[conv.input[1]]).astype(np.float64)
    has_bias = len(conv.input) > 2 and conv.input[2]
    bias = numpy_helper.to_array(initializers[conv.input[2]]).astype(np.float64) if has_bias else 0.0
    factor = gamma / np.sqrt(variance + epsilon)
    folded = {
        f"{norm.output[0]}_weight": weights * factor.reshape(-1, *[1] * (weights.ndim - 1)),
        f"{norm.output[0]}_bias": (bias - mean) * factor + beta,
    }
    for name, values in folded.items():
        tensor = numpy_helper.from_array(values.astype(np.float32), name)
        initializers[name] = tensor
        graph.initializer.append(tensor)
    conv.input[:] = [conv.input[0], *folded]
    conv.output[0] = norm.output[0]


def free_reshapes(model: onnx.ModelProto) -> None:
    """Let Reshapes that keep the batch take any: ``Flatten`` to two dimensions, else a constant shape ``[0, …]``.

    That is ``x.view(x.size(0), -1)``, exported as Shape, Gather, Unsqueeze, Concat and Reshape; and, in a file whose
    batch is fixed, a Reshape to a constant shape that repeats it.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    reshapes = [node for node in graph.node if node.op_type == "Reshape"]
    inputs = [value for value in graph.input if value.name not in constants]
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    fixed = dims[0].dim_value if dims and dims[0].dim_value > 0 else None
    if fixed is None:
        reshapes = [node for node in reshapes if node.input[1] not in constants]
    shapes = shapes_of(model) if reshapes else {}
    for node in reshapes:
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not before or not after or before[0] != after[0] or not (isinstance(before[0], str) or before[0] == fixed):
            continue
        del node.attribute[:]  # allowzero
        rest = [size if isinstance(size, int) else -1 for size in after[1:]]
        if len(after) == 2:
            node.op_type = "Flatten"
            node.attribute.append(helper.make_attribute("axis", 1))
            del node.input[1:]
        elif rest.count(-1) <= 1 and 0 not in rest:
            name = fresh_name(model, f"{node.output[0]}_shape")
            graph.initializer.append(numpy_helper.from_array(np.array([0, *rest], np.int64), name))
            node.input[1] = name


def choose_branches(model: onnx.ModelProto) -> None:
    """Replace each If whose condition is constant by the branch that it takes, in place; names stay unique."""
    fold_constants(model)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = list(graph.node)
    kept: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "If" and node.input[0] in constants:
            taken = "then_branch" if constants[node.input[0]].any() else "else_branch"
            kept.extend(_branch(model, node, taken))
        else:
            kept.append(node)
    if kept != nodes:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
        choose_branches(model)  # a branch may hold one more


def _branch(model: onnx.ModelProto, node: onnx.NodeProto, taken: str) -> list[onnx.NodeProto]:
    """Return the nodes of one branch of an If, under names that nothing else has; its initializers go to the model."""
    branch = next(found.g for found in node.attribute if found.name == taken)
    made = [*(tensor.name for tensor in branch.initializer), *(name for one in branch.node for name in one.output)]
    names = {name: fresh_name(model, f"{node.output[0]}_{name}") for name in made if name}
    for tensor in branch.initializer:
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = names[tensor.name]
    for one in branch.node:
        _rename(one, names)
    results = zip(branch.output, node.output, strict=True)
    ends = [helper.make_node("Identity", [names.get(x.name, x.name)], [output]) for x, output in results]
    return [*branch.node, *ends]


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Give tensors other names wherever a node, or a graph inside it, reads or makes them."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for found in node.attribute:
        for graph in (found.g, *found.graphs):
            for inner in graph.node:
                _rename(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers that nothing reads, and all intermediate type annotations (they may be stale)."""
    graph = model.graph
    used = {value.name for value in graph.output}
    alive = []
    for node in reversed(graph.node):
        if not used.isdisjoint(node.output):
            while node.op_type in ("MaxPool", "Dropout") and len(node.output) > 1 and node.output[-1] not in used:
                del node.output[-1]  # TensorRT refuses a pooling that has indices, wanted or not
            alive.append(node)
            used.update(_reads(node))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    inputs = [value for value in graph.input if value.name not in {tensor.name for tensor in graph.initializer}]
    del graph.node[:]
    graph.node.extend(reversed(alive))
    del graph.initializer[:], graph.value_info[:], graph.input[:]
    graph.initializer.extend(kept)
    graph.input.extend(inputs)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, inside its branches and loops too."""
    yield from node.input
    for found in node.attribute:
        for graph in (found.g, *found.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (value.name for value in graph.output)


def check_model(model: onnx.ModelProto, where: str) -> None:
    """Let onnx's own checker and shape inference judge a graph.

    Raises:
        ExportError: it is not valid ONNX; ``where`` names it.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as problem:  # damaged names make the checker's bindings raise other kinds than its own two
        raise ExportError(f"{where} is not valid ONNX: {first_line(problem).rstrip('.')}. Export it again.") from None


def check_domains(model: onnx.ModelProto, where: str) -> None:
    """Refuse operators that are not standard ONNX: TensorRT does not read them.

    Raises:
        ExportError: names every one; ``where`` names the model.
    """
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ExportError(
            f"{where} has operators that are not of standard ONNX and that TensorRT does not read: "
            f"{', '.join(foreign)}. Export it with standard operators, and before any optimizer rewrites it."
        )
