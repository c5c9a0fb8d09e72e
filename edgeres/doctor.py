"""What this machine can build and run, and what to install for more."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any, Dict, List

from edgeres.provenance import version

ABILITIES = (
    ("run a bundle on the CPU", ("onnxruntime",), "cpu"),
    ("read image folders", ("PIL",), "images"),
    ("build bundles", ("torch", "onnx", "onnxruntime", "safetensors", "numba", "PIL", "tomli_w"), "host"),
)
DISTRIBUTIONS = {"PIL": "pillow", "tomli_w": "tomli-w"}


def examine() -> Dict[str, Any]:
    """Return facts about this machine: host, processor, memory, packages, and each ability with what it lacks."""
    packages = sorted({package for _, needed, _ in ABILITIES for package in needed})
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "cpu_int8": _cpu_words(),
        "packages": {name: version(DISTRIBUTIONS.get(name, name)) for name in packages},
        "gpu": _gpu(),
        "abilities": [_ability(*ability) for ability in ABILITIES],
    }


def _gpu() -> Dict[str, Any]:
    """Return what there is of TensorRT, CUDA from Python and Jetson, and the targets with what stands in their way."""
    from edgeres.compilation import gpu_is_usable, list_targets

    return {
        "tensorrt": version("tensorrt"),
        "tensorrt_rtx": version("tensorrt-rtx"),
        "cuda_python": version("cuda-bindings") or version("cuda-python"),
        "pycuda": version("pycuda"),
        "gpu_usable": gpu_is_usable(),
        "jetson": jetson(),
        "targets": list_targets(),
    }


def jetson() -> Dict[str, str]:
    """Return a Jetson's model and its Linux for Tegra release, as its files tell; empty on other machines."""
    facts = {}
    for name, path in (("model", "/proc/device-tree/model"), ("l4t", "/etc/nv_tegra_release")):
        try:
            facts[name] = Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ").splitlines()[0]
        except (OSError, IndexError):
            continue
    return facts if "l4t" in facts else {}


def _ability(what: str, needed: Any, extra: str) -> Dict[str, Any]:
    missing: List[str] = [DISTRIBUTIONS.get(p, p) for p in needed if importlib.util.find_spec(p) is None]
    install = f"pip install 'edgeres[{extra}]'" if missing else None
    return {"what": what, "can": not missing, "missing": missing, "install": install}


def _memory() -> int:
    """Return the machine's memory in bytes, 0 where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _cpu_words() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    from edgeres.backends import cpu

    return cpu.describe()
