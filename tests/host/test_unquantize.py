"""Files that are quantized already: read, taken apart, and built again from their own ranges.

ONNX Runtime's files are made here by its own quantizer. Those of modelopt and NNCF are written as these tools write
them: modelopt symmetric, in half precision, weights as int8 with a DQ alone or as float with both; NNCF a pair named
after its tensor in front of every layer, uint8 behind ReLUs, int8 elsewhere, float weights with both.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import edgeres
from edgeres.artifacts import FileGrid, Imported, TensorRange
from edgeres.bundle import verify
from edgeres.errors import ExportError
from edgeres.export import adopt_onnx, answers_of
from edgeres.export import probe as probing
from edgeres.export.unquantize import unquantize
from edgeres.imported import amax_of, range_notes
from edgeres.inspection import grouped, inspect_bundle, inspect_file
from edgeres.quantize import lint
from edgeres.quantize.graph import Graph as Graphs
from edgeres.quantize.pairs import kind_of
from edgeres.recipe import dossier

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
RNG = np.random.default_rng(7)
X = RNG.uniform(-1, 1, (6, 3, 8, 8)).astype(np.float32)
W1 = (0.3 * RNG.standard_normal((4, 3, 3, 3))).astype(np.float32)
W2 = (0.3 * RNG.standard_normal((4, 4, 3, 3))).astype(np.float32)
FC = (0.3 * RNG.standard_normal((5, 4))).astype(np.float32)
B1 = (0.1 * RNG.standard_normal(4)).astype(np.float32)


def steps(weights: np.ndarray) -> np.ndarray:
    """Return what reaches each output channel's largest magnitude in 127 steps: the formula of all these tools."""
    return np.asarray(np.abs(weights).reshape(len(weights), -1).max(1) / 127, np.float32)


def rounded(weights: np.ndarray) -> np.ndarray:
    scale = steps(weights).reshape(-1, *[1] * (weights.ndim - 1))
    return np.clip(np.rint(weights / scale), -128, 127).astype(np.int8)


MODELOPT = """net (float[N,3,8,8] x) => (float[N,5] y) {
    h = Cast <to = 10> (x)
    hq = QuantizeLinear (h, sx, z)  hd = DequantizeLinear (hq, sx, z)
    w1 = DequantizeLinear <axis = 0> (q1, s1, z4)
    c = Conv <pads = [1, 1, 1, 1]> (hd, w1, b1)
    r = Relu (c)
    rq = QuantizeLinear (r, sr, z)  rd = DequantizeLinear (rq, sr, z)
    w2q = QuantizeLinear <axis = 0> (f2, s2, z4)  w2 = DequantizeLinear <axis = 0> (w2q, s2, z4)
    d = Conv <pads = [1, 1, 1, 1]> (rd, w2)
    a = Add (d, rd)
    t = Relu (a)
    tq = QuantizeLinear (t, st, z)  td = DequantizeLinear (tq, st, z)
    p = GlobalAveragePool (td)
    pq = QuantizeLinear (p, sp, z)  pd = DequantizeLinear (pq, sp, z)
    g = Flatten (pd)
    k = DequantizeLinear <axis = 0> (qk, sk, z5)
    o = Gemm <transB = 1> (g, k)
    y = Cast <to = 1> (o)
}"""


def modelopt() -> tuple[str, dict[str, np.ndarray]]:
    """Return a residual net as modelopt writes it: scales, biases and float weights in half precision, opset 19."""
    half = {"sx": 1 / 127, "sr": 0.02, "st": 0.03, "sp": 0.02, "s1": steps(W1), "s2": steps(W2), "sk": steps(FC)}
    values = {name: np.asarray(value, np.float16) for name, value in half.items()}
    values.update(b1=B1.astype(np.float16), f2=W2.astype(np.float16))
    values.update(q1=rounded(W1), qk=rounded(FC), z=np.int8(0), z4=np.zeros(4, np.int8), z5=np.zeros(5, np.int8))
    return MODELOPT, values


NNCF = """net (float[N,3,8,8] x) => (float[N,5] y) {
    q_output_x_0 = QuantizeLinear (x, sx, z)
    dq_output_x_0 = DequantizeLinear (q_output_x_0, sx, z)
    q_output_w1_0 = QuantizeLinear <axis = 0> (w1, s1, z4)
    dq_output_w1_0 = DequantizeLinear <axis = 0> (q_output_w1_0, s1, z4)
    c = Conv <pads = [1, 1, 1, 1]> (dq_output_x_0, dq_output_w1_0, b1)
    r = Relu (c)
    q_output_r_0 = QuantizeLinear (r, sr, u)
    dq_output_r_0 = DequantizeLinear (q_output_r_0, sr, u)
    q_output_w2_0 = QuantizeLinear <axis = 0> (w2, s2, z4)
    dq_output_w2_0 = DequantizeLinear <axis = 0> (q_output_w2_0, s2, z4)
    d = Conv <pads = [1, 1, 1, 1]> (dq_output_r_0, dq_output_w2_0)
    q_output_d_0 = QuantizeLinear (d, sd, ud)
    dq_output_d_0 = DequantizeLinear (q_output_d_0, sd, ud)
    a = Add (dq_output_d_0, dq_output_r_0)
    t = Relu (a)
    q_output_t_0 = QuantizeLinear (t, st, u)
    dq_output_t_0 = DequantizeLinear (q_output_t_0, st, u)
    p = GlobalAveragePool (dq_output_t_0)
    g = Flatten (p)
    y = Gemm <transB = 1> (g, fc)
}"""


