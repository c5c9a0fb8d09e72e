"""A report as GitHub Actions shows it: annotations on the run, and a summary in Markdown.

Source: GitHub's documentation, "Workflow commands for GitHub Actions", for the commands and the file of the summary;
their escapes are those of its toolkit.
"""

from __future__ import annotations

import re
from typing import List, Sequence, Tuple

from edgeres.artifacts import Report
from edgeres.errors import few, printable
from edgeres.validation.cases import cases, first_of, one_line
from edgeres.validation.words import advice, decibels, fallen_words

LEVELS = {"fail": "error", "error": "error", "pass": "notice"}
SIGNS = {"pass": "✅", "fail": "❌", "warning": "⚠️"}
MARKUP = re.compile(r"([\\`*_\[\]|~$])")  # of what stands within a line


def annotation(level: str, title: str, message: str) -> str:
    """Return the command that puts a message on a run's page; ``level`` is error, warning or notice."""
    data = _escaped(printable(message))
    return f"::{level} title={_escaped(one_line(title)).replace(':', '%3A').replace(',', '%2C')}::{data}"


def commands(report: Report, bundle: str) -> List[str]:
    """Return one command for each gate, one for all classes that fell, and one for each engine's layers.

    A gate that fails is an error; what is inconclusive, or found without deciding, is a warning; a pass is a notice.
    GitHub shows ten of a kind and step.
    """
    found = cases(report)
    lines = [
        annotation(LEVELS.get(case.verdict, "warning"), f"{bundle}: {case.name}: {case.verdict}", case.message)
        for case in found
        if case.kind != "class"
    ]
    fallen = [case for case in found if case.kind == "class"]
    if fallen:
        level = LEVELS.get(fallen[0].verdict, "warning")
        said = "\n".join(first_of([case.message for case in fallen]))
        lines.append(annotation(level, f"{bundle}: {few([case.name for case in fallen])} fell", said))
    return lines


def summary(report: Report, bundle: str, hints: Tuple[Sequence[str], str] = ((), "")) -> str:
    """Return a report in Markdown, as a step's summary.

    Args:
        hints: what :func:`edgeres.validation.words.advice` has to know of the bundle.
    """
    outcome = report.outcome()
    rows = [("", "FP32", plain(f"{report.precision.upper()} ({report.backend})")), ("---", "---:", "---:")]
    for name, before, after in (
        ("top-1", report.top1_reference, report.top1_engine),
        ("top-5", report.top5_reference, report.top5_engine),
    ):
        if before is not None and after is not None:
            rows.append((name, f"{100 * before:.2f} %", f"{100 * after:.2f} %"))
    if report.drop_pp is not None and report.drop_ci95_pp is not None:
        low, high = report.drop_ci95_pp
        rows.append(("loss, pp (95 % interval)", "", f"{report.drop_pp:.2f} ({low:.2f} to {high:.2f})"))
        rows.append(("budget, pp", "", f"{report.max_drop_pp:g}"))
    if report.latency is not None:
        rows.append(("latency of the engine alone (p50), ms", "", f"{report.latency.round_p50_ms:.3f}"))
    rows.append(("same answer", "", f"{100 * report.agreement:.2f} %"))
    rows.append(("SQNR", "", decibels(report.sqnr_db)))
    gates = [case for case in cases(report) if case.kind != "class"]
    found = [f"{SIGNS.get(case.verdict, '❔')} {plain(case.name)}: {plain(case.message)}" for case in gates]
    found += map(plain, first_of(fallen_words(report)))
    steps = [plain(step) for step in advice(report, *hints)]
    title = f"### {SIGNS.get(outcome, '❔')} edgeres validate {plain(bundle)}: {plain(outcome)}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([title, table, *("\n".join(f"- {line}" for line in lines) for lines in (found, steps) if lines)])


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    html = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\1", html)


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
