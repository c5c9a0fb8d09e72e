"""Frames in, answers out, in order, while the next frames are read and prepared already.

A reader takes items from the source, and a few workers carry each through its two stages: ``prepare``, for several
items at a time, and ``infer``, in order and for as many as the engine has contexts. The consumer's own thread waits for
the oldest. What they share stands in one :class:`_Line`, under one condition.

The threads know the line and never the generator, so a consumer that forgets a stream ends it.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from typing import Any, Callable, Deque, Generator, Iterator, List, MutableSet, NamedTuple, Optional

from edgeres.errors import BackendError, SampleError

PATIENCE = 1.0  # seconds that a stream which ends waits for its source to come back from a read
NAP = 1.0  # seconds of one wait: Python misses a Ctrl-C between its last look for signals and a wait without an end

THREAD_NAME = "edgeres-stream"


class Stages(NamedTuple):
    """What is done with each item: ``infer(prepare(item))`` is its answer.

    ``contexts`` is how many calls of ``infer`` may run at a time; ``prepare`` must bear one more.
    """

    prepare: Callable[[Any], Any]
    infer: Callable[[Any], Any]
    contexts: int


def answers(source: Iterator[Any], stages: Stages, depth: int, drop: bool) -> Generator[Any, None, None]:
    """Yield the answer to each item of a source, in order.

    Args:
        source: read in a thread of its own, one item at a time.
        depth: so many items are under way at most, from the moment that the source is asked for one until the consumer
            asks for the answer behind it.
        drop: read on without regard to ``depth``, and forget what has not been begun when a newer item comes. One item
            that waits, and one that is read, are then held beside those under way.

    Raises:
        Exception: the source's own, or that of a stage, after the answers to all items before it.
    """
    line = _Line(source, stages, depth, drop)
    try:
        line.start()
        while True:
            answer = line.next_answer()
            if answer is None:
                return
            yield answer.pop()  # the consumer alone keeps it
            line.count_handled()
    finally:
        line.stop()


class _Job:
    """One item on its way. ``number`` is its place in the source, ``turn`` its place among those begun."""

    __slots__ = ("answer", "done", "error", "item", "number", "turn")

    def __init__(self, number: int, item: Any) -> None:
        self.number = number
        self.turn = -1
        self.item = item
        self.answer: Any = None
        self.error: Optional[BaseException] = None
        self.done = False


class _Line:
    """One stream's threads and what they share, all of it under ``_changed``.

    The condition's lock is one that its owner may take again: garbage collection can end a stream, this one or
    another, in the midst of anything.
    """

    def __init__(self, source: Iterator[Any], stages: Stages, depth: int, drop: bool) -> None:
        self._source = source
        self._stages = stages
        self._depth = depth
        self._drop = drop
        self._changed = threading.Condition(threading.RLock())
        self._waiting: Deque[_Job] = deque()  # read, not begun
        self._begun_jobs: Deque[_Job] = deque()  # begun, in order, not handed out
        self._taken = self._begun = self._inferred = self._handled = 0
        self._ended = False  # the source has no more
        self._error: Optional[BaseException] = None  # what it raised in place of an item
        self._stopped = False
        self._reader = self._thread(_read, "reader")
        self._workers: List[threading.Thread] = []

    def _thread(self, target: Callable[[_Line], None], role: str) -> threading.Thread:
        # Daemons: a source that never comes back must not keep the process from ending.
        return threading.Thread(target=target, args=(self,), name=f"{THREAD_NAME}-{role}", daemon=True)

    def start(self) -> None:
        _open.add(self)
        for _ in range(min(self._depth, self._stages.contexts + 1)):
            worker = self._thread(_work, "worker")
            worker.start()
            self._workers.append(worker)
        self._reader.start()

    def stop(self) -> None:
        """End the threads: workers after what they are computing, the reader once its source comes back.

        A source that takes longer than ``PATIENCE`` is left to itself; what it still gives or raises is dropped.
        """
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
            self._waiting.clear()
            self._begun_jobs.clear()
        if threading.current_thread() in (self._reader, *self._workers):
            return  # collected as garbage by a thread of its own, which may hold the condition
        for worker in self._workers:
            worker.join()
        if self._reader.ident is not None:  # started
            self._reader.join(PATIENCE)

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Wait, holding the condition; return whether the stream goes on."""
        while not self._stopped and not ready():
            self._changed.wait(NAP)
        return not self._stopped

    def read_one(self) -> bool:
        """Take an item from the source as soon as there is room; return whether to go on."""
        with self._changed:
            if not self._wait(lambda: self._drop or self._taken - self._handled < self._depth):
                return False
        try:
            job = _Job(self._taken, next(self._source))
        except BaseException as problem:  # the consumer gets it, whatever it is
            with self._changed:
                self._ended = True
                self._error = None if isinstance(problem, StopIteration) else problem
                self._changed.notify_all()
            return False
        with self._changed:
            if self._stopped:
                return False
            if self._drop:
                self._waiting.clear()
            self._waiting.append(job)
            self._taken += 1
            self._changed.notify_all()
            return True

    def begin(self) -> Optional[_Job]:
        """Return the next item to work on; None where none will come."""

        def ready() -> bool:
            return self._begun - self._handled < self._depth if self._waiting else self._ended

        with self._changed:
            if not self._wait(ready) or not self._waiting:
                return None
            job = self._waiting.popleft()
            job.turn = self._begun
            self._begun += 1
            self._begun_jobs.append(job)
            return job

    def process(self, job: _Job) -> None:
        """Carry an item through both stages."""
        prepared = None
        try:
            prepared = self._stages.prepare(job.item)
            job.item = None
        except BaseException as problem:
            job.error = _placed(problem, job.number)
        with self._changed:  # failed ones wait for their turn too, or two would have the same
            if not self._wait(lambda: job.turn < self._inferred + self._stages.contexts):
                return
        if job.error is None:
            try:
                job.answer = self._stages.infer(prepared)
            except BaseException as problem:
                job.error = _placed(problem, job.number)
        with self._changed:
            job.done = True
            self._inferred += 1
            self._changed.notify_all()

    def next_answer(self) -> Optional[List[Any]]:
        """Return the next answer, in a list of its own; None at the end."""

        def ready() -> bool:
            return self._begun_jobs[0].done if self._begun_jobs else self._ended and not self._waiting

        with self._changed:
            if not self._wait(ready):
                return None
            if self._begun_jobs:
                job = self._begun_jobs.popleft()
                error, job.error = job.error, None
            else:
                job = None
                error, self._error = self._error, None
        if error is None:
            return None if job is None else [job.answer]
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def count_handled(self) -> None:
        """The consumer came back for the next answer, so there is room for one more item."""
        with self._changed:
            self._handled += 1
            self._changed.notify_all()


def _read(line: _Line) -> None:
    while line.read_one():
        pass


def _work(line: _Line) -> None:
    while True:
        job = line.begin()
        if job is None:
            return
        line.process(job)
        del job  # or its answer would live until the next item comes


def _placed(problem: BaseException, number: int) -> BaseException:
    """Return an error of the engine with the place of its item in the source; any other as it is."""
    if not isinstance(problem, (BackendError, SampleError)):
        return problem
    told = type(problem)(f"item {number} of the stream: {problem}")
    told.__cause__ = problem
    return told


_open: MutableSet[_Line] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End what still runs while threads can still end: later, native code in them would meet a dying process."""
    for line in list(_open):
        line.stop()
