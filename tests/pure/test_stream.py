"""A stream: order, room, errors in their place, and an end without a thread left over.

Nothing here sleeps to let another thread go first: where one has to be ahead, it is waited for, and a test that waits
in vain is ended by the time limit, with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, MutableSet, Tuple, Type

import numpy as np
import pytest

from edgeres.errors import BackendError, SampleError
from edgeres.runtime import stream as stream_module
from edgeres.runtime.stream import THREAD_NAME, Stages, answers

LIMIT = 60.0  # seconds

Summing = Callable[..., Any]


def threads() -> List[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.fixture(autouse=True)
def _limits(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """End a test that hangs, and refuse one that leaves a thread."""
    with capfd.disabled():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=terminal)
    try:
        yield
        gc.collect()
        for thread in threads():
            thread.join(LIMIT / 2)
        assert threads() == []
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(terminal)


def until(happened: Callable[[], bool]) -> None:
    """Wait for another thread; the time limit ends it."""
    while not happened():
        time.sleep(0.001)


def frame(number: int) -> np.ndarray:
    """Return a frame uint8 (4, 4, 3) whose pixels are all ``number``."""
    return np.full((4, 4, 3), number, np.uint8)


def numbers(found: Any) -> List[int]:
    """Return which frames some answers (3,) are to."""
    return [int(logits[0]) // 16 for logits in found]


def gather(stream: Iterable[np.ndarray], found: List[int], each: Callable[[], object] = lambda: None) -> None:
    """Add to ``found`` which frames the answers are to, and do something after each: the consumer's work."""
    for answer in stream:
        found += numbers([answer])
        each()


class Camera:
    """Gives frames 0, 1, … and tells how often it was asked for one, and whether it was closed."""

    def __init__(self, count: int = 250) -> None:
        self.count = count
        self.asked = 0
        self.closed = threading.Event()
        self.before: Callable[[int], None] = lambda number: None
        """Is called, in the thread that reads, before each frame comes."""

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for number in range(self.count):
                self.asked = number + 1
                self.before(number)
                yield frame(number)
        finally:
            self.closed.set()


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("largest", [None, 2])
def test_answers_come_in_order_one_for_each_item(summing: Summing, depth: int, contexts: int, largest: Any) -> None:
    engine, _ = summing(contexts=contexts, largest=largest)
    random = np.random.default_rng(depth)
    batches = [random.integers(0, 256, (1 + index % 5, 4, 4, 3), dtype=np.uint8) for index in range(60)]
    items: List[Any] = []
    for index, batch in enumerate(batches):
        floats = batch.transpose(0, 3, 1, 2).astype(np.float32)
        items.append([batch, batch[0], floats, floats[0], (batch, index), (batch[0], "header")][index % 6])
    found = list(engine.stream(iter(items), depth=depth))
    assert len(found) == len(items)
    for index, (answer, batch) in enumerate(zip(found, batches)):
        wanted = batch.sum((1, 2), dtype=np.int64)
        if index % 6 >= 4:
            assert answer[1] == (index if index % 6 == 4 else "header")
            answer = answer[0]
        np.testing.assert_array_equal(answer, wanted[0] if index % 2 else wanted)


def test_an_empty_source_has_no_answers(summing: Summing) -> None:
    engine, _ = summing()
    assert list(engine.stream([])) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("contexts", [1, 3])
def test_never_more_than_depth_items_are_under_way_and_always_as_many(
    summing: Summing, depth: int, contexts: int
) -> None:
    engine, _ = summing(contexts=contexts)
    camera = Camera(40)
    found: List[int] = []
    handled: List[int] = []
    ahead: List[int] = []
    camera.before = lambda number: ahead.append(number + 1 - len(handled))

    def work() -> None:
        """Look at an answer: it is one of those under way, and meanwhile the source gives the others."""
        until(lambda: camera.asked >= min(40, len(handled) + depth))
        handled.append(found[-1])

    gather(engine.stream(camera, depth), found, work)
    assert found == handled == list(range(40))
    assert max(ahead) == depth


class Header:
    """Something that can be seen to be forgotten."""


def test_what_was_answered_is_forgotten(summing: Summing) -> None:
    engine, _ = summing()
    alive: MutableSet[Header] = weakref.WeakSet()

    def source() -> Iterator[Tuple[np.ndarray, Header]]:
        for number in range(30):
            header = Header()
            alive.add(header)
            yield frame(number), header
            del header

    stream = engine.stream(source(), depth=3)
    for _ in range(30):
        next(stream)
        until(lambda: len(alive) <= 3)
    assert next(stream, None) is None
    until(lambda: len(alive) == 0)


def test_reading_preparing_and_computing_happen_at_a_time(summing: Summing) -> None:
    engine, runner = summing()
    camera = Camera(30)
    # Each inference but the last two ends only when the second frame behind it has been asked for.
    runner.meanwhile = lambda batch: until(lambda: camera.asked >= min(30, int(np.rint(batch.flat[0])) + 3))
    assert numbers(engine.stream(camera, depth=3)) == list(range(30))


