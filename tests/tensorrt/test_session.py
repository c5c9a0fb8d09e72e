"""The session over a tiny TensorRT and a tiny GPU, both in Python: what it computes, refuses, frees and says."""

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
from edgeres.backends.tensorrt.session import Session
from edgeres.errors import BackendError


def _load() -> Any:
    """Return the module of doubles, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("libcuda") / "tiny_tensorrt.py"
    spec = importlib.util.spec_from_file_location("tiny_tensorrt", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_tensorrt"] = module
    spec.loader.exec_module(module)
    return module


DOUBLE = _load()
PLAN, BUILT_FOR, SHAPE, CLASSES = DOUBLE.PLAN, DOUBLE.BUILT_FOR, DOUBLE.SHAPE, DOUBLE.CLASSES
frames, logits = DOUBLE.frames, DOUBLE.logits

CLOSED = "this engine is closed"


class Bench:
    """A GPU and a TensorRT, and sessions on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "10.3.0") -> None:
        self.device = DOUBLE.HostDevice()
        self.tiny = DOUBLE.Tiny(self.device.enqueue, version)
        self.built_for = {**BUILT_FOR, "tensorrt": version}
        monkeypatch.setattr(room, "load_module", lambda flavour: self.tiny.module)
        monkeypatch.setattr(room, "open_device", lambda: self.device)

    def open(self, plan: bytes = PLAN, contexts: int = 2, **facts: str) -> Session:
        built_for = {**self.built_for, **facts}
        return room.open_session(plan, built_for, device=self.device, contexts=contexts, place="build/net")

    def refused(self, **given: Any) -> str:
        """Return why a session does not open; nothing may be left of it."""
        with pytest.raises(BackendError) as caught:
            self.open(**given)
        text = str(caught.value)
        del caught
        self.assert_empty()
        return text

    def assert_empty(self) -> None:
        gc.collect()
        assert self.device.held == 0
        assert self.device.pushes == self.device.pops
        assert self.tiny.alive == []


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_batch_of_any_size(bench: Bench, count: int, dynamic: bool) -> None:
    """The profile takes 2 to 4; an engine of one size takes 4."""
    bench.tiny.dynamic = dynamic
    session = bench.open()
    answer = session(frames(count))
    assert answer.dtype == np.float32
    assert answer.shape == (count, CLASSES)
    assert np.array_equal(answer, logits(frames(count)))
    assert bench.tiny.executed == -(-count // 4)
    session.close()
    bench.assert_empty()


def test_what_it_says_of_itself(bench: Bench) -> None:
    session = bench.open()
    assert session.tensors == ("frames", "logits", SHAPE, CLASSES, 2, 4, np.float32)
    assert session.contexts == 2
    session.close()


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::2], lambda a: a[::-1], lambda a: np.asfortranarray(a), lambda a: a.view().reshape(a.shape)],
    ids=["every other", "backwards", "Fortran", "plain"],
)
def test_memory_of_any_order(bench: Bench, view: Any) -> None:
    session, batch = bench.open(), view(frames(10))
    batch.flags.writeable = False
    assert np.array_equal(session(batch), logits(np.ascontiguousarray(batch)))
    session.close()


def test_an_answer_is_the_callers_own(bench: Bench) -> None:
    session = bench.open(contexts=1)
    first = session(frames(3, seed=1))
    kept = first.copy()
    session(frames(3, seed=2))
    assert np.array_equal(first, kept)
    session.close()


def test_buffers_are_made_once(bench: Bench) -> None:
    session = bench.open(contexts=2)
    made = ("allocate", "pinned", "create_stream")
    opened = [bench.device.calls.count(name) for name in made]
    assert opened == [4, 4, 2]
    for count in (1, 4, 9):
        session(frames(count))
    assert [bench.device.calls.count(name) for name in made] == opened
    session.close()


