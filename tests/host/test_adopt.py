"""A user's own ONNX file: brought into shape where that keeps its numbers, refused in words where it would not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeres.errors import ExportError
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
    ],
)
def test_opsets_that_cannot_be_converted_are_refused(opset: int, text: str, adopt: Callable[..., Exported]) -> None:
    refused(lambda: adopt(text, opset=opset), f"is opset {opset} and cannot be converted to 17")


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
        ("net (float16[N,3,8,8] x) => (float16[N,192] y) { y = Flatten (x) }", "FLOAT16"),
        ("net (float[N,8,8,3] x) => (float[N,192] y) { y = Flatten (x) }", r"\[None, 8, 8, 3\]"),
        ("net (float[N,192] x) => (float[N,192] y) { y = Relu (x) }", r"\(N, 3, height, width\) is needed"),
        ("net (float x) => (float y) { y = Relu (x) }", r"\(N, 3, height, width\) is needed"),
        ("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu (x) }", r"must answer \(N, classes\)"),
        ("net (float[N,3,8,8] x) => (float[1,n] y) { y = Reshape (x, one) }", r"must answer \(N, classes\)|one image"),
        ("net (float[1,3,8,8] x) => (float[1,192] y) { y = Reshape (x, fixed) }", "one image only"),
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
            "is random .RandomNormalLike",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) "
            "{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Flatten (d) }",
            "quantized already .DequantizeLinear, QuantizeLinear",
        ),
        (
            "net (float[N,3,8,8] x) => (float[N,192] y) { y = If (yes) "
            "<then_branch = t () => (float[N,192] a) { a = Flatten (x) }, "
            "else_branch = e () => (float[N,192] b1) { b1 = Flatten (x) }> }",
            "control flow .If.",
        ),
    ],
)
def test_what_is_no_fp32_image_classifier_is_refused(text: str, words: str, adopt: Callable[..., Exported]) -> None:
    extra = {
        "one": np.array([1, -1]),
        "fixed": np.array([1, 192]),
        "s": np.float32(0.1),
        "z": np.int8(0),
        "yes": np.array(True),
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


def test_operators_that_onnxruntime_does_not_know_are_refused(tmp_path: Path, graph: Graph) -> None:
    model = graph(f"net (float[1,3,8,8] x) => (float[1,5] y) {BODY}", WEIGHTS)
    model.graph.node.append(helper.make_node("Mystery", ["r"], ["unused"], domain="their.domain"))
    model.opset_import.append(helper.make_opsetid("their.domain", 1))
    path = tmp_path / "custom.onnx"
    onnx.save(model, path)
    refused(lambda: adopt_onnx(path, None), "does not run in onnxruntime")


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
