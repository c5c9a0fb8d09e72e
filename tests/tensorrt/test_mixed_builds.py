"""Strongly typed engines of partly quantized nets: int8 where planned, FP16 for the rest, and no layer more for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from edgeres.artifacts import LayerPlan
from edgeres.backends.tensorrt import BuildResult, EngineLayer
from edgeres.backends.tensorrt.layers import attribute
from edgeres.calibrate import choose, observe
from edgeres.quantize import Placement, plan, shiftable, write_int8, write_mixed

KEPT: dict[str, tuple[str, ...]] = {
    "none": (),
    "ends": ("conv1", "fc"),
    "stage": ("layer2.*",),
    "branch": ("layer2.0.conv2",),
    "all": ("*",),
}


@pytest.fixture(scope="session")
def build(
    quantized: Callable[..., Any], rtx: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Sequence[str]], tuple[BuildResult, BuildResult, tuple[LayerPlan, ...]]]:
    """Return the engines of a net's Q/DQ form and of its mixed form, with some modules kept in float, and the plan."""

    def make(
        name: str, keep: Sequence[str], activations: str = "symmetric"
    ) -> tuple[BuildResult, BuildResult, tuple[LayerPlan, ...]]:
        found = quantized(name)
        placement = plan(found.fp32, found.exported.modules, keep)
        samples = np.random.default_rng(0).standard_normal((2, 3, found.size, found.size)).astype(np.float32)
        ranges = {}
        if placement.tensors:
            statistics = observe(found.path.with_name("model.fp32.onnx"), placement.tensors, [samples])
            allowed = shiftable(found.fp32, placement) if activations == "shifted" else ()
            ranges = choose(statistics, "minmax", 99.99, allowed)
        int8 = write_int8(found.fp32, placement, ranges)
        folder: Path = tmp_path_factory.mktemp(name)
        results = []
        for form, model in (("int8", int8), ("mixed", write_mixed(int8))):
            onnx.save(model, folder / f"{form}.onnx")
            request = msgspec.structs.replace(found.request(folder / f"{form}.plan"), onnx=str(folder / f"{form}.onnx"))
            results.append(rtx.build(request))
        return results[0], results[1], placement.layers

    return make


def weighted(layers: Sequence[EngineLayer]) -> Counter[tuple[str, str]]:
    """Count what the convolutions and the classifier read, and what their weights are in."""
    kinds = ("correlation", "gemm", "runtime_fusion")
    return Counter((layer.inputs[0], layer.constants[0]) for layer in layers if layer.type in kinds)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *(("resnet20_cifar", keep) for keep in KEPT),
        ("resnet18", "none"),
        ("resnet18", "ends"),
        ("resnet18", "branch"),
        ("resnet50", "ends"),
    ],
)
@pytest.mark.parametrize("activations", ["symmetric", "shifted"])
def test_int8_stays_and_the_rest_is_half(name: str, keep: str, activations: str, build: Callable[..., Any]) -> None:
    int8, mixed, layers = build(name, KEPT[keep], activations)
    assert len(mixed.layers) <= len(int8.layers)
    assert activations == "symmetric" or len(mixed.layers) <= len(build(name, KEPT[keep])[1].layers)
    total = sum(one.op in ("Conv", "Gemm") for one in layers)
    wanted = sum(one.op in ("Conv", "Gemm") and one.precision == "int8" for one in layers)
    both = Counter({("int8", "int8"): wanted, ("fp16", "fp16"): total - wanted})
    assert weighted(mixed.layers) == +both
    assert weighted(int8.layers) == +Counter({("int8", "int8"): wanted, ("fp32", "fp32"): total - wanted})
    found, warnings = attribute(mixed.layers, layers)
    assert warnings == attribute(int8.layers, layers)[1] == ()
    kept = [one.module for one in layers if one.op in ("Conv", "Gemm") and one.precision == "float"]
    assert {
        layer.module.split(" + ")[0] for layer in found if layer.type == "correlation" and layer.precision == "fp16"
    } == {module for module in kept if module != "fc"}


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18"])
def test_behind_a_float_convolution_a_quantized_skip_is_read_in_float(
    name: str, quantized: Callable[[str], Any], rtx: Any, tmp_path: Path
) -> None:
    """Why no such skip is planned: the addition fuses into the convolution, in its type, whatever its skip is in."""
    found = quantized(name)
    placement = plan(found.fp32, found.exported.modules, KEPT["branch"])
    (addition,) = [one for one in placement.layers if one.module == "layer2.0" and one.op == "Add"]
    forced = forced_skip(placement, found.placement, addition.node)
    samples = np.random.default_rng(0).standard_normal((2, 3, found.size, found.size)).astype(np.float32)
    ranges = choose(observe(found.path.with_name("model.fp32.onnx"), forced.tensors, [samples]), "minmax", 99.99)
    path = tmp_path / "forced.onnx"
    for write, wanted in ((lambda model: model, "fp32"), (write_mixed, "fp16")):
        onnx.save(write(write_int8(found.fp32, forced, ranges)), path)
        result = rtx.build(msgspec.structs.replace(found.request(tmp_path / "plan"), onnx=str(path)))
        assert attribute(result.layers, forced.layers)[1] == (
            f"the skip input of layer2.0 (Add) was planned in int8 and is loaded as {wanted}",
        )
        (fused,) = [layer for layer in result.layers if addition.node in layer.nodes]
        assert fused.inputs == (wanted, wanted)


