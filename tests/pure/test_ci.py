"""What CI systems are told: JUnit held against a schema, GitHub's commands read back, GitLab's required fields."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import msgspec
import numpy as np
import pytest
import xmlschema
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres import ci
from edgeres.artifacts import LayerSummary, Report
from edgeres.errors import BundleError, SampleError
from edgeres.judging import VERDICT_CODES, report_json
from edgeres.measurements import LatencyLimit, LatencyReport
from edgeres.validation import against_baseline, compare, short_form
from edgeres.validation.cases import cases
from edgeres.validation.github import annotation, commands, plain, summary
from edgeres.validation.gitlab import Line, code_quality, code_quality_error
from edgeres.validation.junit import junit, junit_error

SCHEMA = xmlschema.XMLSchema10(str(Path(__file__).with_name("junit.xsd")))
BLACK_BOX = 'evil\x1b[31m \x00 <b a="1">&\'\ud800\ufffe]]> 50%, a:b\r\n::error::x | `y`'
ANYTHING = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
COUNT = 4000


def breaches(content: bytes) -> List[str]:
    """Return what the schema has against a file."""
    return [error.reason or str(error) for error in SCHEMA.iter_errors(ET.fromstring(content))]


def read(content: bytes) -> List[Tuple[str, str, str]]:
    """Return (name, what it is, its type) of each case of a valid file, whose counts are right."""
    assert breaches(content) == []
    root = ET.fromstring(content)
    nodes = list(root.iter("testcase"))
    for holder in (root, root[0]):
        told = [int(holder.attrib[name]) for name in ("tests", "failures", "errors")]
        assert told == [len(nodes), len(list(root.iter("failure"))), len(list(root.iter("error")))]
    assert int(root[0].attrib["skipped"]) == len(list(root.iter("skipped")))
    return [(node.attrib["name"], node[0].tag, node[0].attrib.get("type", "")) for node in nodes]


def judged(
    wrong: int, count: int = COUNT, only_class: Optional[int] = None, classes: Sequence[str] = (), labelled: bool = True
) -> Report:
    """Return the report on an engine that is wrong on ``wrong`` samples, of one class or of all; FP32 is right."""
    labels = np.arange(count) % 10
    answers = labels.copy()
    chosen = np.flatnonzero(labels == only_class) if only_class is not None else np.arange(count)
    answers[chosen[:wrong]] = (labels[chosen[:wrong]] + 1) % 10
    reference, engine = np.eye(10, dtype=np.float32)[labels], np.eye(10, dtype=np.float32)[answers]
    report = compare(
        reference,
        engine,
        labels if labelled else None,
        max_drop_pp=1.0,
        backend="cpu",
        precision="int8",
        classes=classes,
    )
    return msgspec.structs.replace(report, samples_sha256="these")


def with_baseline(report: Report, before: Report) -> Report:
    """Return a report against one that was accepted, by whatever budget that one kept."""
    accepted = msgspec.structs.replace(before, max_drop_pp=100.0, verdict="pass")
    return against_baseline(report, accepted, np.arange(report.samples) % 10, 10)


HERE = Line("build/b/recipe.toml", 12)


def findings(content: bytes) -> List[Tuple[str, str, str]]:
    """Return (check, severity, description) of each finding of a code quality report that GitLab accepts.

    Source: GitLab's documentation, "Code Quality report format": an array of objects; description, check_name,
    fingerprint (unique), severity and location.path with location.lines.begin are required; no byte order mark.
    """
    read = json.loads(content.decode("utf-8"))
    assert isinstance(read, list)
    for one in read:
        assert {"description", "check_name", "fingerprint", "severity", "location"} <= set(one)
        assert all(isinstance(one[name], str) and one[name] for name in set(one) - {"location"})
        assert one["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert not one["location"]["path"].startswith(("/", "./"))
        assert isinstance(one["location"]["lines"]["begin"], int)
    assert len({one["fingerprint"] for one in read}) == len(read)
    return [(one["check_name"], one["severity"], one["description"]) for one in read]


def unescaped(text: str) -> str:
    """Return what GitHub's runner reads; source: escapes of its toolkit, the other way round."""
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, character)
    return text


