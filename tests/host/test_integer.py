"""The integer form computes what the Q/DQ file says: layer by layer to the bit, net by net but for borders of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgeres.architectures import Architecture
from edgeres.artifacts import TensorRange
from edgeres.backends.cpu import EXACT, open_engine
from edgeres.models.resnet import ResNet
from edgeres.quantize import plan, write_int8
from edgeres.quantize.integer import write_integer

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
Quantize = Callable[..., Any]

SIZE = 32
INT8_KERNELS = {"QLinearConv", "MatMulIntegerToFloat"}


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator there are."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def stored(model: onnx.ModelProto) -> set[str]:
    """Return the types of the weights of integer kernels."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    place = {"QLinearConv": 3, "MatMulIntegerToFloat": 1}
    return {
        str(values[node.input[place[node.op_type]]].dtype) for node in model.graph.node if node.op_type in INT8_KERNELS
    }


def second_layer(model: onnx.ModelProto) -> str:
    """Return the type of the second convolution's weights."""
    nodes = [node for node in model.graph.node if node.op_type == "QLinearConv"]
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return str(values[nodes[1].input[3]].dtype)


def run(model: onnx.ModelProto, x: np.ndarray, threads: int | None = None) -> np.ndarray:
    return open_engine(model.SerializeToString(), EXACT, threads)(x)


def sqnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(got.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(float(noise), 1e-30)))


def power_of_two(low: float, high: float, shift: bool = False) -> TensorRange:
    """Return a range whose step is a power of two, so that float32 computes without any rounding."""
    scale = 2.0 ** np.ceil(np.log2(max(-low, high) / (255 if shift else 127)))
    return TensorRange(127 * scale, scale, "minmax", low, high, 1, 0.0, 0.0, None, shift=128 * scale if shift else 0.0)


CONVOLUTIONS = {
    "3x3": ("pads=[1,1,1,1]", 1, (16, 3, 3)),
    "3x3 of few channels": ("pads=[1,1,1,1]", 1, (3, 3, 3)),
    "3x3 with stride": ("pads=[1,1,1,1], strides=[2,2]", 1, (16, 3, 3)),
    "1x1": ("", 1, (24, 1, 1)),
    "1x1 with stride": ("strides=[2,2]", 1, (24, 1, 1)),
    "5x3, dilated, padded on two sides": ("pads=[2,0,0,3], dilations=[1,2]", 1, (17, 5, 3)),
    "7x7 with stride": ("pads=[3,3,3,3], strides=[2,2]", 1, (3, 7, 7)),
    "in groups": ("pads=[1,1,1,1], group=4", 4, (8, 3, 3)),
    "depthwise": ("pads=[1,1,1,1], group=16", 16, (1, 3, 3)),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "may saturate"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "symmetric"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_are_exact_to_the_bit(name: str, shift: bool, safe: bool, graph: Graph, exact: Exact) -> None:
    # Scales are powers of two: float32 computes the Q/DQ file without rounding, and both must agree to the bit.
    rng = np.random.default_rng(0)
    attributes, groups, (depth, height, width) = CONVOLUTIONS[name]
    channels, outputs = depth * groups, 16
    shape = outputs, depth, height, width
    w = rng.integers(-63, 64, shape) if safe else rng.choice([-127, 127], shape)
    w[:, 0, 0, 0] = 127
    if safe and w[0].size > 1:  # its neighbour in what is read
        flat = w.transpose(0, 2, 3, 1).reshape(outputs, -1)
        flat[:, 1] = -1
        w = flat.reshape(outputs, height, width, depth).transpose(0, 3, 1, 2)
    first = rng.choice([-127, 127], (channels, channels, 1, 1))
    weights = {
        "u": (first / 64).astype(np.float32), "a": rng.integers(-64, 64, channels).astype(np.float32),
        "w": (w / 128).astype(np.float32), "b": rng.integers(-64, 64, outputs).astype(np.float32),
        "last": (rng.choice([-127, 127], (4, outputs, 1, 1)) / 128).astype(np.float32),
    }  # fmt: skip
    model = graph(
        f"""net (float[2, {channels}, 9, 8] x) => (float[2, 4, H, W] y) {{
            t = Conv(x, u, a)
            p = Relu(t)
            q = Conv <kernel_shape=[{height},{width}]{", " + attributes if attributes else ""}> (p, w, b)
            r = Relu(q)
            y = Conv(r, last)
        }}""",
        weights,
    )
    x = rng.integers(-127, 128, (2, channels, 9, 8)).astype(np.float32)
    floats = {name: exact(_ending(model, name), x) for name in ("p", "r")}
    ranges = {"x": power_of_two(-127, 127), **{n: power_of_two(0, v.max() * 0.6, shift) for n, v in floats.items()}}
    int8 = write_int8(model, plan(model, {}), ranges)
    integer = write_integer(int8)
    onnx.checker.check_model(integer)
    assert kinds(integer)["QLinearConv"] == 2
    assert kinds(integer)["MatMulIntegerToFloat"] == 1
    assert "Conv" not in kinds(integer)
    if shift and w[0].size > 1:  # of a symmetric grid's bytes none is beyond 127, and all weights are safe
        assert second_layer(integer) == ("int8" if safe else "uint8")
    np.testing.assert_array_equal(run(integer, x), exact(int8, x))


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "full"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "symmetric"])
@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-9], ids=["no weights", "hardly any", "small weights"])
def test_a_channel_that_is_little_but_its_bias_keeps_it(
    small: float, shift: bool, paired: bool, graph: Graph, exact: Exact
) -> None:
    """A pruned channel, or one whose batch norm has a gain of almost 0."""
    rng = np.random.default_rng(2)
    weights = {
        "u": rng.standard_normal((8, 3, 3, 3)).astype(np.float32), "a": rng.standard_normal(8).astype(np.float32),
        "w": rng.standard_normal((8, 8, 3, 3)).astype(np.float32), "b": rng.standard_normal(8).astype(np.float32),
        "last": rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
    }  # fmt: skip
    for layer, bias in (("u", "a"), ("w", "b")):
        weights[layer][:3] *= np.float32(small)
        weights[bias][:3] = (0.4, 4.8, 0.0)
    model = graph(
        """net (float[2, 3, 9, 8] x) => (float[2, 4, 9, 8] y) {
            t = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, u, a)
            p = Relu(t)
            q = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (p, w, b)
            r = Relu(q)
            y = Conv(r, last)
        }""",
        weights,
    )
    x = rng.integers(-127, 128, (2, 3, 9, 8)).astype(np.float32) / 64
    floats = {name: exact(_ending(model, name), x) for name in ("p", "r")}
    ranges = {"x": power_of_two(-2, 1.9), **{n: power_of_two(0, v.max(), shift) for n, v in floats.items()}}
    int8 = write_int8(model, plan(model, {}, paired=paired), ranges)
    integer = write_integer(int8)
    assert sqnr_db(exact(model, x), exact(int8, x)) > 20
    assert sqnr_db(exact(int8, x), run(integer, x)) > 40


