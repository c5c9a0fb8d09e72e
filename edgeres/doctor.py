"""What this machine can build and run, and what to install for more."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from edgeres.provenance import version

ABILITIES = (
    ("run a bundle on the CPU", ("onnxruntime",), "cpu"),
    ("read image folders", ("PIL",), "images"),
    ("write report.html", ("jinja2",), "report"),
    ("sign bundles, and check signatures", ("cryptography",), "sign"),
    (
        "run samples on a cluster, and read them from object stores",
        ("distributed", "fsspec", "cryptography"),
        "cluster",
    ),
    ("build bundles", ("torch", "onnx", "onnxruntime", "safetensors", "numba", "PIL", "tomli_w"), "host"),
)
DISTRIBUTIONS = {"PIL": "pillow", "tomli_w": "tomli-w"}


JETPACKS = (
    ((35, 2), "5.1", "'cuda-python==11.8.*'"),
    ((36, 3), "6.0", "'cuda-bindings==12.*'"),
    ((36, 4), "6.1 or newer", "'cuda-bindings==12.*'"),
    ((38, 2), "7.0", "'cuda-bindings==13.*'"),
    ((38, 4), "7.1", "'cuda-bindings==13.*'"),
    ((39, 2), "7.2 or newer", "'cuda-bindings==13.*'"),
)
"""By the first Linux for Tegra of a row: the JetPack, and what pip installs there to reach CUDA from Python."""

RELEASE = Path("/etc/nv_tegra_release")
MODEL = Path("/proc/device-tree/model")


def examine() -> Dict[str, Any]:
    """Return facts about this machine: host, processor, memory, packages, and each ability with what it lacks."""
    packages = sorted({package for _, needed, _ in ABILITIES for package in needed})
    gpu = _gpu()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "cpu_int8": _cpu_words(),
        "packages": {name: version(DISTRIBUTIONS.get(name, name)) for name in packages},
        "gpu": gpu,
        "abilities": [*(_ability(*ability) for ability in ABILITIES), tensorrt_ability(gpu)],
    }


def _gpu() -> Dict[str, Any]:
    """Return what there is of TensorRT, CUDA from Python and Jetson, and the targets with what stands in their way."""
    from edgeres.targets import gpu_is_usable, list_targets

    return {
        "tensorrt": version("tensorrt") or _loaded("tensorrt"),
        "tensorrt_rtx": version("tensorrt-rtx") or _loaded("tensorrt-rtx"),
        "cuda_python": version("cuda-bindings") or version("cuda-python"),
        "pycuda": version("pycuda"),
        "gpu_usable": gpu_is_usable("tensorrt") or gpu_is_usable("tensorrt-rtx"),
        "jetson": jetson(),
        "targets": list_targets(),
    }


def _loaded(flavour: str) -> Optional[str]:
    """Return the version of a TensorRT that no installer has written down, as the bindings that lie in a path."""
    from edgeres.backends.tensorrt import load_module
    from edgeres.backends.tensorrt.module import dotted, library_version

    try:
        return dotted(library_version(load_module(flavour)))
    except Exception:  # missing, of the other flavour, or broken: the list of targets says which
        return None


def jetson() -> Dict[str, str]:
    """Return a Jetson's ``model``, its Linux for Tegra (``l4t``) and the ``jetpack`` that this belongs to, as its files
    tell; empty on other machines."""
    facts = {}
    for name, path in (("model", MODEL), ("l4t", RELEASE)):
        try:
            facts[name] = path.read_text(encoding="utf-8", errors="replace").strip("\0\n ").splitlines()[0]
        except (OSError, IndexError):
            continue
    if "l4t" not in facts:
        return {}
    row = _jetpack(facts["l4t"])
    return {**facts, "jetpack": row[1]} if row else facts


def _jetpack(l4t: str) -> Optional[Tuple[Tuple[int, int], str, str]]:
    """Return the row of :data:`JETPACKS` of ``# R36 (release), REVISION: 4.3, …``; None for one that is older."""
    found = re.search(r"R(\d+) .*REVISION: (\d+)", l4t)
    if found is None:
        return None
    release = (int(found.group(1)), int(found.group(2)))
    return next((row for row in reversed(JETPACKS) if row[0] <= release), None)


def tensorrt_ability(gpu: Dict[str, Any]) -> Dict[str, Any]:
    """Return whether engines can be compiled for and run on the GPU here, and what to install where they cannot be."""
    missing: List[str] = [] if gpu["tensorrt"] else ["tensorrt"]
    if not (gpu["cuda_python"] or gpu["pycuda"]):
        missing.append("cuda-bindings or pycuda")
    row = _jetpack(gpu["jetson"].get("l4t", ""))
    if not missing:
        install = None if gpu["gpu_usable"] else "an NVIDIA GPU and its driver"
    elif gpu["jetson"]:
        steps = [] if gpu["tensorrt"] else ["sudo apt install python3-libnvinfer, seen from a virtual environment made "
                                            "with --system-site-packages"]  # fmt: skip
        cuda = [f"pip install {row[2] if row else 'pycuda'}"] if missing[-1] != "tensorrt" else []
        install = "; ".join([*steps, *cuda])
    elif "tensorrt" in missing:
        install = "pip install 'edgeres[tensorrt]'"
    else:
        install = "pip install cuda-bindings"
    can = not missing and bool(gpu["gpu_usable"])
    return {"what": "compile for and run on a GPU by TensorRT", "can": can, "missing": missing, "install": install}


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
