"""What `compile` asks of each TensorRT release: which form of the model, which ranges, what is kept out of int8."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgeres
from edgeres import cli
from edgeres.artifacts import (
    CalibrationTable,
    Engine,
    FileRef,
    Manifest,
    Preprocessing,
    QuantizedModel,
    Report,
    StageRecord,
    from_data,
    from_json,
    to_data,
    to_json,
)
from edgeres.backends import tensorrt as room
from edgeres.backends.tensorrt import fit, logger, session
from edgeres.backends.tensorrt.builder import build_plan
from edgeres.backends.tensorrt.compat import this_machine
from edgeres.backends.tensorrt.dla import read_cache
from edgeres.bundle import verify
from edgeres.compilation import _ranges, compile_bundle, with_engine
from edgeres.errors import BackendError, BundleError, IntegrityError, MissingPackageError, RecipeError
from edgeres.exits import exit_code
from edgeres.files import content_ref
from edgeres.preprocess import prepare_batch
from edgeres.recipe import dossier, engine_section
from edgeres.runtime.engine import LoadedEngine
from edgeres.samples import samples_from_arrays
from edgeres.workforce import run_samples
from edgeres.workspace import Workspace


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


def build(out: Path, **options: Any) -> Path:
    """Return the embedded default on few images, with its classifier in float."""
    edgeres.build(
        model="resnet8_cifar",
        weights=dossier() / "digits/weights.safetensors",
        calibration=dossier() / "digits/calibration",
        calibration_count=20,
        keep_float=["fc", "layer3.0.conv2"],
        backend="cpu",
        out=out,
        **options,
    )
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that every target takes."""
    out = tmp_path_factory.mktemp("releases") / "bundle"
    return build(out, activation_range="symmetric", recovery="none")


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ranges are those of an equalized model, though so few images are told to promise too little."""
    from edgeres.quantize import equalize

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equalize, "DOUBT", 0.0)
        return build(tmp_path_factory.mktemp("recovered") / "bundle", activation_range="symmetric", recovery="fast")


@pytest.fixture(scope="module")
def equalized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a network of which nothing may be shifted."""
    from edgeres.quantize import documents, equalize

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equalize, "DOUBT", 0.0)
        patch.setattr(documents, "shiftable", lambda *_: frozenset())
        return build(tmp_path_factory.mktemp("equalized") / "bundle", activation_range="symmetric", recovery="fast")


def copied(bundle: Path, place: Path) -> Path:
    """Return a copy of a bundle, to be compiled."""
    return Path(shutil.copytree(bundle, place / "bundle"))


JUDGED = ("report.json", "quantized.npz")