def nncf() -> tuple[str, dict[str, np.ndarray]]:
    """Return a residual net as NNCF writes it: uint8 at ReLUs, one zero point elsewhere, the classifier left out."""
    values: dict[str, Any] = {"sx": 1 / 127, "sr": 0.01, "st": 0.015, "sd": 0.02, "s1": steps(W1), "s2": steps(W2)}
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    values.update(w1=W1, w2=W2, fc=FC, b1=B1, z=np.int8(0), u=np.uint8(0), ud=np.uint8(117), z4=np.zeros(4, np.int8))
    return NNCF, values


@pytest.fixture
def save(tmp_path: Path, graph: Graph) -> Callable[..., Path]:
    """Return ``save(text, weights, opset)``: the path of such a file."""

    def write(text: str, weights: dict[str, np.ndarray], opset: int = 17) -> Path:
        path = tmp_path / "theirs.onnx"
        onnx.save(graph(text, weights, opset), path)
        return path

    return write


def described(values: np.ndarray) -> TensorRange:
    low, high = float(values.min()), float(values.max())
    return TensorRange(1.0, 1 / 127, "imported", low, high, values.size, 0.0, 0.0, None)


def test_modelopts_file_is_taken_apart(save: Callable[..., Path], exact: Exact, graph: Graph) -> None:
    text, values = modelopt()
    found = adopt_onnx(save(text, values, 19), None)
    model = onnx.load_model_from_string(found.content)
    assert [node.op_type for node in model.graph.node] == (
        ["Conv", "Relu", "Conv", "Add", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Identity"]
    )
    own = found.imported
    assert own is not None
    assert own.activations["r"] == FileGrid(float(np.float16(0.02)), -128, 127)
    assert own.activations["g"] == own.activations["p"]
    assert own.float_layers == own.changes == ()
    assert sorted(own.weights.values()) == sorted(tuple(map(float, values[name])) for name in ("s1", "s2", "sk"))
    plain = {"w1": rounded(W1) * values["s1"].astype(np.float32).reshape(-1, 1, 1, 1), "b1": values["b1"],
             "w2": values["f2"], "k": rounded(FC) * values["sk"].astype(np.float32).reshape(-1, 1)}  # fmt: skip
    body = """net (float[N,3,8,8] x) => (float[N,5] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (c)
        d = Conv <pads = [1, 1, 1, 1]> (r, w2) a = Add (d, r) t = Relu (a) p = GlobalAveragePool (t) g = Flatten (p)
        y = Gemm <transB = 1> (g, k) }"""
    wanted = exact(graph(body, {name: value.astype(np.float32) for name, value in plain.items()}), X)
    np.testing.assert_allclose(exact(model, X), wanted, rtol=1e-4, atol=1e-5)


def test_nncfs_file_is_taken_apart(save: Callable[..., Path]) -> None:
    text, values = nncf()
    found = adopt_onnx(save(text, values, 13), None)
    own = found.imported
    assert own is not None
    assert own.tool == "NNCF"
    assert own.activations["r"] == FileGrid(float(np.float32(0.01)), 0, 255)
    assert own.activations["d"] == FileGrid(float(np.float32(0.02)), -117, 138)
    assert own.weights == {"w1": tuple(map(float, values["s1"])), "w2": tuple(map(float, values["s2"]))}
    (classifier,) = [n for n in onnx.load_model_from_string(found.content).graph.node if n.op_type == "Gemm"]
    assert own.float_layers == (classifier.name,)


def test_ranges_are_said_as_tensorrt_reads_them() -> None:
    def one(scale: float, low: int, high: int, shift: bool) -> tuple[float, bool]:
        own = Imported("", {"t": FileGrid(scale, low, high)}, {}, (), ())
        given, shifted = amax_of(own, ["t", "other"], {"t"} if shift else set())
        return given["t"], "t" in shifted

    assert one(0.5, -128, 127, True) == (127 * 0.5, False)
    assert one(0.5, -127, 127, True) == (127 * 0.5, False)
    assert one(0.5, 0, 255, True) == (255 * 0.5, True)
    assert one(0.5, 0, 255, False) == (255 * 0.5, False)
    assert one(0.5, -100, 155, True) == (155 * 0.5, False)
    assert one(0.5, -200, 55, False) == (200 * 0.5, False)
    assert one(0.5, -8, 7, True) == (8 * 0.5, False)  # int4: steps that int8 can halve, not a reach that it lacks
    assert one(0.01, -32768, 32767, False) == (32768 * 0.01, False)
    own = Imported("", {"t": FileGrid(0.5, 0, 255)}, {}, (), ())
    told = range_notes(own, {"t": described(X), "u": described(X)})
    assert re.search(r"1 range of the file .*: t \(step 0\.5 to 0\.00787\)", told[0])
    assert told[1] == "the file has no range for u; calibrated here"


@pytest.mark.parametrize(
    ("low", "scale", "gain", "op"),
    [(0, 0.02, 1, "Relu"), (0, 6 / 255, 9, "Clip"), (-128, 0.02, 1, None)],
    ids=["ReLU", "ReLU6", "none"],
)
def test_what_a_q_cuts_off_comes_back(
    low: int, scale: float, gain: int, op: str | None, save: Callable[..., Path], exact: Exact
) -> None:
    """ONNX Runtime's quantizer drops a ReLU in front of a Q that cuts at zero; the float network needs it."""
    text = """net (float[N,3,8,8] x) => (float[N,n] y) {
        c = Conv (x, w) q = QuantizeLinear (c, s, z) d = DequantizeLinear (q, s, z) y = Flatten (d) }"""
    path = save(text, {"w": gain * W1, "s": np.float32(scale), "z": np.int8(-128 - low)})
    model = onnx.load_model_from_string(adopt_onnx(path, None).content)
    assert [node.op_type for node in model.graph.node] == ["Conv", *([op] if op else []), "Flatten"]
    theirs, ours = exact(onnx.load(path), X), exact(model, X)
    inside = (ours > 0) & (ours < (255 + low) * scale)
    assert inside.any()
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=0.51 * scale)
    if op:
        assert ours.min() == theirs.min() == 0
    if op == "Clip":
        np.testing.assert_allclose(ours.max(), theirs.max(), atol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 6), (-0.7, 0.9)])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=["uint8", "int8"])
