"""What layers make of a constant: onnxruntime, fed with that constant, is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeres.affine import dequantize, quantize, scale_from_amax
from edgeres.quantize.graph import Graph
from edgeres.quantize.offset import carried, convolved, multiplied, shapes_of, weights_of

Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
Text = Callable[..., onnx.ModelProto]


def convolution(weights: np.ndarray, size: tuple[int, int], **attributes: Any) -> onnx.ModelProto:
    """Return a model of one convolution without bias."""
    channels = weights.shape[1] * attributes.get("group", 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv", **attributes)],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def of_constant(model: onnx.ModelProto, offset: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray | None:
    """Return what our formula says of a convolution's answer to a constant, spread over the whole output."""
    (node,) = model.graph.node
    (weights,) = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return convolved(node, weights, offset, (None, channels, *size))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int], dict[str, Any]]:
    """A convolution of any geometry that ONNX has in two dimensions."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group, outputs = draw(st.integers(1, 4)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    attributes: dict[str, Any] = {
        "group": groups,
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "dilations": draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
    }
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        attributes["pads"] = draw(st.tuples(*[st.integers(0, 4)] * 4))
    else:
        attributes["auto_pad"] = mode
        if mode != "VALID":
            attributes["dilations"] = (1, 1)  # onnxruntime's SAME with dilations differs from the specification's
    size = draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    seed = draw(st.integers(0, 2**32 - 1))
    weights = np.random.default_rng(seed).standard_normal((outputs, per_group, *kernel)).astype(np.float32)
    return weights, size, attributes


@given(convolutions(), st.booleans())
def test_a_convolution_of_a_constant_is_onnxruntimes(exact: Exact, made: Any, per_channel: bool) -> None:
    weights, size, attributes = made
    pads = attributes.get("pads", (0, 0, 0, 0))
    if attributes.get("auto_pad", "").startswith("SAME"):
        assume(all(s >= 1 for s in size))
    else:
        reach = [(k - 1) * d + 1 for k, d in zip(weights.shape[2:], attributes["dilations"], strict=True)]
        assume(all(size[i] + pads[i] + pads[i + 2] >= reach[i] for i in (0, 1)))
    model = convolution(weights, size, **attributes)
    channels = weights.shape[1] * attributes["group"]
    offset = np.array([1.5]) if not per_channel else np.linspace(-1, 2, channels)
    image = np.broadcast_to(offset.reshape(-1, 1, 1), (channels, *size)).astype(np.float32)[np.newaxis]
    wanted = exact(model, image)
    found = of_constant(model, offset, size, channels)
    assert found is not None
    assert found.dtype == np.float64
    bound = 2 * float(np.abs(weights).sum((1, 2, 3)).max())
    np.testing.assert_allclose(np.broadcast_to(found, wanted.shape), wanted, rtol=0, atol=1e-6 * bound)


def test_without_padding_no_size_is_needed_and_with_it_there_is_no_answer() -> None:
    weights = np.ones((2, 3, 3, 3), np.float32)
    plain, padded = (convolution(weights, (5, 5), pads=[p] * 4).graph.node[0] for p in (0, 1))
    offset = np.array([2.0])
    np.testing.assert_array_equal(convolved(plain, weights, offset, ()), np.full((1, 2, 1, 1), 54.0))
    assert convolved(padded, weights, offset, ()) is None
    assert convolved(padded, weights, offset, (None, 3, None, 5)) is None
    found = convolved(padded, weights, offset, (None, 3, 5, 5))
    assert found is not None
    # in a corner four taps of nine see the image, at an edge six
    np.testing.assert_array_equal(found[0, 0, :2, :2], [[24.0, 36.0], [36.0, 54.0]])


def test_sums_are_taken_in_float64() -> None:
    weights = np.full((1, 1 << 16, 1, 1), np.float32(1 / 3))
    weights[0, 0] = 2.0**20
    node = convolution(weights, (1, 1)).graph.node[0]
    found = convolved(node, weights, np.array([1.0]), ())
    assert found is not None
    assert float(found.reshape(())) == float(weights.astype(np.float64).sum())


@pytest.mark.parametrize("op", ["Gemm", "Gemm <transB = 1>", "MatMul"])
@pytest.mark.parametrize("offset", [[1.5], [1.0, -2.0, 0.5, 4.0]])
def test_a_matrix_product_of_a_constant_is_onnxruntimes(
    op: str, offset: list[float], graph: Text, exact: Exact
) -> None:
    k = np.random.default_rng(0).standard_normal((3, 4) if "trans" in op else (4, 3)).astype(np.float32)
    model = graph(f"net (float[N,4] x) => (float[N,3] y) {{ y = {op} (x, k) }}", {"k": k})
    found = multiplied(model.graph.node[0], k, np.array(offset))
    assert found.shape == (1, 3)
    np.testing.assert_allclose(found, exact(model, np.broadcast_to(np.float32(offset), (1, 4)).copy()), rtol=1e-6)


KEPT = {
    "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>": True,
    "GlobalAveragePool": True,
    "AveragePool <kernel_shape = [2, 2], strides = [2, 2]>": True,
    "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>": True,
    "AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>": True,
    "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>": False,
    "AveragePool <kernel_shape = [2, 2], count_include_pad = 1>": True,
    "ReduceMean <axes = [2, 3]>": True,
    "Flatten": True,
    "Transpose <perm = [0, 2, 3, 1]>": True,
    "Identity": True,
    "Relu": False,
    "Sigmoid": False,
    "Neg": False,
    "Softmax": False,
}


@pytest.mark.parametrize("op", KEPT)
def test_what_is_said_to_keep_a_constant_does(op: str, graph: Text, exact: Exact) -> None:
    model = graph(f"net (float[N,4,6,6] x) => (float y) {{ y = {op} (x) }}", valid=False)
    found = carried(Graph(model), model.graph.node[0], np.array(2.5), shapes_of(model))
    assert (found is not None) == KEPT[op]
    if found is not None:
        x = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)
        np.testing.assert_allclose(exact(model, x + np.float32(2.5)), exact(model, x) + found, atol=1e-5)


def test_a_map_is_kept_by_what_changes_nothing_only(graph: Text) -> None:
    text = "net (float[N,4,6,6] x) => (float[N,4,6,6] y) { i = Identity (x) m = MaxPool <kernel_shape = [1, 1]> (i) "
    model = graph(text + "y = Conv (m, w) }", {"w": np.ones((4, 4, 1, 1), np.float32)})
    uneven = np.arange(4 * 36.0).reshape(1, 4, 6, 6)
    identity, pool, conv = model.graph.node
    assert carried(Graph(model), identity, uneven, {}) is uneven
    assert carried(Graph(model), pool, uneven, {}) is None
    assert carried(Graph(model), conv, uneven, {}) is None


def test_weights_are_those_behind_q_and_dq(graph: Text, exact: Exact) -> None:
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    scale = scale_from_amax(np.abs(w).max((1, 2, 3)))
    text = """net (float[N,3,8,8] x) => (float[N,4,6,6] y, float[4,3,3,3] wd) {
        wq = QuantizeLinear <axis = 0> (w, s, z) wd = DequantizeLinear <axis = 0> (wq, s, z) y = Conv (x, wd) }"""
    model = graph(text, {"w": w, "s": scale, "z": np.zeros(4, np.int8)})
    found = weights_of(Graph(model), model.graph.node[2])
    assert found is not None
    np.testing.assert_array_equal(found, dequantize(quantize(w, scale, 0), scale, 0))
    model.graph.output.reverse()
    np.testing.assert_array_equal(found, exact(model, np.zeros((1, 3, 8, 8), np.float32)))
    computed = graph("net (float[N,3,8,8] x, float[4,3,3,3] v) => (float[N,4,6,6] y) { a = Abs (v) y = Conv (x, a) }")
    assert weights_of(Graph(computed), computed.graph.node[1]) is None
