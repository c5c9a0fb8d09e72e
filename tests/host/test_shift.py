"""A shifted graph computes what uint8 with zero point 0 computes: onnxruntime's own uint8 is the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeres.affine import SHIFTED, SYMMETRIC, scale_from_amax, shift_from_scale
from edgeres.artifacts import TensorRange
from edgeres.calibrate import choose, observe
from edgeres.errors import QuantizationError
from edgeres.export.fold import name_nodes
from edgeres.quantize import Placement, int8_content, lint, plan, shiftable, write_int8
from edgeres.quantize.describe import describe_file
from edgeres.quantize.graph import Graph
from edgeres.quantize.offset import shifts_of
from edgeres.quantize.shift import write_shifted

Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
Text = Callable[..., onnx.ModelProto]
NETS = ("cifar", "basic", "bottleneck")
SIZE = 12


def range_of(amax: float, shifted: bool) -> TensorRange:
    scale = scale_from_amax(np.float64(amax), SHIFTED if shifted else SYMMETRIC)
    shift = float(shift_from_scale(scale)) if shifted else 0.0
    return TensorRange(amax, float(scale), "minmax", 0.0 if shifted else -amax, amax, 1, 0.0, 0.0, None, shift)


def unsigned(model: onnx.ModelProto, placement: Placement, ranges: Mapping[str, TensorRange]) -> onnx.ModelProto:
    """Return the Q/DQ model in which each tensor that has a shift is uint8 with zero point 0, and the same scale."""
    plain = {name: msgspec.structs.replace(value, shift=0.0) for name, value in ranges.items()}
    result = write_int8(model, placement, plain)
    shifted = {point.tensor for point in placement.points if ranges[point.range_of].shift}
    quantizers = [node for node in result.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in shifted]
    assert len(quantizers) == len(shifted) > 0
    zero_points = {node.input[2] for node in quantizers}
    for tensor in result.graph.initializer:
        if tensor.name in zero_points:
            tensor.CopyFrom(numpy_helper.from_array(np.uint8(0), tensor.name))
    return result


def _net(graph: Text, body: str) -> onnx.ModelProto:
    """Return the model of a body that makes y of x, with 8 channels; weights are those that it names."""
    text = f"net (float[N,8,{SIZE},{SIZE}] x) => (float y) {{ {body} }}"
    model = graph(text, weights_for(body), valid=False)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)
    del inferred.graph.value_info[:]
    return inferred


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def relu_images(channels: int, scale: float, seed: int = 0) -> np.ndarray:
    """Return images whose ReLU lies on all 256 steps of a grid, below them and above, and near no rounding border."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-40, 270, (3, channels, SIZE, SIZE)) + rng.uniform(-0.3, 0.3, (3, channels, SIZE, SIZE))
    return (steps * scale).astype(np.float32)


