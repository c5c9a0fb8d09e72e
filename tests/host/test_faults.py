"""scripts/faults.py, in short: a few real builds that are killed, and one on a disk that fills up."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgeres import pipeline
from edgeres.errors import EdgeresError
from edgeres.recipe import dossier, load_recipe

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/faults.py"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    return module


def test_killed_builds_and_full_disks_lose_nothing() -> None:
    """Each has an earlier bundle that answers as before, and a next build that comes out byte for byte."""
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--full-disk", "1", "--others", "0", "--seed", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert (rows[0][2], rows[1][1]) == ("3", "1")
    assert all((row[3], row[4], row[6:]) == ("0", row[1], ["0", "0", "0"]) for row in rows)


GOOD = {"lost": "", "next": True, "left": [], "again": [], "resumed": 3}


@pytest.mark.parametrize(
    ("told", "change"),
    [
        ("", {"lost": "model.onnx is missing"}),
        ("", {"next": False}),
        ("", {"left": [".net.work"]}),
        ("", {"again": ["export"]}),
        ("Traceback (most recent call last):", {}),
    ],
)
def test_whatever_is_wrong_makes_the_whole_run_bad(faults: ModuleType, told: str, change: dict[str, object]) -> None:
    table = faults.Table()
    table.add("a fault", -9, "", GOOD)
    assert not table.bad
    table.add("a fault", -9, told, {**GOOD, **change})
    assert table.bad
    assert "| a fault | 2 | 2 |" in table.text()


def test_a_file_that_vanishes_between_two_looks_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((dossier() / "digits/weights.safetensors").read_bytes())

    def vanish(*arguments: object, **options: object) -> tuple[None, None]:
        weights.unlink()
        return None, None

    monkeypatch.setattr("edgeres.preflight.open_inputs", vanish)
    recipe = load_recipe(None, {"model.source": "resnet8_cifar", "model.weights": str(weights), "precision": "fp32"})
    with pytest.raises(EdgeresError, match=r"weights\.safetensors: No such file.*goes on where it stopped"):
        pipeline.build(recipe, tmp_path / "bundle")
    assert not (tmp_path / ".bundle.work").exists()
