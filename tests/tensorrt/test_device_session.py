"""The session over arrays on the GPU, and with CUDA graphs, on doubles of TensorRT and of the GPU in Python."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeres.backends.tensorrt import session as room
from edgeres.backends.tensorrt.graphs import STEADY
from edgeres.backends.tensorrt.session import Session
from edgeres.device_arrays import DeviceArray, device_array
from edgeres.errors import BackendError


def _load() -> Any:
    place = Path(__file__).with_name("libcuda") / "tiny_tensorrt.py"
    spec = importlib.util.spec_from_file_location("tiny_tensorrt_on_devices", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DOUBLE = _load()
frames, logits, view, CLASSES = DOUBLE.frames, DOUBLE.logits, DOUBLE.view, DOUBLE.CLASSES
SIZES = (1, 2, 3, 4, 5, 8, 9, 13)  # the engine takes 2 to 4


class Bench:
    """A GPU and a TensorRT, a session on them, and arrays of another library on the same GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = DOUBLE.HostDevice()
        self.tiny = DOUBLE.Tiny(self.device.enqueue)
        self.tiny.recording = self.device.recorded.__contains__
        self.tiny.wait = self.device.synchronize
        monkeypatch.setattr(room, "load_module", lambda flavour: self.tiny.module)

    def open(self, contexts: int = 1, cuda_graphs: bool = False) -> Session:
        return room.open_session(
            DOUBLE.PLAN, DOUBLE.BUILT_FOR, device=self.device, contexts=contexts, cuda_graphs=cuda_graphs
        )

    def given(self, array: np.ndarray, ready: bool = True) -> DeviceArray:
        """Return a copy of an array on the GPU; unless it is ready, its producer is still about to write it."""

        class Producer:
            __cuda_array_interface__: Any

        with self.device.current():
            address = self.device.allocate(array.nbytes)

        def write() -> None:
            view(address, array.shape, array.dtype.type)[:] = array

        self.device.others.append(write)
        if ready:
            self.device.others.pop()()
        producer = Producer()
        producer.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (address, False), "version": 2
        }  # fmt: skip
        return device_array(producer)

    def read(self, array: DeviceArray) -> np.ndarray:
        return view(array.address, array.shape).copy()

    def assert_empty(self, arrays: int) -> None:
        gc.collect()
        assert self.device.held == arrays
        assert self.device.pushes == self.device.pops
        assert self.tiny.alive == []


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("inside", "outside"), [(True, True), (True, False), (False, True)])
def test_frames_and_logits_lie_where_they_like(
    bench: Bench, count: int, inside: bool, outside: bool, cuda_graphs: bool
) -> None:
    session = bench.open(cuda_graphs=cuda_graphs)
    for seed in range(STEADY + 3):
        batch = frames(count, seed)
        nothing = np.full((count, CLASSES), np.nan, np.float32)
        given = bench.given(batch, ready=False) if inside else batch
        out = bench.given(nothing) if outside else nothing
        session.fill(given, out)
        assert np.array_equal(bench.read(out) if outside else out, logits(batch))
        if inside:
            assert np.array_equal(bench.read(given), batch), "the frames were written to"
    session.close()
    bench.assert_empty(arrays=(STEADY + 3) * (inside + outside))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_pixels_lie_where_they_like(bench: Bench, count: int, inside: bool, cuda_graphs: bool) -> None:
    bench.tiny.types = ("UINT8", "FLOAT")
    session = bench.open(cuda_graphs=cuda_graphs)
    for seed in range(STEADY + 3):
        batch = np.random.default_rng(seed).integers(0, 256, (count, *DOUBLE.SHAPE), np.uint8)
        out = np.full((count, CLASSES), np.nan, np.float32)
        session.fill(bench.given(batch, ready=False) if inside else batch, out)
        np.testing.assert_array_equal(out, logits(batch.astype(np.float32)))
    with pytest.raises(BackendError, match=r"takes uint8 .*not float32"):
        session.fill(bench.given(frames(count)), out)
    session.close()


