"""A benchmark against the limits that were asked for: a verdict for each, by its interval, and its words.

The limit is on the median, p50: a p99 has an interval from some 400 calls on, and on a machine that does other work it
is that work's. It is of the engine alone, its input prepared; what preprocessing costs depends on the camera's frames.
Calls that follow each other meet the same load, so it is the rounds' medians that are counted as observations, and of
these as many as are independent. The interval is one of this run: what another run would meet it cannot know.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple, Optional, Tuple

import numpy as np

from edgeres.artifacts import Report
from edgeres.benchmark import FEWEST, independent_count, loud, median_interval, minding
from edgeres.errors import BackendError, RecipeError
from edgeres.measurements import Benchmark, Latency, LatencyLimit, LatencyReport

BATCH = 1  # frames in a call: what a camera gives
FLOATS = ("fp32", "fp16")  # what a float twin computes in, the first rather than the second
BEYOND = 2.0
"""Where there is no interval, a limit is decided that lies so many times beyond every round: no load that would have to
be ruled out for that is usual."""

Interval = Tuple[float, float]


class Limits(NamedTuple):
    """What is asked of an engine: ``max_latency_ms``, a call's p50 at most; ``min_speedup``, times as fast as its float
    twin at least. None: not asked."""

    max_latency_ms: Optional[float] = None
    min_speedup: Optional[float] = None

    @property
    def asked(self) -> bool:
        return self != (None, None)

    def check(self) -> None:
        """Refuse what is no limit.

        Raises:
            RecipeError: with every limit that is not a finite number above 0.
        """
        wrong = [
            f"{name} is {value!r}: give a finite number above 0, or leave it out"
            for name, value in self._asdict().items()
            if value is not None and not _is_limit(value)
        ]
        if wrong:
            raise RecipeError("limits on the latency", wrong)


def _is_limit(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def against_limits(measured: Benchmark, limits: Limits) -> LatencyReport:
    """Return what was measured of an engine, one frame a call, with a verdict on each limit.

    Raises:
        BackendError: it was not measured so, or there is no float twin that it took turns with.
        RecipeError: a limit is none.
    """
    limits.check()
    ours = _of(measured, measured.precision)
    if ours is None:
        raise BackendError(
            f"a limit is on calls of {BATCH} frame, and none was measured. Measure them: edgeres bench BUNDLE --batch "
            f"{BATCH} --out BUNDLE.bench.json"
        )
    found = []
    times = np.array(ours.rounds_ms)
    if limits.max_latency_ms is not None:
        interval, count = _interval(times)
        told = _verdict(interval or _span(times), most=limits.max_latency_ms)
        value = float(np.median(times))
        found.append(LatencyLimit("round_p50_ms", limits.max_latency_ms, value, interval, told, independent=count))
    if limits.min_speedup is not None:
        twin = _float_twin(measured)
        ratios = np.array(twin.rounds_ms) / times
        interval, count = _interval(ratios)
        told = _verdict(interval or _span(ratios), least=limits.min_speedup)
        value = float(np.median(ratios))
        found.append(LatencyLimit("speedup", limits.min_speedup, value, interval, told, twin.model, count))
    where = measured.host.get("processor") or measured.host.get("system", "a machine without a name")
    device = f"{measured.target} ({where})"
    p50 = float(np.median(times))
    notes = tuple(note for note in measured.notes if note not in minding(measured.latencies))  # which are of the p99
    return LatencyReport(device, ours.calls, len(times), p50, ours.p99_ms, tuple(found), notes)


def _of(measured: Benchmark, model: str) -> Optional[Latency]:
    return next((x for x in measured.latencies if (x.model, x.batch) == (model, BATCH)), None)


def _float_twin(measured: Benchmark) -> Latency:
    """Return the latency of the float model that the engine took turns with."""
    against = [x.against for x in measured.speedups if x.batch == BATCH]
    for precision in FLOATS:
        for name in against:
            twin = _of(measured, name)
            if name.split(" ", 1)[0] == precision and twin is not None:
                return twin
    others = f" (it did with {', '.join(map(loud, against))}, which is none)" if against else ""
    raise BackendError(
        f"there is no float twin that the {measured.precision} engine took turns with{others}, so no speed-up is "
        "known. `edgeres bench BUNDLE` says how to have one; or leave --min-speedup out."
    )


def _interval(values: np.ndarray) -> Tuple[Optional[Interval], int]:
    """Return the 95 % interval of some rounds' median, if there is one, and as how many independent ones they count."""
    count = independent_count(values)
    return median_interval(values, independent=count), count