# What reads the tensor r, which is shifted; y is the network's output. Names of weights say their shape.
READERS = {
    "1x1": "y = Conv (r, w8_8_1_1, b8)",
    "1x1 without bias": "y = Conv (r, w8_8_1_1)",
    "1x1 stride 2": "y = Conv <strides = [2, 2]> (r, w8_8_1_1, b8)",
    "3x3": "y = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8)",
    "3x3 without bias": "y = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3)",
    "3x3 unpadded": "y = Conv (r, w8_8_3_3, b8)",
    "3x3 stride 2": "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w8_8_3_3, b8)",
    "7x7 stem": "y = Conv <pads = [3, 3, 3, 3], strides = [2, 2]> (r, w4_8_7_7, b4)",
    "asymmetric": "y = Conv <pads = [0, 1, 2, 3], strides = [1, 2]> (r, w8_8_3_3, b8)",
    "dilated": "y = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (r, w8_8_3_3, b8)",
    "grouped": "y = Conv <pads = [1, 1, 1, 1], group = 4> (r, w8_2_3_3, b8)",
    "depthwise": "y = Conv <pads = [1, 1, 1, 1], group = 8> (r, w8_1_3_3, b8)",
    "same upper": 'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, w8_8_3_3, b8)',
    "same lower": 'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (r, w8_8_3_3, b8)',
    "two convolutions": "c = Conv (r, w8_8_1_1, b8) d = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8) y = Add (c, d)",
    "Gemm": "f = Flatten (r) y = Gemm (f, w1152_5, b5)",
    "Gemm transposed": "f = Flatten (r) y = Gemm <transB = 1> (f, w5_1152, b5)",
    "Gemm with beta": "f = Flatten (r) y = Gemm <beta = 0.5> (f, w1152_5, b5)",
    "Gemm without bias": "f = Flatten (r) y = Gemm (f, w1152_5)",
    "MatMul": "f = Flatten (r) y = MatMul (f, w1152_5)",
    "global pool": "g = GlobalAveragePool (r) f = Flatten (g) y = Gemm <transB = 1> (f, w5_8, b5)",
    "mean": "g = ReduceMean <axes = [2, 3], keepdims = 0> (r) y = Gemm <transB = 1> (g, w5_8, b5)",
    "average pool": "g = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r) y = Conv (g, w8_8_1_1, b8)",
    "padded pool": "g = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) y = Conv (g, w8_8_1_1, b8)",
    "maximum": "m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) y = Conv (m, w8_8_1_1, b8)",
    "identity skip": "c = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8) y = Add (c, r)",
    "identity skip, turned": "c = Conv (r, w8_8_1_1, b8) y = Add (r, c)",
    "projected skip": "c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w8_8_3_3, b8)"
    " d = Conv <strides = [2, 2]> (r, w8_8_1_1, b8) y = Add (c, d)",
    "padded skip": "c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w16_8_3_3, b16)"
    " s = Slice (r, starts, ends, axes, steps) p = Pad (s, pads) y = Add (c, p)",
    "padded skip with a value": "c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w16_8_3_3, b16)"
    " s = Slice (r, starts, ends, axes, steps) p = Pad (s, pads, nought) y = Add (c, p)",
    "gated branch": "c = Conv (r, w8_8_1_1, b8) h = Sigmoid (c) m = Mul (c, h) y = Add (m, r)",
    "pair of additions": "c = Conv (r, w8_8_1_1, b8) a = Add (c, b1_8_1_1) y = Add (a, r)",
    "a ReLU behind": "c = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8) y = Relu (c)",
    "a batch norm behind": "c = Conv (r, w8_8_1_1, b8) y = BatchNormalization (c, b8, b8, b8, v8)",
    "no ReLU between": "c = Conv (r, w8_8_1_1, b8) y = Conv <pads = [1, 1, 1, 1]> (c, w8_8_3_3, b8)",
    "read in float too": "c = Conv (r, w8_8_1_1, b8) n = Neg (r) y = Add (c, n)",
    "shape too": "c = Conv (r, w8_8_1_1, b8) h = Shape (r) y = Reshape (c, h)",
}
# What makes r of x: the shift is added behind the ReLU, or joins the convolution's bias, or the map behind it.
MAKERS = {
    "a ReLU": "r = Relu (x)",
    "a Clip": "r = Clip (x, nought)",
    "a convolution": "i = Conv (x, eye, c8) r = Relu (i)",
    "a padded convolution": "q = Relu (x) i = Conv <pads = [1, 1, 1, 1]> (q, eye3, c8) r = Relu (i)",
    "a pool": "i = Conv (x, eye, c8) j = Relu (i) r = MaxPool <kernel_shape = [1, 1]> (j)",
}


