"""A user's own ONNX file: brought into shape where that keeps its numbers, refused in words where it would not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, inliner

from edgeres import models
from edgeres.errors import ExportError
from edgeres.export import adopt as room
from edgeres.export import adopt_onnx
from edgeres.export.exported import Exported

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "g": RNG.uniform(0.5, 2, 4).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    "mu": RNG.standard_normal(4).astype(np.float32),
    "var": RNG.uniform(0.5, 2, 4).astype(np.float32),
    "fc": RNG.standard_normal((5, 4)).astype(np.float32),
}
BODY = """{
    c = Conv (x, w)
    n = BatchNormalization (c, g, b, mu, var)
    r = Relu (n)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, fc)
}"""
X = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def adopt(tmp_path: Path, graph: Graph) -> Callable[..., Exported]:
    """Return ``adopt(text, ...)``: the result of adopting a file with this graph."""

    def run(
        text: str, size: tuple[int, int] | None = None, opset: int = 17, weights: dict[str, np.ndarray] | None = None
    ) -> Exported:
        path = tmp_path / "theirs.onnx"
        onnx.save(graph(text, {**WEIGHTS, **(weights or {})}, opset), path)
        return adopt_onnx(path, size)

    return run


def refused(adopt: Callable[[], Exported], words: str) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        adopt()
    assert "\n" not in str(caught.value)
    assert re.search(r"[.:;] (Export|export|Say|Leave|Check|check|start)\b", str(caught.value)), "no next step"


@pytest.mark.parametrize("batch", ["1", "4", "N", "batch"])
@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17])
def test_a_fixed_batch_is_freed_and_the_numbers_stay(
    batch: str, opset: int, adopt: Callable[..., Exported], graph: Graph, exact: Exact
) -> None:
    text = f"net (float[{batch},3,8,8] x) => (float[{batch},5] y) {BODY}"
    found = adopt(text, opset=opset)
    model = onnx.load_model_from_string(found.content)
    onnx.checker.check_model(model, full_check=True)
    original = graph(text, WEIGHTS, opset)
    one = 4 if batch == "4" else 1
    wanted = np.concatenate([exact(original, X[i : i + one]) for i in range(0, len(X), one)])
    np.testing.assert_allclose(exact(model, X), wanted, rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert (found.opset, found.input_name, found.output_name) == (opset, "x", "y")
    assert (found.input_shape, found.num_classes) == ((3, 8, 8), 5)
    assert found.modules == {node.name: node.name for node in model.graph.node}
    assert found.max_relative_error <= 1e-5


@pytest.mark.parametrize("opset", [11, 12, 18, 19, 20])
def test_other_opsets_are_converted(opset: int, adopt: Callable[..., Exported], graph: Graph, exact: Exact) -> None:
    text = f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}"
    found = adopt(text, opset=opset)
    assert found.opset == 17
    wanted = np.concatenate([exact(graph(text, WEIGHTS, opset), X[i : i + 1]) for i in range(len(X))])
    np.testing.assert_allclose(exact(onnx.load_model_from_string(found.content), X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (20, "net (float[N,3,8,8] x) => (float[N,192] y) { s = Gelu (x) y = Flatten (s) }"),
        (18, "net (float[N,3,8,8] x) => (float[N,192] y) { s = Mish (x) y = Flatten (s) }"),
        (19, 'net (float[N,3,8,8] x) => (float[N,n] y) { s = Pad <mode = "wrap"> (x, pads) y = Flatten (s) }'),
        (
            18,
            "net (float[N,3,8,8] x) => (float[N,n] y) "
            "{ n0 = Shape (x) a = Gather (n0, x0) s = ReduceSumSquare (x, a) y = Flatten (s) }",
        ),
        (
            18,
            "net (float[N,3,8,8] x) => (float[N,n] y) "
            "{ s = ReduceMean <noop_with_empty_axes = 1> (x) y = Flatten (s) }",
        ),
    ],
)
def test_opsets_that_cannot_be_converted_are_refused(opset: int, text: str, adopt: Callable[..., Exported]) -> None:
    weights = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "x0": np.array([1])}
    refused(
        lambda: adopt(text, opset=opset, weights=weights),
        f"is opset {opset} and cannot be converted to 17, .* by edgeres .*"
        r"torch\.onnx\.export\(\.\.\., opset_version=17, dynamo=False\)$",
    )


LATER = {
    "pads": np.array([0, 0, 1, 2, 0, 0, 3, 0]),
    "some": np.array([1, 2, 3, 0]),
    "last": np.array([-2, 3]),
    "seven": np.float32(7),
    "plane": np.array([2, 3]),
    "sizes": np.array([1, 2]),
    "ratios": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.parametrize("opset", [18, 20, 22])
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ('p = Pad <mode = "constant"> (x, pads) y = Flatten (p)', ["Pad", "Flatten"]),
        ('p = Pad <mode = "reflect"> (x, pads) y = Flatten (p)', ["Pad", "Flatten"]),
        ("p = Pad (x, some, seven, last) y = Flatten (p)", ["Pad", "Flatten"]),
        ("p = Pad (x, some, , last) y = Flatten (p)", ["Pad", "Flatten"]),
        ("p = ReduceMean <noop_with_empty_axes = 0, keepdims = 0> (x, plane) y = Flatten (p)", None),
        ("p = ReduceMax <noop_with_empty_axes = 1> (x, plane) y = Flatten (p)", ["ReduceMax", "Flatten"]),
        ("k = Constant <value_ints = [2, 3]> () p = ReduceL2 (x, k) y = Flatten (p)", ["ReduceL2", "Flatten"]),
        ("a, b0 = Split <axis = 1> (x, sizes) y = Flatten (b0)", ["Split", "Flatten"]),
        ("a, b0 = Split <axis = 2, num_outputs = 2> (x) y = Flatten (b0)", ["Split", "Flatten"]),
        (
            'p = Resize <mode = "nearest", antialias = 0, keep_aspect_ratio_policy = "stretch"> (x, , ratios) '
            "y = Flatten (p)",
            ["Resize", "Flatten"],
        ),
    ],
    ids=["Pad", "reflect", "axes", "no value", "mean", "max", "Constant", "sizes", "num_outputs", "defaults"],
)
def test_what_later_opsets_write_differently_is_written_as_17_has_it(
    opset: int, body: str, left: list[str] | None, adopt: Callable[..., Exported], graph: Graph, exact: Exact
) -> None:
    text = f"net (float[N,3,8,8] x) => (float[N,n] y) {{ {body} }}"
    model = onnx.load_model_from_string(adopt(text, opset=opset, weights=LATER).content)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert left is None or [node.op_type for node in model.graph.node] == left
    np.testing.assert_allclose(exact(model, X), exact(graph(text, {**WEIGHTS, **LATER}, opset), X), rtol=1e-5)


@pytest.mark.parametrize(("opset", "shapes"), [(18, None), (20, ({0: "batch"},))])
def test_files_of_torchs_newer_exporter_are_adopted(
    opset: int, shapes: tuple[dict[int, str]] | None, tmp_path: Path, exact: Exact
) -> None:
    pytest.importorskip("onnxscript", reason="torch's newer exporter needs onnxscript")
    module = models.create("resnet20_cifar", seed=1).eval()
    path = tmp_path / "theirs.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporter's insides
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, 32, 32),),
            path,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert (tmp_path / "theirs.onnx.data").exists()
    assert onnx.load(path, load_external_data=False).opset_import[0].version == opset
    found = adopt_onnx(path, None)
    model = onnx.load_model_from_string(found.content)
    assert (found.opset, model.ir_version, found.num_classes) == (17, 8, 10)
    assert {n.op_type for n in model.graph.node} <= {
        *("Conv", "Relu", "Add", "Slice", "Pad", "ReduceMean", "Reshape", "Flatten", "Gemm")
    }
    assert str(torch.__path__[0]).encode() not in found.content
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32)
        with torch.inference_mode():
            np.testing.assert_allclose(exact(model, x), module(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-4)


def test_what_we_would_break_is_told_as_ours(adopt: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"net (float[N,3,8,8] x) => (float[N,5] y) {BODY}"
    simplify = room.simplify

    def wrong(model: onnx.ModelProto) -> None:
        simplify(model)
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Neg"

    monkeypatch.setattr(room, "simplify", wrong)
    refused(lambda: adopt(text), r"^edgeres cannot bring .*: its answers would change by .*opset_version=17, dynamo=")

    def broken(model: onnx.ModelProto) -> None:
        simplify(model)
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        node.op_type, node.domain = "Mystery", "their.domain"
        model.opset_import.append(helper.make_opsetid("their.domain", 1))

    monkeypatch.setattr(room, "simplify", broken)
    refused(lambda: adopt(text), r"^edgeres cannot bring .*opset_version=17, dynamo=False")


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("shape", [[-2, 192], [-2, -1], [-2, 3, 64], [-2, 8, -1, 8]])
def test_reshapes_that_repeat_a_fixed_batch_are_freed(
    batch: int, shape: list[int], adopt: Callable[..., Exported], exact: Exact
) -> None:
    target = np.array([batch, *shape[1:]])
    body = "{ r = Reshape <allowzero = 1> (x, t) y = Flatten (r) }"
    text = f"net (float[{batch},3,8,8] x) => (float[{batch},192] y) {body}"
    model = onnx.load_model_from_string(adopt(text, weights={"t": target}).content)
    np.testing.assert_array_equal(exact(model, X), X.reshape(4, -1))


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
        net (float[N,3,8,8] x) => (float[N,192] y) { h = mine.twice (x) y = Flatten (h) }
        <domain: "mine", opset_import: ["" : 17]> twice (a) => (b) { b = Add (a, a) }"""
    )
    path = tmp_path / "functions.onnx"
    onnx.save(model, path)
    assert [n.op_type for n in onnx.load_model_from_string(adopt_onnx(path, None).content).graph.node] == [
        n.op_type for n in inliner.inline_local_functions(model).graph.node
    ]


