"""The one door from exceptions and signals to exit codes, and what is said on the way out.

0 good; 1 an error the user can act on, or a gate that failed; 2 wrong usage; 3 a gate that these samples cannot decide;
70 a bug in edgeres; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional, Tuple

import click

from edgeres.errors import EdgeresError, first_line, printable

OK, FAILED, USAGE, UNDECIDED, BUG, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 70, 130, 143
UNTOUCHED = "an earlier bundle is untouched, and a build goes on where it stopped"
ENDS: Dict[int, Tuple[int, str]] = {
    signal.SIGINT: (INTERRUPTED, "interrupted"),
    signal.SIGTERM: (TERMINATED, "terminated"),
}
SPARE = 1 << 28  # bytes: a process that cannot even reserve so much is short of memory


def exit_code(command: click.Command, arguments: Optional[List[str]] = None) -> int:
    """Run a command, and return its exit code; an exception is told on stderr. ``arguments`` None: the process's own.

    Ctrl-C and SIGTERM are heard meanwhile, and have their earlier meaning afterwards.
    """
    try:
        with _interruptible():
            return int(command.main(args=arguments, prog_name="edgeres", standalone_mode=False) or OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as problem:
        problem.show()
        return USAGE
    except (KeyboardInterrupt, click.Abort):
        return _ended(signal.SIGINT)
    except EdgeresError as problem:
        click.echo(f"error: {printable(str(problem))}", err=True)
        return FAILED
    except _Terminated:
        return _ended(signal.SIGTERM)
    except Exception as problem:
        lacking = _shortage(problem)
        if not isinstance(problem, MemoryError):  # what is lacking is a guess; the traceback tells whether it is right
            with contextlib.suppress(MemoryError):
                traceback.print_exc()
        if lacking:
            click.echo(f"error: {lacking}", err=True)
            return FAILED
        click.echo("this is a bug in edgeres; please report it with the lines above", err=True)
        return BUG


class _Terminated(BaseException):
    """SIGTERM came: what is open is closed on the way out, as for an interrupt."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what is done here by an exception, a second one by death; then all is as it was.

    In another thread than the main one, which alone hears signals, they keep their meaning.
    """
    earlier: Dict[int, Any] = {}
    try:
        for number in ENDS if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # ignored, as under nohup, or not Python's own
                earlier[number] = handler
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, frame: Optional[FrameType]) -> None:
    for end in ENDS:
        if signal.getsignal(end) is _stop:
            signal.signal(end, signal.SIG_DFL)
    if _imports(frame):  # native libraries that are half loaded take an exception for damage, or crash on the way out
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{show_cursor}{ENDS[number][1]}; {UNTOUCHED}\n".encode())
        os._exit(ENDS[number][0])
    raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


def _imports(frame: Optional[FrameType]) -> bool:
    """Whether a module is being imported where a frame stands."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _shortage(problem: Exception) -> str:
    """Return what the machine lacked where an error is most likely none of ours, with what to do; else nothing.

    Libraries that get no memory fail with whatever comes next.
    """
    if "can't start new thread" in str(problem):
        return "no thread can be started. Close other programs, raise the limit (ulimit -u), or set OMP_NUM_THREADS=1."
    asked = f" ({first_line(problem)})" if str(problem) else ""
    memory = f"not enough memory{asked}. Take smaller batches, frames or an input size."
    if isinstance(problem, MemoryError):
        return memory
    try:
        mmap.mmap(-1, SPARE).close()
    except (OSError, ValueError):
        return memory
    return ""


def _ended(number: int) -> int:
    code, word = ENDS[number]
    click.echo(f"{word}; {UNTOUCHED}", err=True)
    return code