def test_activations_that_onnx_runtime_drops_come_back(
    low: float, high: float, kind: QuantType, graph: Graph, exact: Exact, tmp_path: Path
) -> None:
    text = """net (float[N,3,8,8] input) => (float[N,4] y) { a = Conv <pads = [1, 1, 1, 1]> (input, w, b1)
        c = Clip (a, low, high) d = Conv <pads = [1, 1, 1, 1]> (c, w2) p = GlobalAveragePool (d) y = Flatten (p) }"""
    values = {"w": 6 * W1, "b1": B1, "w2": W2, "low": np.float32(low), "high": np.float32(high)}
    net, path = graph(text, values), tmp_path / "theirs.onnx"
    onnx.save(net, tmp_path / "fp32.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantizer's own
        quantize_static(tmp_path / "fp32.onnx", path, Digits(X), quant_format=QuantFormat.QDQ, activation_type=kind)
    assert "Clip" not in {node.op_type for node in onnx.load(path).graph.node}
    found = adopt_onnx(path, None)
    assert sqnr_db(exact(net, X), exact(onnx.load_model_from_string(found.content), X)) > 25
    assert any("answers like the file" in note for note in found.notes)


def test_a_network_that_answers_unlike_its_file_is_refused(save: Callable[..., Path]) -> None:
    """A Q that cuts off all that reaches it is no activation of any net."""
    text = """net (float[N,3,8,8] x) => (float[N,n] y) { e = Exp (x) t = Mul (e, ten)
        q = QuantizeLinear (t, s, z) d = DequantizeLinear (q, s, z) y = Flatten (d) }"""
    path = save(text, {"ten": np.float32(10), "s": np.float32(0.001), "z": np.int8(0)})
    with pytest.raises(ExportError, match=r"does not answer like the file itself \(SQNR -.*Start from the FP32 model"):
        adopt_onnx(path, None)


def test_a_file_that_does_not_run_as_it_is_says_so(monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]) -> None:
    def broken(content: bytes | str, optimized: bool = True) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(probing, "open_session", broken)
    found = adopt_onnx(save(*nncf()), None)
    assert any("NOT COMPARED" in note and "no kernel" in note for note in found.notes)


def test_a_relu_that_is_there_is_not_written_twice(save: Callable[..., Path]) -> None:
    text, values = nncf()
    model = onnx.load_model_from_string(adopt_onnx(save(text, values), None).content)
    assert sum(node.op_type in ("Relu", "Clip") for node in model.graph.node) == 2


