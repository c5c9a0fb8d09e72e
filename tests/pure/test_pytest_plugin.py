"""The gate in pytest, in sessions of its own. Judging is replaced: a bundle's name says how many answers it loses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Dict, List

import pytest

import edgeres.pytest_plugin
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, to_json
from edgeres.judge import validate_bundle
from edgeres.twins import bench_bundle

pytest_plugins = "pytester"

CONFTEST = '''
import json
from pathlib import Path

import numpy as np

import edgeres.judge
import edgeres.twins
from edgeres.benchmark import speedup, summarize
from edgeres.errors import BackendError, SampleError
from edgeres.measurements import Benchmark
from edgeres.validation import compare


def validate_bundle(
    bundle, images=None, labels=None, *, baseline=None, max_drop=None, trusted_keys=None, watch=None, **options
):
    """400 of 4,000 answers lost of "bad", none of "good"; 20 samples are all that "open" has."""
    with open(Path(__file__).parent / "calls.txt", "a") as stream:
        if options["backend"] == "auto":
            del options["backend"]
        told = {"bundle": str(bundle), "data": images and str(images), "max_drop": max_drop, **options}
        if trusted_keys is not None:
            told["trusted_keys"] = [str(key) for key in trusted_keys]
        stream.write(json.dumps(told) + "\\n")
    name = Path(bundle).name
    if name == "empty":
        raise SampleError("there are no samples")
    labels = np.arange(20 if name == "open" else 4000) % 10
    answers = labels.copy()
    answers[: 400 if name == "bad" else 0] += 1
    truth, given = np.eye(11, dtype=np.float32)[labels], np.eye(11, dtype=np.float32)[answers]
    return compare(
        truth, given, None if name == "unlabelled" else labels, max_drop_pp=1.0 if max_drop is None else max_drop,
        backend="cpu", precision="int8",
    )


def bench_bundle(bundle, settings, watch):
    """Each round of int8 takes 1 ms, and one of fp32 2 ms; "unmeasured" cannot be."""
    if Path(bundle).name == "unmeasured":
        raise BackendError("the device is gone")
    int8, fp32 = (summarize(name, 1, [np.full(9, ms * 10**6)] * 30) for name, ms in (("int8", 1), ("fp32", 2)))
    return Benchmark(
        "", "cpu", "cpu", "int8", (3, 4, 4), None, {"processor": "Some CPU"}, (int8, fp32), (speedup(int8, fp32),), {},
        None, (), (), engine_sha256="engine",
    )


edgeres.judge.validate_bundle = validate_bundle
edgeres.twins.bench_bundle = bench_bundle
'''


GONE = """

judge = edgeres.judge.validate_bundle


def judged_and_gone(bundle, *given, **options):
    report = judge(bundle, *given, **options)
    (Path(bundle) / "manifest.json").unlink()
    return report


