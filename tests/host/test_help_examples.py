"""The examples of every command's help, typed as they stand: they work, where the help says that the bundle lies."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

import edgeres
from command_line import called
from edgeres.guide import LESSONS
from edgeres.recipe import dossier

NOT_TYPED = {
    "minutes, or done by other tests": (
        "edgeres build --precision int8",
        "edgeres build calibration/recipe.toml --max-drop 1",
        "edgeres export",
        "edgeres calibrate",
        "edgeres quantize",
        "edgeres validate build/digits-int8 --junit gate.xml --max-latency-ms 20",
    ),
    "a checkpoint of torchvision's": (
        "edgeres build --model resnet50 --weights w.pth --calibration images/ --validation labelled/",
        "edgeres export --model resnet18 --weights resnet18.pth --out build/net",
    ),
    "a board, a browser or a shell": (
        "edgeres compile BUNDLE --target gpu",
        "edgeres report build/digits-int8 --open",
        *(line for name in ("completion", "manual") for _, line in LESSONS[name].examples),
    ),
}
# Some make what others take.
ORDER = (
    *("init", "keygen", "sign", "pack", "unpack", "verify", "inspect", "diff", "models", "doctor"),
    *("calibrate", "quantize", "compile", "validate", "bench", "report", "build", "export", "completion", "manual"),
)
CODES = {"validate": (0, 1, 3)}  # so few images decide nothing


def test_all_examples_are_in_the_order_or_left_out() -> None:
    assert set(ORDER) == set(LESSONS)
    lines = {line for lesson in LESSONS.values() for _, line in lesson.examples}
    assert {line for left in NOT_TYPED.values() for line in left} <= lines


def test_examples_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGERES_PASSPHRASE", "secret")
    for digit in range(10):
        (tmp_path / "labelled" / str(digit)).mkdir(parents=True)
        for image in sorted((dossier() / "digits/validation" / str(digit)).glob("*.png"))[:2]:
            shutil.copy(image, tmp_path / "labelled" / str(digit))
    for precision in ("fp16", "int8"):
        edgeres.build(
            precision=precision, calibration="labelled", validation="labelled", recovery="none", backend="cpu"
        )
    left = {line for lines in NOT_TYPED.values() for line in lines}
    typed = 0
    for name in ORDER:
        for _, line in LESSONS[name].examples:
            if line in left:
                continue
            if name == "sign" and "next.key" in line:
                assert called("keygen", "next.key")[0] == 0
            if name == "bench":
                line += " --seconds 0.05 --warmup 0"  # a moment is enough to see that it runs
            code, out, err = called(*shlex.split(line.replace("BUNDLE", "build/digits-int8"))[1:])
            assert code in CODES.get(name, (0,)), f"{line}: {err}"
            assert out, line
            typed += 1
    assert typed > 30
