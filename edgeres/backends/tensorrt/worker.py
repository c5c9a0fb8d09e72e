"""The child's half of a build in a process of its own: its argument is the number of a pipe."""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec

from edgeres.backends.tensorrt.builder import build_plan
from edgeres.backends.tensorrt.records import BuildRequest, Message
from edgeres.errors import EdgeresError

CHUNK = 1 << 16


def main(sink: int) -> None:
    """Build what stdin asks for, and tell of it on the pipe ``sink``."""
    # Ctrl-C reaches both processes; the parent decides, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(sink, False)
    request = msgspec.json.decode(_request_line(), type=BuildRequest)
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def tell(message: Message) -> None:
        data = msgspec.json.encode(message) + b"\n"
        while data:
            data = data[os.write(sink, data) :]

    def report(phase: str, done: int, total: int) -> None:
        tell(Message(progress=(phase, done, total)))

    try:
        result = build_plan(request, report, lambda: False)
    except EdgeresError as problem:
        tell(Message(error=(type(problem).__name__, str(problem))))
        return
    tell(Message(result=result))


def _request_line() -> bytes:
    """Return the first line of stdin, read without Python's buffer, whose lock would outlive the watching thread."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, CHUNK)
        if not chunk:
            break
        line += chunk
    return line


def _die_with_parent() -> None:
    """End this process, native code and all, once stdin is closed: nobody waits for the result."""
    while os.read(0, CHUNK):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
