"""A build in a process of its own: whatever becomes of that process, the caller is told, and nothing of it is left.

A package named ``tensorrt`` that misbehaves when it is imported stands for a TensorRT that does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edgeres
from edgeres.backends.tensorrt import BuildRequest, BuildResult, build_in_child
from edgeres.backends.tensorrt.records import Message
from edgeres.errors import BackendError, MissingPackageError

PREAMBLE = "import json, os, signal, sys, time\nopen({pid!r}, 'w').write(str(os.getpid()))\nsink = int(sys.argv[1])\n"
PROGRESS = 'os.write(sink, b\'{"progress":["Building",1,4]}\\n\')\n'
PARENT = """
import sys
from edgeres.backends.tensorrt import BuildRequest, build_in_child
request = BuildRequest(onnx="a", plan="b", input_name="c", shape=(3, 8, 8))
try:
    build_in_child(request, lambda *step: print(step, flush=True))
except KeyboardInterrupt:
    print("interrupted")
"""
REQUEST = BuildRequest(onnx="model.onnx", plan="model.engine", input_name="input", shape=(3, 8, 8))
RESULT = BuildResult(
    plan="model.engine", sha256="0" * 64, bytes=1, built_for={}, layers=(), warnings=("told",), seconds=1.0
)


class Fake:
    """A folder with a package ``tensorrt`` whose import runs a piece of code; it notes its process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pid = folder / "pid"

    def write(self, code: str) -> None:
        (self.folder / "tensorrt.py").write_text(PREAMBLE.format(pid=str(self._pid)) + code)

    def pid(self) -> int:
        wait_for(lambda: self._pid.exists() and bool(self._pid.read_text()))
        return int(self._pid.read_text())

    def gone(self) -> bool:
        """Whether the process has ended; one that waits to be reaped has."""
        try:
            state = Path(f"/proc/{self.pid()}/stat").read_text()
        except FileNotFoundError:
            return True
        return state.rpartition(")")[2].split()[0] == "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Fake(tmp_path)


def silent(phase: str, done: int, total: int) -> None:
    """Hear progress and do nothing."""


DEATHS = {
    "memory": ("os.kill(os.getpid(), signal.SIGKILL)", "ran out of memory.*smaller workspace.*swap"),
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "TensorRT crashed: .*SIGSEGV"),
    "abort": ("os.abort()", "TensorRT crashed: .*SIGABRT"),
    "exit": ("os._exit(7)", "without an answer: exit status 7"),
    "silence": ("os._exit(0)", "without an answer: exit status 0"),
    "half a line": ('os.write(sink, b\'{"result": {"pl\'); os._exit(0)', "without an answer: exit status 0"),
    "garbage": ("os.write(sink, b'hello\\n'); time.sleep(60)", "what is no answer .b'hello'."),
    "another edgeres": ("os.write(sink, b'{\"rezult\": 1}\\n'); time.sleep(60)", "Its Python may find another edgeres"),
    "a bug": ("raise ZeroDivisionError('in the builder')", r"(?s)exit status 1.*ZeroDivisionError: in the builder"),
    "does not load": ("raise ImportError('libnvinfer.so.10: no such file')", "installed but does not load: libnvinfer"),
    "too old": ("__version__ = '8.4.1'", "tensorrt 8.4.1 is too old"),
}


@pytest.mark.parametrize(("code", "words"), DEATHS.values(), ids=DEATHS)
def test_a_death_is_told_as_what_it_is(code: str, words: str, fake: Fake) -> None:
    fake.write(code)
    with pytest.raises(BackendError, match=words):
        build_in_child(REQUEST, silent)
    assert fake.gone()


def test_a_death_in_the_middle_shows_the_last_output(fake: Fake) -> None:
    fake.write(f"{PROGRESS}os.write(1, b'from native code\\n')\nos.write(2, b'and its stderr\\n')\nos.abort()")
    heard: list[tuple[str, int, int]] = []
    with pytest.raises(BackendError, match=r"(?s)SIGABRT.*from native code\n.*and its stderr"):
        build_in_child(REQUEST, lambda *step: heard.append(step))
    assert heard == [("Building", 1, 4)]