def test_a_batch_norm_behind_quantized_weights_scales_their_steps(save: Callable[..., Path], exact: Exact) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4] y) {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        w = DequantizeLinear <axis = 0> (q1, s1, z4)
        c = Conv (d, w) n = BatchNormalization (c, g, b, m, v) r = Relu (n)
        p = GlobalAveragePool (r) y = Flatten (p) }"""
    gamma, variance = np.array([2, -0.5, 1, 3], np.float32), np.array([1, 4, 0.25, 1], np.float32)
    values = {"q1": rounded(W1), "s1": steps(W1), "z4": np.zeros(4, np.int8), "s": np.float32(1 / 127), "z": np.int8(0)}
    values.update(g=gamma, b=B1, m=B1, v=variance)
    found = adopt_onnx(save(text, values), None)
    own = found.imported
    assert own is not None
    (name,) = own.weights
    np.testing.assert_allclose(own.weights[name], steps(W1) * np.abs(gamma / np.sqrt(variance + 1e-5)), rtol=1e-5)
    model = onnx.load_model_from_string(found.content)
    stored = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
    on_grid = stored / np.array(own.weights[name], np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(on_grid, np.rint(on_grid), atol=1e-3)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("q = QuantizeLinear (x, s, z) c = Cast <to = 1> (q) y = Flatten (c)", "Cast_1 computes with the integers q"),
        ("q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, t, z) y = Flatten (d)", "another scale .* than its Q"),
        ("m = ReduceMax <keepdims = 0> (x) q = QuantizeLinear (x, m, z) d = DequantizeLinear (q, m, z) y = Flatten (d)",
         "QuantizeLinear_1: its scale or zero point is computed"),
        ("q = QuantizeLinear (x, o, z) d = DequantizeLinear (q, o, z) y = Flatten (d)", "a scale is zero"),
        ("c = Cast <to = 3> (x) d = DequantizeLinear (c, s, z) y = Flatten (d)", "reads c, which nothing quantizes"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused_with_the_node(body: str, words: str, save: Callable[..., Path]) -> None:
    values = {"s": np.float32(0.1), "t": np.float32(0.2), "o": np.float32(0), "z": np.int8(0)}
    with pytest.raises(ExportError, match=words) as caught:
        adopt_onnx(save(f"net (float[N,3,8,8] x) => (float[N,192] y) {{ {body} }}", values), None)
    assert "Start from the FP32 model" in str(caught.value)


def test_fp8_in_tensorrts_own_domain_is_refused(save: Callable[..., Path], graph: Graph, tmp_path: Path) -> None:
    model = graph("net (float[N,3,8,8] x) => (float[N,192] y) { y = Flatten (x) }")
    model.graph.node.insert(0, helper.make_node("TRT_FP8QuantizeLinear", ["x", "x"], ["q"], domain="trt"))
    model.opset_import.append(helper.make_opsetid("trt", 1))
    onnx.save(model, tmp_path / "fp8.onnx")
    with pytest.raises(ExportError, match="trt::TRT_FP8QuantizeLinear"):
        adopt_onnx(tmp_path / "fp8.onnx", None)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("int16", None), ("per channel", "no range of int8 per tensor fits x .per channel"), ("blocks", "rounded anew")],
)
def test_grids_that_int8_cannot_say(kind: str, words: str | None, save: Callable[..., Path], exact: Exact) -> None:
    values: dict[str, Any] = {"s": np.float32(0.001), "z": np.int16(0), "fc": FC}
    weights, head = "", ""
    if kind == "per channel":
        values.update(s=np.array([0.01, 0.02, 0.03], np.float32), z=np.zeros(3, np.int8))
    if kind == "blocks":
        values = {"s": np.float32(0.01), "z": np.int8(0), "q": rounded(FC), "sk": np.full((5, 2), 0.02, np.float32)}
        weights, head = "fc = DequantizeLinear <axis = 1, block_size = 2> (q, sk)", ""
    text = f"""net (float[N,3,8,8] x) => (float[N,5] y) {{ {weights} {head}
        qx = QuantizeLinear (x, s, z) d = DequantizeLinear (qx, s, z)
        c = Slice (d, zero, four, one) i = ReduceMean <keepdims = 0> (c, plane)
        e = Concat <axis = 1> (i, i) j = Slice (e, zero, four, one) y = Gemm <transB = 1> (j, fc) }}"""
    values.update(zero=np.array([0]), four=np.array([4]), one=np.array([1]), plane=np.array([2, 3]))
    found = adopt_onnx(save(text, values, 21), None)
    own = found.imported
    assert own is not None
    if words is None:
        assert own.activations["x"] == FileGrid(float(np.float32(0.001)), -32768, 32767)
    else:
        assert re.search(words, " ".join(own.changes))
    if kind == "blocks":
        model = onnx.load_model_from_string(found.content)
        mean = X.mean((2, 3))
        wanted = np.concatenate([mean, mean[:, :1]], 1) @ (rounded(FC) * np.float32(0.02)).T
        np.testing.assert_allclose(exact(model, X), wanted, rtol=1e-4, atol=1e-5)


def test_of_two_grids_on_one_tensor_the_one_that_reaches_furthest_is_kept(save: Callable[..., Path]) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4] y) { r = Relu (x)
        q = QuantizeLinear (r, s, z) d = DequantizeLinear (q, s, z)
        q2 = QuantizeLinear (r, s2, z) d2 = DequantizeLinear (q2, s2, z)
        w = DequantizeLinear <axis = 0> (q1, s1, z4) c = Conv (d, w) e = Conv (d2, w)
        a = Add (c, e) p = GlobalAveragePool (a) y = Flatten (p) }"""
    values = {"q1": rounded(W1), "s1": steps(W1), "z4": np.zeros(4, np.int8), "z": np.int8(0)}
    for first, second in ((0.02, 0.01), (0.01, 0.02)):
        path = save(text, {**values, "s": np.float32(first), "s2": np.float32(second)})
        own = adopt_onnx(path, None).imported
        assert own is not None
        assert own.activations["r"].scale == np.float32(0.02)
        assert f"r (steps {first} and {second})" in " ".join(own.changes)
        assert inspect_file(path)["ranges"]["r"]["scale"] == np.float32(0.02)