edgeres.judge.validate_bundle = judged_and_gone
"""


def installed() -> bool:
    found: Any = entry_points()
    named = found.select(group="pytest11") if hasattr(found, "select") else found.get("pytest11", ())
    return any(one.name == "edgeres" for one in named)


class Session:
    """A folder with bundles of every kind, in which pytest is run."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.calls_file = pytester.path / "calls.txt"
        pytester.makeconftest(CONFTEST)
        raw = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        engine = Engine("cpu", "cpu", "int8", FileRef("engine.onnx", "engine", 1), {}, {})
        for name in ("good", "bad", "open", "empty", "unlabelled", "unmeasured"):
            folder = pytester.mkdir(name)
            (folder / "manifest.json").write_bytes(
                to_json(Manifest(name, "int8", {}, raw, (), {}, {}, engines=(engine,)))
            )

    def run(self, *arguments: str) -> pytest.RunResult:
        plugin = () if installed() else ("-p", "edgeres.pytest_plugin")
        return self.pytester.runpytest_inprocess(*plugin, "-p", "no:cacheprovider", *arguments)

    def calls(self) -> List[Any]:
        return (
            [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []
        )


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Session:
    # The inner sessions run in this process: what their conftest replaces must come back for the tests after these.
    monkeypatch.setattr("edgeres.judge.validate_bundle", validate_bundle)
    monkeypatch.setattr("edgeres.twins.bench_bundle", bench_bundle)
    return Session(pytester)


GATED = "def test_net(edgeres_gate):\n    edgeres_gate.check()\n"


def marked(keywords: str, body: str = GATED) -> str:
    return f"import pytest\n\n@pytest.mark.edgeres({keywords})\n{body}"


@pytest.mark.parametrize(
    ("bundle", "outcome", "said"),
    [
        ("good", {"passed": 1}, ""),
        ("bad", {"failed": 1}, "FAIL: INT8 loses 10.00 pp of top-1 *: fails with 4,000 samples."),
        ("open", {"failed": 1}, "INCONCLUSIVE: INT8 keeps top-1 *: cannot be decided with 20 samples*"),
        ("unlabelled", {"failed": 1}, "UNLABELLED: * without labels its accuracy cannot be judged."),
        ("empty", {"failed": 1}, "there are no samples"),
    ],
)
@pytest.mark.parametrize("by", ["file", "option"])
def test_a_gate_says_what_the_report_says(session: Session, bundle: str, outcome: Any, said: str, by: str) -> None:
    if by == "file":
        session.pytester.makepyfile(marked(f"bundle={bundle!r}"))
        result = session.run()
    else:
        result = session.run("--edgeres-bundle", bundle)
    result.assert_outcomes(**outcome)
    assert result.ret == (0 if "passed" in outcome else 1)
    lines = result.outlines
    assert "collected 1 item" in "".join(lines)
    if said:
        result.stdout.fnmatch_lines([said])
        assert not any(word in line for line in lines for word in ("Traceback", "edgeres_gate", "def ", "Error"))
        assert len([line for line in lines if line.startswith("FAILED")]) == 1
    if bundle == "bad":
        result.stdout.fnmatch_lines(["Class * fell: *", "  *--precision fp16."])


def test_no_test_file_is_needed_and_none_is_made(session: Session) -> None:
    assert session.run().ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert session.run("--edgeres-bundle", "good", "--edgeres-data", "samples").ret == 0
    place = session.pytester.path
    (call,) = session.calls()
    assert call == {"bundle": str(place / "good"), "data": str(place / "samples"), "max_drop": None, "workforce": None}
    assert sorted(path.name for path in (place / "good").iterdir()) == ["manifest.json"]


def test_the_gates_own_test_can_be_chosen_and_left_out(session: Session) -> None:
    session.pytester.makepyfile("def test_else():\n    pass\n")
    session.run("--edgeres-bundle", "bad").assert_outcomes(failed=1, passed=1)
    session.run("--edgeres-bundle", "bad", "-m", "edgeres").assert_outcomes(failed=1, deselected=1)
    session.run("--edgeres-bundle", "bad", "-m", "not edgeres").assert_outcomes(passed=1, deselected=1)
    before = session.calls()
    result = session.run("--edgeres-bundle", "bad", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*::test_else", "edgeres::gate", "*2 tests collected*"])
    assert session.calls() == before  # nothing is judged


@pytest.mark.parametrize(
    ("body", "others"),
    [
        (GATED, {"failed": 2}),
        ("def test_net(edgeres_gate):\n    assert edgeres_gate.report\n", {"failed": 1, "passed": 1}),
        ("import pytest\n\n@pytest.mark.skip\n" + GATED, {"failed": 1, "skipped": 1}),
        ("import pytest\n\n@pytest.mark.xfail\n" + GATED, {"failed": 1, "xfailed": 1}),
        (marked("bundle='good'"), {"failed": 1, "passed": 1}),
        (marked("max_drop='much'"), {"failed": 1, "errors": 1}),
    ],
)
def test_the_gate_asked_for_is_checked_whatever_else_asks_for_it(session: Session, body: str, others: Any) -> None:
    session.pytester.makepyfile(body)
    session.run("--edgeres-bundle", "bad").assert_outcomes(**others)
    calls = [call["bundle"] for call in session.calls()]
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("option", ["bundle", "data", "baseline", "backend", "policy", "max-drop"])
def test_an_empty_option_is_wrong_usage(session: Session, option: str) -> None:
    """As of a variable that is not set: --edgeres-bundle "$BUNDLE" must not leave the gate out."""
    session.pytester.makepyfile("def test_else():\n    pass\n")
    result = session.run(f"--edgeres-{option}", "")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--edgeres-{option}: *"])


def test_a_bundle_is_judged_once_for_all_its_tests(session: Session) -> None:
    session.pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_net(edgeres_gate, number):
            assert edgeres_gate.check() is edgeres_gate.report

        @pytest.mark.edgeres(inconclusive="skip")
        def test_again(edgeres_gate):
            assert edgeres_gate.report.verdict == "pass"

        @pytest.mark.edgeres(max_drop=2)
        def test_otherwise(edgeres_gate):
            assert edgeres_gate.report.max_drop_pp == 2
        """
    )
    session.run("--edgeres-bundle", "good").assert_outcomes(passed=6)
    assert [call["max_drop"] for call in session.calls()] == [None, 2.0]


def test_each_worker_of_xdist_does_its_share(session: Session) -> None:
    """The gate's own test runs once, and its words come back whole."""
    session.pytester.makepyfile("import pytest\n\n@pytest.mark.parametrize('n', range(4))\ndef test(n):\n    pass\n")
    result = session.run("-n", "2", "--edgeres-bundle", "bad")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(["FAIL: INT8 loses 10.00 pp of top-1 *", "FAILED edgeres::gate*"])
    assert len(session.calls()) == 1


@pytest.mark.parametrize(
    ("asked", "outcome"), [("fail", {"failed": 2}), ("skip", {"skipped": 2}), ("pass", {"passed": 2})]
)
def test_what_cannot_be_decided_is_not_green_unless_asked_for(session: Session, asked: str, outcome: Any) -> None:
    session.pytester.makepyfile(GATED)
    result = session.run("--edgeres-bundle", "open", "--edgeres-inconclusive", asked)
    result.assert_outcomes(**outcome)
    # what fails, fails, whatever is asked for
    session.run("--edgeres-bundle", "bad", "--edgeres-inconclusive", asked).assert_outcomes(failed=2)


def test_the_nearest_mark_counts_before_the_command_line_and_that_before_the_file(session: Session) -> None:
    session.pytester.makeini(
        "[pytest]\nedgeres_bundle = bad\nedgeres_max_drop = 5\nedgeres_policy = point\naddopts = --strict-markers\n"
    )
    session.pytester.makepyfile(
        """
        import pytest

        @pytest.mark.edgeres(bundle="open", max_drop=50)
        class TestOne:
            def test_class(self, edgeres_gate):
                assert edgeres_gate.bundle.name == "open"
                assert edgeres_gate.check().max_drop_pp == 50

            @pytest.mark.edgeres(max_drop=60.5, backend="cpu")
            def test_nearer(self, edgeres_gate):
                assert edgeres_gate.check().max_drop_pp == 60.5

        def test_none(edgeres_gate):
            assert edgeres_gate.bundle.name == "bad"
            assert edgeres_gate.report.max_drop_pp == 7
        """
    )
    session.run("--edgeres-max-drop", "7").assert_outcomes(passed=3)
    assert {call["policy"] for call in session.calls()} == {"point"}
    assert [call.get("backend") for call in session.calls()] == [None, "cpu", None]


def asked_keys(session: Session) -> List[Any]:
    return [call.get("trusted_keys") for call in session.calls()]


def test_keys_are_told_by_mark_option_or_ini_file(session: Session) -> None:
    place = session.pytester.path
    for name in ("a.pub", "b.pub"):
        (place / name).write_text("")
    session.pytester.makepyfile(GATED.replace("check()", "report"))
    session.run("--edgeres-bundle", "good", "--edgeres-key", "a.pub", "--edgeres-key", "b.pub", "-m", "not edgeres")
    session.pytester.makeini("[pytest]\nedgeres_bundle = good\nedgeres_key =\n    b.pub\n    a.pub\n")
    session.run().assert_outcomes(passed=1)
    for told in ("'b.pub'", "['b.pub']"):
        session.pytester.makepyfile(marked(f"key={told}", GATED.replace("check()", "report")))
        session.run().assert_outcomes(passed=1)
    a, b = str(place / "a.pub"), str(place / "b.pub")
    assert asked_keys(session) == [[a, b], [b, a], [b], [b]]


def test_a_manifest_that_nobody_trusted_signed_hides_no_verdict(session: Session) -> None:
    """Judging is replaced here, so the manifest is read for the report's hints alone; there are none then."""
    pytest.importorskip("cryptography", reason="signatures need it: pip install 'edgeres[sign]'")
    from edgeres.signing import make_pair

    make_pair(session.pytester.path / "k")
    result = session.run("--edgeres-bundle", "bad", "--edgeres-key", "k.pub")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["FAIL: INT8 loses 10.00 pp *"])


def test_paths_of_a_mark_count_from_the_root_folder(session: Session) -> None:
    session.pytester.makeini("[pytest]\n")
    folder = session.pytester.mkdir("inner")
    (folder / "test_inner.py").write_text(marked("bundle='good', data='samples'"))
    session.pytester.chdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        session.run().assert_outcomes(passed=1)
        session.run("--edgeres-bundle", "../good", "-m", "not edgeres", "--co").assert_outcomes()
    assert session.calls()[0]["bundle"] == str(session.pytester.path / "good")


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ("bundel='good'", "*has no keyword 'bundel'; it has bundle, data, max_drop, *"),
        ("'good'", "*has no values without a keyword; it has bundle, *"),
        (
            "bundle='good', max_drop='much', policy='mood'",
            "*max_drop: 'much' is no number *policy is 'mood': choose one of*",
        ),
        ("bundle='good', max_drop=-1", "*max_drop: -1 is no number of percentage points, 0 to 100"),
        ("bundle='good', max_drop=True", "*max_drop: True is no number *"),
        ("bundle='good', max_latency_ms=0", "*max_latency_ms: 0 is no number above 0"),
        ("bundle='good', min_speedup=True", "*min_speedup: True is no number above 0"),
        ("bundle='', data=''", "*bundle is '': give a path; data is '': give a path"),
        ("bundle='good', key=[]", "*key is [[]]: give the path of a public key, or a list of them"),
        ("bundle='good', key=7", "*key is 7: give the path of a public key, or a list of them"),
        ("bundle='good', key=['']", "*key is [[]'']: give the path of a public key, or a list of them"),
        ("bundle=7, data=[1]", "*bundle is 7: give a path; data is [[]1]: give a path"),
        ("bundle='good', inconclusive='maybe'", "*inconclusive is 'maybe': choose one of fail, skip, pass"),
        ("max_drop=1", "edgeres_gate has no bundle to judge. Name one: --edgeres-bundle DIR, *"),
    ],
)
def test_what_a_mark_does_not_have_is_refused(session: Session, keywords: str, said: str) -> None:
    session.pytester.makepyfile(marked(keywords))
    result = session.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([said])
    assert session.calls() == []


