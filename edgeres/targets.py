"""What engines can be compiled for, which of it a recipe means, and what of it can be built and run on this machine."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Dict, List, Optional, Tuple

from edgeres.artifacts import Engine
from edgeres.errors import BackendError, MissingPackageError
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


def gpu_is_usable(backend: str = "tensorrt") -> bool:
    """Whether a GPU answers, and the package that runs a backend's engines on it is installed."""
    return gpu_obstacle(backend) is None


@functools.lru_cache(maxsize=None)  # neither packages nor GPUs come and go while a process runs
def gpu_obstacle(backend: str) -> Optional[str]:
    """Return why no engine of a backend can run on a GPU here; None where one can. TensorRT and CUDA are asked in a
    process of their own: a small board needs the memory for the build."""
    from edgeres.backends.tensorrt import ask_for_a_gpu

    return ask_for_a_gpu(backend, DEFAULT_TARGETS[backend])


def cpu_instead(section: EngineSection) -> Optional[str]:
    """Return what to say where a recipe leaves the choice, and gets the CPU's engine on a machine that looks as if its
    GPU were meant; None where that is not so."""
    from edgeres.backends.tensorrt import looks_like_nvidia

    if section.backend != "auto" or section.target is not None or not looks_like_nvidia():
        return None
    reason = gpu_obstacle("tensorrt")
    return reason and f"the engine is for the CPU, because no GPU can be used from here: {reason}"


def require_onnxruntime(section: EngineSection) -> None:
    """Refuse to make an engine for the CPU where its package is not installed.

    Raises:
        MissingPackageError: with the reason why it is not for the GPU, where that was left to us.
    """
    if importlib.util.find_spec("onnxruntime") is not None:
        return
    missing = MissingPackageError.for_extra("onnxruntime", "an engine for the CPU", "cpu")
    if section.backend == "auto" and section.target is None:
        raise MissingPackageError(f"no GPU can be used from here: {gpu_obstacle('tensorrt')}\nAnd {missing}")
    raise missing


def misfits(engine: Engine, place: str) -> List[str]:
    """Return in sentences why a bundle's engine cannot run on this machine; empty if nothing speaks against it. No
    engine is opened for that.

    Args:
        place: the bundle, for the command that messages advise.
    """
    if engine.backend in ("tensorrt", "tensorrt-rtx"):
        from edgeres.backends.tensorrt import misfits as of_plan

        return of_plan(engine.built_for, engine.backend, place)
    if engine.backend != "cpu":
        return [f"there is no backend {engine.backend!r}. Compile it again: edgeres compile {place}"]
    missing = importlib.util.find_spec("onnxruntime") is None
    return [str(MissingPackageError.for_extra("onnxruntime", "an engine for the CPU", "cpu"))] if missing else []


def board_needed(section: EngineSection) -> Optional[str]:
    """Return why the engine that a recipe wants cannot be compiled here, so that it is to be compiled where it will
    run; None where it can be tried here.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    backend, target = resolve(section)
    if backend == "cpu":
        return None
    found: Optional[str] = _obstacles(backend, [target])[target][0]
    return found


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
