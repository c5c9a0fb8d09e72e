"""Sensitivities predict what noise, really added to a tensor, does to the logits that onnxruntime computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from edgeres.quantize import sensitivity
from edgeres.quantize.channels import apply_factors
from edgeres.quantize.follow import Follower
from edgeres.quantize.sensitivity import sensitivities

Graph = Callable[..., onnx.ModelProto]
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]

ONE_LOGIT = """
net (float[N,3,4,4] x) => (float[N,1] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    s = Sigmoid (c)
    d = Conv (s, v)
    a = Add (d, c)
    p = GlobalAveragePool (a)
    f = Flatten (p)
    side = Relu (x)
    y = Gemm <transB = 1> (f, k)
}"""
SHAPES = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 1, 1), "k": (1, 4)}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def disturbed(model: onnx.ModelProto, tensor: str) -> Answer:
    """Return ``answer(x, noise)``: the logits where ``noise`` is added to a tensor, for whoever reads it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for node in graph.node:
        node.input[:] = [f"{tensor} disturbed" if name == tensor else name for name in node.input]
    made = [i for i, node in enumerate(graph.node) if tensor in node.output]
    place = made[0] + 1 if made else 0
    graph.node.insert(place, helper.make_node("Add", [tensor, "noise"], [f"{tensor} disturbed"]))
    graph.input.append(helper.make_tensor_value_info("noise", onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0].name
    return lambda x, noise: np.asarray(session.run(None, {first: x, "noise": noise})[0], np.float64)


def shape_of(follower: Follower, x: np.ndarray, tensor: str) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(follower.run(torch.from_numpy(x), [tensor])[1][tensor].shape)


@pytest.mark.parametrize("tensor", ["x", "c", "s", "a", "p", "f"])
def test_for_one_logit_it_is_the_sum_of_squared_finite_differences(tensor: str, graph: Graph) -> None:
    """Random signs do not matter there: squared, they are all 1."""
    model = graph(ONE_LOGIT, weights())
    follower = Follower(model, {})
    x = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    found = sensitivities(follower, x, [tensor], batch=2)[tensor]
    answer, (images, channels, *rest) = disturbed(model, tensor), shape_of(follower, x, tensor)
    wanted, small = np.zeros(channels), 1e-2
    for channel in range(channels):
        for position in np.ndindex(*rest):
            noise = np.zeros((1, channels, *rest), np.float32)
            noise[(0, channel, *position)] = small
            slopes = (answer(x, noise) - answer(x, -noise)) / (2 * small)
            wanted[channel] += np.square(slopes).sum() / images
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=1e-9)


def measured(answer: Answer, x: np.ndarray, noise: Callable[[], np.ndarray], times: int) -> float:
    """Return the power of the logits' noise, summed over the classes; the mean over images and repetitions."""
    clean = answer(x, np.zeros_like(noise()))
    return float(np.mean([np.square(answer(x, noise()) - clean).sum(1) for _ in range(times)]))


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_white_noise_on_a_tensor_reaches_the_logits_as_predicted(
    name: str, net: Callable[[str], Any], followed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "DRAWS", 16)  # for a sharper test: fewer draws are right on average
    found = followed(net(name).fp32)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((32, 3, 32, 32)).astype(np.float32)
    tensors = found.placement.tensors[::3]
    predicted = sensitivities(found.follower, x, tensors, batch=16)
    for tensor in tensors:
        shape, answer = shape_of(found.follower, x, tensor), disturbed(found.model, tensor)
        rest = [1] * (len(shape) - 2)
        # every channel with a power of its own: the sum of all of them is sharp
        powers = 1e-6 * 4 ** rng.uniform(-1, 1, shape[1])
        deviation = np.sqrt(powers).reshape(1, -1, *rest)
        power = measured(answer, x, lambda d=deviation, s=shape: (d * rng.standard_normal(s)).astype(np.float32), 8)
        assert power == pytest.approx(float(powers @ predicted[tensor]), rel=0.25), tensor


def test_noise_on_a_single_channel_reaches_the_logits_as_predicted(
    net: Callable[[str], Any], followed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "DRAWS", 16)
    found = followed(net("basic").fp32)
    rng = np.random.default_rng(6)
    x = rng.standard_normal((48, 3, 32, 32)).astype(np.float32)
    tensor = next(node.output[0] for node in found.model.graph.node if node.op_type == "Add")
    predicted = sensitivities(found.follower, x, [tensor], batch=16)[tensor]
    shape, answer = shape_of(found.follower, x, tensor), disturbed(found.model, tensor)
    ratios = []
    for channel in np.argsort(predicted)[[0, len(predicted) // 2, -1]]:

        def noise(channel: int = channel) -> np.ndarray:
            only = np.zeros(shape, np.float32)
            only[:, channel] = 1e-3 * rng.standard_normal((shape[0], *shape[2:]))
            return only

        ratios.append(measured(answer, x, noise, 8) / (1e-6 * predicted[channel]))
    assert predicted.max() > 2 * predicted.min()  # so that mixing channels up would show
    np.testing.assert_allclose(ratios, 1, atol=0.25)


def test_a_scaled_channel_matters_as_much_less_as_its_power_is_more(
    net: Callable[[str], Any], followed: Callable[..., Any]
) -> None:
    found = followed(net("basic").fp32)
    factors = np.where(found.groups.free, 2.0 ** np.random.default_rng(0).integers(-3, 4, len(found.groups)), 1.0)
    each = found.groups.factors(factors)
    x = np.random.default_rng(1).standard_normal((4, 3, 32, 32)).astype(np.float32)
    tensors = [tensor for tensor in found.placement.tensors if tensor in each]
    before = sensitivities(found.follower, x, tensors, batch=4)
    after = sensitivities(Follower(apply_factors(found.model, each), {}), x, tensors, batch=4)
    for tensor in tensors:
        np.testing.assert_allclose(after[tensor] * each[tensor] ** 2, before[tensor], rtol=1e-6)


def test_what_does_not_reach_the_logits_does_not_matter(graph: Graph) -> None:
    x = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    found = sensitivities(Follower(graph(ONE_LOGIT, weights()), {}), x, ["side", "c", "side"], batch=2)
    assert list(found) == ["side", "c"]
    np.testing.assert_array_equal(found["side"], np.zeros(3))
    assert (found["c"] > 0).all()


def test_it_repeats_and_tells_its_progress(net: Callable[[str], Any], followed: Callable[..., Any]) -> None:
    found, told = followed(net("basic").fp32), []
    x = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    one = sensitivities(found.follower, x, ["input"], 2, lambda done, total: told.append((done, total)))
    other = sensitivities(found.follower, x, ["input"], 2)
    np.testing.assert_array_equal(one["input"], other["input"])
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_no_tensors_have_no_sensitivities(graph: Graph) -> None:
    x = np.zeros((2, 3, 4, 4), np.float32)
    assert sensitivities(Follower(graph(ONE_LOGIT, weights()), {}), x, [], batch=2) == {}
