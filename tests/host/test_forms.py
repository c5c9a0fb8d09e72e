"""Which form of a model a CPU's engine is: the integer one where it answers as the file; measured, the fastest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgeres
from edgeres import files, forms
from edgeres.artifacts import Engine, ExportedModel, Preprocessing, QuantizedModel, from_data
from edgeres.backends import cpu
from edgeres.benchmark import summarize
from edgeres.bundle import verify
from edgeres.compilation import compile_bundle
from edgeres.cpu_settings import THREADS
from edgeres.forms import FLOAT, FP32, INTEGERS, ONE_THREAD, cpu_engine
from edgeres.measurements import Latency
from edgeres.preprocess import prepare_batch
from edgeres.recipe import EngineSection, dossier
from edgeres.targets import resolve

FRAMES = Preprocessing((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest trained net, for the CPU."""
    digits, out = dossier() / "digits", tmp_path_factory.mktemp("forms") / "bundle"
    edgeres.build(
        model="resnet8_cifar", weights=digits / "weights.safetensors", calibration=digits / "calibration",
        calibration_count=64, recovery="none", backend="cpu", mean=(0.5,) * 3, std=(0.5,) * 3, out=out,
    )  # fmt: skip
    return out


def records(bundle: Path) -> tuple[ExportedModel, QuantizedModel]:
    stages = verify(bundle).stages
    return (
        from_data(stages["export"].facts, ExportedModel, "export"),
        from_data(stages["quantize"].facts, QuantizedModel, "quantize"),
    )


def timed(times: dict[str, float]) -> dict[str, Latency]:
    """Return latencies of just these milliseconds, all rounds alike."""
    rounds = {name: [np.array([int(ms * 1e6)], np.int64)] * 20 for name, ms in times.items()}
    return {name: summarize(name, 1, found) for name, found in rounds.items()}


def chosen(bundle: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> tuple[Engine, tuple[str, ...]]:
    """Return what is chosen where the forms take so many milliseconds."""
    monkeypatch.setattr(forms, "cores", lambda: 2)
    monkeypatch.setattr(forms, "_timed", lambda folder, opened, image: timed({n: times[n] for n in opened}))
    return cpu_engine(bundle, *records(bundle), FRAMES, measure=True)


def test_a_build_for_the_cpu_holds_and_runs_the_integer_form(built: Path) -> None:
    manifest = verify(built)
    (engine,) = manifest.engines
    assert engine.file.path == files.INTEGER_MODEL
    assert engine.measured_ms == {}  # equal builds come out equal
    assert engine.file in manifest.files
    with edgeres.load(built) as loaded:
        frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
        got = loaded(frames)
        x = prepare_batch(frames, manifest.preprocessing)
    exact = cpu.open_model(built / files.model_file("int8"), "int8")(x)
    np.testing.assert_array_equal(got.argmax(1), exact.argmax(1))
    assert np.abs(got - exact).max() < 0.05 * np.abs(exact).max()


def test_the_verdict_tells_the_engine_from_the_file(built: Path) -> None:
    report = verify(built).report
    assert report is not None
    assert report.attribution is not None
    assert report.attribution.engine.sqnr_db is None or report.attribution.engine.sqnr_db > 30


def test_every_weight_is_signed(built: Path) -> None:
    model = onnx.load(built / files.INTEGER_MODEL)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    place = {"QLinearConv": 3, "MatMulIntegerToFloat": 1}
    found = {kinds[n.input[place[n.op_type]]] for n in model.graph.node if n.op_type in place}
    assert found == {onnx.TensorProto.INT8}


def test_the_fastest_form_is_taken(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {FLOAT: 3.0, INTEGERS: 1.0, FP32: 2.0, INTEGERS + ONE_THREAD: 1.5, FP32 + ONE_THREAD: 2.5}
    engine, said = chosen(built, monkeypatch, times)
    assert (engine.file.path, engine.options.get(THREADS), said) == (files.INTEGER_MODEL, None, ())
    assert engine.measured_ms == times
    float_wins = {**times, FLOAT: 0.5, FLOAT + ONE_THREAD: 0.9}
    engine, said = chosen(built, monkeypatch, float_wins)
    assert (engine.file.path, engine.options) == (files.model_file("int8"), cpu.EXACT)


def test_one_thread_is_taken_where_it_is_faster(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {FLOAT: 3.0, INTEGERS: 1.0, FP32: 2.0, INTEGERS + ONE_THREAD: 0.7, FP32 + ONE_THREAD: 1.9}
    engine, _ = chosen(built, monkeypatch, times)
    assert engine.options == {**cpu.EXACT, THREADS: "1"}


def test_that_int8_does_not_pay_is_said(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {FLOAT: 3.0, INTEGERS: 1.0, FP32: 2.0, INTEGERS + ONE_THREAD: 1.5, FP32 + ONE_THREAD: 0.8}
    engine, said = chosen(built, monkeypatch, times)
    assert engine.precision == "int8"
    assert len(said) == 1
    assert "int8 does not pay on this CPU: 1.00 ms an image, and 0.80 ms in FP32" in said[0]


@pytest.mark.parametrize("harm", ["another function", "saturating sums", "no model"])
def test_an_integer_form_that_does_not_fit_is_left(built: Path, tmp_path: Path, harm: str) -> None:
    exported, model = records(built)
    assert model.integer is not None
    for ref in (exported.file, model.file, model.integer):
        (tmp_path / ref.path).write_bytes((built / ref.path).read_bytes())
    path = tmp_path / model.integer.path
    if harm == "no model":
        path.write_bytes(b"nothing")
    else:
        changed = onnx.load(path)
        for tensor in changed.graph.initializer:
            if tensor.name.endswith("_weights") and harm == "another function":
                tensor.raw_data = bytes(reversed(tensor.raw_data))
            elif tensor.name.endswith("_weights"):  # a quarter less reach, as where the largest sums are cut off
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.clip(values, -48, 48), tensor.name))
        path.write_bytes(changed.SerializeToString())
    engine, said = cpu_engine(tmp_path, exported, model, FRAMES, measure=False)
    assert engine.file == model.file
    assert len(said) == 1
    assert "int8 is computed in float" in said[0]


def test_compile_measures_and_keeps_the_verdict(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "PACE", forms.PACE._replace(seconds=0.2, warmup=0.01))
    section = EngineSection(backend="cpu", target="cpu")
    assert resolve(section) == ("cpu", "cpu")
    bundle, engine, _ = compile_bundle(built, section, lambda *_: None)
    assert {FLOAT, INTEGERS, FP32} <= engine.measured_ms.keys()
    assert all(ms > 0 for ms in engine.measured_ms.values())
    held = json.loads((built / "manifest.json").read_text())["engines"][0]["measured_ms"]
    assert held == engine.measured_ms
    assert (bundle.manifest.report is not None) == (engine.file.path == files.INTEGER_MODEL)
