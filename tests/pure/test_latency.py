"""Limits on the latency: the verdict follows from the rounds' interval, and only where it is asked for is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

import edgeres
from edgeres import cli
from edgeres.artifacts import Manifest, Preprocessing, Report, from_json, to_json
from edgeres.benchmark import speedup, summarize
from edgeres.errors import BackendError
from edgeres.measurements import Benchmark
from edgeres.twins import Settings
from edgeres.validation import Limits, against_limits, compare, limit_headline, short_form

ROUNDS = 30
INT8, FP32 = [1.0 + n / 100 for n in range(ROUNDS)], [2.0 + n / 50 for n in range(ROUNDS)]
"""The median of each round in ms: 1.00 to 1.29, and twice as many."""
# The sign test's interval of 30 observations: from the k-th smallest to the k-th largest; scipy is the oracle.
RANK = int(binom.ppf(0.025, ROUNDS, 0.5))
LOW, HIGH = INT8[RANK - 1], INT8[ROUNDS - RANK]


def benchmark(
    int8: Sequence[float] = INT8, fp32: Optional[Sequence[float]] = FP32, batch: int = 1, notes: Tuple[str, ...] = ()
) -> Benchmark:
    """Return a benchmark whose rounds have these medians, in ms."""
    models = [("int8", int8), *([("fp32", fp32)] if fp32 is not None else [])]
    found = [summarize(name, batch, [np.full(9, 1e6 * ms, np.int64) for ms in rounds]) for name, rounds in models]
    return Benchmark(
        "net", "cpu", "cpu", "int8", (3, 4, 4), None, {"processor": "Some CPU"}, tuple(found),
        tuple(speedup(found[0], other) for other in found[1:]), {}, None, (), (), notes,
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
    assert told.p50_ms == found.measured == pytest.approx(1.145)  # between the two in the middle
    assert (found.name, found.limit, found.verdict) == ("p50_ms", limit, verdict)
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


def test_what_was_not_measured_is_a_sentence() -> None:
    with pytest.raises(BackendError, match=r"no float twin.*leave --min-speedup out"):
        against_limits(benchmark(fp32=None), Limits(min_speedup=1.0))
    with pytest.raises(BackendError, match=r"calls of 1 frame, and none was measured"):
        against_limits(benchmark(batch=8), Limits(max_latency_ms=1.0))


def test_the_words_say_where_it_was_measured_and_what_to_do() -> None:
    slow = report(latency=against_limits(benchmark(notes=("other programs were at work",)), Limits(0.5, 1.5)))
    lines = short_form(slow).splitlines()
    assert lines[0] == (
        f"FAIL: INT8 takes 1.145 ms a frame (p50) on cpu (Some CPU) (95 % interval {LOW:.3f} to {HIGH:.3f}), "
        "against a limit of 0.5 ms: fails."
    )
    assert lines[2].startswith("PASS: INT8 is 2.00 times as fast as FP32 on cpu (Some CPU) (95 % interval 2.000 to ")
    assert "slower than was asked for" in lines[-1]
    open_ = report(latency=against_limits(benchmark(notes=("other programs were at work",)), Limits(1.15)))
    assert "Mind: other programs were at work" in short_form(open_).splitlines()[-1]


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
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> List[Settings]:
    """A bundle `net` in a folder of its own, whose engine is judged and measured by doubles; what was measured how."""
    told: List[Settings] = []

    def bench(bundle: Any, settings: Settings, watch: Any) -> Benchmark:
        told.append(settings)
        return benchmark(fp32=None if settings.alone else FP32)

    monkeypatch.setattr("edgeres.judge.validate_bundle", lambda *given, **options: report())
    monkeypatch.setattr("edgeres.twins.bench_bundle", bench)
    raw = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (tmp_path / "net").mkdir()
    (tmp_path / "net/manifest.json").write_bytes(to_json(Manifest("net", "int8", {}, raw, (), {}, {})))
    monkeypatch.chdir(tmp_path)
    return told


def test_nothing_is_measured_unless_it_is_asked_for(asked: List[Settings]) -> None:
    assert edgeres.validate("net").latency is None
    assert asked == []
    told = edgeres.validate("net", max_latency_ms=2.0, backend="cpu").latency
    assert told is not None
    assert [found.name for found in told.limits] == ["p50_ms"]
    told = edgeres.validate("net", min_speedup=1.5).latency
    assert told is not None
    assert [found.name for found in told.limits] == ["speedup"]
    assert [(one.backend, one.batches, one.alone) for one in asked] == [("cpu", (1,), True), ("auto", (1,), False)]


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
    assert cli._exit_code(["validate", "net", *flags]) == code
    assert len(asked) == (code != 2)


def test_an_engine_that_is_too_slow_is_no_baseline(
    asked: List[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    flags = ("--baseline", "accepted.json", "--update-baseline", "--max-latency-ms")
    assert cli._exit_code(["validate", "net", *flags, "0.5"]) == 1
    assert not (tmp_path / "accepted.json").exists()
    assert cli._exit_code(["validate", "net", *flags, "5"]) == 0
    assert from_json((tmp_path / "accepted.json").read_bytes(), Report, "accepted.json").latency is not None


def test_two_outputs_are_two_files(asked: List[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._exit_code(["validate", "net", "--junit", "x", "--code-quality", "x"]) == 2
    assert "--code-quality and --junit are both" in capsys.readouterr().err
    assert cli._exit_code(["validate", "net", "--code-quality", "net/x.json"]) == 2
    assert "lies in the bundle" in capsys.readouterr().err
