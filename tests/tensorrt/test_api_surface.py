"""The builder against a strict double of every TensorRT release: what it calls, and what it makes of failures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from edgeres.backends.tensorrt import logger
from edgeres.backends.tensorrt.builder import build_plan
from edgeres.backends.tensorrt.records import BuildRequest
from edgeres.errors import BackendError, EdgeresError, MissingPackageError


def _load():
    """Return the double's package, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("tensorrt_double")
    if "tensorrt_double" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_double", place / "__init__.py")
        sys.modules["tensorrt_double"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tensorrt_double"])
    return sys.modules["tensorrt_double"]


DOUBLE = _load()
Layer, ParseError, Script, Tensor = DOUBLE.Layer, DOUBLE.ParseError, DOUBLE.Script, DOUBLE.Tensor

TYPING = {
    "8.5": ({"EXPLICIT_BATCH"}, {"INT8", "FP16"}),
    "8.6": ({"EXPLICIT_BATCH"}, {"INT8", "FP16"}),
    "10.3": (set(), {"INT8", "FP16"}),
    "10.7": (set(), {"INT8", "FP16"}),
    "10.13": ({"STRONGLY_TYPED"}, set()),
    "10.16": ({"STRONGLY_TYPED"}, set()),
    "11.0": (set(), set()),
    "11.4": (set(), set()),
}
"""By release: the creation flags of the network, and the precision flags of an int8 build."""

OLD = ("8.5", "8.6")
WITH_MONITOR = tuple(version for version in DOUBLE.VERSIONS if version not in OLD)
WITH_DLA = ("8.5", "8.6", "10.3", "10.7")

PLAIN_BUILD = {
    "Builder",
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.profiling_verbosity",
    "ILogger",
    "INetworkDefinition.get_input",
    "IOptimizationProfile.set_shape",
    "OnnxParser",
}
"""What every build calls or sets; with weak typing also set_flag and get_flag, from 10 on also the monitor."""

ELSEWHERE_IN_RTX = re.compile(
    r"INetworkDefinition\.(name|flags|get_flag|has_implicit_batch_dimension|error_recorder|add_cast)$"
    r"|ITensor\.(location|is_shape_tensor|is_execution_tensor|allowed_formats|get_dimension_name|broadcast_.*)$"
    r"|IBuilderConfig\.(build_route|all_build_routes|remote_auto_tuning_config)$"
    r"|Builder\.(build_engine_with_config|build_serialized_network_to_stream)$"
    r"|Runtime\.dla_workspace_allocation_strategy$"
)
"""What TensorRT's bindings must not touch over the library of TensorRT for RTX: another function lies there."""

NEXT_STEP = re.compile(
    r"\b(Build|Change|Choose|Close|Compile|Give|Keep|Leave|See|Start|Try|Use|build|compile|doctor)\b"
)

INSPECTED = (
    '{"Layers": [{"Name": "conv1", "LayerType": "CaskConvolution",'
    ' "Inputs": [{"Name": "input", "Dimensions": [4, 3, 8, 8], "Format/Datatype": "Int8"}],'
    ' "Outputs": [{"Name": "logits", "Dimensions": [4, 10], "Format/Datatype": "Float"}],'
    ' "Metadata": "[ONNX Layer: conv1]"}], "Bindings": ["input", "logits"]}'
)


def facts(device: str = ""):
    """Return a function that says what plans fit here, with or without a GPU to open them on."""
    return lambda trt: {
        "flavour": "tensorrt",
        "tensorrt": trt.__version__,
        "platform": "Linux aarch64",
        "cuda": "12.6",
        "compute_capability": "8.7",
        "device": device,
    }


class Room:
    """A folder with a model, a double in place of ``tensorrt``, and what a build there did."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.double = None
        self.progress = []
        (folder / "model.onnx").write_bytes(b"an ONNX file")

    def install(self, version: str, **script) -> None:
        self.double = DOUBLE.Double(version, Script(**script))
        self._monkeypatch.setitem(sys.modules, "tensorrt", self.double.module)

    def build(self, device: str = "", cancelled=lambda: False, **options):
        settings = {"input_name": "input", "shape": (3, 8, 8), "batch": (1, 4, 8), **options}
        request = BuildRequest(onnx=str(self.folder / "model.onnx"), plan=str(self.folder / "model.plan"), **settings)
        return build_plan(request, lambda *step: self.progress.append(step), cancelled, facts(device))

    def refused(self, **options) -> str:
        """Return the words of a build that must fail, with nothing left behind and nothing wrongly called."""
        with pytest.raises(BackendError) as caught:
            self.build(**options)
        assert self.double.refusals == []
        assert sorted(path.name for path in self.folder.iterdir()) == ["model.onnx"]
        assert NEXT_STEP.search(str(caught.value)), f"no next step in: {caught.value}"
        return str(caught.value)

    def flags(self) -> set[str]:
        return {given["flag"].name for given in self.double.called("IBuilderConfig.set_flag")}

    def network_flags(self) -> set[str]:
        (given,) = self.double.called("Builder.create_network")
        bits = self.double.surface["enums"]["NetworkDefinitionCreationFlag"]
        return {name for name, bit in bits.items() if given.get("flags", 0) >> bit & 1}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Return a room; a call that the double refused fails the test, also where edgeres caught the TypeError."""
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    monkeypatch.setattr(logger, "_LOGGERS", {})  # one logger per package and process would keep every double alive
    room = Room(tmp_path, monkeypatch)
    yield room
    assert room.double is None or room.double.refusals == []


every_version = pytest.mark.parametrize("version", DOUBLE.VERSIONS)


# What a build asks for


@every_version
def test_an_int8_build_makes_the_calls_of_its_release_and_no_others(room, version):
    room.install(version)
    result = room.build()
    network_flags, builder_flags = TYPING[version]
    assert room.network_flags() == network_flags
    assert room.flags() == builder_flags
    wanted = set(PLAIN_BUILD)
    wanted |= {"IBuilderConfig.set_flag", "IBuilderConfig.get_flag"} if builder_flags else set()
    wanted |= {"IProgressMonitor", "IBuilderConfig.progress_monitor"} if version in WITH_MONITOR else set()
    touched = room.double.touched("call", "set")
    assert touched - {"OnnxParser.parse", "OnnxParser.parse_from_file"} == wanted
    assert (room.folder / "model.plan").read_bytes() == room.double.script.plan
    assert result.bytes == len(room.double.script.plan)
    assert result.built_for["tensorrt"] == room.double.module.__version__


@every_version
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_becomes_flags_only_where_typing_is_weak(room, version, precision):
    room.install(version)
    room.build(precision=precision)
    wanted = {"fp32": set(), "fp16": {"FP16"}, "int8": {"INT8", "FP16"}}[precision]
    assert room.flags() == (wanted if TYPING[version][1] else set())


@every_version
def test_one_profile_holds_the_batch_sizes(room, version):
    room.install(version)
    room.build(batch=(2, 3, 7))
    (given,) = room.double.called("IOptimizationProfile.set_shape")
    assert given["input"] == "input"
    assert [tuple(given[key]) for key in ("min", "opt", "max")] == [(2, 3, 8, 8), (3, 3, 8, 8), (7, 3, 8, 8)]
    assert len(room.double.called("IBuilderConfig.add_optimization_profile")) == 1


@every_version
def test_a_fixed_batch_has_no_profile(room, version):
    room.install(version, inputs=(Tensor("input", (4, 3, 8, 8)),), outputs=(Tensor("logits", (4, 10)),))
    room.build(batch=(4, 4, 4))
    assert room.double.called("IBuilderConfig.add_optimization_profile") == []


@every_version
def test_the_workspace_is_a_pool_limit(room, version):
    room.install(version)
    room.build(workspace=1 << 28)
    (given,) = room.double.called("IBuilderConfig.set_memory_pool_limit")
    assert (given["pool"].name, given["pool_size"]) == ("WORKSPACE", 1 << 28)


@every_version
def test_layers_are_named_in_detail(room, version):
    room.install(version)
    room.build()
    assert [verbosity.name for verbosity in room.double.was_set("IBuilderConfig.profiling_verbosity")] == ["DETAILED"]


@every_version
def test_the_optimization_level_is_set_where_there_is_one(room, version):
    room.install(version)
    if version == "8.5":
        assert "builder_optimization_level" in room.refused(optimization_level=4)
    else:
        room.build(optimization_level=4)
        assert room.double.was_set("IBuilderConfig.builder_optimization_level") == [4]


@every_version
def test_nothing_that_lies_elsewhere_in_rtx_is_touched(room, version):
    room.install(version, layer_information=INSPECTED, level="AMPERE_PLUS")
    room.build(
        device="a GPU", workspace=1 << 28, timing_cache=str(room.folder / "timings"),
        optimization_level=None if version == "8.5" else 3,
        version_compatible=version != "8.5", hardware_compatible=version != "8.5",
    )  # fmt: skip
    assert [path for path in room.double.touched() if ELSEWHERE_IN_RTX.search(path)] == []


@every_version
def test_engines_for_other_versions_and_hardware_where_the_release_has_them(room, version):
    room.install(version)
    if version == "8.5":
        assert "VERSION_COMPATIBLE" in room.refused(version_compatible=True)
        assert "8.6" in room.refused(hardware_compatible=True)
        return
    room.build(version_compatible=True, hardware_compatible=True)
    assert room.flags() == TYPING[version][1] | {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    levels = room.double.was_set("IBuilderConfig.hardware_compatibility_level")
    assert [level.name for level in levels] == ["AMPERE_PLUS"]


@pytest.mark.parametrize("version", DOUBLE.VERSIONS[1:])
def test_an_engine_that_opens_here_is_asked_for_its_hardware(room, version):
    room.install(version, level="AMPERE_PLUS", layer_information=INSPECTED)
    assert room.build(device="NVIDIA L4", hardware_compatible=True).built_for["hardware_compatible"] == "AMPERE_PLUS"
    (room.folder / "model.plan").unlink()
    room.install(version, layer_information=INSPECTED)
    assert "AMPERE_PLUS was asked for" in room.refused(device="NVIDIA L4", hardware_compatible=True)


# Progress and cancel


@every_version
def test_progress_is_reported_where_there_is_a_monitor(room, version):
    room.install(version)
    room.build()
    if version in WITH_MONITOR:
        assert ("Tactics", 3, 3) in room.progress
        assert ("Building Engine", 2, 2) in room.progress
    else:
        assert room.double.was_set("IBuilderConfig.progress_monitor") == []


@pytest.mark.parametrize("version", WITH_MONITOR)
def test_a_cancelled_build_stops_and_writes_nothing(room, version):
    room.install(version)
    assert "cancelled" in room.refused(cancelled=lambda: len(room.progress) > 3)
    assert len(room.progress) < 7


@every_version
def test_a_build_that_is_cancelled_before_it_starts_calls_nothing(room, version):
    room.install(version)
    assert "cancelled" in room.refused(cancelled=lambda: True)
    assert room.double.called("Builder.build_serialized_network") == []


@pytest.mark.parametrize("version", WITH_MONITOR)
def test_what_the_progress_callback_raises_reaches_the_caller(room, version):
    room.install(version)
    room.progress = None  # append on it raises inside the callback
    with pytest.raises(AttributeError, match="append"):
        room.build()
    assert not (room.folder / "model.plan").exists()


# The timing cache


@every_version
def test_the_timing_cache_is_created_used_and_kept(room, version):
    cache = room.folder / "timings"
    room.install(version)
    assert room.build(timing_cache=str(cache)).warnings == room.build().warnings
    assert bytes(room.double.called("IBuilderConfig.create_timing_cache")[0]["serialized_timing_cache"]) == b""
    assert [given["ignore_mismatch"] for given in room.double.called("IBuilderConfig.set_timing_cache")] == [False]
    assert cache.read_bytes().endswith(room.double.script.timing_cache)
    room.install(version)
    room.build(timing_cache=str(cache))
    (given,) = room.double.called("IBuilderConfig.create_timing_cache")
    assert bytes(given["serialized_timing_cache"]) == room.double.script.timing_cache


def test_the_timing_cache_of_another_release_is_named_and_ignored(room):
    cache = room.folder / "timings"
    room.install("10.3")
    room.build(timing_cache=str(cache))
    room.install("10.7")
    result = room.build(timing_cache=str(cache))
    (warning,) = (text for text in result.warnings if "timing cache" in text)
    assert str(cache) in warning
    assert "10.3.0" in warning
    assert "10.7.0" in warning
    (given,) = room.double.called("IBuilderConfig.create_timing_cache")
    assert bytes(given["serialized_timing_cache"]) == b""


@every_version
@pytest.mark.parametrize("method", ["create_timing_cache", "set_timing_cache"])
def test_a_timing_cache_that_tensorrt_refuses_costs_only_a_warning(room, version, method):
    refusal = None if method == "create_timing_cache" else False
    room.install(version, returns={f"IBuilderConfig.{method}": refusal})
    result = room.build(timing_cache=str(room.folder / "timings"))
    assert [text for text in result.warnings if "timings" in text]
    assert (room.folder / "model.plan").exists()


# DLA


@pytest.mark.parametrize("version", WITH_DLA)
@pytest.mark.parametrize("fallback", [True, False])
def test_a_dla_takes_its_ranges_from_a_calibration_cache(room, version, fallback):
    room.install(version, dla_cores=2)
    text = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\n"
    room.build(target="dla1", batch=(4, 4, 4), calibration_cache=text, gpu_fallback=fallback)
    assert [device.name for device in room.double.was_set("IBuilderConfig.default_device_type")] == ["DLA"]
    assert room.double.was_set("IBuilderConfig.DLA_core") == [1]
    assert room.flags() == {"INT8", "FP16"} | ({"GPU_FALLBACK"} if fallback else set())
    assert room.double.calibration == text.encode()
    assert len(room.double.was_set("IBuilderConfig.int8_calibrator")) == 1


@pytest.mark.parametrize("version", WITH_DLA)
def test_the_kinds_of_layers_complete_a_calibration_cache(room, version):
    """What a plain ILayer does not tell (maximum, sum, ReLU) is reached by its own class, under every release."""
    layers = (
        Layer("conv", inputs=("input",), outputs=("conv",)),
        Layer("pool", "POOLING", ("input",), ("pooled",), "MAX"),
        Layer("add", "ELEMENTWISE", ("conv", "pooled"), ("sum",), "SUM"),
        Layer("relu", "ACTIVATION", ("sum",), ("logits",), "RELU"),
    )
    room.install(version, dla_cores=2, layers=layers)
    text = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\nlogits: 3c810a14\n"
    room.build(target="dla0", batch=(4, 4, 4), calibration_cache=text)
    names = {line.partition(": ")[0] for line in room.double.calibration.decode().splitlines()[1:]}
    assert names == {"input", "logits", "sum", "pooled", "conv"}


FLOAT_ENDS = (Layer("stem"), Layer("body"), Layer("fc", "MATRIX_MULTIPLY"))
CACHE = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\n"


@pytest.mark.parametrize("version", WITH_DLA)
@pytest.mark.parametrize("strict", [True, False])
def test_layers_kept_in_float_are_pinned_to_half_on_a_dla(room, version, strict):
    room.install(version, dla_cores=1, layers=FLOAT_ENDS)
    options = {"target": "dla0", "batch": (4, 4, 4), "calibration_cache": CACHE, "strict": strict}
    result = room.build(half=("stem", "fc"), **options)
    assert room.double.pinned == {"stem": "HALF", "fc": "HALF"}
    wanted = "OBEY_PRECISION_CONSTRAINTS" if strict else "PREFER_PRECISION_CONSTRAINTS"
    assert room.flags() == {"INT8", "FP16", "GPU_FALLBACK", wanted}
    assert not [text for text in result.warnings if "kept in float" in text]


@pytest.mark.parametrize("version", WITH_DLA)
def test_with_nothing_kept_in_float_nothing_is_pinned(room, version):
    room.install(version, dla_cores=1, layers=FLOAT_ENDS)
    room.build(target="dla0", batch=(4, 4, 4), calibration_cache=CACHE, strict=True)
    assert room.double.pinned == {}
    assert room.flags() == {"INT8", "FP16", "GPU_FALLBACK"}
    assert room.double.was_set("ILayer.precision") == []


@pytest.mark.parametrize("version", WITH_DLA)
def test_a_layer_that_cannot_be_pinned_is_named(room, version):
    room.install(version, dla_cores=1, layers=FLOAT_ENDS)
    options = {"target": "dla0", "batch": (4, 4, 4), "calibration_cache": CACHE, "half": ("stem", "pool")}
    assert "pool: kept in float by the recipe" in room.refused(strict=True, **options)
    assert [text for text in room.build(**options).warnings if text.startswith("pool: kept in float")]
    assert room.double.pinned == {"stem": "HALF"}


@pytest.mark.parametrize("version", WITH_DLA)
def test_a_pin_that_does_not_hold_is_told(room, version):
    said = "No implementation of layer stem obeys the requested constraints in strict mode."
    room.install(version, dla_cores=1, layers=FLOAT_ENDS, build_log=[("WARNING", said), ("WARNING", "nothing to do")])
    result = room.build(target="dla0", batch=(4, 4, 4), calibration_cache=CACHE, half=("stem",))
    assert [text for text in result.warnings if "reported" in text] == [
        f"TensorRT {room.double.module.__version__} reported: {said}"
    ]


@pytest.mark.parametrize("version", WITH_DLA)
def test_a_layer_that_falls_back_to_the_gpu_is_told(room, version):
    said = "Default DLA is enabled but layer fc is not supported on DLA, falling back to GPU."
    flood = [("WARNING", f"missing scale for tensor {number}") for number in range(300)]
    room.install(version, dla_cores=1, layers=FLOAT_ENDS, build_log=[("WARNING", said), *flood])
    result = room.build(target="dla0", batch=(4, 4, 4), calibration_cache=CACHE)
    told = [text for text in result.warnings if "reported" in text]
    assert told == [f"TensorRT {room.double.module.__version__} reported: {said}"]


@pytest.mark.parametrize("version", [version for version in DOUBLE.VERSIONS if version not in WITH_DLA])
def test_a_release_without_a_dla_refuses_one_before_it_builds(room, version):
    room.install(version, dla_cores=2)
    assert "10.7" in room.refused(target="dla0", batch=(4, 4, 4))
    assert room.double.called("Builder.create_network") == []


@pytest.mark.parametrize("version", WITH_DLA)
def test_a_core_that_the_module_does_not_have_is_refused(room, version):
    room.install(version, dla_cores=1)
    assert "DLA core 1" in room.refused(target="dla1", batch=(4, 4, 4), calibration_cache="TRT-8600-…\n")


@pytest.mark.parametrize("version", WITH_DLA)
def test_a_refused_calibration_profile_is_an_error(room, version):
    room.install(version, dla_cores=1, returns={"IBuilderConfig.set_calibration_profile": False})
    cache = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\n"
    assert "calibration profile" in room.refused(target="dla0", batch=(4, 4, 4), calibration_cache=cache)


@every_version
def test_without_a_dla_nothing_of_it_is_touched(room, version):
    room.install(version)
    room.build()
    assert [
        path for path in room.double.touched() if "DLA" in path or "calibrat" in path or "device_type" in path
    ] == []


# Failures


@every_version
def test_every_parse_error_is_told_with_its_node(room, version):
    errors = (
        ParseError("no importer registered for op: Foo", node=3, node_name="body.foo", node_operator="Foo"),
        ParseError("Scale coefficients must all be positive", node=8, node_name="q", node_operator="QuantizeLinear"),
    )
    room.install(version, parse_errors=errors)
    message = room.refused()
    assert "no importer registered for op: Foo" in message
    assert "Scale coefficients must all be positive" in message
    places = ("node 3", "node 8") if version in OLD else ("body.foo", "QuantizeLinear q")
    assert all(place in message for place in places)


@every_version
def test_a_model_that_parses_to_nothing_is_refused(room, version):
    room.install(version, inputs=(), outputs=(), layers=())
    assert "holds no network" in room.refused()


@every_version
@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"inputs": (Tensor("frame", (-1, 3, 8, 8)),)}, "frame"),
        ({"inputs": (Tensor("input", (-1, 3, 9, 9)),)}, "3×9×9"),
        ({"inputs": (Tensor("input", (2, 3, 8, 8)),)}, "fixed to 2"),
        ({"inputs": (Tensor("input", (-1, 3, 8, 8)), Tensor("mask", (-1, 1)))}, "mask"),
        ({"outputs": (Tensor("logits", (-1, 10)), Tensor("more", (-1, 4)))}, "2 outputs"),
    ],
)
def test_another_network_than_the_one_asked_for_is_refused(room, version, tensors, said):
    room.install(version, **tensors)
    assert said in room.refused()


