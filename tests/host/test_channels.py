"""Scaling a network's channels changes nothing that it answers, and what cannot be scaled is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgeres.quantize.channels import apply_factors, channel_groups, scaled_weights

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]

STEM = "c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) r0 = Relu (c0)"
HEAD = "p = GlobalAveragePool (r) f = Flatten (p) y = Gemm <transB = 1> (f, k, kb)"
COMMON = {"w0": (8, 3, 3, 3), "b0": (8,), "k": (5, 8), "kb": (5,)}
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], set[str]]] = {
    "a block in groups": (
        f"""{STEM}
        c1 = Conv (r0, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <group = 4, pads = [1, 1, 1, 1]> (r1, w2, b2)
        r2 = LeakyRelu (c2)
        c3 = Conv (r2, w3)
        a = Add (c3, r0)
        r = Relu (a)
        {HEAD}""",
        {**COMMON, "w1": (12, 8, 1, 1), "b1": (12,), "w2": (16, 3, 3, 3), "b2": (16,), "w3": (8, 16, 1, 1)},
        set(),
    ),
    "depthwise": (
        f"{STEM} c1 = Conv <group = 8> (r0, w1, b1) r = Relu (c1) {HEAD}",
        {**COMMON, "w1": (8, 1, 3, 3), "b1": (8,)},
        set(),
    ),
    "a gate": (
        f"""{STEM}
        c1 = Conv (r0, w1, b1)
        s = GlobalAveragePool (c1)
        d = Conv (s, wd, bd)
        e = Relu (d)
        u = Conv (e, wu, bu)
        g = Sigmoid (u)
        m = Mul (g, c1)
        a = Add (m, r0)
        r = Relu (a)
        {HEAD}""",
        {**COMMON, "w1": (8, 8, 1, 1), "b1": (8,), "wd": (2, 8, 1, 1), "bd": (2,), "wu": (8, 2, 1, 1), "bu": (8,)},
        {"u", "g"},
    ),
    "a gate of one channel": (
        f"{STEM} u = Conv (r0, w1) g = HardSigmoid (u) r = Mul (r0, g) {HEAD}",
        {**COMMON, "w1": (1, 8, 1, 1)},
        {"u", "g"},
    ),
    "swish": (
        f"{STEM} c1 = Conv (r0, w1) g = Sigmoid (c1) r = Mul (c1, g) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1)},
        {"c1", "g", "r", "p", "f"},
    ),
    "two factors": (
        f"{STEM} c1 = Conv (r0, w1) r = Mul (c1, r0) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1)},
        {"c0", "r0", "c1", "r", "p", "f"},
    ),
    "relu6": (
        f"{STEM} q = Clip (r0, zero, six) c1 = Conv (q, w1, b1) r = Relu (c1) {HEAD}",
        {**COMMON, "zero": (), "six": (), "w1": (8, 8, 1, 1), "b1": (8,)},
        {"c0", "r0", "q"},
    ),
    "a constant added": (
        f"{STEM} c1 = Conv (r0, w1) r = Add (c1, m) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1), "m": (8, 1, 1)},
        {"c1", "r", "p", "f"},
    ),
    "probabilities": (
        f"{STEM} r = Relu (r0) p = GlobalAveragePool (r) f = Flatten (p) l = Gemm (f, k, kb) y = Softmax (l)",
        {**COMMON, "k": (8, 5)},
        {"l"},
    ),
    "two linear layers": (
        f"""{STEM}
        p = ReduceMean <axes = [-1, -2], keepdims = 0> (r0)
        h = Gemm (p, k1, b1)
        i = Relu (h)
        j = MatMul (i, k2)
        y = Add (j, kb)""",
        {**COMMON, "k1": (8, 6), "b1": (1, 6), "k2": (6, 5)},
        {"j"},
    ),
    "a product after a squeeze": (
        f"{STEM} p = ReduceMean <axes = [2, 3]> (r0) f = Squeeze (p, spatial) j = MatMul (f, k2) y = Add (j, kb)",
        {**COMMON, "k2": (8, 5)},
        {"j"},
    ),
    "a reshape before the head": (
        f"{STEM} p = GlobalAveragePool (r0) f = Reshape (p, rows) j = MatMul (f, k2) y = Identity (j)",
        {**COMMON, "k2": (8, 5)},
        {"j"},
    ),
    "a scaled gemm": (
        f"{STEM} p = GlobalAveragePool (r0) f = Flatten (p) y = Gemm <alpha = 2.0> (f, k2, kb)",
        {**COMMON, "k2": (8, 5)},
        {"c0", "r0", "p", "f"},
    ),
    "branches side by side": (
        f"""c1 = Conv (x, w1, b1)
        c2 = Conv (x, w2, b2)
        r1 = Relu (c1)
        r2 = Relu (c2)
        j = Concat <axis = 1> (r1, r2)
        r = MaxPool <kernel_shape = [2, 2]> (j)
        {HEAD}""",
        {"w1": (3, 3, 1, 1), "b1": (3,), "w2": (5, 3, 1, 1), "b2": (5,), "k": (5, 8), "kb": (5,)},
        set(),
    ),
    "joined with the input": (
        f"c1 = Conv (x, w1) j = Concat <axis = 1> (c1, x) r = Relu (j) {HEAD}",
        {"w1": (5, 3, 1, 1), "k": (5, 8), "kb": (5,)},
        {f"{tensor} 5-7" for tensor in "jrpf"},
    ),
    "joined in height": (
        f"{STEM} j = Concat <axis = 2> (r0, r0) r = Relu (j) {HEAD}",
        COMMON,
        {"c0", "r0", "j", "r", "p", "f"},
    ),
    "weights read twice": (
        f"{STEM} c1 = Conv (r0, w1) r1 = Relu (c1) c2 = Conv (r1, w1) r2 = Relu (c2) r = Relu (r2) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1)},
        {"c0", "r0", "c1", "r1", "c2", "r2", "r", "p", "f"},
    ),
    "a bias read twice": (
        f"{STEM} c1 = Conv (r0, w1, b1) r1 = Relu (c1) c2 = Conv (r1, w2, b1) r = Relu (c2) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1), "w2": (8, 8, 1, 1), "b1": (8,)},
        {"c0", "r0", "c1", "r1", "c2", "r", "p", "f"},
    ),
    "a shortcut of zeros": (
        """c0 = Conv (x, w0, b0)
        r0 = Relu (c0)
        c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r0, w1, b1)
        s = Slice (r0, starts, ends, axes, steps)
        q = Pad (s, pads)
        a = Add (c1, q)
        r = Relu (a)
        p = AveragePool <kernel_shape = [4, 4]> (r)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, k, kb)""",
        {"w0": (4, 3, 1, 1), "b0": (4,), "w1": (8, 4, 3, 3), "b1": (8,), "k": (5, 8), "kb": (5,)},
        set(),
    ),
    "padded with ones": (
        f"{STEM} q = Pad (r0, border, one) c1 = Conv (q, w1) r = Relu (c1) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1), "one": ()},
        {"c0", "r0", "q"},
    ),
    "channels left out": (
        f"{STEM} s = Slice (r0, starts, ends, first) c1 = Conv (s, w1) r = Relu (c1) {HEAD}",
        {**COMMON, "w1": (8, 4, 1, 1)},
        {"c0", "r0", "s"},
    ),
    "computed constants": (
        f"{STEM} m = Relu (map) r = Add (r0, m) {HEAD}",
        {**COMMON, "map": (2, 8, 1, 1)},
        {"c0", "r0", "r", "p", "f", "m"},
    ),
    "computed weights": (
        f"{STEM} v = Relu (w1) c1 = Conv (r0, v) r = Relu (c1) {HEAD}",
        {**COMMON, "w1": (8, 8, 1, 1)},
        {"c0", "r0", "c1", "r", "p", "f"},
    ),
    "rows are not channels": (
        """c0 = Conv (x, w0)
        m = MatMul (c0, turn)
        r = Relu (m)
        p = ReduceMean <axes = [1], keepdims = 0> (r)
        f = ReduceMean <axes = [2], keepdims = 0> (p)
        y = Gemm <transB = 1> (f, k, kb)""",
        {"w0": (8, 3, 1, 1), "turn": (8, 8), "k": (5, 8), "kb": (5,)},
        {"c0", "m", "r", "f"},
    ),
    "positions are not samples": (
        f"{STEM} t = Reshape (r0, rows) z = Reshape (t, image) r = Relu (z) {HEAD}",
        COMMON,
        {"c0", "r0", "z", "r", "p", "f"},
    ),
    "all at once": (
        f"{STEM} f = Flatten (r0) y = Gemm <transB = 1> (f, k, kb)",
        {**COMMON, "k": (5, 8 * 64)},
        {"c0", "r0", "f"},
    ),
}
NUMBERS = {
    "zero": np.float32(0),
    "six": np.float32(6),
    "one": np.float32(1),
    "starts": np.array([0, 0]),
    "ends": np.array([99, 99]),
    "axes": np.array([2, 3]),
    "steps": np.array([2, 2]),
    "first": np.array([1, 2]),
    "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    "border": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "spatial": np.array([2, 3]),
    "rows": np.array([-1, 8]),
    "image": np.array([-1, 8, 8, 8]),
}
NETS = ("cifar", "basic", "bottleneck")


def case(graph: Graph, name: str) -> onnx.ModelProto:
    text, shapes, _ = CASES[name]
    rng = np.random.default_rng(len(name))
    constants = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    constants.update({key: value for key, value in NUMBERS.items() if key in constants or f" {key}" in text})
    if name == "channels left out":
        constants["ends"] = np.array([4, 99])
    return graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {{ {text} }}", constants)


def random_factors(groups: Any, rng: np.random.Generator, octaves: float = 4) -> np.ndarray:
    return np.where(groups.free, 2 ** rng.uniform(-octaves, octaves, len(groups)), 1.0)


def assert_same(exact: Exact, found: Any, factors: np.ndarray, x: np.ndarray) -> None:
    scaled = apply_factors(found.model, found.groups.factors(factors))
    onnx.checker.check_model(scaled, full_check=True)
    wanted = exact(found.model, x)
    np.testing.assert_allclose(exact(scaled, x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_factors_change_no_answer(name: str, graph: Graph, followed: Callable[..., Any], exact: Exact) -> None:
    found = followed(case(graph, name), (8, 8))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    for _ in range(3):
        assert_same(exact, found, random_factors(found.groups, rng), x)


@pytest.mark.parametrize("name", CASES)
def test_exactly_those_channels_are_frozen(name: str, graph: Graph, followed: Callable[..., Any]) -> None:
    found = followed(case(graph, name), (8, 8))
    frozen = set()
    for tensor, index in found.groups.index.items():
        held = ~found.groups.free[index]
        if held.all():
            frozen.add(tensor)
        elif held.any():
            where = np.flatnonzero(held)
            frozen.add(f"{tensor} {where[0]}-{where[-1]}")
            assert held.sum() == where[-1] - where[0] + 1
    assert frozen == {"x", "y", *CASES[name][2]}


@pytest.mark.parametrize("name", CASES)
def test_a_free_channel_really_changes(name: str, graph: Graph, followed: Callable[..., Any], exact: Exact) -> None:
    """Every tensor's values become those of before times its factors: groups are neither too large nor idle."""
    found = followed(case(graph, name), (8, 8))
    factors = found.groups.factors(random_factors(found.groups, np.random.default_rng(1)))
    scaled = apply_factors(found.model, factors)
    x = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for tensor in found.groups.index:
        if tensor == "x":
            continue
        before, after = (exact(showing(model, tensor), x) for model in (found.model, scaled))
        wanted = before * factors[tensor].reshape(1, -1, *[1] * (before.ndim - 2))
        limit = np.abs(wanted).max(axis=(0, *range(2, wanted.ndim)), keepdims=True)
        assert (np.abs(after - wanted) <= 1e-5 * limit + 1e-7 * limit.max()).all(), tensor