def test_megabytes_of_output_block_nobody(fake: Fake) -> None:
    noise = "for _ in range(64):\n    os.write(1, b'x' * 65536)\n    os.write(2, b'y' * 65536)\n"
    steps = f"for _ in range(20000):\n    {PROGRESS}"
    fake.write(f"{noise}{steps}{noise}raise ImportError('the end')")
    heard: list[tuple[str, int, int]] = []
    with pytest.raises(BackendError, match="the end"):
        build_in_child(REQUEST, lambda *step: heard.append(step))
    assert len(heard) == 20000


def test_the_child_needs_neither_torch_nor_onnx(fake: Fake) -> None:
    fake.write("raise ImportError(sorted({'torch', 'onnx', 'onnxruntime', 'rich', 'click'} & set(sys.modules)))")
    assert {"torch", "onnx"} <= set(sys.modules)
    with pytest.raises(BackendError, match=r"does not load: \[\]"):
        build_in_child(REQUEST, silent)


def test_a_result_counts_though_the_process_crashes_afterwards(fake: Fake) -> None:
    line = msgspec.json.encode(Message(result=RESULT)) + b"\n"
    fake.write(f"os.write(sink, {line!r})\nos.kill(os.getpid(), signal.SIGSEGV)")
    result = build_in_child(REQUEST, silent)
    assert result.warnings == ("told", "the build process was done, but did not end well: killed by SIGSEGV")
    assert msgspec.structs.replace(result, warnings=RESULT.warnings) == RESULT