@every_version
def test_a_failed_build_ends_with_the_builders_own_last_words(room, version):
    log = [
        ("VERBOSE", "trying tactic 17"),
        ("ERROR", "Error Code 10: Could not find any implementation for node layer1.0.conv1"),
        ("INFO", "cleaning up"),
    ]
    room.install(version, plan=None, build_log=log)
    message = room.refused()
    assert "Could not find any implementation for node layer1.0.conv1" in message
    assert "model.onnx" in message
    assert "trying tactic" not in message


@every_version
def test_a_build_that_fails_without_a_word_is_told_too(room, version):
    room.install(version, plan=None)
    assert "gave no reason" in room.refused()


@every_version
def test_a_refused_profile_is_an_error(room, version):
    room.install(version, returns={"IBuilderConfig.add_optimization_profile": -1})
    assert "1/4/8" in room.refused()


@every_version
@pytest.mark.parametrize("method", ["create_network", "create_builder_config", "create_optimization_profile"])
def test_what_the_builder_does_not_make_is_an_error(room, version, method):
    room.install(version, returns={f"Builder.{method}": None})
    assert "TensorRT" in room.refused()


@every_version
def test_a_machine_without_a_usable_gpu_makes_no_builder(room, version):
    room.install(version, returns={"Builder": TypeError("pybind11::init(): factory function returned nullptr")})
    assert "makes no builder" in room.refused()


