"""What is computed of a graph beforehand: what exporters leave, and nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeres.export import constants
from edgeres.export.constants import fold_constants

Graph = Callable[..., onnx.ModelProto]
HEAD = "net (float[N,3,8,8] x) => (float[N,3,8,8] y)"
RNG = np.random.default_rng(0)


def left(model: onnx.ModelProto) -> list[str]:
    fold_constants(model)
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "body",
    [
        "e = Erf (a) r = ReduceMax <keepdims = 0> (e)",
        "m = MatMul (a, b) r = ReduceSum <keepdims = 0> (m)",
        "t = Transpose (a) c = Concat <axis = 0> (t, b) r = ReduceMean <keepdims = 0> (c)",
        "s = Shape (a) f = Cast <to = 1> (s) r = ReduceProd <keepdims = 0> (f)",
        "n = NonZero (a) f = Cast <to = 1> (n) r = ReduceMax <keepdims = 0> (f)",
        "g = ScatterND (a, i, u) r = ReduceMin <keepdims = 0> (g)",
    ],
)
def test_what_is_quick_is_computed(body: str, graph: Graph) -> None:
    weights = {
        **{name: RNG.standard_normal((4, 4)).astype(np.float32) for name in "ab"},
        "i": np.array([[1, 2]]),
        "u": np.array([-9], np.float32),
    }
    model = graph(f"{HEAD} {{ {body} y = Mul (x, r) }}", weights)
    x = np.ones((1, 3, 8, 8), np.float32)
    wanted = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert left(model) == ["Mul"]
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, {"x": x})[0], wanted, rtol=1e-6)


def test_what_python_computes_slowly_stays(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(constants, "ReferenceEvaluator")
    weights = {"i": np.zeros((1, 1, 96, 96), np.float32), "g": np.zeros((1, 96, 96, 2), np.float32)}
    assert (
        left(graph(f"{HEAD} {{ r = GridSample (i, g) k = ReduceMax (r) y = Add (x, k) }}", weights))[0] == "GridSample"
    )
    conv = {"i": np.zeros((1, 1, 96, 96), np.float32), "w": np.zeros((1, 1, 3, 3), np.float32)}
    assert left(graph(f"{HEAD} {{ r = Conv (i, w) k = ReduceMax (r) y = Add (x, k) }}", conv))[0] == "Conv"


@pytest.mark.parametrize(
    "maker", ["r = ReduceMax (a)", "r = Erf (a)", "r = MatMul (a, a)", "r = Relu (a)", "r = ScatterND (a, i, u)"]
)
def test_long_work_stays(maker: str, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "WORK_PER_STORED", 0)
    many = {"i": np.zeros((100, 2), np.int64), "u": np.zeros(100, np.float32)}
    text = f"{HEAD} {{ {maker} k = ReduceMax (r) y = Add (x, k) }}"
    model = graph(text, {"a": np.ones((64, 64), np.float32), **many})
    kind = model.graph.node[0].op_type
    for work, stays in ((1 << 12, True), (1 << 22, False)):
        monkeypatch.setattr(constants, "WORK", work)
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        assert (kind in left(copy)) == stays, work


def test_work_is_summed(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "WORK_PER_STORED", 0)
    monkeypatch.setattr(constants, "WORK", 10_000)
    nodes = [helper.make_node("Relu", ["a"], [f"r{number}"]) for number in range(4)]
    model = graph(f"{HEAD} {{ y = Add (x, a) }}", {"a": np.ones((8, 8, 8), np.float32)[:1]}, valid=False)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(2000, np.float32), "a"))
    model.graph.node.extend(nodes)
    assert left(model) == ["Add", "Relu", "Relu"]


def test_a_lack_of_memory_is_told(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, model: onnx.ModelProto) -> None:
            raise MemoryError

    monkeypatch.setattr(constants, "ReferenceEvaluator", Full)
    with pytest.raises(MemoryError):
        fold_constants(graph(f"{HEAD} {{ r = Relu (a) y = Add (x, r) }}", {"a": np.ones((1, 8), np.float32)}))
