"""An ONNX graph in torch: the same float32 arithmetic, but differentiable, and with a hook at every quantized input.

Recovery needs two things that onnxruntime does not give: gradients, and a network whose quantization can be changed
between two calls without writing a file. Only what residual nets are made of is here; anything else is refused by name,
and the build then does without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from edgeres.errors import QuantizationError

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
                value = numpy_helper.to_array(_attributes(node)["value"])
                self.constants[node.output[0]] = torch.from_numpy(np.array(value))
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        self.input = next(value.name for value in model.graph.input if value.name not in self.constants)
        self.output = model.graph.output[0].name
        unknown = sorted({node.op_type for node in self.nodes} - set(OPERATORS))
        if unknown:
            raise QuantizationError(
                f"accuracy recovery cannot follow the operator {', '.join(unknown)}. Turn it off: --recovery none"
            )
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
            inputs.append(self.read(node, index, name, values, quantized, quantizer, constants) if name else None)
        return OPERATORS[node.op_type](inputs, _attributes(node))

    def read(
        self,
        node: onnx.NodeProto,
        index: int,
        name: str,
        values: Mapping[str, Tensor],
        quantized: dict[str, Tensor],
        quantizer: Quantizer | None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return what a node reads at one of its inputs."""
        if name in self.constants:
            return (constants or {}).get(name, self.constants[name])
        point = self.points.get((node.name, index))
        if quantizer is None or point is None:
            return values[name]
        if point not in quantized:
            quantized[point] = quantizer(point, values[name])
        return quantized[point]

    def channels(self, size: tuple[int, int]) -> dict[str, int]:
        """Return the size of axis 1 of every tensor, for frames of ``size`` (height, width)."""
        with torch.no_grad():
            values: dict[str, Tensor] = {self.input: torch.zeros(1, 3, *size)}
            for node in self.nodes:
                values[node.output[0]] = self.step(node, values, {}, None)
        return {name: value.shape[1] for name, value in values.items() if value.ndim > 1}

    def schedule(self) -> list[onnx.NodeProto]:
        """Return the nodes in an order in which no weighted layer comes before anything else that could run."""
        have = {self.input, "", *self.constants}
        rest, order = list(self.nodes), []
        while rest:
            ready = [node for node in rest if have.issuperset(node.input)]
            light = [node for node in ready if node.op_type not in ("Conv", "Gemm", "MatMul")]
            for node in light or ready[:1]:
                order.append(node)
                have.update(node.output)
                rest.remove(node)
        return order


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {found.name: onnx.helper.get_attribute_value(found) for found in node.attribute}


Inputs = Sequence[Any]
Attributes = Mapping[str, Any]


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Return ``x`` padded as ONNX writes it: the begins of all axes, then the ends; the axes are the last ones."""
    half = len(pads) // 2
    turned = [int(pads[i + side * half]) for i in reversed(range(half)) for side in (0, 1)]
    return F.pad(x, turned, value=value) if any(turned) else x


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = padded(inputs[0], attributes.get("pads", [0, 0, 0, 0]))
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
    x = padded(inputs[0], attributes.get("pads", [0, 0, 0, 0]), float("-inf"))
    y: Tensor = F.max_pool2d(
        x,
        attributes["kernel_shape"],
        attributes.get("strides", [1, 1]),
        0,
        attributes.get("dilations", [1, 1]),
        bool(attributes.get("ceil_mode", 0)),
    )
    return y


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    if any(attributes.get("pads", ())) or attributes.get("ceil_mode", 0):
        raise QuantizationError(
            "accuracy recovery cannot follow an AveragePool with padding. Turn it off: --recovery none"
        )
    y: Tensor = F.avg_pool2d(inputs[0], attributes["kernel_shape"], attributes.get("strides", [1, 1]))
    return y


def _slice(inputs: Inputs, _attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    starts, ends = inputs[1].tolist(), inputs[2].tolist()
    axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise QuantizationError("accuracy recovery cannot follow a Slice backwards. Turn it off: --recovery none")
        first, last, _stride = slice(start, end, step).indices(x.shape[axis])
        x = x.index_select(axis, torch.arange(first, max(first, last), step))
    return x


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("mode", b"constant") != b"constant":
        raise QuantizationError("accuracy recovery cannot follow a Pad by copies. Turn it off: --recovery none")
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    return padded(inputs[0], inputs[1].tolist(), value)


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = inputs[0]
    shape = [x.shape[i] if size == 0 and not attributes.get("allowzero", 0) else size
             for i, size in enumerate(inputs[1].tolist())]  # fmt: skip
    y: Tensor = x.reshape(shape)
    return y


def _mean(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = attributes.get("axes") or (inputs[1].tolist() if len(inputs) > 1 else None)
    y: Tensor = inputs[0].mean(axes, keepdim=bool(attributes.get("keepdims", 1)))
    return y


def _clip(inputs: Inputs, _attributes: Attributes) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i else None for i in (1, 2))
    y: Tensor = inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)
    return y


def _axes(inputs: Inputs, attributes: Attributes) -> list[int]:
    return list(inputs[1].tolist() if len(inputs) > 1 else attributes["axes"])


def _squeeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    y: Tensor = inputs[0].squeeze(tuple(_axes(inputs, attributes)))
    return y


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    for axis in sorted(_axes(inputs, attributes)):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[[Inputs, Attributes], Tensor]] = {
    "Add": lambda i, a: i[0] + i[1],
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(list(i), a["axis"]),
    "Conv": _conv,
    "Div": lambda i, a: i[0] / i[1],
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)) if a.get("axis", 1) == 1 else i[0].reshape(
        int(np.prod(i[0].shape[: a["axis"]])), -1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, a: i[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "Identity": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "MatMul": lambda i, a: i[0] @ i[1],
    "MaxPool": _max_pool,
    "Mul": lambda i, a: i[0] * i[1],
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda i, a: F.relu(i[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
    "Slice": _slice,
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": lambda i, a: i[0] - i[1],
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
