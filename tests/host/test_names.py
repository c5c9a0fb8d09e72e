"""What accuracy recovery puts into a graph gets names that nothing in it has yet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from edgeres.artifacts import Preprocessing
from edgeres.quantize.pixels import exact_pixels
from edgeres.quantize.recover import with_biases

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]

FRAMES = Preprocessing((6, 6), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.fixture
def squatted(graph: Graph) -> onnx.ModelProto:
    """Return a net in which the first names that recovery would choose are taken, by constants, tensors and a node."""
    rng = np.random.default_rng(1)
    weights = {"w": (4, 3, 3, 3), "c_bias": (4, 1, 1), "v": (5, 4), "x_pixels_per_unit": (4, 1, 1)}
    model = graph(
        """
        net (float[N,3,6,6] x) => (float[N,5] y) {
            a = Conv (x, w)
            x_pixels = Add (a, c_bias)
            m = Mul (x_pixels, x_pixels_per_unit)
            p = GlobalAveragePool (m)
            g_bias = Flatten (p)
            y = Gemm <transB = 1> (g_bias, v)
        }""",
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()},
    )
    for node, name in zip(model.graph.node, ("c", "sum", "x_pixels_2_Mul", "pool", "flat", "g"), strict=True):
        node.name = name
    return model


def test_what_recovery_adds_takes_no_name_that_is_taken(squatted: onnx.ModelProto, exact: Exact) -> None:
    x = np.random.default_rng(2).standard_normal((2, 3, 6, 6)).astype(np.float32)
    wanted = exact(squatted, x)
    biased = with_biases(squatted)
    onnx.checker.check_model(biased, full_check=True)
    assert [node.input[2] for node in biased.graph.node if node.op_type in ("Conv", "Gemm")] == ["c_bias_2", "g_bias_2"]
    np.testing.assert_array_equal(exact(biased, x), wanted)
    model, name = exact_pixels(biased, FRAMES)
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    assert name == "x_pixels_2"
    assert len(set(names)) == len(names)
    np.testing.assert_allclose(exact(model, x), wanted, rtol=1e-4, atol=1e-5)


def test_names_that_are_free_stay_as_they_were(graph: Graph) -> None:
    model = graph(
        "net (float[N,3,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w) }", {"w": np.ones((4, 3, 3, 3), "f4")}
    )
    model.graph.node[0].name = "c"
    model, name = exact_pixels(with_biases(model), FRAMES)
    assert name == "x_pixels"
    assert [node.name for node in model.graph.node] == ["x_pixels_Mul", "c"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "c_bias", "x_pixels_per_unit"]
