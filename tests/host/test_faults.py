"""scripts/faults.py, in short: a few real builds that are killed, and one on a disk that fills up."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgeres import pipeline
from edgeres.errors import EdgeresError
from edgeres.recipe import dossier, load_recipe
from edgeres.workspace import Workspace

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/faults.py"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module("faults")


def test_killed_builds_and_full_disks_lose_nothing() -> None:
    """Each has an earlier bundle that answers as before, and a next build that comes out byte for byte."""
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--full-disk", "1", "--others", "0", "--seed", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert (rows[0][2], rows[1][1]) == ("3", "1")
    assert all((row[3:6], row[7:]) == (["0", "0", row[1]], ["0", "0", "0"]) for row in rows)


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
    table.add("a fault", (-9,), -9, "", GOOD)
    assert not table.bad
    table.add("a fault", (-9,), -9, told, {**GOOD, **change})
    assert table.bad
    assert "| a fault | 2 | 2 |" in table.text()


def test_a_fault_that_never_strikes_and_a_failure_by_itself_are_bad(faults: ModuleType) -> None:
    table = faults.Table()
    table.add("a fault", (-9,), 0, "", GOOD)
    assert table.bad
    table.add("a fault", (-9,), -9, "", GOOD)
    assert not table.bad
    table.add("a fault", (-9,), 1, "", GOOD)
    assert table.bad
    assert "| a fault | 3 | 1 | 1 |" in table.text()


def test_a_traceback_behind_which_memory_is_named_is_told_as_one(faults: ModuleType) -> None:
    table = faults.Table()
    table.add("a fault", (1,), 1, "Traceback (most recent call last):\nerror: not enough memory (no lock)", GOOD)
    assert not table.bad


def test_builds_that_fail_by_themselves_end_the_kills(faults: ModuleType, tmp_path: Path) -> None:
    table = faults.Table()
    arena = SimpleNamespace(folder=tmp_path, seconds=1.0, build=lambda *given: ("build",))
    torment = faults.Torment(arena, table, 0)
    for faulty in (torment.steps, torment.kills):
        for runs, (kind, run) in enumerate(faulty(2)):
            assert runs < 100
            table.add(kind, run.ends, 1, "", GOOD)
    assert table.bad


def test_a_bundle_without_any_model_is_lost(
    faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sys.modules["arena"]
    monkeypatch.setattr(room, "verify", lambda out: SimpleNamespace(engines=()))
    wanted = {"files": dict.fromkeys(room.SAME, "a hash"), "logits": [0.0]}
    arena = SimpleNamespace(wanted={"old": wanted, "new": wanted})
    assert faults.Arena.earlier(arena, tmp_path, True)["lost"] == "it is neither the old nor the new bundle"


def test_a_stage_whose_record_is_lost_counts_as_run_again(
    faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a build has finished is noted outside of its work folder."""
    finished = SimpleNamespace(files=("model.onnx",))
    monkeypatch.setattr("edgeres.workspace.Workspace.finish", lambda *given: finished)
    sys.modules["injuries"].noting(tmp_path / "done")
    Workspace(tmp_path / "net").finish("export", "key", (), 0.0, {})
    finished.files = ()
    Workspace(tmp_path / "net").finish("hygiene", "key", (), 0.0, {})
    assert (tmp_path / "done").read_text() == "export\n"


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


def test_a_read_of_the_weights_that_fails_is_a_sentence_and_any_other_failure_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    recipe = load_recipe(None, {"precision": "fp32"})
    importlib.import_module("edgeres.samples.images")  # first entered below, it would keep what stands there for good
    with monkeypatch.context() as patched:
        patched.setattr("edgeres.files.sha256_file", fail)
        with pytest.raises(EdgeresError, match=r"weights\.safetensors: Input/output error.*goes on where it stopped"):
            pipeline.build(recipe, tmp_path / "bundle")
    monkeypatch.setattr("edgeres.preflight.open_inputs", fail)
    with pytest.raises(OSError, match="Input/output error"):
        pipeline.build(recipe, tmp_path / "bundle")
