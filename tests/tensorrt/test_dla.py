"""Ranges for a DLA: the cache's text, what is added once the graph is parsed, and where there is no DLA at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.artifacts import LayerPlan
from edgeres.backends.tensorrt.dla import (
    calibration_cache,
    completed,
    kept_in_half,
    make_calibrator,
    read_cache,
    refusal,
)
from edgeres.errors import BackendError, CalibrationError
from edgeres.quantize import plan

# The text


@pytest.mark.parametrize(
    ("version", "header"),
    [
        ((8, 5, 2, 2), "TRT-8502-EntropyCalibration2"),
        ((8, 6, 1), "TRT-8601-EntropyCalibration2"),
        ((10, 3, 0), "TRT-100300-EntropyCalibration2"),
        ((10, 7, 0, 23), "TRT-100700-EntropyCalibration2"),
        ((8, 6), "TRT-8600-EntropyCalibration2"),
    ],
)
def test_the_header_is_that_of_the_version(version: tuple[int, ...], header: str) -> None:
    assert calibration_cache(version, {}) == f"{header}\n"


def test_scales_are_written_as_tensorrt_writes_them() -> None:
    """0x3c010a14 stands in many a cache of TensorRT's own, for an input that reaches 1.0002."""
    amax = struct.unpack(">f", bytes.fromhex("3c010a14"))[0] * 127
    text = calibration_cache((8, 5, 2), {"images": amax, "/conv1/Conv_output_0": 127.0, "a: b": 63.5})
    assert text.splitlines()[1:] == ["images: 3c010a14", "/conv1/Conv_output_0: 3f800000", "a: b: 3f000000"]


names = st.text(st.characters(exclude_characters="\n", codec="utf-8"), min_size=1)
ranges = st.dictionaries(names, st.floats(2.0**-90, 2.0**90, width=32))


@given(ranges)
def test_what_is_written_is_read_again(values: dict[str, float]) -> None:
    text = calibration_cache((10, 3, 0), values)
    scales = read_cache(text)
    assert list(scales) == list(values)
    for name, amax in values.items():
        assert scales[name] == struct.unpack("f", struct.pack("f", amax / 127))[0]
    assert calibration_cache((10, 3, 0), {name: scale * 127 for name, scale in scales.items()}) == text


def test_a_tensor_that_never_fired_keeps_a_positive_scale() -> None:
    assert read_cache(calibration_cache((8, 5, 2), {"x": 0.0})) == {"x": 1.0}


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf")])
def test_what_is_no_range_is_refused(amax: float) -> None:
    with pytest.raises(CalibrationError):
        calibration_cache((8, 5, 2), {"x": amax})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "first line"),
        ("TRT-8502-MinMaxCalibration\nx: 3c010a14\n", "first line"),
        ("TRT-8502-EntropyCalibration2\nx 3c010a14\n", "line 2"),
        ("TRT-8502-EntropyCalibration2\nx: 3c010a14\ny: 3c010a1\n", "line 3"),
        ("TRT-8502-EntropyCalibration2\nx: 3c010a1g\n", "line 2"),
    ],
)
def test_what_is_no_cache_is_refused(text: str, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        read_cache(text)


# What is added


class Kinds:
    """Enumerations of a TensorRT, as far as the walk over a network asks for them."""

    LayerType = SimpleNamespace(CONVOLUTION=0, ACTIVATION=1, POOLING=2, ELEMENTWISE=3, SHUFFLE=4, SLICE=5, CONSTANT=6)
    ActivationType = SimpleNamespace(RELU=0, SIGMOID=1)
    PoolingType = SimpleNamespace(MAX=0, AVERAGE=1)
    ElementWiseOperation = SimpleNamespace(SUM=0, PROD=1)


class Layer:
    """A layer that, like TensorRT's, shows its details only to those who take it for its own class."""

    def __init__(self, kind: int, detail: int, inputs: list[str | None], output: str) -> None:
        self.kind, self.detail, self.inputs, self.output = kind, detail, inputs, output
        self.num_inputs, self.num_outputs = len(inputs), 1

    @property
    def type(self) -> int:
        return self.kind

    def get_input(self, index: int) -> Any:
        name = self.inputs[index]
        return None if name is None else SimpleNamespace(name=name)

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name=[self.output][index])


class Typed(Layer):
    @property
    def type(self) -> int:
        return self.detail


class Summing(Layer):
    @property
    def op(self) -> int:
        return self.detail


TRT = SimpleNamespace(
    LayerType=Kinds.LayerType,
    ActivationType=Kinds.ActivationType,
    PoolingType=Kinds.PoolingType,
    ElementWiseOperation=Kinds.ElementWiseOperation,
    IActivationLayer=Typed,
    IPoolingLayer=Typed,
    IElementWiseLayer=Summing,
)


