"""The gate in pytest: the fixture ``edgeres_gate``, the marker ``edgeres``, and a test that needs no file.

pytest loads this module in every environment that has edgeres, so it imports nothing else before a gate is asked for.
"""

from __future__ import annotations

import argparse
import math
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Dict, Generator, List, Optional, Sequence, Tuple

import pytest

from edgeres.errors import EdgeresError, printable

if TYPE_CHECKING:
    from edgeres.artifacts import Report

PATHS = ("bundle", "data", "baseline", "key")
LIMITS = ("max_latency_ms", "min_speedup")
CHOICES = {"policy": ("ci", "point"), "inconclusive": ("fail", "skip", "pass")}
KEYWORDS = {
    "bundle": "the bundle to judge; as an option it adds a test of its own",
    "data": "labelled samples to judge on: a folder, list or array file (default: those of the bundle's build)",
    "max_drop": "accuracy budget, percentage points of top-1 against FP32 (default: the bundle's own)",
    "policy": "ci (the whole 95 %% interval decides) or point (default: the bundle's own)",
    "baseline": "an accepted report.json to beat as well",
    "key": "a public key that has to have signed the bundle; repeatable, in the ini file a line each (default: none)",
    "backend": "which of the bundle's engines, or its target (default: the first)",
    "max_latency_ms": "limit on one frame's p50 in ms, of the engine alone, where the tests run (default: none)",
    "min_speedup": "how many times as fast as its float twin the engine has to be there (default: not asked)",
    "inconclusive": "fail (default), skip or pass, where the samples cannot decide",
}
"""What a gate can be told: by the marker, as ``--edgeres-…`` and as ``edgeres_…`` in the ini file, in this order."""

REPORTS = "_edgeres_reports"
"""Where the session's configuration keeps what was judged; pytest 6.2, which ROS 2 Humble has, knows no StashKey."""


class GateFailed(AssertionError):
    """A gate that failed, or was not measured or decided; its text is the report in short, and ``report`` itself."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


class Gate:
    """One bundle on one set of samples. It is judged when that is first asked for, and once in a session."""

    def __init__(self, config: pytest.Config, settings: Dict[str, Any]) -> None:
        self._config = config
        self._settings = settings

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return Path(self._settings["bundle"])

    @property
    def report(self) -> Report:
        """The comparison with FP32, whatever its verdict.

        Raises:
            EdgeresError: nothing could be judged.
        """
        known: Dict[Tuple[Any, ...], Report] = getattr(self._config, REPORTS)
        wanted = {name: value for name, value in self._settings.items() if name != "inconclusive"}
        key = tuple(sorted(wanted.items()))
        if key not in known:
            known[key] = _judged(**wanted)
        return known[key]

    @property
    def words(self) -> str:
        """The report's short form."""
        from edgeres.bundle import read_manifest
        from edgeres.inspection import repairs
        from edgeres.validation import short_form

        report = self.report
        hints: Tuple[Sequence[str], str] = ((), "")
        with suppress(EdgeresError):  # of a bundle that was changed meanwhile there are none, but a verdict
            hints = repairs(self.bundle, read_manifest(self.bundle, self._settings.get("key")))
        return short_form(report, *hints)

    def check(self) -> Report:
        """Return the report where the gate passes; where it cannot be decided, ``inconclusive`` says what happens.

        Raises:
            GateFailed: with the report in short.
            EdgeresError: nothing could be judged.
        """
        report, outcome = self.report, self.report.outcome()
        if outcome == "pass":
            return report
        text = self.words
        if outcome in ("fail", "error"):
            raise GateFailed(text, report)
        asked = self._settings.get("inconclusive", "fail")
        if asked == "skip":
            pytest.skip(text.splitlines()[0])
        if asked == "fail":
            raise GateFailed(f"{text}\n  To let it pass all the same: --edgeres-inconclusive pass (or skip).", report)
        return report