def _ending(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Return a model that ends with another tensor."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.output[0].name = tensor
    del result.graph.output[0].type.tensor_type.shape.dim[:]
    result.graph.output[0].type.tensor_type.ClearField("shape")
    return result


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "symmetric"])
def test_a_residual_addition_is_exact_to_the_bit(shift: bool, kernel: int, graph: Graph, exact: Exact) -> None:
    rng = np.random.default_rng(1)
    whole = {n: rng.integers(-60, 61, (8, 8, kernel, kernel)) for n in ("u", "v")}
    for values in whole.values():
        values[:, 0, 0, 0] = 127
    weights = {n: (values / 128).astype(np.float32) for n, values in whole.items()}
    weights["last"] = (rng.choice([-127, 127], (4, 8, 1, 1)) / 128).astype(np.float32)
    pad = kernel // 2
    model = graph(
        f"""net (float[1, 8, 6, 6] x) => (float[1, 4, 6, 6] y) {{
            s = Conv <kernel_shape=[{kernel},{kernel}], pads=[{pad},{pad},{pad},{pad}]> (x, u)
            p = Relu(s)
            t = Conv <kernel_shape=[{kernel},{kernel}], pads=[{pad},{pad},{pad},{pad}]> (p, v)
            z = Add(t, p)
            r = Relu(z)
            y = Conv(r, last)
        }}""",
        weights,
    )
    x = rng.integers(-127, 128, (1, 8, 6, 6)).astype(np.float32)
    tops = {n: float(exact(_ending(model, n), x).max()) for n in ("p", "r")}
    ranges = {"x": power_of_two(-127, 127), **{n: power_of_two(0, 0.7 * top, shift) for n, top in tops.items()}}
    int8 = write_int8(model, plan(model, {}), ranges)
    integer = write_integer(int8)
    assert kinds(integer)["MatMulIntegerToFloat"] == 2
    assert "Conv" not in kinds(integer)
    np.testing.assert_array_equal(run(integer, x), exact(int8, x))