@pytest.mark.parametrize("version", [version for version in DOUBLE.VERSIONS if TYPING[version][1]])
def test_a_flag_that_does_not_hold_is_an_error(room, version):
    room.install(version, returns={"IBuilderConfig.get_flag": False})
    assert "ignores the builder flag INT8" in room.refused()


@every_version
def test_a_model_that_tensorrt_would_read_as_other_numbers_is_refused(room, version):
    warning = "UINT8 is not supported here. Defaulting to INT8 instead."
    room.install(version, parse_log=[("WARNING", warning)])
    assert "Defaulting to INT8" in room.refused()
    room.install(version, parse_log=[*([("WARNING", f"warning {i}") for i in range(300)]), ("WARNING", warning)])
    assert "Defaulting to INT8" in room.refused()


@every_version
def test_a_flood_of_warnings_hides_no_error(room, version):
    """A build for a DLA, or with implicit ranges, warns once or twice per tensor."""
    flood = [("WARNING", f"missing scale for tensor {number}") for number in range(300)]
    reason = ("ERROR", "Could not find any implementation for node conv1")
    for log in ([*flood, reason], [reason, *flood]):
        room.install(version, plan=None, build_log=log)
        message = room.refused()
        assert reason[1] in message
        assert "Keep that layer out of int8" in message
        assert "missing scale" not in message
    room.install(version, plan=None, build_log=flood)
    assert "missing scale for tensor 299" in room.refused()


