"""Arrays of other libraries on a GPU, as an address and a shape: read from ``__cuda_array_interface__`` or DLPack.

Nothing here touches a GPU, nor waits for one: whoever copies from or to such an array waits for its producer first.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np

from edgeres.errors import BackendError, first_line

HOST_DEVICES = (1, 3)  # DLPack's kDLCPU, and kDLCUDAHost: pinned memory, which the processor reads like any other
CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
OTHER_DEVICES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm", 14: "oneAPI", 15: "WebGPU"}
INTERFACE_VERSIONS = (2, 3)
DLPACK_VERSION = (1, 0)
LEGACY_STREAM = 1
"""CUDA's default stream, in DLPack's numbers: producers let it wait for their own work, and a wait for all work of the
GPU waits for it."""
READ_ONLY, IS_COPIED = 1, 2  # DLPack's flags
KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # DLPack's type codes that NumPy knows, as NumPy's letters


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in the memory of a GPU.

    ``gpu`` is the GPU's number, where the owner tells; ``owner`` keeps the memory alive; ``copied`` whether its owner
    made a copy to give it out, which whoever writes into it would write into.
    """

    address: int
    shape: Tuple[int, ...]
    dtype: np.dtype
    read_only: bool
    gpu: Optional[int]
    owner: object
    copied: bool = False

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return some rows that follow each other: ``array[start:stop]``."""
        start, stop, _ = rows.indices(len(self))
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, address=self.address + start * row, shape=(max(stop - start, 0), *self.shape[1:]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def as_batch(self) -> DeviceArray:
        """Return the same array with one more axis in front."""
        return replace(self, shape=(1, *self.shape))


def lies_on_device(thing: object) -> bool:
    """Whether an object says that its numbers lie where the processor cannot read them.

    Raises:
        BackendError: it does not say it, although it has the means.
    """
    if isinstance(thing, np.ndarray):
        return False
    try:
        device = getattr(thing, "__dlpack_device__", None)
        if device is not None:
            return int(device()[0]) not in HOST_DEVICES
        return hasattr(thing, "__cuda_array_interface__")
    except Exception as problem:  # whatever its owner raises
        raise _silent(thing, problem) from problem


def device_array(thing: Any) -> DeviceArray:
    """Return where an array on a GPU lies, without a copy.

    By its ``__cuda_array_interface__``, version 2 or 3; where it has none, by what it gives out through DLPack.

    Its producer may still be writing: wait for all work of the GPU before it is touched.

    Raises:
        BackendError: it lies elsewhere than in CUDA's memory, is not C-contiguous, is empty, or its owner does not give
            it out.
    """
    kind = type(thing).__name__
    try:
        where = getattr(thing, "__dlpack_device__", None)
        device = None if where is None else tuple(int(part) for part in where())
        if device is not None and device[0] not in CUDA_DEVICES:
            raise _elsewhere(kind, device[0])
        interface = getattr(thing, "__cuda_array_interface__", None)
        gpu = None if device is None else device[1]
        array = _from_dlpack(thing) if interface is None else _from_interface(thing, interface, gpu)
    except BackendError:
        raise
    except Exception as problem:  # whatever its owner raises: a tensor with gradients, a layout without an address
        raise _silent(thing, problem) from problem
    if not array.nbytes:
        raise BackendError(f"this {kind} holds nothing: its shape is {array.shape}. Give it at least one frame.")
    if not array.address:
        raise BackendError(f"this {kind} says that it lies at address 0, where nothing is. Make it anew.")
    return array


def _from_interface(thing: object, interface: Mapping[str, Any], gpu: Optional[int]) -> DeviceArray:
    """Source: Numba's documentation, CUDA Array Interface (version 3)."""
    kind = type(thing).__name__
    version = int(interface["version"])
    if version not in INTERFACE_VERSIONS:
        raise BackendError(f"this {kind} has version {version} of the CUDA array interface; edgeres reads 2 and 3")
    if interface.get("mask") is not None:
        raise BackendError(f"this {kind} is masked. Fill what is masked, and give the array without its mask.")
    shape = tuple(int(size) for size in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        _check_contiguous(kind, shape, tuple(int(stride) for stride in strides), dtype.itemsize)
    address, read_only = interface["data"]
    return DeviceArray(int(address or 0), shape, dtype, bool(read_only), gpu, thing)


def _check_contiguous(kind: str, shape: Tuple[int, ...], strides: Tuple[int, ...], step: int) -> None:
    """Refuse strides, in units of which ``step`` leads to the next number, that leave C's order."""
    if 0 in shape:
        return
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != step:  # an axis of one has nowhere to go
            raise BackendError(f"this {kind} is not C-contiguous: give a contiguous copy, such as x.contiguous()")
        step *= size


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


# By the name of a capsule: its name once it is taken (it points to these bytes, so they stay), and what it holds.
CAPSULES: Dict[bytes, Tuple[bytes, Any]] = {
    b"dltensor_versioned": (b"used_dltensor_versioned", _Versioned),
    b"dltensor": (b"used_dltensor", _Managed),
}
_python = ctypes.pythonapi
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _python))
# Called with Python's lock held, which a deleter may take once more, and which some expect.
_DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Taken:
    """What was in a DLPack capsule; its producer's deleter is called once, when nobody holds it any more."""

    def __init__(self, capsule: object) -> None:
        self._deleter: Optional[int] = None
        name = next((name for name in CAPSULES if _is_valid(capsule, name)), None)
        if name is None:
            raise BackendError("what it gave out is no DLPack capsule, or somebody took it before")
        used, content = CAPSULES[name]
        self._address = _pointer(capsule, name)
        self.content: Any = content.from_address(self._address)
        _rename(capsule, used)  # from here on the tensor is ours to delete
        self._deleter = self.content.deleter

    def __del__(self) -> None:
        deleter, self._deleter = self._deleter, None
        if deleter:
            _DELETER(deleter)(self._address)


