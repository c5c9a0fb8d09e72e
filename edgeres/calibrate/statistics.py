"""Streaming statistics of tensors: how often each bfloat16 pattern occurred.

The upper 16 bits of a float32 are its sign, its exponent and seven bits of mantissa: a histogram bin that is at most
1/128 as wide as its value, for every magnitude, with no range to be known beforehand. Counts are integers, so merging
is exact, and neither the order of the samples nor how they were batched can change anything.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeres.errors import CalibrationError

BINS = 1 << 16
MAGNITUDES = BINS // 2  # the sign is the top bit: patterns of x ≥ 0 come first, those of x ≤ −0 after them
INFINITE = 0x7F80  # this magnitude pattern and all above it are infinities and NaNs
# what a file holds, and of which kind (numpy's letters: text, signed, float, unsigned)
ENTRIES = {"names": "U", "samples": "i", "extremes": "f", "starts": "i", "bins": "u", "counts": "i"}
CHUNK = 1 << 20  # elements counted at once: numpy's bincount makes an 8-byte copy of each


@dataclass
class TensorStatistics:
    """What one tensor did over all samples.

    ``counts`` is int64 ``(65536,)``, indexed by the upper 16 bits of the float32 pattern; ``minimum`` and ``maximum``
    are exact, in the tensor's own units.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    minimum: float = float("inf")
    maximum: float = float("-inf")

    def update(self, x: np.ndarray) -> None:
        """Count every element of ``x``, float32 of any shape."""
        if not x.size:
            return
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        patterns = flat.view(np.uint32)
        for start in range(0, flat.size, CHUNK):
            self.counts += np.bincount(patterns[start : start + CHUNK] >> 16, minlength=BINS)
        # adding 0.0 makes −0.0 a plain zero: which of two equal zeros is found first depends on the order
        self.minimum = min(self.minimum, float(flat.min()) + 0.0)
        self.maximum = max(self.maximum, float(flat.max()) + 0.0)

    def merge(self, other: TensorStatistics) -> None:
        """Add what another pass counted; merging parts gives exactly the whole."""
        self.counts += other.counts
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

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


@dataclass
class Statistics:
    """The statistics of every observed tensor, by name, and how many samples they come from."""

    tensors: dict[str, TensorStatistics]
    samples: int = 0

    @classmethod
    def empty(cls, names: Iterable[str]) -> Statistics:
        return cls({name: TensorStatistics() for name in names})

    def update(self, arrays: Mapping[str, np.ndarray], samples: int) -> None:
        """Count one batch: an array for each tensor, and how many samples the batch had."""
        for name, statistics in self.tensors.items():
            statistics.update(arrays[name])
        self.samples += samples

    def merge(self, other: Statistics) -> None:
        """Add what another pass over other samples counted.

        Raises:
            CalibrationError: the other pass observed other tensors.
        """
        if self.tensors.keys() != other.tensors.keys():
            raise CalibrationError("statistics of different tensors cannot be merged: they belong to different models")
        for name, statistics in self.tensors.items():
            statistics.merge(other.tensors[name])
        self.samples += other.samples

    def to_bytes(self) -> bytes:
        """Return the statistics as an npz file; equal statistics give equal bytes."""
        names = sorted(self.tensors)
        used = [np.flatnonzero(self.tensors[name].counts) for name in names]
        pairs = list(zip(names, used, strict=True))
        arrays = {
            "names": np.array(names, dtype=np.str_),
            "samples": np.int64(self.samples),
            "extremes": np.array([[self.tensors[n].minimum, self.tensors[n].maximum] for n in names], np.float64),
            "starts": np.cumsum([0, *(len(bins) for bins in used)], dtype=np.int64),
            "bins": np.concatenate([*used, np.empty(0, np.int64)]).astype(np.uint16),
            "counts": np.concatenate([np.empty(0, np.int64), *(self.tensors[n].counts[b] for n, b in pairs)]),
        }
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Statistics:
        """Return the statistics that :meth:`to_bytes` wrote.

        Raises:
            CalibrationError: it is not such a file; ``where`` names it in the message.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                data = {name: _read_array(archive, name) for name in ENTRIES}
            return _checked(data)
        except Exception as problem:  # damaged bytes make zipfile, zlib and numpy raise nearly anything
            reason = str(problem) or type(problem).__name__
            raise CalibrationError(f"{where}: not a statistics file ({reason}). Calibrate again.") from None


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype.kind != ENTRIES[name]:
        raise ValueError(f"{name} is {array.dtype}")
    return array


def _checked(data: Mapping[str, np.ndarray]) -> Statistics:
    """Return the statistics in a file's arrays; raise ValueError where these contradict one another."""
    names = [str(name) for name in data["names"]]
    starts, bins, counts, extremes = data["starts"], data["bins"], data["counts"], data["extremes"]
    steps = np.diff(starts)
    if len(set(names)) != len(names) or starts.shape != (len(names) + 1,) or extremes.size != 2 * len(names):
        raise ValueError("its names, starts and extremes do not belong together")
    if starts[0] != 0 or (steps < 0).any() or not starts[-1] == len(bins) == len(counts) or bins.shape != counts.shape:
        raise ValueError("its bins and counts are not complete")
    if (counts < 1).any() or data["samples"].shape != () or data["samples"] < 0 or np.isnan(extremes).any():
        raise ValueError("it holds numbers that nobody can have counted")
    statistics = Statistics.empty(names)
    statistics.samples = int(data["samples"])
    for name, start, stop, (minimum, maximum) in zip(
        names, starts[:-1], starts[1:], extremes.reshape(-1, 2), strict=True
    ):
        tensor, used = statistics.tensors[name], bins[start:stop]
        if (np.diff(used.astype(np.int64)) <= 0).any():
            raise ValueError(f"the bins of {name} are not in order")
        tensor.counts[used] = counts[start:stop]
        tensor.minimum, tensor.maximum = float(minimum), float(maximum)
    return statistics