@pytest.mark.parametrize("points", ["nan", "-1", "101", "much"])
def test_what_an_option_does_not_take_is_wrong_usage(session: Session, points: str) -> None:
    result = session.run("--edgeres-bundle", "good", "--edgeres-max-drop", points)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--edgeres-max-drop: '{points}' is no number of percentage points, 0 to 100"])


def test_a_limit_on_the_latency_is_asked_for_like_all_else(session: Session) -> None:
    session.run("--edgeres-bundle", "good", "--edgeres-max-latency-ms", "1.5").assert_outcomes(passed=1)
    slow = session.run("--edgeres-bundle", "good", "--edgeres-max-latency-ms", "0.5")
    slow.assert_outcomes(failed=1)
    slow.stdout.fnmatch_lines(
        ["FAIL: INT8 takes 1.000 ms a frame (p50; the engine alone, input prepared) on cpu (Some CPU) *: fails."]
    )
    session.pytester.makepyfile(marked("bundle='good', max_latency_ms=2, min_speedup=1.5"))
    session.run().assert_outcomes(passed=1)
    session.pytester.makeini("[pytest]\nedgeres_min_speedup = 2.5\n")
    session.pytester.makepyfile(marked("bundle='good'"))
    session.run().stdout.fnmatch_lines(["FAIL: INT8 is 2.00 times as fast as FP32 on cpu (Some CPU) *: fails."])
    for wrong in ("0", "inf", "nan", "much"):
        assert session.run("--edgeres-min-speedup", wrong).ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("inconclusive", ["fail", "skip", "pass"])
