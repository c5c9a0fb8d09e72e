"""`edgeres compile` from a bundle to an engine, with the real builder: what users type, end to end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import edgeres
from edgeres.artifacts import Manifest, Report, from_json, to_json
from edgeres.bundle import verify
from edgeres.recipe import dossier

COMMAND = "import sys; from edgeres.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default on few images, with the CPU's engine."""
    folder = tmp_path_factory.mktemp("compile")
    for split in ("calibration", "validation"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
            for image in sorted((dossier() / "digits" / split / str(digit)).glob("*.png"))[:2]:
                shutil.copy(image, folder / split / str(digit))
    edgeres.build(
        model="resnet8_cifar",
        weights=dossier() / "digits/weights.safetensors",
        calibration=folder / "calibration",
        calibration_count=20,
        validation=folder / "validation",
        backend="cpu",
        out=folder / "bundle",
    )
    return folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


def refused(rtx: Any, *arguments: str) -> str:
    """Return what a command says that must fail with exit code 1."""
    process = rtx.start(COMMAND, *arguments)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    return str(said)


def assert_all_tell_the_same(rtx: Any, bundle: Path) -> Manifest:
    """The layers of each engine, counted here, are those of the manifest, of report.json and of `inspect`."""
    manifest = verify(bundle)
    engines = [engine for engine in manifest.engines if engine.layers]
    counted = [dict(Counter(layer.precision for layer in engine.layers if layer.precision)) for engine in engines]
    assert manifest.report is not None
    assert [summary.target for summary in manifest.report.layers] == [engine.target for engine in engines]
    assert [summary.precisions for summary in manifest.report.layers] == counted
    assert [summary.not_as_planned for summary in manifest.report.layers] == [one.not_as_planned for one in engines]
    assert from_json((bundle / "report.json").read_bytes(), Report, "report.json") == manifest.report
    page = (bundle / "report.html").read_text()
    assert all(f"Engine for {engine.target}, as its builder reported" in page for engine in engines)
    facts = json.loads(rtx.run(COMMAND, "inspect", str(bundle), "--json"))
    assert [summary["precisions"] for summary in facts["summaries"]] == counted
    assert facts["validation"]["layers"] == facts["summaries"]
    assert [engine["not_as_planned"] for engine in facts["engines"] if engine["layers"]] == [
        list(one.not_as_planned) for one in engines
    ]
    if engines:
        first = Counter(layer["precision"] for layer in facts["layers"] if layer["precision"])
        assert dict(first) == counted[0]
    return manifest


def test_an_engine_for_rtx_joins_the_bundle(rtx: Any, bundle: Path) -> None:
    before = assert_all_tell_the_same(rtx, bundle)
    answer = json.loads(rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx", "--strict", "--json"))
    assert (answer["backend"], answer["target"], answer["warnings"]) == ("tensorrt-rtx", "rtx", [])
    manifest = assert_all_tell_the_same(rtx, bundle)
    # no GPU here can run it, so the engine that can be run stays in front, and the verdict on it holds
    assert [engine.target for engine in manifest.engines] == ["cpu", "rtx"]
    assert (manifest.report.verdict, manifest.report.sqnr_db) == (before.report.verdict, before.report.sqnr_db)
    assert (bundle / "engines/rtx.engine").stat().st_size == manifest.engines[1].file.bytes
    modules = {layer["module"] for layer in answer["layers"] if layer["precision"] == "int8"}
    assert any("layer3.0.conv2" in module for module in modules)
    assert any("fc" in module for module in modules)
    layers = json.loads(rtx.run(COMMAND, "inspect", str(bundle), "--json"))["layers"]
    assert {"name", "type", "precision", "module"} <= set(layers[0])
    assert f"engine for rtx: {manifest.engines[1].summary.words}" in rtx.run(COMMAND, "inspect", str(bundle))
    # compiling again replaces the engine of that target and no other
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx", "--batch", "4")
    again = assert_all_tell_the_same(rtx, bundle)
    assert [engine.target for engine in again.engines] == ["cpu", "rtx"]
    assert again.engines[1].options["batch"] == "4,4,4"


def test_a_build_for_rtx_tells_of_its_layers_though_the_cpu_was_judged(rtx: Any, made: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "built")
    recipe = str(made / "recipe.toml")
    answer = json.loads(
        rtx.run(COMMAND, "build", recipe, "--target", "rtx", "--backend", "auto", "--out", out, "--json")
    )
    assert answer["validation"]["backend"] == "cpu"
    assert [summary["target"] for summary in answer["validation"]["layers"]] == ["rtx"]
    manifest = assert_all_tell_the_same(rtx, tmp_path / "built")
    assert [engine.target for engine in manifest.engines] == ["rtx"]
    assert manifest.report.layers[0].precisions["int8"] >= 8


def test_a_layer_that_is_not_as_planned_is_named_everywhere(rtx: Any, bundle: Path) -> None:
    """The plan in this manifest claims int8 for a layer that the model itself keeps in float."""
    rtx.run(COMMAND, "build", str(bundle), "--keep-float", "fc")
    manifest = verify(bundle)
    for layer in manifest.stages["quantize"].facts["layers"]:
        layer["precision"] = "int8" if layer["op"] == "Gemm" else layer["precision"]
    (bundle / "manifest.json").write_bytes(to_json(manifest))
    wrong = "fc (Gemm) was planned in int8 and runs in fp16"
    assert f"every layer must run as planned: {wrong}" in refused(
        rtx, "compile", str(bundle), "--target", "rtx", "--strict"
    )
    assert [engine.target for engine in verify(bundle).engines] == ["cpu"]
    answer = json.loads(rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx", "--json"))
    assert answer["warnings"] == answer["not_as_planned"] == [wrong]
    assert wrong in verify(bundle).warnings
    assert [each.not_as_planned for each in assert_all_tell_the_same(rtx, bundle).report.layers] == [(wrong,)]
    assert f"not as planned: {wrong}" in rtx.run(COMMAND, "inspect", str(bundle))


def test_a_warning_goes_with_the_engine_that_it_is_about(rtx: Any, bundle: Path) -> None:
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    manifest = verify(bundle)
    wrong = ("conv1 (Conv) was planned in int8 and runs in fp32",)
    engines = [
        type(engine)(**{**{name: getattr(engine, name) for name in engine.__struct_fields__}, "not_as_planned": wrong})
        if engine.target == "rtx"
        else engine
        for engine in manifest.engines
    ]
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    worse = Manifest(**{**fields, "engines": tuple(engines), "warnings": (*wrong, "another")})
    (bundle / "manifest.json").write_bytes(to_json(worse))
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    assert verify(bundle).warnings == ("another",)


@pytest.mark.parametrize("command", ["export", "calibrate", "quantize"])
def test_a_stage_that_changes_nothing_keeps_the_engines(command: str, rtx: Any, bundle: Path) -> None:
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    before = verify(bundle)
    answer = json.loads(rtx.run(COMMAND, command, str(bundle), "--json"))
    assert set(answer["warnings"]) <= set(
        before.warnings
    )  # hygiene says again that the samples are few; nothing is left out
    after = assert_all_tell_the_same(rtx, bundle)
    assert after.engines == before.engines
    assert after.report == before.report


def test_a_bundle_compiled_for_rtx_alone_keeps_its_engine_and_its_verdict(rtx: Any, made: Path, tmp_path: Path) -> None:
    built = tmp_path / "built"
    rtx.run(COMMAND, "build", str(made / "recipe.toml"), "--target", "rtx", "--backend", "auto", "--out", str(built))
    before = verify(built)
    answer = json.loads(rtx.run(COMMAND, "quantize", str(built), "--json"))
    assert not [text for text in answer["warnings"] if "left out" in text]
    after = verify(built)
    assert (after.engines, after.report) == (before.engines, before.report)


def test_another_model_has_other_engines(rtx: Any, bundle: Path) -> None:
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    answer = json.loads(rtx.run(COMMAND, "quantize", str(bundle), "--keep-float", "fc", "--json"))
    assert any(
        "engines/rtx.engine no longer fit" in text and f"edgeres compile {bundle} --target rtx" in text
        for text in answer["warnings"]
    )
    assert "rtx" not in [engine.target for engine in verify(bundle).engines]
    assert not (bundle / "engines").exists()


def test_a_build_keeps_the_engines_for_other_targets(rtx: Any, bundle: Path) -> None:
    rtx.run(COMMAND, "build", str(bundle), "--weight-range", "full")  # else a CPU's weights are its own
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    before = verify(bundle)
    rtx.run(COMMAND, "build", str(bundle))
    after = assert_all_tell_the_same(rtx, bundle)
    assert after.engines == before.engines
    # the target that is built is built anew, and the other one stays
    rtx.run(COMMAND, "build", str(bundle), "--backend", "tensorrt-rtx", "--batch", "2")
    again = assert_all_tell_the_same(rtx, bundle)
    assert [engine.target for engine in again.engines] == ["rtx", "cpu"]
    assert again.engines[0].options["batch"] == "2,2,2"
    assert again.engines[0].file != before.engines[1].file


def test_an_engine_that_was_damaged_is_not_taken_over(rtx: Any, bundle: Path) -> None:
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx")
    with (bundle / "engines/rtx.engine").open("r+b") as stream:
        stream.write(b"another")
    answer = json.loads(rtx.run(COMMAND, "build", str(bundle), "--json"))
    assert any("edgeres compile" in text and "--target rtx" in text for text in answer["warnings"])
    assert [engine.target for engine in verify(bundle).engines] == ["cpu"]
