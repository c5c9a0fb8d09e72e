"""Which channels of which tensors must be scaled together, so that a network keeps computing the same.

A ReLU, a pool, a residual addition and a zero padding all let a positive factor through: ReLU(s·x) = s·ReLU(x). Only a
convolution (or a linear layer) can take it back, in the weights that read the channel. So the channels along a residual
stream form one group, and the channels between two convolutions of a block another.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019 (arXiv:1906.04721),
section 4.1, for two layers in a row; the residual stream follows from the same positive homogeneity.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from edgeres.quantize.graph import RESHAPES, WEIGHTED, Graph, attribute

PASSING = ("Relu", "MaxPool", "GlobalAveragePool", "AveragePool", "Identity", "LeakyRelu", "Dropout")


class ChannelGroups:
    """The groups of a graph's channels: ``index[tensor]`` is int64 ``(C,)``, the group of each channel.

    ``free`` is bool ``(groups,)``: whether a group may be scaled. It may not where a channel reaches the network's
    input or output, or an operator that is not positively homogeneous in it.
    """

    def __init__(self, index: dict[str, np.ndarray], free: np.ndarray) -> None:
        self.index = index
        self.free = free

    def __len__(self) -> int:
        return len(self.free)

    def factors(self, groups: np.ndarray) -> dict[str, np.ndarray]:
        """Return each tensor's factors, float64 ``(C,)``, from the groups' factors, float64 ``(groups,)``."""
        return {tensor: groups[index] for tensor, index in self.index.items()}


def channel_groups(model: onnx.ModelProto, channels: Mapping[str, int]) -> ChannelGroups:
    """Return the channel groups of a float graph.

    Args:
        channels: the size of axis 1 of every (N, C) and (N, C, H, W) tensor that depends on the input; what is not
            there, and all that it is computed from, keeps its scale.
    """
    graph = Graph(model)
    union = _Union()
    for name in graph.inputs:
        union.add(name, channels[name])
        union.freeze(name)
    for node in graph.nodes:
        inputs = [name for name in node.input if graph.is_activation(name)]
        for output in node.output:
            if output in channels:
                union.add(output, channels[output])
        if not inputs or node.output[0] not in channels:
            for name in (*inputs, *node.output):  # what is computed from constants alone takes no factor either
                union.freeze(name)
            continue
        if not _tie(graph, node, inputs, union):
            for name in (*inputs, *node.output):
                union.freeze(name)
    for name in graph.outputs:
        union.freeze(name)
    return union.groups()


def _tie(graph: Graph, node: onnx.NodeProto, inputs: list[str], union: _Union) -> bool:
    """Tie a node's output channels to its inputs'; return False where it lets no factor through."""
    output = node.output[0]
    if node.op_type in WEIGHTED:
        return takes_factors(graph, node)
    if node.op_type in (*PASSING, *RESHAPES):
        return union.tie(output, inputs[0])  # Flatten of a pooled (N, C, 1, 1) only: else the channels' numbers differ
    if node.op_type == "ReduceMean":
        return _averages_images(graph, node) and union.tie(output, inputs[0])
    if node.op_type == "Mul":
        return _gate(graph, node, inputs, union)
    if node.op_type == "Add":
        return len(inputs) == 2 and all(union.tie(output, name) for name in inputs)
    if node.op_type == "Slice":
        return _slice_keeps_channels(graph, node) and union.tie(output, inputs[0])
    if node.op_type == "Pad":
        return _pad(graph, node, union)
    if node.op_type == "Concat" and attribute(node, "axis", 1) == 1 and len(inputs) == len(node.input):
        if not all(union.knows(name) for name in inputs):
            return False
        first = 0
        for name in inputs:
            union.tie_at(output, name, first)
            first += union.size(name)
        return True
    return False


def takes_factors(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a layer has constant weights and bias of its own, into which its channels' factors can go."""
    if node.op_type not in WEIGHTED or not graph.is_activation(node.input[0]):
        return False
    constants = [name for name in node.input[1:] if name]
    if any(name not in graph.initializers or len(graph.consumers[name]) > 1 for name in constants):
        return False
    if node.op_type == "Gemm":
        return not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0)
    if graph.values(node.input[1]).ndim != (4 if node.op_type == "Conv" else 2):
        return False
    return node.op_type == "Conv" or _is_matrix(graph, node.input[0])


