"""From a tensor's per-channel histograms to its noise at every step size: the table that equalization and the ``auto``
range method read, without another pass over the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeres.affine import SYMMETRIC
from edgeres.calibrate.tensor import TensorStatistics
from edgeres.noise import OCTAVES, PER_OCTAVE, SMALLEST, STEPS, NoiseTable, integral, point_error

HEADROOM = 1.0  # of :func:`headroom`
SIGN, MAGNITUDE = 0x800, 0x7FF  # of an upper-12-bit pattern
CLIPPING = 1.0
"""How much more a squared clipping error counts than a rounding error. Clipping errors all have one sign and might add
up, but on ResNet-20 and -32 counting them 2, 4 or 8 times gained nothing: see CONTRIBUTING, decisions."""


def noise_table(statistics: TensorStatistics, grid: tuple[int, int] = SYMMETRIC) -> NoiseTable:
    """Return what quantizing each channel costs on the grid of steps ``grid[0]`` to ``grid[1]``, at every step size."""
    amax = statistics.channel_amax.astype(np.float64)
    base = np.maximum(amax, SMALLEST) / grid[1]
    low, high = channel_edges(statistics)
    steps = base[:, None] * 2.0 ** (np.arange(STEPS) / PER_OCTAVE + OCTAVES[0])
    counts = statistics.channel_counts
    elements = np.maximum(counts.sum(axis=1), 1)
    negative = is_negative(statistics)
    error = np.zeros(steps.shape)
    for side, last in ((~negative, grid[1]), (negative, -grid[0])):
        if side.any():
            error += _side((low[:, side], high[:, side]), counts[:, side], steps, last)
    signs = np.where(negative, -1.0, 1.0)
    return NoiseTable(
        log_step=np.log2(base),
        error=error / elements[:, None],
        power=(counts * (low**2 + low * high + high**2) / 3).sum(axis=1) / elements,
        mean=(counts * signs * (low + high) / 2).sum(axis=1) / elements,
        alive=amax > SMALLEST,
        grid=grid,
    )


def expected_noise(statistics: TensorStatistics, grid: tuple[int, int] = SYMMETRIC) -> NoiseTable:
    """Return :func:`noise_table` as expected of other images, whose values are larger by :func:`headroom`."""
    table, larger = noise_table(statistics, grid), headroom(statistics)
    return replace(table, log_step=table.log_step + np.log2(larger), error=table.error * (larger**2)[:, None])


def headroom(statistics: TensorStatistics) -> np.ndarray:
    """Return how much larger than what was counted to take each channel's values, float64 ``(C,)``, 1 or more.

    The largest of few values says little of how large others will be. How few: only those in the octave below the
    largest speak of where it lies. A channel with n of them is taken to be larger by 1 / √n: our own rule, whose gain
    is in CONTRIBUTING, decisions.
    """
    amax = statistics.channel_amax.astype(np.float64)[:, None]
    _, high = channel_edges(statistics)
    counted = (statistics.channel_counts * (high > amax / 2)).sum(axis=1)
    return np.asarray(1.0 + HEADROOM / np.sqrt(np.maximum(counted, 1)))


def is_negative(statistics: TensorStatistics) -> np.ndarray:
    """Return which of the channels' bins hold negative numbers, bool ``(B,)``."""
    return np.asarray((statistics.channel_bins & SIGN) > 0)


def channel_edges(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of |x| of each channel's bins, float64 ``(C, B)`` twice; none beyond its extremes."""
    least, most = (x.astype(np.float64)[:, None] for x in (statistics.channel_minimum, statistics.channel_maximum))
    negative = is_negative(statistics)
    nearest = np.maximum(np.where(negative, -most, least), 0.0)
    furthest = np.maximum(np.where(negative, -least, most), 0.0)
    patterns = (statistics.channel_bins & MAGNITUDE).astype(np.uint32)
    low = (patterns << 20).view(np.float32).astype(np.float64)
    high = np.nan_to_num(((patterns + 1) << 20).view(np.float32).astype(np.float64), nan=np.inf)
    high[patterns == 0] = 0.0  # zeros, and what no grid tells from zero
    return np.clip(low, nearest, furthest), np.clip(high, nearest, furthest)


def _side(edges: tuple[np.ndarray, np.ndarray], counts: np.ndarray, steps: np.ndarray, last: int) -> np.ndarray:
    """Return the summed squared error of one sign's elements, float64 ``(C, STEPS)``."""
    low, high = edges
    width = np.maximum(high - low, SMALLEST)
    wide = high > low * (1 + 1e-12)
    total = np.zeros(steps.shape)
    for i in range(steps.shape[1]):
        step = steps[:, i : i + 1]
        spread = (integral(high / step, last, CLIPPING) - integral(low / step, last, CLIPPING)) * step / width
        mean = np.where(wide, spread, point_error(high / step, last, CLIPPING))
        total[:, i] = (counts * mean).sum(axis=1) * step[:, 0] ** 2
    return total
