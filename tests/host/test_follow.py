"""A graph followed in torch answers as onnxruntime does, operator by operator, and quantizes each tensor once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from edgeres.affine import channel_amax, dequantize, quantize, scale_from_amax
from edgeres.errors import QuantizationError
from edgeres.quantize.follow import OPERATORS, Follower

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]

IMAGE, ROW = (2, 3, 7, 6), (2, 12)
BIG = np.iinfo(np.int64).max


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


Case = tuple[str, tuple[int, ...], dict[str, np.ndarray], int]


def case(node: str, shape: tuple[int, ...] = IMAGE, opset: int = 17, **constants: np.ndarray) -> Case:
    return node, shape, constants, opset


W = {"w": weights(4, 3, 3, 3), "b": weights(4)}
CASES: dict[str, Case] = {
    "conv": case("Conv (x, w, b)", **W),
    "conv without bias": case("Conv (x, w)", w=W["w"]),
    "conv, pads that differ": case("Conv <pads = [0, 2, 1, 3]> (x, w, b)", **W),
    "conv, strides and dilations": case("Conv <strides = [2, 3], dilations = [2, 1], pads = [1, 1, 2, 0]> (x, w)", **W),
    "conv in groups": case("Conv <group = 3, pads = [1, 1, 1, 1]> (x, w, b)", w=weights(6, 1, 3, 3), b=weights(6)),
    "conv, kernel that is not square": case("Conv <pads = [0, 2, 0, 2]> (x, w)", w=weights(2, 3, 1, 5)),
    "conv, auto_pad that pads nothing": case('Conv <auto_pad = "VALID"> (x, w, b)', **W),
    "gemm": case("Gemm (x, w, b)", ROW, w=weights(12, 5), b=weights(5)),
    "gemm, turned": case("Gemm <transB = 1> (x, w, b)", ROW, w=weights(5, 12), b=weights(1, 5)),
    "gemm, scaled": case("Gemm <alpha = 0.5, beta = -2.0> (x, w, b)", ROW, w=weights(12, 5), b=weights(1)),
    "gemm, input turned": case("Gemm <transA = 1> (x, w)", ROW, w=weights(2, 5)),
    "matmul": case("MatMul (x, w)", ROW, w=weights(12, 5)),
    "matmul of images": case("MatMul (x, w)", w=weights(6, 4)),
    "add": case("Add (x, w)", w=weights(3, 1, 1)),
    "sub": case("Sub (w, x)", w=weights(1, 3, 7, 6)),
    "mul": case("Mul (x, w)", w=weights(1)),
    "div": case("Div (x, w)", w=weights(3, 1, 1)),
    "relu": case("Relu (x)"),
    "dropout": case("Dropout (x)"),
    "dropout, said to be off": case("Dropout (x, w, t)", w=np.float32(0.5), t=np.array(False)),
    "leaky relu": case("LeakyRelu <alpha = 0.3> (x)"),
    "leaky relu, default": case("LeakyRelu (x)"),
    "sigmoid": case("Sigmoid (x)"),
    "hard sigmoid": case("HardSigmoid (x)"),
    "hard sigmoid, slope": case("HardSigmoid <alpha = 0.16666667, beta = 0.4> (x)"),
    "softmax": case("Softmax (x)", ROW),
    "softmax, axis": case("Softmax <axis = 1> (x)"),
    "clip": case("Clip (x, l, h)", l=np.float32(-0.5), h=np.float32(0.7)),
    "clip above": case("Clip (x, , h)", h=np.float32(0.7)),
    "clip below": case("Clip (x, l)", l=np.float32(0)),
    "clip nothing": case("Clip (x)"),
    "identity": case("Identity (x)"),
    "max pool": case("MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"),
    "max pool, pads that differ": case("MaxPool <kernel_shape = [3, 2], pads = [0, 1, 2, 0]> (x)"),
    "max pool, dilations": case("MaxPool <kernel_shape = [3, 2], dilations = [2, 3]> (x)"),
    "max pool, ceil": case("MaxPool <kernel_shape = [2, 3], strides = [2, 2], ceil_mode = 1> (x)"),
    "max pool, ceil and pads": case(
        "MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1], ceil_mode = 1> (x)"
    ),
    "average pool": case("AveragePool <kernel_shape = [2, 3], strides = [2, 1]> (x)"),
    "average pool, zero pads": case("AveragePool <kernel_shape = [2, 2], pads = [0, 0, 0, 0]> (x)"),
    "global average pool": case("GlobalAveragePool (x)"),
    "global average pool of rows": case("GlobalAveragePool (x)", (2, 3, 5)),
    "reduce mean": case("ReduceMean <axes = [2, 3]> (x)"),
    "reduce mean, axes dropped": case("ReduceMean <axes = [-1, -2], keepdims = 0> (x)"),
    "reduce mean of all": case("ReduceMean (x)"),
    "reduce mean, axes an input": case("ReduceMean <keepdims = 0> (x, a)", opset=18, a=ints(2, 3)),
    "reduce mean of nothing": case("ReduceMean <noop_with_empty_axes = 1> (x)", opset=18),
    "flatten": case("Flatten (x)"),
    "flatten all": case("Flatten <axis = 0> (x)"),
    "flatten, axis": case("Flatten <axis = 3> (x)"),
    "flatten, axis from behind": case("Flatten <axis = -2> (x)"),
    "reshape": case("Reshape (x, s)", s=ints(0, -1)),
    "reshape, sizes kept": case("Reshape (x, s)", s=ints(0, 0, 2, -1)),
    "reshape, all named": case("Reshape (x, s)", s=ints(2, 9, 14)),
    "squeeze": case("Squeeze (x, a)", (2, 4, 1, 1), a=ints(2, -1)),
    "squeeze all": case("Squeeze (x)", (2, 1, 4, 1)),
    "squeeze, axes an attribute": case("Squeeze <axes = [2, 3]> (x)", (2, 4, 1, 1), opset=11),
    "unsqueeze": case("Unsqueeze (x, a)", ROW, a=ints(2, 3)),
    "unsqueeze, from behind": case("Unsqueeze (x, a)", ROW, a=ints(-1, -2)),
    "unsqueeze, both ways": case("Unsqueeze (x, a)", ROW, a=ints(-1, 1)),
    "unsqueeze, axes an attribute": case("Unsqueeze <axes = [3, 2]> (x)", ROW, opset=11),
    "slice": case("Slice (x, s, e, a, t)", s=ints(0, 0), e=ints(BIG, BIG), a=ints(2, 3), t=ints(2, 2)),
    "slice, from behind": case("Slice (x, s, e, a)", s=ints(-4, 1), e=ints(-1, -2), a=ints(-1, 1)),
    "slice, ends beyond": case("Slice (x, s, e, a, t)", s=ints(-99, 1), e=ints(99, 99), a=ints(2, 3), t=ints(3, 4)),
    "slice, axes left out": case("Slice (x, s, e)", s=ints(0, 1), e=ints(1, 3)),
    "slice, no axes but steps": case("Slice (x, s, e, , t)", s=ints(0, 0), e=ints(2, 3), t=ints(1, 2)),
    "pad": case("Pad (x, p)", p=ints(0, 2, 0, 0, 0, 3, 0, 0)),
    "pad with a value": case("Pad (x, p, v)", p=ints(0, 0, 1, 2, 0, 0, 3, 4), v=np.float32(-1.5)),
    "pad with less than nothing": case("Pad (x, p)", p=ints(0, 0, -1, 2, 0, 1, 0, -2)),
    "pad nothing": case("Pad (x, p)", p=ints(*[0] * 8)),
    "concat": case("Concat <axis = 1> (x, w, x)", w=weights(2, 2, 7, 6)),
    "batch norm": case(
        "BatchNormalization (x, g, b, m, v)",
        g=weights(3),
        b=weights(3, 1).ravel(),
        m=weights(1, 3)[0],
        v=np.abs(weights(3)) + 0.1,
    ),
    "batch norm, epsilon": case(
        "BatchNormalization <epsilon = 0.5> (x, g, g, g, v)", g=weights(3), v=np.abs(weights(3))
    ),
    "prelu": case("PRelu (x, s)", s=weights(3, 1, 1)),
    "elu": case("Elu <alpha = 0.7> (x)"),
    "erf": case("Erf (x)"),
    "exp": case("Exp (x)"),
    "tanh": case("Tanh (x)"),
    "hard swish": case("HardSwish (x)"),
    "global max pool": case("GlobalMaxPool (x)"),
    "sum": case("Sum (x, w, x)", w=weights(3, 1, 1)),
    "transpose": case("Transpose <perm = [0, 2, 3, 1]> (x)"),
    "transpose, turned round": case("Transpose (x)"),
    "concat, from behind": case("Concat <axis = -1> (x, x)"),
}


def model_of(graph: Graph, found: Case, before: str = "") -> onnx.ModelProto:
    node, shape, constants, opset = found
    return any_shape(graph, f"net (float{list(shape)} x) => (float y) {{ {before} y = {node} }}", constants, opset)


def any_shape(graph: Graph, text: str, constants: dict[str, np.ndarray], opset: int = 17) -> onnx.ModelProto:
    """Return a checked model whose output has the shape that onnx infers: without brackets it would be one number."""
    model = graph(text, constants, opset, valid=False)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def ran(follower: Follower, x: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return follower.run(torch.from_numpy(x), **options)[0].numpy()


@pytest.mark.parametrize("found", CASES.values(), ids=CASES)
def test_an_operator_computes_what_onnxruntime_computes(found: Case, graph: Graph, exact: Exact) -> None:
    model = model_of(graph, found)
    x = np.random.default_rng(1).standard_normal(found[1]).astype(np.float32)
    got, wanted = ran(Follower(model, {}), x), exact(model, x)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_every_operator_is_among_the_cases() -> None:
    assert {node.split(" ")[0] for node, *_ in CASES.values()} == set(OPERATORS)


@pytest.mark.parametrize("size", range(4, 11))
@pytest.mark.parametrize("kernel", [2, 3])
def test_windows_that_reach_over_the_edge(kernel: int, size: int, graph: Graph, exact: Exact) -> None:
    """Rounding up the number of windows is where frameworks differ: the last may lie in the padding alone."""
    for stride in (1, 2, 3):
        for pads in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]):
            node = (
                f"MaxPool <kernel_shape = {[kernel] * 2}, strides = {[stride] * 2}, pads = {pads}, ceil_mode = 1> (x)"
            )
            model = model_of(graph, case(node, (1, 2, size, size)))
            x = np.random.default_rng(size).standard_normal((1, 2, size, size)).astype(np.float32)
            np.testing.assert_array_equal(ran(Follower(model, {}), x), exact(model, x), err_msg=node)


REFUSED = {
    "the operator Cos, Sin": (case("Cos (t)"), "t = Sin (x)"),
    "a Slice backwards": (case("Slice (x, s, e, a, t)", s=ints(-1), e=ints(-BIG), a=ints(3), t=ints(-1)), ""),
    "a Pad by copies": (case('Pad <mode = "edge"> (x, p)', p=ints(*[1] * 8)), ""),
    "a Pad of some axes": (case("Pad (x, p, , a)", opset=18, p=ints(1, 1), a=ints(1)), ""),
    "an AveragePool with padding or ceil_mode": (case("AveragePool <kernel_shape=[2, 2], pads=[1, 1, 1, 1]> (x)"), ""),
    "an AveragePool with dilations": (
        case("AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x)", opset=19),
        "",
    ),
    "a MaxPool with auto_pad": (case('MaxPool <kernel_shape = [2, 2], auto_pad = "SAME_UPPER"> (x)'), ""),
    "a 1-D MaxPool": (case("MaxPool <kernel_shape = [2]> (x)", (2, 3, 9)), ""),
    "a Conv with auto_pad": (case('Conv <auto_pad = "SAME_LOWER"> (x, w)', w=W["w"]), ""),
    "a Dropout in training mode": (case("Dropout (x, w, t)", w=np.float32(0.5), t=np.array(True)), ""),
    "a 1-D Conv": (case("Conv (x, w)", (2, 3, 9), w=weights(4, 3, 2)), ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(what: str, graph: Graph) -> None:
    found, before = REFUSED[what]
    model = model_of(graph, found, before)
    with pytest.raises(QuantizationError, match=f"cannot follow {what}.*--keep-float"):
        ran(Follower(model, {}), np.zeros(found[1], np.float32))


def test_an_unknown_operator_is_refused_before_anything_runs(graph: Graph) -> None:
    model = any_shape(graph, "net (float[N,3,4,4] x) => (float y) { r = Relu (x) y = Sin (r) }", {})
    with pytest.raises(QuantizationError, match=r"cannot follow the operator Sin\. Nothing has to be done"):
        Follower(model, {})


UNKNOWN = {
    "a graph with 2 inputs": "net (float[2,3,7,6] x, float[2,3,7,6] z) => (float[2,3,7,6] y) { y = Add (x, z) }",
    "Add /add, whose inputs nothing makes": "net (float[2,3,7,6] x) => (float[2,3,7,6] y) { y = Add (x, ghost) }",
    "the second output of a Dropout": "net (float[2,3,7,6] x) => (bool[2,3,7,6] m) { y, m = Dropout (x) }",
    "the second output of a MaxPool": "net (float[2,3,7,6] x) => (int64 y) "
    "{ a, b = MaxPool <kernel_shape = [1, 1]> (x) y = Identity (b) }",
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_tensor_that_nothing_makes_is_refused_and_not_waited_for(what: str, graph: Graph) -> None:
    model = graph(UNKNOWN[what], valid=False)
    model.graph.node[0].name = "/add"
    with pytest.raises(QuantizationError, match=f"cannot follow {what}"):
        Follower(model, {}).schedule()


@pytest.mark.parametrize(
    "value",
    [
        {"value_float": 1.5},
        {"value_floats": [1.0, 2.0, -3.0, 0.5, 0.25, 8.0]},
        {"value": numpy_helper.from_array(weights(3, 1, 1))},
    ],
    ids=["one float", "floats", "a tensor"],
)
def test_constants_may_be_nodes(value: dict[str, Any], graph: Graph, exact: Exact) -> None:
    model = graph("net (float[2,3,7,6] x) => (float[2,3,7,6] y) { y = Mul (x, c) }", valid=False)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], "c", **value))
    x = np.random.default_rng(1).standard_normal(IMAGE).astype(np.float32)
    np.testing.assert_array_equal(ran(Follower(model, {}), x), exact(model, x))


def test_whole_numbers_may_be_nodes(graph: Graph, exact: Exact) -> None:
    model = graph("net (float[2,3,7,6] x) => (float[2,126] y) { y = Reshape (x, s) }", valid=False)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["s"], "s", value_ints=[0, -1]))
    x = np.random.default_rng(1).standard_normal(IMAGE).astype(np.float32)
    np.testing.assert_array_equal(ran(Follower(model, {}), x), exact(model, x))
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(helper.make_attribute("value_string", "text"))
    with pytest.raises(QuantizationError, match="cannot follow a Constant of the kind value_string"):
        Follower(model, {})


TWICE = """
net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
    a = Relu (x)
    b = Conv <pads = [1, 1, 1, 1]> (a, w, bias)
    c = Conv (a, v)
    d = Relu (a)
    e = Add (b, c)
    f = Concat <axis = 1> (d, d)
    g = Conv (f, u)
    y = Add (e, g)
}"""


@pytest.fixture
def twice(graph: Graph) -> onnx.ModelProto:
    return graph(
        TWICE, {"w": weights(4, 3, 3, 3), "bias": weights(4), "v": weights(4, 3, 1, 1), "u": weights(4, 6, 1, 1)}
    )


def named(model: onnx.ModelProto) -> dict[str, str]:
    """Return the name of the node that makes each tensor."""
    return {node.output[0]: node.name for node in model.graph.node}


def test_each_tensor_is_quantized_once_and_where_it_is_not_quantized_read_as_it_is(
    twice: onnx.ModelProto, exact: Exact
) -> None:
    names, asked = named(twice), []

    def quantizer(tensor: str, value: Tensor) -> Tensor:
        asked.append(tensor)
        return torch.round(value)

    points = {(names["b"], 0): "a", (names["c"], 0): "a", (names["f"], 1): "d"}
    x = np.random.default_rng(2).standard_normal((3, 3, 8, 8)).astype(np.float32)
    got = ran(Follower(twice, points), x, quantizer=quantizer)
    assert sorted(asked) == ["a", "d"]
    by_hand = onnx.ModelProto()
    by_hand.CopyFrom(twice)
    nodes = {node.output[0]: node for node in by_hand.graph.node}
    nodes["b"].input[0] = nodes["c"].input[0] = "a rounded"
    nodes["f"].input[1] = "d rounded"
    for place, tensor in ((4, "d"), (1, "a")):
        by_hand.graph.node.insert(place, helper.make_node("Round", [tensor], [f"{tensor} rounded"]))
    np.testing.assert_allclose(got, exact(by_hand, x), rtol=1e-5, atol=1e-5)
    assert np.abs(got - exact(twice, x)).max() > 0.1


def test_tensors_are_kept_and_constants_replaced(twice: onnx.ModelProto, exact: Exact) -> None:
    x = np.random.default_rng(2).standard_normal((3, 3, 8, 8)).astype(np.float32)
    follower = Follower(twice, {})
    with torch.no_grad():
        y, kept = follower.run(torch.from_numpy(x), ["x", "a", "y"])
        doubled, _ = follower.run(torch.from_numpy(x), constants={"w": 2 * follower.constants["w"]})
    assert list(kept) == ["x", "a", "y"]
    np.testing.assert_array_equal(kept["a"].numpy(), np.maximum(x, 0))
    assert kept["y"] is y
    for tensor in twice.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), "w"))
    np.testing.assert_allclose(doubled.numpy(), exact(twice, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
def test_a_net_is_followed_in_float_and_in_int8(
    name: str, net: Callable[[str], Any], followed: Callable[..., Any], exact: Exact
) -> None:
    found = net(name)
    follower = followed(found.fp32).follower
    x = np.random.default_rng(8).standard_normal((16, 3, 32, 32)).astype(np.float32)
    wanted = exact(found.fp32, x)
    np.testing.assert_allclose(ran(follower, x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    ranges = {point.tensor: found.ranges[point.range_of] for point in found.placement.points}

    def quantizer(tensor: str, value: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(value, ranges[tensor].scale, 0, -128, 127)

    constants = {}
    for weight in found.placement.weights:
        values = follower.constants[weight.tensor].numpy()
        scale = scale_from_amax(channel_amax(values, weight.axis))
        constants[weight.tensor] = torch.from_numpy(
            dequantize(quantize(values, scale, weight.axis), scale, weight.axis)
        )
    got, int8 = ran(follower, x, quantizer=quantizer, constants=constants), exact(found.int8, x)
    # A sum beside a rounding border may fall to its other side; but on most images none does, and all digits agree.
    off = np.abs(got - int8).max(1)
    assert (off < 1e-5 * np.abs(int8).max()).mean() >= 0.5
    assert np.square(off).mean() < 0.3 * np.square(int8 - wanted).max(1).mean()


def test_gradients_are_those_of_finite_differences(graph: Graph) -> None:
    text = """net (float[N,3,6,6] x) => (float[N,4] y) {
        c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
        s = Sigmoid (c)
        m = Mul (c, s)
        p = GlobalAveragePool (m)
        y = Flatten (p) }"""
    follower = Follower(graph(text, W), {})
    follower.constants = {name: value.double() for name, value in follower.constants.items()}
    x = torch.randn((2, 3, 6, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: follower.run(x)[0], x)


def test_channels_are_counted_where_there_are_any(graph: Graph) -> None:
    text = """net (float[N,3,8,4] x) => (float[N,6] y) {
        c = Conv (x, w)
        p = GlobalAveragePool (c)
        f = Flatten (p)
        mixed = Reshape (x, rows)
        one = Reshape (x, whole)
        three = ReduceMean <axes = [2], keepdims = 0> (x)
        y = Gemm (f, k) }"""
    constants = {"w": weights(5, 3, 1, 1), "k": weights(5, 6), "rows": ints(-1, 3), "whole": ints(-1)}
    channels = Follower(graph(text, constants), {}).channels((8, 4))
    assert channels == {"x": 3, "c": 5, "p": 5, "f": 5, "y": 6}


def orders(nodes: list[onnx.NodeProto], have: set[str]) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Return each node with all those that could have run in its place; fail where it could not itself."""
    found, have = [], set(have)
    for i, node in enumerate(nodes):
        assert have.issuperset(node.input), node.name
        found.append((node, [other for other in nodes[i:] if have.issuperset(other.input)]))
        have.update(node.output)
    return found


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
def test_layers_are_scheduled_last(name: str, net: Callable[[str], Any]) -> None:
    follower = Follower(net(name).fp32, {})
    weighted = ("Conv", "Gemm", "MatMul")
    order = follower.schedule()
    assert sorted(node.name for node in order) == sorted(node.name for node in follower.nodes)
    for node, possible in orders(order, {follower.input, "", *follower.constants}):
        if node.op_type in weighted:
            assert all(other.op_type in weighted for other in possible)


def test_a_skip_is_there_before_its_branch_ends(graph: Graph) -> None:
    """A branch's last layer can make up for what its skip lost only if that is known by then."""
    text = """net (float[N,3,8,8] x) => (float[N,3,8,8] y) {
        branch = Conv (x, w)
        skip = Relu (x)
        y = Add (branch, skip) }"""
    follower = Follower(graph(text, {"w": weights(3, 3, 1, 1)}), {})
    assert [node.output[0] for node in follower.schedule()] == ["skip", "branch", "y"]
