"""Lean runtimes: what a newer TensorRT runs a version-compatible plan of an older one with.

Such a plan could carry its runtime inside, native code that TensorRT would run on sight. edgeres lets no plan do so,
and builds them without (``EXCLUDE_LEAN_RUNTIME``): the lean runtime of the very version that built the plan has to be
installed, and ``Runtime.load_runtime`` is given its path, which never comes from a bundle.

Source: NvInferRuntime.h, ``IRuntime::loadRuntime``; NVIDIA TensorRT documentation, "Version Compatibility".
"""

from __future__ import annotations

import os
import platform
import re
from typing import Dict, List

LIBRARY = re.compile(r"libnvinfer_lean\.so\.(\d+\.\d+\.\d+)")
"""As NVIDIA's packages name it; the library's version stands in its name."""

SYSTEM = ("/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/usr/local/tensorrt/lib")


def name_of(version: str) -> str:
    """Return the file name of the lean runtime of a TensorRT version, ``10.13.3`` or ``10.13.3.9``."""
    return f"libnvinfer_lean.so.{'.'.join(version.split('.')[:3])}"


def lean_runtimes() -> Dict[str, str]:
    """Return the lean runtimes of this machine, version (three numbers) → path, from where libraries are looked for."""
    found: Dict[str, str] = {}
    for folder in _folders():
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            match = LIBRARY.fullmatch(name)
            if match:
                found.setdefault(match.group(1), os.path.join(folder, name))
    return found


def _folders() -> List[str]:
    """Return where to look, first found first. What is relative is left out: it would depend on the working folder."""
    own = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    system = [place.format(machine=platform.machine()) for place in SYSTEM]
    return [place for place in (*own, *system) if os.path.isabs(place)]
