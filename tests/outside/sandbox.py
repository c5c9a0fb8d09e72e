"""One attempt at a door, in a child with little memory and time, and what came of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from typing import Callable, NamedTuple

from edgeres.errors import EdgeresError

ACCEPTED, REFUSED = "accepted", "refused"
TRACEBACK, MEMORY, CRASH, HANG = "traceback", "memory", "crash", "hang"
OUTCOMES = (ACCEPTED, REFUSED, TRACEBACK, MEMORY, CRASH, HANG)
GOOD = (ACCEPTED, REFUSED)


class Outcome(NamedTuple):
    """How an attempt ended, one of ``OUTCOMES``, and what was said."""

    end: str
    words: str = ""


def attempt(enter: Callable[[], object], memory: int = 4 << 30, seconds: float = 30.0) -> Outcome:
    """Return how ``enter`` ends in a forked child whose address space has ``memory`` bytes, in so many seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        with contextlib.suppress(BaseException):
            _in_child(enter, memory, writer)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        if not select.select([stream], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(HANG, f"longer than {seconds:g} s")
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not said:
        return Outcome(CRASH, f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer")
    return Outcome(*pickle.loads(said))  # noqa: S301  # of our own child


def _in_child(enter: Callable[[], object], memory: int, writer: int) -> None:
    """Enter with the limits set, and tell the parent how it ended; what libraries print is lost."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    said = outcome_of(enter)
    with open(writer, "wb") as stream:
        stream.write(pickle.dumps(tuple(said)))
    sys.stdout.flush()


def outcome_of(enter: Callable[[], object]) -> Outcome:
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
