"""A GPU for the session that lies in host memory: streams run late, and everything taken is counted."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from tensorrt_double.script import Crash

if TYPE_CHECKING:
    from tensorrt_double.strict import Double


class HostDevice:
    """See :class:`edgeres.backends.tensorrt.device.interface.Device`.

    Work on a stream, TensorRT's too, runs when the stream is synchronized, so that who reads too early reads what was
    there before. What needs a current context and has none is a :class:`Crash`. ``refuse`` maps the name of a method to
    what it raises. ``live()`` is what was taken and not given back.
    """

    name, compute_capability, driver = "Orin", (8, 7), (12, 6)

    def __init__(self, double: Double) -> None:
        double.submit = self.submit
        self.refuse: dict[str, Exception] = {}
        self.taken: dict[str, int] = {}
        self.closed = False
        self._current = threading.local()
        self._numbers = itertools.count(64)
        self._buffers: dict[int, ctypes.Array] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._streams: dict[int, list[Callable[[], None]]] = {}

    def live(self) -> int:
        return len(self._buffers) + len(self._pinned) + len(self._streams)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        if stream not in self._streams:
            raise Crash(f"there is no stream {stream}")
        self._streams[stream].append(work)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._may("current", needs_context=False)
        self._current.depth = getattr(self._current, "depth", 0) + 1
        try:
            yield
        finally:
            self._current.depth -= 1

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 32

    def allocate(self, size: int) -> int:
        self._may("allocate")
        buffer = (ctypes.c_ubyte * size)(*b"\xff" * size)  # NaN
        self._buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        self._may("free")
        self._give_back(self._buffers, address)

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
        self._may("pinned")
        array = np.full(shape, np.nan if dtype is np.float32 else 0xA5, dtype)
        self._pinned[array.ctypes.data] = array
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self._may("free_pinned")
        self._give_back(self._pinned, array.ctypes.data)

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        self._may("upload")
        self._check(address, array)
        self.submit(stream, lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes) and None)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        self._may("download")
        self._check(address, array)
        self.submit(stream, lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes) and None)

    def create_stream(self) -> int:
        self._may("create_stream")
        stream = next(self._numbers)
        self._streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._may("destroy_stream")
        self._give_back(self._streams, stream)

    def synchronize(self, stream: int) -> None:
        waiting = self._streams.get(stream)
        if waiting is None:
            raise Crash(f"there is no stream {stream}")
        work, waiting[:] = list(waiting), []
        for piece in work:
            piece()
        self._may("synchronize")

    def record(self, stream: int) -> int:
        return next(self._numbers)

    def elapsed(self, start: int, end: int) -> float:
        return 1.0

    def close(self) -> None:
        self.closed = True

    def _may(self, name: str, needs_context: bool = True) -> None:
        if needs_context and not getattr(self._current, "depth", 0):
            raise Crash(f"{name}: no context is current in this thread")
        self.taken[name] = self.taken.get(name, 0) + 1
        if name in self.refuse:
            raise self.refuse[name]

    def _check(self, address: int, array: np.ndarray) -> None:
        if not array.flags.c_contiguous:
            raise Crash("a copy of an array with gaps")
        if not any(base <= array.ctypes.data < base + whole.nbytes for base, whole in list(self._pinned.items())):
            raise Crash("an asynchronous copy of memory that is not pinned")
        if address not in self._buffers or array.nbytes > len(self._buffers[address]):
            raise Crash(f"{array.nbytes} bytes do not lie at {address:#x}")

    def _give_back(self, place: dict, key: int) -> None:
        if key not in place:
            raise Crash(f"{key:#x} is freed twice, or was never taken")
        del place[key]
