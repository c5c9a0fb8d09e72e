"""The command line from outside: its exit code, and what stands on stdout and stderr.

Starting Python and importing torch takes seconds, a command often less. So its processes are forked from one that has
imported the libraries, and nothing of edgeres; what they do then is what ``python -m edgeres`` does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

from warm import LIBRARIES

from edgeres import cli
from edgeres.exits import exit_code

SECONDS = 300


def edgeres(*arguments: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code; no error may show a traceback."""
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _server().Process(target=_run, args=(command, streams, cwd or Path.cwd(), dict(os.environ)))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (stream.read_text(encoding="utf-8") for stream in streams)
    assert process.exitcode == code, err + out
    assert "Traceback" not in err
    return subprocess.CompletedProcess(command, code, out, err)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def _run(command: list[str], streams: list[Path], cwd: Path, environment: dict[str, str]) -> None:
    """Be ``python -m edgeres COMMAND``, in the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((0, Path(os.devnull)), *enumerate(streams, start=1)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["edgeres", *command]
    runpy.run_module("edgeres", run_name="__main__", alter_sys=True)


def called(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, and what stands on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(cli.cli, [str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()
