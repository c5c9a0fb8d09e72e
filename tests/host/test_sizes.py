"""How large a model's tensors get: known however long its weights are, and refused where they would fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeres.errors import ExportError
from edgeres.export import adopt_onnx

Graph = Callable[..., onnx.ModelProto]
HEAD = "net (float[N,3,8,8] x) => (float[N,4] y)"
FC = np.ones((3, 4), np.float32)


@pytest.fixture
def adopted(tmp_path: Path, graph: Graph) -> Callable[..., onnx.ModelProto]:
    def run(text: str, size: tuple[int, int] | None = None, **weights: np.ndarray) -> onnx.ModelProto:
        onnx.save(graph(text, weights), tmp_path / "theirs.onnx")
        return onnx.load_model_from_string(adopt_onnx(tmp_path / "theirs.onnx", size).content)

    return run


def test_views_beside_many_channels_are_free_of_the_batch(adopted: Callable[..., onnx.ModelProto]) -> None:
    channels = 2048  # of the last stage of ResNet-50: more than a shape has numbers
    model = adopted(
        """net (float[N,3,8,8] x) => (float[N,4] y) {
            c = Conv (x, w)
            n = BatchNormalization (c, one, one, one, one)
            p = GlobalAveragePool (n)
            s = Shape (p) b = Gather <axis = 0> (s, zero) bb = Unsqueeze (b, first)
            to = Concat <axis = 0> (bb, many) f = Reshape (p, to)
            k = Sigmoid (f)
            back = Concat <axis = 0> (bb, many, ones) k4 = Reshape (k, back)
            m = Mul (p, k4)
            g = Flatten (m) y = MatMul (g, fc)
        }""",
        w=np.ones((channels, 3, 1, 1), np.float32),
        one=np.ones(channels, np.float32),
        zero=np.array(0),
        first=np.array([0]),
        many=np.array([channels]),
        ones=np.array([1, 1]),
        fc=np.ones((channels, 4), np.float32),
    )
    kinds = {node.op_type for node in model.graph.node}
    assert kinds.isdisjoint(("Shape", "Gather", "Concat"))
    assert {"Flatten", "Reshape"} <= kinds


@pytest.mark.parametrize("unread", ["", "unread = Relu (long)"])
def test_long_lists_hide_no_large_tensor(unread: str, adopted: Callable[..., onnx.ModelProto]) -> None:
    text = f"{HEAD} {{ {unread} t = Shape (x) z = Sub (t, t) s = Add (z, huge) p = GlobalAveragePool (x)"
    text += " e = Expand (p, s) m = ReduceMax <keepdims = 0, axes = [2, 3]> (e) y = MatMul (m, fc) }"
    with pytest.raises(ExportError, match="numbers at a time"):
        adopted(text, fc=FC, huge=np.array([1, 3, 200_000, 200_000]), long=np.zeros(2048, np.float32))
