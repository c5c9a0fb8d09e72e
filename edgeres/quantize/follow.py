"""An ONNX graph in torch: the same float32 arithmetic, but differentiable, and with a hook at every quantized input.

Recovery needs two things that onnxruntime does not give: gradients, and a network whose quantization can be changed
between two calls without writing a file. Only what residual nets are made of is here; anything else is refused by name,
and the build then does without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from edgeres.errors import QuantizationError
from edgeres.quantize.graph import WEIGHTED

Quantizer = Callable[[str, Tensor], Tensor]
"""From the name of a quantized tensor and its values to what the int8 layers behind it read."""


class Follower:
    """A float graph that torch can run: node by node, or whole.

    ``points`` says which (node name, input index) reads which quantized tensor.
    """

    def __init__(self, model: onnx.ModelProto, points: Mapping[tuple[str, int], str]) -> None:
        self.nodes = list(model.graph.node)
        self.points = dict(points)
        self.constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer
        }
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = torch.from_numpy(_constant(_attributes(node)))
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        inputs = [value.name for value in model.graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            raise _refusal(f"a graph with {len(inputs)} inputs")
        self.input = inputs[0]
        self.output = model.graph.output[0].name
        unknown = sorted({node.op_type for node in self.nodes} - set(OPERATORS))
        if unknown:
            raise _refusal(f"the operator {', '.join(unknown)}")
        others = {name: node.op_type for node in self.nodes for name in node.output[1:] if name}
        for name in (self.output, *(name for node in self.nodes for name in node.input)):
            if name in others:
                raise _refusal(f"the second output of a {others[name]}")
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def run(
        self,
        x: Tensor,
        keep: Collection[str] = (),
        quantizer: Quantizer | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the network's answer, and the tensors named in ``keep``.

        Args:
            x: float32 ``(N, 3, H, W)``.
            quantizer: applied once to each quantized tensor; None for the float network.
            constants: stand in for initializers of these names.
        """
        values, quantized = {self.input: x}, dict[str, Tensor]()
        for node in self.nodes:
            values[node.output[0]] = self.step(node, values, quantized, quantizer, constants)
        return values[self.output], {name: values[name] for name in keep}

    def step(
        self,
        node: onnx.NodeProto,
        values: Mapping[str, Tensor],
        quantized: dict[str, Tensor],
        quantizer: Quantizer | None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return one node's output from the values so far; ``quantized`` holds what ``quantizer`` made of them."""
        inputs = []
        for index, name in enumerate(node.input):
            inputs.append(self.read(node, index, values, quantized, quantizer, constants) if name else None)
        return OPERATORS[node.op_type](inputs, _attributes(node))

    def read(
        self,
        node: onnx.NodeProto,
        index: int,
        values: Mapping[str, Tensor],
        quantized: dict[str, Tensor],
        quantizer: Quantizer | None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return what a node reads at one of its inputs, which must not be left out."""
        name = node.input[index]
        if name in self.constants:
            return (constants or {}).get(name, self.constants[name])
        point = self.points.get((node.name, index))
        if quantizer is None or point is None:
            return values[name]
        if point not in quantized:
            quantized[point] = quantizer(point, values[name])
        return quantized[point]

    def channels(self, size: tuple[int, int]) -> dict[str, int]:
        """Return the size of axis 1 of every (N, C) and (N, C, H, W) tensor, for frames of ``size`` (height, width)."""
        batch = 2  # so that an axis of size 1 is not taken for it
        with torch.no_grad():
            values: dict[str, Tensor] = {self.input: torch.zeros(batch, 3, *size)}
            for node in self.nodes:
                values[node.output[0]] = self.step(node, values, {}, None)
        return {name: x.shape[1] for name, x in values.items() if x.ndim in (2, 4) and x.shape[0] == batch}

    def schedule(self) -> list[onnx.NodeProto]:
        """Return the nodes in an order in which no weighted layer comes before anything else that could run."""
        have = {self.input, "", *self.constants}
        rest, order = list(self.nodes), []
        while rest:
            ready = [node for node in rest if have.issuperset(node.input)]
            if not ready:
                raise _refusal(f"{rest[0].op_type} {rest[0].name}, whose inputs nothing makes")
            light = [node for node in ready if node.op_type not in WEIGHTED]
            for node in light or ready[:1]:
                order.append(node)
                have.update(node.output)
                rest.remove(node)
        return order


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {found.name: onnx.helper.get_attribute_value(found) for found in node.attribute}


def _constant(attributes: Mapping[str, Any]) -> np.ndarray:
    """Return what a Constant node holds, in whichever attribute it holds it."""
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                       ("value_ints", np.int64)):  # fmt: skip
        if name in attributes:
            return np.array(attributes[name], kind)
    if "value" not in attributes:
        raise _refusal(f"a Constant of the kind {', '.join(attributes)}")
    return np.array(numpy_helper.to_array(attributes["value"]))


def _refusal(what: str) -> QuantizationError:
    return QuantizationError(
        f"accuracy recovery cannot follow {what}. Nothing has to be done where accuracy suffices without it; else keep "
        "the layers that lose most in float: --keep-float NAME"
    )


Inputs = Sequence[Any]
Attributes = Mapping[str, Any]


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Return ``x`` padded as ONNX writes it: the begins of all axes, then the ends; the axes are the last ones."""
    half = len(pads) // 2
    turned = [int(pads[i + side * half]) for i in reversed(range(half)) for side in (0, 1)]
    return F.pad(x, turned, value=value) if any(turned) else x


def _pads(operator: str, axes: int, attributes: Attributes) -> list[int]:
    """Return the pads of a window that slides over two axes; refuse any other window."""
    if axes != 2:
        raise _refusal(f"a {axes}-D {operator}")
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _refusal(f"a {operator} with auto_pad")
    return list(attributes.get("pads", [0, 0, 0, 0]))


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = padded(inputs[0], _pads("Conv", inputs[1].ndim - 2, attributes))
    bias = inputs[2] if len(inputs) > 2 else None
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    y: Tensor = F.conv2d(x, inputs[1], bias, strides, 0, dilations, attributes.get("group", 1))
    return y


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    a = inputs[0].T if attributes.get("transA", 0) else inputs[0]
    b = inputs[1].T if attributes.get("transB", 0) else inputs[1]
    y: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    return y + attributes.get("beta", 1.0) * inputs[2] if len(inputs) > 2 and inputs[2] is not None else y


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    kernel, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
    pads, up = _pads("MaxPool", len(kernel), attributes), bool(attributes.get("ceil_mode", 0))
    x = padded(inputs[0], pads, float("-inf"))
    y: Tensor = F.max_pool2d(x, kernel, strides, 0, attributes.get("dilations", [1, 1]), up)
    if up:  # no window may begin in the padding at the end
        height, width = ((inputs[0].shape[2 + i] + pads[i] - 1) // strides[i] + 1 for i in (0, 1))
        y = y[:, :, :height, :width]
    return y


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    if any(_pads("AveragePool", len(attributes["kernel_shape"]), attributes)) or attributes.get("ceil_mode", 0):
        raise _refusal("an AveragePool with padding or ceil_mode")
    if any(size != 1 for size in attributes.get("dilations", ())):
        raise _refusal("an AveragePool with dilations")
    y: Tensor = F.avg_pool2d(inputs[0], attributes["kernel_shape"], attributes.get("strides", [1, 1]))
    return y


def _slice(inputs: Inputs, _attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    starts, ends = inputs[1].tolist(), inputs[2].tolist()
    axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise _refusal("a Slice backwards")
        first, last, _stride = slice(start, end, step).indices(x.shape[axis])
        x = x.index_select(axis, torch.arange(first, max(first, last), step))
    return x


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("mode", b"constant") != b"constant":
        raise _refusal("a Pad by copies")
    if len(inputs) > 3:
        raise _refusal("a Pad of some axes")
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    return padded(inputs[0], inputs[1].tolist(), value)


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = inputs[0]
    shape = [x.shape[i] if size == 0 and not attributes.get("allowzero", 0) else size
             for i, size in enumerate(inputs[1].tolist())]  # fmt: skip
    y: Tensor = x.reshape(shape)
    return y


def _mean(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _axes(inputs, attributes)
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return inputs[0]  # type: ignore[no-any-return]
    y: Tensor = inputs[0].mean(axes or None, keepdim=bool(attributes.get("keepdims", 1)))
    return y


def _clip(inputs: Inputs, _attributes: Attributes) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i else None for i in (1, 2))
    y: Tensor = inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)
    return y


def _dropout(inputs: Inputs, _attributes: Attributes) -> Tensor:
    if len(inputs) > 2 and inputs[2] is not None and bool(inputs[2]):
        raise _refusal("a Dropout in training mode")
    return inputs[0]  # type: ignore[no-any-return]


def _axes(inputs: Inputs, attributes: Attributes) -> list[int]:
    """Return the axes, which opset 13 (for ReduceMean opset 18) made an input; none where they are left out."""
    return list(inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes", ()))


def _squeeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _axes(inputs, attributes)
    y: Tensor = inputs[0].squeeze(tuple(axes)) if axes else inputs[0].squeeze()
    return y


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    axes = _axes(inputs, attributes)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):  # they count the axes of the result
        x = x.unsqueeze(axis)
    return x


def _batch_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("training_mode", 0):
        raise _refusal("a BatchNormalization in training mode")
    scale, shift, mean, variance = inputs[1:5]
    y: Tensor = F.batch_norm(inputs[0], mean, variance, scale, shift, eps=attributes.get("epsilon", 1e-5))
    return y


def _transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    return x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))


OPERATORS: dict[str, Callable[[Inputs, Attributes], Tensor]] = {
    "Add": lambda i, a: i[0] + i[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(list(i), a["axis"]),
    "Conv": _conv,
    "Div": lambda i, a: i[0] / i[1],
    "Dropout": _dropout,
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "Erf": lambda i, a: torch.erf(i[0]),
    "Exp": lambda i, a: torch.exp(i[0]),
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)) if a.get("axis", 1) == 1 else i[0].reshape(
        int(np.prod(i[0].shape[: a["axis"]])), -1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, a: i[0].mean(tuple(range(2, i[0].ndim)), keepdim=True),
    "GlobalMaxPool": lambda i, a: i[0].amax(tuple(range(2, i[0].ndim)), keepdim=True),
    "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda i, a: F.hardswish(i[0]),
    "Identity": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "MatMul": lambda i, a: i[0] @ i[1],
    "MaxPool": _max_pool,
    "Mul": lambda i, a: i[0] * i[1],
    "PRelu": lambda i, a: torch.where(i[0] < 0, i[0] * i[1], i[0]),
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda i, a: F.relu(i[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
    "Slice": _slice,
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": lambda i, a: i[0] - i[1],
    "Sum": lambda i, a: functools.reduce(torch.add, i),
    "Tanh": lambda i, a: torch.tanh(i[0]),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
