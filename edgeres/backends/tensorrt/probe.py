"""Whether a GPU can be used here, asked in a process of its own: its arguments are a flavour and a target.

TensorRT and CUDA take a hundred megabytes once they are loaded, and a context that pycuda has made stays. So who only
wants to know is answered by a process that ends; where they are loaded already, nothing is saved by that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Optional

from edgeres.backends.tensorrt import module
from edgeres.backends.tensorrt.child import command, environment
from edgeres.backends.tensorrt.module import FLAVOURS
from edgeres.backends.tensorrt.obstacles import find_obstacles

DRIVER = Path("/proc/driver/nvidia")
"""Is there where NVIDIA's driver for cards is loaded."""

PATIENCE = 120.0


def looks_like_nvidia() -> bool:
    """Whether there is a trace of TensorRT, of a Jetson or of NVIDIA's driver; nothing is imported to find out."""
    return module.is_installed("tensorrt") or module.JETSON.exists() or DRIVER.exists()


def ask_for_a_gpu(flavour: str, target: str) -> Optional[str]:
    """Return why engines of a flavour cannot run on a GPU here, in the words of what stands in the way; None where they
    can."""
    names = [name for name in FLAVOURS[flavour] if module.is_installed(name)]
    if not names or any(name in sys.modules for name in names):
        return _answer(flavour, target)
    try:
        done = subprocess.run(
            command("edgeres.backends.tensorrt.probe", flavour, target),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.sep,
            env=environment(),
            timeout=PATIENCE,
            check=True,
        )
        said = json.loads(done.stdout.decode("utf-8").splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
        return f"{names[0]} was asked for a GPU and did not answer ({problem}). See: edgeres doctor"
    return str(said) if said is not None else None


def _answer(flavour: str, target: str) -> Optional[str]:
    return find_obstacles(flavour, (target,))[target].run


def main(flavour: str, target: str) -> None:
    """Write the answer on stdout, as JSON."""
    sys.stdout.write("\n" + json.dumps(_answer(flavour, target)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
