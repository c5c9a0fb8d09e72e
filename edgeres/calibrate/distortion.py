"""What quantizing a histogram costs at each of many steps, compiled: most of what choosing ranges takes.

The squared distance to the nearest grid point, or beyond the grid to its last point, is integrated in closed form,
values being evenly spread within each bin; so it is exact for these, and continuous in the step.
"""

from __future__ import annotations

import numpy as np

from edgeres.calibrate.compiled import compiled
from edgeres.noise import SMALLEST

NARROW = 1e-12  # a bin that is narrower, relative to its value, is a single value: its integral would be all cancelled


@compiled
def integral(x: float, last: int, clipping: float) -> float:
    """Return ∫₀ˣ (t − q(t))² dt, in steps³, for the grid 0, 1, …, ``last``; beyond it counted ``clipping`` times."""
    inside = min(x, last + 0.5)
    whole = np.floor(inside + 0.5)
    rest, beyond = inside - whole, max(x - last, 0.5)
    return float(whole / 12 + rest * rest * rest / 3 + clipping * (beyond * beyond * beyond - 0.125) / 3)


@compiled
def point_error(x: float, last: int, clipping: float) -> float:
    """Return (x − q(x))², in steps², for the grid 0, 1, …, ``last``; beyond it counted ``clipping`` times."""
    rest = x - min(np.rint(x), last)
    return float(rest * rest * (clipping if x > last + 0.5 else 1.0))


@compiled
def squared_errors(
    low: np.ndarray, high: np.ndarray, counts: np.ndarray, steps: np.ndarray, last: int, clipping: float
) -> np.ndarray:
    """Return the summed squared error of a histogram's elements on the grid 0, 1, …, ``last``: float64 ``(S,)``.

    Args:
        low: float64 ``(B,)``, where each bin of |x| begins, in the tensor's own units.
        high: float64 ``(B,)``, where it ends.
        counts: float64 ``(B,)``.
        steps: float64 ``(S,)``, in the tensor's own units.
        clipping: how many times a squared error beyond the grid counts.
    """
    wide = high > low * (1 + NARROW)
    density = np.where(wide, counts / (high - low), 0.0)
    narrow, few = high[~wide], counts[~wide]
    errors = np.empty(steps.size)
    for s in range(steps.size):
        step, total, single = steps[s], 0.0, 0.0
        for b in range(low.size):
            total += density[b] * (integral(high[b] / step, last, clipping) - integral(low[b] / step, last, clipping))
        for b in range(narrow.size):
            single += few[b] * point_error(narrow[b] / step, last, clipping)
        errors[s] = (total * step + single) * step * step
    return errors


@compiled
def channel_errors(
    edges: np.ndarray, counts: np.ndarray, extremes: np.ndarray, multiples: np.ndarray, grid: tuple[int, int],
    clipping: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return what quantizing each channel costs, and its moments.

    Args:
        edges: float64 ``(2, B)``, where each bin begins and ends, seen from zero, with the sign of its values.
        counts: int64 ``(C, B)``.
        extremes: float64 ``(C, 2)``, minimum and maximum: no value lies beyond.
        multiples: float64 ``(S,)``, steps, in those whose grid just reaches a channel's largest magnitude.
        grid: the first and the last step.
        clipping: how many times a squared error beyond the grid counts.

    Returns:
        Summed squared errors, float64 ``(C, S)``; and float64 ``(C, 3)``: the sums of x and of x², and how many values
        lie in the octave below the largest magnitude.
    """
    channels, bins = counts.shape
    errors, moments = np.zeros((channels, multiples.size)), np.zeros((channels, 3))
    low, high, weight = np.empty(bins), np.empty(bins), np.empty(bins)
    for channel in range(channels):
        least, most = extremes[channel]
        amax = max(-least, most)
        steps = multiples * (max(amax, SMALLEST) / grid[1])
        for sign, last in ((1.0, grid[1]), (-1.0, -grid[0])):
            hit = 0
            for b in range(bins):
                if counts[channel, b] > 0 and (edges[1, b] < 0) == (sign < 0):
                    low[hit] = sign * min(max(edges[0, b], least), most)
                    high[hit] = sign * min(max(edges[1, b], least), most)
                    weight[hit] = counts[channel, b]
                    hit += 1
            if hit:
                errors[channel] += squared_errors(low[:hit], high[:hit], weight[:hit], steps, last, clipping)
            for b in range(hit):
                moments[channel, 0] += sign * weight[b] * (low[b] + high[b]) / 2
                moments[channel, 1] += weight[b] * (low[b] * low[b] + low[b] * high[b] + high[b] * high[b]) / 3
                moments[channel, 2] += weight[b] * (high[b] > amax / 2)
    return errors, moments
