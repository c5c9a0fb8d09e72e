"""Measure models side by side: latencies taken in turns, their ratios with an interval, and what follows from these.

A machine's speed changes while it is measured: clocks, heat, other programs. So the models take turns, in short rounds,
in one order and then in the other, and are compared round by round: whatever lasts longer than a round meets both, and
cancels. Of the rounds' ratios the median counts, with the interval that belongs to the sign test. It takes no
distribution for granted, so that a round in which something else woke up does not move it. It speaks of this run: a
process started anew may place its memory otherwise, and be a little faster or slower for it.
"""

from __future__ import annotations

import math
import time
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from edgeres.measurements import Latency, Speedup

ROUNDS = 30
"""Enough for an interval of about the middle third of the ratios; even, so that both orders come equally often."""

SETTLE_NS = 10_000_000
"""A round begins with so much time that does not count: threads of the model before spin a few milliseconds for more
work, and caches are the other's."""

FEWEST = 6
"""Rounds, and so ratios, without which the sign test has no interval at 95 %."""

ITERATIONS = 20
"""Enough for an autocorrelation time to settle, or to reach the length of its series."""

CERTAIN_P99 = 100
"""Calls below which a p99 is hardly more than the maximum."""

Call = Callable[[], object]
Clock = Callable[[], int]


class Pace(NamedTuple):
    """How long to measure each batch size: ``seconds`` for all models together, or ``runs`` calls of each if that is
    given. ``warmup`` is in seconds, for each model. ``rounds`` is their number at most, and ``fewest`` how many there
    are whatever the seconds."""

    seconds: float = 5.0
    runs: Optional[int] = None
    warmup: float = 0.5
    rounds: int = ROUNDS
    fewest: int = 1


def take_turns(
    calls: Mapping[str, Call],
    pace: Pace,
    between: Callable[[int, int], None] = lambda done, total: None,
    clock: Clock = time.perf_counter_ns,
) -> Dict[str, List[np.ndarray]]:
    """Return the latencies of some calls, measured in turns: for each name one array of ns, int64 ``(n,)``, per round.

    After ``pace.seconds`` and ``pace.fewest`` rounds no further round begins. There is always one.

    Args:
        between: is told after each round how many are done, of how many; its time is nobody's latency.
        clock: nanoseconds, never going back.
    """
    typical = {name: _warm_up(call, pace.warmup, clock) for name, call in calls.items()}
    rounds = pace.rounds if pace.runs is None else min(pace.rounds, pace.runs)
    found: Dict[str, List[np.ndarray]] = {name: [] for name in calls}
    begun = clock()
    for number in range(rounds):
        if pace.runs is None and number >= max(1, pace.fewest) and clock() - begun >= pace.seconds * 1e9:
            break
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            _settle(calls[name], typical[name], clock)
            count = _share(pace, number, rounds, typical[name], len(calls))
            found[name].append(np.array([_timed(calls[name], clock) for _ in range(count)], np.int64))
        between(number + 1, rounds)
    return found


def _timed(call: Call, clock: Clock) -> int:
    start = clock()
    call()
    return clock() - start


