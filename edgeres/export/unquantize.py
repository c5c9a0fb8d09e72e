"""A file that is quantized already, taken apart: the float network within it, and the grids that it puts tensors on.

QuantizeLinear and DequantizeLinear go, and what they did besides rounding stays: a Q that cuts at zero was a ReLU, and
one that cuts where an activation ends, or cuts off much of what reaches it, was a Clip (ONNX Runtime's quantizer drops
both), so these come back. Weights are the float ones where the file still has them, and else the values that its
integers stand for; so are biases.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 10 to 25; onnxruntime.quantization, class
QDQRemovableActivation, for the activations that are dropped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.artifacts import FileGrid
from edgeres.errors import ExportError
from edgeres.export.fold import fresh_name
from edgeres.export.scheme import DOMAINS, DQ, Q, Scheme, attribute, real, scheme_of

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVERS = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity")
"""Operators that may stand between Q and DQ: they move integers as they would move the numbers behind these."""
KEEPERS = (*MOVERS, "Relu", "Clip", "Pad", "Concat", "Dropout")
"""Operators whose outputs lie on the grids of their inputs: a layer behind them computes with quantized numbers."""
ALWAYS = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "Softplus")
UNBOUNDED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "BatchNormalization")
"""Operators behind which a cut is that of an activation which the file no longer has."""
SIX = 6.0
OF_ALL = (
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "Concat", "Add", "Mul", "Identity"),
    *("Slice", "Pad", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
)


@dataclass
class Taken:
    """What was found while a file's Q/DQ went.

    ``activations`` is by tensor of the float network; ``weights`` by the name of the node that reads them, float32
    ``()`` or ``(K,)``; the rest are names of nodes and tensors, to be told.
    """

    activations: dict[str, FileGrid] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    unlike_weights: list[str] = field(default_factory=list)
    relus: list[str] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    foreign: bool = False


def is_pair_part(node: onnx.NodeProto) -> bool:
    """Whether a node is a QuantizeLinear or a DequantizeLinear, of standard ONNX or of ONNX Runtime's own domain."""
    return node.op_type in (Q, DQ) and node.domain in DOMAINS


def unquantize(model: onnx.ModelProto, where: str, saturated: Collection[str] = ()) -> Taken:
    """Remove a model's Q/DQ, in place; return what they said. All nodes must have names, and constants be folded.

    Args:
        saturated: tensors that a Q cuts much off, as :func:`edgeres.export.probe.probe` finds them.

    Raises:
        ExportError: integers are computed with and not only stored, a scale is computed, or a pair does not fit
            together; the message names the nodes and ``where`` the model.
    """
    work = _Work(model, saturated)
    for node in list(model.graph.node):
        work.visit(node)
    outputs = [value.name for value in model.graph.output]
    work.problems.extend(f"its output {name} is an integer" for name in outputs if name in work.integers)
    if work.problems:
        raise ExportError(
            f"{where} is quantized in a way that cannot be taken apart: {'; '.join(work.problems)}. "
            "Start from the FP32 model, or quantize it to Q/DQ pairs with constant scales (QuantFormat.QDQ)."
        )
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(work.kept)
    _name_outputs(model, work)
    if work.taken.foreign:
        kept = [opset for opset in model.opset_import if opset.domain != "com.microsoft"]
        if not any(node.domain == "com.microsoft" for node in model.graph.node):
            del model.opset_import[:]
            model.opset_import.extend(kept)
    return work.taken


