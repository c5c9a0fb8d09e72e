"""What the command line prints: on a terminal of any width, with and without colour, and into a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Dict, List

import pytest

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
