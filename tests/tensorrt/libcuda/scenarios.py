"""What is done with a GPU that is a double: python scenarios.py PACKAGE SCENARIO, under LD_LIBRARY_PATH.

PACKAGE is ``pycuda`` or ``cuda``. Each scenario returns what the test looks at; it goes to stdout as JSON. Runs on
Python 3.8 too, with the cuda-python of JetPack 5.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tiny_tensorrt import BUILT_FOR, CLASSES, PLAN, SHAPE, Tiny, frames, logits, view

from edgeres.backends.tensorrt import graphs as recordings
from edgeres.backends.tensorrt import session as room
from edgeres.backends.tensorrt.device import Device, driver_sees_a_gpu, open_device
from edgeres.device_arrays import DeviceArray, device_array
from edgeres.errors import BackendError

LEAKS = ("device_blocks", "pinned_blocks", "streams", "events", "recordings", "graphs", "capturing", "depth")
SINS = ("contexts_created", "on_default_stream", "pageable_copies", "freed_in_flight", "strangers", "orphaned_graphs")
BATCHES = (1, 2, 3, 4, 5, 9)

driver = ctypes.CDLL("libcuda.so.1")
driver.double_count.restype = driver.double_calls.restype = ctypes.c_long
driver.double_called.restype = ctypes.c_char_p
driver.double_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_waiting: dict[int, Any] = {}
_recorded: list[Any] = []


def recording(stream: int) -> bool:
    """Whether a stream is being captured."""
    status = ctypes.c_int(0)
    return driver.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status)) == 0 and status.value == 1


def enqueue(stream: int, work: Callable[[], None]) -> bool:
    """Put a Python function on a stream, as a kernel would be, and say whether the driver took it."""

    def run(_: Any) -> None:
        work()
        _waiting.pop(key, None)

    function = HOST_FUNCTION(run)
    key = id(function)
    if recording(stream):
        _recorded.append(function)  # it may run again and again
    else:
        _waiting[key] = function
    if driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0:
        return True
    _waiting.pop(key, None)
    return False


def open_with(package: str) -> Device:
    """Return the device through one package, and no other."""
    if package == "pycuda":
        from edgeres.backends.tensorrt.device.with_pycuda import PycudaDevice

        return PycudaDevice(0)
    from edgeres.backends.tensorrt.device.with_cuda_python import CudaPythonDevice

    return CudaPythonDevice(0)


def counts(*names: str) -> dict[str, int]:
    return {name: driver.double_count(name.encode()) for name in names}


def left() -> dict[str, int]:
    """Return what is held and what was done wrong, where that is not nothing."""
    gc.collect()
    found = {name: count for name, count in counts(*LEAKS, *SINS).items() if count}
    pushes, pops = driver.double_count(b"pushes"), driver.double_count(b"pops")
    return found if pushes == pops else {**found, "pushed and not popped": pushes - pops}


def open_tiny(tiny: Tiny, device: Device | None, contexts: int = 2, cuda_graphs: bool = False) -> room.Session:
    room.load_module = lambda flavour: tiny.module  # this process has no TensorRT
    tiny.recording = recording
    tiny.wait = lambda stream: driver.cuStreamSynchronize(ctypes.c_void_p(stream))
    return room.open_session(PLAN, BUILT_FOR, device=device, contexts=contexts, cuda_graphs=cuda_graphs)


class Other:
    """Another library in this process: arrays in the device's primary context, written on a stream of its own."""

    def __init__(self) -> None:
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._arrays: list[int] = []
        assert driver.cuInit(0) == 0
        assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), 0) == 0
        with self:
            assert driver.cuStreamCreate(ctypes.byref(self._stream), 1) == 0

    def __enter__(self) -> None:
        assert driver.cuCtxPushCurrent_v2(self._context) == 0

    def __exit__(self, *_: Any) -> None:
        assert driver.cuCtxPopCurrent_v2(None) == 0

    def array(self, shape: tuple[int, ...]) -> DeviceArray:
        address = ctypes.c_uint64()
        with self:
            assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(4 * int(np.prod(shape)))) == 0
        self._arrays.append(address.value)
        owner = type("Owner", (), {})()
        owner.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<f4", "data": (address.value, False), "version": 3, "stream": self._stream.value
        }  # fmt: skip
        return device_array(owner)

    def allocate_and_free(self) -> bool:
        """Whether both are allowed, as they are while another thread captures for itself."""
        address = ctypes.c_uint64()
        with self:
            good = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(8)) == 0
            return good and driver.cuMemFree_v2(address) == 0

    def write(self, array: DeviceArray, values: np.ndarray) -> None:
        """Begin to write, and do not wait for it."""
        with self:
            assert enqueue(self._stream.value or 0, lambda: view(array.address, array.shape).__setitem__(..., values))

    def close(self) -> None:
        with self:
            for address in self._arrays:
                assert driver.cuMemFree_v2(ctypes.c_uint64(address)) == 0
            assert driver.cuStreamDestroy_v2(self._stream) == 0
        assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0