def test_what_could_not_be_measured_fails_whatever_passes(session: Session, inconclusive: str) -> None:
    flags = ("--edgeres-bundle", "unmeasured", "--edgeres-inconclusive", inconclusive)
    session.run(*flags).assert_outcomes(passed=1)
    result = session.run(*flags, "--edgeres-max-latency-ms", "1.5")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["ERROR: latency: could not be measured: the device is gone", "PASS: INT8 keeps top-1*"]
    )


def test_a_gate_that_passes_needs_no_hints(session: Session) -> None:
    """The bundle is gone once it was judged."""
    session.pytester.makeconftest(CONFTEST + GONE)
    session.run("--edgeres-bundle", "good").assert_outcomes(passed=1)
    assert not (session.pytester.path / "good/manifest.json").exists()


def test_a_marked_test_without_the_fixture_is_no_gate(session: Session) -> None:
    session.pytester.makepyfile(
        marked("bundle='bad'", "def test_net():\n    pass\n")
        + "\n\n@pytest.mark.edgeres(bundle='good')\nclass TestMany:\n    def test_else(self):\n        pass\n"
    )
    result = session.run()
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["test_net is marked with edgeres and does not take the fixture edgeres_gate: *"])


def test_an_own_failure_keeps_its_traceback(session: Session) -> None:
    session.pytester.makepyfile(marked("bundle='good'", "def test_net(edgeres_gate):\n    assert 1 == 2\n"))
    session.run().stdout.fnmatch_lines([">       assert 1 == 2"])


