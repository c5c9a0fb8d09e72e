"""Streaming statistics of a tensor: how often each float32 pattern occurred, in the whole and in each channel.

The upper 16 bits of a float32 are its sign, its exponent and seven bits of mantissa: a histogram bin that is at most
1/128 as wide as its value, for every magnitude, with no range to be known beforehand. Each channel is counted by the
upper 12 bits, three of them mantissa: at most 1/8 as wide. Counts are integers, so merging is exact, and neither the
order of the samples nor how they were batched can change anything.
"""

from __future__ import annotations

import numpy as np

from edgeres.calibrate.counting import count, ordered
from edgeres.errors import CalibrationError

BINS = 1 << 16
MAGNITUDES = BINS // 2  # the sign is the top bit: patterns of x ≥ 0 come first, those of x ≤ −0 after them
INFINITE = 0x7F80  # this magnitude pattern and all above it are infinities and NaNs
CHANNEL_BINS = 1 << 12
FINER = BINS // CHANNEL_BINS  # bins of the whole tensor in each bin of its channels
OCTAVE = 8  # bins of a channel between a power of two and the next
AHEAD = 4  # octaves below a hit that get columns too: sixteen times as much data finds as much smaller values
UNKNOWN = 0  # the column of all bins that have none of their own yet


class TensorStatistics:
    """What one tensor did over all samples.

    Axis 1 is the channel: of (N, C) and of (N, C, …); an array of one axis is a single channel.

    ``counts`` is int64 ``(65536,)``, indexed by the upper 16 bits of the float32 pattern.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        # Of a channel's 4096 bins a few hundred are ever hit: they get columns when that first happens.
        self._columns = np.full(CHANNEL_BINS, UNKNOWN, np.uint16)
        self._table = np.zeros((0, UNKNOWN + 1), np.int64)
        self._extremes = np.empty((0, 2), np.float32)

    @classmethod
    def restored(cls, counts: np.ndarray, channel_counts: np.ndarray, extremes: np.ndarray) -> TensorStatistics:
        """Return statistics from their parts.

        Args:
            counts: int64 ``(65536,)``.
            channel_counts: integers ``(C, B)``, a column for each upper 12 bits that occur in ``counts``, ascending.
            extremes: float32 ``(C, 2)``, minimum and maximum.
        """
        statistics = cls()
        if len(extremes):
            statistics._set_channels(len(extremes))
            statistics._add(counts, channel_counts)
            statistics._widen(extremes)
        return statistics

    def update(self, x: np.ndarray) -> None:
        """Count every element of ``x``, float32 of any shape.

        Raises:
            CalibrationError: it has another number of channels than what was counted before.
        """
        if not x.size:
            return
        planes = np.ascontiguousarray(x, np.float32)
        planes = planes.reshape(planes.shape[0], planes.shape[1] if planes.ndim > 1 else 1, -1)
        self._set_channels(planes.shape[1])
        patterns, extremes = planes.view(np.uint32), ordered(self._extremes.view(np.int32))
        count(patterns, self.counts, self._columns, self._table, extremes)
        if self._table[:, UNKNOWN].any():
            self._count_unknown(patterns, extremes)
        limits = ordered(extremes).view(np.float32)
        if np.isnan(limits).any():
            limits = np.stack([np.fmin.reduce(planes, axis=(0, 2)), np.fmax.reduce(planes, axis=(0, 2))], axis=1)
        self._widen(limits)

    def merge(self, other: TensorStatistics) -> None:
        """Add what another pass counted; merging parts gives exactly the whole.

        Raises:
            CalibrationError: the other has another number of channels.
        """
        if other.channels_seen:
            self._set_channels(other.channels_seen)
            self._add(other.counts, other.channel_counts)
            self._widen(other._extremes)

    def _set_channels(self, channels: int) -> None:
        if not self.channels_seen:
            self._extremes = np.full((channels, 2), (np.inf, -np.inf), np.float32)
            self._table = np.zeros((channels, UNKNOWN + 1), np.int64)
        elif channels != self.channels_seen:
            raise CalibrationError(
                f"a tensor had {self.channels_seen} channels, and now has {channels}: its axis 1 is not the channel. "
                "Export the model with a fixed input size."
            )

    def _count_unknown(self, patterns: np.ndarray, extremes: np.ndarray) -> None:
        """Count a batch's elements in bins that had no column yet; rare once a few batches have been counted."""
        known = self._columns > UNKNOWN
        self._make_columns()
        only_new = np.where(known, np.uint16(UNKNOWN), self._columns)
        count(patterns, np.zeros_like(self.counts), only_new, self._table, extremes)
        self._table[:, UNKNOWN] = 0

    def _add(self, counts: np.ndarray, channel_counts: np.ndarray) -> None:
        self.counts += counts
        self._make_columns()
        self._table[:, self._columns[_channel_bins(counts)]] += channel_counts.astype(np.int64)

    def _make_columns(self) -> None:
        """Give each bin that was counted a column, and those around it, for they are likely to follow."""
        hit = np.asarray(self.counts.reshape(2, -1, OCTAVE * FINER).any(axis=2))  # by sign and octave
        wanted = hit.copy()
        wanted[:, 1:] |= hit[:, :-1]
        for octaves in range(1, AHEAD + 1):
            wanted[:, :-octaves] |= hit[:, octaves:]
        new = np.flatnonzero(np.repeat(wanted, OCTAVE) & (self._columns == UNKNOWN))
        self._columns[new] = self._table.shape[1] + np.arange(new.size)
        self._table = np.concatenate([self._table, np.zeros((self.channels_seen, new.size), np.int64)], axis=1)

    def _widen(self, extremes: np.ndarray) -> None:
        """Let the extremes take these in. A negative zero becomes a plain one: the order of samples would decide it."""
        np.fmin(self._extremes[:, 0], extremes[:, 0] + np.float32(0), out=self._extremes[:, 0])
        np.fmax(self._extremes[:, 1], extremes[:, 1] + np.float32(0), out=self._extremes[:, 1])

    @property
    def channels_seen(self) -> int:
        """How many channels the tensor has; 0 until something was counted."""
        return len(self._extremes)

    @property
    def channel_bins(self) -> np.ndarray:
        """The upper 12 bits of every float32 pattern that occurred: uint16 ``(B,)``, ascending."""
        return _channel_bins(self.counts)

    @property
    def channel_counts(self) -> np.ndarray:
        """How often each of :attr:`channel_bins` occurred in each channel: int64 ``(C, B)``."""
        return np.asarray(self._table[:, self._columns[self.channel_bins]])

    @property
    def channels(self) -> np.ndarray:
        """How often each pattern occurred in each channel: int64 ``(C, 4096)``, indexed by the upper 12 bits.

        Made anew at each call, and large; :attr:`channel_counts` has only the columns that are not all zero.
        """
        dense = np.zeros((self.channels_seen, CHANNEL_BINS), np.int64)
        dense[:, self.channel_bins] = self.channel_counts
        return dense

    @property
    def extremes(self) -> np.ndarray:
        """Each channel's smallest and largest element, exactly: float32 ``(C, 2)``. NaN is never one of them."""
        return np.array(self._extremes)

    @property
    def channel_minimum(self) -> np.ndarray:
        """The smallest element of each channel, exactly: float32 ``(C,)``, in the tensor's own units."""
        return np.array(self._extremes[:, 0])

    @property
    def channel_maximum(self) -> np.ndarray:
        """The largest element of each channel, exactly: float32 ``(C,)``, in the tensor's own units."""
        return np.array(self._extremes[:, 1])

    @property
    def channel_amax(self) -> np.ndarray:
        """The largest |x| of each channel, exactly: float32 ``(C,)``, in the tensor's own units."""
        return np.asarray(np.abs(self._extremes).max(axis=1, initial=0.0))

    @property
    def minimum(self) -> float:
        """The smallest element, exactly, in the tensor's own units; +inf where nothing was counted."""
        return float(self._extremes[:, 0].min(initial=np.inf))

    @property
    def maximum(self) -> float:
        """The largest element, exactly, in the tensor's own units; −inf where nothing was counted."""
        return float(self._extremes[:, 1].max(initial=-np.inf))

    @property
    def elements(self) -> int:
        return int(self.counts.sum())

    @property
    def amax(self) -> float:
        """The largest |x| seen, exactly; 0.0 where nothing was counted."""
        return max(abs(self.minimum), abs(self.maximum)) if self.elements else 0.0

    @property
    def zeros(self) -> int:
        """How many elements were zero (or a denormal below 2⁻¹³³, which no int8 grid tells from zero)."""
        return int(self.counts[0] + self.counts[MAGNITUDES])

    @property
    def not_finite(self) -> int:
        """How many elements were NaN or infinite."""
        return int(self.counts[INFINITE:MAGNITUDES].sum() + self.counts[MAGNITUDES + INFINITE :].sum())


def _channel_bins(counts: np.ndarray) -> np.ndarray:
    return np.flatnonzero(counts.reshape(CHANNEL_BINS, FINER).any(axis=1)).astype(np.uint16)
