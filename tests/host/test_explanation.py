"""Where the error comes from, in a build: what is written, what `inspect` shows, and which part of a drop is whose."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import edgeres
from edgeres import building, engines, files, judge, workforce
from edgeres.artifacts import (
    Bundle,
    Climb,
    Engine,
    LayerCost,
    QuantizationErrors,
    QuantizedModel,
    Report,
    Rung,
    StageRecord,
    from_data,
    from_json,
    to_data,
)
from edgeres.bundle import verify
from edgeres.cli import cli
from edgeres.errors import BundleError
from edgeres.inspection import inspect_bundle, repairs
from edgeres.preprocess import prepare_batch
from edgeres.recipe import dossier
from edgeres.runtime.engine import LoadedEngine
from edgeres.terminal import show_build


def test_a_reference_of_objects_is_refused_in_our_own_words() -> None:
    stream = io.BytesIO()
    np.savez(stream, logits=np.array([{}], object), names=np.array(["a"]), sha256=np.array(["b"]))
    with pytest.raises(BundleError, match="it holds Python objects") as caught:
        judge.read_reference(stream.getvalue(), files.REFERENCE)
    assert "allow_pickle" not in str(caught.value)
    with pytest.raises(BundleError, match="is not a reference file"):
        judge.read_reference(b"neither an archive nor an array", files.REFERENCE)


RUNGS = {"plain": ("none", "symmetric"), "recovered": ("auto", "shifted")}


def options(folder: Path) -> dict[str, Any]:
    """Return the options of a small build that is judged on the very images that it is calibrated with."""
    if not (folder / "images").exists():
        for digit in range(10):
            (folder / "images" / str(digit)).mkdir(parents=True)
            for image in sorted((dossier() / "digits/calibration" / str(digit)).glob("*.png"))[:4]:
                shutil.copy(image, folder / "images" / str(digit))
    return {
        "model": "resnet8_cifar",
        "weights": dossier() / "digits/weights.safetensors",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "calibration": folder / "images",
        "validation": folder / "images",
        "backend": "cpu",
    }


@pytest.fixture(scope="module", params=RUNGS, ids=RUNGS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle without recovery and symmetric, and one with all that equalizes, shifts and rounds."""
    folder = tmp_path_factory.mktemp("build")
    recovery, form = RUNGS[request.param]
    edgeres.build(**options(folder), out=folder / "bundle", recovery=recovery, activation_range=form)
    return folder / "bundle"


def errors_of(bundle: Path) -> QuantizationErrors:
    return from_json((bundle / files.ERRORS).read_bytes(), QuantizationErrors, files.ERRORS)


def report_of(bundle: Path) -> Report:
    report = verify(bundle).report
    assert report is not None
    return report


def test_the_error_accumulated_at_the_logits_is_the_reports(bundle: Path) -> None:
    """The report's is of what onnxruntime answers, running the file; this is of the simulation, on the same images.

    Both sum in another order, so that now and then a value falls to the other side of a rounding.
    """
    errors, report = errors_of(bundle), report_of(bundle)
    assert errors.samples == report.samples == 40
    assert errors.logits_sqnr_db == pytest.approx(report.sqnr_db, abs=0.75)
    last = next(layer for layer in errors.layers if layer.module == "fc")
    assert last.accumulated_sqnr_db == errors.logits_sqnr_db