class _Work:
    """The graph while Q/DQ go: ``alias`` leads from a DQ's output to what replaces it; ``quantized`` are these outputs,
    and what only moves their values."""

    def __init__(self, model: onnx.ModelProto, saturated: Collection[str] = ()) -> None:
        self.model, self.saturated = model, saturated
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input}
        self.images = set(self.inputs)  # and what only moves them
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))
        self.kept: list[onnx.NodeProto] = []
        self.alias: dict[str, str] = {}
        self.quantized: set[str] = set()
        self.integers: dict[str, tuple[str, Scheme]] = {}
        self.positive: set[str] = set()
        self.cut: dict[tuple[str, float, float], str] = {}
        self.makers = {name: node.op_type for node in model.graph.node for name in node.output}
        self.problems: list[str] = []
        self.taken = Taken()

    def visit(self, node: onnx.NodeProto) -> None:
        if is_pair_part(node):
            self.taken.foreign |= node.domain == "com.microsoft"
            scheme = self.scheme(node)
            if isinstance(scheme, str):
                self.problems.append(f"{node.op_type} {node.name}: {scheme}")
            elif node.op_type == Q:
                self.quantizer(node, scheme)
            else:
                self.dequantizer(node, scheme)
            return
        whole = [name for name in node.input if name in self.integers]
        if whole and not (node.op_type in MOVERS and whole == [node.input[0]]):
            self.problems.append(f"{node.op_type} {node.name} computes with the integers {whole[0]}")
            return
        if node.op_type in WEIGHTED and not self.quantized.issuperset(node.input[:2]):
            self.taken.float_layers.append(node.name)
        if node.op_type in KEEPERS and self.quantized.issuperset(data_of(node)):
            self.quantized.update(node.output)
        if node.op_type in MOVERS and node.input[0] in self.images:
            self.images.update(node.output)
        node.input[:] = [self.alias.get(name, name) for name in node.input]
        if whole:
            source, scheme = self.integers[whole[0]]
            self.integers[node.output[0]] = (node.output[0], scheme)
            if source in self.constants and node.op_type == "Transpose":  # weights turned between their Q and DQ
                values = numpy_helper.to_array(self.constants[source])
                self.add_constant(
                    numpy_helper.from_array(values.transpose(permutation(node, values.ndim)), node.output[0])
                )
                return
            node.input[0] = source
        self.note_sign(node)
        self.kept.append(node)

    def scheme(self, node: onnx.NodeProto) -> Scheme | str:
        """Return a node's scheme, or what is wrong with it; a DQ without zero point has the type that its Q wrote."""
        found = self.integers.get(node.input[0])
        return scheme_of(node, self.constants, found[1].kind if found else "")

    def quantizer(self, node: onnx.NodeProto, scheme: Scheme) -> None:
        """Q on an activation gives its tensor a grid; on a constant, it says how that is stored."""
        source = self.alias.get(node.input[0], node.input[0])
        if node.input[0] in self.integers:
            self.problems.append(f"{node.op_type} {node.name} quantizes integers")
            return
        grid = scheme.grid
        if source in self.constants:
            self.integers[node.output[0]] = (source, scheme)
            return
        if grid is None:
            if scheme.from_zero and source not in self.positive and source not in self.images:
                source = self.restored(source, 0.0, np.inf)
            self.taken.unusable.append(f"{source} ({'per channel' if scheme.scale.size > 1 else scheme.kind})")
        else:
            source = self.restored(source, *self.ends(source, grid, node.input[0]))
            self.note_grid(source, grid)
        self.integers[node.output[0]] = (source, scheme)

    def note_grid(self, source: str, grid: FileGrid) -> None:
        """Keep a tensor's grid; of several the one that reaches furthest, as :func:`edgeres.quantize.pairs` shows."""
        known = self.taken.activations.setdefault(source, grid)
        if known == grid:
            return
        if max(grid.high, -grid.low) * grid.scale > max(known.high, -known.low) * known.scale:
            self.taken.activations[source] = grid
        self.taken.several.append(f"{source} (steps {known.scale:.3g} and {grid.scale:.3g})")

    def ends(self, source: str, grid: FileGrid, written: str) -> tuple[float, float]:
        """Return where a Q's cut stands for that of an activation, (low, high); infinite where it does not.

        Args:
            written: the tensor's name in the file.
        """
        low, high = (
            round(end) if abs(end - round(end)) <= grid.scale else end
            for end in (grid.low * grid.scale, grid.high * grid.scale)
        )
        bare = self.makers.get(written) in UNBOUNDED
        known = bare and (whole(grid) or (low, high) == (0, SIX))
        if known or written in self.saturated:
            return low, high
        cuts = grid.low == 0 and source not in self.positive and source not in self.images
        return (0.0 if cuts else -np.inf), np.inf

    def restored(self, source: str, low: float, high: float) -> str:
        """Return a tensor cut as a Q cut it: by a ReLU, or by a Clip where it also ends."""
        if low == -np.inf:
            return source
        if (source, low, high) in self.cut:
            return self.cut[source, low, high]
        kind = "relu" if high == np.inf else "relu6" if (low, high) == (0, SIX) else "clip"
        name = fresh_name(self.model, f"{source}_{kind}")
        if high == np.inf:
            node = helper.make_node("Relu", [source], [name], name=f"{name}_Relu")
        else:
            limits = [fresh_name(self.model, f"{name}_{word}") for word in ("low", "high")]
            for limit, value in zip(limits, (low, high), strict=True):
                self.add_constant(numpy_helper.from_array(np.array(value, np.float32), limit))
            node = helper.make_node("Clip", [source, *limits], [name], name=f"{name}_Clip")
        self.kept.append(node)
        if kind == "clip":
            self.taken.clips.append(f"{source} ({low:.3g} to {high:.3g})")
        else:
            self.taken.relus.append(source)
        if low == 0:
            self.positive.add(name)
        self.cut[source, low, high] = name
        return name

    def dequantizer(self, node: onnx.NodeProto, scheme: Scheme) -> None:
        """DQ gives back what Q took, or makes a constant of stored integers."""
        found, blocked = self.integers.get(node.input[0]), attribute(node, "block_size", 0)
        if found is not None:
            source, written = found
            if not scheme.same(written):
                self.problems.append(f"{node.op_type} {node.name} has another scale or zero point than its Q")
                return
        elif node.input[0] in self.constants:
            source = node.output[0]
            values = real(numpy_helper.to_array(self.constants[node.input[0]]), scheme, node)
            if values is None:
                self.problems.append(f"{node.op_type} {node.name}: its scale does not fit what it dequantizes")
                return
            self.add_constant(numpy_helper.from_array(values, source))
        else:
            self.problems.append(f"{node.op_type} {node.name} reads {node.input[0]}, which nothing quantizes")
            return
        self.alias[node.output[0]] = source
        self.quantized.add(node.output[0])
        if source in self.constants:
            dims = list(self.constants[source].dims)
            if not (blocked or scheme.fits(dims)):
                self.problems.append(f"{node.op_type} {node.name}: its scale does not fit what it dequantizes")
                return
            self.constant_read(node.output[0], scheme, scheme.axis % max(len(dims), 1), len(dims))

    def constant_read(self, tensor: str, scheme: Scheme, axis: int, rank: int) -> None:
        """Note what reads a dequantized constant: weights keep their steps where these are legal, biases none."""
        for reader, index in self.readers.get(tensor, []):
            if reader.op_type in ("Conv", "ConvTranspose", "Gemm") and index == 2:
                self.taken.biases.append(reader.name)
            elif reader.op_type in WEIGHTED and index == 1:
                if scheme.symmetric and (scheme.scale.size == 1 or axis == weights_axis(reader)):
                    self.taken.weights[reader.name] = scheme.scale.reshape(-1)
                else:
                    self.taken.unlike_weights.append(reader.name)
            elif reader.op_type == "Transpose":  # how a linear layer's weights are turned
                turned = permutation(reader, rank)
                self.constant_read(reader.output[0], scheme, turned.index(axis) if axis in turned else axis, rank)

    def add_constant(self, tensor: onnx.TensorProto) -> None:
        self.model.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor

    def note_sign(self, node: onnx.NodeProto) -> None:
        """Remember outputs that cannot be negative, whatever the input is."""

        def never(name: str) -> bool:
            tensor = self.constants.get(name)
            return name in self.positive if tensor is None else bool((numpy_helper.to_array(tensor) >= 0).all())

        sure = node.op_type in ALWAYS or (node.op_type in OF_ALL and all(map(never, data_of(node))))
        if node.op_type == "Clip" and len(node.input) > 1 and node.input[1]:
            sure = never(node.input[1])
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            sure = sure and never(node.input[2])
        if sure:
            self.positive.update(node.output)


