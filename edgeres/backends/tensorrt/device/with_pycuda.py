"""A GPU through pycuda.

pycuda can retain a device's primary context but not release it cleanly: its ``detach`` leaves the context current in
the thread that retained it and does nothing in any other, and its destructor calls the wrong function of the driver. So
each context is retained once and detached when the process ends; TensorRT itself keeps it as long.

``pycuda.autoinit`` makes a context of its own, with which TensorRT shares nothing: never import it.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import contextmanager, suppress
from typing import Any, Callable, Dict, Iterator, Tuple, Type

import numpy as np
import pycuda.driver as cuda

from edgeres.backends.tensorrt.device.interface import Graph, choose, failure
from edgeres.errors import BackendError

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: pycuda has no name for it."""

_contexts: Dict[int, Any] = {}
_retaining = threading.Lock()


class PycudaDevice:
    """One GPU; see :class:`edgeres.backends.tensorrt.device.interface.Device`."""

    def __init__(self, index: int) -> None:
        """Raises BackendError where there is no GPU of that number."""
        with _asking("looking for a GPU"):
            cuda.init()
            count = cuda.Device.count()
        choose(index, count)
        with _asking(f"opening GPU {index}"):
            device = cuda.Device(index)
            with _retaining:
                if index not in _contexts:
                    _contexts[index] = device.retain_primary_context()
            self._context: Any = _contexts[index]
            self._name = str(device.name())
            self._capability: Tuple[int, int] = tuple(device.compute_capability())
            version = int(cuda.get_driver_version())
        self._index = index
        self._driver = (version // 1000, version % 1000 // 10)
        self._memory: Dict[int, Any] = {}
        self._pinned: Dict[int, Any] = {}
        self._streams: Dict[int, Any] = {}
        self._events: Dict[int, Any] = {}

    @property
    def index(self) -> int:
        return self._index

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
        with _asking("entering the context"):
            context.push()
        try:
            yield
        finally:
            with _asking("leaving the context"):
                cuda.Context.pop()

    def memory(self) -> Tuple[int, int]:
        with self.current(), _asking("asking for free memory"):
            free, total = cuda.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        with _asking(f"allocating {size} bytes on the GPU"):
            block = cuda.mem_alloc(size)
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        with _asking("freeing memory"):
            self._memory.pop(address).free()

    def pinned(self, shape: Tuple[int, ...], dtype: Type[np.generic] = np.float32) -> np.ndarray:
        with _asking(f"allocating page-locked memory for {shape}"):
            array: np.ndarray = cuda.pagelocked_empty(shape, dtype)
        self._pinned[array.ctypes.data] = array.base
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        with _asking("freeing page-locked memory"):
            self._pinned.pop(array.ctypes.data).free()

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        with _asking("copying to the GPU"):
            cuda.memcpy_htod_async(address, array, self._streams[stream])

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        with _asking("copying from the GPU"):
            cuda.memcpy_dtoh_async(array, address, self._streams[stream])

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        with _asking("copying within the GPU"):
            cuda.memcpy_dtod_async(target, source, size, self._streams[stream])

    def create_stream(self) -> int:
        with _asking("creating a stream"):
            stream = cuda.Stream(NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]  # destroyed here: nobody else holds it

    def synchronize(self, stream: int) -> None:
        with _asking("waiting for the GPU"):
            self._streams[stream].synchronize()

    def synchronize_all(self) -> None:
        with _asking("waiting for all work of the GPU"):
            cuda.Context.synchronize()

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        raise BackendError("pycuda has no CUDA graphs. Install cuda-python: edgeres doctor")

    def record(self, stream: int) -> int:
        with _asking("recording an event"):
            event = cuda.Event()
            event.record(self._streams[stream])
        self._events[id(event)] = event
        return id(event)

    def elapsed(self, start: int, end: int) -> float:
        first, last = self._events.pop(start), self._events.pop(end)
        with _asking("timing"):
            first.synchronize()
            last.synchronize()
            return float(last.time_since(first))

    def close(self) -> None:
        if self._context is None:
            return
        try:
            with self.current():
                for held in (self._events, self._streams, self._pinned, self._memory):
                    held.clear()
        finally:
            self._context = None


@atexit.register
def _detach() -> None:
    for context in _contexts.values():
        with suppress(cuda.Error):  # the process ends, and nobody is left to be told
            context.detach()
    _contexts.clear()


@contextmanager
def _asking(doing: str) -> Iterator[None]:
    """Turn what pycuda raises into our error. Its messages read ``cuMemAlloc failed: out of memory``."""
    try:
        yield
    except cuda.Error as problem:
        raise failure(doing, str(problem)) from problem