def forced_skip(placement: Placement, whole: Placement, addition: str) -> Placement:
    """Return a plan in which one addition's skip is quantized as it is where nothing is kept in float."""
    (skip,) = [msgspec.structs.replace(one, precision="int8 skip") for one in placement.layers if one.node == addition]
    points = {point.tensor: point for point in placement.points}
    for point in whole.points:
        wanted = tuple(reader for reader in point.readers if reader[0] == addition)
        if wanted:
            others = points[point.tensor].readers if point.tensor in points else ()
            points[point.tensor] = replace(point, readers=(*others, *wanted))
    layers = tuple(skip if one.node == addition else one for one in placement.layers)
    return replace(placement, points=tuple(points.values()), layers=layers)


@pytest.mark.parametrize("activations", ["symmetric", "shifted"])
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet50"])
def test_a_wholly_quantized_net_runs_as_planned(
    name: str, activations: str, quantized: Callable[..., Any], rtx: Any, tmp_path: Path
) -> None:
    found = quantized(name, activations)
    result = rtx.build(found.request(tmp_path / "plan"))
    layers, warnings = attribute(result.layers, found.placement.layers)
    assert warnings == ()
    modules = found.exported.modules
    named = {layer.module for layer in layers if layer.type in ("correlation", "gemm")}
    assert named == {modules[node] for node in found.weighted}
    additions = [node.name for node in found.fp32.graph.node if node.op_type == "Add"]
    loading = [layer for layer in layers if "int8" in layer.inputs and set(additions) & set(layer.nodes)]
    projected = sum(module.endswith("downsample.0") for module in modules.values())
    assert len(loading) == len(additions) - projected


def test_what_the_linter_would_have_refused_is_found_in_the_engine(
    quantized: Callable[..., Any], rtx: Any, tmp_path: Path
) -> None:
    found = quantized("resnet20_cifar")
    broken = onnx.load(found.path)
    nodes = {node.name: node for node in broken.graph.node}
    names = {module: node for node, module in found.exported.modules.items()}
    wrong_axis, alone, skip = (names[f"layer1.{block}"] for block in ("0.conv1", "1.conv2", "2"))
    for part in ("QuantizeLinear", "DequantizeLinear"):
        (axis,) = nodes[f"layer1.0.conv1.weight_{part}"].attribute
        axis.i = 1
    for name, index in ((alone, 0), (skip, 1)):
        maker = next(node for node in broken.graph.node if nodes[name].input[index] in node.output)
        nodes[name].input[index] = nodes[maker.name.replace("Dequantize", "Quantize")].input[0]
    path = tmp_path / "broken.onnx"
    onnx.save(broken, path)
    result = rtx.build(msgspec.structs.replace(found.request(tmp_path / "plan"), onnx=str(path)))
    warnings = attribute(result.layers, found.placement.layers)[1]
    assert nodes[wrong_axis].op_type == "Conv"
    assert warnings == (
        "layer1.0.conv1 (Conv) was planned in int8 and runs in fp32",
        "layer1.1.conv2 (Conv) was planned in int8 and runs in fp32",
        "the skip input of layer1.1 (Add) was planned in int8 and is loaded as fp32",
        "the skip input of layer1.2 (Add) was planned in int8 and is loaded as fp32",
    )