def showing(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Return a model that answers with one of its tensors."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return result


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), octaves=st.floats(0, 4))
def test_factors_change_no_net(
    name: str, seed: int, octaves: float, net: Callable[[str], Any], followed: Callable[..., Any], exact: Exact
) -> None:
    found = followed(net(name).fp32)
    rng = np.random.default_rng(seed)
    factors = random_factors(found.groups, rng, octaves)
    assert_same(exact, found, factors, rng.standard_normal((2, 3, 32, 32)).astype(np.float32))


@pytest.mark.parametrize("name", NETS)
def test_powers_of_two_change_no_bit(
    name: str, net: Callable[[str], Any], followed: Callable[..., Any], exact: Exact
) -> None:
    found = followed(net(name).fp32)
    rng = np.random.default_rng(4)
    factors = np.where(found.groups.free, 2.0 ** rng.integers(-6, 7, len(found.groups)), 1.0)
    x = rng.standard_normal((4, 3, 32, 32)).astype(np.float32)
    scaled = apply_factors(found.model, found.groups.factors(factors))
    assert scaled != found.model
    np.testing.assert_array_equal(exact(scaled, x), exact(found.model, x))


@pytest.mark.parametrize("name", NETS)
def test_of_a_residual_net_only_input_and_output_are_frozen(
    name: str, net: Callable[[str], Any], followed: Callable[..., Any]
) -> None:
    found = followed(net(name).fp32)
    frozen = [tensor for tensor, index in found.groups.index.items() if not found.groups.free[index].all()]
    assert sorted(frozen) == ["input", "logits"]
    assert found.channels.keys() == found.groups.index.keys()
    for tensor, index in found.groups.index.items():
        assert len(index) == found.channels[tensor]


