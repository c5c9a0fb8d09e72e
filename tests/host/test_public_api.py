"""What users import, type and read, by its names alone: the promise that a minor version keeps (docs/versions.md).

A release is tried with these, from its wheel, so nothing but ``edgeres`` itself and its command is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeres

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
VALIDATION = {
    "samples", "top1_reference", "top1_engine", "drop_pp", "drop_ci95_pp", "discordant", "agreement", "sqnr_db",
    "max_drop_pp", "verdict", "backend", "precision",
}  # fmt: skip
FILES = {
    "manifest.json", "recipe.toml", "model.fp32.onnx", "model.int8.onnx", "calibration.json", "reference.npz",
    "report.json", "report.html",
}  # fmt: skip
COMMANDS = {
    "build", "export", "calibrate", "quantize", "compile", "validate", "bench", "inspect", "report", "verify", "doctor",
    "models", "init", "diff", "keygen", "sign",
}  # fmt: skip
LEAVES = {
    "BackendError", "BundleError", "CalibrationError", "ExportError", "LintError", "MissingPackageError",
    "QuantizationError", "RecipeError", "SampleError",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The embedded default, built by its Python name."""
    return edgeres.build(precision="int8", recovery="fast", out=tmp_path_factory.mktemp("public") / "digits-int8")


def command(*arguments: object) -> tuple[int, str]:
    """Return the command's exit code and what it printed, in a process of its own."""
    line = [sys.executable, "-m", "edgeres", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_a_build_is_a_folder_of_ordinary_files(bundle: Any) -> None:
    assert {path.name for path in Path(bundle.path).iterdir()} >= FILES
    assert bundle.report.verdict in ("pass", "inconclusive")
    again = edgeres.build(Path(bundle.path) / "recipe.toml", recovery="fast", out=bundle.path)
    assert again.report.top1_engine == bundle.report.top1_engine


def test_an_engine_takes_frames_or_input_and_streams(bundle: Any) -> None:
    with edgeres.load(bundle.path) as engine:
        logits = engine(FRAMES)
        assert logits.shape == (4, 10)
        assert logits.dtype == np.float32
        assert (np.stack(list(engine.stream(iter(FRAMES), depth=2))) == logits).all()
        out = np.empty_like(logits)
        engine(FRAMES, out=out)
        assert (out == logits).all()
        assert engine(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)
        engine.warmup()
        assert engine.profile(FRAMES[:1], runs=5).total.p50 > 0


def test_a_verdict_says_what_the_contract_says(bundle: Any) -> None:
    report = edgeres.validate(bundle.path, max_drop=5.0)
    assert report.verdict == "pass"
    code, printed = command("validate", bundle.path, "--max-drop", 5, "--json")
    assert code == 0
    assert json.loads(printed).keys() >= VALIDATION
    assert edgeres.validate(bundle.path, FRAMES, np.zeros(4, np.int64)).samples == 4


def test_commands_answer_in_json_and_exit_codes(bundle: Any, tmp_path: Path) -> None:
    code, printed = command("inspect", bundle.path, "--json")
    assert code == 0
    assert {"name", "type", "precision", "module"} <= json.loads(printed)["layers"][0].keys()
    assert command("verify", bundle.path)[0] == 0
    assert command("validate", bundle.path, "--nonsense")[0] == 2
    assert command("verify", tmp_path)[0] == 1
    code, printed = command("--help")
    assert code == 0
    assert {line.split()[0] for line in printed.splitlines() if line.startswith("  ")} >= COMMANDS


def test_models_have_the_names_of_their_checkpoints() -> None:
    net = edgeres.models.create("resnet20_cifar", num_classes=10)
    assert {"conv1.weight", "layer1.0.conv1.weight"} <= net.state_dict().keys()
    assert "layer4.2.conv3.weight" in edgeres.models.create("resnet50").state_dict()


def test_whatever_goes_wrong_is_an_edgeres_error(tmp_path: Path) -> None:
    from edgeres import errors

    assert all(issubclass(getattr(errors, name), edgeres.EdgeresError) for name in LEAVES)
    with pytest.raises(edgeres.EdgeresError, match="nowhere"):
        edgeres.build(model="resnet20_cifar", calibration=tmp_path / "nowhere")
    with pytest.raises(edgeres.EdgeresError):
        edgeres.load(tmp_path)
    with pytest.raises(TypeError, match="no option"):
        edgeres.build(nonsense=1)


def test_the_gate_is_a_pytest_plugin(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "test_gate.py").write_text(
        "import pytest\n\n"
        f"@pytest.mark.edgeres(bundle={str(bundle.path)!r}, max_drop=5.0)\n"
        "def test_gate(edgeres_gate):\n    edgeres_gate.check()\n"
    )
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
