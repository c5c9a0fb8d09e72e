"""What long work tells whoever watches: a class of methods that do nothing, to be overridden."""

from __future__ import annotations

from decimal import Decimal


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: ``1 sample``, ``1,000 samples``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def points(budget: float) -> str:
    """Return percentage points with two digits, or as many more as they have: 0.001 is not 0.00."""
    exponent = Decimal(repr(float(budget))).as_tuple().exponent
    digits = max(2, -exponent) if isinstance(exponent, int) else 2  # a number that is none has a letter there
    return f"{budget:.{digits}f}"


class Progress:
    """A silent watcher. The command line overrides it with bars and lines; a library user may do the same."""

    def row(self, number: int, total: int, text: str) -> None:
        """The bundle ``number`` of ``total`` of a matrix begins; all else that is told is of it."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins; ``text`` says in a few words on what."""

    def advance(self, done: int, total: int) -> None:
        """The running stage has done ``done`` of ``total`` samples."""

    def finished(self, name: str, seconds: float, text: str) -> None:
        """A stage ended; ``text`` says what it made."""

    def reused(self, name: str, text: str) -> None:
        """A stage was not run: its inputs are those of an earlier result, which is taken over."""

    def warn(self, text: str) -> None:
        """Something that the user should know, though the work goes on."""
