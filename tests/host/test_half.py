"""FP16 as a property of the file: float16 inside, float32 at both ends, close to FP32, refusals in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from edgeres.errors import LintError, QuantizationError
from edgeres.quantize import fp16_content, write_fp16

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]


def sqnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    wanted = wanted.astype(np.float64)
    return float(10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()))


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
def test_it_is_float16_inside_float32_outside_and_close(name: str, net: Callable[[str], Any], exact: Exact) -> None:
    found = net(name)
    before = found.fp32.SerializeToString(deterministic=True)
    half, layers = write_fp16(found.fp32, found.exported.modules)
    onnx.checker.check_model(half, full_check=True)
    assert found.fp32.SerializeToString(deterministic=True) == before
    found_types = types(half)
    ends = {"input", "logits"}
    assert {name: found_types[name] for name in ends} == dict.fromkeys(ends, TensorProto.FLOAT)
    assert {kind for name, kind in found_types.items() if name not in ends} == {TensorProto.FLOAT16}
    assert {tensor.data_type for tensor in half.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32)
        got = exact(half, x)
        assert got.dtype == np.float32
        assert sqnr_db(exact(found.fp32, x), got) > 50
        assert (got != exact(found.fp32, x)).any()
    assert [(layer.node, layer.precision) for layer in layers] == [(n.name, "fp16") for n in found.fp32.graph.node]
    assert all(layer.module == found.exported.modules[layer.node] for layer in layers)


def test_constants_of_operators_become_float16(graph: Graph, exact: Exact) -> None:
    body = """{
        p = Pad (x, pads, value)
        c = Clip (p, low, high)
        k = Constant <value = float[1] {0.5}> ()
        s = Shape (c)
        o = ConstantOfShape <value = float[1] {0.25}> (s)
        m = Mul (c, k)
        a = Add (m, o)
        i = Cast <to = 6> (a)
        f = Cast <to = 1> (i)
        b = Add (a, f)
        y = Flatten (b)
    }"""
    constants: dict[str, Any] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "value": np.float32(0.75),
        "low": np.float32(-1),
        "high": np.float32(6),
    }
    model = graph(f"net (float[N,3,4,4] x) => (float[N,108] y) {body}", constants)
    half, _ = write_fp16(model, {})
    onnx.checker.check_model(half, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32) * 4
    assert sqnr_db(exact(model, x), exact(half, x)) > 50
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert kinds == {
        "pads": TensorProto.INT64,
        "value": TensorProto.FLOAT16,
        "low": TensorProto.FLOAT16,
        "high": TensorProto.FLOAT16,
    }


def test_scales_of_a_resize_stay_float32(graph: Graph, exact: Exact) -> None:
    body = '{ r = Resize <mode = "nearest"> (x, , scales) c = Conv (r, w) y = Flatten (c) }'
    weights: dict[str, Any] = {"scales": np.array([1, 1, 2, 2], np.float32), "w": np.ones((1, 3, 3, 3), np.float32)}
    model = graph(f"net (float[N,3,4,4] x) => (float[N,36] y) {body}", weights)
    half, _ = write_fp16(model, {})
    onnx.checker.check_model(half, full_check=True)
    assert {t.name: t.data_type for t in half.graph.initializer} == {
        "scales": TensorProto.FLOAT,
        "w": TensorProto.FLOAT16,
    }
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    assert sqnr_db(exact(model, x), exact(half, x)) > 50


def test_an_output_that_is_read_inside_keeps_its_readers(graph: Graph, exact: Exact) -> None:
    model = graph("net (float[N,4] x) => (float[N,4] a, float[N,4] b) { a = Sqrt (x) b = Exp (a) }")
    half, _ = write_fp16(model, {})
    onnx.checker.check_model(half, full_check=True)
    x = np.full((2, 4), 2.0, np.float32)
    np.testing.assert_allclose(exact(half, x), np.sqrt(x), rtol=1e-3)


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf")])
def test_weights_beyond_float16_are_refused_by_name(value: float, graph: Graph) -> None:
    weights = {"fine": np.full((2, 4), 65504, np.float32), "big": np.array([[1, 1, 1, value]] * 2, np.float32)}
    body = "{ a = Gemm <transB = 1> (x, fine) b = Gemm <transB = 1> (x, big) y = Add (a, b) }"
    text = f"net (float[N,4] x) => (float[N,2] y) {body}"
    with pytest.raises(QuantizationError, match=r"^big: beyond float16's largest number, 65504"):
        write_fp16(graph(text, weights), {})


def test_numbers_inside_nodes_beyond_float16_are_refused_too(graph: Graph) -> None:
    text = "net (float[N,4] x) => (float[N,4] y) { k = Constant <value = float {100000.0}> () y = Mul (x, k) }"
    with pytest.raises(QuantizationError, match=r"^Constant_0\.value: beyond float16's largest number"):
        write_fp16(graph(text), {})


def test_content_is_that_of_the_file_and_repeats(net: Callable[[str], Any], tmp_path: Path) -> None:
    found = net("cifar")
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(found.exported.content)
    content, layers = fp16_content(path, found.exported.modules)
    assert content == fp16_content(path, found.exported.modules)[0]
    model = onnx.load_model_from_string(content)
    assert len(layers) == len(model.graph.node) - 2
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert weights["conv1.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("domain", "opset", "words"), [("their.domain", 17, "of domain their.domain"), ("", 18, "opset 18")]
)
def test_what_tensorrt_does_not_read_is_refused(
    domain: str, opset: int, words: str, graph: Graph, tmp_path: Path
) -> None:
    model = graph("net (float[N,4] x) => (float[N,4] y) { a = Exp (x) y = Relu (a) }", opset=opset)
    if domain:
        model.graph.node[0].domain = domain
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    path = tmp_path / "model.fp32.onnx"
    onnx.save(model, path)
    with pytest.raises(LintError, match=rf"model\.fp16\.onnx: .*{words}"):
        fp16_content(path, {})
