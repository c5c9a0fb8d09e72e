"""What CI systems are told: JUnit files held against the published schema's facts, GitHub's commands read back."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Tuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres import ci
from edgeres.artifacts import LayerSummary, Report
from edgeres.cli import VERDICT_CODES, _report_json
from edgeres.errors import BundleError, SampleError
from edgeres.validation import against_baseline, compare, short_form
from edgeres.validation.cases import cases
from edgeres.validation.github import annotation, commands, plain, summary
from edgeres.validation.junit import junit, junit_error

# Of junit-10.xsd (Jenkins' xUnit plugin; Surefire's attributes): what an element may have, must have, and may hold.
ATTRIBUTES: Dict[str, Tuple[Set[str], Set[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set()),
    "testsuite": (
        {"name", "tests", "failures", "errors", "group", "time", "skipped", "timestamp", "hostname", "id", "package"},
        {"name", "tests", "failures", "errors"},
    ),
    "properties": (set(), set()),
    "property": ({"name", "value"}, {"name", "value"}),
    "testcase": ({"name", "time", "classname", "group"}, {"name"}),
    "failure": ({"type", "message"}, set()),
    "error": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testsuite", "properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
}
SUREFIRE_TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]*)?")
BLACK_BOX = 'evil\x1b[31m \x00 <b a="1">&\'\ud800\ufffe]]> 50%, a:b\r\n::error::x | `y`'
COUNT = 4000


def breaches(node: ET.Element) -> List[str]:
    """Return what the schema has against an element and all in it."""
    if node.tag not in ATTRIBUTES:
        return [f"unknown element {node.tag}"]
    may, must = ATTRIBUTES[node.tag]
    found = [f"{node.tag} has {name}" for name in set(node.attrib) - may]
    found += [f"{node.tag} lacks {name}" for name in must - set(node.attrib)]
    if node.tag in ("testsuite", "testsuites") and not SUREFIRE_TIME.fullmatch(node.attrib.get("time", "")):
        found.append(f"time {node.attrib['time']}")
    if node.tag in CHILDREN and (node.text or "").strip():
        found.append(f"text in {node.tag}")
    for child in node:
        if child.tag not in CHILDREN.get(node.tag, set()):
            found.append(f"{child.tag} in {node.tag}")
        found += breaches(child)
    return found


def read(content: bytes) -> List[Tuple[str, str, str]]:
    """Return (name, what it is, its type) of each case of a valid file, whose counts are right."""
    root = ET.fromstring(content)
    assert root.tag == "testsuites"
    assert breaches(root) == []
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
    return against_baseline(report, before, np.arange(report.samples) % 10)


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
GOOD, BAD, OPEN = judged(0), judged(400), judged(0, 20)


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
    red = any(kind in ("failure", "error") for _, kind, _ in found)
    assert red == (VERDICT_CODES[report.outcome()] != 0)
    assert [command(line)[0] for line in commands(report, "build/net-int8")] == levels


def test_a_class_that_fell_fails_only_with_the_gate() -> None:
    """Twelve of 400 of one class: 0.3 pp of all, within the budget of 1, and far beyond chance."""
    names = [f"kind {n}" for n in range(10)]
    kept = judged(12, only_class=3, classes=names)
    assert kept.verdict == "pass"
    assert read(junit(kept, "b", 0)) == [(FP32, "system-out", ""), ("class kind 3", "skipped", "warning")]
    levels = [command(line)[0] for line in commands(kept, "b")]
    assert levels == ["notice", "warning"]
    lost = judged(400, only_class=3, classes=names)
    assert read(junit(lost, "b", 0)) == [(FP32, "failure", "fail"), ("class kind 3", "failure", "fail")]
    assert [command(line)[0] for line in commands(lost, "b")] == ["error", "error"]


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
    text = summary(report, BLACK_BOX)
    assert "<b" not in text
    assert not re.search(r"(?<!\\)\| `", text)
    assert not any(line.startswith("::") for line in (short_form(report) + "\n" + text).splitlines())


@settings(max_examples=200)
@given(st.text(), st.text())
def test_any_text_goes_through(title: str, message: str) -> None:
    level, properties, told = command(annotation("error", title, message))
    assert level == "error"
    assert set(properties) == {"title"}
    if message.isprintable():
        assert told == message
    ((name, kind, _),) = read(junit_error(message, title))
    assert (name, kind) == (FP32, "error")
    assert "\n" not in plain(message)


def test_a_checker_that_sees_nothing_proves_nothing() -> None:
    suite = '<testsuite name="a" tests="1" failures="0" errors="0" time="1,5e3"><testcase time="1"/>{}</testsuite>'
    found = breaches(ET.fromstring(f"<testsuites>{suite.format('<failure/>')}</testsuites>"))
    assert found == ["time 1,5e3", "testcase lacks name", "failure in testsuite"]


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
    told = _report_json(WORSE)
    assert (told["verdict"], told["baseline"]["verdict"], told["outcome"]) == ("pass", "fail", "fail")
    assert _report_json(GOOD)["outcome"] == "pass"


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
    assert ci.stopped(SampleError("x"), "b", None) == []
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
    (line,) = ci.stopped(SampleError("no samples: 100 %"), "b", file)
    assert command(line) == ("error", {"title": "b: not judged"}, "no samples: 100 %")
    assert read(file.read_bytes()) == [(FP32, "error", "error")]
    # a file that cannot be written does not hide the problem
    assert len(ci.stopped(SampleError("no samples"), "b", tmp_path / "new" / "junit.xml" / "x")) == 1


def test_an_old_file_is_gone_before_the_work_begins(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    for earlier in (junit(GOOD, "b", 0), b'<?xml version="1.0"?>\n<testsuite/>', b""):
        file.write_bytes(earlier)
        ci.make_way(file)
        assert not file.exists()
    ci.make_way(file)
    ci.make_way(tmp_path / "new" / "folder" / "junit.xml")
    assert list(tmp_path.iterdir()) == []
    file.write_text("a file")
    with pytest.raises(BundleError, match="no folder"):
        ci.make_way(file / "junit.xml")
    with pytest.raises(BundleError, match="no ordinary file"):
        ci.make_way(tmp_path)


@pytest.mark.parametrize("content", [b"[tool]\n", b"<green/>", b" " * 1024 + b"<testsuites/>", bytes(range(256))])
def test_a_file_that_is_no_junit_file_is_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_bytes(content)
    with pytest.raises(BundleError, match="no JUnit file"):
        ci.make_way(file)
    assert file.read_bytes() == content


def test_each_case_is_told_once() -> None:
    report = with_baseline(judged(2000), GOOD)
    told = [case.message for case in cases(report)]
    assert len(set(told)) == len(told) == 12
