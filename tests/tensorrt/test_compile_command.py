"""`edgeres compile` from a bundle to an engine, with the real builder: what users type, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgeres
from edgeres.bundle import verify
from edgeres.recipe import dossier

COMMAND = "import sys; from edgeres.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default on few images, with the CPU's engine."""
    folder = tmp_path_factory.mktemp("compile")
    shutil.copytree(dossier() / "digits/calibration", folder / "images")
    edgeres.build(
        model="resnet8_cifar",
        weights=dossier() / "digits/weights.safetensors",
        calibration=folder / "images",
        calibration_count=20,
        backend="cpu",
        out=folder / "bundle",
    )
    return folder / "bundle"


def test_an_engine_for_rtx_joins_the_bundle(rtx: Any, bundle: Path) -> None:
    answer = json.loads(rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx", "--strict", "--json"))
    assert (answer["backend"], answer["target"], answer["warnings"]) == ("tensorrt-rtx", "rtx", [])
    manifest = verify(bundle)
    # no GPU here can run it, so the engine that can be run stays in front
    assert [engine.target for engine in manifest.engines] == ["cpu", "rtx"]
    assert (bundle / "engines/rtx.engine").stat().st_size == manifest.engines[1].file.bytes
    modules = {layer["module"] for layer in answer["layers"] if layer["precision"] == "int8"}
    assert any("layer3.0.conv2" in module for module in modules)
    assert any("fc" in module for module in modules)
    layers = json.loads(rtx.run(COMMAND, "inspect", str(bundle), "--json"))["layers"]
    assert {"name", "type", "precision", "module"} <= set(layers[0])
    # compiling again replaces the engine of that target and no other
    rtx.run(COMMAND, "compile", str(bundle), "--target", "rtx", "--batch", "4")
    again = verify(bundle)
    assert [engine.target for engine in again.engines] == ["cpu", "rtx"]
    assert again.engines[1].options["batch"] == "4,4,4"
