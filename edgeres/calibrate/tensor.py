"""Streaming statistics of a tensor: how often each float32 pattern occurred, in the whole and in each channel.

The upper 16 bits of a float32 are its sign, its exponent and seven bits of mantissa: a histogram bin that is at most
1/128 as wide as its value, for every magnitude, with no range to be known beforehand. Each channel is counted by the
upper 12 bits, three of them mantissa: at most 1/8 as wide. Counts are integers, so merging is exact, and neither the
order of the samples nor how they were batched can change anything.
"""

from __future__ import annotations

import numpy as np

from edgeres.errors import CalibrationError

BINS = 1 << 16
MAGNITUDES = BINS // 2  # the sign is the top bit: patterns of x ≥ 0 come first, those of x ≤ −0 after them
INFINITE = 0x7F80  # this magnitude pattern and all above it are infinities and NaNs
CHANNEL_BINS = 1 << 12
FINER = BINS // CHANNEL_BINS  # bins of the whole tensor in each bin of its channels
CHUNK = 1 << 20  # elements counted at once: numpy's bincount makes an 8-byte copy of each


class TensorStatistics:
    """What one tensor did over all samples.

    Axis 1 is the channel: of (N, C) and of (N, C, …); an array of one axis is a single channel.

    ``counts`` is int64 ``(65536,)``, indexed by the upper 16 bits of the float32 pattern. ``channel_minimum`` and
    ``channel_maximum`` are float32 ``(C,)``, exact, in the tensor's own units; NaN is never one of them. Until
    something was counted, C is 0.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.channel_minimum = np.empty(0, np.float32)
        self.channel_maximum = np.empty(0, np.float32)
        # Of the 4096 bins of a channel a few hundred are ever hit. Each gets a column when that first happens; columns
        # are made ahead of need, for a wider table is a copy of it.
        self._columns = np.full(CHANNEL_BINS, -1, np.int64)
        self._used = 0
        self._table = np.zeros((0, 0), np.int64)

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
        patterns = planes.view(np.uint32)
        flat = patterns.reshape(-1)
        counts = np.zeros(BINS, np.int64)
        for start in range(0, flat.size, CHUNK):
            counts += np.bincount(flat[start : start + CHUNK] >> 16, minlength=BINS)
        self.counts += counts
        self._make_columns(np.flatnonzero(counts.reshape(CHANNEL_BINS, FINER).any(axis=1)))
        first = np.arange(self.channels_seen)[:, None] * self._table.shape[1]
        for sample in patterns:
            cells = self._columns[sample >> 20] + first
            self._table += np.bincount(cells.reshape(-1), minlength=self._table.size).reshape(self._table.shape)
        # adding 0.0 makes −0.0 a plain zero: which of two equal zeros is found first depends on the order
        np.fmin(self.channel_minimum, np.fmin.reduce(planes, axis=(0, 2)) + np.float32(0), out=self.channel_minimum)
        np.fmax(self.channel_maximum, np.fmax.reduce(planes, axis=(0, 2)) + np.float32(0), out=self.channel_maximum)

    def merge(self, other: TensorStatistics) -> None:
        """Add what another pass counted; merging parts gives exactly the whole.

        Raises:
            CalibrationError: the other has another number of channels.
        """
        if not other.channels_seen:
            return
        self._set_channels(other.channels_seen)
        self.counts += other.counts
        bins = other.channel_bins
        self._make_columns(bins)
        self._table[:, self._columns[bins]] += other.channel_counts
        np.fmin(self.channel_minimum, other.channel_minimum, out=self.channel_minimum)
        np.fmax(self.channel_maximum, other.channel_maximum, out=self.channel_maximum)

    def _set_channels(self, channels: int) -> None:
        if not self.channels_seen:
            self.channel_minimum = np.full(channels, np.inf, np.float32)
            self.channel_maximum = np.full(channels, -np.inf, np.float32)
            self._table = np.zeros((channels, 0), np.int64)
        elif channels != self.channels_seen:
            raise CalibrationError(
                f"a tensor had {self.channels_seen} channels, and now has {channels}: its axis 1 is not the channel. "
                "Export the model with a fixed input size."
            )

    def _make_columns(self, bins: np.ndarray) -> None:
        """Give each of these bins a column, where it has none."""
        new = bins[self._columns[bins] < 0]
        self._columns[new] = self._used + np.arange(new.size)
        self._used += new.size
        if self._used > self._table.shape[1]:
            table = np.zeros((self.channels_seen, self._used + self._used // 4 + 8), np.int64)
            table[:, : self._table.shape[1]] = self._table
            self._table = table

    @property
    def channels_seen(self) -> int:
        """How many channels the tensor has; 0 until something was counted."""
        return len(self.channel_minimum)

    @property
    def channel_bins(self) -> np.ndarray:
        """The upper 12 bits of every float32 pattern that occurred: uint16 ``(B,)``, ascending."""
        return np.flatnonzero(self._columns >= 0).astype(np.uint16)

    @property
    def channel_counts(self) -> np.ndarray:
        """How often each of :attr:`channel_bins` occurred in each channel: int64 ``(C, B)``."""
        return self._table[:, self._columns[self.channel_bins]]

    @property
    def channels(self) -> np.ndarray:
        """How often each pattern occurred in each channel: int64 ``(C, 4096)``, indexed by the upper 12 bits.

        Made anew at each call, and large; :attr:`channel_counts` has only the columns that are not all zero.
        """
        dense = np.zeros((self.channels_seen, CHANNEL_BINS), np.int64)
        dense[:, self.channel_bins] = self.channel_counts
        return dense

    @property
    def channel_amax(self) -> np.ndarray:
        """The largest |x| of each channel, exactly: float32 ``(C,)``, in the tensor's own units."""
        return np.asarray(np.maximum(np.abs(self.channel_minimum), np.abs(self.channel_maximum)))

    @property
    def minimum(self) -> float:
        """The smallest element, exactly, in the tensor's own units; +inf where nothing was counted."""
        return float(self.channel_minimum.min(initial=np.inf))

    @property
    def maximum(self) -> float:
        """The largest element, exactly, in the tensor's own units; −inf where nothing was counted."""
        return float(self.channel_maximum.max(initial=-np.inf))

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

    @classmethod
    def restored(cls, counts: np.ndarray, channel_counts: np.ndarray, extremes: np.ndarray) -> TensorStatistics:
        """Return statistics from their parts.

        Args:
            counts: int64 ``(65536,)``.
            channel_counts: integers ``(C, B)``, a column for each upper 12 bits that occur in ``counts``.
            extremes: float32 ``(C, 2)``, minimum and maximum.
        """
        statistics = cls()
        if len(extremes):
            statistics.counts = counts
            statistics.channel_minimum, statistics.channel_maximum = extremes.astype(np.float32).T.copy()
            bins = np.flatnonzero(counts.reshape(CHANNEL_BINS, FINER).any(axis=1))
            statistics._columns[bins] = np.arange(bins.size)
            statistics._used = bins.size
            statistics._table = channel_counts.astype(np.int64)
        return statistics
