"""The least of TensorRT that a session needs, which computes on host memory; and the least of a GPU, in Python.

Execution is deferred as on a GPU: it begins when somebody waits for the stream. What a session must never do ends the
test at once: two threads in one context, an engine that dies before its contexts, memory used after it was freed.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeres.errors import BackendError

SHAPE, CLASSES = (3, 4, 5), 7
WEIGHTS = np.random.default_rng(7).integers(-3, 4, (60, CLASSES)).astype(np.float32)
PLAN = b"a plan"
BUILT_FOR = {"tensorrt": "10.3.0", "flavour": "tensorrt"}

if TYPE_CHECKING:
    Enqueue = Callable[[int, Callable[[], None]], bool]
    """Puts work on a stream, and says whether it could."""


def frames(count: int, seed: int = 0) -> np.ndarray:
    """Return a batch of whole numbers, so that sums are exact in any order."""
    return np.random.default_rng(seed).integers(-8, 9, (count, *SHAPE)).astype(np.float32)


def logits(batch: np.ndarray) -> np.ndarray:
    """Return what the tiny network answers."""
    return batch.reshape(len(batch), len(WEIGHTS)) @ WEIGHTS


class Tiny:
    """A module as ``tensorrt`` is one, and what happened in it.

    ``answers`` overrides what a method returns: its name → a value, or a list of values for the first calls.
    """

    def __init__(self, enqueue: Enqueue, version: str = "10.3.0", batch: tuple[int, int] = (2, 4)) -> None:
        self.enqueue = enqueue
        self.batch = batch
        self.answers: dict[str, Any] = {}
        self.alive: list[str] = []
        self.died: list[str] = []
        self.executed = 0
        self.seconds = 0.0
        self.dynamic = True
        self.types = ("FLOAT", "FLOAT")
        self.modes = ("INPUT", "OUTPUT")
        self.output: tuple[int, ...] = (-1, CLASSES)
        self.cores = 0
        self.core: int | None = None
        self.recording: Callable[[int], bool] = lambda stream: False
        """Whether a stream is being recorded."""
        self.wait: Callable[[int], object] = lambda stream: None
        """Waits for a stream, as some layers do; not while it is being recorded."""
        self.module = ModuleType("tensorrt")
        self.module.__dict__.update(
            __version__=version,
            ILogger=Logger,
            Runtime=lambda logger: Runtime(self, logger),
            TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
            DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF", UINT8="UINT8"),
        )

    def answer(self, name: str, otherwise: Any) -> Any:
        """Return what a method of this name is to return."""
        told = self.answers.get(name, otherwise)
        if isinstance(told, list):
            return told.pop(0) if told else otherwise
        return told

    def born(self, kind: str) -> None:
        self.alive.append(kind)

    def dies(self, kind: str) -> None:
        self.alive.remove(kind)
        self.died.append(kind)


class Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True


class Mortal:
    """Something that says when it is born and when it dies."""

    kind = ""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        tiny.born(self.kind)

    def __del__(self) -> None:
        self.tiny.dies(self.kind)


class Runtime(Mortal):
    kind = "runtime"

    def __init__(self, tiny: Tiny, logger: Any) -> None:
        self.logger = logger
        self.DLA_core = 0
        super().__init__(tiny)
        if tiny.answer("Runtime", True) is None:
            raise TypeError("factory function returned nullptr")

    @property
    def engine_host_code_allowed(self) -> bool:
        """Nobody may set it: a plan could then bring code of its own."""
        return False

    @property
    def num_DLA_cores(self) -> int:
        return self.tiny.cores

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if self.tiny.answer("deserialize_cuda_engine", plan == PLAN) is not True:
            self.logger.log(Logger.ERROR, "the header's magic tag is wrong")
            return None
        self.tiny.core = self.DLA_core
        return Engine(self.tiny, self)


class Engine(Mortal):
    kind = "engine"

    def __init__(self, tiny: Tiny, runtime: Runtime) -> None:
        self.runtime = runtime
        self.num_io_tensors = len(tiny.modes)
        super().__init__(tiny)

    def get_tensor_name(self, index: int) -> str:
        return ("frames", "logits", "more")[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.tiny.modes[("frames", "logits", "more").index(name)]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tiny.types[("frames", "logits", "more").index(name)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = -1 if self.tiny.dynamic else self.tiny.batch[1]
        return (batch, *SHAPE) if name == "frames" else self.tiny.output

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("frames", 0)
        least, largest = self.tiny.batch
        return [(least, *SHAPE), (largest, *SHAPE), (largest, *SHAPE)]

    def create_execution_context(self) -> Any:
        if self.tiny.answer("create_execution_context", True) is None:
            self.runtime.logger.log(Logger.ERROR, "Cuda Runtime (out of memory)")
            return None
        return Context(self.tiny, self)


class Context(Mortal):
    kind = "context"

    def __init__(self, tiny: Tiny, engine: Engine) -> None:
        self.engine = engine
        self.rows = 0
        self.addresses: dict[str, int] = {}
        self.busy = threading.Lock()
        self.changes = [0]  # its work knows the list, and not the context
        self.settled = False  # it has run since it was changed
        super().__init__(tiny)

    def _change(self) -> None:
        self.changes[0] += 1
        self.settled = False

    def _said(self, method: str) -> bool:
        if self.tiny.answer(method, True) is False:
            self.engine.runtime.logger.log(Logger.ERROR, f"{method} went wrong")
            return False
        return True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert profile == 0
        assert stream
        return self._said("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "frames"
        assert shape[1:] == SHAPE
        least, largest = self.tiny.batch
        if not (least if self.tiny.dynamic else largest) <= shape[0] <= largest:
            return False
        self._change()
        self.rows = shape[0]
        return self._said("set_input_shape")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.rows, *(SHAPE if name == "frames" else (self.tiny.answer("classes", CLASSES),)))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change()
        self.addresses[name] = address
        return self._said("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        assert stream, "the default stream"
        assert self.busy.acquire(blocking=False), "two threads in one context"
        try:
            if not self._said("execute_async_v3"):
                return False
            rows, source, target = self.rows, self.addresses["frames"], self.addresses["logits"]
            tiny, changes, then = self.tiny, self.changes, self.changes[0]
            if tiny.recording(stream):
                assert self.settled, "recorded before it ran once"
                how = tiny.answer("waits within", None)
                if how is not None:
                    tiny.wait(stream)
                if how == "and says so":
                    self.engine.runtime.logger.log(Logger.ERROR, "Cuda Runtime (stream is capturing)")
                    return False
            self.settled = True

            def work() -> None:
                assert changes[0] == then, "the context was changed under its work"
                time.sleep(tiny.seconds)
                dtype = np.uint8 if tiny.types[0] == "UINT8" else np.float32
                view(target, (rows, CLASSES))[:] = logits(view(source, (rows, *SHAPE), dtype))
                tiny.executed += 1

            return tiny.enqueue(stream, work)
        finally:
            self.busy.release()


def view(address: int, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
    """Return the array at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class HostGraph:
    """Recorded work of a :class:`HostDevice`."""

    def __init__(self, device: HostDevice, stream: int, work: list[Callable[[], None]]) -> None:
        self.device, self.stream, self.work = device, stream, work
        device.graphs.append(self)

    def launch(self) -> None:
        self.device._ask("launch")
        for work in self.work:
            self.device.enqueue(self.stream, work)

    def destroy(self) -> None:
        self.device.graphs.remove(self)
        self.device._ask("destroy")