def test_the_engine_computes_while_the_consumer_works(summing: Summing) -> None:
    engine, runner = summing()
    found: List[int] = []
    gather(engine.stream(Camera(30)), found, lambda: until(lambda: len(runner.batches) >= min(30, len(found) + 1)))
    assert found == list(range(30))


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_as_many_batches_are_computed_at_a_time_as_the_engine_has_contexts(summing: Summing, contexts: int) -> None:
    engine, runner = summing(contexts=contexts)
    together = threading.Barrier(contexts)
    runner.meanwhile = lambda batch: together.wait(LIMIT) and None
    assert numbers(engine.stream(Camera(30), depth=6)) == list(range(30))
    assert runner.most_at_work == contexts


def test_with_one_context_inference_is_in_order_too(summing: Summing) -> None:
    engine, runner = summing()
    list(engine.stream(Camera(200), depth=8))
    assert [int(np.rint(batch.flat[0])) for batch in runner.batches] == list(range(200))
    assert runner.most_at_work == 1


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, SystemExit, SampleError])
@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("drop", [False, True])
def test_an_error_of_the_source_comes_in_its_place(
    summing: Summing, kind: Type[BaseException], depth: int, drop: bool
) -> None:
    engine, _ = summing()
    problem = kind("unplugged")
    answered = threading.Semaphore()

    def source() -> Iterator[np.ndarray]:
        for number in range(7):
            answered.acquire()  # nothing is dropped, where each frame waits for the answer to the one before
            yield frame(number)
        raise problem

    found: List[int] = []
    with pytest.raises(kind, match="unplugged") as caught:
        gather(engine.stream(source(), depth, drop), found, answered.release)
    assert caught.value is problem
    assert found == list(range(7))
    assert threads() == []


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize(
    ("bad", "kind", "told"),
    [
        (np.zeros((4, 4)), BackendError, r"item 5 of the stream: an engine takes .*, not float64 \(4, 4\)"),
        (np.zeros((2, 4, 3), np.uint8), SampleError, "item 5 of the stream: a frame .* does not cover the crop"),
        (np.full((3, 4, 4), np.nan, np.float32), BackendError, "item 5 of the stream: the input holds NaN"),
        ((frame(0), 1, 2), BackendError, "item 5 of the stream: .* not a tuple of 3"),
        (None, BackendError, "item 5 of the stream: an engine takes an array, not a NoneType"),
    ],
)
def test_an_error_of_the_engine_comes_in_its_place(
    summing: Summing, bad: Any, kind: Type[Exception], told: str, depth: int, contexts: int
) -> None:
    engine, _ = summing(contexts=contexts)
    items = [*map(frame, range(5)), bad, *map(frame, range(6, 30))]
    found: List[int] = []
    with pytest.raises(kind, match=told) as caught:
        gather(engine.stream(items, depth), found)
    assert isinstance(caught.value.__cause__, kind)
    assert found == list(range(5))
    assert threads() == []


def test_an_error_that_is_none_of_ours_is_not_touched(summing: Summing) -> None:
    engine, runner = summing()
    problem = ZeroDivisionError("a bug")

    def fail(batch: np.ndarray) -> None:
        raise problem

    runner.meanwhile = fail
    with pytest.raises(ZeroDivisionError) as caught:
        list(engine.stream(Camera()))
    assert caught.value is problem


def test_closing_the_engine_is_told_after_the_answers_before_it(summing: Summing) -> None:
    engine, _ = summing()
    found: List[int] = []
    with pytest.raises(BackendError, match=r"item \d of the stream: this engine is closed\. Load the bundle again\."):
        gather(engine.stream(Camera()), found, lambda: len(found) == 3 and engine.close())
    assert found == list(range(len(found)))
    assert len(found) in (3, 4)  # the fourth may have been computed before