def test_of_two_steps_on_shared_weights_those_that_reach_furthest_are_kept(save: Callable[..., Path]) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4] y) {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        v = QuantizeLinear (w, s1, z) v1 = DequantizeLinear (v, s1, z)
        u = QuantizeLinear (w, s2, z) u1 = DequantizeLinear (u, s2, z)
        c = Conv (d, u1) e = Conv (d, v1) a = Add (c, e) p = GlobalAveragePool (a) y = Flatten (p) }"""
    values = {"w": W1, "s": np.float32(1 / 64), "s1": np.float32(0.01), "s2": np.float32(0.02), "z": np.int8(0)}
    own = adopt_onnx(save(text, values), None).imported
    assert own is not None
    assert own.weights == {"w": (float(np.float32(0.02)),) * 4}
    assert "w (steps up to 0.02 and 0.01)" in " ".join(own.changes)


@pytest.mark.parametrize(
    "turned",
    [
        "u = QuantizeLinear <axis = -2> (w, k, z) t = Transpose <perm = [1, 0]> (u) "
        "v = DequantizeLinear <axis = -1> (t, k, z)",
        "u = QuantizeLinear <axis = -2> (w, k, z) t = DequantizeLinear <axis = -2> (u, k, z) v = Transpose (t)",
    ],
    ids=["integers", "numbers"],
)
def test_turned_weights_keep_their_steps(turned: str, save: Callable[..., Path]) -> None:
    text = f"""net (float[N,3,8,8] x) => (float[N,4] y) {{ p = GlobalAveragePool (x) g = Flatten (p)
        q = QuantizeLinear (g, s, z0) d = DequantizeLinear (q, s, z0) {turned} y = MatMul (d, v) }}"""
    values = {"w": W1[:, :, 0, 0], "k": steps(W1), "z": np.zeros(4, np.int8), "s": np.float32(1 / 32), "z0": np.int8(0)}
    own = adopt_onnx(save(text, values), None).imported
    assert own is not None
    assert list(own.weights.values()) == [tuple(map(float, values["k"]))]
    assert own.float_layers == ()


@pytest.mark.parametrize("between", ["Pad (d, pads)", "Relu (d)", "Clip (d, low)", "Concat <axis = 1> (d, d)"])
def test_layers_behind_what_keeps_a_grid_are_quantized(between: str, save: Callable[..., Path]) -> None:
    text = f"""net (float[N,3,8,8] x) => (float[N,4] y) {{
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) m = {between}
        v = DequantizeLinear (w, s, z) c = Conv (m, v) p = GlobalAveragePool (c) y = Flatten (p) }}"""
    weights = rounded(np.concatenate([W1, W1], 1) if "Concat" in between else W1)
    values = {"s": np.float32(1 / 64), "z": np.int8(0), "w": weights, "low": np.float32(-1)}
    own = adopt_onnx(save(text, {**values, "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}), None).imported
    assert own is not None
    assert own.float_layers == ()
    assert own.activations["m"] == own.activations["x"]


@pytest.mark.parametrize("order", ["turned first", "quantized first", "open"])
def test_images_with_channels_last_keep_their_range_and_get_no_relu(order: str, save: Callable[..., Path]) -> None:
    size, turn = ("h, w0, c" if order == "open" else "8, 8, 3"), "Transpose <perm = [0, 3, 1, 2]>"
    pair = "q = QuantizeLinear ({}, s, u) d = DequantizeLinear (q, s, u)"
    head = f"t = {turn} (x) {pair.format('t')}" if order != "quantized first" else f"{pair.format('x')} t = {turn} (d)"
    text = f"""net (float[N,{size}] x) => (float[N,4] y) {{ {head} v = DequantizeLinear (w, s, z)
        c = Conv ({"t" if order == "quantized first" else "d"}, v) p = GlobalAveragePool (c) y = Flatten (p) }}"""
    path = save(text, {"s": np.float32(1 / 255), "u": np.uint8(0), "z": np.int8(0), "w": rounded(W1)})
    if order == "open":
        model = onnx.load(path)
        prepared = unquantize(model, "theirs")
        assert not prepared.relus
        return
    found = adopt_onnx(path, None)
    assert found.imported is not None
    assert found.imported.activations["x"] == FileGrid(float(np.float32(1 / 255)), 0, 255)
    kinds = [node.op_type for node in onnx.load_model_from_string(found.content).graph.node]
    assert kinds == ["Conv", "GlobalAveragePool", "Flatten"]


def test_a_cut_at_zero_in_every_channel_is_a_relu(save: Callable[..., Path], exact: Exact) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,n] y) { c = Conv (x, w) q = QuantizeLinear <axis = 1> (c, s, z)
        d = DequantizeLinear <axis = 1> (q, s, z) y = Flatten (d) }"""
    path = save(text, {"w": W1, "s": np.float32([0.02, 0.03, 0.04, 0.05]), "z": np.zeros(4, np.uint8)})
    ours = exact(onnx.load_model_from_string(adopt_onnx(path, None).content), X)
    np.testing.assert_allclose(ours, exact(onnx.load(path), X), atol=0.03)


