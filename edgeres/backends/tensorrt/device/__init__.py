"""A GPU behind a dozen functions, spoken to through cuda-python or pycuda, whichever is installed."""

from __future__ import annotations

import ctypes
from typing import List, Optional

from edgeres.backends.tensorrt.device.interface import Device
from edgeres.errors import BackendError, MissingPackageError

__all__ = ["Device", "driver_sees_a_gpu", "open_device"]


def open_device(index: int = 0) -> Device:
    """Return a GPU of this machine, through cuda-python where that works, else through pycuda.

    Args:
        index: which GPU, as CUDA counts them.

    Raises:
        MissingPackageError: neither package is installed.
        BackendError: there is no driver or no such GPU, or the installed package does not load.
    """
    refused: Optional[BackendError] = None
    broken: List[str] = []
    for package, opening in (("cuda", _with_cuda_python), ("pycuda", _with_pycuda)):
        try:
            return opening(index)
        except ImportError as problem:
            absent = isinstance(problem, ModuleNotFoundError) and (problem.name or "").split(".")[0] == package
            if not absent:
                broken.append(f"{package} does not load: {problem}")
        except BackendError as problem:
            refused = refused or problem
    if refused is not None:
        raise refused
    if broken:
        raise BackendError(
            f"{'; '.join(broken)}. Either the NVIDIA driver is missing, or the package belongs to another CUDA: "
            "edgeres doctor"
        )
    raise MissingPackageError(
        "running a TensorRT engine needs cuda-python or pycuda. Install the one that is quicker: "
        "pip install cuda-bindings (for CUDA 12: pip install 'cuda-bindings==12.*'; for CUDA 11, as on JetPack 5: "
        "pip install 'cuda-python==11.8.*'); where there is no wheel: pip install pycuda"
    )


def driver_sees_a_gpu() -> bool:
    """Whether there is a driver with a GPU, asked without any package."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def _with_cuda_python(index: int) -> Device:
    from edgeres.backends.tensorrt.device.with_cuda_python import CudaPythonDevice

    return CudaPythonDevice(index)


def _with_pycuda(index: int) -> Device:
    from edgeres.backends.tensorrt.device.with_pycuda import PycudaDevice

    return PycudaDevice(index)
