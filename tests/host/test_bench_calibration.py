"""The bench of calibration runs, and its table says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeres.recipe import dossier

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_table_has_a_row_for_each_tool_and_count() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/bench_calibration.py"), "--model", "resnet8_cifar"]
    command += ["--size", "32", "--resize", "32", "--images", str(dossier() / "digits/calibration"), "--rounds", "1"]
    command += ["--method", "minmax", "--counts", "3", "70", "--peers", "minmax", "--peer-counts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = [dict(zip(head, row, strict=False)) for row in rows]
    assert [(row["calibration"], row["images"]) for row in found] == [
        ("edgeres, minmax", "3"),
        ("edgeres, minmax", "70"),
        ("ONNX Runtime, minmax", "2"),
    ]
    for row in found:
        assert float(row["ratio"]) > 0
        assert 50 < float(row["peak MB"]) < 4000