class HostDevice:
    """A GPU on host memory, all in Python. ``fails`` names a method that raises, and after how many good calls.

    ``others`` is the work that other libraries have begun: it is done when somebody waits for the whole GPU.
    """

    index, name, compute_capability, driver = 0, "Orin", (8, 7), (12, 6)

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.fails: dict[str, int] = {}
        self.memory_held: dict[int, np.ndarray] = {}
        self.pinned_held: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.others: list[Callable[[], None]] = []
        self.graphs: list[HostGraph] = []
        self.recorded: dict[int, list[Callable[[], None]]] = {}
        self.broken = False
        self._working = threading.RLock()
        self.closed = False
        self.calls: list[str] = []
        self._numbers = iter(range(1, 1 << 30))
        self._here = threading.local()
        self.pushes = self.pops = 0

    def _ask(self, name: str) -> None:
        assert name == "current" or getattr(self._here, "depth", 0), f"{name} outside the context"
        self.calls.append(name)
        if name in self.fails:
            self.fails[name] -= 1
            if self.fails[name] < 0:
                raise BackendError(f"CUDA failed at {name}: injected. See: edgeres doctor")

    @property
    def held(self) -> int:
        return len(self.memory_held) + len(self.pinned_held) + len(self.streams) + len(self.graphs)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._ask("current")
        self._here.depth = getattr(self._here, "depth", 0) + 1
        self.pushes += 1
        try:
            yield
        finally:
            self._here.depth -= 1
            self.pops += 1

    def memory(self) -> tuple[int, int]:
        used = sum(block.nbytes for block in self.memory_held.values())
        return self.limit - used, self.limit

    def allocate(self, size: int) -> int:
        self._ask("allocate")
        if size > self.memory()[0]:
            raise BackendError("CUDA failed at allocate: out of memory. Open fewer contexts.")
        block = np.full(size, 0xA5, np.uint8)
        self.memory_held[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        self.memory_held.pop(address)
        self._ask("free")

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
        self._ask("pinned")
        array = np.full(shape, np.nan if dtype is np.float32 else 0xA5, dtype)
        self.pinned_held[array.ctypes.data] = array
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self.pinned_held.pop(array.ctypes.data)
        self._ask("free_pinned")

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        self._ask("upload")
        self.enqueue(stream, lambda: view(address, array.shape, array.dtype.type).__setitem__(slice(None), array))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        self._ask("download")
        self.enqueue(stream, lambda: array.__setitem__(slice(None), view(address, array.shape, array.dtype.type)))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._ask("copy")
        for address in (target, source):
            ends = ((at, at + block.nbytes) for at, block in list(self.memory_held.items()))
            assert any(start <= address and address + size <= end for start, end in ends), "not the GPU's memory"
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))

    def enqueue(self, stream: int, work: Callable[[], None]) -> bool:
        """Put what an execution context does on a stream."""
        self.recorded.get(stream, self.streams[stream]).append(work)
        return True

    def create_stream(self) -> int:
        self._ask("create_stream")
        stream = next(self._numbers)
        self.streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        assert not self.streams.pop(stream), "a stream was destroyed with work on it"
        assert all(graph.stream != stream for graph in self.graphs), "a stream was destroyed before its graph"
        self._ask("destroy_stream")

    def synchronize(self, stream: int) -> None:
        if stream in self.recorded:
            self.broken = True
            return
        with self._working:
            todo, self.streams[stream] = self.streams[stream], []
            for work in todo:
                work()
        self._ask("synchronize")

    def synchronize_all(self) -> None:
        assert not self.recorded, "a wait for the whole GPU while somebody records"
        with self._working:
            todo, self.others = self.others, []
            for work in todo:
                work()
        for stream in list(self.streams):
            self.synchronize(stream)
        self._ask("synchronize_all")

    def capture(self, stream: int, work: Callable[[], None]) -> HostGraph:
        self._ask("capture")
        self.recorded[stream], self.broken = [], False
        try:
            work()
        finally:
            found = self.recorded.pop(stream)
        if self.broken:
            raise BackendError("CUDA failed at recording: operation failed due to a previous error during capture. See")
        return HostGraph(self, stream, found)

    def close(self) -> None:
        self.closed = True
