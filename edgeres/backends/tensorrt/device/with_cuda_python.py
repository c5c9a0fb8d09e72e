"""A GPU through cuda-python, NVIDIA's own bindings of the driver."""

from __future__ import annotations

import ctypes
import importlib.util
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, Set, Tuple, Type

import numpy as np

from edgeres.backends.tensorrt.device.interface import choose, failure, no_driver
from edgeres.errors import BackendError

if importlib.util.find_spec("cuda.bindings") is not None:
    from cuda.bindings import driver as cuda
else:  # the same functions, where cuda-python had them up to 12.5: the last for Python 3.8, and so for JetPack 5
    from cuda import cuda

NON_BLOCKING = int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
MAJOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
MINOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR


class CudaPythonDevice:
    """One GPU; see :class:`edgeres.backends.tensorrt.device.interface.Device`."""

    def __init__(self, index: int) -> None:
        """Raises BackendError where there is no driver, or no GPU of that number."""
        try:
            answer = cuda.cuInit(0)
        except RuntimeError as problem:  # libcuda does not load
            raise no_driver(str(problem)) from problem
        _ask("looking for a GPU", answer)
        choose(index, int(_ask("looking for a GPU", cuda.cuDeviceGetCount())))
        opening = f"opening GPU {index}"
        self._device: Any = _ask(opening, cuda.cuDeviceGet(index))
        name: bytes = _ask(opening, cuda.cuDeviceGetName(256, self._device))
        self._name = name.split(b"\0", 1)[0].decode("utf-8", "replace")
        self._capability = (
            int(_ask(opening, cuda.cuDeviceGetAttribute(MAJOR, self._device))),
            int(_ask(opening, cuda.cuDeviceGetAttribute(MINOR, self._device))),
        )
        version = int(_ask(opening, cuda.cuDriverGetVersion()))
        self._driver = (version // 1000, version % 1000 // 10)
        self._memory: Set[int] = set()
        self._pinned: Set[int] = set()
        self._streams: Set[int] = set()
        self._events: Dict[int, Any] = {}
        self._context: Any = _ask(opening, cuda.cuDevicePrimaryCtxRetain(self._device))

    @property
    def name(self) -> str:
        return self._name

    @property
    def compute_capability(self) -> Tuple[int, int]:
        return self._capability

    @property
    def driver(self) -> Tuple[int, int]:
        return self._driver

    @contextmanager
    def current(self) -> Iterator[None]:
        context = self._context
        if context is None:
            raise BackendError("this GPU is closed. Open the engine again.")
        _ask("entering the context", cuda.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            _ask("leaving the context", cuda.cuCtxPopCurrent())

    def memory(self) -> Tuple[int, int]:
        with self.current():
            free, total = _ask("asking for free memory", cuda.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        address = int(_ask(f"allocating {size} bytes on the GPU", cuda.cuMemAlloc(size)))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        _ask("freeing memory", cuda.cuMemFree(address))
        self._memory.remove(address)  # not before: close() tries again

    def pinned(self, shape: Tuple[int, ...], dtype: Type[np.generic] = np.float32) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(_ask(f"allocating page-locked memory for {shape}", cuda.cuMemHostAlloc(size, 0)))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)

    def free_pinned(self, array: np.ndarray) -> None:
        self._free_host(array.ctypes.data)

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        _ask("copying to the GPU", cuda.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        _ask("copying from the GPU", cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream))

    def create_stream(self) -> int:
        stream = int(_ask("creating a stream", cuda.cuStreamCreate(NON_BLOCKING)))
        self._streams.add(stream)
        return stream

    def destroy_stream(self, stream: int) -> None:
        _ask("destroying a stream", cuda.cuStreamDestroy(stream))
        self._streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        _ask("waiting for the GPU", cuda.cuStreamSynchronize(stream))

    def record(self, stream: int) -> int:
        event = _ask("creating an event", cuda.cuEventCreate(0))
        self._events[int(event)] = event
        _ask("recording an event", cuda.cuEventRecord(event, stream))
        return int(event)

    def elapsed(self, start: int, end: int) -> float:
        first, last = self._events.pop(start), self._events.pop(end)
        try:
            _ask("timing", cuda.cuEventSynchronize(first))
            _ask("timing", cuda.cuEventSynchronize(last))
            return float(_ask("timing", cuda.cuEventElapsedTime(first, last)))
        finally:
            for event in (first, last):
                _ask("destroying an event", cuda.cuEventDestroy(event))

    def close(self) -> None:
        if self._context is None:
            return
        with ExitStack() as stack:  # whatever CUDA refuses, the rest is freed; the last refusal is raised
            stack.callback(self._release)
            stack.enter_context(self.current())
            for address in list(self._memory):
                stack.callback(self.free, address)
            for address in list(self._pinned):
                stack.callback(self._free_host, address)
            for stream in list(self._streams):
                stack.callback(self.destroy_stream, stream)
            for event in list(self._events.values()):
                stack.callback(self._destroy_event, event)

    def _free_host(self, address: int) -> None:
        _ask("freeing page-locked memory", cuda.cuMemFreeHost(address))
        self._pinned.remove(address)

    def _destroy_event(self, event: Any) -> None:
        del self._events[int(event)]
        _ask("destroying an event", cuda.cuEventDestroy(event))

    def _release(self) -> None:
        self._context = None
        _ask("releasing the context", cuda.cuDevicePrimaryCtxRelease(self._device))


def _ask(doing: str, answer: Tuple[Any, ...]) -> Any:
    """Return what a call of cuda-python answered, its code looked at and taken off."""
    code, *values = answer
    if code != cuda.CUresult.CUDA_SUCCESS:
        _, words = cuda.cuGetErrorString(code)
        raise failure(doing, words.decode("utf-8", "replace") if words else str(code))
    return values[0] if len(values) == 1 else tuple(values)
