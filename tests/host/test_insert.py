"""The written Q/DQ file computes what quantizing by hand computes, and changes nothing that the plan does not name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgeres.artifacts import FileRef, TensorRange
from edgeres.errors import ExportError, LintError, QuantizationError
from edgeres.quantize import int8_content, plan, plan_file, write_int8
from edgeres.quantize.describe import describe_file
from edgeres.quantize.graph import Graph as Index

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
SOME_RANGE = TensorRange(12.7, 0.1, "minmax", -12.7, 12.7, 1, 0.0, 0.0, None)
NETS = ("cifar", "basic", "bottleneck")


def fake(x: Tensor, scale: float) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)


def simulated(net: Any) -> nn.Module:
    """Return the torch module with batch norms fused and int8 simulated by hooks: torch's own quantizer, not ours."""
    graph = Index(net.fp32)
    modules = net.exported.modules
    scales = {modules[node]: net.ranges[p.range_of].scale for p in net.placement.points for node, _ in p.readers}
    pool = next(node for node in graph.nodes if node.op_type == "GlobalAveragePool")
    copied: nn.Module = copy.deepcopy(net.module)
    for part in list(copied.modules()):
        children = dict(part.named_children())
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            first, second = children.get(conv), children.get(norm)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(part, conv, fuse_conv_bn_eval(first, second))
                setattr(part, norm, nn.Identity())
    for path, part in copied.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            amax = part.weight.detach().abs().amax(tuple(range(1, part.weight.ndim)))
            zeros = torch.zeros(len(amax), dtype=torch.int32)
            part.weight.data = torch.fake_quantize_per_channel_affine(part.weight.data, amax / 127, zeros, 0, -128, 127)
        if path in scales and isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_pre_hook(lambda _, args, scale=scales[path]: (fake(args[0], scale),))
        if path.endswith("downsample"):
            block = path.rpartition(".")[0]
            part.register_forward_hook(lambda _, args, out, scale=scales[block]: fake(out, scale))
    copied.get_submodule("avgpool").register_forward_pre_hook(
        lambda _, args: (fake(args[0], scales[modules[pool.name]]),)
    )
    return copied


