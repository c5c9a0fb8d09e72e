"""A GPU through cuda-python, NVIDIA's own bindings of the driver."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, Set, Tuple, Type

import numpy as np

from edgeres.backends.tensorrt.device.interface import Graph, choose, failure, no_driver
from edgeres.errors import BackendError

OLD = importlib.util.find_spec("cuda.bindings") is None

if not OLD:
    from cuda.bindings import driver as cuda
else:  # the same functions, where cuda-python had them up to 12.5: the last for Python 3.8, and so for JetPack 5
    from cuda import cuda

NON_BLOCKING = int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
MAJOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
MINOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
THREAD_LOCAL = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
"""What other threads do meanwhile does not end a recording, but for a wait for the whole context."""

_one_waits_or_records = threading.Lock()  # CUDA refuses to wait for a context in which anybody records


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
        self._index = index
        self._driver = (version // 1000, version % 1000 // 10)
        self._memory: Set[int] = set()
        self._pinned: Set[int] = set()
        self._streams: Set[int] = set()
        self._events: Dict[int, Any] = {}
        self._recordings: Dict[int, Any] = {}
        self._graphs: Dict[int, Any] = {}
        self._context: Any = _ask(opening, cuda.cuDevicePrimaryCtxRetain(self._device))

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

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        _ask("copying within the GPU", cuda.cuMemcpyDtoDAsync(target, source, size, stream))

    def create_stream(self) -> int:
        stream = int(_ask("creating a stream", cuda.cuStreamCreate(NON_BLOCKING)))
        self._streams.add(stream)
        return stream

    def destroy_stream(self, stream: int) -> None:
        _ask("destroying a stream", cuda.cuStreamDestroy(stream))
        self._streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        _ask("waiting for the GPU", _wait("cuStreamSynchronize", ctypes.c_void_p(stream)))

    def synchronize_all(self) -> None:
        with _one_waits_or_records:
            _ask("waiting for all work of the GPU", _wait("cuCtxSynchronize"))

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        recorded: Tuple[Any, ...] = ()
        try:
            with _one_waits_or_records:
                try:
                    _ask("beginning to record", cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
                    work()
                finally:  # whatever happened, the stream must execute again
                    recorded = cuda.cuStreamEndCapture(stream)
            graph = _ask("making a graph of what was recorded", _instantiate(_ask("recording", recorded)))
            self._graphs[int(graph)] = graph
        finally:
            for recording in recorded[1:]:
                if recording is not None and int(recording):
                    self._recordings[int(recording)] = recording
                    self._destroy_recording(recording)
        return _CudaGraph(self, graph, stream)

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
            for recording in list(self._recordings.values()):
                stack.callback(self._destroy_recording, recording)
            for graph in list(self._graphs.values()):
                stack.callback(self.destroy_graph, graph)

    def _free_host(self, address: int) -> None:
        _ask("freeing page-locked memory", cuda.cuMemFreeHost(address))
        self._pinned.remove(address)

    def _destroy_event(self, event: Any) -> None:
        del self._events[int(event)]
        _ask("destroying an event", cuda.cuEventDestroy(event))

    def _destroy_recording(self, recording: Any) -> None:
        _ask("destroying what was recorded", cuda.cuGraphDestroy(recording))
        del self._recordings[int(recording)]

    def destroy_graph(self, graph: Any) -> None:
        """Destroy an executable graph."""
        _ask("destroying a graph", cuda.cuGraphExecDestroy(graph))
        del self._graphs[int(graph)]

    def _release(self) -> None:
        self._context = None
        _ask("releasing the context", cuda.cuDevicePrimaryCtxRelease(self._device))


class _CudaGraph:
    """See :class:`edgeres.backends.tensorrt.device.interface.Graph`."""

    def __init__(self, device: CudaPythonDevice, graph: Any, stream: int) -> None:
        self._device = device
        self._graph = graph
        self._stream = stream

    def launch(self) -> None:
        _ask("launching a graph", cuda.cuGraphLaunch(self._graph, self._stream))

    def destroy(self) -> None:
        self._device.destroy_graph(self._graph)


def _wait(name: str, *given: ctypes.c_void_p) -> Tuple[Any, ...]:
    """Return what a function of the driver that waits answers; other Python threads go on meanwhile.

    The cuda-python of CUDA 11 keeps Python's lock while it waits, so the driver is asked without it there.
    """
    if OLD:
        return (cuda.CUresult(getattr(ctypes.CDLL("libcuda.so.1"), name)(*given)),)
    answer: Tuple[Any, ...] = getattr(cuda, name)(*(handle.value or 0 for handle in given))
    return answer


def _instantiate(recording: Any) -> Tuple[Any, ...]:
    """Return what CUDA answers for an executable graph; CUDA 11 has this function under another name."""
    if hasattr(cuda, "cuGraphInstantiateWithFlags"):
        answer: Tuple[Any, ...] = cuda.cuGraphInstantiateWithFlags(recording, 0)
        return answer
    answer = cuda.cuGraphInstantiate(recording, 0)
    return answer


def _ask(doing: str, answer: Tuple[Any, ...]) -> Any:
    """Return what a call of cuda-python answered, its code looked at and taken off."""
    code, *values = answer
    if code != cuda.CUresult.CUDA_SUCCESS:
        _, words = cuda.cuGetErrorString(code)
        raise failure(doing, words.decode("utf-8", "replace") if words else str(code))
    return values[0] if len(values) == 1 else tuple(values)
