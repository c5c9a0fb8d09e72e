"""Attempts at a door, in a child with little memory and time, and what came of them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgeres.errors import EdgeresError

ACCEPTED, REFUSED = "accepted", "refused"
TRACEBACK, MEMORY, CRASH, HANG = "traceback", "memory", "crash", "hang"
OUTCOMES = (ACCEPTED, REFUSED, TRACEBACK, MEMORY, CRASH, HANG)
GOOD = (ACCEPTED, REFUSED)
MEMORY_LIMIT = 3 << 30  # bytes, beside what the process has already
MOST_MEMORY = 1 << 30  # bytes, likewise: what takes more than these counts as out of memory, whatever came of it
SECONDS = 60.0

Enter = Callable[[], object]


class Outcome(NamedTuple):
    """How an attempt ended, one of ``OUTCOMES``, and what was said."""

    end: str
    words: str = ""


def attempt(enter: Enter) -> Outcome:
    """Return how ``enter`` ends in a forked child."""
    return attempts([enter])[0]


def attempts(enters: Sequence[Enter]) -> list[Outcome]:
    """Return how each ends, one after the other in one child; where one takes the child with it, in another."""
    done: list[Outcome] = []
    while len(done) < len(enters):
        done += _in_one_child(enters[len(done) :])
    return done


def _in_one_child(enters: Sequence[Enter]) -> list[Outcome]:
    """Return the outcomes up to the one that ended the child, its own included."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which the child does not need
        child = os.fork()
    if not child:
        os.close(reader)
        with contextlib.suppress(BaseException):
            _work(enters, writer)
        os._exit(0)
    os.close(writer)
    done: list[Outcome] = []
    for _ in enters:
        try:
            size = int.from_bytes(_read(reader, 4), "little")
            done.append(Outcome(*pickle.loads(_read(reader, size))))
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            done.append(Outcome(HANG, f"longer than {SECONDS:g} s"))
            break
        except EOFError:
            done.append(Outcome(CRASH))
            break
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if done[-1].end == CRASH and os.WIFSIGNALED(status):
        done[-1] = Outcome(CRASH, f"signal {os.WTERMSIG(status)}")
    return done


def _read(reader: int, size: int) -> bytes:
    content, end = b"", time.monotonic() + SECONDS
    while len(content) < size:
        if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(reader, size - len(content))
        if not piece:
            raise EOFError
        content += piece
    return content


def _work(enters: Sequence[Enter], writer: int) -> None:
    """Enter with the limits set, and tell the parent how each ended; what libraries print is lost."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    if "torch" in sys.modules:  # its threads did not come along, and OpenMP would wait for them for ever
        sys.modules["torch"].set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with open(writer, "wb") as stream:
        for enter in enters:
            said = pickle.dumps(tuple(_measured(enter)))
            stream.write(len(said).to_bytes(4, "little") + said)
            stream.flush()


def _measured(enter: Enter) -> Outcome:
    """Return how ``enter`` ends; ``MEMORY`` where it took much, even if that was refused or given back."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what there is now; proc(5)
    before = _peak()
    outcome = outcome_of(enter)
    taken = _peak() - before
    return Outcome(MEMORY, f"{taken:,} bytes; {outcome.end}: {outcome.words}") if taken > MOST_MEMORY else outcome


def _peak() -> int:
    """Return the most bytes that the process has had in memory; since it was last cleared, where Linux tells."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def outcome_of(enter: Enter) -> Outcome:
    """Return how ``enter`` ends in this very process."""
    try:
        enter()
    except EdgeresError as problem:
        return Outcome(REFUSED, f"{type(problem).__name__}: {problem}")
    except MemoryError:
        return Outcome(MEMORY, traceback.format_exc())
    except Exception:
        return Outcome(TRACEBACK, traceback.format_exc())
    return Outcome(ACCEPTED)
