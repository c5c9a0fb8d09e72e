"""What a plan that is built here fits."""

from __future__ import annotations

from typing import Any, Dict

from edgeres.backends.tensorrt.compat import this_machine
from edgeres.backends.tensorrt.device import open_device
from edgeres.backends.tensorrt.module import flavour_of
from edgeres.errors import BackendError, MissingPackageError

PORTABLE = "portable"


def here(trt: Any) -> Dict[str, str]:
    """Return the facts of this machine; see :mod:`edgeres.backends.tensorrt.compat`.

    A plan of TensorRT for RTX is finished on the GPU that it runs on, so the GPU here is none of its facts. Without a
    GPU, or without a package to ask it with, its facts are empty.
    """
    if flavour_of(trt) == "tensorrt-rtx":
        return {**this_machine(trt, None), "compute_capability": PORTABLE}
    try:
        device = open_device()
    except (MissingPackageError, BackendError):
        return this_machine(trt, None)
    try:
        return this_machine(trt, device)
    finally:
        device.close()