def test_the_outcome_stands_in_pytests_own_junit(session: Session) -> None:
    session.run("--edgeres-bundle", "bad", "--junitxml", "out.xml")
    text = (session.pytester.path / "out.xml").read_text(encoding="utf-8")
    assert '<property name="edgeres_outcome" value="fail"' in text
    assert "<failure" in text
    assert "FAIL: INT8 loses 10.00 pp" in text


def test_help_names_every_option(session: Session) -> None:
    text = "\n".join(session.run("--help").outlines)
    for option in edgeres.pytest_plugin.KEYWORDS:
        assert f"--edgeres-{option.replace('_', '-')}" in text
    assert "edgeres(bundle, data, " in "\n".join(session.run("--markers").outlines)


def test_a_session_without_a_gate_pays_nothing() -> None:
    code = "import edgeres.pytest_plugin, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "edgeres.pytest_plugin" in loaded
    assert loaded.isdisjoint({"numpy", "msgspec", "click", "rich", "onnxruntime", "edgeres.artifacts", "edgeres.judge"})


def test_pytest_6_2_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROS 2 Humble has 6.2.5, and a plugin that cannot be imported ends every run, whatever is tested.

    Source: ``pytest.__all__`` of 6.2.5, as far as a plugin may want it.
    """
    old = "Collector ExitCode FixtureRequest Item Session UsageError fail fixture hookimpl mark skip"
    spare = ModuleType("pytest")
    for name in old.split():
        setattr(spare, name, getattr(pytest, name))
    monkeypatch.setitem(sys.modules, "pytest", spare)
    source = Path(edgeres.pytest_plugin.__file__)
    names: Dict[str, Any] = {"__name__": "plugin"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), names)  # as an import does
    config = SimpleNamespace(addinivalue_line=lambda *told: None)
    names["_judged"] = lambda **told: told["bundle"]
    names["pytest_configure"](config)
    assert names["Gate"](config, {"bundle": "net"}).report == "net"
    del spare.fixture
    with pytest.raises(AttributeError):
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), {"__name__": "plugin"})
