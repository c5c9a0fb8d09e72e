"""A report as JUnit XML, which every CI system shows: one test case for each gate and each finding.

Elements and attributes are those that Jenkins and Surefire agree on (junit-10.xsd of Jenkins' xUnit plugin).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import PurePath
from typing import Dict, Sequence, Tuple

from edgeres.artifacts import Report
from edgeres.errors import printable
from edgeres.validation.cases import Case, cases, short_form

RED = {"fail": "failure", "inconclusive": "failure", "unlabelled": "failure", "error": "error"}


def junit(report: Report, bundle: str, seconds: float, hints: Tuple[Sequence[str], str] = ((), "")) -> bytes:
    """Return a report as a JUnit file. A case of it fails if and only if ``edgeres validate`` does not answer 0.

    Args:
        bundle: its folder, which names the suite.
        seconds: how long it took.
        hints: what :func:`edgeres.validation.words.advice` has to know of the bundle.
    """
    facts = {
        "verdict": report.verdict,
        "outcome": report.outcome(),
        "samples": report.samples,
        "top1_reference": report.top1_reference,
        "top1_engine": report.top1_engine,
        "drop_pp": report.drop_pp,
        "max_drop_pp": report.max_drop_pp,
        "agreement": report.agreement,
        "sqnr_db": report.sqnr_db,
        "backend": report.backend,
        "precision": report.precision,
        "policy": report.policy,
    }
    if report.latency is not None:
        facts.update(latency_round_p50_ms=report.latency.round_p50_ms, latency_device=report.latency.device)
    known = {name: str(value) for name, value in facts.items() if value is not None}
    return _document(bundle, cases(report), known, seconds, short_form(report, *hints))


def junit_error(message: str, bundle: str) -> bytes:
    """Return the JUnit file of a gate that could not judge the accuracy, and so nothing, and why."""
    return _document(bundle, (Case("gate", "accuracy against FP32", "error", message),), {}, 0.0, message)


def _document(bundle: str, found: Sequence[Case], facts: Dict[str, str], seconds: float, text: str) -> bytes:
    """Return suites, a suite, its properties and its cases; the time was the first one's.

    ``text`` goes with the first case that is red, or where none is with the first.
    """
    kinds = [RED.get(case.verdict, "" if case.verdict == "pass" else "skipped") for case in found]
    told = next((place for place, kind in enumerate(kinds) if kind in RED.values()), 0)
    counts = {
        "tests": str(len(found)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "time": f"{seconds:.3f}",
    }
    suites = ET.Element("testsuites", {"name": "edgeres", **counts})
    title = printable(f"edgeres validate {bundle}")
    suite = ET.SubElement(suites, "testsuite", {"name": title, **counts, "skipped": str(kinds.count("skipped"))})
    properties = ET.SubElement(suite, "properties")
    for name, value in facts.items():
        ET.SubElement(properties, "property", name=name, value=printable(value))
    group = printable(f"edgeres.{PurePath(bundle).name or bundle}")
    for place, (case, kind) in enumerate(zip(found, kinds)):
        time = seconds if place == 0 else 0.0
        node = ET.SubElement(suite, "testcase", classname=group, name=printable(case.name), time=f"{time:.3f}")
        said = printable(text if place == told else case.message)
        if kind:
            ET.SubElement(node, kind, type=case.verdict, message=printable(case.message)).text = said
        else:
            ET.SubElement(node, "system-out").text = said
    content: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"