@every_version
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": (4, 2, 8)}, "4/2/8"),
        ({"batch": (0, 1, 2)}, "0/1/2"),
        ({"workspace": 0}, "workspace"),
        ({"workspace": 1 << 63}, "more than it can count"),
        ({"batch": (1, 8, 1 << 31)}, "more than it can count"),
        ({"optimization_level": 9}, "9"),
        ({"precision": "int4"}, "int4"),
        ({"target": "npu"}, "npu"),
        ({"calibration_cache": "TRT-8600-EntropyCalibration2\n"}, "calibration cache"),
        ({"half": ("conv1",)}, "calibration cache"),
    ],
)
def test_a_wrong_request_is_refused_before_tensorrt_is_asked(room, version, options, said):
    room.install(version)
    assert said in room.refused(**options)
    assert room.double.calls == []


# What the engine runs in


@every_version
def test_with_a_gpu_the_engine_itself_tells_its_layers(room, version):
    room.install(version, layer_information=INSPECTED)
    result = room.build(device="Orin")
    (given,) = room.double.called("EngineInspector.get_engine_information")
    assert given["format"].name == "JSON"
    assert [(layer.name, layer.inputs, layer.outputs) for layer in result.layers] == [("conv1", ("int8",), ("fp32",))]
    (given,) = room.double.called("IExecutionContext.set_input_shape")
    assert (given["name"], tuple(given["shape"])) == ("input", (4, 3, 8, 8))
    assert len(room.double.called("Runtime.deserialize_cuda_engine")) == 1


