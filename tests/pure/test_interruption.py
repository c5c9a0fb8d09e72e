"""Ctrl-C and SIGTERM end a command in a sentence or in silence, wherever it is, and never in a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

PREAMBLE = """
import os, signal, sys
number = int(sys.argv.pop(1))

class Striker:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Striker())
"""
ENTRY = """
from edgeres.__main__ import main
main()
"""
WORDS = {signal.SIGINT: (130, "interrupted; an earlier bundle is untouched"), signal.SIGTERM: (143, "terminated; an")}


def run(code: str, number: int, arguments: List[str], path: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, str(int(number)), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("module", ["edgeres.cli", "click", "msgspec", "edgeres.streams"])
def test_before_the_command_line_is_there_a_signal_ends_the_process(module: str, number: signal.Signals) -> None:
    done = run(PREAMBLE.format(module=module) + ENTRY, number, ["models"])
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("module", ["edgeres.catalog", "edgeres.terminal", "rich.table"])
def test_while_a_command_loads_what_it_needs_a_signal_is_a_sentence(module: str, number: signal.Signals) -> None:
    """Nothing is raised through an import: native libraries take that for damage, or crash."""
    code, words = WORDS[number]
    done = run(PREAMBLE.format(module=module) + ENTRY, number, ["models"])
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(words)
    assert len(done.stderr.splitlines()) == 1


CLEANS = """
import edgeres.catalog, os, time
def catalog():
    try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        print("cleaning", file=sys.stderr, flush=True)
        {meanwhile}
edgeres.catalog.catalog = catalog
"""


@pytest.mark.parametrize("number", WORDS)
def test_during_the_work_a_signal_closes_what_is_open(number: signal.Signals) -> None:
    code, words = WORDS[number]
    done = run(PREAMBLE.format(module="") + CLEANS.format(meanwhile="pass") + ENTRY, number, ["models"])
    assert done.returncode == code
    first, *_, last = done.stderr.splitlines()  # click goes to a new line behind the ^C of a terminal
    assert first == "cleaning"
    assert last.startswith(words)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", WORDS)
def test_a_second_signal_ends_what_does_not_end(number: signal.Signals) -> None:
    hangs = "os.kill(os.getpid(), number); time.sleep(60)"
    done = run(PREAMBLE.format(module="") + CLEANS.format(meanwhile=hangs) + ENTRY, number, ["models"])
    assert (done.returncode, done.stderr) == (-number, "cleaning\n")


def test_a_signal_that_somebody_has_switched_off_stays_so() -> None:
    """As nohup, and shells for what runs in the background."""
    code = PREAMBLE.format(module="edgeres.catalog")
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    for number in WORDS:
        done = run(code + ENTRY, number, ["models", "--json"])
        assert (done.returncode, done.stderr) == (0, "")


INSIDE = """
import signal, threading
from edgeres.cli import main
codes = []
def call():
    try:
        main(["models", "--json"])
    except SystemExit as done:
        codes.append(done.code)
"""


def test_a_program_that_calls_the_command_line_keeps_its_own_handlers() -> None:
    code = INSIDE + (
        "def own(*_): pass\n"
        "signal.signal(signal.SIGTERM, own)\n"
        "call()\n"
        "print([signal.getsignal(signal.SIGTERM) is own,"
        " signal.getsignal(signal.SIGINT) is signal.default_int_handler], codes, file=sys.stderr)"
    )
    done = run(PREAMBLE.format(module="") + code, signal.SIGINT, [])
    assert done.stderr == "[True, True] [0]\n"


def test_after_an_interrupt_too() -> None:
    code = PREAMBLE.format(module="") + CLEANS.format(meanwhile="pass") + INSIDE
    code += "call()\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler, codes, file=sys.stderr)"
    assert run(code, signal.SIGINT, []).stderr.endswith("True [130]\n")


def test_the_command_line_works_in_a_thread() -> None:
    code = INSIDE + "t = threading.Thread(target=call)\nt.start()\nt.join()\nprint(codes, file=sys.stderr)"
    done = run(PREAMBLE.format(module="") + code, signal.SIGINT, [])
    assert done.stderr == "[0]\n"


SHORT = """
import edgeres.catalog, resource
def catalog():
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (1 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    {what}
edgeres.catalog.catalog = catalog
"""


@pytest.mark.parametrize(
    "what", ["bytes(1 << 30)", "assert None", "raise RuntimeError('no lock')", "raise OSError(12, 'no')"]
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc here to tell memory by")
def test_whatever_fails_where_memory_has_ended_is_told_as_that(what: str) -> None:
    done = run(PREAMBLE.format(module="") + SHORT.format(what=what) + ENTRY, 0, ["models"])
    assert done.returncode == 1, done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: not enough memory")
    # Other errors than MemoryError are taken for it, and may be bugs all the same: where, is to be seen.
    assert before[:1] == ([] if what.startswith("bytes") else ["Traceback (most recent call last):"])


def test_where_no_thread_can_be_started_that_is_said() -> None:
    code = PREAMBLE.format(module="") + "import edgeres.catalog\ndef catalog():\n    "
    code += 'raise RuntimeError("can\'t start new thread")\nedgeres.catalog.catalog = catalog\n'
    done = run(code + ENTRY, 0, ["models"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no thread can be started. Close")


def test_where_there_is_memory_a_bug_is_a_bug() -> None:
    code = PREAMBLE.format(module="") + "import edgeres.catalog\nedgeres.catalog.catalog = lambda: 1 / 0\n"
    done = run(code + ENTRY, 0, ["models"])
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr
    code = code.replace("1 / 0", "[].pop()")
    assert "this is a bug in edgeres" in run(code + ENTRY, 0, ["models"]).stderr