def _name_outputs(model: onnx.ModelProto, work: _Work) -> None:
    """Let the tensors behind the last DQs carry the names of the graph's outputs."""
    graph = model.graph
    rename: dict[str, str] = {}
    outputs = [value.name for value in graph.output]
    for name in outputs:
        source = work.alias.get(name)
        if source is None:
            continue
        if source in rename or source in work.inputs or source in work.constants or source in outputs:
            graph.node.append(helper.make_node("Identity", [source], [name], name=f"{name}_Identity"))
        else:
            rename[source] = name
    for node in graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    work.taken.activations = {rename.get(name, name): grid for name, grid in work.taken.activations.items()}


def data_of(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node that are values, and no shapes, limits or indices."""
    return list(node.input if node.op_type in ("Concat", "Add", "Mul") else node.input[:1])


def permutation(node: onnx.NodeProto, rank: int) -> list[int]:
    """Return how a Transpose turns a tensor of so many dimensions."""
    return list(attribute(node, "perm", 0) or reversed(range(rank)))


def whole(grid: FileGrid) -> bool:
    """Whether a grid reaches from one small whole number to another exactly, as of an activation that ends there.

    A shifted zero point is rounded to a step, so the width tells where the ends do not.
    """
    width = grid.scale * (2 * grid.high if grid.high + grid.low in (0, -1) else grid.high - grid.low)
    return any(
        1 <= round(found) <= 2 * SIX and abs(found - round(found)) <= 1e-5 * found
        for found in (width, grid.scale * (grid.high - grid.low))
    )


def weights_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a weighted node's weights along which its output channels lie."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
