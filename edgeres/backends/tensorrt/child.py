"""A build in a process of its own: without torch and its memory, and what kills it does not kill the caller.

The request goes to the child's stdin as one line of JSON; stdin then stays open, so that a child whose parent has died
notices and ends. Progress, result or error come back as lines of JSON on a pipe of their own. Of what TensorRT's
libraries print the end is kept, and shown when the child dies, however much there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Type

import msgspec

from edgeres import errors
from edgeres.backends.tensorrt.monitor import Report
from edgeres.backends.tensorrt.records import BuildRequest, BuildResult, Message
from edgeres.errors import BackendError, EdgeresError

CHUNK = 1 << 16
GRACE = 5.0
START = """
import json, os, sys
sys.path[:] = json.loads(os.environ.pop("EDGERES_SYS_PATH"))
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
"""What a child runs: a module by its name, found where this process finds it; PYTHONPATH could not say every path."""
TAIL = 2000
TAIL_LINES = 8

RAISED: Dict[str, Type[EdgeresError]] = {
    kind.__name__: kind
    for kind in (BackendError, errors.MissingPackageError, errors.BundleError, errors.CalibrationError)
}
"""What a builder may raise, by name; it is raised again in the parent."""


class _TooLong(Exception):
    """The time is over."""


class _Garbage(Exception):
    """The child wrote something that is no message."""


