"""The double of ``tensorrt`` refuses what the real bindings refuse; what passes on it is worth something only then."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import sys
import threading
from pathlib import Path

import numpy as np
import pytest


def _load():
    """Return the double's package, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("tensorrt_double")
    if "tensorrt_double" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_double", place / "__init__.py")
        sys.modules["tensorrt_double"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tensorrt_double"])
    return sys.modules["tensorrt_double"]


DOUBLE = _load()
Crash, Double, Script = DOUBLE.Crash, DOUBLE.Double, DOUBLE.Script

every_version = pytest.mark.parametrize("version", DOUBLE.VERSIONS)


class Bench:
    """A double with a logger, a builder, a network and a configuration of its own."""

    def __init__(self, version: str, **script) -> None:
        self.double = Double(version, Script(**script))
        self.trt = trt = self.double.module
        self.said = said = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity, message) -> None:
                said.append((severity.name, message))

        self.logger = Logger()
        self.builder = trt.Builder(self.logger)
        batch = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        self.network = self.builder.create_network(0 if batch is None else 1 << int(batch))
        self.config = self.builder.create_builder_config()

    def parsed(self):
        parser = self.trt.OnnxParser(self.network, self.logger)
        assert parser.parse(b"onnx")
        return parser

    def profile(self, low=1, best=4, high=8):
        profile = self.builder.create_optimization_profile()
        profile.set_shape("input", (low, 3, 8, 8), (best, 3, 8, 8), (high, 3, 8, 8))
        return profile

    def context(self):
        engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(self.double.script.plan)
        return engine, engine.create_execution_context()


@every_version
def test_the_version_is_the_releases(version):
    found = Double(version).module.__version__
    assert found.startswith(f"{version}.")
    assert all(part.isdigit() for part in found.split("."))


@every_version
def test_every_surface_can_be_built_with_and_run(version):
    bench = Bench(version)
    parser, profile = bench.parsed(), bench.profile()
    assert bench.config.add_optimization_profile(profile) == 0
    plan = bench.builder.build_serialized_network(bench.network, bench.config)
    assert bytes(plan) == bench.double.script.plan
    engine, context = bench.context()
    frames = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)
    logits = np.zeros((2, 10), np.float32)
    assert context.set_input_shape("input", (2, 3, 8, 8))
    assert context.set_tensor_address("input", frames.ctypes.data)
    assert context.set_tensor_address("logits", logits.ctypes.data)
    assert tuple(context.get_tensor_shape("logits")) == (2, 10)
    assert context.infer_shapes() == []
    assert context.execute_async_v3(7)
    np.testing.assert_allclose(logits[1], frames[1].mean() + np.arange(10))
    assert tuple(engine.get_tensor_profile_shape("input", 0)[2]) == (8, 3, 8, 8)
    assert parser.num_errors == 0
    assert bench.double.refusals == []


# Unknown members, wrong arguments, wrong types


