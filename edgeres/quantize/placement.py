"""Where int8 goes in a graph, and why: the plan that calibration and insertion both follow.

The rules are TensorRT's own for explicit quantization (NVIDIA, "Working with Quantized Types", section "Q/DQ Placement
Recommendations"): quantize the inputs of weighted layers, not their outputs; leave Conv–ReLU–Add alone so that it
fuses; of a residual addition quantize the skip input, never the convolution's; a layer without weights has int8 on both
sides or on neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx

from edgeres.artifacts import LayerPlan
from edgeres.quantize.gates import gates
from edgeres.quantize.graph import BRANCH_ENDS, POOLS, RESHAPES, Graph, attribute
from edgeres.quantize.keep import kept_nodes

MOVES = ("Pad", "Slice")
FREE = {
    "Relu": "fused behind the convolution or addition in front of it",
    "Clip": "fused like a ReLU, behind the convolution or addition in front of it",
    "MaxPool": "picks values, so it runs on whatever its neighbours use",
    "Concat": "joins values, so it runs on what its neighbours use",
    "Pad": "moves values, so it runs on whatever its neighbours use",
    "Slice": "moves values, so it runs on whatever its neighbours use",
    **dict.fromkeys(RESHAPES, "moves no data"),
}


@dataclass(frozen=True)
class Point:
    """One Q/DQ pair on an activation: ``tensor`` is quantized with the range of ``range_of``, for these readers.

    ``readers`` are (node name, input index). ``range_of`` differs from ``tensor`` behind a Slice or Pad, where the
    values are already on the source's grid and a second rounding with the same scale changes nothing.
    """

    tensor: str
    range_of: str
    readers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Weight:
    """One Q/DQ pair on a weight: output channels lie along ``axis``; ``readers`` as in :class:`Point`.

    ``paired``: its integers are to be such that no multiply–add saturates; see :mod:`edgeres.quantize.saturation`.
    """

    tensor: str
    axis: int
    readers: tuple[tuple[str, int], ...]
    paired: bool = False


@dataclass(frozen=True)
class Placement:
    """The whole plan. ``tensors`` are what calibration must observe, ``kept`` the nodes that were to stay float."""

    points: tuple[Point, ...]
    weights: tuple[Weight, ...]
    layers: tuple[LayerPlan, ...]
    kept: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(sorted({point.range_of for point in self.points}))


@dataclass
class _Draft:
    """The plan while it grows: which (node, input) reads which quantized tensor, and what was said of each node."""

    activations: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    ranges: dict[str, str] = field(default_factory=dict)
    weights: dict[tuple[str, int], list[tuple[str, int]]] = field(default_factory=dict)
    said: dict[str, tuple[str, str]] = field(default_factory=dict)

    def quantize(self, tensor: str, node: onnx.NodeProto, index: int, range_of: str | None = None) -> None:
        readers = self.activations.setdefault(tensor, [])
        if (node.name, index) not in readers:
            readers.append((node.name, index))
        self.ranges.setdefault(tensor, range_of or tensor)


def plan(
    model: onnx.ModelProto,
    modules: Mapping[str, str],
    keep_float: Sequence[str] = (),
    given_back: Mapping[str, str] = MappingProxyType({}),
    paired: bool | Collection[str] = False,
) -> Placement:
    """Return where int8 goes in ``model``, with a reason for every node.

    Args:
        model: the FP32 graph, batch norms folded, every node named.
        modules: node name → torch module, for reasons and for ``keep_float``.
        keep_float: shell patterns of torch modules, each with all that is inside it, or of node names, that stay in
            float.
        given_back: more nodes that stay in float, by name, and why.
        paired: of all weights, as in :class:`Weight`, or of those that meet one of these tensors.

    Raises:
        QuantizationError: a pattern of ``keep_float`` names nothing.
    """
    graph, draft = Graph(model), _Draft()
    asked = kept_nodes([node.name for node in graph.nodes], modules, keep_float)
    gated = gates(graph)
    kept = {
        **gated,
        **given_back,
        **{node: f"the recipe keeps {pattern!r} in float" for node, pattern in asked.items()},
    }
    for node in graph.nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            _weighted(graph, node, kept.get(node.name), draft)
    for node in graph.nodes:
        if node.op_type == "Add":
            _residual(graph, node, kept.get(node.name), draft)
    for node in reversed(graph.nodes):  # last, and back to front: whether a pool is worth it depends on all behind it
        if node.op_type in POOLS:
            _pool(graph, node, kept.get(node.name), draft)
    layers = tuple(
        LayerPlan(n.name, n.op_type, modules.get(n.name, ""), *draft.said.get(n.name, _default(graph, n, gated)))
        for n in graph.nodes
    )
    order = {name: i for i, name in enumerate([*graph.inputs, *graph.producer])}
    points = tuple(
        Point(tensor, draft.ranges[tensor], tuple(readers))
        for tensor, readers in sorted(draft.activations.items(), key=lambda item: order[item[0]])
    )
    source = {reader: point.range_of for point in points for reader in point.readers}

    def pairs(readers: Sequence[tuple[str, int]]) -> bool:
        return paired if isinstance(paired, bool) else any(source[name, 0] in paired for name, _ in readers)

    weights = tuple(
        Weight(name, axis, tuple(readers), pairs(readers)) for (name, axis), readers in draft.weights.items()
    )
    return Placement(points, weights, layers, tuple(name for name in kept if name not in gated))


def _default(graph: Graph, node: onnx.NodeProto, gated: Mapping[str, str]) -> tuple[str, str]:
    if node.name in gated:
        return "float", gated[node.name]
    if node.op_type in MOVES and not _on_grid(graph, node):
        return "float", "does not pad with zeros, so its output is not sure to be on its input's grid"
    if node.op_type in FREE:
        return "follows", FREE[node.op_type]
    return "float", "TensorRT has no int8 form of this operator that pays"


def _on_grid(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node only moves values and puts zeros between them, so that a grid of its input fits its output."""
    if node.op_type == "Slice":
        return True
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.constant(node.input[2])
    return value is not None and not value.any()


