"""What `compile` asks of each TensorRT release: which form of the model, which ranges, what is kept out of int8."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgeres
from edgeres.artifacts import CalibrationTable, QuantizedModel, from_data, from_json, to_json
from edgeres.backends import tensorrt as room
from edgeres.backends.tensorrt import logger
from edgeres.backends.tensorrt.builder import build_plan
from edgeres.backends.tensorrt.dla import read_cache
from edgeres.bundle import verify
from edgeres.compilation import compile_bundle
from edgeres.errors import BackendError, IntegrityError, MissingPackageError
from edgeres.recipe import dossier, engine_section


def _load() -> Any:
    """Return the double's package, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("tensorrt_double")
    if "tensorrt_double" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_double", place / "__init__.py")
        sys.modules["tensorrt_double"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tensorrt_double"])
    return sys.modules["tensorrt_double"]


DOUBLE = _load()
WEAK, STRONG = ("8.5", "8.6", "10.3", "10.7"), ("10.13", "10.16", "11.0", "11.4")
KINDS = {
    "Conv": ("CONVOLUTION", ""),
    "Gemm": ("MATRIX_MULTIPLY", ""),
    "Relu": ("ACTIVATION", "RELU"),
    "Add": ("ELEMENTWISE", "SUM"),
    "GlobalAveragePool": ("POOLING", "AVERAGE"),
}
FACTS = {"flavour": "tensorrt", "platform": "Linux aarch64", "cuda": "12.6", "compute_capability": "8.7", "device": ""}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default on few images, with its classifier in float."""
    out = tmp_path_factory.mktemp("releases") / "bundle"
    edgeres.build(
        model="resnet8_cifar",
        weights=dossier() / "digits/weights.safetensors",
        calibration=dossier() / "digits/calibration",
        calibration_count=20,
        keep_float=["fc", "layer3.0.conv2"],
        backend="cpu",
        out=out,
    )
    return out


class Bench:
    """A bundle, and a double in place of ``tensorrt`` that is built with in this process instead of a child's."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle = bundle
        self._patch = monkeypatch
        self.requests: list[Any] = []
        monkeypatch.setattr(logger, "_LOGGERS", {})

    def install(self, version: str) -> Any:
        """Put a double of a release in place; the network that it parses is the bundle's own."""
        graph = onnx.load(self.bundle / "model.fp32.onnx").graph
        layers = []
        for node in (node for node in graph.node if node.op_type in KINDS):
            kind, detail = KINDS[node.op_type]
            inputs = tuple(node.input if kind == "ELEMENTWISE" else node.input[:1])
            layers.append(DOUBLE.Layer(node.name, kind, inputs, tuple(node.output), detail))
        script = DOUBLE.Script(
            inputs=(DOUBLE.Tensor("input", (-1, 3, 32, 32)),),
            outputs=(DOUBLE.Tensor("logits", (-1, 10)),),
            layers=layers,
            dla_cores=2,
        )
        double = DOUBLE.Double(version, script)
        self._patch.setitem(sys.modules, "tensorrt", double.module)

        def build(request: Any, watch: Any) -> Any:
            self.requests.append(request)
            return build_plan(request, watch, lambda: False, lambda trt: {**FACTS, "tensorrt": trt.__version__})

        self._patch.setattr(room, "build_in_child", build)
        return double

    def compile(self, **options: Any) -> Any:
        section = engine_section({}, {"backend": "tensorrt", **options})
        return compile_bundle(self.bundle, section, lambda *_: None)[1:]


@pytest.fixture
def bench(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    shutil.copytree(made, tmp_path / "bundle")
    return Bench(tmp_path / "bundle", monkeypatch)


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_each_release_gets_the_form_of_the_model_that_it_reads(bench: Bench, version: str) -> None:
    """Q/DQ in float32 where FP16 is the builder's choice, in float16 where it has to stand in the graph."""
    double = bench.install(version)
    engine, _ = bench.compile(target="gpu")
    source = "model.int8.onnx" if version in WEAK else "model.int8-fp16.onnx"
    assert engine.options["source"] == source
    assert engine.model_sha256 == {ref.path: ref.sha256 for ref in verify(bench.bundle).files}[source]
    (request,) = bench.requests
    assert (request.calibration_cache, request.half, request.batch) == (None, (), (1, 8, 32))
    flags = {given["flag"].name for given in double.called("IBuilderConfig.set_flag")}
    assert flags == ({"INT8", "FP16"} if version in WEAK else set())
    assert double.refusals == []
    assert [each.target for each in verify(bench.bundle).engines] == ["cpu", "gpu"]


@pytest.mark.parametrize("version", WEAK)
def test_a_dla_gets_the_plain_model_its_ranges_and_what_stays_in_half(bench: Bench, version: str) -> None:
    double = bench.install(version)
    engine, _ = bench.compile(target="dla1")
    assert engine.options == {"batch": "8,8,8", "source": "model.fp32.onnx"}
    assert engine.built_for["target"] == "dla1"
    table = from_json((bench.bundle / "calibration.json").read_bytes(), CalibrationTable, "table")
    scales = read_cache(double.calibration.decode())
    for name, found in table.tensors.items():
        assert scales[name] == pytest.approx(found.scale, rel=1e-6)
    model = from_data(verify(bench.bundle).stages["quantize"].facts, QuantizedModel, "quantize")
    module = {one.node: one.module for one in model.layers}
    assert set(double.pinned.values()) == {"HALF"}
    assert sorted(module[node] for node in double.pinned) == ["avgpool", "fc", "layer3.0", "layer3.0.conv2"]
    assert double.was_set("IBuilderConfig.DLA_core") == [1]
    assert double.refusals == []


@pytest.mark.parametrize("version", STRONG)
def test_a_dla_that_the_release_does_not_have_leaves_the_bundle_alone(bench: Bench, version: str) -> None:
    bench.install(version)
    before = verify(bench.bundle)
    with pytest.raises(BackendError, match=r"10\.7 is the last"):
        bench.compile(target="dla0")
    assert verify(bench.bundle) == before


@pytest.mark.parametrize("strict", [True, False])
def test_strictness_reaches_the_builder(bench: Bench, strict: bool) -> None:
    double = bench.install("10.3")
    bench.compile(target="dla0", strict=strict)
    flags = {given["flag"].name for given in double.called("IBuilderConfig.set_flag")}
    assert ("OBEY_PRECISION_CONSTRAINTS" in flags) == strict
    assert ("PREFER_PRECISION_CONSTRAINTS" in flags) != strict


def test_every_option_of_the_command_reaches_the_builder(bench: Bench, tmp_path: Path) -> None:
    bench.install("10.3")
    options = {
        "batch": [2, 3, 4],
        "workspace_mib": 64,
        "optimization_level": 2,
        "timing_cache": str(tmp_path / "timings"),
        "gpu_fallback": False,
        "version_compatible": True,
        "hardware_compatible": True,
    }
    engine, _ = bench.compile(target="gpu", **options)
    (request,) = bench.requests
    assert (request.batch, request.workspace, request.optimization_level) == ((2, 3, 4), 64 << 20, 2)
    assert (request.timing_cache, request.gpu_fallback) == (str(tmp_path / "timings"), False)
    assert (request.version_compatible, request.hardware_compatible) == (True, True)
    assert engine.built_for["version_compatible"] == "yes"
    assert engine.built_for["hardware_compatible"] == "AMPERE_PLUS"


# Loading what was compiled


def test_a_changed_engine_is_refused_before_anything_is_imported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.install("10.3")
    bench.compile(target="gpu")
    path = bench.bundle / "engines/gpu.engine"
    path.write_bytes(path.read_bytes() + b"!")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(IntegrityError, match=r"engines/gpu\.engine"):
        edgeres.load(bench.bundle, backend="tensorrt")


def test_an_engine_that_cannot_run_here_is_never_replaced_by_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.install("10.3")
    bench.compile(target="gpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match="tensorrt"):
        edgeres.load(bench.bundle, backend="tensorrt")
    manifest = verify(bench.bundle)
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    first = type(manifest)(**{**fields, "engines": tuple(reversed(manifest.engines))})
    (bench.bundle / "manifest.json").write_bytes(to_json(first))
    with pytest.raises(MissingPackageError, match="tensorrt"):
        edgeres.load(bench.bundle)  # the CPU's engine is there too, and is not taken instead
    with edgeres.load(bench.bundle, backend="cpu") as engine:
        assert engine.record.target == "cpu"