def test_scales_that_do_not_fit_the_weights_are_refused(save: Callable[..., Path], graph: Graph) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4] y) { u = QuantizeLinear <axis = 0> (w, s, z)
        v = DequantizeLinear <axis = 0> (u, s, z) c = Conv (x, v) p = GlobalAveragePool (c) y = Flatten (p) }"""
    path = save(text, {"w": W1, "s": np.float32([0.1, 0.2]), "z": np.zeros(2, np.int8)})
    with pytest.raises(ExportError, match="DequantizeLinear_1: its scale does not fit"):
        adopt_onnx(path, None)
    path = save(text, {"w": W1, "s": steps(W1), "z": np.zeros(2, np.int8)})
    with pytest.raises(ExportError, match="it has 4 scales and 2 zero points"):
        adopt_onnx(path, None)
    assert inspect_file(path)["ranges"]["w"]["scale"] is None


def test_a_scale_may_be_a_number_here_and_a_list_of_one_there(save: Callable[..., Path]) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,192] y) { q = QuantizeLinear (x, s, ) d = DequantizeLinear (q, t)
        y = Flatten (d) }"""
    path = save(text.replace("s, )", "s)"), {"s": np.float32([0.02]), "t": np.float32(0.02)})
    own = adopt_onnx(path, None).imported
    assert own is not None
    assert own.activations["x"].scale == np.float32(0.02)


