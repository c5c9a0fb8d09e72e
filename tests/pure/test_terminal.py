"""What the command line prints: on a terminal of any width, with and without colour, and into a file."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Dict, List

import pytest

from edgeres.artifacts import ClassChange, Discordant, Report, to_json
from edgeres.streams import guard, order

SHOW = """
from edgeres.artifacts import ClassChange, Confidence, Discordant, Report
from edgeres.terminal import show_report, show_rows
report = Report(
    1000, 0.985, 27.1, 0.5, "fail", "cpu", "int8", top1_reference=0.9173, top1_engine=0.9021, drop_pp=1.52,
    drop_ci95_pp=(0.7, 2.4), discordant=Discordant(18, 3), confidence=Confidence(-0.5, -20.0, 0.05, 0.06),
    classes=(ClassChange(3, "a name \\x1b[31m", 100, 12, 0, 12.0, 0.001, True),),
)
show_report(report, ["layer1.0.conv2", "fc"], "--recovery none")
show_rows(["tensor", "range"], [["layer1.0.relu2_output_of_a_long_name", "0 to 4.25"]], "ranges")
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-79]|4[0-79]|9[0-7]|10[0-7]|38;[0-9;]+|48;[0-9;]+)[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(changes: Dict[str, str]) -> Dict[str, str]:
    deciding = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in deciding}
    return {**kept, "TERM": "xterm-256color", "PYTHONUTF8": "1", **changes}


def on_a_terminal(columns: int, **changes: str) -> str:
    """Return what is written to a terminal that is so wide."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", SHOW], stdin=follower, stdout=follower, stderr=follower, env=environment(changes)
    ) as process:
        os.close(follower)
        found = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux's way to say that nobody writes any more
                part = b""
            if not part:
                break
            found += part
    os.close(leader)
    assert process.returncode == 0, found.decode()
    return found.decode("utf-8").replace("\r\n", "\n")


def into_a_file(**changes: str) -> str:
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, env=environment(changes), check=True)
    assert done.stderr == b""
    return done.stdout.decode("utf-8")


def table_lines(text: str) -> List[str]:
    """Return the lines of tables, which start with a piece of a frame."""
    return [line for line in ESCAPE.sub("", text).splitlines() if line[:1] in set("┏┃┡│└├╭╰+|")]


def test_a_terminal_shows_colours_and_a_file_holds_none() -> None:
    shown = on_a_terminal(100)
    assert COLOUR.search(shown)
    plain = into_a_file()
    assert "\x1b" not in plain
    assert "FAIL: INT8 loses 1.52 pp" in plain
    assert "a name \\x1b[31m fell" in plain  # a name gives no orders to the terminal


@pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_refused(changes: Dict[str, str]) -> None:
    shown = on_a_terminal(100, **changes)
    assert not COLOUR.search(shown)
    assert "FAIL: INT8 loses 1.52 pp" in ESCAPE.sub("", shown)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_tables_fit_a_narrow_terminal_and_lose_no_number(columns: int) -> None:
    lines = table_lines(on_a_terminal(columns))
    assert len(lines) > 12
    assert max(map(len, lines)) <= columns
    joined = "".join("".join(lines).split())
    for number in ("91.73%", "90.21%", "+1.52", "98.50%", "27.1dB"):
        assert number in joined
    assert "…" not in joined  # nothing is cut off


def test_columns_decides_where_nobody_has_a_window() -> None:
    assert max(map(len, table_lines(into_a_file(COLUMNS="50")))) <= 50
    assert max(map(len, table_lines(on_a_terminal(120, COLUMNS="40")))) <= 40
    wide = table_lines(into_a_file())
    assert any("layer1.0.relu2_output_of_a_long_name" in line for line in wide)


def test_the_last_lines_say_what_to_do_next() -> None:
    advice = into_a_file().split("FAIL: ")[1]
    assert "--keep-float layer1.0.conv2 --keep-float fc" in advice
    assert "With --recovery none nothing more was tried" in advice


def test_an_ascii_terminal_gets_frames_that_it_can_show() -> None:
    shown = on_a_terminal(80, PYTHONUTF8="0", PYTHONIOENCODING="ascii:backslashreplace", LC_ALL="C")
    assert "\\u2502" not in shown
    assert "91.73 %" in shown


INSPECTED = """
import sys
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, from_json
from edgeres.terminal import show_manifest
built_for = {"onnxruntime": "1.20.0", "machine": "x86_64", "cuda": ""}
engine = Engine("cpu", "cpu", "int8", FileRef("a", "0", 1), built_for, {})
for git in ({"commit": "c0ffee", "clean": True}, {"commit": "c0ffee", "clean": False}, None, {}, "text"):
    show_manifest("net", Manifest("n", "int8", {}, Preprocessing((4, 4)), (), {}, {"git": git}, (engine,)))
