"""The training script takes any net that `edgeres build` takes, and writes what a build reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgeres import models
from edgeres.recipe import dossier

pytest.importorskip("sklearn", reason="scikit-learn, of the extra dev, has the digits")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/train_digits.py"
NETS = Path(__file__).parent / "data/trained"


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_a_net_of_ones_own_is_trained_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new/net.safetensors"
    done = train("--model", "family:resnext", "--epochs", "2", "--wanted", "0", "--out", str(out), cwd=NETS)
    assert done.returncode == 0, done.stderr
    assert "held-out top-1" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["net.safetensors"]
    monkeypatch.chdir(NETS)
    fresh = models.from_callable("family:resnext", seed=0)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    models.load_weights(fresh, out)
    changed = [name for name, value in load_file(out).items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(before)


def test_a_member_by_name_is_trained_into_a_folder(tmp_path: Path) -> None:
    done = train("--model", "plain8_cifar", "--epochs", "1", "--wanted", "0", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    models.load_weights(models.create("plain8_cifar"), tmp_path / "made/weights.safetensors")
    for split in ("calibration", "validation"):
        ours, theirs = tmp_path / "made" / split, dossier() / "digits" / split
        names = sorted(path.relative_to(theirs) for path in theirs.rglob("*.png"))
        assert sorted(path.relative_to(ours) for path in ours.rglob("*.png")) == names
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    text = (tmp_path / "made/README.md").read_text(encoding="utf-8")
    assert "--model plain8_cifar --epochs 1" in text
    assert "embedded default" not in text


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--model", "resnet9_cifar", "--out", "x"), 2, "there is no model named 'resnet9_cifar'"),
        (("--model", "plain8_cifar"), 2, "say where to with --out"),
        (("--epochs", "1", "--wanted", "1.1", "--out", "x"), 1, "nothing was written"),
    ],
    ids=["no such net", "no folder", "too poor"],
)
def test_what_cannot_be_done_is_said(flags: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    done = train(*flags, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "x").exists()