class GateItem(pytest.Item):
    """The test that ``--edgeres-bundle`` adds."""

    def runtest(self) -> None:
        gate = Gate(self.config, _settings(self.config, self))
        report = gate.report
        self.user_properties.append(("edgeres_outcome", report.outcome()))
        self.user_properties.append(("edgeres_drop_pp", report.drop_pp))
        gate.check()
        self.add_report_section("call", "edgeres", gate.words)  # pytest -rP shows it

    def reportinfo(self) -> Tuple[Path, Optional[int], str]:
        return Path(str(self.fspath)), None, self.name  # pytest 6.2 has no self.path


class _Words:
    """What pytest shows of a gate that failed: its words, without a traceback."""

    def __init__(self, text: str) -> None:
        self.reprcrash = SimpleNamespace(message=text.split("\n", 1)[0])
        self._text = text

    def __str__(self) -> str:
        return self._text

    def toterminal(self, writer: Any) -> None:
        for line in self._text.splitlines():
            writer.line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option and an ini key for each keyword."""
    group = parser.getgroup("edgeres", "the accuracy gate of edgeres")
    for name, text in KEYWORDS.items():
        kind: Dict[str, Any] = {"choices": CHOICES[name]} if name in CHOICES else {"metavar": name.upper()}
        if name not in CHOICES:
            kind["type"] = NUMBERS.get(name, _given)
        if name == "key":
            kind["action"] = "append"
        group.addoption(f"--edgeres-{name.replace('_', '-')}", dest=f"edgeres_{name}", help=text, **kind)
        told = f"for edgeres_gate: {text.split(';')[0].replace('%%', '%')}"
        lines: Dict[str, Any] = {"type": "linelist"} if name == "key" else {}
        parser.addini(f"edgeres_{name}", told, **lines)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and room for what is judged."""
    setattr(config, REPORTS, {})
    config.addinivalue_line("markers", f"edgeres({', '.join(KEYWORDS)}): what edgeres_gate judges, by keywords")


@pytest.fixture
def edgeres_gate(request: pytest.FixtureRequest) -> Gate:
    """The gate of a bundle: ``edgeres_gate.check()`` fails with the report; ``edgeres_gate.report`` is the report."""
    settings = _settings(request.config, request.node)
    if settings.get("bundle") is None:
        pytest.fail(
            "edgeres_gate has no bundle to judge. Name one: --edgeres-bundle DIR, edgeres_bundle in the ini file, or "
            "@pytest.mark.edgeres(bundle=DIR)",
            pytrace=False,
        )
    return Gate(request.config, settings)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """Add the gate's own test to what the session collects, where the command line names a bundle.

    Also beside tests of the same bundle's gate: these may be skipped, or never call ``check``; it is judged once.
    """
    outcome = yield
    if isinstance(collector, pytest.Session) and collector.config.getoption("edgeres_bundle"):
        item = GateItem.from_parent(collector, name="edgeres gate", nodeid="edgeres::gate")
        item.add_marker("edgeres")
        outcome.get_result().result.append(item)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a test that says what to judge and never asks for the gate: it would pass whatever the net does."""
    marked = any(mark.name == "edgeres" for mark in item.own_markers)
    if marked and not isinstance(item, GateItem) and "edgeres_gate" not in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"{item.name} is marked with edgeres and does not take the fixture edgeres_gate: nothing would be judged. "
            "Add it, and call edgeres_gate.check()",
            pytrace=False,
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Show a gate that failed by its words alone, and what could not be judged by its error's."""
    outcome = yield
    raised = None if call.excinfo is None else call.excinfo.value
    gated = isinstance(item, GateItem) or "edgeres_gate" in getattr(item, "fixturenames", ())
    if isinstance(raised, GateFailed) or (gated and isinstance(raised, EdgeresError)):
        outcome.get_result().longrepr = _Words(printable(str(raised)))


def _judged(bundle: Path, data: Any = None, baseline: Optional[Path] = None, **options: Any) -> Report:
    from edgeres.gate import gate
    from edgeres.judge import read_baseline
    from edgeres.validation import Limits

    accepted = None if baseline is None else read_baseline(baseline)
    limits = Limits(*(options.pop(name, None) for name in LIMITS))
    if "key" in options:
        options["trusted_keys"] = options.pop("key")
    return gate(bundle, data, limits=limits, baseline=accepted, **options)