def calls(package: str) -> Any:
    """Every function of a device once; copies come when the stream is waited for, and not before."""
    device = open_with(package)
    with device.current():
        stream = device.create_stream()
        address = device.allocate(4 * 6)
        there, back = device.pinned((2, 3)), device.pinned((2, 3))
        there[:], back[:] = [[1, 2, 3], [4, 5, 6]], 0
        start = device.record(stream)
        device.upload(address, there, stream)
        device.download(back, address, stream)
        end = device.record(stream)
        before = back.tolist()
        device.synchronize(stream)
        elapsed = device.elapsed(start, end)
        free, total = device.memory()
        second = device.allocate(4 * 3)
        device.copy(second, address + 4 * 3, 4 * 3, stream)
        device.download(back[0], second, stream)
        unread = back.tolist()
        device.synchronize_all()
        copied = back.tolist()
        device.free(second)
        device.free(address)
        device.free_pinned(there)
        device.free_pinned(back[:])
        device.destroy_stream(stream)
    report = {
        "before": before, "unread": unread, "copied": copied, "free": free, "total": total, "elapsed": elapsed,
        "index": device.index, "facts": [device.name, device.compute_capability, device.driver],
    }  # fmt: skip
    with device.current():  # what close() finds
        device.create_stream()
        device.allocate(10)
        device.pinned((1,))
        device.record(device.create_stream())
    device.close()
    device.close()
    try:
        with device.current():
            pass
    except BackendError as problem:
        report["closed"] = str(problem)
    return {**report, "left": left()}


def threads(package: str) -> Any:
    """Eight threads, a thousand calls each, on three contexts."""
    device = open_with(package)
    session = open_tiny(Tiny(enqueue), device, contexts=3)
    batches = [frames(count, seed) for seed, count in enumerate(BATCHES)]
    alone = [session(batch) for batch in batches]
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            for call in range(1000):
                which = (call + number) % len(batches)
                if not np.array_equal(session(batches[which]), alone[which]):
                    wrong.append(f"thread {number}, call {call}")
        except BaseException as problem:
            wrong.append(repr(problem))

    start = time.perf_counter()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    exact = len(alone) == len(batches) and all(map(np.array_equal, alone, map(logits, batches)))
    made = counts("device_blocks", "pinned_blocks", "streams")
    session.close()
    device.close()
    return {"wrong": wrong[:5], "exact": exact, "made": made, "seconds": seconds, "left": left(), **counts("retained")}


