"""The degradation experiment measures what it says, and a short run of it shows what residuals are for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn, of the extra dev, has the digits")
pytest.importorskip("matplotlib", reason="matplotlib, of the extra dev, draws")

Capture = pytest.CaptureFixture[str]
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("degradation")


def test_a_short_run_prints_and_draws(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "degradation.py"),
        "--epochs",
        "2",
        "--depths",
        "8",
        "14",
        "--out",
        "drawn",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the bar is for terminals
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [tuple(row[:3]) for row in rows] == [*product(("batch", "none"), ("plain", "residual"), ("8", "14"))]
    found = {tuple(row[:3]): dict(zip(head, row, strict=True)) for row in rows}
    assert all(0 < float(row["training error %"]) < 100 for row in found.values())
    before = {net: float(row["gradient, first ÷ last layer: before"]) for net, row in found.items()}
    # Without batch norm Glorot's weights halve a plain net's gradients, squared, at each ReLU; the identity does not.
    assert before["none", "plain", "14"] < before["none", "plain", "8"] / 2**3
    assert 0.1 < before["none", "residual", "14"] < 10
    # With batch norm they do not vanish (He et al. 2015, section 4.1).
    assert before["batch", "plain", "14"] > 1
    with Image.open(tmp_path / "drawn/degradation.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
    assert ElementTree.parse(tmp_path / "drawn/degradation.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--depths", "8", "10"), "10: a net has 6n + 2 layers"),
        (("--epochs", "0"), "at least one"),
        (("--norm", "layer"), "invalid choice"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_run_is_said(
    flags: tuple[str, ...], said: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "argv", ["degradation.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        script.asked()
    assert said in capsys.readouterr().err


def test_gradients_are_those_of_the_outputs(script: ModuleType) -> None:
    """Through a 1×1 convolution of weight 3 each gradient is three times the one behind it."""
    first, second = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(first.weight, 2.0)
    nn.init.constant_(second.weight, 3.0)
    block = script.create("residual", "none", 8, 0).layer1[0]  # whose change is measured, too
    for part in (block.conv1, block.conv2):
        nn.init.zeros_(part.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.block = first, second, block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.second(self.first(x))
            return self.block(y.expand(-1, 8, -1, -1)).flatten(1)

    images, labels = torch.rand(5, 1, 1, 1), torch.arange(5)
    found = script.probe(Net(), images, labels)
    assert found.gradients[0] == pytest.approx(3 * found.gradients[1], rel=1e-5)
    # All eight logits are 6x: the gradient along their common part, softmax's minus the label's one, adds up to zero.
    assert found.gradients[1] == pytest.approx(0, abs=1e-5)
    assert found.change == 0  # without weights a residual block is the identity
    assert not any(part._forward_hooks for part in (first, second, block))


def test_a_probe_leaves_no_trace(script: ModuleType) -> None:
    net = script.create("plain", "batch", 8, 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    script.probe(net, torch.rand(4, 3, 8, 8), torch.arange(4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_kinds_differ_in_their_shortcuts_alone(script: ModuleType) -> None:
    for norm in ("batch", "none"):
        plain, residual = (script.create(kind, norm, 14, 3).state_dict() for kind in ("plain", "residual"))
        assert list(plain) == list(residual)
        assert all(torch.equal(plain[name], residual[name]) for name in plain)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in script.create("residual", "none", 8, 0).modules())


def test_training_repeats_and_counts_the_errors(script: ModuleType) -> None:
    images, labels = script.digits()
    assert images.shape == (797, 3, 8, 8)
    what, told = ("residual", "batch", 8, 1), []
    runs = [script.train(what, images[:128], labels[:128], 2, lambda: told.append(1)) for _ in range(2)]
    assert len(told) == 4
    assert runs[0].errors == runs[1].errors
    assert runs[0].after == runs[1].after
    assert runs[0].errors != script.train((*what[:3], 2), images[:128], labels[:128], 2, lambda: None).errors
    # In the first epoch's first batch nothing was learned yet: nine in ten are wrong, the bound is generous.
    assert 40 < runs[0].errors[0] <= 100
    assert all(error * 128 / 100 == pytest.approx(round(error * 128 / 100)) for error in runs[0].errors)