def command(line: str) -> Tuple[str, Dict[str, str], str]:
    """Return level, properties and message of a command, as GitHub's runner takes it apart."""
    assert "\n" not in line
    assert "\r" not in line
    assert line.startswith("::")
    head, message = line[2:].split("::", 1)
    level, _, properties = head.partition(" ")
    pairs = dict(one.split("=", 1) for one in properties.split(","))
    return level, {name: unescaped(value) for name, value in pairs.items()}, unescaped(message)


FP32, BASELINE = "accuracy against FP32", "accuracy against the baseline"
LATENCY, SPEEDUP = "latency", "latency against FP32"
GOOD, BAD, OPEN = judged(0), judged(400), judged(0, 20)


def timed(report: Report, *verdicts: str) -> Report:
    """Return a report with these verdicts on a limit of the latency, and on one of the speed-up."""
    limits = (
        LatencyLimit("round_p50_ms", 2.0, 1.5, (1.25, 1.75), verdicts[0]),
        *(LatencyLimit("speedup", 1.5, 1.6, (1.55, 1.7), verdict, "fp32") for verdict in verdicts[1:]),
    )
    told = LatencyReport(BLACK_BOX, 300, 30, 1.5, 2.5, limits, ("other programs were at work",))
    return msgspec.structs.replace(report, latency=told)


def worse() -> Report:
    """Return the report on an engine that equals FP32, wrong on a tenth, where the baseline was right on all."""
    labels = np.arange(COUNT) % 10
    logits = np.eye(10, dtype=np.float32)[np.where(np.arange(COUNT) < 400, (labels + 1) % 10, labels)]
    report = compare(logits, logits, labels, max_drop_pp=1.0, backend="cpu", precision="int8")
    return with_baseline(msgspec.structs.replace(report, samples_sha256="these"), GOOD)


WORSE = worse()


@pytest.mark.parametrize(
    ("report", "expected", "levels"),
    [
        (GOOD, [(FP32, "system-out", "")], ["notice"]),
        (BAD, [(FP32, "failure", "fail")], ["error"]),
        (OPEN, [(FP32, "failure", "inconclusive")], ["warning"]),
        (judged(0, labelled=False), [(FP32, "failure", "unlabelled")], ["warning"]),
        (with_baseline(GOOD, GOOD), [(FP32, "system-out", ""), (BASELINE, "system-out", "")], ["notice", "notice"]),
        (with_baseline(BAD, BAD), [(FP32, "failure", "fail"), (BASELINE, "system-out", "")], ["error", "notice"]),
        (with_baseline(BAD, GOOD), [(FP32, "failure", "fail"), (BASELINE, "failure", "fail")], ["error", "error"]),
        (timed(GOOD, "pass"), [(FP32, "system-out", ""), (LATENCY, "system-out", "")], ["notice", "notice"]),
        (timed(GOOD, "fail"), [(FP32, "system-out", ""), (LATENCY, "failure", "fail")], ["notice", "error"]),
        (timed(OPEN, "fail"), [(FP32, "failure", "inconclusive"), (LATENCY, "failure", "fail")], ["warning", "error"]),
        (
            timed(GOOD, "inconclusive", "pass"),
            [(FP32, "system-out", ""), (LATENCY, "failure", "inconclusive"), (SPEEDUP, "system-out", "")],
            ["notice", "warning", "notice"],
        ),
        (
            with_baseline(judged(30), judged(0)),
            [(FP32, "failure", "inconclusive"), (BASELINE, "failure", "inconclusive")],
            ["warning", "warning"],
        ),
    ],
)
def test_the_gates_of_a_report(report: Report, expected: List[Tuple[str, str, str]], levels: List[str]) -> None:
    report = msgspec.structs.replace(report, classes=())
    found = read(junit(report, "build/net-int8", 1.5))
    assert found == expected
    red = [name for name, kind, _ in found if kind in ("failure", "error")]
    assert bool(red) == (VERDICT_CODES[report.outcome()] != 0)
    assert [command(line)[0] for line in commands(report, "build/net-int8")] == levels
    noticed = findings(code_quality(report, "build/net-int8", HERE))
    assert [(check, text.partition(": ")[0]) for check, _, text in noticed] == [("edgeres-gate", name) for name in red]
    severity = {"error": "critical", "warning": "major"}
    assert [level for _, level, _ in noticed] == [severity[level] for level in levels if level != "notice"]


