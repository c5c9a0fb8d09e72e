"""The full int8 range for what is never negative: Q reads x − 128·scale, and whoever needs x gets the difference back.

Behind a ReLU symmetric int8 leaves its negative half unused. Shifted by 128 steps, the values from 0 to 255·scale fill
all of it. A layer behind then reads x less a constant; what a linear layer makes of a constant is known, and is added
to its bias, and, where zero padding makes it differ near the border, as a map (1, K, H, W) to its output. Nothing is
approximated: but for float32's rounding the graph computes what uint8 with zero point 0 would.

The shift costs no layer. Int8 ends at −128, which now stands for zero, so Q clips what is negative as the ReLU did:
where such a Q is all that reads a ReLU, the ReLU goes, and its shift joins the constant of the convolution in front.

Source: Jacob et al. 2018 (arXiv:1712.05877), section 2.3: the terms that a zero point adds are constant. Here they are
taken into the graph, because TensorRT knows no zero point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.artifacts import LayerPlan
from edgeres.errors import QuantizationError
from edgeres.quantize.graph import Graph, attribute, unused
from edgeres.quantize.offset import SHIFTS_KEY, ZERO, Shape, carried, is_flat, shapes_of, shifts_of

MAP = "_Shift"  # how the names of additions end
TYPELESS = ("Shape", "Size")  # these look at a tensor, not at its values


@dataclass(frozen=True)
class Owed:
    """What a tensor lacks, and a weighted node that may give it: what is added to that one's output comes out here.

    Behind a maximum pooling that holds only for what is the same all over the image.
    """

    offset: np.ndarray = field(default_factory=lambda: ZERO)
    giver: str = ""
    pooled: bool = False


def write_shifted(model: onnx.ModelProto, shifts: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return a copy of a Q/DQ model in which Q gets some tensors shifted, and all else is as it was.

    Args:
        model: with Q/DQ pairs whose scales are meant for the shifted tensors.
        shifts: by the tensor that Q reads, what is subtracted from it: float64 ``()``, or ``(1, C, 1, …)`` with one
            number per channel.
    """
    draft = _Draft(Graph(model), shapes_of(model), shifts)
    for node in draft.graph.nodes:
        draft.visit(node)
    nodes = [made for node in draft.nodes for made in draft.completed(node)]
    read = {name for node in nodes for name in node.input} | set(draft.graph.outputs)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(
        tensor for tensor in (*model.graph.initializer, *draft.constants) if tensor.name in read
    )
    marked = {node.name: shifts[node.input[0]].tolist() for node in draft.graph.nodes if draft.shifts_here(node)}
    result.metadata_props.append(onnx.StringStringEntryProto(key=SHIFTS_KEY, value=json.dumps(marked)))
    return result