@pytest.mark.parametrize(
    ("version", "path"),
    [
        ("8.5", "BuilderFlag.VERSION_COMPATIBLE"),
        ("8.5", "HardwareCompatibilityLevel"),
        ("8.6", "IProgressMonitor"),
        ("8.6", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
        ("10.3", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"),
        ("11.0", "BuilderFlag.INT8"),
        ("11.0", "BuilderFlag.FP16"),
        ("11.0", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("11.4", "IInt8EntropyCalibrator2"),
        ("11.4", "QuantizationFlag"),
    ],
)
def test_what_a_release_does_not_have_is_not_there(version, path):
    found = Double(version).module
    *owners, last = path.split(".")
    for owner in owners:
        found = getattr(found, owner)
    with pytest.raises(AttributeError):
        getattr(found, last)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("8.5", "builder_optimization_level"),
        ("8.6", "progress_monitor"),
        ("10.3", "max_workspace_size"),
        ("11.0", "int8_calibrator"),
        ("11.4", "no_such_property"),
    ],
)
def test_a_property_that_a_release_does_not_have_can_neither_be_set_nor_read(version, name):
    config = Bench(version).config
    assert not hasattr(config, name)
    with pytest.raises(AttributeError):
        setattr(config, name, 1)


def test_a_property_without_a_setter_cannot_be_set():
    bench = Bench("10.3")
    bench.parsed()
    with pytest.raises(AttributeError):
        bench.network.num_layers = 3
    newest = Bench("11.4")
    newest.parsed()
    with pytest.raises(AttributeError):  # settable up to 10
        newest.network.get_input(0).dtype = newest.trt.int8


@every_version
@pytest.mark.parametrize(
    "call",
    [
        lambda b: b.config.set_flag(3),
        lambda b: b.config.set_flag(b.trt.MemoryPoolType.WORKSPACE),
        lambda b: b.config.set_flag(),
        lambda b: b.config.set_flag(b.trt.BuilderFlag.TF32, 1),
        lambda b: b.config.set_flag(name=b.trt.BuilderFlag.TF32),
        lambda b: b.config.set_memory_pool_limit(b.trt.MemoryPoolType.WORKSPACE, 1.5),
        lambda b: b.config.set_memory_pool_limit(b.trt.MemoryPoolType.WORKSPACE, "1"),
        lambda b: b.config.set_timing_cache(None, False),
        lambda b: b.config.set_timing_cache(b.config.create_timing_cache(b"")),
        lambda b: b.config.create_timing_cache("text"),
        lambda b: b.builder.create_optimization_profile().set_shape("x", (1.0, 3), (1, 3), (1, 3)),
        lambda b: b.trt.OnnxParser(None, b.logger),
        lambda b: b.trt.OnnxParser(b.network, b.logger).parse("a path"),
        lambda b: b.trt.Builder(log=b.logger),
        lambda b: b.trt.IBuilderConfig(),
        lambda b: setattr(b.config, "profiling_verbosity", 2),
        lambda b: setattr(b.config, "DLA_core", "0"),
    ],
)
def test_wrong_arguments_are_refused_and_remembered(version, call):
    bench = Bench(version)
    with pytest.raises(TypeError):
        call(bench)
    assert len(bench.double.refusals) == 1


@every_version
def test_enum_members_are_no_ints(version):
    flag = Double(version).module.BuilderFlag.TF32
    assert not isinstance(flag, int)
    assert flag != int(flag)
    assert str(flag) == "BuilderFlag.TF32"
    with pytest.raises(TypeError):
        1 << flag
    with pytest.raises(AttributeError):
        flag.value = 0


def test_enum_values_are_the_releases_own():
    values = [int(Double(version).module.BuilderFlag.TF32) for version in ("8.6", "10.3", "11.4")]
    assert values == [7, 6, 6]
    typed = [int(Double(version).module.NetworkDefinitionCreationFlag.STRONGLY_TYPED) for version in ("10.16", "11.0")]
    assert typed == [1, 0]


def test_bits_that_no_flag_has_are_refused():
    with pytest.raises(ValueError, match="no such flag"):
        Bench("8.6").builder.create_network(1 << 5)


# Subclasses


@pytest.mark.parametrize("base", ["ILogger", "IProgressMonitor", "IInt8EntropyCalibrator2"])
def test_a_subclass_must_call_its_bases_init(base):
    trt = Double("10.3").module

    class Silent(getattr(trt, base)):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"__init__\(\) must be called"):
        Silent()


def test_a_subclass_may_have_attributes_and_an_interface_may_not():
    bench = Bench("10.3")
    bench.logger.mine = 1
    with pytest.raises(AttributeError):
        bench.builder.mine = 1


def test_a_logger_that_raises_is_a_crash():
    bench = Bench("10.3", build_log=[("INFO", "hello")])
    type(bench.logger).log = lambda self, severity, message: 1 / 0
    with pytest.raises(Crash, match=r"ILogger\.log raised"):
        bench.builder.build_serialized_network(bench.network, bench.config)


# Buffers and shapes


def test_a_plan_is_a_buffer_and_nothing_more(tmp_path):
    bench = Bench("10.3", inputs=(DOUBLE.Tensor("input", (1, 3, 8, 8)),))
    parser = bench.parsed()
    plan = bench.builder.build_serialized_network(bench.network, bench.config)
    wanted = bench.double.script.plan
    (tmp_path / "plan").write_bytes(plan)
    assert (tmp_path / "plan").read_bytes() == wanted
    assert hashlib.sha256(plan).digest() == hashlib.sha256(wanted).digest()
    assert np.frombuffer(plan, "u1").tobytes() == wanted
    assert plan.nbytes == len(wanted)
    with pytest.raises(TypeError):
        len(plan)
    with pytest.raises(AttributeError):
        plan.name = "x"
    assert parser.num_errors == 0


def test_dims_are_no_tuple():
    dims = Double("11.4").module.Dims((1, 2, 3))
    assert (tuple(dims), len(dims), dims[-1]) == ((1, 2, 3), 3, 3)
    with pytest.raises(TypeError):
        dims == (1, 2, 3)  # noqa: B015
    with pytest.raises(TypeError):
        hash(dims)


# What fails without an exception, and what crashes


def test_failures_are_return_values():
    bench = Bench("10.3")
    assert bench.builder.build_serialized_network(bench.network, bench.config) is not None  # nothing parsed
    parser = bench.parsed()
    assert bench.config.add_optimization_profile(bench.profile(low=9)) == -1
    assert bench.builder.build_serialized_network(bench.network, bench.config) is None
    assert bench.said[-1] == (
        "ERROR",
        "Network has dynamic or shape inputs, but no optimization profile has been defined",
    )
    assert not parser.parse(b"again")
    assert "non-empty network" in parser.get_error(0).desc()
    assert parser.get_error(1) is None
    assert bench.trt.Runtime(bench.logger).deserialize_cuda_engine(b"other") is None
    _, context = bench.context()
    assert not context.set_input_shape("input", (9, 3, 8, 8))
    assert not context.set_tensor_address("nothing", 64)
    assert not context.execute_async_v3(1)


