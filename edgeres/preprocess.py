"""Camera frame → network input: the same code calibrates, judges and serves.

The steps are those of torchvision's ``Resize(short side)``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` on a Pillow
image, without torch or Pillow: NumPy alone, so that a robot feeds its engine the very numbers that it was judged on.
The resampling equals ``PIL.Image.resize(..., BILINEAR)`` bit for bit: across first, then down, as Pillow up to 11 goes.
Newer ones go down first in tall frames (Pillow 13: more than about twice as tall as wide), which may move a pixel by
one of 255 steps; here the order is fixed, so that a frame means the same on every machine.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from edgeres.artifacts import Preprocessing
from edgeres.errors import SampleError

COLORS = ("rgb", "bgr")
LARGEST_SIDE = 8192  # pixels: more is a typing mistake, and would ask for gigabytes per frame

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


class Window(NamedTuple):
    """The crop, in pixels of the resized frame: ``frame`` is that frame's (height, width)."""

    frame: Tuple[int, int]
    top: int
    left: int


def problems(preprocessing: Preprocessing) -> List[str]:
    """Return every mistake in a preprocessing, one sentence each; an empty list where there is none."""
    found = []
    size_is_good = len(preprocessing.size) == 2 and all(1 <= side <= LARGEST_SIDE for side in preprocessing.size)
    if not size_is_good:
        found.append(f"size is {tuple(preprocessing.size)}: give (height, width), each 1 to {LARGEST_SIDE} pixels")
    if preprocessing.resize is not None:
        if not 1 <= preprocessing.resize <= LARGEST_SIDE:
            found.append(f"resize is {preprocessing.resize}: give the short side in pixels, 1 to {LARGEST_SIDE}")
        elif size_is_good and preprocessing.resize < max(preprocessing.size):
            found.append(
                f"resize is {preprocessing.resize}, less than the crop {_words(preprocessing.size)}: the short side "
                f"would not cover it; set resize to at least {max(preprocessing.size)}"
            )
    if len(preprocessing.mean) != 3 or not all(map(_finite, preprocessing.mean)):
        found.append(f"mean is {tuple(preprocessing.mean)}: give three finite numbers, in units of 0…1")
    # The reciprocal has to be finite in float32 too, or a valid pixel would become infinite.
    if len(preprocessing.std) != 3 or not all(_finite(std) and std > 1e-30 for std in preprocessing.std):
        found.append(f"std is {tuple(preprocessing.std)}: give three finite numbers above 0, in units of 0…1")
    if preprocessing.color not in COLORS:
        found.append(f"color is {preprocessing.color!r}: choose one of {', '.join(COLORS)}")
    return found


def output_shape(preprocessing: Preprocessing) -> Tuple[int, int, int]:
    """Return the shape (3, height, width) that :func:`prepare` gives to every frame."""
    height, width = preprocessing.size
    return 3, height, width


