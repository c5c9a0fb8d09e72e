"""Does a shifted graph add up? Each Q gets its tensor less the shift, and all else gets back what was taken.

The graph is walked once, with what each tensor lacks of its true value: a shifted Q's output lacks the shift, constants
make up for it, and in front of what needs a true value nothing may be left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgeres.affine import shift_from_scale
from edgeres.quantize.graph import Graph, attribute
from edgeres.quantize.offset import ZERO, Shape, carried, shapes_of, shifts_of

ROUNDING = 4.0  # a constant is rounded once; a few more of its last bits do not matter
WEIGHTED = ("Conv", "Gemm")
TYPELESS = ("Shape", "Size")


@dataclass(frozen=True)
class Lack:
    """What a tensor lacks, within ``slack`` of rounding; if ``loose``, but for an unknown constant per channel."""

    offset: np.ndarray = field(default_factory=lambda: ZERO)
    slack: float = 0.0
    loose: bool = False

    def less(self, constant: np.ndarray) -> Lack:
        """Return what is left once a stored constant has been added."""
        stored = np.asarray(constant, np.float64)
        digits = float(np.finfo(constant.dtype).eps) if constant.dtype.kind == "f" else 0.0
        rounding = ROUNDING * digits * float(np.abs(stored).max(initial=0.0))
        return Lack(self.offset - stored, self.slack + rounding, self.loose)

    def beside(self, other: Lack) -> Lack:
        """Return what a sum lacks."""
        return Lack(self.offset + other.offset, self.slack + other.slack, self.loose or other.loose)

    def left(self, wanted: np.ndarray = ZERO) -> float:
        """Return by how much this is off what it should be, at most; 0.0 where rounding explains it."""
        rest = np.asarray(self.offset - wanted)
        if self.loose:
            rest = rest - rest[..., :1, :1] if rest.ndim == 4 else ZERO
        most = float(np.abs(rest).max(initial=0.0))
        return most if most > self.slack else 0.0

    def simplified(self) -> Lack:
        """Return the same without rounding's rest: nothing, or the same all over the image."""
        if not self.left():
            return Lack(ZERO, 0.0, self.loose)
        if self.offset.ndim == 4 and float(np.ptp(self.offset, axis=(2, 3)).max()) <= 2 * self.slack:
            return Lack(self.offset.mean((2, 3), keepdims=True), self.slack, self.loose)
        return self


def audit(graph: Graph, fp32: onnx.ModelProto | None = None) -> Iterator[str]:
    """Yield what does not add up in a shifted graph, one sentence each; nothing where nothing is shifted.

    Args:
        fp32: what it was made from; without it, biases are taken to be right, and only their maps are checked.
    """
    shifts = shifts_of(graph.model)
    if not shifts:
        return
    quantizers = {node.name for node in graph.nodes if node.op_type == "QuantizeLinear"}
    yield from (f"{name}: is said to be shifted, but is no QuantizeLinear" for name in shifts if name not in quantizers)
    walk = _Walk(graph, shapes_of(graph.model), shifts, None if fp32 is None else Graph(fp32))
    for node in graph.nodes:
        yield from (f"{node.name}: {problem}" for problem in walk.step(node))
    for name in graph.outputs:
        yield from (f"output {name}: {problem}" for problem in walk.short(name))


@dataclass
class _Walk:
    """What each tensor lacks, as far as the walk has come."""

    graph: Graph
    shapes: Mapping[str, Shape]
    shifts: Mapping[str, np.ndarray]
    fp32: Graph | None
    lacks: dict[str, Lack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = {node.name: node for node in self.fp32.nodes} if self.fp32 is not None else {}

    def lack(self, tensor: str) -> Lack:
        return self.lacks.get(tensor, Lack())

    def short(self, tensor: str, wanted: np.ndarray = ZERO) -> Iterator[str]:
        """Yield a sentence where a tensor is not what its reader takes it for."""
        left = self.lack(tensor).left(wanted)
        if left:
            yield f"{tensor} is off by {left:.3g}: what a shift takes away must be given back exactly"

    def step(self, node: onnx.NodeProto) -> Iterator[str]:
        """Yield what is wrong at one node, and note what its output lacks."""
        if node.op_type in TYPELESS or not node.input:
            return
        if node.op_type == "QuantizeLinear":
            yield from self.quantizer(node)
        elif node.op_type == "DequantizeLinear":
            self.lacks[node.output[0]] = self.lack(node.input[0])
        elif node.op_type == "Add":
            self.addition(node)
        else:
            yield from self.layer(node)

    def quantizer(self, node: onnx.NodeProto) -> Iterator[str]:
        shift, scale = self.shifts.get(node.name, ZERO), self.graph.constant(node.input[1])
        if shift.any() and shift.ndim == 0 and scale is not None:
            steps = shift_from_scale(scale)
            if steps.ndim or steps != shift:
                yield f"is shifted by {float(shift):.6g}, which is not 128 steps of its scale"
        yield from self.short(node.input[0], shift)
        self.lacks[node.output[0]] = Lack(shift)

    def addition(self, node: onnx.NodeProto) -> None:
        """A constant that FP32 does not add gives something back; two tensors lack what both lack."""
        lack = Lack()
        for name in node.input:
            constant = self.graph.constant(name)
            if constant is None:
                lack = lack.beside(self.lack(name))
            elif node.name not in self.before:
                lack = lack.less(constant)
        self.lacks[node.output[0]] = lack

    def layer(self, node: onnx.NodeProto) -> Iterator[str]:
        """A node that makes another constant of what its input lacks, or passes it on, or needs a true value."""
        lack = self.lack(node.input[0]).simplified()
        offset = carried(self.graph, node, lack.offset, self.shapes) if lack.offset.any() else ZERO
        for index, name in enumerate(node.input):
            if index or offset is None:
                yield from self.short(name)
        if node.op_type == "Pad" and offset is not None and offset.any():
            value = self.graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros((), np.float32)
            if value is None or abs(float(value) + float(offset)) > 2e-7 * abs(float(offset)):
                yield f"it pads with another number than its input's zero, {-float(offset):.6g}"
        found = Lack(ZERO if offset is None else offset, lack.slack, lack.loose and offset is not None)
        self.lacks[node.output[0]] = self.with_bias(node, found) if node.op_type in WEIGHTED else found

    def with_bias(self, node: onnx.NodeProto, lack: Lack) -> Lack:
        """Return what a weighted layer's output lacks, with what its bias has over that of FP32 taken off."""
        bias = _bias(self.graph, node)
        if bias is None:
            return Lack(lack.offset, lack.slack, True)
        if self.fp32 is None or node.name not in self.before:
            return Lack(lack.offset, lack.slack, bias.size > 0)
        old = _bias(self.fp32, self.before[node.name])
        shape = (1, -1, 1, 1) if node.op_type == "Conv" else (1, -1)
        known = np.zeros(1) if old is None or not old.size else old.astype(np.float64)
        more = lack.less(bias.reshape(shape)) if bias.size else lack
        return Lack(more.offset + known.reshape(shape), more.slack, lack.loose)


def _bias(graph: Graph, node: onnx.NodeProto) -> np.ndarray | None:
    """Return what a weighted node adds, in its stored type: empty where that is nothing, None where it is computed."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(0, np.float32)
    bias = graph.constant(node.input[2])
    beta = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return bias if bias is None or beta == 1.0 else np.asarray(bias * bias.dtype.type(beta))
