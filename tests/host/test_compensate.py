"""Compensated weights lie on their int8 grids, and bring each layer's output nearer to the float network's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from edgeres.affine import channel_amax, dequantize, quantize, scale_from_amax
from edgeres.quantize import compensate as compensation
from edgeres.quantize import plan
from edgeres.quantize.compensate import Compensation, compensate, nearest, round_in_turn
from edgeres.quantize.follow import Follower, Quantizer
from edgeres.quantize.placement import Placement

Graph = Callable[..., onnx.ModelProto]

SHARED = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_it_is(_: str, value: Tensor) -> Tensor:
    return value


def coarsely(_: str, value: Tensor) -> Tensor:
    return torch.round(value * 2) / 2


def downwards(_: str, value: Tensor) -> Tensor:
    """Quantize as :func:`coarsely` does, but with an error whose mean is not zero."""
    return torch.floor(value * 2) / 2


def placed(model: onnx.ModelProto) -> tuple[Follower, Placement]:
    placement = plan(model, {})
    return Follower(model, {reader: p.tensor for p in placement.points for reader in p.readers}), placement


def fit(model: onnx.ModelProto, quantizer: Quantizer, images: Sequence[np.ndarray], **options: Any) -> Compensation:
    follower, placement = placed(model)
    return compensate(follower, placement, quantizer, images, **options)


def correlated(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return images whose channels are mixtures of each other, and whose neighbouring pixels are alike."""
    x = rng.standard_normal(shape)
    x = np.einsum("nc...,cd->nd...", x, rng.standard_normal((shape[1], shape[1])))
    for axis in range(2, len(shape)):
        x = x + np.roll(x, 1, axis)
    return np.asarray(x + rng.standard_normal((1, shape[1], *[1] * (len(shape) - 2))), np.float32)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def random_weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return weights whose rows differ in size, as those of real layers do."""
    found = {name: rng.standard_normal(shape) * rng.uniform(0.1, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
             for name, shape in shapes.items()}  # fmt: skip
    return {name: values.astype(np.float32) for name, values in found.items()}


def answers(
    model: onnx.ModelProto, x: np.ndarray, quantizer: Quantizer, found: Compensation | None, *keep: str
) -> list[np.ndarray]:
    """Return the logits and the tensors of ``keep`` of a net quantized with what was found; None for plain weights."""
    follower, placement = placed(model)
    if found is None:
        constants = {}
        for weight in placement.weights:
            values = follower.constants[weight.tensor].numpy()
            scale = scale_from_amax(channel_amax(values, weight.axis))
            constants[weight.tensor] = dequantize(quantize(values, scale, weight.axis), scale, weight.axis)
    else:
        constants = found.constants
    with torch.no_grad():
        y, kept = follower.run(
            torch.from_numpy(x), keep, quantizer, {name: torch.from_numpy(v) for name, v in constants.items()}
        )
    return [y.numpy().astype(np.float64), *(kept[name].numpy().astype(np.float64) for name in keep)]


def floats(model: onnx.ModelProto, x: np.ndarray, *keep: str) -> list[np.ndarray]:
    with torch.no_grad():
        y, kept = Follower(model, {}).run(torch.from_numpy(x), keep)
    return [y.numpy().astype(np.float64), *(kept[name].numpy().astype(np.float64) for name in keep)]


def on_grid(model: onnx.ModelProto, found: Compensation) -> None:
    """Assert that every rounded weight is a multiple of its float32 step, bit for bit, and within ±127 of them."""
    before, (_, placement) = arrays(model), placed(model)
    axes = {weight.tensor: weight.axis for weight in placement.weights}
    for name, scale in found.scales.items():
        values, axis = found.constants[name], axes[name]
        assert (values.dtype, values.shape) == (np.float32, before[name].shape)
        np.testing.assert_array_equal(scale, scale_from_amax(channel_amax(before[name], axis)))
        integers = quantize(values, scale, axis)
        assert np.abs(integers.astype(int)).max() <= 127
        np.testing.assert_array_equal(dequantize(integers, scale, axis), values)


LAYERS: dict[str, tuple[str, tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "conv": ("Conv <pads = [1, 1, 1, 1]> (x, w, b)", (4, 6, 6), {"w": (5, 4, 3, 3), "b": (5,)}),
    "conv, uneven": (
        "Conv <pads = [0, 2, 1, 0], strides = [2, 1], dilations = [1, 2]> (x, w, b)",
        (3, 7, 6),
        {"w": (6, 3, 2, 3), "b": (6,)},
    ),
    "conv in groups": ("Conv <group = 2> (x, w, b)", (6, 5, 5), {"w": (4, 3, 2, 2), "b": (4,)}),
    "depthwise": ("Conv <group = 4, pads = [1, 1, 1, 1]> (x, w, b)", (4, 6, 6), {"w": (8, 1, 3, 3), "b": (8,)}),
    "conv without bias": ("Conv (x, w)", (5, 4, 4), {"w": (7, 5, 1, 1)}),
    "gemm": ("Gemm (x, w, b)", (12,), {"w": (12, 7), "b": (7,)}),
    "gemm, turned": ("Gemm <transB = 1> (x, w, b)", (12,), {"w": (7, 12), "b": (1, 7)}),
    "gemm, one bias": ("Gemm <transB = 1> (x, w, b)", (12,), {"w": (7, 12), "b": (1,)}),
    "matmul": ("MatMul (x, w)", (12,), {"w": (12, 7)}),
}


def layer(graph: Graph, name: str, rng: np.random.Generator) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """Return a net of one layer with random weights, and batches of random images."""
    node, shape, shapes = LAYERS[name]
    after = "float[N,A,B,C]" if len(shape) == 3 else "float[N,A]"
    dims = ",".join(map(str, shape))
    text = f"net (float[N,{dims}] x) => ({after} y) {{ y = {node} }}"
    return graph(text, random_weights(rng, **shapes)), [correlated(rng, 16, *shape) for _ in range(2)]


@pytest.mark.parametrize("name", LAYERS)
@SHARED
@given(seed=st.integers(0, 2**32 - 1))
def test_no_layer_is_worse_off_than_by_plain_rounding(name: str, seed: int, graph: Graph) -> None:
    rng = np.random.default_rng(seed)
    model, batches = layer(graph, name, rng)
    x = np.concatenate(batches)
    (wanted,) = floats(model, x)
    fitted, plain = (fit(model, coarsely, batches, rounding=rounding) for rounding in (True, False))
    for found in (fitted, plain):
        on_grid(model, found)
    channels = (0, *range(2, wanted.ndim))
    errors = [np.square(answers(model, x, coarsely, f)[0] - wanted).mean(channels) for f in (fitted, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-9 * np.square(wanted).mean(channels)).all()


@pytest.mark.parametrize("name", LAYERS)
def test_over_many_layers_much_is_gained(name: str, graph: Graph) -> None:
    """Inputs that are mixtures of each other leave it to choose which weight takes which error."""
    rng = np.random.default_rng(11)
    gain = []
    for _ in range(5):
        model, batches = layer(graph, name, rng)
        x = np.concatenate(batches)
        (wanted,) = floats(model, x)
        fitted, plain = (fit(model, as_it_is, batches, rounding=rounding) for rounding in (True, False))
        power = [np.square(answers(model, x, as_it_is, found)[0] - wanted).sum() for found in (fitted, plain)]
        gain.append(power[0] / power[1])
    assert np.mean(gain) < 0.9


@pytest.mark.parametrize("name", [name for name, (node, *_) in LAYERS.items() if ", b)" in node])
@pytest.mark.parametrize("rounding", [True, False])
def test_biases_correct_the_means(name: str, rounding: bool, graph: Graph) -> None:
    model, batches = layer(graph, name, np.random.default_rng(5))
    x = np.concatenate(batches)
    (wanted,) = floats(model, x)
    (before,), (after,) = (
        answers(model, x, downwards, found) for found in (None, fit(model, downwards, batches, rounding=rounding))
    )
    channels = (0, *range(2, wanted.ndim))
    size = np.abs(wanted).max()
    assert np.abs((before - wanted).mean(channels)).max() > 1e-3 * size
    np.testing.assert_allclose(after.mean(channels), wanted.mean(channels), rtol=0, atol=2e-6 * size)


def test_each_layer_of_a_net_has_its_mean_back(net: Callable[[str], Any]) -> None:
    model = net("cifar").fp32
    x = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
    found = fit(model, downwards, [x[:8], x[8:]])
    nodes = list(model.graph.node)
    readers = {name: node for node in nodes for name in node.input}
    tensors = [node.output[0] for node in nodes if node.op_type in ("Conv", "Gemm")]
    # of a residual block it is the sum whose mean is right, for its last layer makes up for the skip too
    tensors = [readers[name].output[0] if name in readers and readers[name].op_type == "Add" else name
               for name in tensors]  # fmt: skip
    assert len(set(tensors)) == 8
    plain, after, wanted = (
        answers(model, x, downwards, None, *tensors),
        answers(model, x, downwards, found, *tensors),
        floats(model, x, *tensors),
    )
    for name, before, got, exact in zip(tensors, plain[1:], after[1:], wanted[1:], strict=True):
        channels = (0, *range(2, exact.ndim))
        error = np.abs(got.mean(channels) - exact.mean(channels)).max()
        assert error < 1e-5 * np.abs(exact).max(), name
        assert error < 1e-2 * np.abs(before.mean(channels) - exact.mean(channels)).max(), name
    noise = [np.square(given[0] - wanted[0]).sum() for given in (after, plain)]
    assert noise[0] < 0.5 * noise[1]


@pytest.mark.parametrize("rounding", [True, False])
def test_where_nothing_is_lost_nothing_changes(rounding: bool, net: Callable[[str], Any]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(net("cifar").fp32)
    for weight in placed(model)[1].weights:
        for tensor in model.graph.initializer:
            if tensor.name == weight.tensor:
                values = numpy_helper.to_array(tensor)
                scale = scale_from_amax(channel_amax(values, weight.axis))
                on = dequantize(quantize(values, scale, weight.axis), scale, weight.axis)
                tensor.CopyFrom(numpy_helper.from_array(on, tensor.name))
    x = np.random.default_rng(1).standard_normal((8, 3, 32, 32)).astype(np.float32)
    found, before = fit(model, as_it_is, [x], rounding=rounding), arrays(model)
    assert len(found.scales) == 8
    assert len(found.constants) == 16
    for name, values in found.constants.items():
        np.testing.assert_allclose(values, before[name], rtol=1e-6, atol=1e-5, err_msg=name)


def test_biases_alone_leave_the_integers_of_plain_rounding(net: Callable[[str], Any]) -> None:
    model = net("basic").fp32
    x = np.random.default_rng(1).standard_normal((4, 3, 32, 32)).astype(np.float32)
    found, before = fit(model, coarsely, [x], rounding=False), arrays(model)
    for weight in placed(model)[1].weights:
        values, scale = before[weight.tensor], found.scales[weight.tensor]
        integers = quantize(values, scale, weight.axis)
        np.testing.assert_array_equal(quantize(found.constants[weight.tensor], scale, weight.axis), integers)


def test_a_whole_net_is_fitted_layer_by_layer(net: Callable[[str], Any]) -> None:
    found = net("cifar")
    batches = [np.random.default_rng(i).standard_normal((12, 3, 32, 32)).astype(np.float32) for i in range(2)]
    told: list[tuple[int, int]] = []
    made = fit(found.fp32, coarsely, batches, progress=lambda done, total: told.append((done, total)))
    again = fit(found.fp32, coarsely, batches)
    layers = len(found.placement.weights)
    assert told == [(i + 1, layers) for i in range(layers)]
    assert made.constants.keys() == again.constants.keys()
    for name_of, values in made.constants.items():
        np.testing.assert_array_equal(again.constants[name_of], values)
    on_grid(found.fp32, made)


def test_a_trained_net_loses_noise_on_other_images_too(trained: tuple[Any, np.ndarray]) -> None:
    found, x = trained
    ranges = {point.tensor: found.ranges[point.range_of] for point in found.placement.points}

    def quantizer(tensor: str, value: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(value, ranges[tensor].scale, 0, -128, 127)

    order = np.random.default_rng(0).permutation(len(x))
    mine, other = x[order[:40]], x[order[40:]]
    made, biases = (fit(found.fp32, quantizer, [mine], rounding=rounding) for rounding in (True, False))
    (wanted,) = floats(found.fp32, other)
    plain, fitted, corrected = (
        np.square(answers(found.fp32, other, quantizer, constants)[0] - wanted).sum()
        for constants in (None, made, biases)
    )
    assert fitted < 0.5 * plain
    assert fitted < 0.9 * corrected


def test_a_branch_makes_up_for_its_skip(graph: Graph) -> None:
    """The skip alone is coarse; the sum's mean and most of what the branch's input tells of the error come back."""
    text = """net (float[N,4,6,6] x) => (float[N,4,6,6] y) {
        s = Relu (x)
        c = Conv (x, w, b)
        y = Add (c, s) }"""
    rng = np.random.default_rng(0)
    model = graph(text, random_weights(rng, w=(4, 4, 1, 1), b=(4,)))
    follower, placement = placed(model)
    assert {point.tensor for point in placement.points} == {"x", "s"}

    def saturated(tensor: str, value: Tensor) -> Tensor:
        return torch.clamp(value, max=0.5) if tensor == "s" else value

    x = np.abs(correlated(rng, 32, 4, 6, 6))  # then what saturates is a function of the branch's own input
    found, alone = (compensate(follower, placement, saturated, [x], rounding=r) for r in (True, False))
    (wanted,) = floats(model, x)
    plain, fitted, mean = (answers(model, x, saturated, f)[0] - wanted for f in (None, found, alone))
    for error in (fitted, mean):
        assert np.abs(error.mean((0, 2, 3))).max() < 1e-5
    assert np.square(plain).mean() > 2 * np.square(mean).mean()
    assert np.square(fitted).mean() < 0.5 * np.square(mean).mean()


def test_groups_are_layers_side_by_side(graph: Graph) -> None:
    rng = np.random.default_rng(4)
    weights = random_weights(rng, w=(6, 3, 3, 3), b=(6,))
    x = correlated(rng, 24, 6, 6, 6)
    together = graph("net (float[N,6,6,6] x) => (float[N,6,A,B] y) { y = Conv <group = 2> (x, w, b) }", weights)
    found = fit(together, coarsely, [x])
    for i in range(2):
        half = {name: values[3 * i : 3 * i + 3] for name, values in weights.items()}
        alone = graph("net (float[N,3,6,6] x) => (float[N,3,A,B] y) { y = Conv (x, w, b) }", half)
        single = fit(alone, coarsely, [np.ascontiguousarray(x[:, 3 * i : 3 * i + 3])])
        np.testing.assert_array_equal(found.scales["w"][3 * i : 3 * i + 3], single.scales["w"])
        apart = np.abs(found.constants["w"][3 * i : 3 * i + 3] - single.constants["w"])
        assert (apart > 1e-6).mean() < 0.02  # but for what stands on a rounding border
        np.testing.assert_allclose(found.constants["b"][3 * i : 3 * i + 3], single.constants["b"], rtol=0, atol=1e-2)


def test_one_linear_layer_in_three_ways(graph: Graph) -> None:
    rng = np.random.default_rng(6)
    w, b = rng.standard_normal((5, 9)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    x = correlated(rng, 60, 9)
    text = "net (float[N,{shape}] x) => (float[N,5{more}] y) {{ y = {node} }}"
    rows = fit(
        graph(text.format(shape=9, more="", node="Gemm <transB = 1> (x, w, b)"), {"w": w, "b": b}), coarsely, [x]
    )
    columns = fit(graph(text.format(shape=9, more="", node="Gemm (x, w, b)"), {"w": w.T, "b": b}), coarsely, [x])
    images = fit(
        graph(text.format(shape="9,1,1", more=",1,1", node="Conv (x, w, b)"), {"w": w[:, :, None, None], "b": b}),
        coarsely,
        [x[:, :, None, None]],
    )
    np.testing.assert_array_equal(columns.constants["w"].T, rows.constants["w"])
    np.testing.assert_array_equal(images.constants["w"][:, :, 0, 0], rows.constants["w"])
    for other in (columns, images):
        np.testing.assert_allclose(other.constants["b"], rows.constants["b"], rtol=0, atol=1e-5)


def test_a_channel_that_hardly_varies_beside_a_large_mean(graph: Graph) -> None:
    """In float32, E[x²] − E[x]² of 3000 ± 0.01 is noise, and may be negative."""
    rng = np.random.default_rng(7)
    x = correlated(rng, 32, 4, 6, 6)
    x[:, 1] = 3000 + 0.01 * rng.standard_normal((32, 6, 6))
    x[:, 2] = 0
    model = graph(
        "net (float[N,4,6,6] x) => (float[N,5,A,B] y) { y = Conv (x, w, b) }",
        random_weights(rng, w=(5, 4, 3, 3), b=(5,)),
    )
    batches = [x[:8], x[8:]]
    fitted, plain = (fit(model, as_it_is, batches, rounding=rounding) for rounding in (True, False))
    (wanted,) = floats(model, x)
    errors = [np.square(answers(model, x, as_it_is, found)[0] - wanted).mean() for found in (fitted, plain)]
    assert errors[0] < errors[1]


def test_a_layer_that_reads_nothing_but_zeros(graph: Graph) -> None:
    rng = np.random.default_rng(8)
    weights = random_weights(rng, w=(5, 4, 3, 3), b=(5,))
    weights["w"][2] = 0  # a row that was pruned
    model = graph("net (float[N,4,6,6] x) => (float[N,5,A,B] y) { y = Conv (x, w, b) }", weights)
    found = fit(model, as_it_is, [np.zeros((4, 4, 6, 6), np.float32)])
    on_grid(model, found)
    assert not found.constants["w"][2].any()
    scale = scale_from_amax(channel_amax(weights["w"], 0))
    np.testing.assert_array_equal(found.constants["w"], dequantize(quantize(weights["w"], scale, 0), scale, 0))
    np.testing.assert_allclose(found.constants["b"], weights["b"], atol=1e-6)


def test_what_is_shared_or_scaled_is_left_alone(graph: Graph) -> None:
    text = """net (float[N,4,6,6] x) => (float[N,3] y) {
        a = Conv (x, w, b)
        c = Conv (a, w, d)
        e = Conv (c, v, f)
        p = GlobalAveragePool (e)
        g = Flatten (p)
        h = Gemm <alpha = 2.0> (g, k, l)
        y = Gemm <beta = 0.5> (h, m, n) }"""
    rng = np.random.default_rng(9)
    shapes = {"w": (4, 4, 1, 1), "b": (4,), "d": (4,), "v": (5, 4, 1, 1), "f": (5,), "k": (5, 3), "l": (3,),
              "m": (3, 3), "n": (3,)}  # fmt: skip
    model = graph(text, random_weights(rng, **shapes))
    found = fit(model, coarsely, [correlated(rng, 8, 4, 6, 6)])
    assert found.constants.keys() == {"v", "f"}
    assert found.scales.keys() == {"v"}


def test_a_layer_kept_in_float_keeps_its_weights_and_gets_a_bias(graph: Graph) -> None:
    rng = np.random.default_rng(10)
    model, batches = layer(graph, "conv", rng)
    name = model.graph.node[0].name
    placement = plan(model, {name: "stem"}, ["stem"])
    assert not placement.weights
    follower = Follower(model, {(name, 0): "x"})  # its input is coarse all the same
    found = compensate(follower, placement, coarsely, batches)
    assert found.constants.keys() == {"b"}
    x = np.concatenate(batches)
    with torch.no_grad():
        got = F.conv2d(
            coarsely("x", torch.from_numpy(x)),
            follower.constants["w"],
            torch.from_numpy(found.constants["b"]),
            padding=1,
        )
    (wanted,) = floats(model, x)
    np.testing.assert_allclose(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-5)


def test_large_layers_are_fitted_to_some_of_their_positions(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = layer(graph, "conv", np.random.default_rng(12))
    x = np.concatenate(batches)
    every = fit(model, coarsely, batches)
    monkeypatch.setattr(compensation, "MULTIPLICATIONS", 9e5)
    some, again = (fit(model, coarsely, batches) for _ in range(2))
    on_grid(model, some)
    np.testing.assert_array_equal(some.constants["w"], again.constants["w"])
    np.testing.assert_array_equal(some.constants["b"], again.constants["b"])
    assert np.abs(some.constants["b"] - every.constants["b"]).max() > 0
    (wanted,) = floats(model, x)
    few, all_of_them, plain = (
        np.square(answers(model, x, coarsely, found)[0] - wanted).mean() for found in (some, every, None)
    )
    assert all_of_them <= few < plain


# Rounding alone


def covariance(rng: np.random.Generator, size: int) -> Tensor:
    mixed = rng.standard_normal((3 * size + 5, size)) @ rng.standard_normal((size, size))
    return torch.from_numpy(np.cov(mixed.T).reshape(size, size))


def loss(rounded: Tensor, weights: Tensor, square: Tensor) -> np.ndarray:
    off = (rounded - weights).numpy()
    return np.einsum("kc,cd,kd->k", off, square.numpy(), off)


@given(size=st.integers(1, 7), levels=st.sampled_from([1, 3, 20, 127]), seed=st.integers(0, 2**32 - 1))
@example(size=4, levels=3, seed=0)
def test_rounding_in_turn_lies_between_the_nearest_and_the_best(size: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, square = torch.from_numpy(rng.standard_normal((4, size))), covariance(rng, size)
    steps = weights.abs().amax(1) / levels
    found = round_in_turn(weights, steps, square)
    integers = (found / steps[:, None]).numpy()
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-9)
    down = torch.floor(weights / steps[:, None])
    corners = [
        torch.clamp(down + torch.tensor(up, dtype=torch.float64), -127, 127) * steps[:, None]
        for up in itertools.product((0, 1), repeat=size)
    ]
    best = np.min([loss(corner, weights, square) for corner in corners], axis=0)
    plain = loss(nearest(weights, steps), weights, square)
    got = loss(found, weights, square)
    assert (got <= plain * (1 + 1e-9)).all()
    if ((integers - down.numpy() >= -1e-9) & (integers - down.numpy() <= 1 + 1e-9)).all():
        assert (best <= got * (1 + 1e-9)).all()  # the greedy order may go further than to a neighbour, and be better


@given(seed=st.integers(0, 2**32 - 1))
def test_of_a_single_input_the_nearest_is_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(3 * rng.standard_normal((5, 1)))
    steps = torch.from_numpy(rng.uniform(0.01, 1, 5))
    found = round_in_turn(weights, steps, torch.full((1, 1), float(rng.uniform(0, 9)), dtype=torch.float64))
    expected = np.clip(np.rint(weights.numpy() / steps.numpy()[:, None]), -127, 127) * steps.numpy()[:, None]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest() -> None:
    rng = np.random.default_rng(0)
    weights, steps = torch.from_numpy(rng.standard_normal((6, 20))), torch.full((6,), 0.1, dtype=torch.float64)
    square = torch.diag(torch.from_numpy(rng.uniform(0, 5, 20)))
    np.testing.assert_array_equal(round_in_turn(weights, steps, square), nearest(weights, steps))


def test_of_inputs_that_are_alike_only_the_sum_counts() -> None:
    """Twenty equal inputs read 20 × 0.4 steps: eight ones and twelve zeros are exact, twenty zeros lose it all."""
    weights, steps = torch.full((1, 20), 0.4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    square = torch.ones((20, 20), dtype=torch.float64)
    assert nearest(weights, steps).sum() == 0
    assert round_in_turn(weights, steps, square).sum() == 8


def test_saturated_weights_pass_their_error_on() -> None:
    """The first input wants 200 steps and gets 127; its twin, read last, can take most of the rest."""
    weights, steps = torch.tensor([[200.0, 10.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    square = torch.tensor([[1.01, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = round_in_turn(weights, steps, square)[0].tolist()
    assert found[0] == 127
    assert found[1] == pytest.approx(83, abs=2)


def test_blocks_are_a_matter_of_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    weights, square = torch.from_numpy(rng.standard_normal((8, 50))), covariance(rng, 50)
    steps = weights.abs().amax(1) / 20
    whole = round_in_turn(weights, steps, square)
    before = weights.clone()
    for block in (1, 7, 50):
        monkeypatch.setattr(compensation, "BLOCK", block)
        torch.testing.assert_close(round_in_turn(weights, steps, square), whole, rtol=0, atol=1e-12)
    assert (weights == before).all()
    gain = loss(whole, weights, square).sum() / loss(nearest(weights, steps), weights, square).sum()
    assert gain < 0.5


def test_values_near_the_largest_float_are_rounded_plainly(net: Callable[[str], Any]) -> None:
    """Their products are infinite; it ends, with finite weights."""
    model = net("cifar").fp32
    x = np.full((2, 3, 32, 32), 1e25, np.float32)
    found = fit(model, as_it_is, [x])
    on_grid(model, found)
    weights = [values for name, values in found.constants.items() if name in found.scales]
    assert all(np.isfinite(values).all() for values in weights)
