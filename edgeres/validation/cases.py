"""A report as the list of what was judged and found, and as a few lines of text: what every CI system is told."""

from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple

from edgeres.artifacts import Report
from edgeres.errors import printable
from edgeres.validation.latency import latency_failure, limit_headline, limit_name
from edgeres.validation.words import advice, baseline_headline, decibels, fallen_words, headline

SHOWN = 10  # classes, where there is little room


class Case(NamedTuple):
    """One thing that was judged or found, in one line each. ``kind`` is ``gate``, ``class`` or ``layers``.

    ``verdict`` is a gate's: ``pass``, ``fail``, ``inconclusive`` or ``unlabelled``, or ``error`` where it could not
    judge; or ``warning``, of a finding that does not decide. So a case is red only where the report's outcome is no
    better.
    """

    kind: str
    name: str
    verdict: str
    message: str


def cases(report: Report) -> Tuple[Case, ...]:
    """Return the gates of a report (FP32, the baseline, latency), every class that fell, and the layers of each engine.

    A class that fell fails with the accuracy; where the whole keeps its budget it is a warning. Layers that do not run
    as planned are always one: ``edgeres compile --strict`` refuses them.
    """
    found = [Case("gate", "accuracy against FP32", report.verdict, headline(report))]
    if report.baseline is not None:
        found.append(Case("gate", "accuracy against the baseline", report.baseline.verdict, baseline_headline(report)))
    for limit in report.latency.limits if report.latency is not None else ():
        found.append(Case("gate", limit_name(limit), limit.verdict, one_line(limit_headline(report, limit))))
    if report.latency_error:
        found.append(Case("gate", "latency", "error", one_line(latency_failure(report))))
    fallen = [change for change in report.classes if change.fell]
    told = "fail" if report.accuracy() == "fail" else "warning"
    for change, words in zip(fallen, fallen_words(report)):
        found.append(Case("class", one_line(f"class {change.name or change.label}"), told, one_line(words)))
    for summary in report.layers:
        astray = [f"not as planned: {text}" for text in summary.not_as_planned]
        message = "; ".join([summary.words, *astray])
        verdict = "warning" if astray else "pass"
        found.append(Case("layers", one_line(f"layers for {summary.target}"), verdict, one_line(message)))
    return tuple(found)


def short_form(report: Report, worst: Sequence[str] = (), untried: str = "") -> str:
    """Return the gates, that with the report's outcome first, the numbers and what to do next, a line each.

    Args:
        worst: as for :func:`edgeres.validation.words.advice`; ``untried`` likewise.
    """
    gates = [case for case in cases(report) if case.kind == "gate"]
    gates.sort(key=lambda case: case.verdict != report.outcome())
    lines = [f"{case.verdict.upper()}: {case.message}" for case in gates]
    lines.append(_numbers(report))
    lines += first_of(fallen_words(report))
    for summary in report.layers:
        lines.append(f"The engine for {summary.target} has {summary.words}.")
        lines += [f"Not as planned: {text}" for text in summary.not_as_planned]
    lines += [f"  {step}" for step in advice(report, worst, untried)]
    return "\n".join(one_line(line) for line in lines)


def first_of(fallen: Sequence[str]) -> List[str]:
    """Return the sentences of the first classes that fell, and how many more there are."""
    more = len(fallen) - SHOWN
    return [*fallen[:SHOWN], *([f"… and {more} more that fell."] if more > 0 else [])]


def one_line(text: str) -> str:
    """Return text in one line and without control characters: names in it come from folders and files."""
    return printable(" ".join(text.splitlines()))


def _numbers(report: Report) -> str:
    told: List[str] = []
    if report.top1_reference is not None and report.top1_engine is not None:
        told.append(
            f"top-1 {100 * report.top1_reference:.2f} % in FP32, {100 * report.top1_engine:.2f} % in "
            f"{report.precision.upper()} ({report.backend})"
        )
    told.append(f"same answer {100 * report.agreement:.2f} %")
    told.append(f"SQNR {decibels(report.sqnr_db)}")
    return "; ".join(told) + "."
