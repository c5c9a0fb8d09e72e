"""`scripts/device_smoke.sh`: one command for the owner of a board, and a report whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/device_smoke.sh"
FAKE = """#!{python}
import sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
print("told by", sys.argv[1])
sys.exit(3 if sys.argv[1] == {failing!r} else 0)
"""


class Board:
    """A folder with a bundle, and an ``edgeres`` that only says what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bundle").mkdir()

    def run(self, *arguments: str, failing: str = "") -> Tuple[int, str, List[str]]:
        """Return the exit code, what was printed, and the commands of edgeres that were run."""
        log = self.folder / "log"
        log.write_text("", encoding="utf-8")
        fake = self.folder / "bin/edgeres"
        fake.write_text(FAKE.format(python=sys.executable, log=str(log), failing=failing), encoding="utf-8")
        fake.chmod(0o755)
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=str(self.folder),
            env={**os.environ, "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_it_does_all_of_it_in_order(board: Board) -> None:
    code, said, commands = board.run("bundle", "images", "out.txt")
    assert code == 0
    assert commands == [
        "doctor",
        "verify bundle",
        "compile bundle --backend tensorrt",
        "inspect bundle --json",
        "validate bundle --backend tensorrt --validation images",
    ]
    report = (board.folder / "out.txt").read_text(encoding="utf-8")
    assert report == said
    assert all(f"told by {command.split()[0]}" in report for command in commands)
    assert report.endswith("== all good\n")


def test_samples_and_report_may_be_left_out(board: Board) -> None:
    code, _, commands = board.run("bundle")
    assert code == 0
    assert commands[-1] == "validate bundle --backend tensorrt"
    assert (board.folder / "device_smoke.txt").is_file()


@pytest.mark.parametrize("failing", ["doctor", "verify", "compile", "inspect", "validate"])
def test_what_fails_is_in_the_report_and_the_rest_is_done_all_the_same(board: Board, failing: str) -> None:
    code, said, commands = board.run("bundle", failing=failing)
    assert code == 1
    assert len(commands) == 5
    assert said.count("== exit code 3\n") == 1
    assert said.count("== exit code 0\n") == 4
    assert said.endswith("== something failed: see above\n")


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_done(board: Board) -> None:
    code, said, commands = board.run("bundle", "images", "absent/report.txt", failing="verify")
    assert (code, commands) == (2, [])
    assert "name another file" in said


@pytest.mark.parametrize("arguments", [(), ("absent",)])
def test_without_a_bundle_it_says_how_it_is_used(board: Board, arguments: Tuple[str, ...]) -> None:
    code, said, commands = board.run(*arguments)
    assert code == 2
    assert "name the folder of a bundle" in said
    assert commands == []
    assert not (board.folder / "device_smoke.txt").exists()