def network(*rows: tuple[int, int, list[str | None], str]) -> Any:
    layers = [Layer(*row) for row in rows]
    return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)


T = Kinds.LayerType
BLOCK = (
    (T.CONVOLUTION, 0, ["input"], "c0"),
    (T.ACTIVATION, 0, ["c0"], "r0"),
    (T.POOLING, 0, ["r0"], "m0"),
    (T.CONVOLUTION, 0, ["m0"], "c1"),
    (T.ACTIVATION, 0, ["c1"], "r1"),
    (T.CONVOLUTION, 0, ["r1"], "c2"),
    (T.SLICE, 0, ["m0", None], "cut"),
    (T.ELEMENTWISE, 0, ["c2", "cut"], "sum"),
    (T.ACTIVATION, 0, ["sum"], "r2"),
    (T.POOLING, 1, ["r2"], "mean"),
    (T.SHUFFLE, 0, ["mean", "shape"], "flat"),
    (T.CONVOLUTION, 0, ["flat"], "fc"),
    (T.ELEMENTWISE, 0, ["fc", "bias"], "logits"),
)
TABLE = {"input": 127.0, "m0": 254.0, "r1": 381.0, "r2": 508.0, "flat": 635.0}
SPREAD = {"c0": 2.0, "r0": 2.0, "c1": 3.0, "cut": 2.0, "sum": 4.0, "mean": 5.0}


def spread(version: tuple[int, ...], table: Mapping[str, float]) -> dict[str, float]:
    text = completed(TRT, network(*BLOCK), calibration_cache(version, table))
    assert text.startswith(calibration_cache(version, table))
    return read_cache(text)


@pytest.mark.parametrize(
    ("version", "branch"), [((8, 5, 2), 4.0), ((8, 6, 1), 1.0), ((10, 3, 0), 1.0), ((10, 7, 0), 1.0)]
)
def test_tensors_between_those_of_the_table_get_a_scale(version: tuple[int, ...], branch: float) -> None:
    own = {"input": 1.0, "m0": 2.0, "r1": 3.0, "r2": 4.0, "flat": 5.0}
    assert spread(version, TABLE) == {**own, **SPREAD, "c2": branch}


def test_an_average_shares_no_scale_and_a_sum_in_float_gets_none() -> None:
    table = {name: TABLE[name] for name in ("input", "r2")}
    assert spread((8, 6, 1), table) == {"input": 1.0, "r2": 4.0, "sum": 4.0}


def test_a_cache_that_lacks_nothing_stays_as_it_is() -> None:
    text = calibration_cache((8, 5, 2), {"a": 1.0})
    assert completed(TRT, network(), text) is text
    assert completed(TRT, network((T.ACTIVATION, 1, ["a"], "b"), (T.ELEMENTWISE, 1, ["a", "c"], "d")), text) is text


WALK = """
import json, sys
import tensorrt as trt
from edgeres.backends.tensorrt.dla import calibration_cache, completed, read_cache

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
cache = calibration_cache((8, 6, 1), json.loads(sys.argv[2]))
print(json.dumps(read_cache(completed(trt, network, cache))))
"""


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet18"])
def test_a_real_parsed_network_is_covered(name: str, rtx: Any, quantized: Any) -> None:
    """Every tensor that TensorRT's own parser makes of the FP32 file, the classifier's output alone excepted."""
    found = quantized(name)
    table = {tensor: 127.0 * (index + 2) for index, tensor in enumerate(found.placement.tensors)}
    path = found.path.with_name("model.fp32.onnx")
    scales = json.loads(rtx.run(WALK, str(path), json.dumps(table)).splitlines()[-1])
    nodes = found.fp32.graph.node
    tensors = {output for node in nodes for output in node.output} | {"input"}
    assert tensors - set(scales) == {"logits"}
    made = {node.output[0]: node for node in nodes}
    for node in nodes:
        if node.op_type in ("Relu", "MaxPool", "Slice", "Pad", "Flatten"):
            assert scales[node.input[0]] == scales[node.output[0]]
        if node.op_type == "Add":
            branch = [tensor for tensor in node.input if made[tensor].op_type == "Conv" and tensor not in table]
            assert [scales[tensor] for tensor in branch] == [1.0]
    assert {tensor: scales[tensor] * 127 for tensor in table} == table


# The calibrator


class Base:
    ready = False

    def __init__(self) -> None:
        self.ready = True


def test_the_calibrator_hands_out_the_cache_and_has_no_samples() -> None:
    text = "TRT-8502-EntropyCalibration2\nü: 3f800000\n"
    calibrator = make_calibrator(SimpleNamespace(IInt8EntropyCalibrator2=Base), text)
    assert isinstance(calibrator, Base)
    assert calibrator.ready
    assert calibrator.get_batch_size() == 1
    assert calibrator.get_batch(["input"]) is None
    assert calibrator.read_calibration_cache().decode() == text
    assert calibrator.write_calibration_cache(b"another") is None
    assert calibrator.read_calibration_cache().decode() == text