def test_a_class_that_fell_fails_only_with_the_gate() -> None:
    """Twelve of 400 of one class: 0.3 pp of all, within the budget of 1, and far beyond chance."""
    names = [f"kind {n}" for n in range(10)]
    kept = judged(12, only_class=3, classes=names)
    assert kept.verdict == "pass"
    assert read(junit(kept, "b", 0)) == [(FP32, "system-out", ""), ("class kind 3", "skipped", "warning")]
    levels = [command(line)[0] for line in commands(kept, "b")]
    assert levels == ["notice", "warning"]
    (found,) = findings(code_quality(kept, "b", HERE))
    assert found[:2] == ("edgeres-class", "minor")
    late = read(junit(timed(kept, "fail"), "b", 0))  # too slow, and no worse for it
    assert late[1:] == [(LATENCY, "failure", "fail"), ("class kind 3", "skipped", "warning")]
    lost = judged(400, only_class=3, classes=names)
    assert read(junit(lost, "b", 0)) == [(FP32, "failure", "fail"), ("class kind 3", "failure", "fail")]
    assert [command(line)[0] for line in commands(lost, "b")] == ["error", "error"]


def test_a_finding_keeps_its_fingerprint_while_its_numbers_change() -> None:
    """GitLab tells by it what a merge request brings; another finding, or another bundle, has another one."""

    def marks(report: Report, bundle: str = "b") -> List[Any]:
        return [one["fingerprint"] for one in json.loads(code_quality(report, bundle, HERE))]

    names = ["same\n"] * 5 + ["same "] * 5
    before, after = judged(2000, classes=names), judged(2100, classes=names)
    assert cases(before)[0].message != cases(after)[0].message
    assert len(marks(before)) == 11
    assert marks(before) == marks(after)
    assert set(marks(before)).isdisjoint(marks(before, "other"))
    assert findings(code_quality(before, "b", HERE))[1][:2] == ("edgeres-class", "critical")


def test_all_classes_that_fell_are_one_annotation() -> None:
    """GitHub shows ten of a kind for each step, and a thousand classes may fall."""
    report = judged(2000)
    assert sum(change.fell for change in report.classes) == 10
    assert len(read(junit(report, "b", 0))) == 11
    level, properties, message = command(commands(report, "b")[1])
    assert (level, message.count("fell")) == ("error", 10)
    assert properties["title"] == "b: class 0, class 1, class 2 and 7 more fell"
    many = msgspec.structs.replace(report, classes=report.classes * 3)
    for text in (short_form(many), summary(many, "b"), command(commands(many, "b")[1])[2]):
        assert (text.count(" fell: "), text.count("… and 20 more that fell.")) == (10, 1)