def weights_for(text: str) -> dict[str, np.ndarray]:
    """Return the initializers that a text names: ``w8_8_1_1`` is float32 (8, 8, 1, 1); ``v8`` is positive."""
    rng = np.random.default_rng(5)
    fixed = {
        "starts": np.array([0, 0]),
        "ends": np.array([1 << 30, 1 << 30]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
        "nought": np.float32(0),
        "eye": np.eye(8, dtype=np.float32)[:, :, np.newaxis, np.newaxis],
        "eye3": np.pad(np.eye(8, dtype=np.float32)[:, :, np.newaxis, np.newaxis], ((0, 0), (0, 0), (1, 1), (1, 1))),
        "c8": np.zeros(8, np.float32),
    }
    found: dict[str, np.ndarray] = {}
    for word in text.replace("(", " ").replace(")", " ").replace(",", " ").split():
        if word in fixed:
            found[word] = np.asarray(fixed[word])
        elif word[0] in "wbv" and word[1:].replace("_", "").isdigit():
            values = rng.standard_normal([int(n) for n in word[1:].split("_")]).astype(np.float32)
            found[word] = np.abs(values) + np.float32(0.5) if word[0] == "v" else values
    return found


def quantized(model: onnx.ModelProto, scale: float) -> tuple[Placement, dict[str, TensorRange]]:
    """Return the plan of a small graph, and ranges that shift all that may be, on the grid of :func:`relu_images`.

    Averages lie between its steps, on others: their grid has no border in common with these.
    """
    placement = plan(model, {})
    allowed = shiftable(model, placement)
    steps = dict.fromkeys(placement.tensors, 255.0)
    steps["x"] = 127 / 3
    for node in model.graph.node:
        if node.op_type in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
            steps.update(dict.fromkeys(("g", "f"), 121.7))
    return placement, {name: range_of(steps[name] * scale, name in allowed) for name in placement.tensors}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_gets_what_uint8_would_give_it(reader: str, maker: str, graph: Text, exact: Exact) -> None:
    model, scale = _net(graph, f"{MAKERS[maker]} {READERS[reader]}"), 0.03
    placement, ranges = quantized(model, scale)
    assert any(value.shift for value in ranges.values())
    shifted, wanted = write_int8(model, placement, ranges), unsigned(model, placement, ranges)
    assert lint(shifted) == lint(shifted, (), model) == []
    x = relu_images(8, scale)
    got, expected = exact(shifted, x), exact(wanted, x)
    assert got.shape == expected.shape
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * size)
    assert np.abs(exact(model, x) - expected).max() > 1e-3 * size  # there is something to get wrong


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any], bool]:
    """The shape of a convolution's weights, its geometry, and whether it has a bias."""
    groups = draw(st.sampled_from([1, 2, 8]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    attributes = {
        "group": groups,
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "dilations": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "pads": draw(st.tuples(*[st.integers(0, 3)] * 4)),
    }
    return (groups * draw(st.integers(1, 2)), 8 // groups, *kernel), attributes, draw(st.booleans())


@given(convolutions(), st.integers(0, 2**32 - 1))
def test_any_convolution_gets_what_uint8_would_give_it(exact: Exact, made: Any, seed: int) -> None:
    shape, attributes, biased = made
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal(shape), "b": rng.standard_normal(shape[0])}
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Conv", ["r", "w", *["b"] * biased], ["y"], **attributes),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "k", "p", "q"])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    name_nodes(model)
    placement, ranges = quantized(model, 0.02)
    x = relu_images(8, 0.02, seed)
    expected = exact(unsigned(model, placement, ranges), x)
    got = exact(write_int8(model, placement, ranges), x)
    largest = 255 * 0.02 * float(np.abs(weights["w"]).sum((1, 2, 3)).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * largest)


def test_without_a_shift_nothing_changes(net: Callable[[str], Any]) -> None:
    found = net("cifar")
    assert not any(value.shift for value in found.ranges.values())
    assert shifts_of(found.int8) == {}
    assert operators(found.int8)["Relu"] == operators(found.fp32)["Relu"]


@pytest.mark.parametrize("name", NETS)
def test_whole_nets_compute_what_uint8_computes(name: str, shifted: Callable[[str], Any], exact: Exact) -> None:
    found = shifted(name)
    x = np.random.default_rng(8).standard_normal((16, 3, 32, 32)).astype(np.float32)
    wanted = exact(unsigned(found.fp32, found.placement, found.ranges), x).astype(np.float64)
    got = exact(found.int8, x)
    # A sum beside a rounding border may fall to its other side; but on most images none does, and all digits agree.
    off = np.abs(got - wanted).max(1)
    assert (off < 1e-5 * np.abs(wanted).max()).mean() >= 0.5
    assert np.square(off).mean() < 0.3 * np.square(got - exact(found.fp32, x)).max(1).mean()


@pytest.mark.parametrize("name", NETS)
def test_the_shift_costs_no_layer(name: str, shifted: Callable[[str], Any]) -> None:
    found = shifted(name)
    before, after = operators(found.fp32), operators(found.int8)
    assert after["Relu"] == 0 < before["Relu"]
    padded = [n for n in found.fp32.graph.node if n.op_type == "Conv" and any(_pads(n))]
    first = sum("input" in node.input for node in padded)
    # one map for each padded convolution behind a shifted tensor, and one constant behind the pool
    assert after["Add"] - before["Add"] == len(padded) - first + 1
    for op in before.keys() - {"Relu", "Add"}:
        assert after[op] == before[op]
    constants = {tensor.name: tuple(tensor.dims) for tensor in found.int8.graph.initializer}
    shapes = [
        constants[name] for n in found.int8.graph.node if n.op_type == "Add" for name in n.input if name in constants
    ]
    assert all(len(shape) in (0, 4) and shape[:1] in ((), (1,)) for shape in shapes)
    assert len(shifts_of(found.int8)) == sum(found.ranges[p.range_of].shift > 0 for p in found.placement.points)
    assert list(found.int8.graph.input) == list(found.fp32.graph.input)
    assert list(found.int8.graph.output) == list(found.fp32.graph.output)


def _pads(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "pads"), [])


@pytest.mark.parametrize("name", NETS)
def test_any_batch_size_runs(name: str, shifted: Callable[[str], Any], exact: Exact) -> None:
    x = np.random.default_rng(9).standard_normal((5, 3, 32, 32)).astype(np.float32)
    whole = exact(shifted(name).int8, x)
    parts = np.concatenate([exact(shifted(name).int8, x[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5 * float(np.abs(whole).max()))


def test_the_input_model_is_left_alone_and_writing_repeats(shifted: Callable[[str], Any]) -> None:
    found = shifted("bottleneck")
    before = found.fp32.SerializeToString(deterministic=True)
    again = write_int8(found.fp32, found.placement, found.ranges)
    assert found.fp32.SerializeToString(deterministic=True) == before
    assert again.SerializeToString(deterministic=True) == found.int8.SerializeToString(deterministic=True)


@pytest.mark.parametrize("keep", [["fc"], ["layer1"], ["layer2.0.conv2"], ["layer2.0.conv1"], ["conv1", "avgpool"]])
@pytest.mark.parametrize("name", NETS)
def test_nets_that_are_partly_float_compute_what_uint8_computes(
    name: str, keep: list[str], net: Callable[[str], Any], exact: Exact, tmp_path: Path
) -> None:
    found = net(name)
    placement = plan(found.fp32, found.exported.modules, keep)
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(found.exported.content)
    x = np.random.default_rng(3).standard_normal((8, 3, 32, 32)).astype(np.float32)
    ranges = choose(observe(path, placement.tensors, [x]), "minmax", 99.99, shiftable(found.fp32, placement))
    wanted = exact(unsigned(found.fp32, placement, ranges), x)
    off = np.abs(exact(write_int8(found.fp32, placement, ranges), x) - wanted).max(1)
    assert (off < 1e-5 * np.abs(wanted).max()).mean() >= 0.5


def test_a_tensor_that_is_also_read_in_float_keeps_its_relu(graph: Text) -> None:
    model = _net(graph, "c = Conv (x, w8_8_1_1, b8) r = Relu (c) d = Conv (r, w8_8_1_1, b8) n = Neg (r) y = Add (d, n)")
    placement, ranges = quantized(model, 0.03)
    written = write_int8(model, placement, ranges)
    assert operators(written)["Relu"] == 1
    index = Graph(written)
    (added,) = [node for node in index.readers("r") if node.op_type == "Add"]
    constant = index.constant(added.input[1])
    assert constant is not None
    assert constant.shape == ()
    assert constant == np.float32(-128) * np.float32(ranges["r"].scale)
    assert [reader.op_type for reader in index.readers(added.output[0])] == ["QuantizeLinear"]


def test_an_output_of_the_network_is_its_true_value(graph: Text, exact: Exact) -> None:
    body = "c = Conv (x, w8_8_1_1, b8) r = Relu (c) d = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8) y = Add (d, r)"
    model = _net(graph, body)
    for name in ("r", "d"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, SIZE, SIZE]))
    placement, ranges = quantized(model, 0.03)
    x = relu_images(8, 0.03)
    for turn in range(3):
        written, wanted = write_int8(model, placement, ranges), unsigned(model, placement, ranges)
        np.testing.assert_allclose(exact(written, x), exact(wanted, x), rtol=0, atol=1e-3 if turn else 1e-4)
        model.graph.output.append(model.graph.output.pop(0))


SYMMETRIC_STILL = {
    "of any size": ("[N,8,H,W]", "r = Relu (x) y = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3)", set()),
    "of any size, unpadded": ("[N,8,H,W]", "r = Relu (x) y = Conv (r, w8_8_3_3)", {"r"}),
    "of any height": ("[N,8,H,12]", "r = Relu (x) y = Conv <pads = [0, 1, 0, 1]> (r, w8_8_3_3)", {"r"}),
    "of any width": ("[N,8,12,W]", "r = Relu (x) y = Conv <pads = [0, 1, 0, 1]> (r, w8_8_3_3)", set()),
    "signed": ("[N,8,12,12]", "r = Conv (x, w8_8_1_1) y = Conv (r, w8_8_1_1)", set()),
    "leaky": ("[N,8,12,12]", "r = LeakyRelu (x) y = Conv (r, w8_8_1_1)", set()),
    "clipped below": ("[N,8,12,12]", "r = Clip (x, low) y = Conv (r, w8_8_1_1)", set()),
    "clipped at zero": ("[N,8,12,12]", "r = Clip (x, nought) y = Conv (r, w8_8_1_1)", {"r"}),
    "ReLU6": ("[N,8,12,12]", "r = Clip (x, nought, six) y = Conv (r, w8_8_1_1)", {"r"}),
    "sigmoid": ("[N,8,12,12]", "r = Sigmoid (x) y = Conv (r, w8_8_1_1)", {"r"}),
    "gated": ("[N,8,12,12]", "a = Relu (x) g = Sigmoid (x) r = Mul (a, g) y = Conv (r, w8_8_1_1)", {"r"}),
    "gated, signed": ("[N,8,12,12]", "g = Sigmoid (x) r = Mul (x, g) y = Conv (r, w8_8_1_1)", set()),
    "joined": ("[N,8,12,12]", "a = Relu (x) g = Abs (x) r = Concat <axis = 1> (a, g) y = Conv (r, w8_16_1_1)", set()),
    "joined ReLUs": ("[N,8,12,12]", "a = Relu (x) r = Concat <axis = 1> (a, a) y = Conv (r, w8_16_1_1)", {"r"}),
    "padded with a negative": ("[N,8,12,12]", "a = Relu (x) r = Pad (a, pads, low) y = Conv (r, w8_16_1_1)", set()),
    "counting the border": (
        "[N,8,12,12]",
        "r = Relu (x) g = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (r) "
        "y = Conv (g, w8_8_1_1)",
        {"g"},
    ),
    "a reader that cannot": (
        "[N,8,H,W]",
        "r = Relu (x) c = Conv (r, w8_8_1_1) d = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3) y = Add (c, d)",
        set(),
    ),
}


@pytest.mark.parametrize("case", SYMMETRIC_STILL)
def test_what_may_be_shifted(case: str, graph: Text) -> None:
    shape, body, wanted = SYMMETRIC_STILL[case]
    weights = {**weights_for(body), "low": np.float32(-0.5), "six": np.float32(6)}
    used = {name: values for name, values in weights.items() if name in body}
    model = graph(f"net (float{shape} x) => (float[N,8,P,Q] y) {{ {body} }}", used, valid=False)
    assert shiftable(model, plan(model, {})) == wanted


STEM = "c = Conv <pads = [1, 1, 1, 1]> (x, w8_8_3_3) r = Relu (c) "
FREE = {
    "basic": (
        STEM + "d = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3) "
        "s = Relu (d) e = Conv <pads = [1, 1, 1, 1]> (s, v8_8_3_3) f = Add (e, r) y = Relu (f)",
        {"r"},
        1,
    ),
    "bottleneck": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) "
        "e = Conv <pads = [1, 1, 1, 1]> (s, v8_8_3_3) t = Relu (e) f = Conv (t, v8_8_1_1) g = Add (f, r) u = Relu (g) "
        "y = Conv (u, b8_8_1_1)",
        {"r", "t", "u"},
        0,
    ),
    "pooled": (
        STEM + "p = MaxPool <kernel_shape = [2, 2]> (r) "
        "d = Conv <pads = [1, 1, 1, 1]> (p, v8_8_3_3) s = Relu (d) q = MaxPool <kernel_shape = [2, 2]> (s) "
        "y = Conv <pads = [1, 1, 1, 1]> (q, b8_8_3_3)",
        {"p"},
        1,
    ),
    "pooled all over": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) p = GlobalAveragePool (s) q = Flatten (p) "
        "y = Gemm <transB = 1> (q, w10_8)",
        {"r", "s", "q"},
        0,  # of equal ranges; of others one constant for each channel
    ),
    "pooled in part": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) p = AveragePool <kernel_shape = [2, 2]> (s) y = Conv (p, v8_8_1_1)",
        {"r"},
        0,
    ),
    "two readers, one padded": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) e = Conv (s, v8_8_1_1) "
        "f = Conv <pads = [1, 1, 1, 1]> (s, v8_8_3_3) y = Add (e, f)",
        {"r"},
        0,
    ),
    "read in float too": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) e = Conv (s, v8_8_1_1) f = Neg (s) y = Mul (e, f)",
        {"r"},
        0,
    ),
    "before its ReLU too": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) e = Conv (s, v8_8_1_1) f = Neg (d) y = Mul (e, f)",
        {"r"},
        0,
    ),
    "ReLU6": (STEM + "d = Conv (r, w8_8_1_1) s = Clip (d, nought, six) y = Conv (s, v8_8_1_1)", {"r"}, 0),
    "joined": (
        STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) e = Conv (r, w8_8_1_1) t = Relu (e) "
        "u = Concat <axis = 1> (s, t) y = Conv (u, v8_16_1_1)",
        {"r"},
        0,
    ),
    "gated": (
        STEM
        + "d = Conv (r, w8_8_1_1) g = Sigmoid (d) h = Mul (d, g) a = Add (h, r) s = Relu (a) y = Conv (s, v8_8_1_1)",
        set(),
        0,
    ),
    "the output": (STEM + "d = Conv (r, w8_8_1_1) y = Relu (d) z = Conv (y, v8_8_1_1)", {"r"}, 0),
}


