"""How large a model's tensors get: known however long its weights are, and refused where they would fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeres.errors import ExportError
from edgeres.export import adopt_onnx, sizes
from edgeres.export.sizes import check_sizes

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


def test_what_only_folding_knows_is_checked_too(adopted: Callable[..., onnx.ModelProto]) -> None:
    text = f"{HEAD} {{ n = NonZero (some) t = Transpose (n) k = ReduceSum <keepdims = 0> (t, first)"
    text += " s = Mul (k, huge) p = GlobalAveragePool (x) e = Expand (p, s)"
    text += " m = ReduceMax <keepdims = 0, axes = [2, 3]> (e) y = MatMul (m, fc) }"
    weights = {"some": np.array([0, 1], np.float32), "first": np.array([0]), "huge": np.array([1, 3, 200_000, 200_000])}
    with pytest.raises(ExportError, match="numbers at a time"):
        adopted(text, fc=FC, **weights)


def bottlenecks(sides: str) -> str:
    """Return the beginning of a ResNet-50, where its tensors are largest."""
    body = "c = Conv <strides = [2, 2], pads = [3, 3, 3, 3]> (x, stem) n = BatchNormalization (c, o, o, o, o)"
    body += " r = Relu (n) a0 = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r)"
    body += " b0 = Conv (a0, wide)"
    for at in range(3):
        body += f" d{at} = Conv (b{at}, narrow) e{at} = Relu (d{at}) f{at} = Conv (e{at}, wide)"
        body += (
            f" g{at} = BatchNormalization (f{at}, oo, oo, oo, oo) h{at} = Add (g{at}, b{at}) b{at + 1} = Relu (h{at})"
        )
    return f"net (float[N,3,{sides}] x) => (float[N,256] y) {{ {body} p = GlobalAveragePool (b3) y = Flatten (p) }}"


def test_a_resnet_takes_a_frame_of_4k_and_no_larger_ones(graph: Graph) -> None:
    shapes = {"stem": (64, 3, 7, 7), "wide": (256, 64, 1, 1), "narrow": (64, 256, 1, 1), "o": (64,), "oo": (256,)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    check_sizes(graph(bottlenecks("2160,3840"), weights), None, "it")
    check_sizes(graph(bottlenecks("h,w"), weights), (2160, 3840), "it")
    with pytest.raises(ExportError, match="numbers at a time"):
        check_sizes(graph(bottlenecks("8192,8192"), weights), None, "it")


def test_what_is_written_over_its_input_counts_once(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "{ a = Sin (x) b = Relu (a) c = Add (b, b) y = Flatten (c) }"
    model = graph(f"net (float[1,3,8,8] x) => (float[1,192] y) {body}")
    monkeypatch.setattr(sizes, "LARGEST", 2 * 192)
    check_sizes(model, None, "it")
    monkeypatch.setattr(sizes, "LARGEST", 2 * 192 - 1)
    with pytest.raises(ExportError, match="hold 384 numbers"):
        check_sizes(model, None, "it")
    read_twice = graph(f"net (float[1,3,8,8] x) => (float[1,192] y) {body.replace('(b, b)', '(a, b)')}")
    monkeypatch.setattr(sizes, "LARGEST", 2 * 192)
    with pytest.raises(ExportError, match="hold 576 numbers"):
        check_sizes(read_twice, None, "it")