def test_layers_that_do_not_run_as_planned_are_a_warning() -> None:
    planned = LayerSummary("gpu", "tensorrt", {"int8": 20})
    astray = LayerSummary("dla0", "tensorrt", {"int8": 19, "fp16": 1}, ("layer1.0.conv2 runs in fp16",))
    report = msgspec.structs.replace(GOOD, layers=(planned, astray))
    assert read(junit(report, "b", 0))[1:] == [
        ("layers for gpu", "system-out", ""),
        ("layers for dla0", "skipped", "warning"),
    ]
    level, properties, message = command(commands(report, "b")[2])
    assert (level, properties) == ("warning", {"title": "b: layers for dla0: warning"})
    assert message == "19 layers in int8, 1 in fp16; not as planned: layer1.0.conv2 runs in fp16"
    assert "Not as planned: layer1.0.conv2 runs in fp16" in short_form(report)


def test_names_cannot_break_out() -> None:
    report = judged(400, only_class=0, classes=[BLACK_BOX] * 10)
    name, kind, _ = read(junit(report, BLACK_BOX, 0))[1]
    assert kind == "failure"
    assert '\\x1b[31m \\x00 <b a="1">&\'\\ud800\\ufffe]]> 50%, a:b' in name
    for line in commands(report, BLACK_BOX):
        level, properties, message = command(line)
        assert (level, set(properties)) == ("error", {"title"})
        assert "50%, a:b" in properties["title"]
        assert message.isprintable()
    report = timed(report, "fail", "inconclusive")
    assert read(junit(report, BLACK_BOX, 0))[1:3] == [
        (LATENCY, "failure", "fail"),
        (SPEEDUP, "failure", "inconclusive"),
    ]
    for _, _, description in findings(code_quality(report, BLACK_BOX, Line(BLACK_BOX))):
        assert description.isprintable()
    text = summary(report, BLACK_BOX)
    assert "<b" not in text
    assert not re.search(r"(?<!\\)\| `", text)
    assert not any(line.startswith("::") for line in (short_form(report) + "\n" + text).splitlines())


@settings(max_examples=200)
@given(ANYTHING, ANYTHING)
def test_any_text_goes_through(title: str, message: str) -> None:
    level, properties, told = command(annotation("error", title, message))
    assert level == "error"
    assert set(properties) == {"title"}
    if message.isprintable():
        assert told == message
    ((name, kind, _),) = read(junit_error(message, title))
    assert (name, kind) == (FP32, "error")
    assert "\n" not in plain(message)
    assert len(findings(code_quality_error(message, title, HERE))) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'tests="1"', b'tests="one"'),
        (b' errors="0"', b""),
        (b'time="1.500"', b'time="1.5e3"'),
        (b"<system-out>", b"text<system-out>"),
        (b"<system-out>", b"<passed /><system-out>"),
        (b"<properties>", b'<properties><property name="x" />'),
        (b"<testcase ", b'<testcase file="a.py" '),
        (b"</system-out>", b"</system-out><skipped />"),
    ],
)
def test_the_schema_sees_what_is_wrong(before: bytes, after: bytes) -> None:
    content = junit(GOOD, "b", 1.5)
    assert before in content
    assert breaches(content) == []
    assert breaches(content.replace(before, after)) != []


def test_the_numbers_stand_in_the_file() -> None:
    root = ET.fromstring(junit(BAD, "build/net-int8", 12.3456, (("layer1.conv1",), "")))
    values = {node.attrib["name"]: node.attrib["value"] for node in root.iter("property")}
    assert (values["verdict"], values["samples"], values["drop_pp"], values["top1_engine"]) == (
        "fail", "4000", "10.0", "0.9",
    )  # fmt: skip
    assert root[0].attrib["time"] == root[0][1].attrib["time"] == "12.346"
    assert root[0][1].attrib["classname"] == "edgeres.net-int8"
    text = root[0][1][0].text or ""
    assert text.startswith("FAIL: INT8 loses 10.00 pp of top-1")
    assert "--keep-float layer1.conv1" in text


