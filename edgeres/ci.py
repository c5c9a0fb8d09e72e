"""What a CI system is told of a verdict: JUnit and code quality files, on GitHub annotations and a step's summary."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

from edgeres import files
from edgeres.artifacts import Report
from edgeres.errors import BundleError, EdgeresError
from edgeres.files import write_atomic
from edgeres.streams import on_github
from edgeres.validation.github import annotation, commands, summary
from edgeres.validation.gitlab import Line, code_quality, code_quality_error
from edgeres.validation.junit import junit, junit_error

LARGEST_SUMMARY = 1 << 20  # bytes; GitHub refuses the whole summary of a step that has more

BEGIN = 1024  # bytes, in which a file tells what it is
LARGEST_RECIPE = 1 << 20  # bytes; a recipe has one kB

PROJECT_RECIPE = "calibration/recipe.toml"  # as `edgeres init` writes it

OUR_FINDING = b'[\n  {\n    "check_name": "edgeres-'  # how a report of ours begins that has findings
NO_FINDING = b"[]\n"  # and one that has none; another tool's loses nothing

Hints = Tuple[Sequence[str], str]


class Outputs(NamedTuple):
    """The files that a verdict is written to, as far as they are asked for."""

    junit: Optional[Path] = None
    code_quality: Optional[Path] = None

    @property
    def named(self) -> List[Tuple[str, Path]]:
        """The files with the options that named them."""
        told = [("--junit", self.junit), ("--code-quality", self.code_quality)]
        return [(option, path) for option, path in told if path is not None]


def make_way(outputs: Outputs) -> None:
    """Take away the files of an earlier run, which would be read where this one is cut off.

    Raises:
        BundleError: a file could not be written there, or there is one that is something else; said before the work,
            and not after it.
    """
    for option, file in outputs.named:
        _make_way(option, file)


def _make_way(option: str, file: Path) -> None:
    folder = file.absolute().parent
    while not os.path.lexists(str(folder)):
        folder = folder.parent
    if not folder.is_dir() or not os.access(str(folder), os.W_OK | os.X_OK):
        raise BundleError(f"cannot write {file}: {folder} is no folder that can be written. Choose another one.")
    if file.exists() and not file.is_file():
        raise BundleError(f"cannot write {file}: it is no ordinary file. Choose another name.")
    try:
        with open(str(file), "rb") as stream:
            begin = stream.read(BEGIN)
        if option == "--junit":
            kind, ours = "JUnit file", b"<testsuite" in begin
        else:
            kind, ours = "code quality report of edgeres", begin == NO_FINDING or begin.startswith(OUR_FINDING)
        if begin and not ours:
            raise BundleError(f"{file} is no {kind}, and would be lost: {option} replaces it. Name another file.")
        file.unlink()
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise BundleError(f"cannot write {file}: {problem.strerror}. Choose another name.") from None


def judged(report: Report, bundle: str, hints: Hints) -> List[str]:
    """Tell a verdict on GitHub, and return the lines that have to be printed for it.

    Args:
        hints: what :func:`edgeres.validation.advice` has to know of the bundle.
    """
    if not on_github():
        return []
    return [*commands(report, bundle), *_summarized(summary(report, bundle, hints))]


def write(outputs: Outputs, report: Report, bundle: str, seconds: float, hints: Hints) -> None:
    """Write a verdict to the files that are asked for.

    Args:
        seconds: how long judging took.
        hints: as for :func:`judged`.

    Raises:
        BundleError: one cannot be written; the others are.
    """
    with contextlib.ExitStack() as last:  # whose callbacks all run, whatever one raises
        if outputs.code_quality is not None:
            last.callback(write_atomic, outputs.code_quality, code_quality(report, bundle, _budget_line(bundle)))
        if outputs.junit is not None:
            last.callback(write_atomic, outputs.junit, junit(report, bundle, seconds, hints))


def stopped(problem: EdgeresError, bundle: str, outputs: Outputs) -> List[str]:
    """Tell that nothing could be judged, and return the lines that have to be printed for it.

    The files say so too, for a CI system takes a missing one for no tests, and an old one for this one's. Where one
    cannot be written, the problem itself is what has to be told. Nothing of the bundle is read, which was refused.
    """
    if outputs.junit is not None:
        with contextlib.suppress(BundleError):
            write_atomic(outputs.junit, junit_error(str(problem), bundle))
    if outputs.code_quality is not None:
        with contextlib.suppress(BundleError):
            write_atomic(
                outputs.code_quality, code_quality_error(str(problem), bundle, _project_line() or _recipe(bundle))
            )
    return [annotation("error", f"{bundle}: not judged", str(problem))] if on_github() else []


def _budget_line(bundle: str) -> Line:
    """Return where it stands how much may be lost: in the project's recipe, which GitLab shows, or in the bundle's."""
    line = _project_line()
    if line is None:
        line = _recipe(bundle)
        with contextlib.suppress(OSError), files.open_inside(bundle, files.RECIPE) as stream:
            line = line._replace(number=_number(stream.read(LARGEST_RECIPE) or b""))
    return line


def _project_line() -> Optional[Line]:
    """Return the line of the recipe that ``edgeres init`` writes, where it lies in the working directory."""
    with contextlib.suppress(OSError):
        return Line(PROJECT_RECIPE, _number(files.read_bounded(PROJECT_RECIPE, LARGEST_RECIPE)))
    return None


def _recipe(bundle: str) -> Line:
    """Return the first line of a bundle's recipe; the path from here, as GitLab wants it."""
    return Line(os.path.relpath(str(Path(bundle) / files.RECIPE)))


def _number(content: bytes) -> int:
    """Return the line of a recipe that holds the budget, or else its first."""
    lines = content.splitlines()
    return next((number for number, line in enumerate(lines, 1) if line.startswith(b"max_drop")), 1)


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