FAMILY = {
    "basic": Architecture("a", "basic", (2, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, ""),
    "bottleneck": Architecture("a", "bottleneck", (2, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, ""),
    "option A": Architecture("a", "basic", (2, 2), (8, 16), "cifar", "A", 10, SIZE, SIZE, ""),
    "plain": Architecture("a", "basic", (2, 1), (8, 16), "cifar", "none", 10, SIZE, SIZE, ""),
    "in groups": Architecture("a", "bottleneck", (2, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, "", 4, 4),
    "depthwise": Architecture("a", "bottleneck", (1, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, "", 8, 1),
    "gated": Architecture("a", "bottleneck", (1, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, "", attention="se"),
}


def member(name: str) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ResNet(FAMILY[name], 10)


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "symmetric"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_family_answers_as_its_file(name: str, shift: bool, quantize: Quantize, exact: Exact) -> None:
    net = quantize(member(name), shift=shift, seed=6)
    integer = write_integer(net.int8)
    onnx.checker.check_model(integer)
    x = np.random.default_rng(9).standard_normal((16, 3, SIZE, SIZE)).astype(np.float32)
    wanted, got = exact(net.int8, x), run(integer, x)
    assert sqnr_db(wanted, got) >= 33
    assert sqnr_db(exact(net.fp32, x), got) >= sqnr_db(exact(net.fp32, x), wanted) - 0.5
    layers = sum(layer.precision == "int8" and layer.op in ("Conv", "Gemm") for layer in net.placement.layers)
    found = kinds(integer)
    assert sum(found.get(kind, 0) for kind in INT8_KERNELS) == layers  # not one of them is left in float
    for threads in (1, 2):
        np.testing.assert_array_equal(run(integer, x, threads), got)
    np.testing.assert_array_equal(run(integer, x[:1]), got[:1])


def test_paired_weights_make_every_layer_signed(quantize: Quantize, exact: Exact) -> None:
    net = quantize(member("bottleneck"), shift=True, seed=6)
    assert "uint8" in stored(write_integer(net.int8))
    paired = write_int8(net.fp32, plan(net.fp32, net.exported.modules, paired=True), net.ranges)
    integer = write_integer(paired)
    assert stored(integer) == {"int8"}
    x = np.random.default_rng(9).standard_normal((8, 3, SIZE, SIZE)).astype(np.float32)
    assert sqnr_db(exact(paired, x), run(integer, x)) >= 33


def test_biases_beside_paired_weights_are_whole_steps(quantize: Quantize) -> None:
    net = quantize(member("plain"), seed=6)
    paired = write_int8(net.fp32, plan(net.fp32, net.exported.modules, paired=True), net.ranges)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in paired.graph.initializer}
    made_by = {node.output[0]: node for node in paired.graph.node}
    counted = 0
    for node in paired.graph.node:
        if node.op_type == "Conv" and len(node.input) > 2:
            scales = [values[made_by[made_by[name].input[0]].input[1]].astype(np.float64) for name in node.input[:2]]
            steps = values[node.input[2]] / (scales[0] * scales[1])
            np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3 + 1e-6 * np.abs(steps).max())
            counted += 1
    assert counted >= 5


def test_what_has_no_integer_form_stays_as_it_is(graph: Graph, exact: Exact) -> None:
    rng = np.random.default_rng(2)
    weights = {n: rng.standard_normal((6, 6, 3, 3)).astype(np.float32) for n in ("u", "v")}
    model = graph(
        """net (float[2, 6, 8, 8] x) => (float[2, 12, 4, 4] y) {
            s = Conv <pads=[1,1,1,1]> (x, u)
            h = HardSwish(s)
            m = AveragePool <kernel_shape=[2,2], strides=[2,2]> (h)
            t = Conv <pads=[1,1,1,1]> (m, v)
            l = LeakyRelu(t)
            y = Concat <axis=1> (l, m)
        }""",
        weights,
    )
    x = rng.standard_normal((2, 6, 8, 8)).astype(np.float32)
    placement = plan(model, {})
    ranges = {name: power_of_two(-4, 4) for name in placement.tensors}
    int8 = write_int8(model, placement, ranges)
    integer = write_integer(int8)
    onnx.checker.check_model(integer)
    assert {"HardSwish", "AveragePool", "LeakyRelu", "Concat"} <= kinds(integer).keys()
    assert kinds(integer)["MatMulIntegerToFloat"] >= 1
    assert sqnr_db(exact(int8, x), run(integer, x)) >= 60


def test_a_net_of_unknown_size_is_exact_too(graph: Graph, exact: Exact) -> None:
    rng = np.random.default_rng(3)
    weights = {
        "u": rng.standard_normal((32, 32, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((32, 32, 3, 3)).astype(np.float32),
    }
    model = graph(
        """net (float[N, 32, H, W] x) => (float[N, 32, H, W] y) {
            s = Conv <pads=[1,1,1,1]> (x, u)
            r = Relu(s)
            y = Conv <pads=[1,1,1,1]> (r, v)
        }""",
        weights,
    )
    ranges = {"x": power_of_two(-4, 4), "r": power_of_two(0, 60)}
    int8 = write_int8(model, plan(model, {}), ranges)
    integer = write_integer(int8)
    assert kinds(integer)["QLinearConv"] == 1
    for size in (5, 12):
        x = rng.standard_normal((1, 32, size, size)).astype(np.float32)
        assert sqnr_db(exact(int8, x), run(integer, x)) >= 40


def test_the_file_itself_is_not_changed(quantize: Quantize) -> None:
    net = quantize(member("plain"), shift=True, seed=6)
    before = net.int8.SerializeToString(deterministic=True)
    first = write_integer(net.int8).SerializeToString(deterministic=True)
    assert net.int8.SerializeToString(deterministic=True) == before
    assert write_integer(net.int8).SerializeToString(deterministic=True) == first