def test_the_input_shape_is_set_when_it_changes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = bench.open(contexts=1)
    shapes: list[tuple[int, ...]] = []
    kind = DOUBLE.Context
    original = kind.set_input_shape

    def watched(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        shapes.append(shape)
        return original(context, name, shape)

    monkeypatch.setattr(kind, "set_input_shape", watched)
    for count in (4, 4, 1, 2, 9, 9):
        session(frames(count))
    assert [shape[0] for shape in shapes] == [2, 4, 2, 4, 2]
    session.close()


@pytest.mark.parametrize(
    "batch",
    [
        frames(2).astype(np.float64),
        frames(2).astype(">f4"),
        frames(2).astype(np.uint8),
        frames(2)[0],
        frames(2)[..., :4],
        frames(2)[None],
        frames(2).tolist(),
        None,
    ],
    ids=["float64", "big-endian", "uint8", "one frame", "narrow", "five axes", "a list", "None"],
)
def test_a_batch_that_does_not_fit(bench: Bench, batch: Any) -> None:
    session = bench.open()
    with pytest.raises(BackendError, match=r"takes float32 \(N, 3, 4, 5\), not "):
        session(batch)
    assert bench.tiny.executed == 0
    session.close()


REFUSALS: dict[str, Any] = {
    "Runtime": None,
    "deserialize_cuda_engine": None,
    "create_execution_context": [True, None],
    "set_optimization_profile_async": [True, False],
    "set_input_shape": [False],
    "set_tensor_address": [True, True, True, False],
    "classes": CLASSES + 1,
}
"""By what TensorRT refuses while a session opens: its answers."""


@pytest.mark.parametrize("method", REFUSALS)
def test_what_tensorrt_refuses_at_opening(bench: Bench, method: str) -> None:
    bench.tiny.answers[method] = REFUSALS[method]
    text = bench.refused()
    assert any(word in text for word in ("went wrong", "out of memory", "magic tag", "nullptr", "instead of")), text
    assert any(word in text for word in ("doctor", "Compile it again", "fewer contexts")), text
    kinds = {"runtime": 0, "engine": 1, "context": 2}
    died = [kinds[kind] for kind in bench.tiny.died]
    assert died == sorted(died, reverse=True), "TensorRT's objects must die backwards"


def test_a_plan_that_is_none(bench: Bench) -> None:
    text = bench.refused(plan=b"something else")
    assert "TensorRT 10.3.0 failed at opening this plan: the header's magic tag is wrong" in text
    assert "edgeres compile build/net" in text


def test_the_order_of_dying(bench: Bench) -> None:
    bench.open().close()
    assert bench.tiny.died == ["context", "context", "engine", "runtime"]


FOREIGN: dict[str, dict[str, Any]] = {
    "two inputs": {"modes": ("INPUT", "OUTPUT", "INPUT"), "types": ("FLOAT",) * 3},
    "no output": {"modes": ("INPUT",)},
    "half input": {"types": ("HALF", "FLOAT")},
    "half output": {"types": ("FLOAT", "HALF")},
    "feature maps": {"output": (-1, 7, 2, 2)},
    "unknown classes": {"output": (-1, -1)},
    "an empty profile": {"batch": (0, 0)},
}


@pytest.mark.parametrize("how", FOREIGN)
def test_an_engine_of_somebody_else(bench: Bench, how: str) -> None:
    vars(bench.tiny).update(FOREIGN[how])
    assert "edgeres did not build it" in bench.refused()


@pytest.mark.parametrize(
    ("version", "contexts"), [("8.5.2", 1), ("8.6.1", 1), ("10.0.1", 3), ("10.3.0", 3), ("11.4.0", 3)]
)
def test_tensorrt_8_gives_one_context_per_profile(monkeypatch: pytest.MonkeyPatch, version: str, contexts: int) -> None:
    bench = Bench(monkeypatch, version)
    session = bench.open(contexts=3)
    assert session.contexts == contexts
    assert np.array_equal(session(frames(5)), logits(frames(5)))
    session.close()


def test_no_contexts(bench: Bench) -> None:
    assert "at least one context" in bench.refused(contexts=0)


def test_a_plan_for_another_machine_is_not_looked_at(bench: Bench) -> None:
    bench.tiny.answers["deserialize_cuda_engine"] = AssertionError
    text = bench.refused(tensorrt="8.5.2", compute_capability="7.2")
    assert text == (
        "engine was built for TensorRT 8.5.2, sm_72; this machine has 10.3.0, sm_87. "
        "Compile it here: edgeres compile build/net"
    )
    assert bench.tiny.died == []


def test_a_dla_core_is_chosen_before_the_plan_is_opened(bench: Bench) -> None:
    bench.tiny.cores = 2
    session = bench.open(target="dla1")
    assert bench.tiny.core == 1
    session.close()


def test_a_dla_core_that_is_not_there(bench: Bench) -> None:
    text = bench.refused(target="dla0")
    assert "DLA core 0; this machine has 0" in text
    assert "--target gpu" in text


@pytest.mark.parametrize("method", ["current", "create_stream", "pinned", "allocate", "synchronize"])
@pytest.mark.parametrize("after", [0, 1])
def test_what_cuda_refuses_at_opening(bench: Bench, method: str, after: int) -> None:
    bench.device.fails[method] = after
    if method == "current" and after:
        bench.open()  # nothing is entered twice
        return
    assert "injected" in bench.refused()


def test_too_little_memory(bench: Bench) -> None:
    bench.device.limit = 1500
    assert "out of memory" in bench.refused()
    session = bench.open(contexts=1)
    assert np.array_equal(session(frames(5)), logits(frames(5)))
    session.close()


@pytest.mark.parametrize("method", ["current", "upload", "download", "synchronize"])
def test_what_cuda_refuses_while_running(bench: Bench, method: str) -> None:
    session = bench.open(contexts=1)
    bench.device.fails[method] = 0
    with pytest.raises(BackendError, match="injected"):
        session(frames(9))
    bench.device.fails.clear()
    assert np.array_equal(session(frames(9, seed=3)), logits(frames(9, seed=3)))
    session.close()
    bench.assert_empty()


@pytest.mark.parametrize(("method", "answers"), [("execute_async_v3", [True, False]), ("set_input_shape", [False])])
def test_what_tensorrt_refuses_while_running(bench: Bench, method: str, answers: list[bool]) -> None:
    session = bench.open(contexts=1)
    bench.tiny.answers[method] = answers
    with pytest.raises(BackendError, match=f"{method} went wrong. See what this machine has: edgeres doctor"):
        session(frames(9))
    assert np.array_equal(session(frames(9, seed=3)), logits(frames(9, seed=3)))
    session.close()
    bench.assert_empty()


def test_the_last_words_are_the_last(bench: Bench) -> None:
    """A record keeps so many complaints and no more; a session may live longer than that."""
    session = bench.open(contexts=1)
    for number in range(300):
        bench.tiny.answers["execute_async_v3"] = [False]
        with pytest.raises(BackendError, match="execute_async_v3 went wrong"):
            session(frames(number % 4 + 1))
    bench.tiny.answers["set_input_shape"] = [False]
    with pytest.raises(BackendError, match=r"at taking a batch of 2: set_input_shape went wrong\. See"):
        session(frames(1))
    session.close()


@pytest.mark.parametrize("method", ["free", "free_pinned", "destroy_stream"])
def test_what_cuda_refuses_at_closing(bench: Bench, method: str) -> None:
    session = bench.open()
    bench.device.fails[method] = 1
    with pytest.raises(BackendError, match="injected"):
        session.close()
    bench.assert_empty()
    session.close()
    with pytest.raises(BackendError, match=CLOSED):
        session(frames(1))


def test_closing_where_the_context_cannot_be_entered(bench: Bench) -> None:
    """TensorRT's objects die all the same, and the session is closed."""
    session = bench.open()
    bench.device.fails["current"] = 0
    with pytest.raises((BackendError, AssertionError)):
        session.close()
    gc.collect()
    assert bench.tiny.alive == []
    with pytest.raises(BackendError, match=CLOSED):
        session(frames(1))


def test_use_after_closing(bench: Bench) -> None:
    session = bench.open()
    session.close()
    session.close()
    bench.assert_empty()
    with pytest.raises(BackendError, match=r"closed. Load the bundle again."):
        session(frames(1))
    assert not bench.device.closed, "the device is the caller's"


def test_a_device_of_its_own_closes_with_it(bench: Bench) -> None:
    session = room.open_session(PLAN, bench.built_for)
    assert not bench.device.closed
    session.close()
    assert bench.device.closed
    bench.assert_empty()


@pytest.mark.parametrize("facts", [{"tensorrt": "8.5.2"}, {"target": "dla0"}])
def test_a_device_of_its_own_closes_where_nothing_opens(bench: Bench, facts: dict[str, str]) -> None:
    with pytest.raises(BackendError):
        room.open_session(PLAN, {**bench.built_for, **facts})
    assert bench.device.closed


def test_threads_answer_as_one(bench: Bench) -> None:
    session = bench.open(contexts=3)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for call in range(200):
                count = (call + number) % 9 + 1
                if not np.array_equal(session(frames(count, number)), logits(frames(count, number))):
                    wrong.append((number, call))
        except BaseException as problem:
            wrong.append(problem)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    session.close()
    bench.assert_empty()


def test_an_interrupted_close_may_be_repeated(bench: Bench) -> None:
    session = bench.open(contexts=1)
    call = object()
    session._take(call)
    waiting = session._changed.wait

    def interrupt() -> None:
        session._changed.wait = waiting
        raise KeyboardInterrupt

    session._changed.wait = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.close()
    session._give(call)
    assert np.array_equal(session(frames(3)), logits(frames(3)))
    session.close()
    bench.assert_empty()


def interrupted(session: Session, place: int) -> bool:
    """Run a batch with Ctrl-C at the so-manieth line of the session's own code; return whether it came so far."""
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != room.__file__ or frame.f_code.co_name not in (
            "__call__",
            "_run",
            "_take",
            "_give",
        ):
            return None
        if event in ("line", "return"):
            seen += 1
            if seen == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        session(frames(3))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def hang(timeout: float | None = None) -> bool:
    """Stand for a wait that nobody would end."""
    raise AssertionError("it waits for a call that is over")


def test_no_interrupt_loses_a_context(bench: Bench) -> None:
    """Wherever Ctrl-C comes, closing does not wait for a call that is over, and as many batches run as before."""
    places = 0
    while True:
        session = bench.open(contexts=2)
        came = interrupted(session, places + 1)
        assert session._busy == {}
        assert np.array_equal(session(frames(3)), logits(frames(3)))
        session._changed.wait = hang
        session.close()
        bench.assert_empty()
        if not came:
            break
        places += 1
    assert places > 20
