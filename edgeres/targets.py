"""What engines can be compiled for, which of it a recipe means, and what of it can be built and run on this machine."""

from __future__ import annotations

import importlib.util
from typing import Any, Dict, List, Tuple

from edgeres.errors import BackendError
from edgeres.recipe import EngineSection

TARGETS: Dict[str, Tuple[str, str]] = {
    "cpu": ("cpu", "this CPU, by onnxruntime"),
    "gpu": ("tensorrt", "this machine's GPU, by TensorRT"),
    "dla0": ("tensorrt", "the first Deep Learning Accelerator of a Jetson"),
    "dla1": ("tensorrt", "the second Deep Learning Accelerator of a Jetson"),
    "rtx": ("tensorrt-rtx", "RTX GPUs, ahead of time, by TensorRT for RTX; no GPU is needed to compile"),
}
"""Target → its backend, and what it is."""

DEFAULT_TARGETS = {"cpu": "cpu", "tensorrt": "gpu", "tensorrt-rtx": "rtx"}


def resolve(section: EngineSection) -> Tuple[str, str]:
    """Return the backend and the target that a recipe means on this machine.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    backend, target = section.backend, section.target
    if backend == "auto":
        backend = TARGETS[target][0] if target is not None else ("tensorrt" if gpu_is_usable() else "cpu")
    target = target or DEFAULT_TARGETS[backend]
    if TARGETS[target][0] != backend:
        raise BackendError(
            f"target {target} belongs to the backend {TARGETS[target][0]}, not to {backend}. Leave --backend out, or "
            "choose another --target: see `edgeres compile --list-targets`"
        )
    return backend, target


def gpu_is_usable() -> bool:
    """Whether TensorRT is installed and a GPU answers."""
    from edgeres.backends.tensorrt import load_module
    from edgeres.backends.tensorrt.device import open_device

    try:
        if importlib.util.find_spec("tensorrt") is None:
            return False
        load_module("tensorrt")
        open_device().close()
    except Exception:  # no driver, no device, another library under the bindings: there is no GPU to use from here
        return False
    return True


def list_targets() -> List[Dict[str, Any]]:
    """Return every target: ``target``, its ``backend``, ``what`` it is, and what stands in the way here, or None:
    ``obstacle`` of compiling for it, ``run_obstacle`` of running such an engine."""
    rows: List[Dict[str, Any]] = []
    for backend in DEFAULT_TARGETS:
        names = [target for target, (its, _) in TARGETS.items() if its == backend]
        for target, (build, run) in _obstacles(backend, names).items():
            what = TARGETS[target][1]
            rows.append({"target": target, "backend": backend, "what": what, "obstacle": build, "run_obstacle": run})
    return rows


def here(row: Dict[str, Any]) -> str:
    """Return in words what can be done here with a row of :func:`list_targets`."""
    if row["obstacle"] is not None:
        return str(row["obstacle"])
    if row["run_obstacle"] is not None:
        return f"can be compiled here, not run: {row['run_obstacle']}"
    return "ready"


def _obstacles(backend: str, targets: List[str]) -> Dict[str, Tuple[Any, Any]]:
    if backend != "cpu":
        from edgeres.backends.tensorrt import find_obstacles

        return {target: (found.build, found.run) for target, found in find_obstacles(backend, targets).items()}
    missing = None
    if importlib.util.find_spec("onnxruntime") is None:
        missing = "onnxruntime is missing: pip install 'edgeres[cpu]'"
    return dict.fromkeys(targets, (missing, missing))