@pytest.mark.parametrize("yes", [True, False])
def test_a_branch_whose_condition_is_constant_is_taken(yes: bool, adopt: Callable[..., Exported], exact: Exact) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,192] y) {
        c = Not (no)
        a = If (c) <then_branch = t () => (float[N,3,8,8] a) { t = Add (x, one) a = If (c) <
                        then_branch = u () => (float[N,3,8,8] a) { a = Add (t, one) },
                        else_branch = v () => (float[N,3,8,8] a) { a = Neg (t) }> },
                    else_branch = e () => (float[N,3,8,8] n) { n = Neg (x) }>
        y = Flatten (a) }"""
    found = adopt(text, weights={"no": np.array(not yes), "one": np.float32(1)})
    model = onnx.load_model_from_string(found.content)
    assert "If" not in {node.op_type for node in model.graph.node}
    np.testing.assert_array_equal(exact(model, X), (X + 1 + 1 if yes else -X).reshape(4, -1))


@pytest.mark.parametrize("batch", ["1", "N"])
def test_images_that_the_file_turns_itself_are_fed_channels_first(
    batch: str, adopt: Callable[..., Exported], graph: Graph, exact: Exact
) -> None:
    body = BODY.replace("Conv (x, w)", "Conv (u, w)").replace("{", "{ u = Transpose <perm = [0, 3, 1, 2]> (x)", 1)
    text = f"net (float[{batch},8,8,3] x) => (float[{batch},5] y) {body}"
    found = adopt(text)
    assert found.input_shape == (3, 8, 8)
    assert "Transpose is gone" in found.notes[0]
    model = onnx.load_model_from_string(found.content)
    assert model.graph.node[0].op_type == "Conv"
    wanted = [exact(graph(text, WEIGHTS), X[i : i + 1].transpose(0, 2, 3, 1)) for i in range(len(X))]
    np.testing.assert_allclose(exact(model, X), np.concatenate(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("io", ["float", "float16"])
def test_half_precision_is_written_in_float32(
    io: str, adopt: Callable[..., Exported], graph: Graph, exact: Exact
) -> None:
    half = {name: values.astype(np.float16) for name, values in WEIGHTS.items()}
    body = BODY.replace("Conv (x, w)", "Conv (h, w)").replace("y = Gemm", "o = Gemm")
    body = body.replace("{", "{ h = Cast <to = 10> (x)", 1).replace(
        "}", f"y = Cast <to = {1 if io == 'float' else 10}> (o) }}"
    )
    found = adopt(f"net ({io}[N,3,8,8] x) => ({io}[N,5] y) {body}", weights=half)
    model = onnx.load_model_from_string(found.content)
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT}
    assert "Cast" not in {node.op_type for node in model.graph.node}
    assert "half precision" in found.notes[0]
    plain = {name: values.astype(np.float32) for name, values in half.items()}
    wanted = exact(graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {BODY}", plain), X)
    np.testing.assert_allclose(exact(model, X), wanted, rtol=1e-4, atol=1e-5)


def test_weights_stored_in_half_precision_are_no_half_precision(adopt: Callable[..., Exported]) -> None:
    body = BODY.replace("Conv (x, w)", "Conv (x, v)").replace("{", "{ v = Cast <to = 1> (w)", 1)
    found = adopt(f"net (float[N,3,8,8] x) => (float[N,5] y) {body}", weights={"w": WEIGHTS["w"].astype(np.float16)})
    assert found.notes == ()
    assert found.max_relative_error <= 1e-5


def test_bfloat16_is_refused_by_name(adopt: Callable[..., Exported]) -> None:
    body = BODY.replace("Conv (x, w)", "Conv (u, w)").replace("{", "{ h = Cast <to = 16> (x) u = Cast <to = 1> (h)", 1)
    refused(lambda: adopt(f"net (float[N,3,8,8] x) => (float[N,5] y) {body}"), "is in bfloat16, which onnxruntime")


def test_operators_that_no_output_needs_are_not_refused(adopt: Callable[..., Exported], tmp_path: Path) -> None:
    text = """net (float[N,3,8,8] x) => (float[N,192] y) { d = Det (x) e = DequantizeLinear (n, s, n)
        p = MaxPool <kernel_shape = [1, 1]> (x) c = Clip (p, , s) y = Flatten (c) }"""
    adopt(text, weights={"n": np.int8(0), "s": np.float32(1)})
    model = onnx.load(tmp_path / "theirs.onnx")
    next(node for node in model.graph.node if node.op_type == "MaxPool").output.append("")
    onnx.save(model, tmp_path / "theirs.onnx")
    assert adopt_onnx(tmp_path / "theirs.onnx", None).num_classes == 192


def test_pooling_indices_that_nobody_reads_are_left_out(adopt: Callable[..., Exported]) -> None:
    text = "net (float[N,3,8,8] x) => (float[N,n] y) { p, i = MaxPool <kernel_shape = [2, 2]> (x) y = Flatten (p) }"
    (pool, _) = onnx.load_model_from_string(adopt(text).content).graph.node
    assert list(pool.output) == ["p"]


def test_open_sizes_need_a_size(adopt: Callable[..., Exported]) -> None:
    text = f"net (float[N,3,h,w0] x) => (float[N,5] y) {BODY}"
    refused(lambda: adopt(text), "leaves height and width open. Say them: --input-size")
    assert adopt(text, size=(10, 12)).input_shape == (3, 10, 12)
    half = f"net (float[N,3,8,w0] x) => (float[N,5] y) {BODY}"
    refused(lambda: adopt(half), "--input-size")
    assert adopt(half, size=(8, 12)).input_shape == (3, 8, 12)


def test_a_fixed_size_is_taken_and_defended(adopt: Callable[..., Exported]) -> None:
    text = f"net (float[N,3,8,8] x) => (float[N,5] y) {BODY}"
    assert adopt(text, size=(8, 8)).input_shape == (3, 8, 8)
    refused(lambda: adopt(text, size=(8, 16)), "made for 8×8 pixels, not for 8×16")


@pytest.mark.parametrize("size", [(0, 0), (-1, -1)])
def test_sizes_below_one_are_open_sizes(size: tuple[int, int], tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {BODY}", WEIGHTS)
    for dimension, value in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], size, strict=True):
        dimension.dim_value = value
    path = tmp_path / "legacy.onnx"
    onnx.save(model, path)
    refused(lambda: adopt_onnx(path, None), "--input-size")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "net (float[N,3,8,8] x, float[N,3,8,8] x2) => (float[N,3,8,8] y) { y = Add (x, x2) }",
            "2 inputs and 1 outputs; one of each",
        ),
        ("net (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] y2) { y = Relu (x) y2 = Relu (y) }", "2 outputs"),
        ("net (uint8[N,3,8,8] x) => (float[N,192] y) { c = Cast <to = 1> (x) y = Flatten (c) }", "UINT8 .*float32"),
        ("net (double[N,3,8,8] x) => (double[N,192] y) { y = Flatten (x) }", "DOUBLE"),
        ("net (uint8[N,3,8,8] x) => (float[N,192] y) { c = Cast <to = 1> (x) y = Flatten (c) }", "--std 0.00392157"),
        ("net (float[N,3,8,8] x) => (int64[N,1] y) { f = Flatten (x) y = ArgMax <axis = 1> (f) }", "ArgMax .ArgMax_1"),
        ("net (float[N,3,8,8] x) => (int64[N,192] y) { f = Flatten (x) y = Cast <to = 7> (f) }", "answers int64"),
        (
            "net (float[N,3,8,8] x) => (float[N,n] y) { q = SequenceConstruct (x, x) "
            "c = ConcatFromSequence <axis = 1> (q) y = Flatten (c) }",
            "no TensorRT reads: SequenceConstruct .SequenceConstruct_0., ConcatFromSequence .ConcatFromSequence_1.",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,n] y) { p, i = MaxPool <kernel_shape = [2, 2]> (x) "
            "c = Cast <to = 1> (i) y = Flatten (c) }",
            "indices of a pooling.*MaxPool .MaxPool_0",
        ),
        ("net (float[N,8,8,3] x) => (float[N,192] y) { y = Flatten (x) }", r"\[None, 8, 8, 3\]"),
        ("net (float[N,192] x) => (float[N,192] y) { y = Relu (x) }", r"\(N, 3, height, width\) is needed"),
        ("net (float x) => (float y) { y = Relu (x) }", r"\(N, 3, height, width\) is needed"),
        ("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu (x) }", r"must answer \(N, classes\)"),
        ("net (float[N,3,8,8] x) => (float[1,n] y) { y = Reshape (x, one) }", r"must answer \(N, classes\)|one image"),
        (
            "net (float[1,3,8,8] x) => (float[1,192] y) { f = Flatten (x) t = Transpose (f) y = Reshape (t, fixed) }",
            "one image only",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) "
            "{ f = Flatten (x) m = ReduceMean <axes = [0]> (f) y = Sub (f, m) }",
            "alone and in a batch",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) "
            "{ f = Flatten (x) n = Neg (f) a = Abs (f) l = Sub (n, a) y = Sqrt (l) }",
            "NaN|infinite|differently",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) { r = RandomNormalLike (x) y = Flatten (r) }",
            "is random: RandomNormalLike .RandomNormalLike_0",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) "
            "{ m = ReduceMax <keepdims = 0> (x) q = Greater (m, s) y = If (q) "
            "<then_branch = t () => (float[N,192] a) { a = Flatten (x) }, "
            "else_branch = e () => (float[N,192] b1) { b1 = Flatten (x) }> }",
            "control flow, .*: If .If_2",
        ),
    ],
)
def test_what_is_no_fp32_image_classifier_is_refused(text: str, words: str, adopt: Callable[..., Exported]) -> None:
    extra = {
        "one": np.array([1, -1]),
        "fixed": np.array([1, 192]),
        "s": np.float32(0.1),
    }
    refused(lambda: adopt(text, weights=extra), words)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\x08\x08", b"PK\x03\x04" + bytes(range(256))])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    refused(lambda: adopt_onnx(path, (8, 8)), r"other\.onnx")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refused(lambda: adopt_onnx(tmp_path / "none.onnx", None), "cannot be read as ONNX: .*No such file")
    refused(lambda: adopt_onnx(tmp_path, None), "cannot be read as ONNX")


def test_damaged_files_are_refused_or_still_whole(tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}", WEIGHTS)
    content = model.SerializeToString()
    path = tmp_path / "damaged.onnx"
    refused_count = 0
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ExportError):
            adopt_onnx(path, (8, 8))
    for position in range(0, len(content), 13):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            adopt_onnx(path, (8, 8))
        except ExportError:
            refused_count += 1
    assert refused_count > 10  # the other bytes are the weights' own


def test_weights_beside_the_file_are_read_and_missed(tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}", WEIGHTS)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    found = adopt_onnx(path, None)
    assert all(not tensor.external_data for tensor in onnx.load_model_from_string(found.content).graph.initializer)
    (tmp_path / "weights.bin").unlink()
    refused(lambda: adopt_onnx(path, None), r"model\.onnx .*weights\.bin")


def test_operators_of_other_domains_are_refused_by_name(tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}", WEIGHTS)
    model.graph.node.append(helper.make_node("Mystery", ["r"], ["unused"], domain="their.domain"))
    model.opset_import.append(helper.make_opsetid("their.domain", 1))
    path = tmp_path / "custom.onnx"
    onnx.save(model, path)
    refused(lambda: adopt_onnx(path, None), r"not of standard ONNX .* their\.domain::Mystery")


def test_initializers_among_the_inputs_are_no_inputs(tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}", WEIGHTS)
    model.graph.input.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    path = tmp_path / "old.onnx"
    onnx.save(model, path)
    found = adopt_onnx(path, None)
    assert found.input_name == "x"
    assert [value.name for value in onnx.load_model_from_string(found.content).graph.input] == ["x"]


def test_the_same_file_gives_the_same_bytes(adopt: Callable[..., Exported]) -> None:
    text = f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}"
    assert adopt(text).content == adopt(text).content


REFUSED_AT_ONCE = {
    "a side of a trillion pixels": ("float[N, 3, 1099511627776, 1099511627776] x", "8192 at most"),
    "no classes": ("float[N, 3, 8, 8] x", "answers nothing"),
}


@pytest.mark.parametrize(("images", "words"), REFUSED_AT_ONCE.values(), ids=[*REFUSED_AT_ONCE])
def test_sizes_that_no_net_has_are_refused(images: str, words: str, graph: Graph, tmp_path: Path) -> None:
    model = graph(
        f"net ({images}) => (float[N, K] y) {{ p = GlobalAveragePool (x) f = Flatten (p) y = MatMul (f, w) }}",
        {"w": np.zeros((3, 0), np.float32)},
        valid=False,
    )
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    with pytest.raises(ExportError, match=words):
        adopt_onnx(path, None)
