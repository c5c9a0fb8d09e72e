"""What a CI system is told of a verdict: a JUnit file, and on GitHub annotations and the summary of a step."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from edgeres.artifacts import Report
from edgeres.errors import BundleError, EdgeresError
from edgeres.files import write_atomic
from edgeres.streams import on_github
from edgeres.validation.github import annotation, commands, summary
from edgeres.validation.junit import junit, junit_error

LARGEST_SUMMARY = 1 << 20  # bytes; GitHub refuses the whole summary of a step that has more

BEGIN = 1024  # bytes, in which a JUnit file names its first element

Hints = Tuple[Sequence[str], str]


def make_way(junit_file: Optional[Path]) -> None:
    """Take away the JUnit file of an earlier run, which would be read where this one is cut off.

    Raises:
        BundleError: a file could not be written there, or there is one that is no JUnit file; said before the work, and
            not after it.
    """
    if junit_file is None:
        return
    folder = junit_file.absolute().parent
    while not os.path.lexists(str(folder)):
        folder = folder.parent
    if not folder.is_dir() or not os.access(str(folder), os.W_OK | os.X_OK):
        raise BundleError(f"cannot write {junit_file}: {folder} is no folder that can be written. Choose another one.")
    if junit_file.exists() and not junit_file.is_file():
        raise BundleError(f"cannot write {junit_file}: it is no ordinary file. Choose another name.")
    try:
        with open(str(junit_file), "rb") as stream:
            begin = stream.read(BEGIN)
        if begin and b"<testsuite" not in begin:
            raise BundleError(
                f"{junit_file} is no JUnit file, and would be lost: --junit replaces it. Name another file."
            )
        junit_file.unlink()
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise BundleError(f"cannot write {junit_file}: {problem.strerror}. Choose another name.") from None


def judged(report: Report, bundle: str, hints: Hints) -> List[str]:
    """Tell a verdict on GitHub, and return the lines that have to be printed for it.

    Args:
        hints: what :func:`edgeres.validation.advice` has to know of the bundle.
    """
    if not on_github():
        return []
    return [*commands(report, bundle), *_summarized(summary(report, bundle, hints))]


def write(junit_file: Optional[Path], report: Report, bundle: str, seconds: float, hints: Hints) -> None:
    """Write a verdict as a JUnit file, where one is asked for.

    Args:
        seconds: how long judging took.
        hints: as for :func:`judged`.

    Raises:
        BundleError: it cannot be written.
    """
    if junit_file is not None:
        write_atomic(junit_file, junit(report, bundle, seconds, hints))


def stopped(problem: EdgeresError, bundle: str, junit_file: Optional[Path]) -> List[str]:
    """Tell that nothing could be judged, and return the lines that have to be printed for it.

    The file says so too, for a CI system takes a missing one for no tests, and an old one for this one's. Where it
    cannot be written, the problem itself is what has to be told.
    """
    if junit_file is not None:
        with contextlib.suppress(BundleError):
            write_atomic(junit_file, junit_error(str(problem), bundle))
    return [annotation("error", f"{bundle}: not judged", str(problem))] if on_github() else []


def _summarized(text: str) -> List[str]:
    """Append to the step's summary; what goes wrong there is a warning, for it must not change a verdict."""
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return []
    content = f"{text}\n\n".encode()
    try:
        with open(place, "ab") as stream:
            if stream.tell() + len(content) <= LARGEST_SUMMARY:
                stream.write(content)
    except OSError as problem:
        return [annotation("warning", "edgeres", f"the summary could not be written: {problem.strerror or problem}")]
    return []
