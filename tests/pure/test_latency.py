"""Limits on the latency: the verdict follows from the rounds' interval, and only where it is asked for is measured."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

import edgeres
from edgeres import cli
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, Report, from_json, to_json
from edgeres.benchmark import independent_count, speedup, summarize, take_turns
from edgeres.errors import BackendError, RecipeError
from edgeres.exits import exit_code
from edgeres.gate import PACE
from edgeres.measurements import Benchmark
from edgeres.twins import Settings
from edgeres.validation import Limits, against_limits, compare, limit_headline, short_form

ROUNDS = 30
INT8 = [1.0 + n / 100 for n in np.random.default_rng(3).permutation(ROUNDS).tolist()]
FP32 = [2.0 * ms for ms in INT8]
"""The median of each round in ms: 1.00 to 1.29, in no order, and twice as many."""
# The sign test's interval of 30 observations: from the k-th smallest to the k-th largest; scipy is the oracle.
RANK = int(binom.ppf(0.025, ROUNDS, 0.5))
LOW, HIGH = sorted(INT8)[RANK - 1], sorted(INT8)[ROUNDS - RANK]


CPU = Engine("cpu", "cpu", "int8", FileRef("engine.onnx", "engine", 1), {}, {})
GPU = Engine("gpu", "tensorrt", "int8", FileRef("engine.plan", "engine", 1), {}, {})


def benchmark(
    int8: Sequence[float] = INT8, fp32: Optional[Sequence[float]] = FP32, batch: int = 1, notes: Tuple[str, ...] = ()
) -> Benchmark:
    """Return a benchmark whose rounds have these medians, in ms."""
    models = [("int8", int8), *([("fp32", fp32)] if fp32 is not None else [])]
    found = [summarize(name, batch, [np.full(9, 1e6 * ms, np.int64) for ms in rounds]) for name, rounds in models]
    return Benchmark(
        "net", "cpu", "cpu", "int8", (3, 4, 4), None, {"processor": "Some CPU"}, tuple(found),
        tuple(speedup(found[0], other) for other in found[1:]), {}, None, (), (), notes, engine_sha256="engine",
    )  # fmt: skip


def report(**changes: Any) -> Report:
    labels = np.arange(4000) % 10
    logits = np.eye(10, dtype=np.float32)[labels]
    made = compare(logits, logits, labels, max_drop_pp=1.0, backend="cpu", precision="int8")
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [
        (HIGH + 0.001, "pass"), (HIGH, "pass"), (HIGH - 0.001, "inconclusive"), (1.15, "inconclusive"),
        (LOW, "inconclusive"), (LOW - 0.001, "fail"), (0.5, "fail"),
    ],
)  # fmt: skip
def test_a_limit_on_the_median_is_judged_by_its_interval(limit: float, verdict: str) -> None:
    told = against_limits(benchmark(), Limits(max_latency_ms=limit))
    (found,) = told.limits
    assert found.ci95 == pytest.approx((LOW, HIGH))
    assert told.round_p50_ms == found.measured == pytest.approx(1.145)  # between the two in the middle
    assert (found.name, found.limit, found.verdict) == ("round_p50_ms", limit, verdict)
    assert (told.rounds, told.calls, told.device) == (ROUNDS, 9 * ROUNDS, "cpu (Some CPU)")


@pytest.mark.parametrize(
    ("limit", "verdict"), [(1.9, "pass"), (2.0, "pass"), (2.0001, "fail"), (3.0, "fail"), (1e-9, "pass")]
)
def test_a_speed_up_is_judged_by_its_interval(limit: float, verdict: str) -> None:
    (found,) = against_limits(benchmark(), Limits(min_speedup=limit)).limits
    assert found.measured == pytest.approx(2.0)  # in each round, so that the interval is a point
    assert (found.name, found.against, found.verdict) == ("speedup", "fp32", verdict)


def test_a_speed_up_whose_interval_holds_the_limit_is_open() -> None:
    uneven = [ms * (1.0 + n % 2) for n, ms in enumerate(INT8)]  # 1 or 2 times as fast, from round to round
    for limit, verdict in ((1.5, "inconclusive"), (0.9, "pass"), (2.1, "fail")):
        assert against_limits(benchmark(fp32=uneven), Limits(min_speedup=limit)).limits[0].verdict == verdict


def test_so_few_rounds_decide_nothing() -> None:
    told = against_limits(benchmark(INT8[:5], FP32[:5]), Limits(100.0, 0.01))
    assert [(found.ci95, found.verdict) for found in told.limits] == [(None, "inconclusive")] * 2
    assert "too few rounds for an interval" in limit_headline(report(latency=told), told.limits[0])


def loaded(seconds: float, count: int, rounds: int = PACE.rounds) -> np.ndarray:
    """Return rounds of some runs of the gate around 1.0, float64 ``(count, rounds)``, under AR(1) load that lasts."""
    stays = np.exp(-PACE.seconds / PACE.rounds / seconds) if seconds else 0.0
    noise = np.random.default_rng(0).standard_normal((count, rounds))
    for one in range(1, rounds):
        noise[:, one] = stays * noise[:, one - 1] + np.sqrt(1 - stays**2) * noise[:, one]
    return np.exp(0.2 * noise)


@pytest.mark.parametrize(("seconds", "known"), [(0.0, 0.95), (1.0, 0.6), (5.0, 0.15)])
def test_load_that_lasts_makes_no_verdict_certain(seconds: float, known: float) -> None:
    """The limit is the true median, so either verdict is wrong; counting all rounds gives 3, 30 and 65 % of them."""
    runs = [against_limits(benchmark(rounds.tolist(), None), Limits(1.0)).limits[0] for rounds in loaded(seconds, 200)]
    certain = np.mean([found.verdict != "inconclusive" for found in runs])
    assert certain <= 0.1
    assert np.mean([found.ci95 is not None for found in runs]) >= known


def test_rounds_count_as_many_as_are_independent() -> None:
    """Oracle: of an AR(1) series with coefficient p a share of (1 - p) / (1 + p) is; for n to infinity, on average."""
    for seconds in (0.5, 1.0, 2.0):
        p = np.exp(-PACE.seconds / PACE.rounds / seconds)
        counts = [independent_count(series) for series in loaded(seconds, 12, 1000)]
        assert np.mean(counts) == pytest.approx(1000 * (1 - p) / (1 + p), rel=0.2)
    assert independent_count(np.arange(30.0)) < 3  # slower and slower
    assert independent_count(np.arange(30.0) % 2) == independent_count(np.ones(30)) == 30


def test_where_load_lasts_only_what_is_far_beyond_is_decided() -> None:
    slower = sorted(INT8)  # 1.00 to 1.29, ever slower
    for limit, verdict in ((2.59, "pass"), (2.57, "inconclusive"), (0.51, "inconclusive"), (0.49, "fail")):
        told = against_limits(benchmark(slower), Limits(limit))
        (found,) = told.limits
        assert (found.ci95, found.verdict) == (None, verdict)
        assert f"no interval, for load lasted: 30 rounds count as {found.independent} in" in limit_headline(
            report(latency=told), found
        )
    still_open = report(latency=against_limits(benchmark(slower), Limits(1.2)))
    assert "load changed during the measurement" in short_form(still_open).splitlines()[-1]
    few = report(latency=against_limits(benchmark(INT8[:5], None), Limits(1.2)))
    assert "So few rounds decide nothing: measure longer" in short_form(few).splitlines()[-1]


def test_a_float_twin_is_what_computes_in_float() -> None:
    """`bench --alone --against OLD` has taken turns with an engine in int8, or in fp16."""
    for precision, known in (("int8", False), ("fp16", True)):
        made = benchmark()
        name = f"{precision} of old"
        other = msgspec.structs.replace(made.latencies[1], model=name)
        made = msgspec.structs.replace(
            made, latencies=(made.latencies[0], other), speedups=(speedup(made.latencies[0], other),)
        )
        if known:
            (found,) = against_limits(made, Limits(min_speedup=1.5)).limits
            assert (found.against, found.verdict) == (name, "pass")
        else:
            with pytest.raises(BackendError, match=r"it did with INT8 of old, which is none"):
                against_limits(made, Limits(min_speedup=1.5))


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), 0, -1.0, True, "8"])
def test_a_limit_that_is_none_is_refused_before_the_work(asked: List[Settings], limit: Any, judged: List[str]) -> None:
    with pytest.raises(RecipeError, match=r"(?s)max_latency_ms is .*: give a finite number.*min_speedup is "):
        edgeres.validate("net", max_latency_ms=limit, min_speedup=limit)
    assert judged == []


def test_a_speed_up_that_nothing_can_tell_is_refused_before_the_work(
    asked: List[Settings], judged: List[str], tmp_path: Path
) -> None:
    place = tmp_path / "net/manifest.json"
    manifest = from_json(place.read_bytes(), Manifest, "manifest.json")
    place.write_bytes(to_json(msgspec.structs.replace(manifest, engines=(GPU,))))
    with pytest.raises(BackendError, match=r"no float twin.*bench net --against OTHER --out.*report net --bench"):
        edgeres.validate("net", min_speedup=1.2)
    assert judged == []
    assert edgeres.validate("net", max_latency_ms=2.0).outcome() == "pass"
    half = msgspec.structs.replace(GPU, precision="fp16")
    place.write_bytes(to_json(msgspec.structs.replace(manifest, engines=(GPU, half))))
    assert edgeres.validate("net", min_speedup=1.2).outcome() == "pass"


@pytest.mark.parametrize("fault", ["error", "exchanged"])
def test_what_cannot_be_measured_leaves_the_accuracy(
    asked: List[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, fault: str
) -> None:
    def bench(*given: Any) -> Benchmark:
        if fault == "error":
            raise BackendError("the device is gone")
        return msgspec.structs.replace(benchmark(), engine_sha256="another")

    monkeypatch.setattr("edgeres.twins.bench_bundle", bench)
    said = {"error": "the device is gone", "exchanged": "accuracy and latency are of two engines"}[fault]
    flags = ("--max-latency-ms", "9", "--junit", "x.xml", "--code-quality", "x.json")
    assert exit_code(cli.cli, ["validate", "net", *flags]) == 1
    told = capsys.readouterr().out
    assert "PASS: INT8 keeps top-1" in told
    assert "ERROR: latency: could not be measured: " in told
    cases = [(case.attrib["name"], case[0].tag) for case in ET.parse(tmp_path / "x.xml").getroot().iter("testcase")]
    assert cases == [("accuracy against FP32", "system-out"), ("latency", "error")]
    (found,) = json.loads((tmp_path / "x.json").read_bytes())
    assert said in found["description"]
    assert (found["severity"], edgeres.validate("net", max_latency_ms=9.0).outcome()) == ("blocker", "error")


def test_the_gate_measures_until_there_are_rounds_that_decide() -> None:
    """A call of three seconds has six rounds in twenty seconds, and none more with a benchmark's pace."""
    now = [0]

    def call() -> None:
        now[0] += 3_000_000_000

    found = take_turns({"int8": call}, PACE, clock=lambda: now[0])
    assert len(found["int8"]) == PACE.fewest == 30