def _span(values: np.ndarray) -> Interval:
    """Return what a limit has to lie beyond where there is no interval; everything, where there are too few rounds."""
    if len(values) < FEWEST:
        return 0.0, math.inf
    return float(values.min()) / BEYOND, float(values.max()) * BEYOND


def _verdict(interval: Interval, most: float = math.inf, least: float = 0.0) -> str:
    """Return whether a whole interval keeps a limit, or lies beyond it."""
    low, high = interval
    if least <= low and high <= most:
        return "pass"
    return "fail" if high < least or low > most else "inconclusive"


def limit_name(limit: LatencyLimit) -> str:
    """Return what a limit is called among the gates."""
    return f"latency against {loud(limit.against)}" if limit.name == "speedup" else "latency"


def limit_headline(report: Report, limit: LatencyLimit) -> str:
    """Return the verdict on a limit of a report's latency in one sentence, with what it rests on and the device; and
    what to mind about the machine, where it does not pass."""
    latency, precision = report.latency, report.precision.upper()
    if latency is None:
        return ""
    if limit.name == "speedup":
        said = f"{precision} is {limit.measured:.2f} times as fast as {loud(limit.against)}"
        asked = f"and {limit.limit:g} times is asked for"
    else:
        said = f"{precision} takes {limit.measured:.3f} ms a frame (p50; the engine alone, input prepared)"
        asked = f"against a limit of {limit.limit:g} ms"
    verdict = {"pass": "passes", "fail": "fails"}.get(limit.verdict, "cannot be decided by this run")
    mind = [f" Mind: {note.rstrip('.')}." for note in latency.notes] if limit.verdict != "pass" else ()
    return f"{said} on {latency.device} ({_rests(limit, latency.rounds)}), {asked}: {verdict}.{''.join(mind)}"


def latency_failure(report: Report) -> str:
    """Return in a sentence why the latency has no verdict; empty where it could be measured, or was not asked for."""
    return f"latency: could not be measured: {report.latency_error}" if report.latency_error else ""


def _rests(limit: LatencyLimit, rounds: int) -> str:
    if limit.ci95 is not None:
        return f"95 % interval of this run {limit.ci95[0]:.3f} to {limit.ci95[1]:.3f}"
    if rounds < FEWEST:
        return "too few rounds for an interval"
    decided = (
        ""
        if limit.verdict == "inconclusive"
        else f", but the limit lies more than {BEYOND:g} times beyond each of them"
    )
    return f"no interval, for load lasted: {rounds} rounds count as {limit.independent} independent ones{decided}"


def faster(report: Report) -> List[str]:
    """Return what to do where a limit on the latency is not kept, or not known to be, one sentence each."""
    if report.latency_error:
        return ["The latency was asked for and not measured: do what the error says, or leave the limit out."]
    latency = report.latency
    if latency is None:
        return []
    if any(limit.verdict == "fail" for limit in latency.limits):
        return [
            "It is slower than was asked for on the machine that measured it: compile it there (`edgeres compile "
            "BUNDLE` takes the fastest form), see `edgeres bench BUNDLE`, or choose another limit."
        ]
    still_open = [limit for limit in latency.limits if limit.verdict == "inconclusive"]
    if not still_open:
        return []
    if latency.rounds < FEWEST:
        return [
            f"So few rounds decide nothing: measure longer, --seconds, or --runs {FEWEST} or more, of edgeres bench."
        ]
    if any(limit.ci95 is None for limit in still_open):
        return [
            "The machine's load changed during the measurement, and stayed changed for a good part of it, so that no "
            "interval is known: measure the latency again, where nothing else runs."
        ]
    return ["Measure the latency again, where nothing else runs, or choose a limit that is not so near."]