def _warm_up(call: Call, seconds: float, clock: Clock) -> float:
    """Call for some time, at least once, and return the median latency in ns of the later half."""
    latencies: List[int] = []
    begun = clock()
    while not latencies or clock() - begun < seconds * 1e9:
        latencies.append(_timed(call, clock))
    return float(np.median(latencies[len(latencies) // 2 :]))


def _settle(call: Call, typical: float, clock: Clock) -> None:
    """Call for a while without counting; a call that is itself as long hardly feels what went before."""
    begun = clock()
    while typical < SETTLE_NS and clock() - begun < SETTLE_NS:
        call()


def _share(pace: Pace, number: int, rounds: int, typical: float, models: int) -> int:
    """Return how many calls of a model count in a round."""
    if pace.runs is not None:
        return pace.runs * (number + 1) // rounds - pace.runs * number // rounds
    settling = SETTLE_NS if typical < SETTLE_NS else 0
    slot = pace.seconds * 1e9 / rounds / models - settling
    return max(1, int(slot / max(typical, 1.0)))


def summarize(model: str, batch: int, rounds: Sequence[np.ndarray]) -> Latency:
    """Return the statistics of a model's latencies, given in ns, an array per round. Percentiles between two calls are
    interpolated."""
    all_ms = np.concatenate(rounds) / 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(all_ms, (50, 90, 99)))
    mean = float(all_ms.mean())
    return Latency(
        model=model,
        batch=batch,
        calls=len(all_ms),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        max_ms=float(all_ms.max()),
        mean_ms=mean,
        jitter_ms=p99 - p50,
        images_per_second=batch * 1e3 / mean,
        rounds_ms=tuple(float(np.median(part)) / 1e6 for part in rounds),
    )


def speedup(model: Latency, against: Latency) -> Speedup:
    """Return how many times as fast ``model`` is as ``against``, which took turns with it."""
    ratios = np.array(against.rounds_ms) / np.array(model.rounds_ms)
    interval = median_interval(ratios)
    return Speedup(
        model=model.model,
        against=against.model,
        batch=model.batch,
        ratio=float(np.median(ratios)),
        ci95=interval,
        rounds=len(ratios),
        verdict=verdict(interval),
    )


def verdict(interval: Optional[Tuple[float, float]]) -> str:
    """Return ``faster`` or ``slower`` where a whole interval of time ratios says so, else ``undecided``."""
    if interval is None or interval[0] <= 1.0 <= interval[1]:
        return "undecided"
    return "faster" if interval[0] > 1.0 else "slower"


def median_interval(
    values: np.ndarray, confidence: float = 0.95, independent: Optional[int] = None
) -> Optional[Tuple[float, float]]:
    """Return an interval for the median behind some values, which covers it with at least that confidence, whatever
    their distribution; None where no interval of so few values does (five or fewer, for 95 %).

    Args:
        independent: as how many independent values they count, where they are not (:func:`independent_count`); the
            interval is then as wide as that of so few, and no more than about right.

    Source: Conover 1999, Practical Nonparametric Statistics, 3rd edition, section 3.2: the values whose ranks the sign
    test does not reject.
    """
    count = len(values) if independent is None else independent
    tail, outside = 0, 0
    for rank in range(count // 2):
        tail += math.comb(count, rank)
        if 2 * tail > (1.0 - confidence) * 2**count:
            break
        outside = rank + 1
    if not outside:
        return None
    ordered = np.sort(values)
    rank = max(1, int((outside - 0.5) * len(values) / count + 0.5))  # at the same share of all values
    return float(ordered[rank - 1]), float(ordered[len(values) - rank])


def independent_count(values: np.ndarray) -> int:
    """Return as how many independent values a series counts, 1 to its length: load that lasts makes neighbours alike.

    That is the length over the integrated autocorrelation time of the ranks, 1 + 2 Σ ρ(k), summed as far as pairs of
    neighbouring lags are positive, and never rise. A mean taken from so short a series itself hides a part of every
    ρ(k), about the time over the length, which is put back: hence the iteration.

    Sources: Geyer 1992, Practical Markov Chain Monte Carlo, Statistical Science 7(4), section 3.3 (the initial monotone
    sequence); Marriott and Pope 1954, Bias in the Estimation of Autocorrelations, Biometrika 41 (the bias).
    """
    count = len(values)
    ranks = np.array([np.sum(values < value) + np.sum(values == value) / 2 for value in values])
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    if count < 2 or power == 0.0:  # all alike: there is nothing to be uncertain of
        return count
    seen = np.correlate(ranks, ranks, "full")[count - 1 :] / power
    time = _integrated(seen)
    for _ in range(ITERATIONS):
        time = min(float(count), _integrated(seen + time / count * (1.0 - seen)))
    return int(count / max(1.0, time))


def _integrated(correlations: np.ndarray) -> float:
    """Return the autocorrelation time, in values, of correlations by lag, from lag 0 on; below 1 where values take
    turns, as the two orders of the rounds may."""
    pairs = correlations[: len(correlations) // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0.0)
    kept = np.minimum.accumulate(pairs[: ends[0] if len(ends) else len(pairs)])
    return max(0.0, 2.0 * float(kept.sum()) - 1.0)


def answer(found: Speedup, place: str) -> str:
    """Return in a sentence whether a model pays against another one. ``place`` is where, such as ``this CPU``."""
    mine, other = loud(found.model), loud(found.against)
    if found.ci95 is None:
        return (
            f"Batch {found.batch}: whether {mine} is faster than {other} on {place} is open: {found.rounds} rounds are "
            f"too few for an interval. Measure longer: --seconds, or --runs {FEWEST} or more."
        )
    low, high = found.ci95
    if found.verdict == "faster":
        return (
            f"Batch {found.batch}: {mine} is {found.ratio:.2f} times as fast as {other} on {place} (95 % interval "
            f"{low:.3f} to {high:.3f})."
        )
    if found.verdict == "slower":
        return (
            f"Batch {found.batch}: {mine} does not pay on {place}: it takes {1 / found.ratio:.2f} times as long as "
            f"{other} (95 % interval {1 / high:.3f} to {1 / low:.3f})."
        )
    return (
        f"Batch {found.batch}: whether {mine} is faster than {other} on {place} is open: it is {found.ratio:.2f} times "
        f"as fast, and the 95 % interval, {low:.3f} to {high:.3f}, holds 1."
    )


def loud(model: str) -> str:
    """Return a model's name with its precision, which comes first, in capitals."""
    precision, *rest = model.split(" ", 1)
    return " ".join([precision.upper(), *rest])


def minding(latencies: Sequence[Latency]) -> List[str]:
    """Return what to mind about some latencies, in sentences."""
    few = sorted({found.batch for found in latencies if found.calls < CERTAIN_P99})
    if not few:
        return []
    return [
        f"p99 rests on fewer than {CERTAIN_P99} calls at batch {', '.join(map(str, few))}, and is little more than the "
        "maximum there. For more: --seconds or --runs."
    ]
