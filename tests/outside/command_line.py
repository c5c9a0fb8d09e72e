"""The command line from outside: its exit code, and what stands on stdout and stderr."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from edgeres import cli


def edgeres(*arguments: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code; no error may show a traceback."""
    command = [sys.executable, "-m", "edgeres", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def called(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, and what stands on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli._exit_code([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()