def test_a_verdict_is_against_fp32_and_the_outcome_counts_the_baseline() -> None:
    """FP32 is wrong where the baseline was right: this engine is as good as FP32, and worse than the last one."""
    root = ET.fromstring(junit(WORSE, "b", 0))
    values = {node.attrib["name"]: node.attrib["value"] for node in root.iter("property")}
    assert (values["verdict"], values["outcome"]) == ("pass", "fail")
    told = report_json(WORSE)
    assert (told["verdict"], told["baseline"]["verdict"], told["outcome"]) == ("pass", "fail", "fail")
    assert report_json(GOOD)["outcome"] == "pass"


def test_what_failed_stands_first() -> None:
    """The first line of the short form is all that pytest's summary shows; JUnit's text goes with what is red."""
    lines = short_form(WORSE).splitlines()
    assert lines[0].startswith("FAIL: against the baseline it loses 10.00 pp of top-1")
    assert lines[1].startswith("PASS: INT8 keeps top-1")
    fp32, baseline = ET.fromstring(junit(WORSE, "b", 0)).iter("testcase")
    assert (fp32[0].tag, baseline[0].tag) == ("system-out", "failure")
    assert "FAIL" not in (fp32[0].text or "")
    assert baseline[0].text == "\n".join(lines)
    assert baseline[0].attrib["message"] in lines[0]
    assert short_form(with_baseline(BAD, BAD)).startswith("FAIL: INT8 loses")
    assert short_form(with_baseline(BAD, GOOD)).startswith("FAIL: INT8 loses")
    assert short_form(with_baseline(GOOD, GOOD)).startswith("PASS: INT8 keeps")


def test_the_summary_is_a_table_and_the_verdict() -> None:
    lines = summary(with_baseline(BAD, GOOD), "build/net-int8").splitlines()
    assert lines[0] == "### ❌ edgeres validate build/net-int8: fail"
    assert "| top-1 | 100.00 % | 90.00 % |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert sum(line.startswith("- ❌ accuracy against") for line in lines) == 2


def test_what_a_manifest_calls_its_engine_does_not_break_the_table() -> None:
    strange = msgspec.structs.replace(BAD, backend="cpu\n| a | b | c | d |", precision="int8\x1b[31m<img>")
    text = summary(strange, "b")
    assert "\x1b" not in text
    assert "<img" not in text.lower()
    plain = [line for line in summary(BAD, "b").splitlines() if line.startswith("|")]
    assert len([line for line in text.splitlines() if line.startswith("|")]) == len(plain)


def test_nothing_is_told_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert ci.judged(BAD, "b", ((), "")) == []
    assert ci.stopped(SampleError("x"), "b", ci.Outputs()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_summary_is_appended_and_changes_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "summary.md"
    place.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place))
    assert len(ci.judged(GOOD, "b", ((), ""))) == 1
    assert place.read_text(encoding="utf-8").startswith("before\n### ✅ edgeres validate b: pass\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary.md"))
    assert [command(line)[0] for line in ci.judged(GOOD, "b", ((), ""))] == ["notice", "warning"]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place))
    place.write_bytes(b"x" * ((1 << 20) - 5))
    ci.judged(GOOD, "b", ((), ""))
    assert place.stat().st_size == (1 << 20) - 5


def test_what_could_not_be_judged_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    file = tmp_path / "new" / "junit.xml"
    told = tmp_path / "new" / "quality.json"
    (line,) = ci.stopped(SampleError("no samples: 100 %"), "b", ci.Outputs(file, told))
    assert command(line) == ("error", {"title": "b: not judged"}, "no samples: 100 %")
    assert read(file.read_bytes()) == [(FP32, "error", "error")]
    assert findings(told.read_bytes()) == [("edgeres-gate", "blocker", f"{FP32}: no samples: 100 %")]
    # a file that cannot be written does not hide the problem
    assert len(ci.stopped(SampleError("no samples"), "b", ci.Outputs(file / "x", file / "y"))) == 1