@pytest.mark.parametrize("case", FREE)
def test_what_comes_for_nothing(case: str, graph: Text) -> None:
    """Biases in front and behind take it. Nothing is added to any image but a map behind the first convolution's
    output, and each ReLU in front goes."""
    body, wanted, added = FREE[case]
    weights = {**weights_for(body), "nought": np.float32(0), "six": np.float32(6)}
    used = {name: values for name, values in weights.items() if name in body}
    shape = "N,10" if "Gemm" in body else "N,8,P,Q"
    model = graph(f"net (float[N,8,12,12] x) => (float[{shape}] y) {{ {body} }}", used, valid=False)
    placement = plan(model, {})
    assert shiftable(model, placement, free=True) == wanted
    assert wanted <= shiftable(model, placement)
    plain, free = (
        operators(write_int8(model, placement, {name: range_of(4.0, name in found) for name in placement.tensors}))
        for found in (frozenset(), wanted)
    )
    assert free["Add"] == plain["Add"] + added
    assert free["Relu"] == plain["Relu"] - len(wanted - {"q"})
    for name in placement.tensors if added == 0 else ():  # and no other would come so
        if name in shiftable(model, placement) - wanted:
            more = write_int8(model, placement, {n: range_of(4.0, n in {*wanted, name}) for n in placement.tensors})
            assert operators(more)["Add"] > free["Add"]