def test_a_type_that_the_output_says_is_read_by_inspect(save: Callable[..., Path]) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4] y) { u = QuantizeLinear <output_dtype = 3> (w, s)
        v = DequantizeLinear (u, s) c = Conv (x, v) p = GlobalAveragePool (c) y = Flatten (p) }"""
    model = onnx.load(save(text, {"w": W1, "s": np.float32(0.01)}, 21))
    model.graph.node[0].input.append("")
    whole = Graphs(model)
    assert [kind_of(whole, node) for node in whole.nodes[:2]] == ["int8", "int8"]


class Digits(CalibrationDataReader):  # type: ignore[misc]
    """Some images for ONNX Runtime's quantizer."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self.images, None)
        return None if found is None else {"input": found[None]}


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uint8": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8, "per_channel": True},
    "microsoft": {"extra_options": {"UseQDQContribOps": True}},
    "symmetric": {
        "activation_type": QuantType.QInt8,
        "per_channel": True,
        "extra_options": {
            "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True,
            "DedicatedQDQPair": True,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ort_file(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return ``ort_file(kind)``: the embedded net, quantized by ONNX Runtime on 16 of its images."""
    folder = tmp_path_factory.mktemp("ort")
    net, images = trained
    (folder / "fp32.onnx").write_bytes(net.exported.content)

    def make(kind: str) -> Path:
        path = folder / f"{kind}.onnx"
        if not path.exists():
            logging.disable(logging.WARNING)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the quantizer's own
                    if kind == "dynamic":
                        quantize_dynamic(folder / "fp32.onnx", path)
                    else:
                        form = QuantFormat.QOperator if kind == "operators" else QuantFormat.QDQ
                        data = Digits(images[:16])
                        quantize_static(folder / "fp32.onnx", path, data, quant_format=form, **KINDS.get(kind, {}))
            finally:
                logging.disable(logging.NOTSET)
        return path

    return make


def sqnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = float(np.square(got - wanted).sum())
    return float(10 * np.log10(np.square(wanted).sum() / noise)) if noise else float("inf")


@pytest.mark.parametrize("kind", KINDS)
def test_the_float_network_in_onnx_runtimes_file_is_the_one_it_was_made_from(
    kind: str, ort_file: Callable[[str], Path], trained: Any, exact: Exact
) -> None:
    """But for its weights, which the file has as integers: the signal is that far above their rounding."""
    net, images = trained
    found = adopt_onnx(ort_file(kind), None)
    ours = exact(onnx.load_model_from_string(found.content), images)
    assert sqnr_db(exact(net.fp32, images), ours) > (100 if kind == "symmetric" else 25)
    own = found.imported
    assert own is not None
    assert "ONNX Runtime" in own.tool
    assert own.float_layers == ()
    assert len(own.weights) == 8  # ONNX Runtime gives uint8 weights the zero point 128, which is symmetric too
    assert ("com.microsoft" in " ".join(own.changes)) == (kind == "microsoft")


@pytest.mark.parametrize(("kind", "op"), [("operators", "QLinearConv"), ("dynamic", "DynamicQuantizeLinear")])
def test_files_that_compute_with_integers_are_refused(kind: str, op: str, ort_file: Callable[[str], Path]) -> None:
    with pytest.raises(ExportError, match=rf"TensorRT does not read: .*{op} \(.*conv.* Start from the FP32 model"):
        adopt_onnx(ort_file(kind), None)


def build(source: Path, out: Path, **others: Any) -> Path:
    digits = dossier() / "digits"
    half = (0.5, 0.5, 0.5)
    given = {"calibration": str(digits / "calibration"), "validation": str(digits / "validation"), **others}
    edgeres.build(model=str(source), precision="int8", mean=half, std=half, out=out, calibration_count=64, **given)
    return out


@pytest.mark.parametrize("kind", ["default", "symmetric"])
def test_a_build_keeps_the_files_own_ranges_and_weights(
    kind: str, ort_file: Callable[[str], Path], trained: Any, exact: Exact, tmp_path: Path
) -> None:
    source = ort_file(kind)
    out = build(source, tmp_path / "bundle")
    manifest = verify(out)
    assert manifest.report is not None
    assert manifest.report.verdict == "pass"
    assert manifest.report.agreement >= 0.99
    written = onnx.load(out / "model.int8.onnx")
    assert lint(written) == []
    theirs = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(source).graph.initializer}
    facts = inspect_bundle(out)
    assert {value["method"] for value in facts["ranges"].values()} == {"imported"}
    for name, value in facts["ranges"].items():
        original = name.removesuffix("_relu").replace("/Flatten_output_0", "/avgpool/GlobalAveragePool_output_0")
        assert np.float32(value["scale"]) == theirs[f"{original}_scale"], name
        assert (value["shift"] > 0) == (theirs[f"{original}_zero_point"] == -128), name
    told = " ".join(manifest.warnings)
    assert "are kept. To calibrate anew" in told
    assert re.search(r"the same class for 100\.0 % of 32 calibration samples", told)
    images = trained[1]
    assert sqnr_db(answers_of(source, images), exact(written, images)) > (28 if kind == "symmetric" else 15)
    again = build(source, tmp_path / "anew", method="mse", recovery="none")
    assert {value["method"] for value in inspect_bundle(again)["ranges"].values()} == {"mse"}
    assert "calibrated anew" in " ".join(verify(again).warnings)


def test_a_comparison_that_fails_ends_no_build(
    ort_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, images: np.ndarray) -> np.ndarray:
        raise ExportError(f"{source} does not run in onnxruntime: no kernel. Export it again.")

    monkeypatch.setattr("edgeres.export.answers_of", fails)
    digits = dossier() / "digits"
    edgeres.build(model=str(ort_file("default")), precision="int8", mean=(0, 0, 0), std=(0.1, 0.1, 0.1),
                  calibration=str(digits / "calibration"), calibration_count=8, out=tmp_path / "bundle")  # fmt: skip
    told = " ".join(verify(tmp_path / "bundle").warnings)
    assert "could not be compared: " in told
    assert "no kernel" in told
    assert re.search(r"of the calibration values are outside the file's input range, .*--std", told), told


@pytest.mark.parametrize("count", [1, 5])
def test_a_fixed_batch_is_filled_with_images(count: int, save: Callable[..., Path], exact: Exact) -> None:
    path = save("net (float[4,3,8,8] x) => (float[4,192] y) { y = Flatten (x) }", {})
    np.testing.assert_array_equal(answers_of(path, X[:count]), X[:count].reshape(count, -1))


def test_a_legal_file_comes_back_bit_for_bit(graph: Graph, exact: Exact, tmp_path: Path) -> None:
    """modelopt's net in float32: all its pairs stand where edgeres puts its own, so the two files mean the same."""
    text, values = modelopt()
    plain = text.replace("h = Cast <to = 10> (x)", "").replace("(h, sx", "(x, sx").replace("o = Gemm", "y = Gemm")
    plain = plain.replace("y = Cast <to = 1> (o)", "").replace("[N,3,8,8]", "[N,3,32,32]")
    wide = {n: v.astype(np.float32) if v.dtype == np.float16 else v for n, v in values.items()}
    source = tmp_path / "theirs.onnx"
    onnx.save(graph(plain, wide, 17), source)
    digits, half = dossier() / "digits", (0.5, 0.5, 0.5)
    edgeres.build(model=str(source), precision="int8", mean=half, std=half, calibration=str(digits / "calibration"),
                  calibration_count=16, out=tmp_path / "bundle")  # fmt: skip
    images = RNG.uniform(-1, 1, (8, 3, 32, 32)).astype(np.float32)
    written = onnx.load(tmp_path / "bundle" / "model.int8.onnx")
    np.testing.assert_array_equal(exact(written, images), exact(onnx.load(source), images))
    facts = inspect_bundle(tmp_path / "bundle")
    assert facts["activation_range"] == "symmetric"


def test_layers_that_the_file_leaves_in_float_stay_there(graph: Graph, tmp_path: Path) -> None:
    text, values = nncf()
    source = tmp_path / "theirs.onnx"
    onnx.save(graph(text.replace("[N,3,8,8]", "[N,3,32,32]"), values, 13), source)
    out = build(source, tmp_path / "bundle", validation=None)
    plan = {layer["type"]: layer for layer in inspect_bundle(out)["plan"]}
    assert (plan["Gemm"]["precision"], plan["Gemm"]["reason"]) == ("float", "the file leaves it in float")
    assert plan["Conv"]["precision"] == "int8"
    assert lint(onnx.load(out / "model.int8.onnx")) == []


def test_a_dlas_row_does_not_take_over_a_model_whose_steps_are_the_files(graph: Graph, tmp_path: Path) -> None:
    """Its steps are wider than what the weights need, so a DLA's model, which keeps none of them, is another."""
    text, values = nncf()
    wide = {**values, "s1": 1.3 * values["s1"], "s2": 1.3 * values["s2"]}
    onnx.save(graph(text.replace("[N,3,8,8]", "[N,3,32,32]"), wide, 13), tmp_path / "theirs.onnx")
    shared = f"""name = "net"
model = {{ source = "theirs.onnx" }}
calibration = {{ samples = "{dossier() / "digits" / "calibration"}", count = 8 }}
"""
    rows = "".join(f'[[targets]]\ntarget = "{target}"\n' for target in ("gpu", "dla0"))
    (tmp_path / "recipe.toml").write_text(shared + rows)
    matrix = edgeres.build_matrix(tmp_path / "recipe.toml", out=tmp_path / "out")
    assert "observe" in matrix.rows[1].reused
    assert "quantize" not in matrix.rows[1].reused
    for row, kept in zip(matrix.rows, (True, False), strict=True):
        model = onnx.load(Path(row.bundle) / "model.int8.onnx")
        scales = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer]
        assert any(np.array_equal(each, wide["s1"]) for each in scales) is kept


def test_weights_alone_are_nothing_to_keep(graph: Graph, tmp_path: Path) -> None:
    text = """net (float[N,3,32,32] x) => (float[N,4] y) {
        w = DequantizeLinear <axis = 0> (q1, s1, z4) c = Conv (x, w) r = Relu (c) p = GlobalAveragePool (r)
        y = Flatten (p) }"""
    source = tmp_path / "theirs.onnx"
    onnx.save(graph(text, {"q1": rounded(W1), "s1": steps(W1), "z4": np.zeros(4, np.int8)}), source)
    out = build(source, tmp_path / "bundle", validation=None)
    assert {layer["precision"] for layer in inspect_bundle(out)["plan"] if layer["type"] == "Conv"} == {"int8"}
    assert "it is calibrated anew" in " ".join(verify(out).warnings)


def test_inspect_explains_a_quantized_file(ort_file: Callable[[str], Path], save: Callable[..., Path]) -> None:
    facts = inspect_file(ort_file("default"))
    assert "ONNX Runtime" in facts["quantized_by"]
    first = facts["ranges"]["/relu/Relu_output_0"]
    assert (first["type"], first["zero_point"], first["role"], first["minimum"]) == ("int8", [-128], "activation", 0.0)
    bias = next(value for value in facts["ranges"].values() if value["role"] == "bias")
    assert bias["type"] == "int32"
    assert any("feeds the bias of" in problem for problem in facts["lint"])
    assert any("a zero point is not zero" in problem for problem in facts["lint"])
    assert {layer["precision"] for layer in facts["layers"] if layer["type"] == "Conv"} == {"int8"}
    facts = inspect_file(ort_file("microsoft"))
    assert sum("com.microsoft" in problem for problem in facts["lint"]) == 1
    assert facts["ranges"].keys() == inspect_file(ort_file("default"))["ranges"].keys()
    facts = inspect_file(ort_file("operators"))
    assert any("QLinearConv" in problem for problem in facts["lint"])
    text, values = modelopt()
    facts = inspect_file(save(text, values, 19))
    weights = next(value for value in facts["ranges"].values() if value["role"] == "weight")
    assert (weights["channels"], weights["axis"]) == (4, 0)


def test_breaches_of_a_kind_are_told_in_one_sentence(ort_file: Callable[[str], Path]) -> None:
    problems = inspect_file(ort_file("default"))["lint"]
    said = grouped(problems)
    assert len(said) < len(problems) / 2
    (zeros,) = [text for text in said if "a zero point is not zero" in text]
    count = sum("a zero point is not zero" in problem for problem in problems)
    assert f" and {count - 3} more: a zero point" in zeros
    assert grouped(["opset 21 is too new", "a: wrong", "b: wrong", "c: else"]) == (
        ["opset 21 is too new", "a, b: wrong", "c: else"]
    )