def pixels(package: str) -> Any:
    """An engine that takes pixels, given them in other strides; what is copied to the GPU, beside normalized input."""
    device = open_with(package)
    copied, right = [], []
    for types in (("UINT8", "FLOAT"), ("FLOAT", "FLOAT")):
        tiny = Tiny(enqueue)
        tiny.types = types
        session = open_tiny(tiny, device)
        dtype = np.uint8 if types[0] == "UINT8" else np.float32
        batch = np.random.default_rng(1).integers(0, 256, (4, *SHAPE)).astype(dtype)
        before = counts("uploaded_bytes")["uploaded_bytes"]
        right.append(np.array_equal(session(batch[..., ::-1]), logits(batch[..., ::-1].astype(np.float32))))
        copied.append(counts("uploaded_bytes")["uploaded_bytes"] - before)
        session.close()
    device.close()
    return {"copied": copied, "right": right, "left": left()}


def live(package: str, tiny: Tiny, use: Callable[[Any, room.Session], None] | None = None) -> BackendError | None:
    """Open a device and a session, use it, close both, and return the first error; what still runs must run right.

    ``use(attempt, session)`` is what is done with a session that records; by default one that does not runs twice.
    """
    errors: list[BackendError] = []
    batch = frames(9)

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BackendError as problem:
            errors.append(problem.with_traceback(None))
            return None

    device = attempt(lambda: open_with(package))
    if device is not None:
        session = attempt(lambda: open_tiny(tiny, device, 2 if use is None else 1, use is not None))
        if session is not None:
            if use is not None:
                use(attempt, session)
            for _ in range(2 if use is None else 0):
                answer = attempt(lambda: session(batch))
                assert answer is None or np.array_equal(answer, logits(batch))
            attempt(session.close)
        attempt(device.close)
    assert len(errors) < 2, errors
    return errors[0] if errors else None


def gpu_faults(package: str) -> Any:
    """The same, in a life of arrays on the GPU and of graphs, which begin with the second run of a batch size."""
    recordings.STEADY = 1
    other = Other()
    given, out = other.array((9, *SHAPE)), other.array((9, CLASSES))
    batch = frames(9)
    other.write(given, batch)
    with other:
        driver.cuCtxSynchronize()

    def use(attempt: Any, session: room.Session) -> None:
        attempt(lambda: session.fill(given, out))
        for count in (3, 3, 3, 3, 2):
            answer = attempt(lambda count=count: session(batch[:count]))
            assert answer is None or np.array_equal(answer, logits(batch[:count]))
        view(out.address, out.shape)[:] = 0
        if attempt(lambda: session.fill(given, out) or True):
            assert np.array_equal(view(out.address, out.shape), logits(batch))

    found = faults(package, use)
    other.close()
    return {**found, **dict.fromkeys(LEAKS, 0), **left()}


def faults(package: str, use: Callable[[Any, room.Session], None] | None = None) -> Any:
    """Each call of the driver fails once, for every place in the life of a device and its session."""
    tiny = Tiny(enqueue)
    live(package, tiny, use)  # what is only done once is not counted
    before = {name: driver.double_calls(name) for name in called()}
    assert live(package, tiny, use) is None
    usual = {name: driver.double_calls(name) - before[name] for name in before}
    # A context that cannot be left stays where it is, whatever one does; the other is asked by the doubles.
    spared = (b"cuCtxPopCurrent", b"cuStreamIsCapturing")
    usual = {name: count for name, count in usual.items() if count and name not in spared}
    report: dict[str, Any] = {"tried": 0, "told": 0, "bad": [], "functions": sorted(name.decode() for name in usual)}
    for name, count in usual.items():
        for after in range(count):
            before_it = held()
            assert driver.double_fail(name, 999, after, 0) == 0
            text = str(live(package, tiny, use) or "")
            driver.double_recover()
            gc.collect()
            report["tried"] += 1
            report["told"] += bool(text)
            found = held() - before_it
            if text and not (" failed at " in text and "doctor" in text):
                report["bad"].append(f"{name!r} {after}: {text}")
            if found or tiny.alive:
                report["bad"].append(f"{name!r} {after}: {found} are left, and {tiny.alive}; {text}")
            if not text:
                report.setdefault("silent", []).append(name.decode())
    return {**report, "sins": {name: count for name, count in counts(*SINS).items() if count}, **left()}


