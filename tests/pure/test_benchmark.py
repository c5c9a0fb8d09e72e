"""Latencies in turns under a clock of our own: what counts, what cancels, and what is said of it."""

from __future__ import annotations

import statistics
from typing import Callable, Dict, List

import numpy as np
import pytest
from scipy.stats import binom

from edgeres.benchmark import (
    FEWEST,
    ROUNDS,
    SETTLE_NS,
    Pace,
    answer,
    median_interval,
    minding,
    speedup,
    summarize,
    take_turns,
    verdict,
)
from edgeres.measurements import Latency, Speedup

MS = 1_000_000


class Machine:
    """A clock that only calls move: each model takes its ns, by a function of the time and of who ran before."""

    def __init__(self, **costs: Callable[[Machine], float]) -> None:
        self.now = 0
        self.costs = costs
        self.log: List[str] = []

    def clock(self) -> int:
        return self.now

    @property
    def calls(self) -> Dict[str, Callable[[], None]]:
        return {name: lambda name=name: self.run(name) for name in self.costs}

    def run(self, name: str) -> None:
        taken = int(self.costs[name](self))
        self.log.append(name)
        self.now += taken

    def measure(self, pace: Pace, **options: object) -> Dict[str, List[np.ndarray]]:
        return take_turns(self.calls, pace, clock=self.clock, **options)  # type: ignore[arg-type]


def compared(found: Dict[str, List[np.ndarray]]) -> Speedup:
    one, other = (summarize(name, 1, rounds) for name, rounds in found.items())
    return speedup(one, other)


def test_what_is_measured_is_what_passed() -> None:
    machine = Machine(one=lambda m: 2 * MS, other=lambda m: 3 * MS)
    found = machine.measure(Pace(seconds=6.0))
    assert {name: {int(ns) for ns in np.concatenate(rounds)} for name, rounds in found.items()} == {
        "one": {2 * MS},
        "other": {3 * MS},
    }
    assert [len(rounds) for rounds in found.values()] == [ROUNDS, ROUNDS]
    assert compared(found).ratio == pytest.approx(1.5)
    assert machine.now <= (6.0 + 2 * 0.5) * 1e9 + 200 * MS  # a round and two calls more at most


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    """Its speed falls to a quarter while it is measured; one model after the other would tell another ratio."""

    def slower(ms: float) -> Callable[[Machine], float]:
        return lambda m: ms * MS * (1 + 3 * min(1.0, m.now / 6e9))

    found = Machine(one=slower(2), other=slower(2)).measure(Pace(seconds=6.0))
    result = compared(found)
    assert result.ratio == pytest.approx(1.0, abs=0.01)
    assert result.verdict == "undecided"
    medians = summarize("one", 1, found["one"]).rounds_ms
    assert medians[-1] > 2 * medians[0]  # it does show


def test_the_first_calls_of_a_turn_do_not_count() -> None:
    """A call right after the other model's pays for cold caches."""

    def cold(name: str) -> Callable[[Machine], float]:
        return lambda m: (2 if m.log and m.log[-1] == name else 7) * MS

    machine = Machine(one=cold("one"), other=cold("other"))
    assert max(np.concatenate(machine.measure(Pace())["one"])) == 2 * MS


def test_a_long_call_is_not_repeated_to_settle() -> None:
    machine = Machine(one=lambda m: 2 * SETTLE_NS, other=lambda m: 2 * SETTLE_NS)
    machine.measure(Pace(runs=4, warmup=0.0))
    assert len(machine.log) == 2 + 2 * 4


def test_turns_change_their_order() -> None:
    machine = Machine(a=lambda m: 50 * MS, b=lambda m: 50 * MS)
    machine.measure(Pace(runs=4, warmup=0.0))
    assert "".join(machine.log) == "ab" + "abba" * 2


@pytest.mark.parametrize("runs", [1, 7, ROUNDS, 100])
def test_runs_are_counted_exactly(runs: int) -> None:
    told: List[object] = []
    found = Machine(one=lambda m: 3 * MS, other=lambda m: MS).measure(
        Pace(runs=runs), between=lambda done, total: told.append((done, total))
    )
    assert [sum(map(len, rounds)) for rounds in found.values()] == [runs, runs]
    rounds = min(runs, ROUNDS)
    assert told == [(number + 1, rounds) for number in range(rounds)]