def _settings(config: pytest.Config, item: pytest.Item) -> Dict[str, Any]:
    """Return what a test's gate is told: the nearest marker first, then the command line, then the ini file."""
    told: Dict[str, Any] = {}
    for name in KEYWORDS:
        flag = config.getoption(f"edgeres_{name}")
        value = config.getini(f"edgeres_{name}") if flag is None else flag
        if value in (None, "", []):
            continue
        if flag and name in PATHS:
            here = config.invocation_params.dir
            value = [here / one for one in value] if name == "key" else here / value
        told[name] = value
    for mark in reversed(list(item.iter_markers("edgeres"))):
        told.update(_keywords(mark))
    if isinstance(told.get("key"), (str, os.PathLike)):
        told["key"] = [told["key"]]
    problems = _problems(told)
    if problems:
        pytest.fail(f"edgeres, for {item.name}: {'; '.join(problems)}", pytrace=False)
    for name in NUMBERS:
        if name in told:
            told[name] = float(told[name])
    for name in PATHS:
        if name in told and name != "key":
            told[name] = _place(config, os.fspath(told[name]))
    if "key" in told:
        told["key"] = tuple(str(_place(config, os.fspath(one))) for one in told["key"])
    return told


def _keywords(mark: pytest.Mark) -> Dict[str, Any]:
    """Return a marker's keywords; those that are None count as not given."""
    unknown = [name for name in mark.kwargs if name not in KEYWORDS]
    if mark.args or unknown:
        what = f"no keyword {', '.join(map(repr, unknown))}" if unknown else "no values without a keyword"
        pytest.fail(f"@pytest.mark.edgeres has {what}; it has {', '.join(KEYWORDS)}", pytrace=False)
    return {name: value for name, value in mark.kwargs.items() if value is not None}


def _problems(told: Dict[str, Any]) -> List[str]:
    """Return a sentence for each value that is none of its keyword's."""
    found = []
    for name, value in told.items():
        if name in CHOICES and value not in CHOICES[name]:
            found.append(f"{name} is {value!r}: choose one of {', '.join(CHOICES[name])}")
        elif name == "key":
            if not (isinstance(value, (list, tuple)) and value and all(map(_is_name, value))):
                found.append(f"key is {value!r}: give the path of a public key, or a list of them")
        elif name in (*PATHS, "backend") and not _is_name(value):
            found.append(f"{name} is {value!r}: give {'a name' if name == 'backend' else 'a path'}")
        elif name in NUMBERS:
            try:
                NUMBERS[name](value)
            except (argparse.ArgumentTypeError, TypeError) as problem:
                found.append(f"{name}: {problem}")
    return found


def _is_name(value: Any) -> bool:
    return bool(value) and isinstance(value, (str, os.PathLike))


def _given(value: str) -> str:
    """Return an option's value; an empty one is that of a variable that is not set, and would leave the gate out."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the option out")
    return value


def _points(value: Any) -> float:
    """Return percentage points, 0 to 100."""
    points = _number(value)
    if not 0 <= points <= 100:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of percentage points, 0 to 100")
    return points


def _limit(value: Any) -> float:
    """Return a limit, a finite number above 0."""
    limit = _number(value)
    if not 0 < limit < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is no number above 0")
    return limit


def _number(value: Any) -> float:
    """Return a number; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except ValueError:
        return math.nan


NUMBERS: Dict[str, Callable[[Any], float]] = {"max_drop": _points, **dict.fromkeys(LIMITS, _limit)}


def _place(config: pytest.Config, path: str) -> Path:
    """Return the place of a marker's or an ini file's path: from the root folder, or from where pytest was called."""
    expanded = os.path.expanduser(path)
    rooted = config.rootpath / expanded
    return rooted if rooted.exists() else config.invocation_params.dir / expanded