"""


def test_what_is_in_a_bundle_is_told_in_words() -> None:
    """No value as Python writes it down."""
    done = subprocess.run([sys.executable, "-c", INSPECTED], capture_output=True, env=environment({}), text=True)
    assert done.returncode == 0, done.stderr
    told = [line.strip() for line in done.stdout.splitlines()]
    engines = "engines: cpu (int8, takes float32, onnxruntime 1.20.0, machine x86_64)"
    assert [line for line in told if line.startswith("engines")] == [engines] * 5
    commits = [line for line in told if line.startswith("git")]
    assert commits == ["git: c0ffee", "git: c0ffee, with changes", "git: none", "git: none", "git: none"]
    assert not set("{}'") & set(done.stdout)
    assert "None" not in done.stdout
    assert told[1].startswith("input: 4×4 pixels, of frames that are not resized; rgb, ")


ORDERS = ("\n::stop-commands::x1", "\n  ::error::a", "\r::error::b", " ##[error]c", "\x1b[33m::error::d")
HOSTILE = """
import sys
from edgeres.artifacts import (
    BaselineChange, Bundle, Climb, ClassChange, Discordant, Engine, FileRef, LayerSummary, Manifest, Preprocessing,
    Report, Rung,
)
from edgeres.streams import guard
from edgeres.terminal import (
    TerminalProgress, show_build, show_engine, show_ladder, show_layers, show_manifest, show_report, show_rows,
)
guard()
bad = sys.argv[1]
layers = (LayerSummary(bad, bad, {bad: 3}, (bad,)),)
report = Report(
    1000, 0.985, 27.1, 0.5, "fail", bad, bad, top1_reference=0.9, top1_engine=0.8, drop_pp=10.0, layers=layers,
    drop_ci95_pp=(9.0, 11.0), discordant=Discordant(110, 10), samples_source=bad,
    classes=(ClassChange(3, bad, 100, 12, 0, 12.0, 0.001, True),),
)
engine = Engine(bad, bad, bad, FileRef("a", "0", 1), {bad: bad}, {})
manifest = Manifest(
    bad, bad, {}, Preprocessing((32, 32)), (), {}, {"tools": {bad: bad}, "git": bad}, (engine,), report, (bad,)
)
show_report(report, [bad], bad)
show_manifest(bad, manifest)
show_build(Bundle("/nowhere" + bad, manifest), [(bad, bad, bad)])
show_ladder(Climb((Rung(bad, 1, (bad,), 1.0, 0.9, 20.0, bad, 1.0),), 0))
show_engine(bad, engine, bad)
show_layers(layers)
show_rows([bad], [[bad]], "a long title " * 10 + bad)
progress = TerminalProgress()
progress.stage(bad, bad)
progress.warn(bad)
"""


def obeyed(text: str) -> List[str]:
    """Return the lines in which GitHub's runner finds a command, as its ActionCommand.cs looks for them."""
    lines = re.split(r"\r\n|\r|\n", text)
    return [line for line in lines if ESCAPE.sub("", line).lstrip().startswith("::") or "##[" in line]


@pytest.mark.parametrize("bad", [f"conv{one}" for one in ORDERS] + [one.strip() for one in ORDERS])
@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1", "COLUMNS": "50"}])
def test_no_name_gives_orders_to_the_runner_of_github(bad: str, colour: Dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, bad], capture_output=True, env=environment({"GITHUB_ACTIONS": "true", **colour})
    )
    assert done.returncode == 0, done.stderr.decode()
    for text in (done.stdout.decode(), done.stderr.decode()):
        assert text
        assert obeyed(text) == []


@pytest.mark.parametrize("bad", ORDERS)
def test_an_error_gives_no_orders_either(bad: str) -> None:
    command = [sys.executable, "-m", "edgeres", "verify", f"nowhere{bad}"]
    done = subprocess.run(command, capture_output=True, env=environment({"GITHUB_ACTIONS": "true"}), text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no bundle at nowhere")
    assert obeyed(done.stderr) == []
    elsewhere = subprocess.run(command, capture_output=True, env=environment({"GITHUB_ACTIONS": ""}), text=True)
    assert "\x1b" not in elsewhere.stderr
    assert obeyed(elsewhere.stderr) or "\\" in elsewhere.stderr  # the checker sees what there is to see


def test_our_own_commands_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    streams = (io.TextIOWrapper(content, "ascii"), io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    guard()
    sys.stdout.write("::error::theirs\n")
    order(sys.stdout, "::error title=a::ours")
    sys.stdout.flush()
    assert content.getvalue() == b"\\::error::theirs\n::error title=a::ours\n"


def test_json_stays_the_same_json(tmp_path: Path) -> None:
    for variables in ({"GITHUB_ACTIONS": "true"}, {"GITHUB_ACTIONS": ""}):
        place = tmp_path / f"{len(variables['GITHUB_ACTIONS'])}##[error]b"
        command = [sys.executable, "-m", "edgeres", "init", str(place), "--json"]
        done = subprocess.run(command, capture_output=True, env=environment(variables), text=True, check=True)
        assert all(Path(path).is_file() and "##[error]b" in path for path in json.loads(done.stdout))
        assert bool(obeyed(done.stdout)) == (not variables["GITHUB_ACTIONS"])


def test_of_many_classes_that_fell_ten_are_shown_and_the_verdict_stays_in_view() -> None:
    classes = tuple(ClassChange(i, f"kind {i}", 100, 12, 0, 12.0, 0.001, True) for i in range(59))
    report = Report(
        5900, 0.9, 27.1, 0.5, "fail", "cpu", "int8", top1_reference=0.9, top1_engine=0.78, drop_pp=12.0,
        drop_ci95_pp=(11.0, 13.0), discordant=Discordant(708, 0), classes=classes,
    )  # fmt: skip
    show = "import sys; from edgeres.artifacts import *; from edgeres.terminal import show_report\n"
    show += "show_report(from_json(sys.stdin.buffer.read(), Report, 'it'))"
    done = subprocess.run(
        [sys.executable, "-c", show], input=to_json(report), capture_output=True, env=environment({}), check=True
    )
    lines = done.stdout.decode().splitlines()
    assert sum("fell: FP32 alone" in line for line in lines) == 10
    assert any("49 more" in line for line in lines)
    verdict = next(number for number, line in enumerate(lines) if line.startswith("FAIL: "))
    assert len(lines) - verdict < 8  # behind it stands only what to do next
    assert not any("fell" in line for line in lines[verdict:])