def test_what_was_not_measured_is_a_sentence() -> None:
    with pytest.raises(BackendError, match=r"no float twin.*leave --min-speedup out"):
        against_limits(benchmark(fp32=None), Limits(min_speedup=1.0))
    with pytest.raises(BackendError, match=r"calls of 1 frame, and none was measured"):
        against_limits(benchmark(batch=8), Limits(max_latency_ms=1.0))


def test_the_words_say_where_it_was_measured_and_what_to_do() -> None:
    slow = report(latency=against_limits(benchmark(notes=("other programs were at work",)), Limits(0.5, 1.5)))
    lines = short_form(slow).splitlines()
    assert lines[0] == (
        "FAIL: INT8 takes 1.145 ms a frame (p50; the engine alone, input prepared) on cpu (Some CPU) (95 % interval of "
        f"this run {LOW:.3f} to {HIGH:.3f}), against a limit of 0.5 ms: fails. Mind: other programs were at work."
    )
    passed = "PASS: INT8 is 2.00 times as fast as FP32 on cpu (Some CPU) (95 % interval of this run 2.000 to "
    assert lines[2].startswith(passed)
    assert "Mind" not in lines[2]
    assert "slower than was asked for" in lines[-1]


def test_the_outcome_is_the_worst_of_all() -> None:
    told = {limit: against_limits(benchmark(), Limits(limit)) for limit in (0.5, 1.15, 5.0)}
    found = [
        (report(verdict=accuracy, latency=told[limit]).outcome())
        for accuracy in ("pass", "inconclusive", "unlabelled", "fail")
        for limit in (5.0, 1.15, 0.5)
    ]
    assert found == [
        "pass", "inconclusive", "fail", "inconclusive", "inconclusive", "fail",
        "unlabelled", "inconclusive", "fail", "fail", "fail", "fail",
    ]  # fmt: skip
    judged = report(latency=told[0.5])
    assert (judged.accuracy(), judged.verdict) == ("pass", "pass")
    assert from_json(to_json(judged), Report, "report.json") == judged