@dataclass
class _Draft:
    """The new graph while it grows. ``names`` has the present name of a tensor whose maker went; ``given`` what each
    weighted node will add to its output."""

    graph: Graph
    shapes: Mapping[str, Shape]
    shifts: Mapping[str, np.ndarray]
    owed: dict[str, Owed] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)
    added: dict[tuple[str, bytes], str] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.taken = {name for node in self.graph.nodes for name in (node.name, *node.input, *node.output)}
        self.taken.update(self.graph.initializers)

    def shifts_here(self, node: onnx.NodeProto) -> bool:
        """Whether a node is the Q of a shifted tensor."""
        return node.op_type == "QuantizeLinear" and node.input[0] in self.shifts

    def visit(self, original: onnx.NodeProto) -> None:
        """Write one node, so that it gets of each input what it needs."""
        node = onnx.NodeProto()
        node.CopyFrom(original)
        first = self.owed.get(node.input[0], Owed()) if node.input else Owed()
        if node.op_type in TYPELESS or not node.input:
            node.input[:] = [self.names.get(name, name) for name in node.input]
            self.emit(node, Owed())
        elif node.op_type == "QuantizeLinear":
            shift = self.shifts.get(node.input[0], ZERO)
            node.input[0] = self.raised(node.input[0], first.offset - shift)
            self.emit(node, Owed(shift))
        elif node.op_type == "DequantizeLinear":
            self.emit(node, first)
        elif node.op_type == "Relu" and first.giver and self.is_implied(node.output[0]):
            self.names[node.output[0]] = self.names.get(node.input[0], node.input[0])
            self.owed[node.output[0]] = first
        elif node.op_type == "Add":
            self.addition(node)
        elif node.op_type == "MaxPool" and first.giver:
            if not is_flat(first.offset):
                first = self.settled(node.input[0])
            node.input[0] = self.names.get(node.input[0], node.input[0])
            self.emit(node, Owed(first.offset, first.giver, True))
        else:
            self.layer(node)

    def addition(self, node: onnx.NodeProto) -> None:
        """Write an addition: its output lacks what its inputs lack, and may get it from what gives to one of them."""
        inputs = [self.owed.get(name, Owed()) for name in node.input]
        giver = next((one.giver for one in inputs if one.giver and not one.pooled), "")
        for index, name in enumerate(node.input):
            node.input[index] = self.names.get(name, name)
        self.emit(node, Owed(inputs[0].offset + inputs[1].offset, giver))

    def layer(self, node: onnx.NodeProto) -> None:
        """Write any other node: it passes its first input's offset on, or makes another of it, or gets it back."""
        source, first = node.input[0], self.settled(node.input[0])
        offset = carried(self.graph, node, first.offset, self.shapes) if first.offset.any() else ZERO
        for index, name in enumerate(node.input):
            if index or offset is None:
                node.input[index] = self.raised(name, self.owed.get(name, Owed()).offset)
        if offset is None:
            offset = ZERO
        else:
            node.input[0] = self.names.get(source, source)
        if node.op_type == "Pad" and offset.any():
            node.input[:] = [*node.input[:2], self.constant(f"{node.name}_zero", -offset)]
        giver = node.name if node.op_type in ("Conv", "Gemm") and self.can_give(node) else ""
        self.emit(node, Owed(offset, giver))

    def can_give(self, node: onnx.NodeProto) -> bool:
        """Whether a weighted layer takes a constant into its bias: one in int8, for a float16 layer would round it."""
        made = self.graph.producer.get(node.input[1])
        if made is None or made.op_type != "DequantizeLinear":
            return False
        bias = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        return bias is not None and bias.size in (1, *self.outputs(node))

    def is_implied(self, tensor: str) -> bool:
        """Whether a ReLU's output goes to a shifted Q alone, at most through a maximum pooling: that Q clips at 0."""
        readers = self.graph.readers(tensor)
        if len(readers) != 1 or tensor in self.graph.outputs:
            return False
        if self.shifts_here(readers[0]):
            return self.shifts[tensor].ndim == 0
        return readers[0].op_type == "MaxPool" and self.is_implied(readers[0].output[0])

    def settled(self, tensor: str) -> Owed:
        """Let a tensor get what it lacks from its giver, if it has one, and return what it still lacks."""
        owed = self.owed.get(tensor, Owed())
        if owed.giver:
            self.raised(tensor, owed.offset)
        return self.owed.get(tensor, Owed())

    def raised(self, tensor: str, offset: np.ndarray) -> str:
        """Return the name of a tensor with ``offset`` added, by its giver or by an addition of its own."""
        name, owed = self.names.get(tensor, tensor), self.owed.get(tensor, Owed())
        if not offset.any():
            return name
        if owed.giver and (is_flat(offset) or not owed.pooled):
            self.given[owed.giver] = self.given.get(owed.giver, ZERO) + offset
            rest = owed.offset - offset
            self.owed[tensor] = Owed(rest if rest.any() else ZERO, owed.giver, owed.pooled)  # zeros have no size
            return name
        key = (tensor, offset.tobytes())
        if key not in self.added:
            self.added[key] = self.name(f"{tensor}_shifted")
            self.add(name, offset, self.added[key], tensor)
        return self.added[key]

    def emit(self, node: onnx.NodeProto, owed: Owed) -> None:
        """Write a node, and what its output lacks; where several read it, it gets all of that from its giver now."""
        tensor = node.output[0]
        self.nodes.append(node)
        self.owed[tensor] = owed
        if owed.giver and (len(self.graph.readers(tensor)) != 1 or tensor in self.graph.outputs):
            self.owed[tensor] = Owed(self.settled(tensor).offset)
        if tensor in self.graph.outputs and self.owed[tensor].offset.any():
            node.output[0] = self.name(f"{tensor}_unshifted")
            self.add(node.output[0], self.owed[tensor].offset, tensor, tensor)
            self.owed[tensor] = Owed()

    def add(self, source: str, offset: np.ndarray, to: str, stem: str) -> None:
        """Write an addition of a constant."""
        inputs = [source, self.constant(f"{stem}_shift", offset)]
        self.nodes.append(helper.make_node("Add", inputs, [to], name=self.name(f"{stem}_Shift")))

    def completed(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return a node, a weighted one with what it gives: in its bias, and what differs near the border in a map.

        With the bias the output is right but for the border already, so that a builder may well store it in float16.
        """
        offset = self.given.get(node.name, ZERO)
        if not offset.any():
            return [node]
        if is_flat(offset):
            self.raise_bias(node, offset.reshape(-1))
            return [node]
        inside = offset[:, :, offset.shape[2] // 2, offset.shape[3] // 2]
        self.raise_bias(node, inside.reshape(-1))
        to, node.output[0] = node.output[0], self.name(f"{node.output[0]}_unshifted")
        inputs = [node.output[0], self.constant(f"{to}_shift", offset - inside[:, :, np.newaxis, np.newaxis])]
        return [node, helper.make_node("Add", inputs, [to], name=self.name(f"{node.name}{MAP}"))]

    def raise_bias(self, node: onnx.NodeProto, offset: np.ndarray) -> None:
        """Let a weighted node add ``offset``, ``(1,)`` or ``(K,)``, to its output besides what it adds already."""
        bias = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        stem = node.input[2] if bias is not None else f"{node.name}_bias"
        values = np.broadcast_to(effective_bias(node, bias) + offset, self.outputs(node))
        node.input[:] = [*node.input[:2], self.constant(f"{stem}_shifted", values)]
        for found in [one for one in node.attribute if one.name == "beta"]:
            node.attribute.remove(found)

    def outputs(self, node: onnx.NodeProto) -> tuple[int]:
        """Return how many output channels a weighted node in int8 has."""
        source = self.graph.producer[self.graph.producer[node.input[1]].input[0]]
        weights = self.graph.initializers[source.input[0]].dims
        transposed = node.op_type == "Conv" or attribute(node, "transB", 0)
        return (weights[0 if transposed else 1],)

    def constant(self, stem: str, values: np.ndarray) -> str:
        """Return the name of a new float32 initializer."""
        name = self.name(stem)
        with np.errstate(over="ignore"):  # refused in our own words
            found = np.asarray(values, np.float32)
        if not np.isfinite(found).all():
            raise QuantizationError(
                f"{stem} is beyond float32 once shifted. Keep the layer in float, or shift nothing: "
                "--activation-range symmetric --recovery none."
            )
        self.constants.append(numpy_helper.from_array(found, name))
        return name

    def name(self, stem: str) -> str:
        """Return a name that nothing has yet."""
        name = unused(stem, self.taken)
        self.taken.add(name)
        return name


def activation_range(model: onnx.ModelProto) -> str:
    """Return ``shifted`` where a Q/DQ model pays for the full int8 range with border maps, else ``symmetric``.

    What recovery has in front of every model does not count: the maps of the first two convolutions on any path, which
    read the pixels and what is made of these.
    """
    graph = Graph(model)
    marked = shifts_of(model)
    maps = (node for node in graph.nodes if node.op_type == "Add" and node.name.endswith(MAP))
    inside = any(graph.convolutions_above[node.output[0]] > 2 and _is_map(graph, node) for node in maps)
    return "shifted" if marked and inside else "symmetric"


def _is_map(graph: Graph, node: onnx.NodeProto) -> bool:
    values = graph.constant(node.input[1])
    return values is not None and values.ndim == 4 and values.shape[2:] != (1, 1)


def effective_bias(node: onnx.NodeProto, bias: np.ndarray | None) -> np.ndarray:
    """Return what a weighted node adds, float64 ``(1,)`` or ``(K,)``: a Gemm multiplies its bias with ``beta``."""
    if bias is None:
        return np.zeros(1)
    factor: Any = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.asarray(bias.astype(np.float64).reshape(-1) * factor)


def explained(layers: Sequence[LayerPlan], model: onnx.ModelProto) -> tuple[LayerPlan, ...]:
    """Return a plan's layers with a word on what became of each in the shifted graph that was written from it."""
    graph = Graph(model)
    nodes, shifted = {node.name: node for node in graph.nodes}, shifts_of(model)
    told = []
    for layer in layers:
        node, reason = nodes.get(layer.node), layer.reason
        if shifted and node is None:
            reason = "done by rounding: its output is shifted to the full int8 range, which ends at zero"
        elif shifted and node is not None and _reads_shifted(graph, node, shifted):
            reason += f"; its input is shifted to the full int8 range, {_return(graph, node)}"
        told.append(LayerPlan(layer.node, layer.op, layer.module, layer.precision, reason))
    return tuple(told)


def _reads_shifted(graph: Graph, node: onnx.NodeProto, shifted: Mapping[str, np.ndarray]) -> bool:
    pairs = [graph.producer.get(name) for name in node.input]
    makers = [graph.producer.get(pair.input[0]) for pair in pairs if pair and pair.op_type == "DequantizeLinear"]
    return any(maker is not None and maker.name in shifted for maker in makers)


def _return(graph: Graph, node: onnx.NodeProto) -> str:
    """Return how a node's output gets the shift of its input back, in words."""
    if node.op_type not in ("Conv", "Gemm"):
        return "and a constant behind it gives that back"
    added = [name for reader in graph.readers(node.output[0]) if reader.op_type == "Add" for name in reader.input]
    maps = [name for name in added if name in graph.initializers and len(graph.initializers[name].dims) == 4]
    return "and its bias gives that back" + (", with a map of what differs near the border" if maps else "")