def held() -> int:
    return sum(counts(*LEAKS).values())


def called() -> list[bytes]:
    names: list[bytes] = []
    while driver.double_called(len(names)):
        names.append(driver.double_called(len(names)))
    return names


def gpu_arrays(package: str) -> Any:
    """Another library writes frames on its own stream; nobody waits for it but the session."""
    other = Other()
    device = open_with(package)
    session = open_tiny(Tiny(enqueue), device)
    wrong = []
    for count in BATCHES:
        given, out = other.array((count, *SHAPE)), other.array((count, CLASSES))
        for seed in range(3):
            batch = frames(count, seed)
            other.write(given, batch)
            session.fill(given, out)
            if not np.array_equal(view(out.address, out.shape), logits(batch)):
                wrong.append(f"{count} from there to there")
            other.write(given, -batch)
            answer = np.empty((count, CLASSES), np.float32)
            session.fill(given, answer)
            if not np.array_equal(answer, logits(-batch)):
                wrong.append(f"{count} from there to here")
            other.write(out, answer * 0 + 5)  # must be over before the logits come
            session.fill(batch, out)
            if not np.array_equal(view(out.address, out.shape), logits(batch)):
                wrong.append(f"{count} from here to there")
    session.close()
    device.close()
    other.close()
    return {"wrong": wrong, "left": left()}


def recorded(package: str) -> Any:
    """Eight threads on three contexts, with and without arrays on the GPU, while batch sizes are being recorded."""
    other = Other()
    device = open_with(package)
    tiny = Tiny(enqueue)
    session = open_tiny(tiny, device, contexts=3, cuda_graphs=True)
    wrong: list[str] = []
    batch = frames(4)
    arrays = [(other.array((4, *SHAPE)), other.array((4, CLASSES))) for _ in range(8)]
    for given, _ in arrays:
        other.write(given, batch)

    def work(number: int) -> None:
        given, out = arrays[number]
        try:
            for call in range(200):
                rows = 4 if call < 150 else 2 + call // 8 % 2
                if number % 2:
                    answer: np.ndarray = session(batch[:rows])
                else:
                    session.fill(given[:rows], out[:rows])
                    answer = view(out.address, (rows, CLASSES))
                if not np.array_equal(answer, logits(batch[:rows])):
                    wrong.append(f"thread {number}, call {call}")
        except BaseException as problem:
            wrong.append(repr(problem))

    def allocate() -> None:
        while not over.wait(0.0001):
            if not other.allocate_and_free():
                wrong.append("another library could not allocate")

    over = threading.Event()
    allocating = threading.Thread(target=allocate)
    allocating.start()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    over.set()
    allocating.join()
    report = {"wrong": wrong[:5], "state": session.cuda_graphs, "executed": tiny.executed}
    names = ("cuStreamBeginCapture", "cuGraphLaunch", "cuGraphExecDestroy")
    session.close()
    report["calls"] = [driver.double_calls(name.encode()) for name in names]
    device.close()
    other.close()
    return {**report, "left": left()}


def unrecordable(package: str) -> Any:
    """Engines that wait for their own stream, or allocate: the capture fails, and calls run as without."""
    report = {}
    for how in ("in silence", "and says so", "allocates"):
        device = open_with(package)
        tiny = Tiny(enqueue)
        tiny.answers["waits within"] = how
        session = open_tiny(tiny, device, contexts=2, cuda_graphs=True)
        if how == "allocates":
            tiny.wait = lambda stream: driver.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(8))
        right = [np.array_equal(session(frames(3, seed)), logits(frames(3, seed))) for seed in range(20)]
        report[how] = [all(right), session.cuda_graphs]
        session.close()
        device.close()
    return {**report, "left": left()}


