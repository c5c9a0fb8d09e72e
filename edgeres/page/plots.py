"""Where the marks of a page's plots go: numbers in the units of each drawing, for the template to write as SVG."""

from __future__ import annotations

import math
from typing import List, NamedTuple, Sequence, Tuple

from edgeres.artifacts import Report
from edgeres.measurements import Benchmark, Latency
from edgeres.progress import points

WIDTH = 360.0  # of a drawing, in its own units, which are a phone's pixels
LEFT, RIGHT = 16.0, 344.0  # where its axis begins and ends
FARTHEST = 1e9  # what a damaged manifest may say is no reason to draw without end
MOST_TICKS = 5


class Axis(NamedTuple):
    """A linear axis from ``low`` to ``high``, and its ticks: (place, text)."""

    low: float
    high: float
    ticks: Tuple[Tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Return where a value lies, within the drawing."""
        share = (bounded(value) - self.low) / (self.high - self.low)
        return LEFT + (RIGHT - LEFT) * min(1.0, max(0.0, share))


class Interval(NamedTuple):
    """One interval with its point, as places, and whose it is."""

    name: str
    low: float
    point: float
    high: float
    style: str


class Budget(NamedTuple):
    """The drop's intervals against the budget: places on an axis, and the same in words."""

    axis: Axis
    intervals: Tuple[Interval, ...]
    zero: float
    limit: float
    words: str


class Spread(NamedTuple):
    """One model's latencies at one batch size, as places: p50, p90, p99, and the medians of its rounds."""

    latency: Latency
    p50: float
    p90: float
    p99: float
    rounds: Tuple[float, ...]


class Batch(NamedTuple):
    """The latencies of all models at one batch size, on one axis in milliseconds, and the same in words."""

    size: int
    axis: Axis
    spreads: Tuple[Spread, ...]
    words: str


class Reach(NamedTuple):
    """A tensor's grid and what was seen of its values, as places on an axis that both fit on."""

    grid_low: float
    grid_high: float
    seen_low: float
    seen_high: float
    zero: float


def bounded(value: float) -> float:
    """Return a finite number of drawable size."""
    return min(FARTHEST, max(-FARTHEST, value)) if math.isfinite(value) else 0.0


def axis(low: float, high: float) -> Axis:
    """Return an axis that holds both numbers, with round ticks."""
    low, high = sorted((bounded(low), bounded(high)))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / MOST_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    bare = Axis(low, high, ())
    numbers = [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return bare._replace(ticks=tuple((bare.place(number), f"{number + 0.0:.{digits}f}") for number in numbers))


def budget(report: Report) -> Budget:
    """Return the drop's 95 % interval, and that against the baseline, on the axis on which the budget is."""
    rows: List[Tuple[str, float, Tuple[float, float], str]] = []
    if report.drop_pp is not None and report.drop_ci95_pp is not None:
        rows.append(("against FP32", report.drop_pp, report.drop_ci95_pp, report.verdict))
    if report.baseline is not None:
        change = report.baseline
        rows.append(("against the baseline", change.drop_pp, change.drop_ci95_pp, change.verdict))
    ends = [0.0, report.max_drop_pp, *(end for _, _, interval, _ in rows for end in interval)]
    margin = 0.08 * (bounded(max(ends)) - bounded(min(ends)))
    scale = axis(bounded(min(ends)) - margin, bounded(max(ends)) + margin)
    said = [
        f"{name}: the loss is {drop:.2f} percentage points, its 95 % interval {low:.2f} to {high:.2f}"
        for name, drop, (low, high), _ in rows
    ]
    return Budget(
        scale,
        tuple(
            Interval(name, scale.place(low), scale.place(drop), scale.place(high), verdict)
            for name, drop, (low, high), verdict in rows
        ),
        scale.place(0.0),
        scale.place(report.max_drop_pp),
        f"{'; '.join(said)}; the budget is {points(report.max_drop_pp)}.",
    )


def batches(measured: Benchmark) -> List[Batch]:
    """Return the latencies by batch size, each on an axis from 0 to the slowest p99."""
    found = []
    for size in dict.fromkeys(latency.batch for latency in measured.latencies):
        ours = [latency for latency in measured.latencies if latency.batch == size]
        scale = axis(0.0, max(latency.p99_ms for latency in ours))
        spreads = tuple(
            Spread(
                latency,
                scale.place(latency.p50_ms),
                scale.place(latency.p90_ms),
                scale.place(latency.p99_ms),
                tuple(scale.place(value) for value in latency.rounds_ms),
            )
            for latency in ours
        )
        said = [f"{x.model}: p50 {x.p50_ms:.3f} ms, p99 {x.p99_ms:.3f} ms" for x in ours]
        found.append(Batch(size, scale, spreads, f"Batch {size}. {'; '.join(said)}"))
    return found


def reach(grid: Tuple[float, float], seen: Tuple[float, float]) -> Reach:
    """Return a tensor's int8 grid beside the smallest and largest value that calibration saw."""
    scale = axis(min(0.0, *grid, *seen), max(0.0, *grid, *seen))
    return Reach(*(scale.place(value) for value in (*grid, *seen, 0.0)))


def share(value: float, largest: float) -> float:
    """Return how long a bar is, 0…100, of the longest one's 100."""
    return 100.0 * min(1.0, max(0.0, bounded(value) / largest)) if largest > 0 else 0.0


def ends(values: Sequence[float]) -> float:
    """Return the largest of some numbers, 0 where there are none."""
    return max((bounded(value) for value in values), default=0.0)