def build_in_child(request: BuildRequest, progress: Report, timeout: Optional[float] = None) -> BuildResult:
    """Build one engine in a child process; see :func:`edgeres.backends.tensorrt.builder.build_plan`.

    Whatever ends this call, an exception of ``progress`` or Ctrl-C too, ends the child first.

    Args:
        request: what to build.
        progress: called with a phase of the builder, its steps done and all its steps; raise in it to cancel.
        timeout: in seconds; None waits as long as it takes.

    Raises:
        MissingPackageError: TensorRT is not installed.
        BackendError: the build was refused or failed, its process died, or it took longer than ``timeout``.
        BundleError: the plan cannot be written.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    line = _encoded(request)
    output = _Output()
    output.start()  # before there is a child: no thread may be left to start
    source, sink = os.pipe()
    try:
        try:
            child = _started(sink, output.sink)
        finally:
            os.close(sink)
            os.close(output.sink)  # from now on it is the child's alone
        try:
            outcome = _conversation(child, source, line, progress, deadline)
            status = _ended(child)
        except _TooLong:
            raise BackendError(
                f"the build of {Path(request.plan).name} took longer than {timeout:g} seconds and was stopped. Allow "
                f"more: --timeout-minutes, or lower the optimization level.{output.tail()}"
            ) from None
        except _Garbage as problem:
            raise BackendError(
                f"the build process answered what is no answer ({problem}); it was stopped.{output.tail()} "
                "Its Python may find another edgeres: see edgeres doctor"
            ) from None
        finally:
            _stop(child)
    finally:
        os.close(source)
        output.join(GRACE)
    return _result(outcome, status, output)


class _Output(threading.Thread):
    """Reads what the child prints into ``sink``, all the time, and keeps the end of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)  # what the child started may hold the pipe for ever
        self._source, self.sink = os.pipe()
        self._end = b""

    def start(self) -> None:
        """Begin to read."""
        try:
            super().start()
        except RuntimeError:
            os.close(self._source)
            os.close(self.sink)
            raise

    def run(self) -> None:
        with open(self._source, "rb", buffering=0) as stream:
            for chunk in iter(lambda: stream.read(CHUNK), b""):
                self._end = (self._end + chunk)[-TAIL:]

    def tail(self) -> str:
        """Return the last lines, indented, to stand behind a message."""
        lines = self._end.decode("utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return "".join(["\nIts last output:", *(f"\n  {line}" for line in lines)]) if lines else ""


def _encoded(request: BuildRequest) -> bytes:
    try:
        return msgspec.json.encode(request) + b"\n"
    except UnicodeEncodeError:
        raise BackendError(
            f"the path {os.path.dirname(request.plan)!r} is not UTF-8, and TensorRT takes no other. Rename the folder."
        ) from None


def command(module: str, *arguments: str) -> List[str]:
    """Return how to run a module of ours in a child, which wants :func:`environment`."""
    return [sys.executable, "-c", START, module, *arguments]


def environment() -> Dict[str, str]:
    """Return an environment in which a child imports what this process would, and nothing from its working folder."""
    path = [os.path.abspath(place) for place in sys.path if place]
    return {**os.environ, "EDGERES_SYS_PATH": json.dumps(path), "PYTHONSAFEPATH": "1"}


def _started(sink: int, output: int) -> subprocess.Popen[bytes]:
    """Start the child; it imports what this process would, and not what happens to lie in the working folder."""
    try:
        return subprocess.Popen(
            command("edgeres.backends.tensorrt.worker", str(sink)),
            bufsize=0,  # a buffer is locked while it is written, and cannot be closed then
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(sink,),
            start_new_session=True,  # it is stopped with whatever it has started
            # `python -c` imports from the working folder first; Python 3.11 can be told not to, older ones cannot.
            cwd=os.sep,
            env=environment(),
        )
    except OSError as problem:
        raise BackendError(
            f"the build process cannot be started: {problem.strerror or problem}. Close other programs."
        ) from problem


def _conversation(
    child: subprocess.Popen[bytes], source: int, request: bytes, progress: Report, deadline: Optional[float]
) -> Optional[Message]:
    """Send the request and pass progress on; return the last word, or None where the child went without one."""
    # A long request fills the pipe, and a child that hangs before it reads must not hang this one, too.
    threading.Thread(target=_send, args=(child, request), daemon=True).start()
    for line in _lines(source, deadline):
        try:
            message = msgspec.json.decode(line, type=Message)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise _Garbage(repr(line[:60])) from None
        if message.progress is not None:
            progress(*message.progress)
        else:
            return message
    return None


def _send(child: subprocess.Popen[bytes], request: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it died, or was stopped, before it could read
        rest = memoryview(request)
        while rest:
            rest = rest[child.stdin.write(rest) :]


def _lines(source: int, deadline: Optional[float]) -> Iterator[bytes]:
    """Yield what comes through the pipe, line by line, until its other end is closed."""
    rest: List[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not selector.select(left):  # also where there is always more
                raise _TooLong
            chunk = os.read(source, CHUNK)
            if not chunk:
                return  # an unfinished line is no message: the child died while it wrote
            *whole, last = chunk.split(b"\n")
            for line in whole:
                yield b"".join([*rest, line])
                rest = []
            rest.append(last)


def _ended(child: subprocess.Popen[bytes]) -> Optional[int]:
    """Return the child's exit status, or None if it does not end by itself."""
    try:
        return child.wait(GRACE)
    except subprocess.TimeoutExpired:
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child if it still runs, and reap it; whatever it has started ends too."""
    try:
        if child.poll() is None:
            _signal(child, signal.SIGTERM)
            _ended(child)
    finally:
        _signal(child, signal.SIGKILL)
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the child's process group, which may outlive the child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where all of it are zombies
        os.killpg(child.pid, number)


def _result(outcome: Optional[Message], status: Optional[int], output: _Output) -> BuildResult:
    """Return what the child made, or raise what it raised or what its death means."""
    if outcome is not None and outcome.error is not None:
        kind, text = outcome.error
        raise RAISED.get(kind, BackendError)(text)
    if outcome is None or outcome.result is None:
        raise BackendError(f"{_death(status)}{output.tail()}")
    if status == 0:
        return outcome.result
    late = f"the build process was done, but did not end well: {_how(status)}"
    return msgspec.structs.replace(outcome.result, warnings=(*outcome.result.warnings, late))


def _how(status: Optional[int]) -> str:
    """Return in words how a process ended."""
    if status is None:
        return "it hung and was stopped"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _death(status: Optional[int]) -> str:
    """Return what the end of a process without an answer means, and what to do."""
    if status == -signal.SIGKILL:
        return (
            "the build process was killed (SIGKILL): the machine most likely ran out of memory. Close other programs, "
            "give the builder a smaller workspace, lower the largest batch, or add swap."
        )
    if status is not None and status < 0:
        return (
            f"TensorRT crashed: the build process was {_how(status)}. Try a smaller workspace or another optimization "
            "level; if it stays, the installed TensorRT is damaged or has a bug: edgeres doctor"
        )
    return f"the build process ended without an answer: {_how(status)}. See what is installed: edgeres doctor"