def lost(package: str) -> Any:
    """The GPU is lost between two calls."""
    device = open_with(package)
    session = open_tiny(Tiny(enqueue), device)
    session(frames(3))
    driver.double_lose(719)
    said = []
    for attempt in (lambda: session(frames(3)), lambda: session(frames(3)), session.close, lambda: session(frames(3))):
        try:
            attempt()
            said.append("")
        except BackendError as problem:
            said.append(str(problem))
    return {"said": said, **counts("depth")}


def closing(package: str) -> Any:
    """One thread closes while others run and wait."""
    device = open_with(package)
    tiny = Tiny(enqueue)
    session = open_tiny(tiny, device, contexts=2)
    tiny.seconds = 0.2
    ends: list[str] = []

    def work() -> None:
        try:
            ends.append("good" if np.array_equal(session(batch), logits(batch)) else "wrong")
        except BackendError as problem:
            ends.append(str(problem))

    batch = frames(4)
    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    while len(session._busy) < session.contexts or len(_waiting) < 2:
        time.sleep(0.005)
    closers = [threading.Thread(target=session.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for worker in (*closers, *workers):
        worker.join()
    work()
    session.close()
    device.close()
    return {"ends": sorted(ends), "left": left()}


def memory(package: str) -> Any:
    """There is memory for one context and a half."""
    one = 4 * 4 * (int(np.prod(SHAPE)) + CLASSES)
    os.environ["DOUBLE_MEMORY"] = str(one + one // 2)
    device = open_with(package)
    tiny = Tiny(enqueue)
    try:
        open_tiny(tiny, device, contexts=2)
    except BackendError as problem:
        said = str(problem)
    after = left()
    session = open_tiny(tiny, device, contexts=1)
    right = np.array_equal(session(frames(9)), logits(frames(9)))
    session.close()
    device.close()
    return {"said": said, "after": after, "right": right, "left": left()}


def among_others(package: str) -> Any:
    """The caller's thread has a context of its own; it is current before and after."""
    current, other = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuCtxCreate_v2(ctypes.byref(other), 0, 0) == 0
    device = open_with(package)
    session = open_tiny(Tiny(enqueue), device)
    right = np.array_equal(session(frames(5)), logits(frames(5)))
    session.close()
    device.close()
    driver.cuCtxGetCurrent(ctypes.byref(current))
    return {"right": right, "kept": current.value == other.value, **counts("depth", "strangers", "streams")}


def own_device(package: str) -> Any:
    """A session opens its device itself, through whichever package is there."""
    session = open_tiny(Tiny(enqueue), None)
    right = np.array_equal(session(frames(5)), logits(frames(5)))
    kind = type(session._device).__name__
    session.close()
    return {"right": right, "kind": kind, "left": left(), **counts("retained")}


def refusals(package: str) -> Any:
    """No such GPU, and what open_device makes of it."""
    said = []
    for index in (3, -1):
        try:
            open_device(index)
        except BackendError as problem:
            said.append(str(problem))
    return said


def none(package: str) -> Any:
    """DOUBLE_DEVICES=0: the driver is there, and no GPU."""
    try:
        open_device()
    except BackendError as problem:
        return str(problem)
    return None


def seen(package: str) -> Any:
    """What the driver says where no package is asked, and that asking leaves no context behind."""
    return [driver_sees_a_gpu(), left()]


def unclosed(package: str) -> Any:
    """The process ends with a session open, used by another thread than the one that opened it."""
    if package == "pycuda":
        atexit.register(lambda: os._exit(1) if driver.double_count(b"retained") else None)
    session = open_tiny(Tiny(enqueue), open_with(package))
    worker = threading.Thread(target=session, args=(frames(5),))
    worker.start()
    worker.join()
    globals()["kept"] = session
    return "ended"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(globals()[sys.argv[2]](sys.argv[1])) + "\n")
