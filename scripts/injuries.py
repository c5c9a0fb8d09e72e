"""What is done to a process, to its files or to its disk, for scripts/faults.py."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeres import workspace

STEPS = ("open", "replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
Inject = Callable[[], None]


def at_step(number: int, fault: Callable[[], None]) -> Callable[[], dict[str, int]]:
    """Let something happen before a process's step of that number; a step changes, or may change, what lies where."""
    count = {"steps": 0}

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            count["steps"] += 1
            if count["steps"] == number:
                fault()
            return call(*arguments, **options)

        return step

    def inject() -> dict[str, int]:
        for name in STEPS:
            setattr(os, name, faulty(getattr(os, name)))
        workspace._exchange_in_one_step = faulty(workspace._exchange_in_one_step)
        return count

    return inject


def noting(place: Path) -> None:
    """Let this process write down each stage that it finishes; one without files leaves nothing to go on from."""
    finish = workspace.Workspace.finish

    def noted(self: workspace.Workspace, name: str, *arguments: Any) -> Any:
        record = finish(self, name, *arguments)
        if record.files:
            with open(place, "a") as stream:
                stream.write(f"{name}\n")
        return record

    workspace.Workspace.finish = noted  # type: ignore[method-assign]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(seconds: float, number: int) -> Callable[[int], None]:
    """Return what sends a signal to a process once it has had so much processor time, whoever else uses the machine; it
    may have ended before."""

    def strike(process: int) -> None:
        clock = ~process << 3 | 2  # clock_getcpuclockid(3)
        while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.clock_gettime(clock) >= seconds:
                os.kill(process, number)
                return
            time.sleep(0.0005)

    return strike


def limited(extra: int) -> Inject:
    """Let a process have that many bytes more than it has."""

    def inject() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return inject


def vanishing(victim: Path, at: int) -> Inject:
    """Remove a file just before a process opens it for the time of that number."""
    count = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and os.fspath(victim) == str(arguments[0]):
            count += 1
            if count == at:
                os.unlink(victim)

    return lambda: sys.addaudithook(hear)


def nobody() -> None:
    os.setegid(65534)
    os.seteuid(65534)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Let a folder be a disk of that many bytes meanwhile; 0: leave it as it is."""
    if size:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "edgeres-faults", str(place)], check=True)
    try:
        yield
    finally:
        if size:
            subprocess.run(["umount", str(place)], check=True)


def file_limit(size: int) -> Inject:
    """Let no file of a process grow beyond ``size`` bytes."""

    def inject() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return inject
