"""Real builds, with no GPU: what each layer runs in, and what is refused in our own words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgeres
from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.artifacts import ExportedModel, QuantizedModel, from_data
from edgeres.backends.tensorrt import BuildRequest, attribute
from edgeres.errors import BackendError, BundleError
from edgeres.files import sha256_file
from edgeres.quantize.half import write_fp16

WEIGHTED = ("correlation", "conv", "gemm")
WATCHED = """
import json, sys
import msgspec
from edgeres.backends.tensorrt import BuildRequest
from edgeres.backends.tensorrt.builder import build_plan
from edgeres.errors import BackendError

request = msgspec.json.decode(sys.argv[1], type=BuildRequest)
steps, said = [], ""
stop = int(sys.argv[2])
def cancelled():
    return len(steps) >= stop > 0
def progress(*step):
    steps.append(step)
    if 0 < -stop <= len(steps):
        raise ZeroDivisionError("from the callback")
try:
    build_plan(request, progress, cancelled)
except (BackendError, ZeroDivisionError) as problem:
    said = f"{type(problem).__name__}: {problem}"
again = build_plan(request, lambda *step: None, lambda: False)
print("\\n" + json.dumps([steps, said, len(again.layers)]))
"""


@pytest.mark.parametrize("activations", ["symmetric", "shifted"])
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet50"])
def test_every_weighted_layer_runs_in_int8(
    name: str, activations: str, rtx: Any, quantized: Callable[..., Any], tmp_path: Path
) -> None:
    net = quantized(name, activations)
    result = rtx.build(net.request(tmp_path / "a.engine"))
    assert result.sha256 == sha256_file(tmp_path / "a.engine")
    assert result.bytes == (tmp_path / "a.engine").stat().st_size
    assert result.warnings == ()
    assert result.built_for["flavour"] == "tensorrt-rtx"
    assert result.built_for["compute_capability"] == "portable"
    assert result.built_for["tensorrt"].startswith("1.")
    weighted = [layer for layer in result.layers if layer.type in WEIGHTED]
    assert len(weighted) == len(net.weighted)
    assert {(layer.precision, layer.inputs[0], layer.constants[0]) for layer in weighted} == {("int8",) * 3}
    assert set(net.weighted) <= {node for layer in weighted for node in layer.nodes}
    layers, complaints = attribute(result.layers, net.placement.layers)
    assert complaints == ()
    modules = {one.module for one in net.placement.layers if one.node in net.weighted}
    assert modules <= {module for layer in layers for module in layer.module.split(" + ")}


def test_a_trained_net_runs_in_int8_throughout(rtx: Any, shared_data: Path, tmp_path: Path) -> None:
    """The published ResNet-20 with its real ranges, in the Q/DQ form and in the form for strong typing."""
    cifar = shared_data / "cifar10"
    bundle = edgeres.build(
        model="resnet20_cifar",
        weights=next((cifar / "checkpoints").glob("resnet20-*.th")),
        calibration=cifar / "calibration",
        calibration_count=128,
        validation=cifar / "validation",
        backend="cpu",
        out=tmp_path / "bundle",
    )
    quantized = from_data(bundle.manifest.stages["quantize"].facts, QuantizedModel, "quantize")
    exported = from_data(bundle.manifest.stages["export"].facts, ExportedModel, "export")
    forms = [ref.path for ref in (quantized.file, quantized.mixed) if ref is not None]
    for form in forms:
        request = BuildRequest(
            onnx=str(tmp_path / "bundle" / form),
            plan=str(tmp_path / f"{form}.engine"),
            input_name=exported.input_name,
            shape=exported.input_shape,
            flavour="tensorrt-rtx",
        )
        result = rtx.build(request)
        layers, complaints = attribute(result.layers, quantized.layers)
        assert complaints == ()
        weighted = [layer for layer in layers if layer.type in ("correlation", "conv", "gemm")]
        assert len(weighted) == 20
        assert {(layer.precision, layer.inputs[0], layer.constants[0]) for layer in weighted} == {("int8",) * 3}


def shallow(name: str) -> Architecture:
    """An architecture by its name with at most two blocks a stage: its first, and one of the others, which are alike.

    With EDGERES_WHOLE in the environment it is whole, which takes minutes for all names.
    """
    whole = ARCHITECTURES[name]
    depths = whole.depths if os.environ.get("EDGERES_WHOLE") else tuple(min(depth, 2) for depth in whole.depths)
    return msgspec.structs.replace(whole, depths=depths)


def alike() -> list[list[str]]:
    """All names, those together that are the same network once they are shallow."""
    groups: dict[bytes, list[str]] = {}
    for name in sorted(ARCHITECTURES):
        same = msgspec.structs.replace(shallow(name), name="", source="")
        groups.setdefault(msgspec.json.encode(same), []).append(name)
    return [*groups.values()]


@pytest.mark.parametrize("names", alike(), ids=",".join)
def test_every_name_is_built_as_planned(
    names: list[str], rtx: Any, quantized: Callable[..., Any], tmp_path: Path
) -> None:
    """What the rules put in int8 is in int8, and nothing is left in float but the gates of squeeze-and-excitation."""
    name = names[0]
    net = quantized(shallow(name), "shifted", 64 if ARCHITECTURES[name].stem == "imagenet" else 32)
    result = rtx.build(net.request(tmp_path / "a.engine"))
    assert attribute(result.layers, net.placement.layers)[1] == ()
    planned = {one.node: one.precision for one in net.placement.layers if one.node in net.weighted}
    floats = {node for node, precision in planned.items() if precision == "float"}
    assert floats == {node for node in net.weighted if "/se/" in node}
    assert bool(floats) == (ARCHITECTURES[name].attention == "se")
    weighted = [layer for layer in result.layers if layer.type in WEIGHTED]
    built = {node: layer for layer in weighted for node in layer.nodes if node in planned}
    assert set(built) == set(planned)
    for node, layer in built.items():
        kind = "fp32" if node in floats else "int8"
        assert (layer.precision, layer.inputs[0], layer.constants[0]) == (kind,) * 3, node


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ("resnet20_cifar", "resnet18", "resnet50") for form in ("shifted", "free")]
    + [("se_resnet50", "free")],
)
def test_the_full_int8_range_costs_no_layer(
    name: str, form: str, rtx: Any, quantized: Callable[..., Any], tmp_path: Path
) -> None:
    symmetric, shifted = (
        rtx.build(quantized(name, activations).request(tmp_path / f"{activations}.engine")).layers
        for activations in ("symmetric", form)
    )
    assert len(shifted) == len(symmetric)
    # Nor does any layer read or write another type: each kernel has its shift or its map in it.
    assert Counter((one.type, one.inputs[:1], one.outputs) for one in shifted if one.type in WEIGHTED) == Counter(
        (one.type, one.inputs[:1], one.outputs) for one in symmetric if one.type in WEIGHTED
    )
    assert Counter((tuple(sorted(one.inputs)), one.outputs) for one in shifted) == Counter(
        (tuple(sorted(one.inputs)), one.outputs) for one in symmetric
    )


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet50"])
def test_pixels_cost_no_layer(name: str, rtx: Any, quantized: Callable[..., Any], tmp_path: Path) -> None:
    """One kernel reads uint8 and writes what the first convolution reads, as one reads float32 elsewhere; all others
    are the same. So in a network of whole pixels, in one that looks them up, and in float16."""
    net = quantized(name)
    path, preprocessing = net.of_whole_pixels(tmp_path)
    half = tmp_path / "model.fp16.onnx"
    onnx.save(write_fp16(net.fp32, {})[0], half)
    for onnx_file, precision, whole in ((path, "int8", True), (net.path, "int8", False), (half, "fp16", False)):
        given = {"onnx": str(onnx_file), "precision": precision, "preprocessing": preprocessing}
        floats = rtx.build(net.request(tmp_path / "floats.engine", **given))
        pixels = rtx.build(net.request(tmp_path / "pixels.engine", **given, input="auto" if whole else "uint8"))
        assert (floats.input, pixels.input, pixels.whole_pixels) == ("float32", "uint8", whole)
        reading = [layer for layer in pixels.layers if "uint8" in layer.inputs]
        assert [layer.outputs for layer in reading] == [("int8" if precision == "int8" else "fp16",)]
        counted = [
            Counter((one.type, one.inputs, one.outputs) for one in layers)
            for layers in (floats.layers, [one for one in pixels.layers if one not in reading])
        ]
        (gone,) = (counted[0] - counted[1]).elements()
        assert gone == ("kgen", ("fp32",), reading[0].outputs)
        assert not counted[1] - counted[0]


def test_children_build_the_same(rtx: Any, small: Any, tmp_path: Path) -> None:
    """The layers are the same; the bytes are not, for the builder names its own work by chance."""
    first = rtx.build(small.request(tmp_path / "a.engine"))
    second = rtx.build(small.request(tmp_path / "b.engine"), "child")
    assert first.layers == second.layers
    assert second.sha256 == sha256_file(tmp_path / "b.engine")
    assert second.plan == str(tmp_path / "b.engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "b.engine"]


@pytest.mark.parametrize(
    "options",
    [
        {"batch": (1, 1, 1)},
        {"batch": (2, 32, 128)},
        {"workspace": 1 << 30},
        {"optimization_level": 0},
        {"optimization_level": 5},
    ],
    ids=str,
)
def test_options_are_taken(options: dict[str, Any], rtx: Any, small: Any, tmp_path: Path) -> None:
    result = rtx.build(small.request(tmp_path / "a.engine", **options))
    assert result.layers
    assert result.warnings == ()


REFUSED = {
    "version-compatible": ({"version_compatible": True}, "no other version of it is known to run its engines"),
    "hardware-compatible": ({"hardware_compatible": True}, "leaves hardware_compatibility_level at"),
    "a DLA": ({"target": "dla0"}, "no RTX card has a DLA"),
    "a small workspace": ({"workspace": 1 << 20}, "Give the builder more workspace"),
    "no workspace": ({"workspace": 0}, "holds nothing"),
    "a level too high": ({"optimization_level": 6}, "0 to 5"),
    "batches out of order": ({"batch": (4, 2, 8)}, "min ≤ opt ≤ max"),
    "a batch of none": ({"batch": (0, 1, 8)}, "min ≤ opt ≤ max"),
    "an unknown precision": ({"precision": "int4"}, "no precision 'int4'"),
    "an unknown target": ({"target": "npu"}, "no target 'npu'"),
    "an unknown flavour": ({"flavour": "tensorflow"}, "no flavour 'tensorflow'"),
    "the other flavour": ({"flavour": "tensorrt"}, "--backend tensorrt-rtx"),
    "ranges for a GPU": ({"calibration_cache": "TRT-8502"}, "for a DLA only"),
    "another input": ({"input_name": "data"}, "its inputs are input, not data"),
    "another shape": ({"shape": (3, 64, 64)}, "3×32×32, the recipe's is 3×64×64"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_requests_are_refused(options: dict[str, Any], words: str, rtx: Any, small: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=words):
        rtx.build(small.request(tmp_path / "a.engine", **options))
    assert not (tmp_path / "a.engine").exists()


def test_several_mistakes_are_told_at_once(rtx: Any, small: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"min ≤ opt ≤ max.*0 to 5"):
        rtx.build(small.request(tmp_path / "a.engine", batch=(3, 2, 1), optimization_level=7))


@pytest.mark.parametrize("damage", ["empty", "hello", "text", "half", "missing", "folder"])
def test_damaged_files_are_refused(damage: str, rtx: Any, small: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = small.path.read_bytes()
    contents = {"empty": b"", "hello": b"hello", "text": b"no network\n" * 99, "half": content[: len(content) // 2]}
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(BackendError, match=r"model\.onnx"):
        rtx.build(small.request(tmp_path / "a.engine", onnx=str(path)))
    assert not (tmp_path / "a.engine").exists()


def convolution(**changes: Any) -> onnx.ModelProto:
    """Return a small Q/DQ convolution; ``changes`` replaces what TensorRT is particular about."""
    point = changes.get("zero_point", np.int8(0))
    tensors = {
        "scale": np.float32(changes.get("scale", 0.1)),
        "zero": point,
        "w": np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32),
        "w_scale": np.full(8, 0.02, np.float32),
        "w_zero": np.full(8, changes.get("weight_zero_point", 0), np.int8),
        "b": changes.get("bias", np.zeros(8, np.float32)),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
        helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["wq"], "quantize_w", axis=0),
        helper.make_node("DequantizeLinear", ["wq", "w_scale", "w_zero"], ["wd"], "dequantize_w", axis=0),
    ]
    bias = "b"
    if tensors["b"].dtype == np.int32:
        nodes.append(helper.make_node("DequantizeLinear", ["b", "scale"], ["bd"], "dequantize_b"))
        bias = "bd"
    nodes.append(helper.make_node("Conv", ["d", "wd", bias], ["c"], "convolution", pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node(changes.get("operator", "Relu"), ["c"], ["output"], "activation"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def request_for(model: onnx.ModelProto, folder: Path) -> BuildRequest:
    onnx.save(model, folder / "model.onnx")
    return BuildRequest(
        onnx=str(folder / "model.onnx"),
        plan=str(folder / "a.engine"),
        input_name="input",
        shape=(3, 16, 16),
        flavour="tensorrt-rtx",
    )


GRAPHS = {
    "a zero point": ({"zero_point": np.int8(3)}, "Non-zero zero point"),
    "a weight's zero point": ({"weight_zero_point": 1}, "Non-zero zero point"),
    "uint8 around 128": ({"zero_point": np.uint8(128)}, "[Zz]ero point"),
    "uint8 from zero": ({"zero_point": np.uint8(0)}, "other numbers than the model"),
    "a negative scale": ({"scale": -0.1}, "must all be positive"),
    "a scale of zero": ({"scale": 0.0}, "must all be positive"),
    "a scale that is no number": ({"scale": np.nan}, "must all be positive"),
    "an int32 bias": ({"bias": np.zeros(8, np.int32)}, "Int32"),
    "an unknown operator": ({"operator": "Resnetify"}, "Resnetify activation"),
}


@pytest.mark.parametrize(("changes", "words"), GRAPHS.values(), ids=GRAPHS)
def test_graphs_are_refused(changes: dict[str, Any], words: str, rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=words):
        rtx.build(request_for(convolution(**changes), tmp_path))
    assert not (tmp_path / "a.engine").exists()


def test_the_graph_that_is_refused_with_changes_builds_without(rtx: Any, tmp_path: Path) -> None:
    assert rtx.build(request_for(convolution(), tmp_path)).layers


def test_a_fixed_batch_needs_no_profile(rtx: Any, tmp_path: Path) -> None:
    model = convolution()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    asked = request_for(model, tmp_path)
    with pytest.raises(BackendError, match="its batch is fixed to 4, but 1/8/32"):
        rtx.build(asked)
    given = {name: getattr(asked, name) for name in asked.__struct_fields__}
    assert rtx.build(BuildRequest(**{**given, "batch": (4, 4, 4)})).layers


def test_a_plan_that_cannot_be_written(rtx: Any, small: Any, tmp_path: Path) -> None:
    (tmp_path / "a.engine").mkdir()
    with pytest.raises(BundleError, match="cannot write"):
        rtx.build(small.request(tmp_path / "a.engine"))


@pytest.mark.parametrize(
    ("stop", "words"), [(20, "BackendError: .*was cancelled"), (-20, "ZeroDivisionError: from the callback")]
)
def test_a_build_is_stopped_through_its_monitor(stop: int, words: str, rtx: Any, small: Any, tmp_path: Path) -> None:
    """The next build in the same process is not touched: it has its layers from the log, all of them."""
    request = small.request(tmp_path / "a.engine")
    steps, said, layers = json.loads(rtx.run(WATCHED, json_of(request), str(stop)).splitlines()[-1])
    assert len(steps) == 20
    assert re.match(words, said)
    assert layers > len(small.weighted)


def test_progress_counts_up_to_its_total(rtx: Any, small: Any, tmp_path: Path) -> None:
    steps, said, _ = json.loads(rtx.run(WATCHED, json_of(small.request(tmp_path / "a.engine")), "0").splitlines()[-1])
    assert said == ""
    assert len(steps) > 50
    assert all(0 <= done <= total for _, done, total in steps)
    assert steps[0] == ["Building engine", 0, steps[0][2]]
    assert ["Building engine", steps[0][2], steps[0][2]] in steps


def test_timing_caches(rtx: Any, small: Any, tmp_path: Path) -> None:
    """Without a GPU nothing is timed, and TensorRT may refuse what it wrote; the engine is the same in any case."""
    path = tmp_path / "timing.cache"
    request = small.request(tmp_path / "a.engine", timing_cache=str(path))
    first = rtx.build(request)
    assert first.warnings == ()
    content = path.read_bytes()
    again = rtx.build(request)
    assert all("does not take the timing cache" in warning for warning in again.warnings)
    path.write_bytes(content.replace(b'"platform": "', b'"platform": "Mars '))
    other = rtx.build(request)
    assert "Mars" in other.warnings[0]
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    assert "is damaged" in rtx.build(request).warnings[0]
    path.write_bytes(b"my thesis")
    foreign = rtx.build(request)
    assert "is not a timing cache of edgeres" in foreign.warnings[0]
    assert path.read_bytes() == b"my thesis"
    assert first.layers == again.layers == other.layers == foreign.layers


def json_of(request: BuildRequest) -> str:
    return json.dumps({name: getattr(request, name) for name in request.__struct_fields__})
