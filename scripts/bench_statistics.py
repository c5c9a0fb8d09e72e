#!/usr/bin/env python3
"""How far the verdict may be trusted: coverage of its interval and power, over simulated experiments.

Each experiment draws the answers of two networks to N samples, at known rates of samples that only one of them gets
right, and is judged as `edgeres validate` does. Coverage is the share of 95 % intervals that hold the true loss (aim:
94 to 97 %), beside that of the simple interval (Wald's, as McNemar's test is often turned into one). Power is how often
each verdict falls, at true losses around the budget; `wrong` is the share that decides against the truth (at most 2.5 %
is what a 95 % interval promises). Then the latency gate under load that lasts: how often it is certain at the exact
limit (aim: 10 % at most), with rounds counted as they are and as independent ones. Last, the time and memory of judging
50,000 samples of 1,000 classes.

    python scripts/bench_statistics.py [--experiments 10000] [--budget 0.5] [--runs 1000]
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import sys
import time
from functools import lru_cache

import numpy as np

from edgeres.benchmark import median_interval
from edgeres.gate import PACE
from edgeres.measurements import Benchmark, Latency
from edgeres.validation import Limits, against_limits, compare
from edgeres.validation.statistics import paired_difference_interval

# Samples, the true loss in percentage points, and the share of samples, in per cent, that only one of two gets right.
COVERAGE = [
    (n, drop, changed) for n in (423, 1_000, 3_000, 10_000, 50_000) for drop, changed in ((0, 1), (0.5, 1), (1, 3))
]
CORRELATIONS = (0, 0.1, 0.5, 1, 2, 5)  # seconds
POWER = [(n, drop, 1.5) for n in (1_000, 3_000, 10_000, 50_000) for drop in (0, 0.25, 0.5, 0.75, 1)]


def experiments(n: int, drop: float, changed: float, count: int, seed: int) -> np.ndarray:
    """Return b and c of some experiments, int64 ``(count, 2)``: only the reference is right, only the engine is."""
    b, c = (changed + drop) / 200, (changed - drop) / 200
    found: np.ndarray = np.random.default_rng(seed).multinomial(n, [b, c, 1 - b - c], count)[:, :2]
    return found


def wald(b: int, c: int, n: int) -> tuple[float, float]:
    """Return the simple interval of the loss: the estimate, and 1.96 of its standard errors around."""
    drop = (b - c) / n
    half = 1.959964 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    return drop - half, drop + half


def show(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def coverage(count: int) -> None:
    """Print the share of intervals that hold the truth."""
    rows = []
    for seed, (n, drop, changed) in enumerate(COVERAGE):
        shares = []
        for interval in (lru_cache(None)(paired_difference_interval), wald):
            limits = (interval(b, c, n) for b, c in experiments(n, drop, changed, count, seed).tolist())
            shares.append(sum(low <= drop / 100 <= high for low, high in limits) / count)
        rows.append((f"{n:,}", f"{drop:g}", f"{changed:g}", *(f"{100 * share:.2f} %" for share in shares)))
    show(("samples", "true loss, pp", "changed, %", "edgeres (Tango)", "Wald"), rows)


def power(count: int, budget: float) -> None:
    """Print how often each verdict falls."""
    rows = []
    for seed, (n, drop, changed) in enumerate(POWER):
        interval = lru_cache(None)(paired_difference_interval)
        limits = np.array([interval(b, c, n) for b, c in experiments(n, drop, changed, count, seed).tolist()])
        passed, failed = np.mean(limits[:, 1] < budget / 100), np.mean(limits[:, 0] > budget / 100)
        wrong = passed if drop >= budget else failed  # at the budget itself, either is wrong
        wrong = max(passed, failed) if drop == budget else wrong
        shares = (passed, failed, 1 - passed - failed, wrong)
        rows.append((f"{n:,}", f"{drop:g}", *(f"{100 * share:.1f} %" for share in shares)))
    show(("samples", "true loss, pp", "pass", "fail", "inconclusive", "wrong"), rows)


def lasting(seconds: float, rounds: int, correlation: float, white: float, count: int, seed: int) -> np.ndarray:
    """Return the medians of some runs' rounds, float64 ``(count, rounds)``, around 1.0: a fifth of it is the load's.

    Args:
        seconds: of a run.
        correlation: seconds, after which 1/e of a load is left (AR(1), from its stationary distribution on).
        white: the share of the variance that is each round's own.
    """
    rng = np.random.default_rng(seed)
    stays = math.exp(-seconds / rounds / correlation) if correlation else 0.0
    load = rng.standard_normal((count, rounds))
    for one in range(1, rounds):
        load[:, one] = stays * load[:, one - 1] + math.sqrt(1 - stays**2) * load[:, one]
    own = rng.standard_normal((count, rounds))
    found: np.ndarray = np.exp(0.2 * (math.sqrt(1 - white) * load + math.sqrt(white) * own))
    return found


def gate_under_load(count: int) -> None:
    """Print how often the latency gate decides, at the exact limit and at limits that are kept."""
    rows = []
    for white in (0.0, 0.5):
        for correlation in CORRELATIONS:
            runs = lasting(PACE.seconds, PACE.rounds, correlation, white, count, 1)
            plain = sum(low > 1.0 or high < 1.0 for low, high in map(median_interval, runs)) / count
            at_limit = [latency_verdict(run, 1.0) for run in runs]
            certain, without = (sum(x[y] for x in at_limit) / count for y in (0, 1))
            kept = [sum(latency_verdict(run, limit)[0] for run in runs) / count for limit in (1.2, 1.5, 2.5)]
            shares = (plain, certain, without, *kept)
            rows.append((f"{correlation:g}", f"{white:g}", *(f"{100 * share:.1f} %" for share in shares)))
    told = (
        "correlation, s", "own variance", "certain, all rounds", "certain, independent", "no interval",
        "pass at 1.2 ×", "at 1.5 ×", "at 2.5 ×",
    )  # fmt: skip
    show(told, rows)


def latency_verdict(rounds: np.ndarray, limit: float) -> tuple[bool, bool]:
    """Return whether the gate is certain of a limit, and whether there was no interval."""
    latency = Latency("int8", 1, len(rounds), 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, tuple(rounds.tolist()))
    run = Benchmark("", "cpu", "cpu", "int8", (3, 4, 4), None, {}, (latency,), (), {}, None, (), ())
    (found,) = against_limits(run, Limits(limit)).limits
    return found.verdict != "inconclusive", found.ci95 is None


def cost(samples: int = 50_000, classes: int = 1_000) -> None:
    """Print what judging many samples costs."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, samples)
    reference = rng.standard_normal((samples, classes), np.float32)
    reference[np.arange(samples), labels] += 4
    engine = reference.copy()
    for start in range(0, samples, 1000):
        engine[start : start + 1000] += 0.1 * rng.standard_normal((1000, classes), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_time = time.perf_counter()
    report = compare(reference, engine, labels, max_drop_pp=0.5, backend="cpu", precision="int8")
    seconds = time.perf_counter() - start_time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{samples:,} samples of {classes:,} classes: {seconds:.1f} s, {peak / 1024:.0f} MB at most, "
        f"{before / 1024:.0f} of them before, with both sets of logits; verdict {report.verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=10_000)
    parser.add_argument("--budget", type=float, default=0.5, help="percentage points")
    parser.add_argument("--runs", type=int, default=1_000, help="of the latency gate, for each row")
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {sys.version.split()[0]}; {options.experiments:,} experiments a row\n")
    coverage(options.experiments)
    print(f"budget {options.budget:g} pp, 1.5 % of samples changed:\n")
    power(options.experiments, options.budget)
    print(f"the latency gate, {PACE.rounds} rounds in {PACE.seconds:g} s, {options.runs:,} runs a row:\n")
    gate_under_load(options.runs)
    cost()


if __name__ == "__main__":
    main()