@pytest.mark.parametrize("how", ["break", "close", "forget", "raise"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_an_early_stop_ends_threads_and_source(summing: Summing, how: str, depth: int) -> None:
    engine, runner = summing()
    camera = Camera()
    stream = engine.stream(camera, depth=depth)
    if how == "break":
        for _ in stream:
            break
        del stream
    elif how == "close":
        next(stream)
        stream.close()
        assert next(stream, None) is None
        del stream
    elif how == "forget":
        next(stream)
        del stream
    else:
        with pytest.raises(ZeroDivisionError):
            gather(stream, [], lambda: 1 // 0)
        del stream
    gc.collect()
    assert threads() == []
    assert camera.closed.is_set()
    assert camera.asked <= depth
    assert len(runner.batches) <= depth
    assert engine(frame(9)[np.newaxis]).tolist() == [[144, 144, 144]]  # and can go on


def test_a_stream_that_nobody_asks_starts_nothing(summing: Summing) -> None:
    engine, _ = summing()
    camera = Camera()
    stream = engine.stream(camera)
    assert threads() == []
    stream.close()
    assert camera.asked == 0


@pytest.mark.parametrize("ends", ["with a frame", "with an error"])
def test_a_source_that_blocks_does_not_keep_the_stream_from_ending(
    summing: Summing, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    engine, runner = summing()
    unblock, blocked = threading.Event(), threading.Event()

    def source() -> Iterator[np.ndarray]:
        yield frame(0)
        blocked.set()
        unblock.wait()
        if ends == "with an error":
            raise OSError("unplugged")
        yield frame(1)

    stream = engine.stream(source())
    assert numbers([next(stream)]) == [0]
    blocked.wait()
    monkeypatch.setattr(stream_module, "PATIENCE", 0.01)
    stream.close()
    assert [thread.name for thread in threads()] == [f"{THREAD_NAME}-reader"]
    unblock.set()  # what it still gives goes nowhere
    for thread in threads():
        thread.join()
    assert len(runner.batches) == 1


def test_a_slow_source_is_waited_for(summing: Summing) -> None:
    """What comes behind the loop may close the camera: nobody reads from it any more."""
    engine, _ = summing()
    camera = Camera()
    camera.before = lambda number: time.sleep(0.05)
    for _ in engine.stream(camera):
        break
    gc.collect()
    assert threads() == []


def test_a_worker_may_end_its_own_stream() -> None:
    """Garbage collection runs in any thread, and so may what it ends."""
    closed = threading.Event()

    def infer(item: int) -> int:
        if item == 1:
            until(may_close.is_set)
            stream.close()
            closed.set()
        return item

    may_close = threading.Event()
    stream = answers(iter(range(100)), Stages(lambda item: item, infer, 1), 2, False)
    assert next(stream) == 0
    may_close.set()
    closed.wait()
    assert list(stream) == []


def test_streams_and_calls_share_an_engine(summing: Summing) -> None:
    engine, _ = summing(contexts=2)
    found: List[Any] = [None] * 4

    def watch(index: int) -> None:
        if index % 2:
            found[index] = numbers(engine.stream(Camera(200), depth=3))
        else:
            found[index] = numbers(engine(frame(number)[np.newaxis])[0] for number in range(200))

    workers = [threading.Thread(target=watch, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [list(range(200))] * 4


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_outdated_before_it_begins_is_dropped(summing: Summing, depth: int) -> None:
    engine, runner = summing()
    camera = Camera(100)
    begun = threading.Event()

    def wait_for_first(number: int) -> None:
        if number == 1:
            begun.wait()

    def wait_for_last(batch: np.ndarray) -> None:
        begun.set()
        camera.closed.wait()

    camera.before, runner.meanwhile = wait_for_first, wait_for_last
    found = numbers(engine.stream(camera, depth=depth, drop=True))
    assert (found[0], found[-1]) == (0, 99)
    assert len(found) <= 1 + depth
    assert found == sorted(found)


def test_with_depth_one_the_next_answer_is_to_the_newest_frame(summing: Summing) -> None:
    engine, _ = summing()
    camera = Camera(100)
    found: List[int] = []
    camera.before = lambda number: until(lambda: number <= 10 * len(found))
    # While the consumer works ten frames come, and another is asked for.
    wait = lambda: until(lambda: camera.asked >= 10 * len(found) + 2 or camera.closed.is_set())  # noqa: E731
    gather(engine.stream(camera, depth=1, drop=True), found, wait)
    assert found == [0, *range(10, 100, 10), 99]


@pytest.mark.parametrize("depth", [0, -1, 1.5, None])
def test_a_depth_that_is_none_is_refused_at_once(summing: Summing, depth: Any) -> None:
    engine, _ = summing()
    with pytest.raises(BackendError, match=f"depth is {depth}: give a whole number, 1 or more"):
        engine.stream([], depth=depth)


def test_what_cannot_be_iterated_is_refused_at_once(summing: Summing) -> None:
    engine, _ = summing()
    with pytest.raises(BackendError, match="not one int"):
        engine.stream(5)


PROGRAM = """
import sys, threading
from edgeres.runtime.stream import Stages, answers

def source():
    yield from range(3)
    {source}

stream = answers(source(), Stages(lambda item: item, lambda item: item, 1), 2, False)
for item in stream:
    if item == 2:
        print("ready", flush=True)
        {consumer}
"""
# In naps: in any Python a wait without an end misses a Ctrl-C that comes just before it, about once in 1,000 times.
BLOCK = "while not threading.Event().wait(0.1): pass"


def run(source: str, consumer: str, interrupted: bool) -> Tuple[int, str]:
    """Return how a program with a stream ends, by itself or by Ctrl-C; the time limit would end the test."""
    here = str(Path(stream_module.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(source=source, consumer=consumer)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            if interrupted:
                program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=LIMIT / 2)
        finally:
            program.kill()
    return program.returncode, errors


@pytest.mark.parametrize(("source", "consumer"), [("pass", BLOCK), (BLOCK, "pass"), ("yield from range(10**9)", BLOCK)])
def test_ctrl_c_ends_a_program_that_streams(source: str, consumer: str) -> None:
    code, errors = run(source, consumer, interrupted=True)
    assert code in (1, -signal.SIGINT)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1


@pytest.mark.parametrize("source", ["pass", BLOCK, "yield from range(10**9)"])
def test_a_program_ends_with_a_stream_left_open(source: str) -> None:
    assert run(source, "break", interrupted=False) == (0, "")
