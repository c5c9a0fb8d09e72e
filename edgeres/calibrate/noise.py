"""From a tensor's per-channel histograms to its noise at every step size: the table that equalization and the ``auto``
range method read, without another pass over the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeres.affine import SYMMETRIC
from edgeres.calibrate.distortion import channel_errors
from edgeres.calibrate.tensor import TensorStatistics
from edgeres.noise import OCTAVES, PER_OCTAVE, SMALLEST, STEPS, NoiseTable

HEADROOM = 1.0  # of :func:`expected_noise`
SIGN, MAGNITUDE = 0x800, 0x7FF  # of an upper-12-bit pattern
CLIPPING = 1.0
"""How much more a squared clipping error counts than a rounding error. Clipping errors all have one sign and might add
up, but on ResNet-20 and -32 counting them 2, 4 or 8 times gained nothing: see CONTRIBUTING, decisions."""


def noise_table(statistics: TensorStatistics, grid: tuple[int, int] = SYMMETRIC) -> NoiseTable:
    """Return what quantizing each channel costs on the grid of steps ``grid[0]`` to ``grid[1]``, at every step size."""
    return _measured(statistics, grid)[0]


def expected_noise(statistics: TensorStatistics, grid: tuple[int, int] = SYMMETRIC) -> NoiseTable:
    """Return :func:`noise_table` as expected of other images, whose values are larger than what was counted.

    The largest of few values says little of how large others will be. How few: only those in the octave below the
    largest speak of where it lies. A channel with n of them is taken to be larger by 1 / √n: our own rule, whose gain
    is in CONTRIBUTING, decisions.
    """
    table, near = _measured(statistics, grid)
    larger = 1.0 + HEADROOM / np.sqrt(np.maximum(near, 1))
    return replace(table, log_step=table.log_step + np.log2(larger), error=table.error * (larger**2)[:, None])


def _measured(statistics: TensorStatistics, grid: tuple[int, int]) -> tuple[NoiseTable, np.ndarray]:
    """Return the table, and how many values each channel has in the octave below its largest, float64 ``(C,)``."""
    amax = statistics.channel_amax.astype(np.float64)
    counts = statistics.channel_counts
    low, high = bin_edges(statistics)
    edges = np.stack([low, high]) * np.where(is_negative(statistics), -1.0, 1.0)
    multiples = 2.0 ** (np.arange(STEPS) / PER_OCTAVE + OCTAVES[0])
    extremes = statistics.extremes.astype(np.float64)
    errors, moments = channel_errors(edges, counts, extremes, multiples, grid, CLIPPING)
    elements = np.maximum(counts.sum(axis=1), 1)
    table = NoiseTable(
        log_step=np.log2(np.maximum(amax, SMALLEST) / grid[1]),
        error=errors / elements[:, None],
        power=moments[:, 1] / elements,
        mean=moments[:, 0] / elements,
        alive=amax > SMALLEST,
        grid=grid,
    )
    return table, moments[:, 2]


def is_negative(statistics: TensorStatistics) -> np.ndarray:
    """Return which of the channels' bins hold negative numbers, bool ``(B,)``."""
    return np.asarray((statistics.channel_bins & SIGN) > 0)


def bin_edges(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of |x| of the channels' bins, float64 ``(B,)`` twice."""
    patterns = (statistics.channel_bins & MAGNITUDE).astype(np.uint32)
    low = (patterns << 20).view(np.float32).astype(np.float64)
    high = np.nan_to_num(((patterns + 1) << 20).view(np.float32).astype(np.float64), nan=np.inf)
    high[patterns == 0] = 0.0  # zeros, and what no grid tells from zero
    return low, high


def channel_edges(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of |x| of each channel's bins, float64 ``(C, B)`` twice; none beyond its extremes."""
    least, most = (x.astype(np.float64)[:, None] for x in (statistics.channel_minimum, statistics.channel_maximum))
    negative = is_negative(statistics)
    nearest = np.maximum(np.where(negative, -most, least), 0.0)
    furthest = np.maximum(np.where(negative, -least, most), 0.0)
    low, high = bin_edges(statistics)
    return np.clip(low, nearest, furthest), np.clip(high, nearest, furthest)
