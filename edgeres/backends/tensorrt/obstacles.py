"""What stands in the way of building, and of running, engines on this machine."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Sequence

from edgeres.backends.tensorrt.compat import TREE, jetson_module
from edgeres.backends.tensorrt.device import driver_sees_a_gpu, open_device
from edgeres.backends.tensorrt.dla import refusal
from edgeres.backends.tensorrt.logger import Record, make_logger
from edgeres.backends.tensorrt.module import load_module, version, words
from edgeres.errors import BackendError, MissingPackageError


class Obstacles(NamedTuple):
    """Reasons, each with what to do; None where there is nothing in the way."""

    build: Optional[str]
    run: Optional[str]


class _Gpu(NamedTuple):
    """This machine's GPU: the ``name`` by which DLAs are known ("" if unknown), and what it lacks to run and build."""

    name: str
    obstacles: Obstacles


def find_obstacles(flavour: str, targets: Sequence[str]) -> Dict[str, Obstacles]:
    """Return the obstacles for each of a flavour's targets.

    Args:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        targets: ``gpu``, ``dla0``, ``dla1``; or ``rtx``, whose engines are built without a GPU.
    """
    try:
        trt = load_module(flavour)
    except Exception as problem:  # missing, of another flavour, or broken in a way of its own: its words say which
        return dict.fromkeys(targets, Obstacles(str(problem), str(problem)))
    gpu = _gpu()
    if flavour == "tensorrt-rtx":
        return dict.fromkeys(targets, Obstacles(None, gpu.obstacles.run))
    return {target: _of_target(trt, gpu, target) for target in targets}


def _gpu() -> _Gpu:
    module = jetson_module(TREE)
    try:
        device = open_device()
    except MissingPackageError as problem:  # the builder needs none, if there is a GPU
        build = None if driver_sees_a_gpu() else "the NVIDIA driver, or a GPU that it sees, is missing: edgeres doctor"
        return _Gpu(module, Obstacles(build, build or str(problem)))
    except BackendError as problem:
        return _Gpu(module, Obstacles(str(problem), str(problem)))
    try:
        return _Gpu(module or device.name, Obstacles(None, None))
    finally:
        device.close()


def _of_target(trt: Any, gpu: _Gpu, target: str) -> Obstacles:
    if not target.startswith("dla"):
        return gpu.obstacles
    reason = refusal(version(trt), gpu.name, target)
    if reason:
        return Obstacles(reason, reason)
    if gpu.obstacles.build is not None:
        return gpu.obstacles
    cores = dla_cores(trt)
    if cores <= int(target[len("dla") :]):
        text = f"{words(trt)} sees {cores} DLA cores here. Compile for the GPU: --target gpu"
        return Obstacles(text, text)
    return gpu.obstacles


def dla_cores(trt: Any) -> int:
    try:
        return int(trt.Runtime(make_logger(trt, Record())).num_DLA_cores)
    except (TypeError, RuntimeError):  # what the bindings make of a null pointer
        return 0
