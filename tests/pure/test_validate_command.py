"""What `edgeres validate` writes, and where; judging is replaced, for what it finds is not what is tested here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Tuple

import msgspec
import numpy as np
import pytest

from edgeres import cli
from edgeres.artifacts import Manifest, Preprocessing, Report, from_json, to_json
from edgeres.exits import exit_code
from edgeres.validation import compare

Validate = Callable[..., int]


def judged(wrong: int, count: int = 4000, labelled: bool = True) -> Report:
    """Return the report on an engine that is wrong on ``wrong`` samples, where FP32 is right."""
    labels = np.arange(count) % 10
    answers = np.where(np.arange(count) < wrong, (labels + 1) % 10, labels)
    reference, engine = np.eye(10, dtype=np.float32)[labels], np.eye(10, dtype=np.float32)[answers]
    told = labels if labelled else None
    report = compare(reference, engine, told, max_drop_pp=1.0, backend="cpu", precision="int8")
    return msgspec.structs.replace(report, samples_sha256="these")


REPORTS = {
    "pass": judged(0),
    "fail": judged(400),
    "inconclusive": judged(0, 20),
    "unlabelled": judged(0, labelled=False),
}


GUESSING = compare(
    *(2 * [np.zeros((4000, 10), np.float32)]), np.arange(4000) % 10, max_drop_pp=1.0, backend="cpu", precision="int8"
)


@pytest.fixture
def validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Validate:
    """Return a call of `edgeres validate net` in a folder of its own, with what is to be found; it gives the code."""
    (tmp_path / "net").mkdir()
    raw = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (tmp_path / "net/manifest.json").write_bytes(to_json(Manifest("net", "int8", {}, raw, (), {}, {})))
    (tmp_path / "net/report.json").write_bytes(b"bound")
    monkeypatch.chdir(tmp_path)
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)

    def call(found: str, *arguments: str, judge: Any = None) -> int:
        monkeypatch.setattr("edgeres.judge.validate_bundle", judge or (lambda *told, **options: REPORTS[found]))
        return exit_code(cli.cli, ["validate", "net", *arguments])

    return call


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_net_that_knows_nothing_passes_with_a_warning(
    validate: Validate, capsys: pytest.CaptureFixture[str], flags: Tuple[str, ...]
) -> None:
    assert validate("", *flags, judge=lambda *told, **options: GUESSING) == 0
    out, err = capsys.readouterr()
    words = "FP32 answers no better than chance can (10.0 % of 4,000, 10 classes)"
    assert f"warning: {words}" in " ".join(err.split())
    assert json.loads(out)["chance"] == 0.1 if flags else words in " ".join(out.split())


def test_the_verdict_is_told_where_its_file_cannot_be_written(
    validate: Validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(*told: Any, **options: Any) -> Report:
        (tmp_path / "out.xml").mkdir()  # while it was judged
        return REPORTS["pass"]

    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert validate("pass", "--junit", "out.xml", judge=judge) == 1
    told = capsys.readouterr()
    assert "PASS: INT8 keeps top-1" in told.out
    assert "::notice title=net%3A accuracy against FP32%3A pass::" in told.out
    assert "cannot write" in told.err
    assert "out.xml" in told.err


def test_a_bundle_that_is_gone_by_then_has_its_verdict(
    validate: Validate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(*told: Any, **options: Any) -> Report:
        (tmp_path / "net/manifest.json").unlink()
        return REPORTS["fail"]

    assert validate("fail", "--junit", "out.xml", judge=judge) == 1
    assert "FAIL: INT8 loses 10.00 pp" in capsys.readouterr().out
    assert b'<failure type="fail"' in (tmp_path / "out.xml").read_bytes()


@pytest.mark.parametrize(("found", "code"), [("pass", 0), ("fail", 1), ("inconclusive", 1), ("unlabelled", 1)])
def test_only_what_passes_is_accepted(
    validate: Validate, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: str, code: int
) -> None:
    place = tmp_path / "accepted.json"
    flags = ("--baseline", "accepted.json", "--update-baseline")
    assert validate(found, *flags) == code
    assert place.exists() == (found == "pass")
    told = capsys.readouterr()
    assert f"{found.upper()}: " in told.out
    if found == "pass":
        assert from_json(place.read_bytes(), Report, "accepted.json") == REPORTS["pass"]
        return
    assert f"the verdict is {found}, and only an engine that passes is a baseline" in told.err
    place.write_bytes(b"before")
    validate(found, *flags, "--json")
    assert json.loads(capsys.readouterr().out)["outcome"] == found
    assert place.read_bytes() == b"before"


def test_no_baseline_is_written_into_the_bundle(
    validate: Validate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tmp_path / "net"
    (tmp_path / "folder").symlink_to("net")
    (tmp_path / "file.json").symlink_to("net/report.json")
    (net / "out.json").symlink_to("../elsewhere.json")
    before = {path.name: path.read_bytes() for path in net.iterdir() if path.name != "out.json"}
    inside = ("net/report.json", "net/manifest.json", "net/new.json", "net/deep/new.json", "folder/../net/report.json")
    for name in (*inside, "folder/report.json", "file.json", "net/out.json", str(net / "report.json")):
        assert validate("pass", "--baseline", name, "--update-baseline") == 2
        assert f"--baseline {name} lies in the bundle" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in net.iterdir() if path.name != "out.json"} == before
    assert (net / "out.json").is_symlink()
    assert validate("pass", "--baseline", "net.json", "--update-baseline") == 0
