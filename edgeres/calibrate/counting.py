"""The inner loop of calibration, compiled: every float32 of a batch is read once, and counted twice.

NumPy's bincount needs five times as long for the same (each array widened to int64, the channels' cells computed, and
one core at a time), which would double the time of a pass.
"""

from __future__ import annotations

import numpy as np

from edgeres.calibrate.compiled import compiled

FEW = 8  # fewer zeros than one in so many are counted like all other values


@compiled
def count(
    patterns: np.ndarray, counts: np.ndarray, columns: np.ndarray, table: np.ndarray, extremes: np.ndarray
) -> None:
    """Count float32 patterns by their upper 16 bits in all, and by their upper 12 bits in each channel.

    Args:
        patterns: uint32 ``(N, C, S)``, contiguous.
        counts: int64 ``(65536,)``, added to.
        columns: uint16 ``(4096,)``, each channel bin's column of ``table``.
        table: int64 ``(C, columns)``, added to.
        extremes: int32 ``(C, 2)``, smallest and largest :func:`ordered` pattern so far, widened.
    """
    rest = np.empty(patterns.shape[2], np.uint16)
    # all samples of a channel in turn: its row of the table stays in the cache
    for channel in range(patterns.shape[1]):
        row, smallest, largest = table[channel], extremes[channel, 0], extremes[channel, 1]
        for sample in range(patterns.shape[0]):
            plane, zeros = patterns[sample, channel], 0
            # a loop of its own, which the compiler can vectorize
            for i in range(plane.size):
                pattern = np.int32(plane[i])
                zeros += (plane[i] >> 16) == 0
                pattern ^= (pattern >> 31) & np.int32(0x7FFFFFFF)
                smallest, largest = min(smallest, pattern), max(largest, pattern)
            # Counting one bin again and again waits for memory each time, and a ReLU's zeros come among all others, so
            # that the processor cannot foresee it: where they are many they are taken out first.
            if zeros * FEW > plane.size:
                kept = 0
                for i in range(plane.size):
                    rest[kept] = plane[i] >> 16
                    kept += (plane[i] >> 16) != 0
                counts[0] += zeros
                row[columns[0]] += zeros
            else:
                kept = plane.size
                for i in range(plane.size):
                    rest[i] = plane[i] >> 16
            for i in range(kept):
                counts[rest[i]] += 1
                row[columns[rest[i] >> 4]] += 1
        extremes[channel, 0], extremes[channel, 1] = smallest, largest


def ordered(patterns: np.ndarray) -> np.ndarray:
    """Return int32 in the order of the floats that they are the patterns of; applied again, it gives these back.

    The bits of a negative float below its sign grow with its magnitude, so they are turned over.
    """
    return np.asarray(patterns ^ ((patterns >> 31) & np.int32(0x7FFFFFFF)))