@every_version
def test_an_engine_that_does_not_open_here_costs_only_a_warning(room, version):
    said = [("ERROR", "CUDA driver version is insufficient")]
    room.install(version, engine_log=said, returns={"Runtime.deserialize_cuda_engine": None})
    result = room.build(device="Orin")
    assert [text for text in result.warnings if "does not open on this machine" in text]
    assert (room.folder / "model.plan").exists()


@every_version
@pytest.mark.parametrize("method", ["ICudaEngine.create_execution_context", "IExecutionContext.set_input_shape"])
def test_without_a_context_the_engine_tells_what_it_can(room, version, method):
    refusal = None if method.startswith("ICudaEngine") else False
    room.install(version, layer_information=INSPECTED, returns={method: refusal})
    result = room.build(device="Orin")
    assert [(layer.name, layer.inputs, layer.outputs) for layer in result.layers] == [
        ("conv1", ("unknown",), ("unknown",))
    ]
    assert [text for text in result.warnings if "gave no execution context" in text]


@every_version
def test_without_a_gpu_no_engine_is_opened(room, version):
    room.install(version)
    result = room.build(device="")
    assert room.double.called("Runtime.deserialize_cuda_engine") == []
    assert result.layers == ()


# Releases and flavours


@pytest.mark.parametrize("number", ["8.4.1.5", "7.1.3"])
def test_an_older_release_is_refused(room, number):
    room.install("8.5")
    room.double.module.__version__ = number
    with pytest.raises(EdgeresError, match=r"8\.5|RTX"):
        room.build()


