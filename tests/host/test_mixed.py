"""The form for strong typing: int8 layers as they were, all else in float16, input and output in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from edgeres import models
from edgeres.calibrate import choose, observe
from edgeres.errors import QuantizationError
from edgeres.export import export_module
from edgeres.quantize import int8_content, lint, mixed_content, plan, write_fp16, write_int8, write_mixed
from edgeres.quantize.graph import Graph as Index

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
NETS = ("cifar", "basic", "bottleneck")
KEPT = {
    "ends": ("conv1", "fc"),
    "block": ("layer1.0*",),
    "branch": ("layer2.0.conv2",),
    "skip": ("layer1.0",),
    "all": ("*",),
}


def sqnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    wanted = wanted.astype(np.float64)
    noise = np.square(got - wanted).sum()
    return float(10 * np.log10(np.square(wanted).sum() / noise)) if noise else float("inf")


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**found, **{tensor.name: tensor.data_type for tensor in model.graph.initializer}}


def partly(found: Any, keep: tuple[str, ...]) -> onnx.ModelProto:
    """Return a net's Q/DQ model with some layers left in float."""
    return write_int8(found.fp32, plan(found.fp32, found.exported.modules, keep), found.ranges)


@pytest.mark.parametrize("name", NETS)
def test_where_all_is_int8_nothing_changes(name: str, net: Callable[[str], Any], shifted: Callable[[str], Any]) -> None:
    for int8 in (net(name).int8, shifted(name).int8):
        assert write_mixed(int8) == int8


@pytest.mark.parametrize("activations", ["net", "shifted"])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", NETS)
def test_every_float_layer_is_float16_and_every_int8_layer_stays(
    name: str, keep: str, activations: str, request: pytest.FixtureRequest, exact: Exact
) -> None:
    found = request.getfixturevalue(activations)(name)
    int8 = partly(found, KEPT[keep])
    before = int8.SerializeToString(deterministic=True)
    mixed = write_mixed(int8)
    assert int8.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(mixed, full_check=True)
    assert lint(mixed) == []
    assert [(o.domain, o.version) for o in mixed.opset_import] == [("", 17)]
    graph, kinds = Index(mixed), types(mixed)
    assert kinds["input"] == kinds["logits"] == TensorProto.FLOAT
    original = {node.name: node for node in int8.graph.node}
    for node in graph.nodes:
        made = [graph.producer.get(tensor) for tensor in node.input[:2]]
        quantized = [maker is not None and maker.op_type == "DequantizeLinear" for maker in made]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node == original[node.name] or node.op_type == "QuantizeLinear"
            assert list(node.input[1:]) == list(original[node.name].input[1:])
        elif node.op_type in ("Conv", "Gemm"):
            assert all(quantized) or not any(quantized)
            wanted = TensorProto.FLOAT if all(quantized) else TensorProto.FLOAT16
            assert {kinds[tensor] for tensor in (*node.input, *node.output)} == {wanted}
            assert not all(quantized) or node == original[node.name]
        elif node.op_type == "Cast":
            assert {kinds[node.input[0]], kinds[node.output[0]]} == {TensorProto.FLOAT, TensorProto.FLOAT16}
    layers = [node.name for node in graph.nodes if node.op_type != "Cast"]
    assert layers == list(original)
    x = np.random.default_rng(5).standard_normal((4, 3, 32, 32)).astype(np.float32)
    wanted, got, truth = (exact(model, x) for model in (int8, mixed, found.fp32))
    assert got.dtype == np.float32
    # What float16 moves across a rounding border is off by a whole int8 step, so the bound is int8's own noise.
    assert sqnr_db(wanted, got) > min(40, sqnr_db(truth, wanted))
    assert sqnr_db(truth, got) > min(55, sqnr_db(truth, wanted) - 3)


@pytest.mark.parametrize("name", NETS)
def test_with_nothing_quantized_it_is_the_float16_model(name: str, net: Callable[[str], Any], exact: Exact) -> None:
    found = net(name)
    mixed = write_mixed(partly(found, ("*",)))
    x = np.random.default_rng(6).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(exact(mixed, x), exact(write_fp16(found.fp32, {})[0], x))


def test_a_shift_is_a_part_of_rounding_and_stays_in_float32(shifted: Callable[[str], Any]) -> None:
    found = shifted("basic")
    mixed = write_mixed(partly(found, ("layer1.0.conv1",)))
    graph, kinds = Index(mixed), types(mixed)
    # behind a convolution in float its ReLU stays, and the shift is an addition of its own, on the other side of a Cast
    names = {module: node for node, module in found.exported.modules.items()}
    (behind,) = graph.readers(f"{names['layer1.0.relu1']}_output_0")
    assert (behind.op_type, kinds[behind.output[0]]) == ("Cast", TensorProto.FLOAT)
    (added,) = graph.readers(behind.output[0])
    assert (added.op_type, {kinds[name] for name in added.input}) == ("Add", {TensorProto.FLOAT})
    assert [reader.op_type for reader in graph.readers(added.output[0])] == ["QuantizeLinear"]


