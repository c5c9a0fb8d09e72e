"""A benchmark against the limits that were asked for: a verdict for each, by its interval, and its words.

The limit is on the median, p50: a p99 has an interval from some 400 calls on, and on a machine that does other work it
is that work's. Calls that follow each other meet the same load, so it is the rounds' medians that are counted as
observations, and not the calls.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import numpy as np

from edgeres.artifacts import Report
from edgeres.benchmark import loud, median_interval
from edgeres.errors import BackendError
from edgeres.measurements import Benchmark, LatencyLimit, LatencyReport

BATCH = 1  # frames in a call: what a camera gives


class Limits(NamedTuple):
    """What is asked of an engine: ``max_latency_ms``, a call's p50 at most; ``min_speedup``, times as fast as its float
    twin at least. None: not asked."""

    max_latency_ms: Optional[float] = None
    min_speedup: Optional[float] = None

    @property
    def asked(self) -> bool:
        return self != (None, None)


def against_limits(measured: Benchmark, limits: Limits) -> LatencyReport:
    """Return what was measured of an engine, one frame a call, with a verdict on each limit.

    Raises:
        BackendError: it was not measured so, or there is no float twin that it took turns with.
    """
    ours = next((x for x in measured.latencies if (x.model, x.batch) == (measured.precision, BATCH)), None)
    if ours is None:
        raise BackendError(f"a limit is on calls of {BATCH} frame, and none was measured. See edgeres bench --batch")
    found = []
    p50, interval = float(np.median(ours.rounds_ms)), median_interval(np.array(ours.rounds_ms))
    if limits.max_latency_ms is not None:
        told = _verdict(interval, limits.max_latency_ms)
        found.append(LatencyLimit("p50_ms", limits.max_latency_ms, p50, interval, told))
    if limits.min_speedup is not None:
        ratios = [x for x in measured.speedups if x.batch == BATCH]
        if not ratios:
            raise BackendError(
                f"there is no float twin that the {measured.precision} engine took turns with, so no speed-up is "
                "known. `edgeres bench BUNDLE` says how to have one; or leave --min-speedup out."
            )
        one = next((x for x in ratios if x.against == "fp32"), ratios[0])
        told = _verdict(one.ci95 and (-one.ci95[1], -one.ci95[0]), -limits.min_speedup)  # more is better
        found.append(LatencyLimit("speedup", limits.min_speedup, one.ratio, one.ci95, told, one.against))
    where = measured.host.get("processor") or measured.host.get("system", "a machine without a name")
    device = f"{measured.target} ({where})"
    return LatencyReport(device, ours.calls, len(ours.rounds_ms), p50, ours.p99_ms, tuple(found), measured.notes)


def limit_name(limit: LatencyLimit) -> str:
    """Return what a limit is called among the gates."""
    return f"latency against {loud(limit.against)}" if limit.name == "speedup" else "latency"


def limit_headline(report: Report, limit: LatencyLimit) -> str:
    """Return the verdict on a limit of a report's latency in one sentence, with what it rests on and the device."""
    latency, precision = report.latency, report.precision.upper()
    if latency is None:
        return ""
    if limit.name == "speedup":
        said = f"{precision} is {limit.measured:.2f} times as fast as {loud(limit.against)}"
        asked = f"and {limit.limit:g} times is asked for"
    else:
        said = f"{precision} takes {limit.measured:.3f} ms a frame (p50)"
        asked = f"against a limit of {limit.limit:g} ms"
    rests = "too few rounds for an interval"
    if limit.ci95 is not None:
        rests = f"95 % interval {limit.ci95[0]:.3f} to {limit.ci95[1]:.3f}"
    verdict = {"pass": "passes", "fail": "fails"}.get(limit.verdict, "cannot be decided by this run")
    return f"{said} on {latency.device} ({rests}), {asked}: {verdict}."


def _verdict(interval: Optional[Tuple[float, float]], most: float) -> str:
    """Return whether a whole interval keeps within a limit, or lies beyond it."""
    if interval is None or interval[0] <= most < interval[1]:
        return "inconclusive"
    return "pass" if interval[1] <= most else "fail"