def test_the_channels_of_a_residual_stream_are_one_group_each(
    net: Callable[[str], Any], followed: Callable[..., Any]
) -> None:
    found = followed(net("bottleneck").fp32)
    graph = found.model.graph
    streams = [node for node in graph.node if node.op_type == "Add"]
    assert len(streams) == 3
    for node in streams:
        for name in (*node.input, *node.output):
            np.testing.assert_array_equal(found.groups.index[name], found.groups.index[node.output[0]])
    first, second = (found.groups.index[node.output[0]] for node in streams[:2])
    np.testing.assert_array_equal(first, second)  # two blocks of one stage
    convs = [node for node in graph.node if node.op_type == "Conv"]
    inner = [found.groups.index[node.output[0]] for node in convs[1:3]]
    assert len(np.unique(np.concatenate([first, *inner]))) == len(first) + sum(map(len, inner))


def test_a_tensor_without_channels_keeps_what_it_is_made_of(graph: Graph) -> None:
    """What the caller does not count is not scaled."""
    model = case(graph, "two linear layers")
    channels = {"x": 3, "c0": 8, "r0": 8, "h": 6, "i": 6, "j": 5, "y": 5}
    groups = channel_groups(model, channels)
    assert not groups.free[groups.index["r0"]].any()
    assert groups.free[groups.index["i"]].all()