def test_the_worst_layers_are_named_in_short_and_with_the_flag_that_keeps_them(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags that are advised name what a build takes."""
    manifest, errors = verify(bundle), errors_of(bundle)
    short = building._build_json(Bundle(str(bundle), manifest), [])["errors"]
    assert [entry["module"] for entry in short] == [layer.module or layer.node for layer in errors.layers[:3]]
    assert [(x["share"], x["own_sqnr_db"]) for x in short] == [(x.share, x.own_sqnr_db) for x in errors.layers[:3]]
    worst, untried = repairs(bundle, manifest)
    assert len(worst) == 3
    assert untried == ("--recovery none" if manifest.recipe["quantization"]["recovery"] == "none" else "")
    report = msgspec.structs.replace(report_of(bundle), verdict="fail", drop_pp=9.0, drop_ci95_pp=(8.0, 10.0),
                                     attribution=None)  # fmt: skip
    show_build(Bundle(str(bundle), msgspec.structs.replace(manifest, report=report)), [])
    text = capsys.readouterr().out
    assert "most of the noise: " + short[0]["module"] in text
    assert " ".join(f"--keep-float {name}" for name in worst) in text
    assert ("nothing more was tried" in text) == bool(untried)
    edgeres.build(**options(tmp_path), out=tmp_path / "bundle", recovery="none", keep_float=list(worst))
    plan = from_data(verify(tmp_path / "bundle").stages["quantize"].facts, QuantizedModel, "stage quantize").layers
    assert set(worst) <= {layer.module for layer in plan if layer.precision == "float"}
    again, _ = repairs(tmp_path / "bundle", verify(tmp_path / "bundle"))
    assert again[:3] == worst
    assert len(set(again)) == 6


def test_what_each_layer_costs_alone_says_more_than_its_noise(bundle: Path) -> None:
    costs = [
        LayerCost("block", ("/a", "/b", "/add"), 2, 0.9, 0.9, 3.0),
        LayerCost("given", ("/a",), 1, 0.8, 0.8, 4.0),
        LayerCost("b", ("/b",), 1, 0.5, 0.5, 5.0),
        LayerCost("free", ("/c",), 1, 0.0, 0.0, None),
    ]
    climb = Climb((Rung("give back", 2, ("given",), 1.0, 0.9, 9.0, "fail", 1.0),), 0, (costs[1],))
    manifest = verify(bundle)
    stages = {
        **manifest.stages,
        "sensitivity": StageRecord("k", (), 1.0, {"images": 1, "layers": to_data(costs)}),
        "budget": StageRecord("k", (), 1.0, to_data(climb)),
    }
    assert repairs(bundle, msgspec.structs.replace(manifest, stages=stages))[0] == ("b",)


def test_every_layer_in_int8_is_there_the_worst_first(bundle: Path) -> None:
    plan = from_data(verify(bundle).stages["quantize"].facts, QuantizedModel, "stage quantize").layers
    errors = errors_of(bundle)
    computing = [
        layer for layer in plan if layer.precision in ("int8", "int8 skip") and layer.op not in ("Pad", "Slice")
    ]
    assert {(layer.node, layer.op, layer.module) for layer in computing} == {
        (layer.node, layer.op, layer.module) for layer in errors.layers
    }
    shares = [layer.share for layer in errors.layers]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)


def test_the_first_layer_of_the_recovered_net_reads_exact_pixels(bundle: Path) -> None:
    first = next(layer for layer in errors_of(bundle).layers if layer.module == "conv1")
    exact = first.input_sqnr_db is None or first.input_sqnr_db > 100
    assert exact == (first.tensor != "input")
    assert first.saturated == 0


def test_inspect_shows_the_worst(bundle: Path) -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(bundle)])
    assert shown.exit_code == 0
    errors = errors_of(bundle)
    table = shown.output[shown.output.index("where the error comes from") :]
    assert f"the worst 10 of {len(errors.layers)}, on 40 samples" in table
    assert f"{100 * errors.layers[0].share:.1f} %" in table
    places = [table.index(layer.module) for layer in errors.layers[:3]]
    assert places == sorted(places)
    data = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--json"]).output)
    assert from_data(data["errors"], QuantizationErrors, "errors") == errors


def test_a_second_build_takes_it_over(bundle: Path) -> None:
    before = (bundle / files.ERRORS).read_bytes()
    edgeres.build(bundle, out=bundle)
    assert (bundle / files.ERRORS).read_bytes() == before


def test_a_net_that_cannot_be_followed_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange_net.py").write_text(
        "import torch\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Conv2d(4, 4, 3),\n"
        "                               torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    strange = {**options(tmp_path), "model": "strange_net:net", "weights": None, "input_size": (16, 16)}
    made = edgeres.build(**strange, out=tmp_path / "bundle", recovery="none")
    assert any("not traced to its layers" in text and "Softplus" in text for text in made.manifest.warnings)
    assert files.ERRORS not in [ref.path for ref in made.manifest.files]
    assert inspect_bundle(tmp_path / "bundle")["errors"] is None
    assert CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle")]).exit_code == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_have_nothing_to_explain(tmp_path: Path, precision: str) -> None:
    made = edgeres.build(**options(tmp_path), out=tmp_path / "bundle", precision=precision)
    kept = [ref.path for ref in made.manifest.files]
    assert files.ERRORS not in kept
    assert (files.MEANING in kept) == (precision == "fp16")
    assert inspect_bundle(tmp_path / "bundle")["errors"] is None


class Rough:
    """An engine that answers a little else than its model means."""

    largest = None

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        self.run = run

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.run(x) + np.float32(0.5) * np.sin(np.arange(10, dtype=np.float32)))

    def close(self) -> None:
        pass


def noise_of_rough(meaning: np.ndarray) -> float:
    noise = len(meaning) * float((0.25 * np.sin(np.arange(10)) ** 2).sum())
    return float(10 * np.log10((meaning.astype(np.float64) ** 2).sum() / noise))


def stored(bundle: Path, name: str) -> np.ndarray:
    return np.asarray(judge.read_reference((bundle / name).read_bytes(), name)["logits"])


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `validate` meet an engine of another backend, whose answers are not quite what the file means."""
    load = judge.load_with

    def rough(*arguments: Any) -> tuple[LoadedEngine, dict[str, bytes]]:
        engine, contents = load(*arguments)
        record = msgspec.structs.replace(engine.record, backend="tensorrt")
        return LoadedEngine(Rough(engine._runner), engine.manifest, record), contents

    monkeypatch.setattr(judge, "load_with", rough)


def test_on_the_cpu_quantization_has_nearly_all_of_it(bundle: Path) -> None:
    report, logits = report_of(bundle), stored(bundle, files.MEANING)
    parts = report.attribution
    assert parts is not None
    assert parts.quantization.sqnr_db == pytest.approx(report.sqnr_db, abs=1.0)
    assert parts.quantization.drop_pp == report.drop_pp
    assert (parts.engine.agreement, parts.engine.drop_pp) == (1.0, 0.0)
    assert parts.engine.sqnr_db is None or parts.engine.sqnr_db >= 33
    frames = np.stack([np.asarray(frame) for frame in map(decoded, sorted((bundle.parent / "images").rglob("*.png")))])
    x = prepare_batch(frames, verify(bundle).preprocessing)
    np.testing.assert_array_equal(judge.open_file(bundle / files.model_file("int8"), "int8")(x), logits)


def decoded(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("onnxruntime", ["there", "missing"])
def test_validate_tells_the_engines_part(bundle: Path, monkeypatch: pytest.MonkeyPatch, onnxruntime: str) -> None:
    if onnxruntime == "missing":  # as on a robot: the logits in the bundle are enough
        monkeypatch.setattr(judge, "computed_meaning", None)
    cpu, report = report_of(bundle), edgeres.validate(bundle)
    assert report.attribution is not None
    assert cpu.attribution is not None
    assert report.attribution.quantization == cpu.attribution.quantization
    expected = noise_of_rough(stored(bundle, files.MEANING))
    assert report.attribution.engine.sqnr_db == pytest.approx(expected, abs=0.1)
    assert report.attribution.engine.sqnr_db != report.sqnr_db


@pytest.mark.usefixtures("on_a_gpu")
def test_other_samples_are_computed_again(bundle: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    report = edgeres.validate(bundle, frames)
    x = prepare_batch(frames, verify(bundle).preprocessing)
    meaning = judge.open_file(bundle / files.model_file("int8"), "int8")(x)
    assert report.attribution is not None
    assert report.attribution.engine.sqnr_db == pytest.approx(noise_of_rough(meaning), abs=0.01)
    assert report.attribution.quantization.drop_pp is None


@pytest.mark.usefixtures("on_a_gpu")
def test_an_older_bundle_on_a_robot_has_no_parts_to_tell(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, found = judge.load_with, importlib.util.find_spec

    def older(*arguments: Any) -> tuple[LoadedEngine, dict[str, bytes]]:
        engine, contents = load(*arguments)
        del contents[files.MEANING]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
        return engine, contents

    monkeypatch.setattr(judge, "load_with", older)
    report = edgeres.validate(bundle)
    assert report.attribution is None
    assert report.verdict in ("pass", "inconclusive", "fail")


def test_a_build_for_another_backend_computes_the_meaning_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeres.pipeline import Build

    choose, open_record = engines.judged, workforce.open_record

    def judged(job: Build, model: QuantizedModel, engine: Engine) -> Engine:
        return msgspec.structs.replace(choose(job, model, engine), backend="tensorrt")

    def rough(content: bytes, record: Engine, *rest: Any) -> Any:
        run = open_record(content, msgspec.structs.replace(record, backend="cpu"), *rest)
        return run if record.backend == "cpu" else Rough(run)

    monkeypatch.setattr(engines, "judged", judged)
    monkeypatch.setattr(workforce, "open_record", rough)
    made = edgeres.build(**options(tmp_path), out=tmp_path / "bundle", recovery="none")
    assert made.report is not None
    parts, meaning = made.report.attribution, stored(tmp_path / "bundle", files.MEANING)
    assert parts is not None
    assert parts.engine.sqnr_db == pytest.approx(noise_of_rough(meaning), abs=0.01)
    fp32 = stored(tmp_path / "bundle", files.REFERENCE).astype(np.float64)
    assert parts.quantization.sqnr_db == pytest.approx(
        10 * np.log10((fp32**2).sum() / ((meaning - fp32) ** 2).sum()), abs=0.001
    )
    monkeypatch.undo()
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle"), "--json"])
    assert json.loads(shown.output)["validation"]["attribution"]["engine"]["sqnr_db"] == parts.engine.sqnr_db
