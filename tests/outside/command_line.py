"""The command line from outside: a process, its exit code, and what stands on stdout and stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def edgeres(*arguments: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code; no error may show a traceback."""
    command = [sys.executable, "-m", "edgeres", *map(str, arguments)]
    # Python's own view of the environment: readline, which pytest imports, sets COLUMNS behind its back.
    environment = dict(os.environ)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done
