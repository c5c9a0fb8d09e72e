"""Resampling as Pillow's ``resize(..., BILINEAR)`` does it, bit for bit, in NumPy alone: across first, then down, as
Pillow up to 11 goes. Newer ones go down first in tall frames (Pillow 13: more than about twice as tall as wide), which
may move a pixel by one of 255 steps; here the order is fixed, so that a frame means the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Tuple

import numpy as np

# Pillow keeps resampling weights with 22 fractional bits: 32 less 8 for a pixel and 2 for sign and overshoot.
WEIGHT_BITS = 22
HALF = float(1 << (WEIGHT_BITS - 1))
ONE_STEP = 1.0 / (1 << WEIGHT_BITS)

# Output pixels that share one matrix product. So few keep the band narrow, and the product too small for BLAS to spread
# over threads of its own, which stall one another where several frames are prepared at once.
BAND = 8
# Input values widened to float64 at a time, 512 KiB: they stay in cache, and bound memory for huge photographs.
STRIP_VALUES = 1 << 16


class Band(NamedTuple):
    """Neighbouring output pixels [start, stop) and the input pixels [first, last) that they are weighted sums of."""

    start: int
    stop: int
    first: int
    last: int
    weights: np.ndarray
    """float64 (last - first, stop - start), integers: weights in units of 2**-22."""


def resample(frame: np.ndarray, whole: Tuple[int, int], offset: Tuple[int, int], size: Tuple[int, int]) -> np.ndarray:
    """Return a part of a resized frame; only rows and columns that reach it are touched.

    Args:
        frame: uint8 (H, W, 3).
        whole: the resized frame's (height, width), in pixels.
        offset: where the part begins in it, (top, left).
        size: the part's (height, width).

    Returns:
        uint8 (3, height, width).
    """
    rows = _bands(frame.shape[0], whole[0], offset[0], size[0])
    columns = _bands(frame.shape[1], whole[1], offset[1], size[1])
    first_row, last_row = rows[0].first, rows[-1].last
    # Across, rounded to 8 bits, then down.
    across = _resize_across(frame[first_row:last_row], columns, size[1])
    return _resize_down(across, rows, size[0], first_row)


def _resize_across(frame: np.ndarray, columns: Tuple[Band, ...], width: int) -> np.ndarray:
    """Return float64 (3, H, width) with whole numbers 0…255: a frame uint8 (H, W, 3) resampled along its rows."""
    first, last = columns[0].first, columns[-1].last
    height = frame.shape[0]
    result = np.empty((3, height, width))
    step = max(1, STRIP_VALUES // (3 * (last - first)))
    for top in range(0, height, step):
        strip = np.moveaxis(frame[top : top + step, first:last], -1, 0).astype(np.float64, order="C")
        lines = strip.reshape(-1, last - first)
        sums = np.empty((len(lines), width))
        for band in columns:
            inputs = lines[:, band.first - first : band.last - first]
            np.matmul(inputs, band.weights, out=sums[:, band.start : band.stop])
        result[:, top : top + step] = _rounded(sums).reshape(3, -1, width)
    return result


def _resize_down(planes: np.ndarray, rows: Tuple[Band, ...], height: int, first: int) -> np.ndarray:
    """Return uint8 (3, height, w): planes float64 (3, H, w), whose row 0 is input row ``first``, resampled down."""
    sums = np.empty((3, height, planes.shape[2]))
    for band in rows:
        weights = band.weights.T
        np.matmul(weights, planes[:, band.first - first : band.last - first], out=sums[:, band.start : band.stop])
    return _rounded(sums).astype(np.uint8)


def _rounded(sums: np.ndarray) -> np.ndarray:
    """Return fixed-point sums as whole pixels 0…255, in place: half a step added, shifted right, clipped."""
    sums += HALF
    sums *= ONE_STEP
    np.floor(sums, out=sums)
    # Weights are never negative, so only the top can be passed, by rounding of the weights.
    np.minimum(sums, 255.0, out=sums)
    return sums


@lru_cache(maxsize=256)
def _bands(source: int, target: int, start: int, count: int) -> Tuple[Band, ...]:
    """Return the weights that resample ``source`` pixels to ``target``, for outputs [start, start + count) only.

    A weight is an integer below 2**23 and a pixel one below 2**8, so every sum stays far below 2**53: float64 products
    are exact, in whichever order BLAS adds, and the result is the same on every machine.

    Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc, bilinear_filter), which the
    order of operations here follows, for it decides the last bit.
    """
    if source == target:
        return tuple(
            Band(at - start, min(at + BAND, start + count) - start, at, min(at + BAND, start + count), weights)
            for at in range(start, start + count, BAND)
            for weights in [np.eye(min(BAND, start + count - at)) * (1 << WEIGHT_BITS)]
        )
    scale = source / target
    support = max(scale, 1.0)
    centers = (np.arange(start, start + count) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), source)
    taps = first[:, None] + np.arange(int((last - first).max()))
    distance = np.abs((taps - centers[:, None] + 0.5) * (1.0 / support))
    weights = np.where((taps < last[:, None]) & (distance < 1.0), 1.0 - distance, 0.0)
    # cumsum adds one tap after the other, as a C loop does; sum() would add in pairs and could differ in the last bit.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    weights = np.floor(weights * (1 << WEIGHT_BITS) + 0.5)
    return tuple(_band(at, min(at + BAND, count), taps, last, weights) for at in range(0, count, BAND))


def _band(start: int, stop: int, taps: np.ndarray, last: np.ndarray, weights: np.ndarray) -> Band:
    """Return outputs [start, stop) of per-output taps and weights (count, T) as one dense matrix."""
    lowest, highest = int(taps[start, 0]), int(last[stop - 1])
    matrix = np.zeros((highest - lowest, stop - start))
    for output in range(start, stop):
        reach = int(last[output] - taps[output, 0])
        matrix[taps[output, 0] - lowest : last[output] - lowest, output - start] = weights[output, :reach]
    return Band(start, stop, lowest, highest, matrix)
