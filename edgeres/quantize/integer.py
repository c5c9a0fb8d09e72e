"""The integer form of a Q/DQ model for ONNX Runtime: the same numbers, computed in 8-bit kernels that cannot saturate.

Activations become unsigned bytes, int8 plus 128, channels last. A convolution that is quantized next becomes one
QLinearConv; one that is added to a skip ends in float32, out of the multiplication itself. What has no such form stays
as it was, in float. Sums of products are exact; only float32's rounding in the last digit is another one, so a value on
the border between two steps may fall to the other side.

A border map that gives a shifted input back (see :mod:`edgeres.quantize.shift`) is not needed here: padding is with the
byte that stands for zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.files import sha256_bytes
from edgeres.quantize.accumulate import HALF, Codes, Layer, is_whole, layer_of, output_size, tail_of, with_border
from edgeres.quantize.graph import Graph, attribute
from edgeres.quantize.offset import Shape, integers, shapes_of, shifts_of
from edgeres.quantize.saturation import cannot_saturate, in_reading_order

MICROSOFT = "com.microsoft"
LAST = (0, 2, 3, 1)
FIRST = (0, 3, 1, 2)
FEW = 16
"""Input channels up to which gathering the windows in the graph is faster than in ONNX Runtime's convolution."""
ELEMENTWISE = ("Add", "Sub", "Mul", "Relu", "Clip", "Sigmoid", "Identity")


class Windows(NamedTuple):
    """What a layer multiplies, by name; ``gathered``: what one output reads lies side by side."""

    name: str
    gathered: bool


@dataclass
class Held:
    """In which forms a tensor is at hand: float as in the file, float channels last, bytes."""

    plain: str = ""
    last: str = ""
    codes: Codes | None = None