def test_frames_on_the_gpu_are_never_copied_to_the_host(bench: Bench) -> None:
    session = bench.open()
    bench.device.calls.clear()
    session.fill(bench.given(frames(8)), bench.given(np.zeros((8, CLASSES), np.float32)))
    assert not {"upload", "download"} & set(bench.device.calls)
    assert bench.device.calls.count("copy") == 4
    session.close()


def test_nothing_is_written_beside_the_callers_array(bench: Bench) -> None:
    session = bench.open()
    room_ = bench.given(np.full((9, CLASSES), 7, np.float32))
    session.fill(bench.given(frames(5)), room_[2:7])
    assert np.array_equal(bench.read(room_[2:7]), logits(frames(5)))
    assert (bench.read(room_[:2]) == 7).all()
    assert (bench.read(room_[7:]) == 7).all()
    session.close()


def test_a_reader_of_out_is_not_overtaken(bench: Bench) -> None:
    """It read the earlier logits on a stream of its own, and that read is still under way."""
    session = bench.open()
    out = bench.given(np.full((2, CLASSES), 5, np.float32))
    seen: list[np.ndarray] = []
    bench.device.others.append(lambda: seen.append(bench.read(out)))
    session.fill(frames(2), out)
    assert (seen[0] == 5).all()
    session.close()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (frames(2)[:, :2], r"float32 \(N, 3, 4, 5\), not float32 \(2, 2, 4, 5\)\. On a GPU edgeres neither resizes"),
        (frames(2)[0], r"not float32 \(3, 4, 5\)\. On a GPU"),
    ],
)
def test_frames_that_do_not_fit(bench: Bench, array: np.ndarray, told: str) -> None:
    session = bench.open()
    with pytest.raises(BackendError, match=told):
        session.fill(bench.given(np.ascontiguousarray(array)), np.empty((2, CLASSES), np.float32))
    assert bench.tiny.executed == 0
    session.close()


def test_what_would_be_written_beyond_out_is_refused(bench: Bench) -> None:
    session = bench.open()
    with pytest.raises(BackendError, match=r"float32 array \(3, 7\), not float32 \(2, 7\)"):
        session.fill(bench.given(frames(3)), bench.given(np.zeros((2, CLASSES), np.float32)))
    session.close()


def test_another_gpus_memory_is_refused(bench: Bench) -> None:
    session = bench.open()
    there = DeviceArray(4096, (2, *DOUBLE.SHAPE), np.dtype(np.float32), False, 1, None)
    with pytest.raises(BackendError, match="lies on GPU 1, the engine on GPU 0"):
        session.fill(there, np.empty((2, CLASSES), np.float32))
    session.close()


@pytest.mark.parametrize("method", ["synchronize_all", "copy"])
@pytest.mark.parametrize("after", [0, 1])
def test_what_cuda_refuses_of_arrays_on_the_gpu(bench: Bench, method: str, after: int) -> None:
    session = bench.open()
    given, out = bench.given(frames(3)), bench.given(np.zeros((3, CLASSES), np.float32))
    if method == "synchronize_all" and after:
        session.fill(given, out)
    bench.device.fails[method] = 0 if method == "synchronize_all" else after
    with pytest.raises(BackendError, match="injected"):
        session.fill(given, out)
    bench.device.fails.clear()
    session.fill(given, out)
    assert np.array_equal(bench.read(out), logits(frames(3)))
    session.close()
    bench.assert_empty(arrays=2)


def test_a_batch_size_that_comes_again_is_recorded(bench: Bench) -> None:
    session = bench.open(cuda_graphs=True)
    states = []
    for seed in range(STEADY + 4):
        assert np.array_equal(session(frames(3, seed)), logits(frames(3, seed)))
        states.append(session.cuda_graphs)
    assert states == ["not yet"] * STEADY + ["on"] * 4
    assert bench.device.calls.count("capture") == 1
    assert bench.device.calls.count("launch") == 4
    assert bench.tiny.executed == STEADY + 4
    session.close()
    bench.assert_empty(arrays=0)


