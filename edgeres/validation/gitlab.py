"""A report as GitLab's code quality report, which a merge request shows beside its changes: one entry a finding.

A finding wants a line of a file. It is the line of the bundle's recipe that holds the budget, for nothing else in a
project says how much may be lost; where the recipe is not known it is the file's first.

Source: GitLab's documentation, "Code Quality", section "Code Quality report format".
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, List, NamedTuple, Sequence

import msgspec

from edgeres.artifacts import Report
from edgeres.errors import printable
from edgeres.validation.cases import Case, cases

SEVERITIES = {"fail": "critical", "error": "blocker", "warning": "minor"}  # of what is open: major


class Line(NamedTuple):
    """A line of a file, counted from 1; the path is relative to where the command runs."""

    path: str
    number: int = 1


def code_quality(report: Report, bundle: str, place: Line) -> bytes:
    """Return every gate that does not pass, and what was found without deciding; an empty list where all is well."""
    return _document([case for case in cases(report) if case.verdict != "pass"], bundle, place)


def code_quality_error(message: str, bundle: str, place: Line) -> bytes:
    """Return the report of a gate that could not judge at all, and why."""
    return _document([Case("gate", "accuracy against FP32", "error", message)], bundle, place)


def _document(found: Sequence[Case], bundle: str, place: Line) -> bytes:
    told: List[Dict[str, Any]] = []
    seen: Dict[str, int] = {}
    for case in found:
        # The same finding of the next run is known by its fingerprint: it holds no number that changes from run to run.
        known = "\n".join(map(printable, (bundle, case.kind, case.name)))
        seen[known] = seen.get(known, 0) + 1
        told.append(
            {
                "check_name": f"edgeres-{case.kind}",
                "description": printable(f"{case.name}: {case.message}"),
                "fingerprint": hashlib.sha256(f"{known}\n{seen[known]}".encode()).hexdigest(),
                "severity": SEVERITIES.get(case.verdict, "major"),
                "location": {"path": printable(place.path), "lines": {"begin": place.number}},
            }
        )
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"
