"""Range methods: from a tensor's histogram to the largest |x| that its int8 grid should reach.

All of them read the same statistics, so none needs a pass of its own. Within a histogram bin values are taken as evenly
spread; a bin is at most 1/128 as wide as its value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeres.affine import SYMMETRIC
from edgeres.calibrate.distortion import squared_errors
from edgeres.calibrate.noise import channel_edges, is_negative
from edgeres.calibrate.statistics import INFINITE, MAGNITUDES, TensorStatistics

ENTROPY_BINS = 2048
ENTROPY_STRIDE = 4
FINE = 64  # bins per octave of a scaled tensor's histogram
PARTS = 16  # of a channel's bin, which is an eighth of an octave to an octave wide


@dataclass(frozen=True)
class Histogram:
    """The bins that were hit, one sign folded onto the other.

    ``low`` and ``high`` are float64 ``(B,)``, edges of |x| in the tensor's own units, ascending; ``positive`` and
    ``negative`` are float64 ``(B,)`` counts of x ≥ 0 and x < 0 there. Exact zeros are left out: every grid has them.
    ``grid`` is the grid that a range is sought for: its first and last step.
    """

    low: np.ndarray
    high: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    amax: float
    elements: int
    grid: tuple[int, int] = SYMMETRIC

    @classmethod
    def of(cls, statistics: TensorStatistics, grid: tuple[int, int] = SYMMETRIC) -> Histogram:
        positive = statistics.counts[1:INFINITE]
        negative = statistics.counts[MAGNITUDES + 1 : MAGNITUDES + INFINITE]
        hit = np.flatnonzero(positive + negative)
        # the last edge is 2^128, one above float32's largest: its pattern is infinity's, so it is clipped by amax
        edges = (np.arange(1, INFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        amax = statistics.amax
        return cls(
            low=np.minimum(edges[hit], amax),
            high=np.minimum(edges[hit + 1], amax),
            positive=positive[hit].astype(np.float64),
            negative=negative[hit].astype(np.float64),
            amax=amax,
            elements=statistics.elements,
            grid=grid,
        )

    @classmethod
    def scaled(cls, statistics: TensorStatistics, factors: np.ndarray, grid: tuple[int, int] = SYMMETRIC) -> Histogram:
        """Return the histogram of a tensor whose channels are multiplied with ``factors``, float64 ``(C,)``.

        It comes from the channels' coarser bins, whose counts are spread evenly over bins of 1/64 octave.
        """
        low, high = (edges * factors[:, None] for edges in channel_edges(statistics))
        channels, bins = np.nonzero((statistics.channel_counts > 0) & (high > 0))
        counts = statistics.channel_counts[channels, bins] / PARTS
        negative = is_negative(statistics)[bins]
        low, width = low[channels, bins], (high - low)[channels, bins] / PARTS
        places = [np.floor(np.log2(low + (i + 0.5) * width) * FINE).astype(np.int64) for i in range(PARTS)]
        first = min((int(place.min()) for place in places if place.size), default=0)
        size = max((int(place.max()) for place in places if place.size), default=0) - first + 1
        both = np.zeros((2, size))
        for place in places:
            for sign, chosen in enumerate((~negative, negative)):
                both[sign] += np.bincount(place[chosen] - first, weights=counts[chosen], minlength=size)
        amax = float((statistics.channel_amax * factors).max(initial=0.0))
        hit = np.flatnonzero(both.sum(axis=0))
        return cls(
            low=np.minimum(2.0 ** ((first + hit) / FINE), amax),
            high=np.minimum(2.0 ** ((first + hit + 1) / FINE), amax),
            positive=both[0, hit],
            negative=both[1, hit],
            amax=amax,
            elements=statistics.elements,
            grid=grid,
        )

    @property
    def counts(self) -> np.ndarray:
        return np.asarray(self.positive + self.negative)

    def beyond(self, amax: float) -> float:
        """Return how many elements lie beyond ``amax`` in magnitude."""
        whole = (self.low >= amax) & (self.high > amax)
        cut = (self.low < amax) & (self.high > amax)
        share = (self.high[cut] - amax) / (self.high[cut] - self.low[cut])
        return float(self.counts[whole].sum() + (self.counts[cut] * share).sum())

    def power(self) -> float:
        """Return the sum of x² over all elements."""
        return float((self.counts * (self.low**2 + self.low * self.high + self.high**2) / 3).sum())


def minmax(histogram: Histogram, _percentile: float) -> float:
    """Return the largest |x| ever seen: nothing is clipped.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.1, for symmetric ranges.
    """
    return histogram.amax


def percentile(histogram: Histogram, share: float) -> float:
    """Return the |x| that ``share`` percent of all elements do not exceed; 0.0 where these are all exact zeros.

    Source: Wu et al., "Integer Quantization for Deep Learning Inference", 2020 (arXiv:2004.09602), section 5.
    """
    counts = histogram.counts
    if not counts.size:
        return histogram.amax
    zeros = histogram.elements - counts.sum()
    wanted = share / 100 * histogram.elements
    cumulative = zeros + np.concatenate([[0.0], np.cumsum(counts)])
    if wanted <= zeros:
        return 0.0
    i = min(int(np.searchsorted(cumulative, wanted)) - 1, counts.size - 1)
    inside = (wanted - cumulative[i]) / counts[i]
    return float(histogram.low[i] + min(inside, 1.0) * (histogram.high[i] - histogram.low[i]))


def entropy(histogram: Histogram, _percentile: float) -> float:
    """Return the range whose levels, 0 to the grid's last, keep the distribution of |x| best, by Kullback–Leibler.

    Exact zeros do not count: they are exact on every grid, and after a ReLU they would drown everything else.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, slides 31–40.
    """
    if histogram.counts.size == 0:
        return histogram.amax
    edges = np.linspace(0.0, histogram.amax, ENTROPY_BINS + 1)
    linear = np.diff(_cumulative_at(histogram, edges))
    tails = linear.sum() - np.cumsum(linear)
    best, best_bins, levels = np.inf, ENTROPY_BINS, histogram.grid[1] + 1
    for bins in range(levels, ENTROPY_BINS + 1, ENTROPY_STRIDE):
        divergence = _divergence(linear[:bins], tails[bins - 1], levels)
        if divergence < best:
            best, best_bins = divergence, bins
    return float((best_bins + 0.5) * histogram.amax / ENTROPY_BINS) if best_bins < ENTROPY_BINS else histogram.amax


def _cumulative_at(histogram: Histogram, points: np.ndarray) -> np.ndarray:
    """Return how many non-zero elements lie below each point, float64 ``(P,)``."""
    edges = np.stack([histogram.low, histogram.high], 1).reshape(-1)
    cumulative = np.cumsum(np.stack([np.zeros_like(histogram.counts), histogram.counts], 1).reshape(-1))
    return np.asarray(np.interp(points, edges, cumulative, left=0.0))


def _divergence(inside: np.ndarray, tail: float, levels: int) -> float:
    """Return KL(P‖Q) in nats: P is the histogram clipped here, Q its version of few levels, spread over P's support."""
    p = inside.copy()
    p[-1] += tail
    starts = (np.arange(levels) * inside.size) // levels
    support = inside > 0
    level = np.add.reduceat(inside, starts)
    hits = np.add.reduceat(support.astype(np.float64), starts)
    q = np.repeat(level / np.maximum(hits, 1.0), np.diff(np.append(starts, inside.size))) * support
    if q.sum() == 0:
        return np.inf
    occupied = p > 0
    if not support[-1] and tail > 0:
        return np.inf  # Q has nothing where P has the clipped mass: infinitely far apart
    p, q = p[occupied] / p.sum(), q[occupied] / q.sum()
    return float((p * np.log(p / q)).sum())