def write_integer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the integer form of a Q/DQ model; its input and output are those of ``model``."""
    writer = _Writer(Graph(model), shapes_of(model), shifts_of(model))
    for node in writer.graph.nodes:
        writer.visit(node)
    for name in writer.graph.outputs:
        writer.finish(name)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:], result.metadata_props[:]
    read = {name for node in writer.nodes for name in node.input}
    result.graph.node.extend(writer.nodes)
    result.graph.initializer.extend(
        tensor for tensor in (*model.graph.initializer, *writer.constants.values()) if tensor.name in read
    )
    if all(found.domain != MICROSOFT for found in result.opset_import):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result


@dataclass
class _Writer:
    """The new graph while it grows. ``held`` has the forms of each tensor of the file; ``done`` what needs no visit."""

    graph: Graph
    shapes: dict[str, Shape]
    shifts: dict[str, np.ndarray]
    held: dict[str, Held] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.used = {name for node in self.graph.nodes for name in (*node.input, *node.output, node.name)}
        self.used.update(self.graph.initializers)
        for name in (*self.graph.inputs, *self.graph.initializers):
            self.held[name] = Held(plain=name)

    # What a node becomes

    def visit(self, node: onnx.NodeProto) -> None:
        """Write one node of the file, in the form that its inputs allow."""
        first = node.input[0] if node.input else ""
        if node.name in self.done or self.is_weight(node):
            return
        held = self.held.get(first, Held())
        if node.op_type == "QuantizeLinear":
            self.held[node.output[0]] = Held(codes=self.quantized(node))
        elif node.op_type == "DequantizeLinear" and held.codes:
            self.held[node.output[0]] = Held(codes=held.codes)
        elif node.op_type == "Conv" and self.convolution(node):
            return
        elif node.op_type in ("Gemm", "MatMul") and self.product(node):
            return
        elif held.codes and (moved := self.moved(node, held.codes)):
            self.held[node.output[0]] = Held(codes=moved)
        elif node.op_type == "Relu" and self.is_implied(node):
            self.held[node.output[0]] = held
        elif node.op_type in ELEMENTWISE and self.elementwise(node):
            return
        elif node.op_type == "GlobalAveragePool" and self.is_image(first) and self.opset() < 18:
            output = self.emit("ReduceMean", [self.last(first)], node.output[0], axes=[1, 2], keepdims=1)
            self.held[node.output[0]] = Held(last=output)
        elif node.op_type == "Flatten" and held.last and self.shapes.get(first, ())[2:] == (1, 1):
            self.held[node.output[0]] = Held(plain=self.copy(node, [held.last]))
        else:
            self.copied(node)

    def opset(self) -> int:
        return max(one.version for one in self.graph.model.opset_import if one.domain in ("", "ai.onnx"))

    def copied(self, node: onnx.NodeProto) -> None:
        """Write a node as it is, on its inputs as the file has them."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.input[:] = [self.plain(name) if name else "" for name in node.input]
        self.nodes.append(made)
        for name in node.output:
            self.held[name] = Held(plain=name)

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str]) -> str:
        """Write a node with other inputs, and return its output's name, a new one."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.input[:] = inputs
        made.output[:] = [self.name(node.output[0])]
        self.nodes.append(made)
        return made.output[0]

    def is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a node is one of the pair on a weight: those are written where somebody reads them in float."""
        if node.op_type == "QuantizeLinear":
            return node.input[0] in self.graph.initializers
        maker = self.graph.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        return maker is not None and maker.op_type == "QuantizeLinear" and self.is_weight(maker)

    def is_implied(self, node: onnx.NodeProto) -> bool:
        """Whether only Qs to a symmetric grid read a ReLU: unsigned bytes end at zero as it does."""
        return self.is_rectified(node.output[0]) and not self.held[node.input[0]].codes

    def is_rectified(self, tensor: str) -> bool:
        """Whether a tensor is a ReLU's, and read only to be quantized without a shift."""
        maker, readers = self.graph.producer.get(tensor), self.graph.readers(tensor)
        return (
            maker is not None
            and maker.op_type == "Relu"
            and tensor not in self.graph.outputs
            and all(one.op_type == "QuantizeLinear" and one.name not in self.shifts for one in readers)
        )

    def elementwise(self, node: onnx.NodeProto) -> bool:
        """Write a node that treats all elements alike channels last, if an image of its inputs is at hand so."""
        held = [self.held.get(name, Held()) for name in node.input if name]
        if not any(one.last or one.codes for one in held) or not self.is_image(node.output[0]):
            return False
        inputs = []
        for name in node.input:
            found = self.graph.constant(name)
            if found is None:
                if name and not self.is_image(name):
                    return False
                inputs.append(self.last(name) if name else "")
            elif found.size == 1 and found.ndim == 0:
                inputs.append(name)
            else:
                inputs.append(self.constant(f"{name}_last", channels_last(found)))
        self.held[node.output[0]] = Held(last=self.copy(node, inputs))
        return True

    def moved(self, node: onnx.NodeProto, codes: Codes) -> Codes | None:
        """Return what a node makes of bytes that it only moves or picks; None where it does more, or needs values."""
        image = self.is_image(node.input[0])
        if node.op_type == "MaxPool" and image and len(node.output) == 1:
            return replace(codes, name=self.pooled(node, codes.name))
        if node.op_type == "Flatten" and image and self.shapes[node.input[0]][2:] == (1, 1):
            return replace(codes, name=self.copy(node, [codes.name]))
        if node.op_type == "Slice" and image and len(node.input) > 3:
            return self.sliced(node, codes)
        if node.op_type == "Pad" and image and len(node.input) < 4:
            return self.padded(node, codes)
        return None

    def sliced(self, node: onnx.NodeProto, codes: Codes) -> Codes | None:
        axes = self.graph.constant(node.input[3])
        if axes is None:
            return None
        turned = np.array([FIRST[int(axis) % 4] for axis in axes], np.int64)
        inputs = [codes.name, *node.input[1:3], self.constant(f"{node.name}_axes", turned), *node.input[4:]]
        return replace(codes, name=self.copy(node, inputs))

    def padded(self, node: onnx.NodeProto, codes: Codes) -> Codes | None:
        pads = self.graph.constant(node.input[1])
        value = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if pads is None or value is None or attribute(node, "mode", b"constant") != b"constant":
            return None
        code = float(value.reshape(())) / float(codes.scale) + codes.zero
        if abs(code - round(code)) > 1e-3 or not 0 <= round(code) <= 255:
            return None
        turned = pads.reshape(2, 4)[:, list(LAST)].reshape(-1)
        inputs = [
            self.constant(f"{node.name}_pads", turned.astype(np.int64)),
            self.constant(f"{node.name}_code", np.uint8(round(code))),
        ]
        return replace(codes, name=self.copy(node, [codes.name, *inputs]))

    def pooled(self, node: onnx.NodeProto, source: str) -> str:
        known = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "storage_order"}
        return self.emit("NhwcMaxPool", [source], node.output[0], MICROSOFT, **known)

    # Bytes

    def quantized(self, node: onnx.NodeProto) -> Codes:
        """Write a Q."""
        source = node.input[0]
        held = self.held[source]
        grid = self.grid_of(node, self.is_rectified(source))
        if held.codes and held.codes.scale == grid.scale:  # it lies on this grid already
            return held.codes
        is_last = bool(held.last or held.codes)
        name = self.emit("QuantizeLinear", [self.last(source) if is_last else self.plain(source), *self.grid(grid)],
                         f"{source}_bytes")  # fmt: skip
        if self.is_image(source) and not is_last:
            name = self.emit("Transpose", [name], f"{source}_bytes", perm=LAST)
        return replace(grid, name=self.limited(name, grid))

    def grid_of(self, node: onnx.NodeProto, rectified: bool) -> Codes:
        """Return the bytes that a Q makes, without a name yet: what is never negative begins at zero."""
        shift = self.shifts.get(node.name, np.zeros(()))
        zero, top = (0, 127) if rectified and not shift.any() else (HALF, 255)
        return Codes("", np.float32(self.graph.values(node.input[1])), zero, shift, top)

    def limited(self, name: str, codes: Codes) -> str:
        """Write where int8 ends, if bytes would go on."""
        if codes.top == 255:
            return name
        bounds = [self.constant("least", np.uint8(0)), self.constant(f"most_{codes.top}", np.uint8(codes.top))]
        return self.emit("Clip", [name, *bounds], f"{name}_limited")

    def grid(self, codes: Codes) -> list[str]:
        """Return the names of a grid's scale and zero point."""
        return [self.constant("scale", codes.scale), self.constant("zero", np.uint8(codes.zero))]

    # Layers

    def convolution(self, node: onnx.NodeProto) -> bool:
        """Write a convolution on bytes, and what goes with it of the nodes behind it; False where it stays in float."""
        codes = self.codes(node.input[0])
        layer = layer_of(self.graph, node, codes) if codes and self.is_image(node.input[0]) else None
        if layer is None:
            return False
        tail, shape = tail_of(self.graph, node), self.shapes[node.input[0]]
        layer = with_border(layer, tail.border, shape)
        fused = tail.quantizer is not None and layer.border is None and layer.fits()
        data = self.windows(layer, shape, fused)
        if data is None:
            return False
        if tail.quantizer is None:
            self.held[tail.tensor] = Held(last=self.multiplied(layer, data, tail.tensor))
        else:
            grid = self.grid_of(tail.quantizer, tail.is_rectified)
            if fused:
                name = self.requantized(layer, data, grid)
            else:
                name = self.multiplied(layer, data, tail.tensor)
                name = self.emit("QuantizeLinear", [name, *self.grid(grid)], f"{tail.tensor}_bytes")
            for pool in tail.pools:
                name = self.pooled(pool, name)
            self.held[tail.quantizer.output[0]] = Held(codes=replace(grid, name=self.limited(name, grid)))
            self.done.add(tail.quantizer.name)
        self.done.update(one.name for one in tail.taken)
        return True

    def windows(self, layer: Layer, shape: Shape, fused: bool) -> Windows | None:
        """Return what a convolution is to multiply: its bytes as they are, or gathered window by window.

        ONNX Runtime gathers windows itself, where the output is bytes; slowly, where channels are few.
        """
        kernel = layer.weights.shape[2:]
        single = kernel == (1, 1) and not any(integers(layer.node, "pads", (0,)))
        if fused and (single or layer.groups > 1 or layer.weights.shape[1] > FEW):
            return Windows(layer.codes.name, False)
        size = output_size(layer, shape)
        if layer.groups > 1 or size is None:
            return Windows(layer.codes.name, False) if fused else None
        strides, dilations = integers(layer.node, "strides", (1, 1)), integers(layer.node, "dilations", (1, 1))
        name = layer.codes.name
        pads = integers(layer.node, "pads", (0, 0, 0, 0))
        if any(pads):
            inputs = [
                self.constant("pads", np.array([0, *pads[:2], 0, 0, *pads[2:], 0], np.int64)),
                self.constant("padding", np.uint8(layer.zero)),
            ]
            name = self.emit("Pad", [name, *inputs], f"{name}_padded")
        for axis in (1, 0):  # columns side by side first, so that rows then move whole
            parts = []
            for tap in range(kernel[axis]):
                start = tap * dilations[axis]
                bounds = start, start + (size[axis] - 1) * strides[axis] + 1, axis + 1, strides[axis]
                whole = kernel[axis] == 1 and strides[axis] == 1
                parts.append(name if whole else self.emit("Slice", [name, *self.bounds(bounds)], f"{name}_{tap}"))
            name = parts[0] if len(parts) == 1 else self.emit("Concat", parts, f"{name}_taps", axis=3)
        return Windows(name, True)

    def bounds(self, values: tuple[int, int, int, int]) -> list[str]:
        """Return the names of a Slice's start, end, axis and step."""
        return [self.constant("bound", np.array([value], np.int64)) for value in values]

    def requantized(self, layer: Layer, data: Windows, grid: Codes) -> str:
        """Write a convolution from bytes to bytes."""
        weights = layer.weights
        if data.gathered:
            weights = in_reading_order(weights)[:, :, np.newaxis, np.newaxis]
        attributes: dict[str, Any] = {"channels_last": 1, "group": layer.groups, "kernel_shape": weights.shape[2:]}
        if not data.gathered:
            attributes.update({
                one.name: helper.get_attribute_value(one) for one in layer.node.attribute
                if one.name in ("pads", "strides", "dilations", "auto_pad")
            })  # fmt: skip
        stored, zero = self.stored(layer, weights)
        bias, begin = layer.bias, grid
        if is_whole(grid):  # what the file subtracts stands in its bias; here bytes begin where the true value is 0
            bias, begin = bias + float(grid.shift), replace(grid, zero=0)
        inputs = [
            data.name,
            self.constant("scale", layer.codes.scale),
            self.constant("zero", np.uint8(layer.zero)),
            stored,
            self.constant(f"{layer.node.name}_steps", layer.steps.astype(np.float32)),
            zero,
            *self.grid(begin),
            self.constant(f"{layer.node.name}_bias", np.rint(bias / layer.unit).astype(np.int32)),
        ]
        return self.emit("QLinearConv", inputs, f"{layer.node.output[0]}_bytes", MICROSOFT, **attributes)

    def multiplied(self, layer: Layer, data: Windows, tensor: str) -> str:
        """Write a product of bytes that ends in float32, bias and border included."""
        stored, zero = self.stored(layer, in_reading_order(layer.weights).T)
        inputs = [
            data.name,
            stored,
            self.constant("scale", layer.codes.scale),
            self.constant(f"{layer.node.name}_steps", layer.steps.astype(np.float32)),
            self.constant("zero", np.uint8(layer.zero)),
            zero,
            self.constant(f"{layer.node.name}_bias", layer.bias.astype(np.float32)),
        ]
        name = self.emit("MatMulIntegerToFloat", inputs, tensor, MICROSOFT)
        if layer.border is not None:
            border = self.constant(f"{layer.node.name}_border", channels_last(layer.border.astype(np.float32)))
            name = self.emit("Add", [name, border], tensor)
        return name

    def stored(self, layer: Layer, weights: np.ndarray) -> tuple[str, str]:
        """Return the names of a layer's integers and of their zero points: unsigned where signed ones may saturate."""
        safe = cannot_saturate(layer.weights, layer.codes.top)
        values = weights if safe else (weights.astype(np.int16) + HALF).astype(np.uint8)
        zeros = np.full(len(layer.weights), 0 if safe else HALF, values.dtype)
        return self.constant(f"{layer.node.name}_weights", values), self.constant(f"{layer.node.name}_zeros", zeros)

    def product(self, node: onnx.NodeProto) -> bool:
        """Write a Gemm or MatMul of a matrix of bytes; False where it stays in float."""
        codes = self.codes(node.input[0])
        layer = layer_of(self.graph, node, codes) if codes and len(self.shapes.get(node.input[0], ())) == 2 else None
        if layer is None:
            return False
        self.held[node.output[0]] = Held(plain=self.multiplied(layer, Windows(layer.codes.name, True), node.output[0]))
        return True

    # Forms

    def is_image(self, tensor: str) -> bool:
        return len(self.shapes.get(tensor, ())) == 4

    def codes(self, tensor: str) -> Codes | None:
        return self.held.get(tensor, Held()).codes

    def last(self, tensor: str) -> str:
        """Return the name of an image in float, channels last."""
        held = self.held[tensor]
        if not held.last and held.codes:
            held.last = self.emit("DequantizeLinear", [held.codes.name, *self.grid(held.codes)], f"{tensor}_last")
        elif not held.last:
            held.last = self.emit("Transpose", [self.plain(tensor)], f"{tensor}_last", perm=LAST)
        return held.last

    def plain(self, tensor: str) -> str:
        """Return the name of a tensor in float, as the file has it."""
        if tensor not in self.held:
            self.unfolded(tensor)
        held = self.held[tensor]
        if held.plain:
            return held.plain
        if self.is_image(tensor):
            held.plain = self.emit("Transpose", [self.last(tensor)], tensor, perm=FIRST)
        elif held.last:  # a matrix has one form
            held.plain = held.last
        else:
            assert held.codes is not None
            held.plain = self.emit("DequantizeLinear", [held.codes.name, *self.grid(held.codes)], tensor)
        return held.plain

    def unfolded(self, tensor: str) -> None:
        """Write the Q and DQ of a weight that somebody reads in float."""
        node = self.graph.producer[tensor]
        self.copied(self.graph.producer[node.input[0]])
        self.copied(node)

    def finish(self, tensor: str) -> None:
        """Let an output have its name."""
        if (name := self.plain(tensor)) != tensor:
            self.nodes.append(helper.make_node("Identity", [name], [tensor], name=self.name(f"{tensor}_Identity")))

    # Names

    def emit(self, op_type: str, inputs: Sequence[str], stem: str, domain: str = "", **attributes: Any) -> str:
        """Write a node of one output, and return that one's name."""
        output = self.name(stem)
        name = self.name(f"{output}_{op_type}")
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def constant(self, stem: str, values: np.ndarray | np.generic) -> str:
        """Return the name of an initializer with these values; equal ones are kept once."""
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        key = f"{array.dtype} {array.shape} {sha256_bytes(array.tobytes())}"
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, self.name(stem))
        return self.constants[key].name

    def name(self, stem: str) -> str:
        """Return a name that nothing has yet."""
        name, number = stem, 1
        while name in self.used:
            number += 1
            name = f"{stem}_{number}"
        self.used.add(name)
        return name


def channels_last(values: np.ndarray) -> np.ndarray:
    """Return a constant that meets an image ``(N, C, H, W)`` as one that meets ``(N, H, W, C)``."""
    return values.reshape((1,) * (4 - values.ndim) + values.shape).transpose(LAST)