def test_without_calibrators_there_is_a_reason() -> None:
    with pytest.raises(BackendError, match=r"TensorRT 11\.4\.0 takes ranges from Q/DQ"):
        make_calibrator(SimpleNamespace(__version__="11.4.0"), "")


# Where there is none

AGX, NX = "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
NANO, THOR, XAVIER = "NVIDIA Jetson Orin Nano Developer Kit", "NVIDIA Jetson AGX Thor", "NVIDIA Jetson Xavier NX"


@pytest.mark.parametrize(
    ("version", "device", "target"),
    [
        ((8, 5, 2), "Jetson-AGX Xavier", "dla0"),
        ((8, 5, 2), XAVIER, "dla1"),
        ((8, 6, 2), NX, "dla1"),
        ((10, 3, 0), AGX, "dla0"),
        ((10, 7, 0), AGX, "dla1"),
        ((10, 3, 0), "Orin", "dla0"),
        ((10, 3, 0), "", "dla0"),
        ((11, 4, 1), AGX, "dla0"),
        ((11, 4, 1), "Orin", "dla0"),
        ((8, 5, 2), "Jetson-AGX", "dla0"),  # AGX Xavier, as its device tree has it from L4T 32.2 on
        ((10, 3, 0), "reComputer J4012", "dla1"),  # another maker's board: the builder knows
        ((11, 4, 1), "reComputer J4012", "dla0"),
        ((8, 5, 2), "NVIDIA A100-SXM4-80GB", "dla0"),
        ((10, 13, 3), THOR, "gpu"),
        ((1, 7, 1), "NVIDIA GeForce RTX 4090", "gpu"),
    ],
)
def test_a_dla_that_is_there_is_not_refused(version: tuple[int, ...], device: str, target: str) -> None:
    assert refusal(version, device, target) == ""


@pytest.mark.parametrize(
    ("version", "device", "words"),
    [
        ((10, 8, 0), AGX, "10.7 is the last"),
        ((10, 13, 3), THOR, "10.7 is the last"),
        ((10, 16, 1), AGX, "10.7 is the last"),
        ((11, 0, 0), AGX, "11.4.1 has it again"),
        ((11, 3, 0), AGX, "11.4.1 has it again"),
        ((11, 4, 0), AGX, "11.4.1 has it again"),
        ((1, 7, 1), "", "no DLA"),
        ((11, 4, 1), NX, "for AGX Orin, this is NVIDIA Jetson Orin NX"),
        ((11, 4, 1), THOR, "has no DLA"),
        ((8, 6, 2), NANO, "has no DLA"),
    ],
)
def test_a_dla_that_is_not_there_is_refused_with_what_to_do(version: tuple[int, ...], device: str, words: str) -> None:
    text = refusal(version, device, "dla0")
    assert words in text
    assert "--target gpu" in text


def test_a_core_that_no_module_has_is_refused() -> None:
    assert "dla0 to dla1" in refusal((10, 3, 0), AGX, "dla2")


# Layers that stay in float

NAMED = """
import sys
import tensorrt as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
print("\\n".join(network.get_layer(index).name for index in range(network.num_layers)))
"""


def test_what_a_dla_could_run_in_int8_against_the_plan_is_kept_in_half() -> None:
    rows = [
        ("conv", "Conv", "float"),
        ("body", "Conv", "int8"),
        ("add", "Add", "float"),
        ("other", "Add", "int8 skip"),
        ("relu", "Relu", "follows"),
        ("shape", "Shape", "float"),
        ("pool", "GlobalAveragePool", "float"),
        ("fc", "Gemm", "float"),
    ]
    layers = [LayerPlan(node, op, "", precision, "") for node, op, precision in rows]
    assert kept_in_half(layers) == ("conv", "add", "pool", "fc")


@pytest.mark.parametrize(
    ("name", "keep"), [("resnet8_cifar", ("layer2", "fc")), ("resnet18", ("conv1", "layer3.0.*", "fc"))]
)
def test_tensorrts_parser_names_its_layers_as_the_plan_does(
    name: str, keep: tuple[str, ...], rtx: Any, quantized: Any
) -> None:
    """So a layer that the recipe keeps in float is found in the parsed network by its node's name."""
    found = quantized(name)
    kept = kept_in_half(plan(found.fp32, found.exported.modules, keep).layers)
    assert len(kept) >= 4
    path = found.path.with_name("model.fp32.onnx")
    names = rtx.run(NAMED, str(path)).splitlines()
    assert [names.count(node) for node in kept] == [1] * len(kept)