class Bench:
    """A bundle, and a double in place of ``tensorrt`` that is built with in this process instead of a child's."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle = bundle
        self._patch = monkeypatch
        self.requests: list[Any] = []
        self.timeouts: list[float] = []
        self.facts = {**FACTS, "device": "Orin"}  # there is a GPU, so the engine itself tells its layers
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
            layer_information=self.information(),
        )
        double = DOUBLE.Double(version, script)
        self._patch.setitem(sys.modules, "tensorrt", double.module)

        def build(request: Any, watch: Any, timeout: float) -> Any:
            self.requests.append(request)
            self.timeouts.append(timeout)
            return build_plan(request, watch, lambda: False, lambda trt: {**self.facts, "tensorrt": trt.__version__})

        self._patch.setattr(room, "build_in_child", build)
        return double

    def information(self, floats: tuple[str, ...] = (), kind: str = "CaskConvolution") -> str:
        """Return what an inspector tells of an engine with one layer per node, as planned but for ``floats``."""
        model = from_data(verify(self.bundle).stages["quantize"].facts, QuantizedModel, "quantize")
        layers = []
        for one in model.layers:
            int8 = one.precision.startswith("int8") and one.module not in floats
            word = "Int8" if int8 else "Half"
            weights = {"Weights": {"Type": word, "Count": 9}} if one.op in ("Conv", "Gemm") else {}
            tensors = [{"Name": "x", "Format/Datatype": f"Row major {word} format"}]
            layers.append(
                {
                    "Name": one.node,
                    "LayerType": kind if weights or kind == "DLA" else "PointWise",
                    "Inputs": tensors * (2 if one.op == "Add" else 1),
                    "Outputs": tensors,
                    "Metadata": f"[ONNX Layer: {one.node}]",
                    **weights,
                }
            )
        return json.dumps({"Layers": layers, "Bindings": ["input", "logits"]})

    def change_model(self, **fields: Any) -> None:
        """Let the manifest say something else of the quantized model."""
        self.change(lambda manifest: manifest.stages["quantize"].facts.update(fields))

    def change(self, how: Any) -> None:
        """Write the manifest anew, with what ``how`` does to it or returns instead."""
        manifest = verify(self.bundle)
        changed = how(manifest)
        (self.bundle / "manifest.json").write_bytes(to_json(changed if changed is not None else manifest))

    def compile(self, **options: Any) -> Any:
        section = engine_section({}, {"backend": "tensorrt", **options})
        return compile_bundle(self.bundle, section, lambda *_: None)[1:]


@pytest.fixture
def bench(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(copied(made, tmp_path), monkeypatch)


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_each_release_gets_the_form_of_the_model_that_it_reads(bench: Bench, version: str) -> None:
    """Q/DQ in float32 where FP16 is the builder's choice, in float16 where it has to stand in the graph."""
    double = bench.install(version)
    engine, _ = bench.compile(target="gpu")
    source = "model.int8.onnx" if version in WEAK else "model.int8-fp16.onnx"
    assert engine.options["source"] == source
    assert engine.model_sha256 == {ref.path: ref.sha256 for ref in verify(bench.bundle).files}[source]
    (request,) = bench.requests
    assert (request.ranges, request.half, request.batch) == ({}, (), (1, 8, 32))
    assert double.calibration is None
    flags = {given["flag"].name for given in double.called("IBuilderConfig.set_flag")}
    assert flags == ({"INT8", "FP16"} if version in WEAK else set())
    assert double.refusals == []
    assert [each.target for each in verify(bench.bundle).engines] == ["cpu", "gpu"]


@pytest.mark.parametrize("version", ["8.5", "10.3", "11.4"])
def test_a_row_of_a_matrix_that_waits_for_a_board_is_compiled_there_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The recipe's target is the default there, and the verdict, on what the model means, stays."""
    (tmp_path / "recipe.toml").write_text(
        """name = "net"
model = { source = "resnet8_cifar", weights = "edgeres:digits/weights.safetensors" }
calibration = { samples = "edgeres:digits/calibration", count = 20 }
quantization = { recovery = "none" }
targets = [{ target = "gpu" }]
"""
    )
    (row,) = edgeres.build_matrix(tmp_path / "recipe.toml", out=tmp_path).rows
    assert row.state == "needs a board"
    before = verify(row.bundle)
    assert before.engines == ()
    bench = Bench(Path(row.bundle), monkeypatch)
    bench.install(version)
    section = engine_section(before.recipe["engine"], {})
    compile_bundle(bench.bundle, section, lambda *_: None)
    after = verify(bench.bundle)
    assert [engine.target for engine in after.engines] == ["gpu"]
    assert after.report is not None
    assert before.report is not None
    assert (after.report.verdict, after.report.drop_pp) == (before.report.verdict, before.report.drop_pp)
    assert [summary.target for summary in after.report.layers] == ["gpu"]


@pytest.mark.parametrize("version", WEAK)
def test_a_dla_gets_the_plain_model_its_ranges_and_what_stays_in_half(bench: Bench, version: str) -> None:
    double = bench.install(version)
    engine, _ = bench.compile(target="dla1")
    assert engine.options == {"batch": "8,8,8", "source": "model.fp32.onnx", "gpu_fallback": "yes"}
    assert engine.model_sha256 == {ref.path: ref.sha256 for ref in verify(bench.bundle).files}["model.fp32.onnx"]
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