def test_behind_a_layer_in_float_nothing_is_shifted_for_nothing(graph: Text) -> None:
    body = STEM + "d = Conv (r, w8_8_1_1) s = Relu (d) y = Conv (s, v8_8_1_1)"
    model = graph(f"net (float[N,8,12,12] x) => (float[N,8,P,Q] y) {{ {body} }}", weights_for(body), valid=False)
    assert shiftable(model, plan(model, {}), free=True) == {"r", "s"}
    names = {node.output[0]: node.name for node in model.graph.node}
    assert shiftable(model, plan(model, {}, [names["d"]]), free=True) == set()
    assert shiftable(model, plan(model, {}, [names["c"]]), free=True) == {"s"}


@pytest.mark.parametrize("offset", [[0.5, -0.25, 2.0], [0.0, 0.0, 1.0]])
def test_a_shift_per_channel_is_given_back_too(offset: list[float], graph: Text, exact: Exact) -> None:
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    per_channel = np.array(offset).reshape(1, 3, 1, 1)
    text = """net (float[N,3,8,8] x) => (float[N,4,4,4] y) {{
        {before} xq = QuantizeLinear ({x}, s, z) xd = DequantizeLinear (xq, s, z) {behind}
        wq = QuantizeLinear <axis = 0> (w, s4, z4) wd = DequantizeLinear <axis = 0> (wq, s4, z4)
        c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> ({d}, wd) y = Relu (c) }}"""
    weights = {"w": w, "s": np.float32(0.02), "z": np.int8(0), "s4": np.full(4, 0.03, np.float32)}
    weights["z4"] = np.zeros(4, np.int8)
    model = graph(text.format(before="", x="x", behind="", d="xd"), weights)
    explicit = text.format(before="a = Sub (x, o)", x="a", behind="b = Add (xd, o)", d="b")
    wanted = graph(explicit, {**weights, "o": per_channel.astype(np.float32)})
    written = write_shifted(model, {"x": per_channel})
    onnx.checker.check_model(written, full_check=True)
    x = np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(exact(written, x), exact(wanted, x), rtol=0, atol=1e-5)
    assert np.abs(exact(written, x) - exact(model, x)).max() > 1e-3