def test_a_graph_ends_when_the_batch_size_changes(bench: Bench) -> None:
    """The double's context notices work of an earlier state of itself."""
    session = bench.open(cuda_graphs=True)
    for count in [4] * (STEADY + 2) + [2] * (STEADY + 2) + [4, 2, 9, 4]:
        assert np.array_equal(session(frames(count)), logits(frames(count)))
    assert bench.device.calls.count("capture") == 2
    assert bench.device.calls.count("launch") == 4
    assert bench.device.graphs == []
    session.close()
    bench.assert_empty(arrays=0)


def test_graphs_are_off_unless_asked_for(bench: Bench) -> None:
    session = bench.open()
    for _ in range(STEADY + 3):
        session(frames(3))
    assert session.cuda_graphs == "off"
    assert "capture" not in bench.device.calls
    session.close()


@pytest.mark.parametrize("how", ["and says so", "in silence"])
def test_an_engine_that_waits_for_its_stream_runs_without_a_graph(bench: Bench, how: str) -> None:
    bench.tiny.answers["waits within"] = how
    session = bench.open(contexts=2, cuda_graphs=True)
    for seed in range(STEADY + 5):
        assert np.array_equal(session(frames(5, seed)), logits(frames(5, seed)))
        assert np.array_equal(session(frames(3, seed)), logits(frames(3, seed)))
    for seed in range(STEADY + 5):
        assert np.array_equal(session(frames(3, seed)), logits(frames(3, seed)))
    assert "capturing" in session.cuda_graphs or "failed at recording" in session.cuda_graphs
    assert bench.device.calls.count("capture") == 1, "it is tried once"
    assert bench.device.graphs == []
    session.close()
    bench.assert_empty(arrays=0)


@pytest.mark.parametrize("method", ["capture", "launch", "destroy"])
def test_what_cuda_refuses_of_graphs(bench: Bench, method: str) -> None:
    session = bench.open(cuda_graphs=True)
    bench.device.fails[method] = 0
    told = []
    for count in [3] * (STEADY + 2) + [2, 3]:
        try:
            assert np.array_equal(session(frames(count)), logits(frames(count)))
        except BackendError as problem:
            told.append(str(problem))
            bench.device.fails.clear()
    assert [f"at {method}: injected" in text for text in told] == ([True] if method == "destroy" else [])
    assert ("injected" in session.cuda_graphs) == (method != "destroy")  # calls run without graphs from then on
    session.close()
    bench.assert_empty(arrays=0)


def test_an_error_ends_a_graph_and_the_next_call_runs(bench: Bench) -> None:
    session = bench.open(cuda_graphs=True)
    for _ in range(STEADY + 2):
        session(frames(3))
    bench.device.fails["download"] = 0
    with pytest.raises(BackendError, match="injected"):
        session(frames(3))
    bench.device.fails.clear()
    for seed in range(STEADY + 2):
        assert np.array_equal(session(frames(3, seed)), logits(frames(3, seed)))
    assert bench.device.calls.count("capture") == 2
    session.close()
    bench.assert_empty(arrays=0)


def test_threads_with_arrays_on_both_sides_answer_as_one(bench: Bench) -> None:
    session = bench.open(contexts=3)
    wrong: list[object] = []
    batches = {count: (frames(count), bench.given(frames(count))) for count in SIZES}
    outs = [{count: bench.given(np.zeros((count, CLASSES), np.float32)) for count in SIZES} for _ in range(6)]

    def work(number: int) -> None:
        try:
            for call in range(60):
                count = SIZES[(call + number) % len(SIZES)]
                host, there = batches[count]
                out = outs[number][count]
                session.fill(there if (call + number) % 3 else host, out)
                if not np.array_equal(bench.read(out), logits(host)) or not np.array_equal(session(host), logits(host)):
                    wrong.append((number, call))
        except BaseException as problem:
            wrong.append(problem)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    session.close()
    bench.assert_empty(arrays=7 * len(SIZES))