def test_no_round_begins_after_the_time_is_up() -> None:
    """A call of a second, of which thirty rounds would take a minute."""
    machine = Machine(one=lambda m: 1000 * MS, other=lambda m: 1000 * MS)
    found = machine.measure(Pace(seconds=5.0, warmup=0.0))
    assert [len(rounds) for rounds in found.values()] == [3, 3]
    result = compared(found)
    assert (result.ci95, result.verdict) == (None, "undecided")
    assert "--seconds" in answer(result, "this CPU")


def test_percentiles_against_the_standard_library() -> None:
    rng = np.random.default_rng(1)
    rounds = [rng.integers(MS, 9 * MS, size) for size in (40, 1, 211)]
    found = summarize("int8", 8, rounds)
    values = sorted(int(ns) / 1e6 for part in rounds for ns in part)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == pytest.approx((cuts[49], cuts[89], cuts[98]))
    assert (found.max_ms, found.mean_ms, found.calls) == pytest.approx((values[-1], statistics.fmean(values), 252))
    assert found.jitter_ms == pytest.approx(cuts[98] - cuts[49])
    assert found.images_per_second == pytest.approx(8 * 252 / (sum(values) / 1e3))
    assert found.rounds_ms == pytest.approx([statistics.median(part.tolist()) / 1e6 for part in rounds])


@pytest.mark.parametrize("count", [6, 7, 8, 29, 30, 31, 100])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_has_the_ranks_of_the_sign_test(count: int, confidence: float) -> None:
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    rank = int(binom.ppf((1 - confidence) / 2, count, 0.5))  # 0: no pair of values covers so much
    assert median_interval(values, confidence) == ((rank, count + 1 - rank) if rank else None)


def test_too_few_ratios_have_no_interval() -> None:
    assert median_interval(np.arange(1.0, FEWEST)) is None
    assert median_interval(np.arange(1.0, FEWEST + 1)) is not None
    assert median_interval(np.array([])) is None


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """Of skewed values too, whose median is 1."""
    rng = np.random.default_rng(2)
    limits = [median_interval(rng.lognormal(0.0, 1.0, ROUNDS)) for _ in range(2000)]
    covered = sum(low <= 1.0 <= high for low, high in filter(None, limits)) / 2000
    assert 0.94 <= covered <= 0.975  # 0.957 by the binomial distribution


def test_the_same_model_twice_is_hardly_ever_called_faster() -> None:
    def decided(share: float, seed: int) -> str:
        rng = np.random.default_rng(seed)
        other = lambda m: 20 * MS * rng.lognormal(0.0, 0.1)  # noqa: E731
        return compared(Machine(one=lambda m: share * other(m), other=other).measure(Pace(runs=60, warmup=0.0))).verdict

    same = [decided(1.0, seed) for seed in range(200)]
    assert same.count("faster") <= 10  # 2.1 % by the sign test: 10 is two standard deviations and a half above
    assert same.count("slower") <= 10
    assert [decided(0.85, seed) for seed in range(20)].count("faster") >= 18
    assert [decided(1.18, seed) for seed in range(20)].count("slower") >= 18


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((1.01, 1.2), "faster"),
        ((0.8, 0.99), "slower"),
        ((0.9, 1.1), "undecided"),
        ((1.0, 1.2), "undecided"),
        ((0.8, 1.0), "undecided"),
        (None, "undecided"),
    ],
)
def test_verdicts(interval: object, word: str) -> None:
    assert verdict(interval) == word  # type: ignore[arg-type]


def test_what_is_said_of_a_verdict() -> None:
    def said(ratio: float, low: float, high: float, word: str) -> str:
        return answer(Speedup("int8", "fp32 of b/net", 8, ratio, (low, high), 30, word), "this CPU")

    assert said(1.5, 1.4, 1.6, "faster") == (
        "Batch 8: INT8 is 1.50 times as fast as FP32 of b/net on this CPU (95 % interval 1.400 to 1.600)."
    )
    assert said(0.5, 0.4, 0.8, "slower") == (
        "Batch 8: INT8 does not pay on this CPU: it takes 2.00 times as long as FP32 of b/net (95 % interval 1.250 to "
        "2.500)."
    )
    open_words = said(1.02, 0.98, 1.1, "undecided")
    assert "is open" in open_words
    assert "0.980 to 1.100, holds 1" in open_words


def test_a_p99_of_few_calls_is_named() -> None:
    def of(batch: int, calls: int) -> Latency:
        return summarize("int8", batch, [np.full(calls, MS)])

    assert minding([of(1, 100)]) == []
    (text,) = minding([of(1, 100), of(8, 99), of(32, 5), of(32, 6)])
    assert "batch 8, 32" in text