def test_names_that_are_taken_are_not_taken_twice(graph: Text, exact: Exact) -> None:
    body = "r = Relu (x) r_shifted = Neg (r) c = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8) y = Add (c, r_shifted)"
    model = _net(graph, body)
    model.graph.node[2].name = "r_Shift"
    placement, ranges = quantized(model, 0.03)
    written = write_int8(model, placement, ranges)
    x = relu_images(8, 0.03)
    np.testing.assert_allclose(exact(written, x), exact(unsigned(model, placement, ranges), x), rtol=0, atol=1e-4)


def test_what_float32_cannot_hold_is_refused(graph: Text) -> None:
    model = _net(graph, "r = Relu (x) y = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8)")
    placement, _ = quantized(model, 1.0)
    with pytest.raises(QuantizationError, match=r"beyond float32 once shifted.*--activation-range symmetric"):
        write_int8(model, placement, {"r": range_of(3e38, True)})


def test_weights_on_a_grid_of_their_own_keep_it(graph: Text, exact: Exact) -> None:
    model = _net(graph, "r = Relu (x) y = Conv <pads = [1, 1, 1, 1]> (r, w8_8_3_3, b8)")
    steps = np.linspace(0.01, 0.03, 8).astype(np.float32)
    integers = np.random.default_rng(0).integers(-50, 50, (8, 8, 3, 3))  # the largest is not 127 steps
    on_grid = (integers * steps.reshape(8, 1, 1, 1)).astype(np.float32)
    for tensor in model.graph.initializer:
        if tensor.name == "w8_8_3_3":
            tensor.CopyFrom(numpy_helper.from_array(on_grid, tensor.name))
    placement, ranges = quantized(model, 0.03)
    written = write_int8(model, placement, ranges, {"w8_8_3_3": steps})
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    np.testing.assert_array_equal(values["w8_8_3_3_scale"], steps)
    x = (np.random.default_rng(1).integers(0, 256, (2, 8, SIZE, SIZE)) * 0.03).astype(np.float32)
    np.testing.assert_allclose(exact(written, x), exact(model, x), rtol=0, atol=1e-3)
    assert np.abs(exact(write_int8(model, placement, ranges), x) - exact(model, x)).max() > 1e-2
    for wrong in (steps[:4], -steps, np.full(8, np.nan, np.float32), np.float32(0.1)):
        with pytest.raises(QuantizationError, match=r"w8_8_3_3 has 8 channels along axis 0"):
            write_int8(model, placement, ranges, {"w8_8_3_3": wrong})


def test_a_shifted_file_and_its_plan_tell_what_was_done(shifted: Callable[[str], Any], tmp_path: Path) -> None:
    found = shifted("basic")
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(found.exported.content)
    content, layers = int8_content(path, found.placement, found.ranges)
    assert content == found.int8.SerializeToString(deterministic=True)
    told = {layer.module: layer.reason for layer in layers if layer.op in ("Conv", "Relu", "Gemm")}
    assert "bias" in told["layer2.0.downsample.0"].rpartition("; ")[2]
    assert "map" in told["layer2.0.conv2"].rpartition("; ")[2]
    assert "bias" in told["fc"].rpartition("; ")[2]
    assert "shifted" not in told["conv1"]
    assert "ends at zero" in told["relu"]
    assert [(a.node, a.op, a.module, a.precision) for a in layers] == [
        (b.node, b.op, b.module, b.precision) for b in found.placement.layers
    ]
    (tmp_path / "model.int8.onnx").write_bytes(content)
    facts = describe_file(tmp_path / "model.int8.onnx")
    assert (facts["activation_range"], facts["lint"]) == ("shifted", [])
    assert describe_file(path)["activation_range"] == "symmetric"