def prepare(frame: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return one frame as the network's input.

    Args:
        frame: uint8 (H, W, 3), RGB, 0…255; any strides.

    Returns:
        float32 (3, h, w), contiguous, normalised, channels in the network's order.

    Raises:
        SampleError: the frame is not such an array, or it does not cover the crop.
    """
    _check(frame, "frame", 3)
    result = np.empty(output_shape(preprocessing), np.float32)
    _normalize(_cropped(frame, preprocessing), preprocessing, result)
    return result


def prepare_batch(frames: Union[np.ndarray, Sequence[np.ndarray]], preprocessing: Preprocessing) -> np.ndarray:
    """Return several frames, of one size or of many, as one network input.

    Args:
        frames: uint8 (N, H, W, 3), or N arrays uint8 (H, W, 3), RGB, 0…255.

    Returns:
        float32 (N, 3, h, w), contiguous, normalised, channels in the network's order.

    Raises:
        SampleError: a frame is not such an array, or it does not cover the crop; the message says which.
    """
    result = np.empty((len(frames), *output_shape(preprocessing)), np.float32)
    if isinstance(frames, np.ndarray):
        _check(frames, "frames", 4)
        window = _window(frames.shape[1], frames.shape[2], preprocessing)
        if window.frame == frames.shape[1:3]:
            # Nothing is resampled: the whole batch is one crop and one table look-up.
            _normalize(_crop(frames, window, preprocessing.size), preprocessing, result)
            return result
    for index, frame in enumerate(frames):
        _check(frame, f"frames[{index}]", 3)
        _normalize(_cropped(frame, preprocessing), preprocessing, result[index])
    return result


def _check(frame: object, name: str, dimensions: int) -> None:
    wanted = "(H, W, 3)" if dimensions == 3 else "(N, H, W, 3)"
    if not isinstance(frame, np.ndarray):
        raise SampleError(f"{name} is a {type(frame).__name__}: give a uint8 array {wanted} of RGB pixels.")
    if frame.dtype != np.uint8:
        raise SampleError(f"{name} is {frame.dtype}: give uint8 {wanted}, RGB from 0 to 255, not yet normalised.")
    if frame.ndim != dimensions or frame.shape[-1] != 3 or 0 in frame.shape[-3:]:
        raise SampleError(f"{name} has shape {frame.shape}: give uint8 {wanted}, RGB, with at least one pixel.")


def _window(height: int, width: int, preprocessing: Preprocessing) -> Window:
    """Return where the crop lies, for frames of height by width.

    Source: torchvision, transforms.Resize with one int (the long side is truncated) and transforms.CenterCrop
    (offsets are rounded half to even, as Python's round does).
    """
    size, short = preprocessing.size, min(height, width)
    resized = (height, width)
    if preprocessing.resize is not None and preprocessing.resize != short:
        long = int(preprocessing.resize * max(height, width) / short)
        resized = (preprocessing.resize, long) if height <= width else (long, preprocessing.resize)
    if resized[0] < size[0] or resized[1] < size[1]:
        scaled = "" if resized == (height, width) else f", {_words(resized)} after resizing"
        raise SampleError(
            f"a frame of {_words((height, width))}{scaled} does not cover the crop {_words(size)}: set the "
            f"preprocessing's resize to at least {max(size)}, or its size to what the network takes."
        )
    top, left = (round((whole - part) / 2.0) for whole, part in zip(resized, size))
    return Window(resized, top, left)


def _cropped(frame: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return uint8 (3, h, w), RGB: the frame resized and cropped."""
    height, width, _ = frame.shape
    window = _window(height, width, preprocessing)
    if window.frame == (height, width):
        return _crop(frame, window, preprocessing.size)
    rows = _bands(height, window.frame[0], window.top, preprocessing.size[0])
    columns = _bands(width, window.frame[1], window.left, preprocessing.size[1])
    first_row, last_row = rows[0].first, rows[-1].last
    # Across, rounded to 8 bits, then down. Only rows and columns that reach the crop are touched.
    across = _resize_across(frame[first_row:last_row], columns, preprocessing.size[1])
    return _resize_down(across, rows, preprocessing.size[0], first_row)


def _crop(frames: np.ndarray, window: Window, size: Tuple[int, int]) -> np.ndarray:
    """Return a view uint8 (…, 3, h, w) of frames uint8 (…, H, W, 3)."""
    rows = slice(window.top, window.top + size[0])
    columns = slice(window.left, window.left + size[1])
    planes: np.ndarray = frames[..., rows, columns, :].swapaxes(-1, -3).swapaxes(-1, -2)  # moveaxis spends 5 µs more
    return planes


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


def _normalize(planes: np.ndarray, preprocessing: Preprocessing, result: np.ndarray) -> None:
    """Write planes uint8 (…, 3, h, w), RGB, into ``result``, float32 (…, 3, h, w) in the network's channel order."""
    table = normalized_pixels(preprocessing)
    for channel in range(3):
        source = channel if preprocessing.color == "rgb" else 2 - channel
        # Any mode but "raise" spares take a copy of its output; no uint8 is out of range. 0.6 of the time of indexing.
        np.take(table[channel], planes[..., source, :, :], out=result[..., channel, :, :], mode="clip")


def normalized_pixels(preprocessing: Preprocessing) -> np.ndarray:
    """Return float32 (3, 256): what each pixel value becomes in each of the network's channels."""
    return _table(tuple(preprocessing.mean), tuple(preprocessing.std))


@lru_cache(maxsize=16)
def _table(mean: Tuple[float, ...], std: Tuple[float, ...]) -> np.ndarray:
    """Return float32 (3, 256), normalized.

    Each step is rounded to float32, as torch's ``x.float().div(255).sub(mean).div(std)`` rounds it.
    """
    pixels = np.arange(256, dtype=np.float32) / np.float32(255)
    shifted: np.ndarray = pixels - np.asarray(mean, np.float32)[:, None]
    return shifted / np.asarray(std, np.float32)[:, None]


def _finite(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e30


def _words(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]} (width x height)"