@pytest.mark.parametrize("version", WEAK)
def test_ranges_of_an_equalized_model_never_go_beside_the_plain_one(
    equalized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    bench = Bench(copied(equalized, tmp_path), monkeypatch)
    double = bench.install(version)
    with pytest.raises(BackendError, match=r"equalized.*--recovery none"):
        bench.compile(target="dla0")
    assert double.called("Builder.build_serialized_network") == []
    engine, _ = bench.compile(target="gpu")  # which reads the graph that the ranges are of
    assert engine.options["source"] == "model.int8.onnx"


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_a_net_of_whole_pixels_takes_them(
    recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """From the builder's input to the answer to a frame, on every release; the bundle's other files stay."""
    bench = Bench(copied(recovered, tmp_path), monkeypatch)
    double = bench.install(version)
    engine, _ = bench.compile(target="gpu")
    assert (engine.input, engine.whole_pixels) == ("uint8", True)
    assert double.script.inputs == (DOUBLE.Tensor("frames", (-1, 32, 32, 3), "UINT8"),)
    (shapes,) = double.called("IOptimizationProfile.set_shape")
    assert [shapes[name] for name in ("input", "min", "opt", "max")] == [
        "frames", (1, 32, 32, 3), (8, 32, 32, 3), (32, 32, 32, 3)
    ]  # fmt: skip
    kept = {ref.path: ref for ref in verify(bench.bundle).files}
    told = (*JUDGED, "report.html")  # the page tells of the new engine
    assert all(kept[ref.path] == ref for ref in verify(recovered).files if ref.path not in told)
    double.script.profiles = ((1, 8, 32),)
    device = DOUBLE.HostDevice(double)
    built_for = this_machine(double.module, device)
    runner = session.open_session(double.script.plan, built_for, device=device)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    loaded = LoadedEngine(runner, verify(bench.bundle), engine)
    wanted = images.mean(axis=(1, 2, 3))[:, None] + np.arange(10)
    for given in (images, prepare_batch(images, loaded.manifest.preprocessing)):
        np.testing.assert_allclose(loaded(given), wanted, rtol=1e-5)
    loaded.close()
    device.close()


@pytest.mark.parametrize("version", ["8.5", "11.4"])
def test_what_an_engine_takes_is_the_users_to_say(
    bench: Bench, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    """Left open, a network that rounds its input to other steps than pixels keeps taking any normalized numbers."""
    double = bench.install(version)
    command = ["compile", str(bench.bundle), "--backend", "tensorrt", "--json", "--target", "gpu"]
    for wanted, got in (("auto", "float32"), ("uint8", "uint8"), ("float32", "float32")):
        double.script.inputs = (DOUBLE.Tensor("input", (-1, 3, 32, 32)),)
        assert exit_code(cli.cli, [*command, "--engine-input", wanted]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["input"], told["whole_pixels"]) == (got, False)
        assert [tensor.dtype for tensor in double.script.inputs] == [{"uint8": "UINT8", "float32": "FLOAT"}[got]]
    assert exit_code(cli.cli, ["inspect", str(bench.bundle), "--json"]) == 0
    assert {one["target"]: one["input"] for one in json.loads(capsys.readouterr().out)["engines"]}["gpu"] == "float32"


def test_a_dla_takes_normalized_input(bench: Bench) -> None:
    double = bench.install("10.3")
    engine, _ = bench.compile(target="dla0")
    assert (engine.input, [tensor.dtype for tensor in double.script.inputs]) == ("float32", ["FLOAT"])


def test_a_file_that_an_interrupted_build_has_left_makes_no_model_equalized(equalized: Path) -> None:
    assert (equalized / "scalings.npz").is_file()
    assert _ranges(equalized, equalized=True) == {}
    assert _ranges(equalized, equalized=False)


def test_the_reach_of_a_shifted_tensor_is_no_range_for_a_symmetric_one(recovered: Path) -> None:
    assert _ranges(recovered, equalized=False) == {}


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_a_dla_gets_no_shift_of_a_symmetric_model_either(
    recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    bench = Bench(copied(recovered, tmp_path), monkeypatch)
    double = bench.install(version)
    with pytest.raises(BackendError, match=r"shifted.*--activation-range symmetric --recovery none"):
        bench.compile(target="dla0")
    assert double.called("Builder.build_serialized_network") == []


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_shifted_activations_are_refused_for_a_dla(bench: Bench, version: str) -> None:
    """Up to 10.7 it would get scales alone, without the graph that holds the shifts."""
    double = bench.install(version)
    bench.change_model(activation_range="shifted")
    before = verify(bench.bundle)
    for target in ("dla0", "dla1"):
        with pytest.raises(BackendError, match=r"shifted.*--activation-range symmetric"):
            bench.compile(target=target)
    assert (bench.requests, double.calls, verify(bench.bundle)) == ([], [], before)
    _, warnings = bench.compile(target="gpu")
    assert any("--activation-range symmetric" in text for text in warnings)


@pytest.mark.parametrize("strict", [True, False])
def test_strictness_reaches_the_builder(bench: Bench, strict: bool) -> None:
    double = bench.install("10.3")
    double.script.layer_information = bench.information(kind="DLA")
    bench.compile(target="dla0", strict=strict)
    flags = {given["flag"].name for given in double.called("IBuilderConfig.set_flag")}
    assert ("OBEY_PRECISION_CONSTRAINTS" in flags) == strict
    assert ("PREFER_PRECISION_CONSTRAINTS" in flags) != strict


def test_every_option_of_the_command_reaches_the_builder(bench: Bench, tmp_path: Path) -> None:
    bench.install("10.3").script.level = "AMPERE_PLUS"
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
    assert engine.options == {
        "source": "model.int8.onnx", "batch": "2,3,4", "workspace_mib": "64", "optimization_level": "2"
    }  # fmt: skip
    assert engine.built_for["version_compatible"] == "yes"
    assert engine.built_for["hardware_compatible"] == "AMPERE_PLUS"


# What is kept of it


@pytest.mark.parametrize("version", DOUBLE.VERSIONS)
def test_strict_takes_what_is_as_planned_and_refuses_what_is_not(bench: Bench, version: str) -> None:
    double = bench.install(version)
    engine, warnings = bench.compile(target="gpu", strict=True)
    assert (engine.not_as_planned, warnings, engine.warnings) == ((), (), ())
    good = verify(bench.bundle)
    double.script.layer_information = bench.information(floats=("layer1.0.conv1",))
    with pytest.raises(BackendError, match=r"--strict.*layer1\.0\.conv1 \(Conv\) was planned in int8 and runs in fp16"):
        bench.compile(target="gpu", strict=True)
    assert verify(bench.bundle) == good
    complaint = "layer1.0.conv1 (Conv) was planned in int8 and runs in fp16"
    engine, warnings = bench.compile(target="gpu")
    assert engine.not_as_planned == warnings == engine.warnings == (complaint,)
    assert complaint in verify(bench.bundle).warnings
    assert double.refusals == []


def test_what_the_recipe_switches_on_a_flag_switches_off(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    stored = ("strict", "version_compatible", "hardware_compatible")
    bench.change(lambda manifest: manifest.recipe["engine"].update(dict.fromkeys(stored, True)))
    double = bench.install("10.3")
    double.script.level = "AMPERE_PLUS"
    double.script.layer_information = bench.information(floats=("layer1.0.conv1",))
    command = ["compile", str(bench.bundle), "--target", "gpu"]
    assert exit_code(cli.cli, command) == 1
    assert "with --strict" in capsys.readouterr().err
    assert exit_code(cli.cli, [*command, "--no-strict", "--no-version-compatible", "--no-hardware-compatible"]) == 0
    before, after = bench.requests
    assert [getattr(before, name) for name in stored] == [True] * 3
    assert [getattr(after, name) for name in stored] == [False] * 3


@pytest.mark.parametrize("strict", [True, False])
def test_an_engine_that_tells_nothing_is_not_taken_for_one_in_int8(bench: Bench, strict: bool) -> None:
    """As where it was built without a GPU in reach, by a release whose log has no table."""
    bench.install("10.3")
    bench.facts = FACTS
    if strict:
        with pytest.raises(BackendError, match="is not known"):
            bench.compile(target="gpu", strict=True)
    else:
        assert [text for text in bench.compile(target="gpu")[1] if "is not known" in text]


def test_what_falls_off_a_dla_is_named_and_refused_where_that_is_asked_for(bench: Bench) -> None:
    bench.install("10.3")
    _, warnings = bench.compile(target="dla0")
    (told,) = (text for text in warnings if "run on the GPU" in text)
    assert "layer1.0.conv1" in told
    with pytest.raises(BackendError, match="run on the GPU"):
        bench.compile(target="dla0", strict=True)


def test_a_warning_goes_with_the_engine_that_it_is_about(bench: Bench) -> None:
    double = bench.install("10.3")
    double.script.layer_information = bench.information(floats=("layer1.0.conv1",))
    double.script.build_log = [("ERROR", "something of this build alone")]
    _, first = bench.compile(target="gpu")
    assert len(first) == 2
    assert {*first} <= {*verify(bench.bundle).warnings}
    others = {*verify(bench.bundle).warnings} - {*first}
    double.script.build_log = ()
    double.script.layer_information = bench.information()
    bench.compile(target="gpu")
    assert {*verify(bench.bundle).warnings} == others


def test_the_builder_has_the_time_that_it_is_given(bench: Bench) -> None:
    bench.install("10.3")
    bench.compile(target="gpu")
    bench.compile(target="gpu", timeout_minutes=1.5)
    assert bench.timeouts == [4 * 3600, 90]
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="--timeout-minutes"):
            engine_section({}, {"timeout_minutes": minutes})


def test_a_plan_that_is_not_the_one_that_was_built_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.install("10.3")
    honest = room.build_in_child

    def meddled(request: Any, watch: Any, timeout: float) -> Any:
        result = honest(request, watch, timeout)
        with open(request.plan, "ab") as stream:
            stream.write(b"!")
        return result

    monkeypatch.setattr(room, "build_in_child", meddled)
    before = verify(bench.bundle)
    with pytest.raises(BackendError, match="changed after it was built"):
        bench.compile(target="gpu")
    assert verify(bench.bundle) == before


def test_without_the_second_form_strong_typing_is_told_what_is_missing(bench: Bench) -> None:
    bench.change_model(mixed=None)
    for version in STRONG:
        bench.install(version)
        with pytest.raises(BundleError, match=r"no form of its int8 model.*edgeres\s+quantize"):
            bench.compile(target="gpu")
    bench.install("10.3")
    assert bench.compile(target="gpu")[0].options["source"] == "model.int8.onnx"


@pytest.mark.parametrize("path", ["model.int8.onnx", "model.int8-fp16.onnx", "model.fp32.onnx"])
def test_a_model_that_no_hash_vouches_for_is_not_compiled(bench: Bench, path: str) -> None:
    bench.install("10.3")

    def without(manifest: Manifest) -> Manifest:
        kept = tuple(ref for ref in manifest.files if ref.path != path)
        engines = tuple(engine for engine in manifest.engines if engine.file.path != path)
        return replaced(manifest, files=kept, engines=engines)

    bench.change(without)
    with pytest.raises(BundleError, match=f"{path} is not in the list"):
        bench.compile(target="gpu")
    assert bench.requests == []


def replaced(noun: Any, **fields: Any) -> Any:
    return type(noun)(**{**{name: getattr(noun, name) for name in noun.__struct_fields__}, **fields})


def engine_of(target: str, backend: str, digest: str = "0") -> Engine:
    ref = FileRef(f"engines/{target}.engine", digest * 64, 1)
    return Engine(target=target, backend=backend, precision="int8", file=ref, built_for={}, options={})


@pytest.mark.parametrize(
    ("judged", "backend", "compiled", "digest", "holds"),
    [
        ("gpu", "tensorrt", "gpu", "1", False),
        ("gpu", "tensorrt", "gpu", "0", True),  # the very same file
        ("gpu", "tensorrt", "dla0", "1", True),
        ("dla0", "tensorrt", "gpu", "1", True),
        ("cpu", "cpu", "gpu", "1", True),
        ("", "tensorrt", "gpu", "1", False),  # a report of an earlier edgeres
        ("", "cpu", "gpu", "1", True),
    ],
)
def test_a_verdict_holds_until_its_engine_is_replaced(
    bench: Bench, judged: str, backend: str, compiled: str, digest: str, holds: bool
) -> None:
    report = Report(
        samples=1, agreement=1.0, sqnr_db=None, max_drop_pp=0.5, verdict="pass", backend=backend, precision="int8",
        target=judged,
    )  # fmt: skip
    there = tuple(engine_of(target, "tensorrt") for target in ("gpu", "dla0"))
    stages = {
        "compile": StageRecord("k", (there[0].file,), 1.0, to_data(there[0])),
        "validate": StageRecord("k", tuple(content_ref(name, b"") for name in JUDGED), 1.0, to_data(report)),
    }
    manifest = replaced(verify(bench.bundle), engines=there, report=report, stages=stages)
    changed = with_engine(manifest, engine_of(compiled, "tensorrt", digest), ())
    assert (changed.report is not None, "validate" in changed.stages) == (holds, holds)
    if holds:
        assert tuple(ref.path for ref in changed.stages["validate"].files) == JUDGED
    assert ("compile" in changed.stages) == (compiled == "dla0" or digest == "0")
    assert sorted(engine.target for engine in changed.engines) == ["dla0", "gpu"]


def test_a_bundle_chooses_no_file_of_this_machine() -> None:
    """The timing cache in its recipe was the host's; what is written there would be overwritten."""
    assert engine_section({"timing_cache": "/etc/passwd", "optimization_level": 1}, {}).timing_cache is None
    assert engine_section({"timing_cache": "/etc/passwd"}, {"timing_cache": "/tmp/x"}).timing_cache == "/tmp/x"


@pytest.mark.parametrize("case", ["locked", "link", "read-only"])
def test_what_stands_in_the_way_is_told_without_an_option_that_compile_has_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    bench.install("10.3")
    if case == "locked":
        with Workspace(bench.bundle), pytest.raises(BundleError, match=r"another edgeres.*Copy the bundle") as caught:
            bench.compile(target="gpu")
    elif case == "link":
        link = bench.bundle.with_name("link")
        link.symlink_to(bench.bundle)
        bench.bundle = link
        with pytest.raises(BundleError, match=r"is a link\. Name the folder itself: /.*bundle") as caught:
            bench.compile(target="gpu")
    else:

        def refuse(*given: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Workspace, "_take_lock", refuse)
        with pytest.raises(BundleError, match=r"Permission denied\. Copy the bundle") as caught:
            bench.compile(target="gpu")
    assert "--out" not in str(caught.value)


# Loading what was compiled


def test_a_changed_engine_is_refused_before_anything_is_imported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.install("10.3")
    bench.compile(target="gpu")
    path = bench.bundle / "engines/gpu.engine"
    path.write_bytes(path.read_bytes() + b"!")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(IntegrityError, match=r"engines/gpu\.engine"):
        edgeres.load(bench.bundle, backend="tensorrt")


def test_verify_says_which_engines_fit_this_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double = bench.install("10.3")
    device = DOUBLE.HostDevice(double)
    bench.facts = {**this_machine(double.module, device), "device": "Orin"}
    bench.compile(target="gpu")
    bench.compile(target="dla1")
    monkeypatch.setattr(fit, "open_device", lambda: device)

    def verified() -> dict[str, list[str]]:
        assert exit_code(cli.cli, ["verify", str(bench.bundle), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert all(engine["fits"] == (engine["problems"] == []) for engine in facts["engines"])
        return {engine["target"]: engine["problems"] for engine in facts["engines"]}

    double.calls.clear()
    assert verified() == {"cpu": [], "gpu": [], "dla1": []}
    assert double.called("Runtime.deserialize_cuda_engine") == []
    assert device.closed
    double.script.dla_cores = 1
    assert "dla1, which TensorRT 10.3.0 does not see here" in verified()["dla1"][0]
    device.compute_capability = (8, 9)
    assert "built for sm_87; this machine has sm_89" in verified()["gpu"][0]
    bench.install("10.7")
    assert "built for TensorRT 10.3.0" in verified()["gpu"][0]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = verified()
    assert "edgeres[tensorrt]" in said["gpu"][0]
    assert said["cpu"] == []
    assert exit_code(cli.cli, ["verify", str(bench.bundle)]) == 0
    text = capsys.readouterr().out
    assert "the engine for cpu fits this machine" in text
    assert "the engine for gpu does not run here: " in text


class Counting:
    """A runner that takes at most so many at a time, and notes how many it got."""

    def __init__(self, largest: int | None) -> None:
        self.largest = largest
        self.got: list[int] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.got.append(len(batch))
        return np.repeat(batch.mean(axis=(1, 2, 3))[:, None], 10, axis=1)

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize(("largest", "got"), [(32, [32, 8]), (3, [3] * 13 + [1]), (None, [12] * 3 + [4])])
def test_an_engine_gets_batches_of_its_own_size(largest: int | None, got: list[int]) -> None:
    """224 × 224 is calibrated by twelve at a time; that is not what an engine was built for."""
    preprocessing = Preprocessing((224, 224), 224)
    manifest = Manifest("n", "int8", {}, preprocessing, (), {}, {})
    frames = np.random.default_rng(0).integers(0, 256, (40, 224, 224, 3), dtype=np.uint8)
    runner = Counting(largest)
    logits = LoadedEngine(runner, manifest, engine_of("gpu", "tensorrt"))(frames)
    assert runner.got == got
    np.testing.assert_array_equal(logits, Counting(None)(prepare_batch(frames, preprocessing)))
    judged = Counting(largest)
    np.testing.assert_array_equal(run_samples(judged, samples_from_arrays(frames), preprocessing, silent), logits)
    assert judged.got == got


def silent(done: int, total: int) -> None:
    """Hear progress and do nothing."""


def test_each_engine_of_a_backend_can_be_chosen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.install("10.3")
    for target in ("gpu", "dla0", "dla1"):
        bench.compile(target=target)
    opened: list[str] = []

    def open_session(plan: bytes, built_for: Any, **options: Any) -> Counting:
        opened.append(built_for["target"])
        return Counting(8)

    monkeypatch.setattr(session, "open_session", open_session)
    for name in ("gpu", "dla0", "dla1"):
        with edgeres.load(bench.bundle, backend=name) as engine:
            assert engine.record.target == name
        images = np.zeros((4, 32, 32, 3), np.uint8)
        assert edgeres.validate(bench.bundle, images, backend=name).target == name
    assert opened == ["gpu", "gpu", "dla0", "dla0", "dla1", "dla1"]
    with edgeres.load(bench.bundle, backend="cpu") as engine:
        assert engine.record.target == "cpu"
    with pytest.raises(BundleError, match=r"tensorrt, gpu.*edgeres compile .* --target rtx"):
        edgeres.load(bench.bundle, backend="rtx")


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