def mse(histogram: Histogram, _percentile: float) -> float:
    """Return the range with the least mean squared error of quantizing, rounding and clipping together.

    Log-spaced candidates over eight octaves below the largest |x|, then a fine search around the best.

    Source: Nagel et al. 2021 (arXiv:2106.08295), section 3.1, equation 23.
    """
    if histogram.amax == 0.0:
        return 0.0
    coarse = histogram.amax * 2.0 ** (-np.arange(0, 8, 0.125))
    best = coarse[int(np.argmin(squared_error(histogram, coarse)))]
    fine = np.minimum(best * 2.0 ** np.linspace(-0.125, 0.125, 65), histogram.amax)
    return float(fine[int(np.argmin(squared_error(histogram, fine)))])


def squared_error(histogram: Histogram, amax: np.ndarray) -> np.ndarray:
    """Return the summed squared error of int8 at each candidate range.

    Exact for values evenly spread within their bin.

    Args:
        amax: float64 ``(A,)``, candidate ranges, in the tensor's own units.

    Returns:
        float64 ``(A,)``, squared units.
    """
    first, final = histogram.grid
    total = np.zeros(len(amax))
    for counts, last in ((histogram.positive, final), (histogram.negative, -first)):
        hit = counts > 0
        if hit.any():
            total += squared_errors(histogram.low[hit], histogram.high[hit], counts[hit], amax / final, last, 1.0)
    return total


METHODS: dict[str, Callable[[Histogram, float], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
