"""Each rule that a written graph keeps: a graph that breaks this one alone, and its neighbours that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from edgeres.errors import LintError
from edgeres.quantize.lint import check, lint

Graph = Callable[..., onnx.ModelProto]

LEGAL = """net (float[N,3,8,8] x) => (float[N,5] y) {
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wq = QuantizeLinear <axis = 0> (w, s4, z4)
    wd = DequantizeLinear <axis = 0> (wq, s4, z4)
    c = Conv <pads = [1, 1, 1, 1]> (xd, wd, b)
    r = Relu (c)
    rq = QuantizeLinear (r, s, z)
    rd = DequantizeLinear (rq, s, z)
    vq = QuantizeLinear <axis = 0> (v, s4, z4)
    vd = DequantizeLinear <axis = 0> (vq, s4, z4)
    e = Conv <pads = [1, 1, 1, 1]> (rd, vd, b)
    a = Add (e, rd)
    t = Relu (a)
    tq = QuantizeLinear (t, s, z)
    td = DequantizeLinear (tq, s, z)
    p = GlobalAveragePool (td)
    f = Flatten (p)
    fq = QuantizeLinear (f, s, z)
    fd = DequantizeLinear (fq, s, z)
    kq = QuantizeLinear <axis = 0> (k, s5, z5)
    kd = DequantizeLinear <axis = 0> (kq, s5, z5)
    y = Gemm <transB = 1> (fd, kd, kb)
}"""
WEIGHTS: dict[str, Any] = {
    "w": np.ones((4, 3, 3, 3), np.float32),
    "v": np.ones((4, 4, 3, 3), np.float32),
    "k": np.ones((5, 4), np.float32),
    "kt": np.ones((4, 5), np.float32),
    "b": np.ones(4, np.float32),
    "kb": np.ones(5, np.float32),
    "s": np.float32(0.5),
    "other": np.float32(0.25),
    "z": np.int8(0),
    "s3": np.full(3, 0.5, np.float32),
    "z3": np.zeros(3, np.int8),
    "s4": np.full(4, 0.5, np.float32),
    "z4": np.zeros(4, np.int8),
    "wt": np.ones((4, 4, 1, 1), np.float32),
    "low": np.float32(0),
    "high": np.float32(6),
    "s5": np.full(5, 0.5, np.float32),
    "z5": np.zeros(5, np.int8),
    "zw": np.array(7, np.int8),
    "u": np.uint8(0),
}
FIRST = "xq = QuantizeLinear (x, s, z)\n    xd = DequantizeLinear (xq, s, z)"
CONV = "wq = QuantizeLinear <axis = 0> (w, s4, z4)\n    wd = DequantizeLinear <axis = 0> (wq, s4, z4)"
GEMM = "kq = QuantizeLinear <axis = 0> (k, s5, z5)\n    kd = DequantizeLinear <axis = 0> (kq, s5, z5)"


def pair(source: str, scale: str, zero: str, axis: str = "", to: str = "") -> str:
    q, d, parameters = f"{to or source}q", f"{to or source}d", f"{scale}, {zero}"
    return f"{q} = QuantizeLinear {axis} ({source}, {parameters})\n{d} = DequantizeLinear {axis} ({q}, {parameters})"


# What is replaced in LEGAL, by what, and what is said of it; every sentence found must contain the words.
BREACHES: dict[str, tuple[str, str, str, int]] = {
    "no zero point": (FIRST, FIRST.replace(", z)", ")"), "no zero point is written", 2),
    "computed scale": (FIRST, f"sc = Abs (s)\n{pair('x', 'sc', 'z')}", "must be constants", 2),
    "unsigned": (FIRST, pair("x", "s", "u"), "zero point is uint8; only int8 is symmetric", 2),
    "asymmetric": (FIRST, pair("x", "s", "zw"), "a zero point is not zero", 2),
    "shapes": (CONV, pair("w", "s4", "z", "<axis = 0>"), r"scale has shape (4,), zero point ()", 2),
    "activation per channel": (FIRST, pair("x", "s3", "z3", "<axis = 1>"), "an activation is quantized per channel", 1),
    "unread": (FIRST, FIRST + "\nlost = QuantizeLinear (p, s, z)", "not read by DequantizeLinear alone", 1),
    "read raw": (FIRST, FIRST + "\nraw = Cast <to = 1> (xq)", "not read by DequantizeLinear alone", 1),
    "before ReLU": ("r = Relu (c)", pair("c", "s", "z") + "\nr = Relu (cd)", "stands between Conv", 1),
    "before ReLU of Add": ("t = Relu (a)", pair("a", "s", "z") + "\nt = Relu (ad)", "stands between Add", 1),
    "before batch norm": (
        "r = Relu (c)",
        pair("c", "s", "z") + "\nn = BatchNormalization (cd, b, b, b, b)\nr = Relu (n)",
        "stands between Conv",
        1,
    ),
    "twice": (
        "f = Flatten (p)",
        pair("r", "s", "z", to="again") + "\nm = Mul (againd, againd) f = Flatten (p)",
        "quantized twice",
        2,
    ),
    "another scale": (FIRST, FIRST.replace("(xq, s, z)", "(xq, other, z)"), "its scale is not that of", 1),
    "bias": (
        "c = Conv <pads = [1, 1, 1, 1]> (xd, wd, b)",
        pair("b", "s", "z") + "\nc = Conv <pads = [1, 1, 1, 1]> (xd, wd, bd)",
        "feeds the bias of",
        1,
    ),
    "Gemm bias": ("(fd, kd, kb)", "(fd, kd, kbd)", "feeds the bias of", 1),
    "weights alone": ("(xd, wd, b)", "(x, wd, b)", "only its weights is quantized", 1),
    "input alone": ("(xd, wd, b)", "(xd, w, b)", "only its input is quantized", 1),
    "Gemm input alone": ("(fd, kd, kb)", "(fd, k, kb)", "only its input is quantized", 1),
    "Conv axis": (CONV, pair("w", "s3", "z3", "<axis = 1>"), "along axis 1, its output channels are axis 0", 1),
    "Gemm axis": (GEMM, pair("k", "s4", "z4", "<axis = 1>"), "along axis 1, its output channels are axis 0", 1),
    "Gemm axis, not transposed": (
        f"{GEMM}\n    y = Gemm <transB = 1> (fd, kd, kb)",
        pair("kt", "s4", "z4", "<axis = 0>") + "\ny = Gemm (fd, ktd, kb)",
        "along axis 0, its output channels are axis 1",
        1,
    ),
    "MatMul axis": (
        f"{GEMM}\n    y = Gemm <transB = 1> (fd, kd, kb)",
        pair("kt", "s4", "z4", "<axis = 0>") + "\ny = MatMul (fd, ktd)",
        "along axis 0, its output channels are axis 1",
        1,
    ),
    "before Clip": ("r = Relu (c)", pair("c", "s", "z") + "\nr = Clip (cd, low, high)", "stands between Conv", 1),
    "axes that differ": (
        "vd = DequantizeLinear <axis = 0>",
        "vd = DequantizeLinear <axis = 1>",
        "along axis 1",
        2,
    ),
    "number of scales": (CONV, pair("w", "s3", "z3", "<axis = 0>"), "3 scales for 4 channels along axis 0", 2),
    "no such axis": (CONV, pair("w", "s4", "z4", "<axis = 4>"), "axis 4", 3),
    "ConvTranspose weights alone": (
        "r = Relu (c)",
        pair("wt", "s4", "z4", "<axis = 1>") + "\nct = ConvTranspose (c, wtd)\nr = Relu (ct)",
        "only its weights is quantized",
        1,
    ),
    "ConvTranspose axis": (
        "r = Relu (c)",
        pair("c", "s", "z") + "\n" + pair("wt", "s4", "z4", "<axis = 0>") + "\nr = ConvTranspose (cd, wtd)",
        "along axis 0, its output channels are axis 1",
        1,
    ),
    "branch of Add": ("a = Add (e, rd)", pair("e", "s", "z") + "\na = Add (ed, r)", "its branch is quantized", 1),
    "branch of Add, turned": ("a = Add (e, rd)", pair("e", "s", "z") + "\na = Add (r, ed)", "its branch is", 1),
    "pool's output alone": (
        "GlobalAveragePool (td)",
        "GlobalAveragePool (t)",
        "its output is quantized, but not its",
        1,
    ),
    "pool's input alone": ("(fd, kd, kb)", "(f, k, kb)", "its input is quantized, but not all that reads", 1),
    "pool also read in float": (
        "f = Flatten (p)",
        "f = Flatten (p) m = Sigmoid (p)",
        "its input is quantized, but not all that reads its output",
        1,
    ),
    "both sides of Add": (
        "a = Add (e, rd)",
        pair("e", "s", "z") + "\na = Add (ed, rd)",
        "quantize the skip input only",
        1,
    ),
}


def breached(graph: Graph, old: str, new: str, **weights: Any) -> list[str]:
    assert old in LEGAL
    text = LEGAL.replace(old, new)
    if "kbd" in new:
        text = text.replace("y = Gemm", pair("kb", "s", "z") + "\ny = Gemm")
    return lint(graph(text, {**WEIGHTS, **weights}, valid=False))


def test_the_legal_graph_is_legal(graph: Graph) -> None:
    for opset in range(13, 18):
        assert lint(graph(LEGAL, WEIGHTS, opset)) == []
    check(graph(LEGAL, WEIGHTS), "model.int8.onnx")


@pytest.mark.parametrize("rule", BREACHES)
def test_a_breach_is_found_and_nothing_else(rule: str, graph: Graph) -> None:
    old, new, words, count = BREACHES[rule]
    problems = breached(graph, old, new)
    assert len(problems) == count, problems
    assert all(words in problem for problem in problems), problems


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_found(scale: float, graph: Graph) -> None:
    problems = breached(graph, FIRST, pair("x", "bad", "z"), bad=np.float32(scale))
    assert len(problems) >= 2
    assert sum("a scale is zero, negative or not finite" in problem for problem in problems) == 2
    one_bad = breached(graph, CONV, pair("w", "bad", "z4", "<axis = 0>"), bad=np.array([1, 1, scale, 1], np.float32))
    assert sum("a scale is zero, negative or not finite" in problem for problem in one_bad) == 2


def test_a_scale_that_is_not_float32_is_found(graph: Graph) -> None:
    problems = breached(graph, FIRST, pair("x", "half", "z"), half=np.float16(0.5))
    assert [problem.partition(": ")[2] for problem in problems] == [
        "its scale is float16; TensorRT 8 wants float32"
    ] * 2


@pytest.mark.parametrize("opset", [12, 18, 19, 21])
def test_other_opsets_are_found(opset: int, graph: Graph) -> None:
    problems = lint(graph(LEGAL, WEIGHTS, opset, valid=False))
    assert len(problems) == 1
    assert problems[0].startswith(f"opset {opset}:")


def test_foreign_domains_are_found_where_they_are_used(graph: Graph) -> None:
    model = graph(LEGAL, WEIGHTS)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert lint(model) == []
    model.graph.node.append(onnx.helper.make_node("Gelu", ["e"], ["gelu"], domain="com.microsoft"))
    assert lint(model) == ["operator Gelu is of domain com.microsoft, not of standard ONNX"]


@pytest.mark.parametrize(
    "body",
    [
        "q = QLinearConv (xq, s, z, wq, s, z, s, z)",
        "q = ConvInteger (xq, wq)",
        "q, qs, qz = DynamicQuantizeLinear (x)",
        "m1 = QuantizeLinear (k, s, z) q = MatMulInteger (m1, m1)",
    ],
)
def test_operators_that_tensorrt_does_not_read_are_found(body: str, graph: Graph) -> None:
    text = LEGAL.replace("y = Gemm", body + "\ny = Gemm")
    problems = lint(graph(text, WEIGHTS, valid=False))
    assert sum("TensorRT does not read" in problem for problem in problems) == 1


def test_bytes_must_be_cast_first(graph: Graph) -> None:
    good = (
        "net (uint8[N,8,8,3] x) => (float[N,3,8,8] y) { c = Cast <to = 1> (x) y = Transpose <perm = [0, 3, 1, 2]> (c) }"
    )
    bad = (
        "net (uint8[N,8,8,3] x) => (float[N,3,8,8] y) { t = Transpose <perm = [0, 3, 1, 2]> (x) y = Cast <to = 1> (t) }"
    )
    assert lint(graph(good)) == []
    assert lint(graph(bad)) == ["uint8 input x is read by Transpose; TensorRT wants a Cast first"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CONV, pair("w", "s", "z")),
        (GEMM, pair("k", "s", "z")),
        (
            f"{GEMM}\n    y = Gemm <transB = 1> (fd, kd, kb)",
            pair("kt", "s5", "z5", "<axis = 1>") + "\ny = Gemm (fd, ktd, kb)",
        ),
        (
            f"{GEMM}\n    y = Gemm <transB = 1> (fd, kd, kb)",
            pair("kt", "s5", "z5", "<axis = 1>") + "\ny = MatMul (fd, ktd)",
        ),
        ("(xd, wd, b)", "(x, w, b)"),
        ("a = Add (e, rd)", "a = Add (e, r)"),
        ("a = Add (e, rd)", "a = Add (rd, e)"),
        ("r = Relu (c)", "ab = Add (c, b3) r = Relu (ab)"),
        ("r = Relu (c)", "r = Clip (c, low, high)"),
        ("GlobalAveragePool (td)", "ReduceMean <axes = [2, 3]> (td)"),
        ("f = Flatten (p)", "sh = Shape (p) f = Reshape (p, flat) sz = Size (p)"),
        # beside a reader in float, so the pool runs in float; what quantizes its output reads float
        (
            "p = GlobalAveragePool (td)\n    f = Flatten (p)",
            "p = GlobalAveragePool (t) f = Flatten (p) m = Sigmoid (p)",
        ),
        # int8 scales of one tensor: an axis says nothing there
        (CONV, pair("w", "s", "z").replace("wd = DequantizeLinear", "wd = DequantizeLinear <axis = 0>")),
        # one weight read along two axes
        (
            GEMM,
            f"{GEMM}\nsqq = QuantizeLinear <axis = 0> (sq, s4, z4) sqd = DequantizeLinear <axis = 0> (sqq, s4, z4)\n"
            "sq1 = QuantizeLinear <axis = 1> (sq, s4, z4) sqe = DequantizeLinear <axis = 1> (sq1, s4, z4)\n"
            "m1 = Gemm <transB = 1> (fd, sqd) m2 = MatMul (fd, sqe)",
        ),
        # a skip that is read before its ReLU, as in pre-activation nets: the Q stands beside the ReLU, not before it
        ("a = Add (e, rd)", pair("c", "s", "z") + "\na = Add (e, cd)"),
    ],
    ids=[
        "per tensor",
        "Gemm per tensor",
        "Gemm transB 0",
        "MatMul",
        "float",
        "float skip",
        "order",
        "constant",
        "Clip",
        "ReduceMean",
        "Shape",
        "pool in float",
        "axis of one scale",
        "two axes",
        "beside",
    ],
)
def test_what_is_close_to_a_breach_is_none(old: str, new: str, graph: Graph) -> None:
    extra = {"flat": np.array([-1, 4]), "sq": np.ones((4, 4), np.float32)}
    assert breached(graph, old, new, b3=np.ones((4, 1, 1), np.float32), **extra) == []


def test_axes_of_q_and_dq_that_differ_are_told_of_the_pair(graph: Graph) -> None:
    problems = breached(graph, "vd = DequantizeLinear <axis = 0>", "vd = DequantizeLinear <axis = 1>")
    assert "it dequantizes along axis 1 what QuantizeLinear_8 quantizes along axis 0" in problems[0]


def test_a_pool_that_is_meant_to_run_in_float_may(graph: Graph) -> None:
    model = graph(LEGAL.replace("GlobalAveragePool (td)", "GlobalAveragePool (t)"), WEIGHTS)
    pool = next(node.name for node in model.graph.node if node.op_type == "GlobalAveragePool")
    assert len(lint(model)) == 1
    assert lint(model, {pool}) == []
    check(model, "model.int8.onnx", {pool})


def test_what_is_not_valid_onnx_is_refused(graph: Graph) -> None:
    model = graph(LEGAL.replace("r = Relu (c)", "r = Relu (c, c)"), WEIGHTS, valid=False)
    with pytest.raises(LintError, match=r"model\.int8\.onnx: edgeres wrote ONNX that is not valid .*Relu.*Report it"):
        check(model, "model.int8.onnx")


def test_all_breaches_are_told_at_once(graph: Graph) -> None:
    text = LEGAL.replace(FIRST, pair("x", "s3", "z3", "<axis = 1>")).replace("(rd, vd, b)", "(rd, v, b)")
    with pytest.raises(LintError, match=r"bad\.onnx: 2 problems") as caught:
        check(graph(text, WEIGHTS), "bad.onnx")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
def test_what_we_write_keeps_all_rules(name: str, net: Callable[[str], Any]) -> None:
    assert lint(net(name).int8) == []
    assert lint(net(name).fp32) == []