def test_tensorrt_for_rtx_is_strongly_typed_and_has_no_dla(room, monkeypatch):
    room.install("11.4")
    room.double.module.__name__, room.double.module.__version__ = "tensorrt_rtx", "1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", room.double.module)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    room.build(flavour="tensorrt-rtx")
    assert room.network_flags() == {"STRONGLY_TYPED"}
    assert room.flags() == set()
    with pytest.raises(BackendError, match="no RTX card has a DLA"):
        room.build(flavour="tensorrt-rtx", target="dla0", batch=(4, 4, 4))


def test_a_machine_without_tensorrt_is_told_what_to_install(room, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"edgeres\[tensorrt\]"):
        room.build()


def test_every_release_row_is_the_one_of_the_issue():
    """INT8 and FP16 flags up to 10.11, strong typing as a flag from 10.12, neither from 11."""
    from edgeres.backends.tensorrt.versions import typing_of

    assert typing_of((10, 11, 0)).builder_flags["int8"] == ("INT8", "FP16")
    assert typing_of((10, 12, 0)).network_flags == ("STRONGLY_TYPED",)
    assert typing_of((10, 12, 0)).builder_flags["int8"] == ()
    assert typing_of((11, 0, 0)).network_flags == ()
    assert typing_of((8, 5, 2)).network_flags == ("EXPLICIT_BATCH",)