def test_an_old_file_is_gone_before_the_work_begins(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    for earlier in (junit(GOOD, "b", 0), b'<?xml version="1.0"?>\n<testsuite/>', b""):
        file.write_bytes(earlier)
        ci.make_way(ci.Outputs(junit=file))
        assert not file.exists()
    for earlier in (code_quality(GOOD, "b", HERE), code_quality(BAD, "b", HERE), b""):
        file.write_bytes(earlier)
        ci.make_way(ci.Outputs(code_quality=file))
        assert not file.exists()
    ci.make_way(ci.Outputs(file, file))
    ci.make_way(ci.Outputs(tmp_path / "new" / "folder" / "junit.xml"))
    assert list(tmp_path.iterdir()) == []
    file.write_text("a file")
    with pytest.raises(BundleError, match="no folder"):
        ci.make_way(ci.Outputs(code_quality=file / "quality.json"))
    with pytest.raises(BundleError, match="no ordinary file"):
        ci.make_way(ci.Outputs(tmp_path))


@pytest.mark.parametrize("content", [b"[tool]\n", b"<green/>", b" " * 1024 + b"<testsuites/>", bytes(range(256))])
def test_a_file_that_is_something_else_is_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"no JUnit file, and would be lost: --junit replaces"):
        ci.make_way(ci.Outputs(junit=file))
    with pytest.raises(
        BundleError, match=r"no code quality report of edgeres, and would be lost: --code-quality replaces"
    ):
        ci.make_way(ci.Outputs(code_quality=file))
    assert file.read_bytes() == content


def test_another_tools_findings_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    for other in (b'[{"check_name": "rubocop"}]', b'[\n  {\n    "check_name": "eslint"\n  }\n]\n', b"[]", b"[ ]\n"):
        file.write_bytes(other)
        with pytest.raises(BundleError, match=r"no code quality report of edgeres, and would be lost"):
            ci.make_way(ci.Outputs(code_quality=file))
        assert file.read_bytes() == other


def place_of(told: Path) -> Tuple[str, int]:
    (one,) = json.loads(told.read_bytes())
    return one["location"]["path"], one["location"]["lines"]["begin"]


def test_a_finding_lies_where_the_project_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = ci.Outputs(code_quality=tmp_path / "quality.json")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/recipe.toml").write_text("\n\nmax_drop = 1\n")
    few = msgspec.structs.replace(BAD, classes=())
    ci.write(told, few, "b", 1.0, ((), ""))
    assert place_of(tmp_path / "quality.json") == ("b/recipe.toml", 3)
    ci.stopped(BundleError("refused"), "b", told)  # whose recipe says what it likes
    assert place_of(tmp_path / "quality.json") == ("b/recipe.toml", 1)
    (tmp_path / "b/recipe.toml").rename(tmp_path / "elsewhere")
    (tmp_path / "b/recipe.toml").symlink_to("../elsewhere")
    ci.write(told, few, "b", 1.0, ((), ""))
    assert place_of(tmp_path / "quality.json") == ("b/recipe.toml", 1)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration/recipe.toml").write_text("\nmax_drop = 0.5\n")
    for tell in (lambda: ci.write(told, few, "b", 1.0, ((), "")), lambda: ci.stopped(BundleError("x"), "b", told)):
        tell()
        assert place_of(tmp_path / "quality.json") == ("calibration/recipe.toml", 2)


def test_what_to_mind_is_told_of_an_engine_that_is_too_slow_by_every_channel() -> None:
    for verdict in ("fail", "inconclusive"):
        slow = timed(GOOD, verdict)
        for text in (
            junit(slow, "b", 0).decode(), code_quality(slow, "b", HERE).decode(), summary(slow, "b"),
            short_form(slow), "".join(commands(slow, "b")),
        ):  # fmt: skip
            assert "Mind: other programs were at work." in text
    assert "Mind" not in short_form(timed(GOOD, "pass"))


def test_each_case_is_told_once() -> None:
    report = with_baseline(judged(2000), GOOD)
    told = [case.message for case in cases(report)]
    assert len(set(told)) == len(told) == 12