Q = "{0}q = QuantizeLinear ({0}, s, z) {0}d = DequantizeLinear ({0}q, s, z)"
W = "{0}q = QuantizeLinear <axis = 0> ({0}, s4, z4) {0}d = DequantizeLinear <axis = 0> ({0}q, s4, z4)"
CONSTANTS: dict[str, Any] = {
    "w": np.ones((4, 3, 3, 3), np.float32),
    "v": np.ones((4, 4, 3, 3), np.float32),
    "u": np.ones((4, 4, 3, 3), np.float32),
    "b": np.full(4, 0.5, np.float32),
    "s": np.float32(0.5),
    "z": np.int8(0),
    "s4": np.full(4, 0.5, np.float32),
    "z4": np.zeros(4, np.int8),
    "low": np.float32(0),
    "high": np.float32(6),
}
BRANCHES = f"""net (float[N,3,8,8] x) => (float[N,4,4,4] y) {{
    {Q.format("x")} {W.format("w")} {W.format("v")}
    c = Conv (xd, wd, b)
    r = Clip (c, low, high)
    {Q.format("r")}
    e = Conv <pads = [1, 1, 1, 1]> (rd, vd, b)
    f = Conv <pads = [1, 1, 1, 1]> (r, u, b)
    a = Add (e, f)
    t = Clip (a, low, high)
    h = Shape (t)
    o = ConstantOfShape <value = float[1] {{0.25}}> (h)
    m = Mul (t, o)
    y = MaxPool <kernel_shape = [3, 3]> (m)
}}"""


def test_numbers_that_both_kinds_of_layers_read_have_two_forms(graph: Graph, exact: Exact) -> None:
    int8 = graph(BRANCHES, CONSTANTS)
    mixed = write_mixed(int8)
    onnx.checker.check_model(mixed, full_check=True)
    index = Index(mixed)
    read = {node.name: list(node.input) for node in mixed.graph.node}
    named = {node.output[0]: node.name for node in int8.graph.node}
    assert read[named["c"]] == ["xd", "wd", "b"]
    assert read[named["r"]] == ["c", "low", "high"]
    assert read[named["f"]] == ["r_fp16", "u_fp16", "b_fp16"]
    assert read[named["t"]] == ["a", "low_fp16", "high_fp16"]
    assert "u" not in index.initializers
    assert index.initializers["b"].data_type == TensorProto.FLOAT
    np.testing.assert_array_equal(index.constant("b_fp16"), np.full(4, 0.5, np.float16))
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    assert sqnr_db(exact(int8, x), exact(mixed, x)) > 50


def test_names_that_are_taken_are_left_alone(graph: Graph, exact: Exact) -> None:
    int8 = graph(
        BRANCHES.replace("a = Add", "r_fp16 = Relu (e) a = Add").replace("Add (e, f)", "Add (r_fp16, f)"), CONSTANTS
    )
    mixed = write_mixed(int8)
    onnx.checker.check_model(mixed, full_check=True)
    outputs = [name for node in mixed.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_weights_of_float_layers_beyond_float16_are_refused_by_name(value: float, graph: Graph) -> None:
    u = CONSTANTS["u"].copy()
    u[1, 2, 0, 0] = value
    with pytest.raises(QuantizationError, match=r"^u: beyond float16's largest number, 65504"):
        write_mixed(graph(BRANCHES, {**CONSTANTS, "u": u}))


def test_numbers_of_int8_layers_may_be_beyond_float16(graph: Graph) -> None:
    text = f"net (float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {Q.format('x')} {W.format('w')} y = Conv (xd, wd, b) }}"
    int8 = graph(text, {**CONSTANTS, "b": np.full(4, 1e6, np.float32)})
    mixed = write_mixed(int8)
    np.testing.assert_array_equal(Index(mixed).constant("b"), np.full(4, 1e6, np.float32))
    assert list(mixed.graph.node) == list(int8.graph.node)


def test_content_is_that_of_the_file_and_repeats(net: Callable[[str], Any], tmp_path: Path) -> None:
    found = net("cifar")
    fp32, path = tmp_path / "model.fp32.onnx", tmp_path / "model.int8.onnx"
    fp32.write_bytes(found.exported.content)
    path.write_bytes(int8_content(fp32, plan(found.fp32, found.exported.modules, ["fc"]), found.ranges)[0])
    content = mixed_content(path)
    assert content == mixed_content(path)
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(content).graph.initializer}
    assert weights["fc.weight_fp16"].dtype == np.float16
    assert weights["conv1.weight"].dtype == np.float32


def frames(paths: list[Path]) -> np.ndarray:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths]) / 255
    return np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("keep", [(), ("conv1", "fc"), ("layer2.*",)], ids=["none", "ends", "stage"])
def test_a_trained_net_keeps_its_accuracy(
    keep: tuple[str, ...], shared_data: Path, tmp_path: Path, exact: Exact
) -> None:
    cifar = shared_data / "cifar10"
    module = models.create("resnet20_cifar", 10, 0)
    models.load_weights(module, cifar / "checkpoints" / "resnet20-12fca82f.th")
    exported = export_module(module.eval(), (32, 32))
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(exported.content)
    fp32 = onnx.load(path)
    placement = plan(fp32, exported.modules, keep)
    samples = frames(sorted((cifar / "calibration").glob("*/*.png"))[::8])
    int8 = write_int8(fp32, placement, choose(observe(path, placement.tensors, [samples]), "mse", 99.99))
    x = frames(sorted((cifar / "validation").glob("*/*.png"))[::2])
    truth, wanted, got = (exact(model, x) for model in (fp32, int8, write_mixed(int8)))
    if keep:
        assert sqnr_db(wanted, got) > 30
        assert abs(sqnr_db(truth, got) - sqnr_db(truth, wanted)) < 0.5
        assert (wanted.argmax(axis=1) == got.argmax(axis=1)).mean() >= 0.985
    else:
        np.testing.assert_array_equal(got, wanted)