@pytest.fixture
def judged() -> List[str]:
    """Which bundles were judged."""
    return []


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: List[str]) -> List[Settings]:
    """A bundle `net` in a folder of its own, whose engine is judged and measured by doubles; what was measured how."""
    told: List[Settings] = []

    def bench(bundle: Any, settings: Settings, watch: Any) -> Benchmark:
        told.append(settings)
        return benchmark(fp32=None if settings.alone else FP32)

    def judge(bundle: str, *given: Any, **options: Any) -> Report:
        judged.append(bundle)
        return report()

    monkeypatch.setattr("edgeres.judge.validate_bundle", judge)
    monkeypatch.setattr("edgeres.twins.bench_bundle", bench)
    raw = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (tmp_path / "net").mkdir()
    (tmp_path / "net/manifest.json").write_bytes(to_json(Manifest("net", "int8", {}, raw, (), {}, {}, engines=(CPU,))))
    monkeypatch.chdir(tmp_path)
    return told


def test_nothing_is_measured_unless_it_is_asked_for(asked: List[Settings]) -> None:
    assert edgeres.validate("net").latency is None
    assert asked == []
    told = edgeres.validate("net", max_latency_ms=2.0, backend="cpu").latency
    assert told is not None
    assert [found.name for found in told.limits] == ["round_p50_ms"]
    told = edgeres.validate("net", min_speedup=1.5).latency
    assert told is not None
    assert [found.name for found in told.limits] == ["speedup"]
    assert [(one.backend, one.batches, one.alone) for one in asked] == [("cpu", (1,), True), ("cpu", (1,), False)]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--max-latency-ms", "2"), 0),
        (("--max-latency-ms", "2", "--min-speedup", "1.5"), 0),
        (("--max-latency-ms", "0.5"), 1),
        (("--min-speedup", "2.5"), 1),
        (("--max-latency-ms", "1.15"), 3),
        (("--max-latency-ms", "1.15", "--policy", "point"), 3),  # the policy is that of the accuracy
        (("--max-latency-ms", "0"), 2),
        (("--max-latency-ms", "nan"), 2),
        (("--min-speedup", "inf"), 2),
    ],
)
def test_the_exit_code_follows_the_limits(asked: List[Settings], flags: Tuple[str, ...], code: int) -> None:
    assert exit_code(cli.cli, ["validate", "net", *flags]) == code
    assert len(asked) == (code != 2)


def test_an_engine_that_is_too_slow_is_no_baseline(
    asked: List[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    flags = ("--baseline", "accepted.json", "--update-baseline", "--max-latency-ms")
    assert exit_code(cli.cli, ["validate", "net", *flags, "0.5"]) == 1
    assert not (tmp_path / "accepted.json").exists()
    assert exit_code(cli.cli, ["validate", "net", *flags, "5"]) == 0
    assert from_json((tmp_path / "accepted.json").read_bytes(), Report, "accepted.json").latency is not None


def test_two_outputs_are_two_files(asked: List[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(cli.cli, ["validate", "net", "--junit", "x", "--code-quality", "x"]) == 2
    assert "--code-quality and --junit are both" in capsys.readouterr().err
    assert exit_code(cli.cli, ["validate", "net", "--code-quality", "net/x.json"]) == 2
    assert "lies in the bundle" in capsys.readouterr().err