def _from_dlpack(thing: Any) -> DeviceArray:
    """Source: DLPack 1.x, dlpack.h and its Python specification; Python array API standard 2024.12, ``__dlpack__``."""
    kind = type(thing).__name__
    try:
        capsule = thing.__dlpack__(stream=LEGACY_STREAM, max_version=DLPACK_VERSION)
    except TypeError:  # written before DLPack had versions
        capsule = thing.__dlpack__(stream=LEGACY_STREAM)
    return _from_capsule(capsule, kind)


def _from_capsule(capsule: object, kind: str) -> DeviceArray:
    taken = _Taken(capsule)
    content = taken.content
    flags = 0
    if isinstance(content, _Versioned):
        if content.major != DLPACK_VERSION[0]:  # then nothing but the deleter may be read
            raise BackendError(f"{kind} speaks DLPack {content.major}.{content.minor}; edgeres reads 1.x and older")
        flags = content.flags
    tensor = content.tensor
    if tensor.device.type not in CUDA_DEVICES:
        raise _elsewhere(kind, tensor.device.type)
    number = tensor.dtype
    letter = KINDS.get(number.code)
    if letter is None or number.lanes != 1 or number.bits % 8:
        raise BackendError(
            f"this {kind} holds numbers that NumPy does not have (DLPack's type {number.code}, {number.bits} bits, "
            f"{number.lanes} lanes). Convert it, to float32 for one."
        )
    dtype = np.dtype(f"{letter}{number.bits // 8}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        _check_contiguous(kind, shape, tuple(tensor.strides[axis] for axis in range(tensor.ndim)), 1)
    address = tensor.data + tensor.byte_offset if tensor.data else 0
    copied = bool(flags & IS_COPIED)
    return DeviceArray(address, shape, dtype, bool(flags & READ_ONLY), tensor.device.id, taken, copied)


def _elsewhere(kind: str, device: int) -> BackendError:
    where = OTHER_DEVICES.get(device, f"device of DLPack's type {device}")
    return BackendError(
        f"this {kind} lies in memory of {where}; an engine reads CUDA's and the CPU's. Copy it there first."
    )


def _silent(thing: object, problem: Exception) -> BackendError:
    return BackendError(f"this {type(thing).__name__} does not give out its numbers: {first_line(problem)}")