def _is_matrix(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is sure to be (N, C), so that a matrix product reads its channels."""
    node = graph.producer.get(tensor)
    if node is None:
        return False
    if node.op_type in ("Flatten", "Gemm"):
        return True
    if node.op_type == "Reshape":
        shape = graph.constant(node.input[1])
        return shape is not None and len(shape) == 2
    if node.op_type == "ReduceMean":
        return _averages_images(graph, node) and not attribute(node, "keepdims", 1)
    if node.op_type == "Squeeze":
        axes = _axes(graph, node)
        return axes is not None and len(axes) == 2  # of a pooled (N, C, 1, 1)
    return node.op_type in ("Relu", "LeakyRelu", "Identity", "Dropout", "Add", "MatMul") and _is_matrix(
        graph, node.input[0]
    )


def _axes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """Return the axes of a Squeeze or ReduceMean, from its second input or attribute; None where neither has any."""
    axes = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
    return [int(axis) for axis in axes] if isinstance(axes, (list, np.ndarray)) else None


def _averages_images(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a ReduceMean leaves samples and channels alone."""
    axes = _axes(graph, node)
    return bool(axes) and {2, 3, -2, -1}.issuperset(axes or ())


def _gate(graph: Graph, node: onnx.NodeProto, inputs: list[str], union: _Union) -> bool:
    """A squeeze-and-excitation gate multiplies: what it multiplies keeps its factor, the gate itself has none."""
    made = [graph.producer[name].op_type if name in graph.producer else "" for name in inputs]
    gates = [name for name, kind in zip(inputs, made, strict=True) if kind in ("Sigmoid", "HardSigmoid")]
    others = [name for name in inputs if name not in gates]
    if len(gates) != 1 or len(others) != 1:
        return False
    union.freeze(gates[0])
    return union.tie(node.output[0], others[0])


def _slice_keeps_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    axes = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    return axes is not None and all(int(axis) not in (1, -3) for axis in axes)


def _pad(graph: Graph, node: onnx.NodeProto, union: _Union) -> bool:
    """Zeros may stand around the channels: they are zero at any scale."""
    pads = graph.constant(node.input[1]) if len(node.input) > 1 else None
    if pads is None or attribute(node, "mode", b"constant") != b"constant" or (pads < 0).any() or len(node.input) > 3:
        return False
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    if value is None or value.any():
        return False
    if not union.knows(node.input[0]):
        return False
    union.tie_at(node.output[0], node.input[0], int(pads[1]))
    return True


class _Union:
    """Disjoint sets of (tensor, channel)."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.first: dict[str, np.ndarray] = {}
        self.frozen: list[int] = []

    def add(self, tensor: str, channels: int) -> None:
        self.first[tensor] = np.arange(len(self.parent), len(self.parent) + channels)
        self.parent.extend(self.first[tensor].tolist())

    def knows(self, tensor: str) -> bool:
        return tensor in self.first

    def size(self, tensor: str) -> int:
        return len(self.first[tensor])

    def freeze(self, tensor: str) -> None:
        self.frozen.extend(self.first[tensor].tolist() if tensor in self.first else ())

    def tie(self, one: str, other: str) -> bool:
        """Tie two tensors channel by channel; return False where they have different numbers of channels."""
        if not self.knows(one) or not self.knows(other) or self.size(one) != self.size(other):
            return False
        self.tie_at(one, other, 0)
        return True

    def tie_at(self, whole: str, part: str, start: int) -> None:
        """Tie a tensor to the channels of another that begin at ``start``."""
        for i, j in zip(self.first[whole][start : start + self.size(part)], self.first[part], strict=True):
            self.parent[self._find(int(i))] = self._find(int(j))

    def _find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def groups(self) -> ChannelGroups:
        roots = np.array([self._find(i) for i in range(len(self.parent))], np.int64)
        names, number = np.unique(roots, return_inverse=True)
        free = np.ones(len(names), bool)
        free[number[np.array(self.frozen, np.int64)]] = False
        return ChannelGroups({tensor: number[first] for tensor, first in self.first.items()}, free)


def apply_factors(model: onnx.ModelProto, factors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return a copy of ``model`` with every tensor's channels scaled by ``factors``; it answers the same.

    Weights take the output's factors in and the input's back; biases take the output's in.

    Args:
        factors: float64 ``(C,)`` for every tensor, constant along each group (see :func:`channel_groups`).
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    for node in graph.nodes:
        if not takes_factors(graph, node) or node.output[0] not in factors or node.input[0] not in factors:
            continue
        into, back = factors[node.output[0]], factors[node.input[0]]
        values = graph.values(node.input[1]).astype(np.float64)
        graph.set_values(node.input[1], scaled_weights(node, values, into, back))
        if len(node.input) > 2 and node.input[2]:
            graph.set_values(node.input[2], graph.values(node.input[2]).astype(np.float64) * into)
    return result


def scaled_weights(node: onnx.NodeProto, values: np.ndarray, into: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Return a layer's weights with its output's factors ``into`` taken in and its input's factors ``back`` taken back.

    Args:
        values: float64, as the node has them: ``(K, C/groups, h, w)``, ``(K, C)`` or ``(C, K)``.
        into: float64 ``(K,)``.
        back: float64 ``(C,)``.
    """
    if node.op_type != "Conv":
        per_row, per_column = (into, 1 / back) if attribute(node, "transB", 0) else (1 / back, into)
        return np.asarray(values * per_row[:, None] * per_column[None])
    groups = attribute(node, "group", 1)
    assert isinstance(groups, int)
    inverse = (1 / back).reshape(groups, -1)
    rows = np.repeat(inverse, values.shape[0] // groups, axis=0)  # each output channel sees the inputs of its group
    return np.asarray(values * into[:, None, None, None] * rows[:, :, None, None])