def test_implicit_batch_is_refused_by_the_old_parser():
    bench = Bench("8.6")
    network = bench.builder.create_network(0)
    assert not bench.trt.OnnxParser(network, bench.logger).parse(b"onnx")
    assert "explicit batch" in bench.said[-1][1]


def test_precision_flags_are_refused_with_strong_typing():
    bench = Bench("10.13")
    bit = int(bench.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    bench.config.set_flag(bench.trt.BuilderFlag.INT8)
    assert bench.builder.build_serialized_network(bench.builder.create_network(1 << bit), bench.config) is None


@pytest.mark.parametrize(("version", "kept"), [("10.13", False), ("10.16", True)])
def test_a_profile_freed_too_early_is_a_crash_before_10_16(version, kept):
    bench = Bench(version)
    parser = bench.parsed()
    assert bench.config.add_optimization_profile(bench.profile()) == 0
    gc.collect()
    if kept:
        assert bench.builder.build_serialized_network(bench.network, bench.config) is not None
    else:
        with pytest.raises(Crash, match="optimization profile was freed"):
            bench.builder.build_serialized_network(bench.network, bench.config)
    assert parser.num_errors == 0


def test_a_parser_or_a_timing_cache_freed_too_early_is_a_crash():
    bench = Bench("10.3")
    bench.parsed()
    gc.collect()
    with pytest.raises(Crash, match="parser"):
        bench.builder.build_serialized_network(bench.network, bench.config)
    other = Bench("10.3")
    assert other.config.set_timing_cache(other.config.create_timing_cache(b""), False)
    gc.collect()
    with pytest.raises(Crash, match="timing cache"):
        other.builder.build_serialized_network(other.network, other.config)
    lost = Bench("10.3")
    parser = lost.trt.OnnxParser(lost.builder.create_network(), lost.logger)
    gc.collect()
    with pytest.raises(Crash, match="network"):
        parser.parse(b"onnx")


def test_two_threads_in_one_context_are_a_crash():
    bench = Bench("10.3")
    _, context = bench.context()
    inside, leave = threading.Event(), threading.Event()

    def submit(stream, work) -> None:
        inside.set()
        leave.wait(10)

    bench.double.submit = submit
    context.set_input_shape("input", (1, 3, 8, 8))
    memory = np.zeros(1024, np.float32)
    context.set_tensor_address("input", memory.ctypes.data)
    context.set_tensor_address("logits", memory.ctypes.data)
    runner = threading.Thread(target=context.execute_async_v3, args=(1,))
    runner.start()
    try:
        assert inside.wait(10)
        with pytest.raises(Crash, match="two threads"):
            context.set_input_shape("input", (1, 3, 8, 8))
    finally:
        leave.set()
        runner.join()


def test_a_method_without_a_behaviour_is_a_crash_until_it_is_scripted():
    bench = Bench("10.3")
    with pytest.raises(Crash, match="script it"):
        bench.builder.is_network_supported(bench.network, bench.config)
    bench.double.script.returns["Builder.is_network_supported"] = True
    assert bench.builder.is_network_supported(bench.network, bench.config)


def test_calls_are_recorded_in_order():
    bench = Bench("10.3")
    bench.config.set_flag(bench.trt.BuilderFlag.TF32)
    bench.config.DLA_core = 1
    paths = [(call.kind, call.path) for call in bench.double.calls]
    assert paths[-2:] == [("call", "IBuilderConfig.set_flag"), ("set", "IBuilderConfig.DLA_core")]
    assert bench.double.was_set("IBuilderConfig.DLA_core") == [1]
    assert [given["flag"].name for given in bench.double.called("IBuilderConfig.set_flag")] == ["TF32"]


def test_the_monitor_is_asked_and_obeyed():
    bench = Bench("10.3", inputs=(DOUBLE.Tensor("input", (1, 3, 8, 8)),))
    steps = []

    class Monitor(bench.trt.IProgressMonitor):
        def __init__(self) -> None:
            bench.trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            pass

        def phase_finish(self, phase_name) -> None:
            pass

        def step_complete(self, phase_name, step) -> bool:
            steps.append((phase_name, step))
            return len(steps) < 4

    bench.config.progress_monitor = Monitor()
    assert bench.builder.build_serialized_network(bench.network, bench.config) is None
    assert len(steps) == 4
    assert bench.said[-1] == ("ERROR", "Build canceled by user")
