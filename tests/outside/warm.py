"""The command ``edgeres`` for shell scripts of tests, without the seconds in which Python and its libraries start.

``warm.py serve SOCKET`` imports the libraries, and nothing of edgeres, and says ``ready``; it ends when its stdin ends.
``warm.py SOCKET ARGUMENTS…`` hands its streams, folder, environment and arguments over; the server forks, and the child
does what ``python -m edgeres`` does. The exit code is the child's.
"""

import json
import os
import signal
import socket
import sys

LIBRARIES = ("torch", "onnx", "onnxruntime", "scipy.stats", "pydantic", "rich.console", "click", "msgspec", "PIL.Image")
"""What edgeres or its libraries import late, where it is installed."""


def ask(path: str, arguments: list[str]) -> int:
    """Have a command run, and return its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [request.encode()], [0, 1, 2])
        return int(server.recv(64) or b"1") & 255


def serve(path: str) -> None:
    """Answer requests until stdin ends."""
    import contextlib
    import importlib
    import selectors

    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door, selectors.DefaultSelector() as watched:
        door.bind(path)
        door.listen()
        watched.register(door, selectors.EVENT_READ)
        watched.register(sys.stdin, selectors.EVENT_READ)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while all(key.fileobj is door for key, _ in watched.select()):
            connection, _ = door.accept()
            if os.fork() == 0:
                answer(connection)
                os._exit(0)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run what is asked for in a process of its own, which may crash, and tell its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if child == 0:
        run(*json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(child, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Be ``python -m edgeres ARGUMENTS``, and end."""
    import runpy
    import traceback

    code: object = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # The server's own remember whether what they were opened on can be sought in.
        sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.argv = ["edgeres", *arguments]
        runpy.run_module("edgeres", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