def _weighted(graph: Graph, node: onnx.NodeProto, kept: str | None, draft: _Draft) -> None:
    """Quantize both inputs of a weighted layer, or neither: one alone would silently run in float."""
    axis, obstacle = _weight_axis(graph, node)
    if kept is not None:
        draft.said[node.name] = ("float", kept)
    elif obstacle:
        draft.said[node.name] = ("float", obstacle)
    else:
        draft.quantize(node.input[0], node, 0)
        draft.weights.setdefault((node.input[1], axis), []).append((node.name, 1))
        draft.said[node.name] = ("int8", "weighted layer: input per tensor, weights per output channel, bias in float")


def _weight_axis(graph: Graph, node: onnx.NodeProto) -> tuple[int, str]:
    """Return the output channels' axis of a node's weights, and what stands in the way of int8 (empty: nothing)."""
    weights = graph.constant(node.input[1])
    if weights is None or not graph.is_activation(node.input[0]):
        return 0, "its weights are computed, not constant: TensorRT quantizes constant weights only"
    if node.op_type == "ConvTranspose":
        return 1, "per-channel int8 transposed convolutions fail to build in several TensorRT versions"
    if node.op_type == "Conv":
        return (0, "") if weights.ndim == 4 else (0, f"{weights.ndim - 2}-D convolution: only 2-D is quantized")
    if weights.ndim != 2:
        return 0, "its weights are not a matrix"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            return 0, "a Gemm with transA or alpha is not fused with Q/DQ"
        return (0, "") if attribute(node, "transB", 0) else (1, "")
    return 1, ""


def _residual(graph: Graph, node: onnx.NodeProto, kept: str | None, draft: _Draft) -> None:
    """Quantize the skip input of a residual addition; the deeper input is the branch, and fuses in high precision."""
    if not all(graph.is_activation(name) for name in node.input):
        draft.said[node.name] = ("float", "adds a constant")
        return
    if kept is not None:
        draft.said[node.name] = ("float", kept)
        return
    depth = graph.convolutions_above
    shallow = 1 if depth[node.input[0]] >= depth[node.input[1]] else 0
    branch, skip = node.input[1 - shallow], node.input[shallow]
    made_by = graph.producer[branch].op_type if branch in graph.producer else "the input"
    if made_by not in BRANCH_ENDS:
        draft.said[node.name] = ("float", f"not a residual block's addition: its branch ends in {made_by}")
        return
    if draft.said.get(graph.producer[branch].name, ("", ""))[0] == "float":
        draft.said[node.name] = ("float", "fuses behind its branch's convolution, and that is in float")
        return
    source = skip
    while source in graph.producer and _on_grid(graph, graph.producer[source]):
        source = graph.producer[source].input[0]
    if source != skip and source not in draft.activations:
        source = skip  # nobody else quantizes the source: give the moved tensor a range of its own
    draft.quantize(skip, node, shallow, range_of=source)
    if source != skip:
        _move_on_grid(graph, skip, draft)
    shared = len(draft.activations[skip]) > 1 or source != skip
    draft.said[node.name] = (
        "int8 skip",
        "skip input in int8"
        + (", one scale with the block's first convolution" if shared else "")
        + "; the branch stays in high precision so that "
        + ("multiplication, addition and ReLU fuse" if made_by == "Mul" else "Conv–Add–ReLU fuses"),
    )


def _move_on_grid(graph: Graph, skip: str, draft: _Draft) -> None:
    """Let the Slice or Pad behind a quantized tensor read its int8 form, so that only one form of it is stored."""
    node = graph.producer[skip]
    while _on_grid(graph, node):
        source = node.input[0]
        if source in draft.activations:
            draft.quantize(source, node, 0)
            draft.said[node.name] = ("int8", "moves int8 values of the block's input")
            return
        node = graph.producer[source]


def _pool(graph: Graph, node: onnx.NodeProto, kept: str | None, draft: _Draft) -> None:
    """Quantize an average pool's input where everything behind it is quantized: int8 on both sides, or on neither."""
    if kept is not None:
        draft.said[node.name] = ("float", kept)
        return
    if not graph.is_activation(node.input[0]):
        return
    taken, left = _readers_behind(graph, node.output[0], draft)
    if left and taken:
        draft.said[node.name] = ("float", f"its output is also read in float, by {left[0]}")
    elif left or not taken:
        draft.said[node.name] = ("float", "what reads it is not in int8, and int8 on one side only would not fuse")
    else:
        draft.quantize(node.input[0], node, 0)
        draft.said[node.name] = ("int8", "int8 on both sides: its input and its output are quantized")


def _readers_behind(graph: Graph, tensor: str, draft: _Draft) -> tuple[list[str], list[str]]:
    """Return who reads a tensor in int8 and who in float, by name, looking through what moves no data."""
    taken: list[str] = []
    left: list[str] = ["whoever takes the network's output"] if tensor in graph.outputs else []
    quantized = draft.activations.get(tensor, [])
    for reader, index in graph.uses(tensor):
        if (reader.name, index) in quantized:
            taken.append(reader.name)
        elif reader.op_type in RESHAPES and index == 0:
            behind = _readers_behind(graph, reader.output[0], draft)
            taken.extend(behind[0])
            left.extend(behind[1])
        else:
            left.append(reader.name)
    return taken, left