@pytest.mark.parametrize("name", NETS)
def test_the_file_computes_what_torch_simulates(name: str, net: Callable[[str], Any], exact: Exact) -> None:
    found = net(name)
    x = np.random.default_rng(8).standard_normal((16, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        wanted = simulated(found)(torch.from_numpy(x)).numpy().astype(np.float64)
    got = exact(found.int8, x)
    # A sum beside a rounding border may fall to its other side; but on most images none does, and all digits agree.
    off = np.abs(got - wanted).max(1)
    assert (off < 1e-5 * np.abs(wanted).max()).mean() >= 0.5
    assert np.square(off).mean() < 0.3 * np.square(got - exact(found.fp32, x)).max(1).mean()
    assert (np.abs(got - exact(found.fp32, x)).max(1) > 1e-3).all()


@pytest.mark.parametrize("name", NETS)
def test_only_pairs_are_added(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    kept = [node for node in found.int8.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [(n.name, n.op_type, list(n.output)) for n in kept] == [
        (n.name, n.op_type, list(n.output)) for n in found.fp32.graph.node
    ]
    before = {tensor.name: tensor for tensor in found.fp32.graph.initializer}
    after = {tensor.name: tensor for tensor in found.int8.graph.initializer}
    assert all(after[name] == tensor for name, tensor in before.items())
    pairs = len(found.placement.points) + len(found.placement.weights)
    assert len(found.int8.graph.node) == len(found.fp32.graph.node) + 2 * pairs
    assert len(after) == len(before) + 2 * pairs
    onnx.checker.check_model(found.int8, full_check=True)
    assert found.int8.opset_import == found.fp32.opset_import
    assert list(found.int8.graph.input) == list(found.fp32.graph.input)
    assert list(found.int8.graph.output) == list(found.fp32.graph.output)


@pytest.mark.parametrize("name", NETS)
def test_scales_and_zero_points_are_as_written_in_the_contract(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.int8.graph.initializer}
    for point in found.placement.points:
        scale, zero = values[f"{point.tensor}_scale"], values[f"{point.tensor}_zero_point"]
        assert (scale.dtype.name, zero.dtype.name, scale.shape, zero.shape) == ("float32", "int8", (), ())
        assert zero == 0
        assert scale == np.float32(found.ranges[point.range_of].amax / 127)
    for weight in found.placement.weights:
        scale, zero = values[f"{weight.tensor}_scale"], values[f"{weight.tensor}_zero_point"]
        tensor = values[weight.tensor]
        assert scale.shape == zero.shape == (tensor.shape[weight.axis],)
        assert (scale.dtype.name, zero.dtype.name) == ("float32", "int8")
        assert not zero.any()
        amax = np.abs(tensor).reshape(len(tensor), -1).max(1)
        np.testing.assert_allclose(scale, amax / 127, rtol=1e-6)
    for node in found.int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3


def test_the_input_model_is_left_alone_and_writing_repeats(net: Callable[[str], Any]) -> None:
    found = net("cifar")
    before = found.fp32.SerializeToString(deterministic=True)
    again = write_int8(found.fp32, found.placement, found.ranges)
    assert found.fp32.SerializeToString(deterministic=True) == before
    assert again.SerializeToString(deterministic=True) == found.int8.SerializeToString(deterministic=True)


def test_a_missing_range_is_refused_by_name(net: Callable[[str], Any]) -> None:
    found = net("cifar")
    short = {name: value for name, value in found.ranges.items() if name != "input"}
    with pytest.raises(QuantizationError, match=r"no range for input\. Calibrate again"):
        write_int8(found.fp32, found.placement, short)


def test_a_dead_channel_quantizes_to_zeros(net: Callable[[str], Any], exact: Exact) -> None:
    found = net("cifar")
    dead = onnx.ModelProto()
    dead.CopyFrom(found.fp32)
    for tensor in dead.graph.initializer:
        if tensor.name == "conv1.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    written = write_int8(dead, found.placement, found.ranges)
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}["conv1.weight_scale"]
    assert scales[3] == 1.0
    assert np.isfinite(exact(written, np.ones((1, 3, 32, 32), np.float32))).all()


def test_names_that_are_taken_are_not_taken_twice(graph: Graph, exact: Exact) -> None:
    body = """
        c = Conv (x, w)
        x_scale = Relu (c)
        x_2_dequantized = Neg (x_scale)
        y = Conv (x_2_dequantized, w_zero_point)"""
    weights = {
        "w": np.full((4, 3, 1, 1), 0.127, np.float32),
        "w_zero_point": np.full((4, 4, 1, 1), -0.127, np.float32),
    }
    model = graph(f"net (float[N,3,4,4] x) => (float[N,4,4,4] y) {{ {body} }}", weights)
    model.graph.node[0].name = "w_QuantizeLinear"
    placement = plan(model, {})
    ranges = dict.fromkeys(placement.tensors, SOME_RANGE)
    written = write_int8(model, placement, ranges)
    names = [node.name for node in written.graph.node]
    assert len(set(names)) == len(names)
    assert written == write_int8(model, placement, ranges)
    x = np.random.default_rng(0).integers(-12, 12, (2, 3, 4, 4)).astype(np.float32) / 10
    np.testing.assert_allclose(exact(written, x), exact(model, x), atol=0.03)


def test_a_weight_read_along_two_axes_has_two_pairs(graph: Graph, exact: Exact) -> None:
    k = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * np.array([[1], [9], [30], [99]])
    body = "{ a = Gemm <transB = 1> (x, k) b = MatMul (x, k) y = Add (a, b) }"
    model = graph(f"net (float[N,4] x) => (float[N,4] y) {body}", {"k": k.astype(np.float32)})
    placement = plan(model, {})
    assert [(weight.tensor, weight.axis) for weight in placement.weights] == [("k", 0), ("k", 1)]
    written = write_int8(model, placement, {"x": SOME_RANGE})
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    index = Index(written)
    scales = {
        node.op_type: tensors[index.producer[node.input[1]].input[1]]
        for node in written.graph.node
        if node.op_type in ("Gemm", "MatMul")
    }
    np.testing.assert_allclose(scales["Gemm"], np.abs(k).max(1) / 127, rtol=1e-6)
    np.testing.assert_allclose(scales["MatMul"], np.abs(k).max(0) / 127, rtol=1e-6)
    x = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    assert np.abs(exact(written, x) - exact(model, x)).max() < 0.03 * np.abs(exact(model, x)).max()


def test_what_is_written_is_checked(graph: Graph) -> None:
    text = "net (float[N,3,4,4] x) => (float[N,4,4,4] y) { c = Conv (x, w) y = Relu (c, c) }"
    model = graph(text, {"w": np.ones((4, 3, 1, 1), np.float32)}, valid=False)
    with pytest.raises(LintError, match=r"model\.int8\.onnx: edgeres wrote ONNX that is not valid"):
        write_int8(model, plan(model, {}), {"x": SOME_RANGE})


def test_from_file_to_content_is_the_same(net: Callable[[str], Any], tmp_path: Path) -> None:
    found = net("cifar")
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(found.exported.content)
    placement = plan_file(path, found.exported.modules, [])
    assert placement == found.placement
    content, layers = int8_content(path, placement, found.ranges)
    assert content == found.int8.SerializeToString(deterministic=True)
    assert layers == placement.layers


def test_a_written_file_tells_its_precisions(net: Callable[[str], Any], tmp_path: Path) -> None:
    found = net("cifar")
    path = tmp_path / "model.int8.onnx"
    onnx.save(found.int8, path)
    facts = describe_file(path)
    assert (facts["opset"], facts["inputs"], facts["outputs"], facts["lint"]) == (17, ["input"], ["logits"], [])
    precisions = {(layer["type"], layer["precision"]) for layer in facts["layers"]}
    assert {("Conv", "int8"), ("Gemm", "int8"), ("Add", "mixed"), ("GlobalAveragePool", "int8")} <= precisions
    assert ("Conv", "fp32") not in precisions
    onnx.save(found.fp32, path)
    assert {layer["precision"] for layer in describe_file(path)["layers"] if layer["type"] == "Conv"} == {"fp32"}
    for content in (b"", b"hello", b"\x08\x08"):
        path.write_bytes(content)
        with pytest.raises(ExportError, match=r"model\.int8\.onnx"):
            describe_file(path)


def test_a_tensor_without_its_values_is_refused(net: Callable[[str], Any], tmp_path: Path) -> None:
    damaged = onnx.ModelProto.FromString(net("cifar").int8.SerializeToString())
    for tensor in damaged.graph.initializer:
        tensor.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(damaged.SerializeToString())
    with pytest.raises(ExportError, match=r"model\.onnx is not valid ONNX"):
        describe_file(path)


def test_a_file_whose_error_has_no_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise RuntimeError

    monkeypatch.setattr(onnx, "load", refuse)
    with pytest.raises(ExportError, match="cannot be read as ONNX: RuntimeError"):
        describe_file(tmp_path / "model.onnx")


def test_the_export_record_holds_the_facts(net: Callable[[str], Any]) -> None:
    exported = net("cifar").exported
    record = exported.record(FileRef("model.fp32.onnx", "0" * 64, len(exported.content)))
    assert (record.opset, record.input_shape, record.num_classes) == (17, (3, 32, 32), 10)
    assert record.modules == exported.modules