def test_the_model_given_is_left_alone(graph: Graph, followed: Callable[..., Any]) -> None:
    found = followed(case(graph, "a block in groups"), (8, 8))
    before = found.model.SerializeToString(deterministic=True)
    apply_factors(found.model, found.groups.factors(random_factors(found.groups, np.random.default_rng(0))))
    assert found.model.SerializeToString(deterministic=True) == before
    ones = apply_factors(found.model, found.groups.factors(np.ones(len(found.groups))))
    assert ones == found.model


def test_weights_keep_their_type(graph: Graph, followed: Callable[..., Any]) -> None:
    found = followed(case(graph, "a block in groups"), (8, 8))
    scaled = apply_factors(found.model, found.groups.factors(random_factors(found.groups, np.random.default_rng(0))))
    for before, after in zip(found.model.graph.initializer, scaled.graph.initializer, strict=True):
        assert (before.name, before.data_type, before.dims) == (after.name, after.data_type, after.dims)


@pytest.mark.parametrize("transposed", [0, 1])
def test_weights_take_both_factors(transposed: int) -> None:
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
    into, back = np.array([2.0, 4.0]), np.array([1.0, 8.0, 16.0])
    wanted = np.array([[2, 2 / 8, 2 / 16], [4, 4 / 8, 4 / 16]])
    found = scaled_weights(node, np.ones((2, 3) if transposed else (3, 2)), into, back)
    np.testing.assert_array_equal(found if transposed else found.T, wanted)


def test_weights_in_groups_take_back_the_factors_of_their_own_inputs() -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    into, back = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0, 8.0])
    found = scaled_weights(node, np.ones((4, 2, 1, 1)), into, back)[:, :, 0, 0]
    np.testing.assert_array_equal(found, [[1, 1 / 2], [2, 1], [1, 1 / 2], [2, 1]])


def test_constants_of_two_layers_are_never_scaled(graph: Graph, followed: Callable[..., Any]) -> None:
    found = followed(case(graph, "weights read twice"), (8, 8))
    factors = {name: np.full(size, 2.0) for name, size in found.channels.items()}  # even if somebody asked for it
    scaled = {t.name: numpy_helper.to_array(t) for t in apply_factors(found.model, factors).graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    np.testing.assert_array_equal(scaled["w1"], before["w1"])
    assert (scaled["k"] == before["k"]).all()  # twice, and half
