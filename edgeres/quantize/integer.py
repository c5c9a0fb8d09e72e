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
from onnx import helper

from edgeres.quantize.accumulate import HALF, Codes, Layer, is_whole, layer_of, output_size, tail_of, with_border
from edgeres.quantize.graph import Graph
from edgeres.quantize.moves import flattens_channels, moved, pooled
from edgeres.quantize.offset import Shape, integers, shapes_of, shifts_of
from edgeres.quantize.saturation import cannot_saturate, in_reading_order
from edgeres.quantize.sheet import FIRST, LAST, MICROSOFT, Sheet, channels_last
from edgeres.quantize.windows import gathered

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
    read = {name for node in writer.sheet.nodes for name in node.input}
    result.graph.node.extend(writer.sheet.nodes)
    result.graph.initializer.extend(
        tensor for tensor in (*model.graph.initializer, *writer.sheet.constants.values()) if tensor.name in read
    )
    if all(found.domain != MICROSOFT for found in result.opset_import):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result


def _begun(layer: Layer, grid: Codes) -> Layer:
    """Return a layer whose bytes begin where the true value is 0: what the file subtracts stands in its bias."""
    return replace(layer, bias=layer.bias + float(grid.shift)) if is_whole(grid) else layer


@dataclass
class _Writer:
    """The new graph while it grows. ``held`` has the forms of each tensor of the file; ``done`` what needs no visit."""

    graph: Graph
    shapes: dict[str, Shape]
    shifts: dict[str, np.ndarray]
    held: dict[str, Held] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    sheet: Sheet = field(default_factory=Sheet)

    def __post_init__(self) -> None:
        self.sheet.used.update(name for node in self.graph.nodes for name in (*node.input, *node.output, node.name))
        self.sheet.used.update(self.graph.initializers)
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
        elif self.convolution(node) or self.product(node):
            return
        elif held.codes and (changed := moved(self.graph, self.sheet, node, held.codes, self.shapes)):
            self.held[node.output[0]] = Held(codes=changed)
        elif node.op_type == "Relu" and self.is_implied(node):
            self.held[node.output[0]] = held
        elif node.op_type in ELEMENTWISE and self.elementwise(node):
            return
        elif node.op_type == "GlobalAveragePool" and self.is_image(first) and self.opset() < 18:
            output = self.sheet.emit("ReduceMean", [self.last(first)], node.output[0], axes=[1, 2], keepdims=1)
            self.held[node.output[0]] = Held(last=output)
        elif node.op_type == "Flatten" and held.last and flattens_channels(node, self.shapes.get(first, ())):
            self.held[node.output[0]] = Held(plain=self.sheet.copy(node, [held.last]))
        else:
            self.copied(node)

    def opset(self) -> int:
        return max(int(one.version) for one in self.graph.model.opset_import if one.domain in ("", "ai.onnx"))

    def copied(self, node: onnx.NodeProto) -> None:
        """Write a node as it is, on its inputs as the file has them."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.input[:] = [self.plain(name) if name else "" for name in node.input]
        self.sheet.nodes.append(made)
        for name in node.output:
            self.held[name] = Held(plain=name)

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
            elif found.ndim == 0:
                inputs.append(name)
            else:
                inputs.append(self.sheet.constant(f"{name}_last", channels_last(found)))
        self.held[node.output[0]] = Held(last=self.sheet.copy(node, inputs))
        return True

    # Bytes

    def quantized(self, node: onnx.NodeProto) -> Codes:
        """Write a Q."""
        source = node.input[0]
        held = self.held[source]
        grid = self.grid_of(node, self.is_rectified(source))
        if held.codes and held.codes.scale == grid.scale:  # it lies on this grid already
            return held.codes
        is_last = bool(held.last or held.codes)
        name = self.last(source) if is_last else self.plain(source)
        name = self.sheet.emit("QuantizeLinear", [name, *self.grid(grid)], f"{source}_bytes")
        if self.is_image(source) and not is_last:
            name = self.sheet.emit("Transpose", [name], f"{source}_bytes", perm=LAST)
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
        bounds = [
            self.sheet.constant("least", np.uint8(0)),
            self.sheet.constant(f"most_{codes.top}", np.uint8(codes.top)),
        ]
        return self.sheet.emit("Clip", [name, *bounds], f"{name}_limited")

    def grid(self, codes: Codes) -> list[str]:
        """Return the names of a grid's scale and zero point."""
        return [self.sheet.constant("scale", codes.scale), self.sheet.constant("zero", np.uint8(codes.zero))]

    # Layers

    def convolution(self, node: onnx.NodeProto) -> bool:
        """Write a convolution on bytes, and what goes with it of the nodes behind it; False where it stays in float."""
        layer = self.layer(node, ("Conv",), 4)
        if layer is None:
            return False
        tail, shape = tail_of(self.graph, node), self.shapes[node.input[0]]
        if tail.border is not None and tail.border.shape[1] not in (1, len(layer.weights)):
            return False  # it makes more channels of them
        layer = with_border(layer, tail.border, shape)
        grid = None if tail.quantizer is None else self.grid_of(tail.quantizer, tail.is_rectified)
        fused = grid is not None and layer.border is None and _begun(layer, grid).whole() is not None
        data = self.windows(layer, shape, fused)
        if data is None:
            return False
        if tail.quantizer is None or grid is None:
            self.held[tail.tensor] = Held(last=self.multiplied(layer, data, tail.tensor))
        else:
            if fused:
                name = self.requantized(layer, data, grid)
            else:
                name = self.multiplied(layer, data, tail.tensor)
                name = self.sheet.emit("QuantizeLinear", [name, *self.grid(grid)], f"{tail.tensor}_bytes")
            for pool in tail.pools:
                name = pooled(self.sheet, pool, name)
            self.held[tail.quantizer.output[0]] = Held(codes=replace(grid, name=self.limited(name, grid)))
            self.done.add(tail.quantizer.name)
        self.done.update(one.name for one in tail.taken)
        return True

    def windows(self, layer: Layer, shape: Shape, fused: bool) -> Windows | None:
        """Return what a convolution is to multiply: its bytes as they are, or gathered window by window.

        ONNX Runtime gathers windows itself, where the output is bytes; slowly, where channels are few.
        """
        single = layer.weights.shape[2:] == (1, 1) and not any(integers(layer.node, "pads", (0,)))
        if fused and (single or layer.groups > 1 or layer.weights.shape[1] > FEW):
            return Windows(layer.codes.name, False)
        size = output_size(layer, shape)
        if layer.groups > 1 or size is None:
            return Windows(layer.codes.name, False) if fused else None
        return Windows(gathered(self.sheet, layer, size), True)

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
        begin = replace(grid, zero=0) if is_whole(grid) else grid
        whole = _begun(layer, grid).whole()
        assert whole is not None
        steps, bias = whole
        inputs = [
            data.name,
            self.sheet.constant("scale", layer.codes.scale),
            self.sheet.constant("zero", np.uint8(layer.zero)),
            stored,
            self.sheet.constant(f"{layer.node.name}_steps", steps.astype(np.float32)),
            zero,
            *self.grid(begin),
            self.sheet.constant(f"{layer.node.name}_bias", bias),
        ]
        return self.sheet.emit("QLinearConv", inputs, f"{layer.node.output[0]}_bytes", MICROSOFT, **attributes)

    def multiplied(self, layer: Layer, data: Windows, tensor: str) -> str:
        """Write a product of bytes that ends in float32, bias and border included."""
        stored, zero = self.stored(layer, in_reading_order(layer.weights).T)
        inputs = [
            data.name,
            stored,
            self.sheet.constant("scale", layer.codes.scale),
            self.sheet.constant(f"{layer.node.name}_steps", layer.steps.astype(np.float32)),
            self.sheet.constant("zero", np.uint8(layer.zero)),
            zero,
            self.sheet.constant(f"{layer.node.name}_bias", layer.bias.astype(np.float32)),
        ]
        name = self.sheet.emit("MatMulIntegerToFloat", inputs, tensor, MICROSOFT)
        if layer.border is not None:
            border = self.sheet.constant(f"{layer.node.name}_border", channels_last(layer.border.astype(np.float32)))
            name = self.sheet.emit("Add", [name, border], tensor)
        return name

    def stored(self, layer: Layer, weights: np.ndarray) -> tuple[str, str]:
        """Return the names of a layer's integers and of their zero points: unsigned where signed ones may saturate."""
        safe = cannot_saturate(layer.weights, layer.codes.top)
        values = weights if safe else (weights.astype(np.int16) + HALF).astype(np.uint8)
        zeros = np.full(len(layer.weights), 0 if safe else HALF, values.dtype)
        return self.sheet.constant(f"{layer.node.name}_weights", values), self.sheet.constant(
            f"{layer.node.name}_zeros", zeros
        )

    def product(self, node: onnx.NodeProto) -> bool:
        """Write a Gemm or MatMul of a matrix of bytes; False where it stays in float."""
        layer = self.layer(node, ("Gemm", "MatMul"), 2)
        if layer is None:
            return False
        self.held[node.output[0]] = Held(plain=self.multiplied(layer, Windows(layer.codes.name, True), node.output[0]))
        return True

    # Forms

    def is_image(self, tensor: str) -> bool:
        return len(self.shapes.get(tensor, ())) == 4

    def layer(self, node: onnx.NodeProto, kinds: Sequence[str], rank: int) -> Layer | None:
        """Return a node's layer if it is one of these kinds, and reads bytes of so many dimensions."""
        codes = self.held.get(node.input[0], Held()).codes if node.op_type in kinds else None
        fits = codes is not None and len(self.shapes.get(node.input[0], ())) == rank
        return layer_of(self.graph, node, codes) if codes and fits else None

    def last(self, tensor: str) -> str:
        """Return the name of an image in float, channels last."""
        held = self.held[tensor]
        if not held.last and held.codes:
            held.last = self.sheet.emit("DequantizeLinear", [held.codes.name, *self.grid(held.codes)], f"{tensor}_last")
        elif not held.last:
            held.last = self.sheet.emit("Transpose", [self.plain(tensor)], f"{tensor}_last", perm=LAST)
        return held.last

    def plain(self, tensor: str) -> str:
        """Return the name of a tensor in float, as the file has it."""
        if tensor not in self.held:
            self.unfolded(tensor)
        held = self.held[tensor]
        if held.plain:
            return held.plain
        if self.is_image(tensor):
            held.plain = self.sheet.emit("Transpose", [self.last(tensor)], tensor, perm=FIRST)
        elif held.last:  # a matrix has one form
            held.plain = held.last
        else:
            assert held.codes is not None
            held.plain = self.sheet.emit("DequantizeLinear", [held.codes.name, *self.grid(held.codes)], tensor)
        return held.plain

    def unfolded(self, tensor: str) -> None:
        """Write the Q and DQ of a weight that somebody reads in float."""
        node = self.graph.producer[tensor]
        self.copied(self.graph.producer[node.input[0]])
        self.copied(node)

    def finish(self, tensor: str) -> None:
        """Let an output have its name."""
        if (name := self.plain(tensor)) != tensor:
            self.sheet.nodes.append(
                helper.make_node("Identity", [name], [tensor], name=self.sheet.name(f"{tensor}_Identity"))
            )
