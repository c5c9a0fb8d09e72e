"""The statistics of all tensors of a pass, and their file, which believes nothing that contradicts itself.

Only bins that were hit are written. Which of a channel's bins those are follows from the bins of the whole tensor, so
its counts stand alone: for each tensor a table of channels by bins, one after the other.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgeres.archive import read_npz
from edgeres.calibrate.tensor import BINS, FINER, INFINITE, MAGNITUDES, TensorStatistics
from edgeres.errors import CalibrationError
from edgeres.provenance import cores

__all__ = ["INFINITE", "MAGNITUDES", "Statistics", "TensorStatistics"]

LARGEST = 8 << 30  # bytes, unpacked
# what a file holds, and of which kind (numpy's letters: text, signed, float, unsigned)
ENTRIES = {
    "names": "U",
    "samples": "i",
    "starts": "i",
    "bins": "u",
    "counts": "i",
    "channels": "i",
    "extremes": "f",
    "channel_counts": "u",
}


class Statistics:
    """The statistics of every observed tensor, by name, and how many samples they come from."""

    def __init__(self, tensors: dict[str, TensorStatistics], samples: int = 0) -> None:
        self.tensors = tensors
        self.samples = samples

    @classmethod
    def empty(cls, names: Iterable[str]) -> Statistics:
        return cls({name: TensorStatistics() for name in names})

    def update(self, arrays: Mapping[str, np.ndarray], samples: int) -> None:
        """Count one batch: an array for each tensor, and how many samples the batch had."""
        # the compiled loop lets other threads run; a tensor is counted by one of them alone
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(
                lambda name: self.tensors[name].update(arrays[name]),
                sorted(self.tensors, key=lambda name: -arrays[name].size),
            ):
                pass
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
        tensors = [self.tensors[name] for name in names]
        used = [np.flatnonzero(tensor.counts) for tensor in tensors]
        tables = _joined([tensor.channel_counts.reshape(-1) for tensor in tensors], np.int64)
        arrays = {
            "names": np.array(names, dtype=np.str_),
            "samples": np.int64(self.samples),
            "starts": np.cumsum([0, *(len(bins) for bins in used)], dtype=np.int64),
            "bins": _joined(used, np.uint16),
            "counts": _joined([tensor.counts[bins] for tensor, bins in zip(tensors, used, strict=True)], np.int64),
            "channels": np.array([tensor.channels_seen for tensor in tensors], np.int64),
            "extremes": np.concatenate([np.empty((0, 2), np.float32), *(tensor.extremes for tensor in tensors)]),
            # the narrowest type that holds them all: most of the file, and eight times as long in int64
            "channel_counts": tables.astype(np.min_scalar_type(tables.max(initial=0))),
        }
        stream = io.BytesIO()
        # numpy's own level, 6, takes five times as long, for a tenth less
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as entry:  # which bears no date
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Statistics:
        """Return the statistics that :meth:`to_bytes` wrote.

        Raises:
            CalibrationError: it is not such a file; ``where`` names it in the message.
        """
        try:
            data = read_npz(content, tuple(ENTRIES), LARGEST)
            for name, kind in ENTRIES.items():
                if data[name].dtype.kind != kind:
                    raise ValueError(f"{name} is {data[name].dtype}")
            return _checked(data)
        except Exception as problem:  # damaged bytes make zipfile, zlib and numpy raise nearly anything
            reason = str(problem) or type(problem).__name__
            raise CalibrationError(f"{where}: not a statistics file ({reason}). Calibrate again.") from None


def _joined(arrays: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *arrays]).astype(kind)


def _checked(data: Mapping[str, np.ndarray]) -> Statistics:
    """Return the statistics in a file's arrays; raise ValueError where these contradict one another."""
    names = [str(name) for name in data["names"]]
    starts, bins, counts, channels = data["starts"], data["bins"], data["counts"], data["channels"]
    if len(set(names)) != len(names) or starts.shape != (len(names) + 1,) or channels.shape != (len(names),):
        raise ValueError("its names, starts and channels do not belong together")
    if (
        starts[0] != 0
        or (np.diff(starts) < 0).any()
        or not starts[-1] == len(bins) == len(counts)
        or bins.shape != counts.shape
    ):
        raise ValueError("its bins and counts are not complete")
    if (counts < 1).any() or data["samples"].shape != () or data["samples"] < 0 or (channels < 0).any():
        raise ValueError("it holds numbers that nobody can have counted")
    if ((channels > 0) != (np.diff(starts) > 0)).any() or data["extremes"].shape != (channels.sum(), 2):
        raise ValueError("its channels and extremes do not belong together")
    statistics = Statistics({}, int(data["samples"]))
    rest, extremes = data["channel_counts"], data["extremes"]
    for name, start, stop, seen in zip(names, starts[:-1], starts[1:], channels, strict=True):
        whole = _whole(name, bins[start:stop], counts[start:stop])
        columns = np.unique(bins[start:stop] // FINER)
        table, rest = rest[: seen * columns.size], rest[seen * columns.size :]
        if table.shape != (seen * columns.size,):
            raise ValueError(f"the channels of {name} are not complete")
        table, limits, extremes = table.reshape(seen, columns.size), extremes[:seen], extremes[seen:]
        _check_channels(name, whole, columns, table, limits)
        statistics.tensors[name] = TensorStatistics.restored(whole, table, limits)
    if rest.size:
        raise ValueError("it counts channels of no tensor")
    return statistics


def _whole(name: str, bins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if (np.diff(bins.astype(np.int64)) <= 0).any():
        raise ValueError(f"the bins of {name} are not in order")
    whole = np.zeros(BINS, np.int64)
    whole[bins] = counts
    return whole


def _check_channels(name: str, whole: np.ndarray, columns: np.ndarray, table: np.ndarray, extremes: np.ndarray) -> None:
    """Every element lies in one channel, channels are of one size, and an extreme is a number that was counted."""
    rows = table.sum(axis=1, dtype=np.int64)
    if (table.sum(axis=0, dtype=np.int64) != whole.reshape(-1, FINER).sum(axis=1)[columns]).any():
        raise ValueError(f"the channels of {name} do not add up to it")
    if (rows != rows[:1]).any():
        raise ValueError(f"the channels of {name} are of different sizes")
    if np.isnan(extremes).any() or (extremes[:, 0] > extremes[:, 1]).any():
        raise ValueError(f"the extremes of {name} are none")