def test_a_result_counts_though_the_process_never_ends(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeres.backends.tensorrt.child.GRACE", 0.2)
    line = msgspec.json.encode(Message(result=RESULT)) + b"\n"
    fake.write(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(sink, {line!r})\ntime.sleep(60)")
    assert "it hung" in build_in_child(REQUEST, silent).warnings[-1]
    assert fake.gone()


HANGS = {
    "sleeps": "time.sleep(60)",
    "ignores SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)",
    "floods its output": "while True:\n    os.write(1, b'more and more\\n' * 4096)",
    "tells of progress for ever": f"while True:\n    {PROGRESS}",
    "leaves a process that holds its output": (
        "import subprocess\nsubprocess.Popen(['sleep', '20'])\nprint('left', flush=True)\ntime.sleep(60)"
    ),
}


@pytest.mark.parametrize("code", HANGS.values(), ids=HANGS)
def test_a_child_that_does_not_end_is_ended(code: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeres.backends.tensorrt.child.GRACE", 0.2)
    fake.write(code)
    with pytest.raises(BackendError, match=r"longer than 3 seconds.*--timeout-minutes") as caught:
        build_in_child(REQUEST, silent, timeout=3)
    assert len(str(caught.value)) < 1000
    assert fake.gone()
    assert ("Its last output" in str(caught.value)) == any(word in code for word in ("deaf", "more", "left"))


def test_what_the_child_has_started_ends_with_it(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where that has taken no notice of SIGTERM, and the child has ended long ago."""
    monkeypatch.setattr("edgeres.backends.tensorrt.child.GRACE", 0.2)
    left = Fake(tmp_path)
    left._pid = tmp_path / "left"
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    fake.write(
        "import subprocess\n"
        f"other = subprocess.Popen([sys.executable, '-c', {program!r}])\n"
        f"open({str(left._pid)!r}, 'w').write(str(other.pid))\n"
        "time.sleep(60)"
    )
    with pytest.raises(BackendError, match="longer than 3 seconds"):
        build_in_child(REQUEST, silent, timeout=3)
    assert fake.gone()
    wait_for(left.gone, 5.0)


def test_a_request_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a process that has left the child's group still holds the other end of the pipe."""
    monkeypatch.setattr("edgeres.backends.tensorrt.child.GRACE", 0.2)
    leaver = "import subprocess; subprocess.Popen(['sleep', '8'], start_new_session=True); import time; time.sleep(60)"
    monkeypatch.setattr("edgeres.backends.tensorrt.child.START", leaver)
    request = msgspec.structs.replace(REQUEST, ranges={f"tensor {number}": 1.0 for number in range(20_000)})
    start = time.monotonic()
    with pytest.raises(BackendError, match="longer than 2 seconds"):
        build_in_child(request, silent, timeout=2)
    assert time.monotonic() - start < 6


def test_where_no_thread_can_be_started_no_child_is_left(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    started: list[object] = []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr("edgeres.backends.tensorrt.child._started", lambda *given: started.append(given))
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        build_in_child(REQUEST, silent)
    assert started == []
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_child_that_never_reads_what_it_shall_do_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long request fills the pipe to it."""
    monkeypatch.setattr("edgeres.backends.tensorrt.child.GRACE", 0.2)
    monkeypatch.setattr("edgeres.backends.tensorrt.child.START", "import time; time.sleep(60)")
    request = msgspec.structs.replace(REQUEST, ranges={f"tensor {number}": 1.0 for number in range(20_000)})
    with pytest.raises(BackendError, match="longer than 1 seconds"):
        build_in_child(request, silent, timeout=1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_what_progress_raises_ends_the_child(kind: type[BaseException], fake: Fake) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise kind

    fake.write(f"{PROGRESS}time.sleep(60)")
    with pytest.raises(kind):
        build_in_child(REQUEST, stop)
    assert fake.gone()


@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "parent alone"])
def test_ctrl_c_ends_the_child(to_all: bool, fake: Fake) -> None:
    fake.write(f"{PROGRESS}time.sleep(60)")
    with parent(fake) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "('Building', 1, 4)\n"
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted\n"
    assert process.returncode == 0
    assert fake.gone()


def test_a_child_does_not_outlive_its_parent(fake: Fake) -> None:
    fake.write(f"{PROGRESS}time.sleep(60)")
    with parent(fake) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    wait_for(fake.gone)


def parent(fake: Fake) -> subprocess.Popen[str]:
    """Start a Python that builds in a child, with the fake in its path."""
    places = [str(fake.folder), str(Path(edgeres.__file__).parents[1])]
    return subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_nothing_is_left_open(fake: Fake) -> None:
    fake.write("os._exit(1)")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(BackendError):
            build_in_child(REQUEST, silent)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_missing_tensorrt_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that the child raises is raised here, as what it is."""
    if any((Path(place) / "tensorrt_rtx").exists() for place in sys.path):
        pytest.skip("TensorRT for RTX is installed here")
    with pytest.raises(MissingPackageError, match="pip install"):
        build_in_child(msgspec.structs.replace(REQUEST, flavour="tensorrt-rtx"), silent)


def test_a_path_that_environment_variables_cannot_hold_is_searched_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    fake = Fake(folder)
    fake.write("sys.stderr.write('found in spite of the colon'); sys.stderr.flush(); os._exit(3)\n")
    with pytest.raises(BackendError, match="found in spite of the colon"):
        build_in_child(REQUEST, silent)


def test_a_folder_that_is_no_text_is_named() -> None:
    request = msgspec.structs.replace(REQUEST, plan=os.fsdecode(b"/tmp/caf\xe9/model.engine"))
    with pytest.raises(BackendError, match=r"not UTF-8.*Rename"):
        build_in_child(request, silent)


def test_a_python_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(BackendError, match="cannot be started: No such file"):
        build_in_child(REQUEST, silent)


def test_a_real_build_that_is_killed(rtx: Any, small: Any, tmp_path: Path) -> None:
    code = """
import os, signal, sys
import msgspec
from edgeres.backends.tensorrt import BuildRequest, build_in_child
from edgeres.errors import BackendError

def kill(*step):
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    os.kill(int(children[0]), signal.SIGKILL)

try:
    build_in_child(msgspec.json.decode(sys.argv[1], type=BuildRequest), kill)
except BackendError as problem:
    print(problem)
"""
    request = msgspec.json.encode(small.request(tmp_path / "a.engine")).decode()
    assert "ran out of memory" in rtx.run(code, request)
    assert list(tmp_path.iterdir()) == []
