"""What images look like, in a few numbers each and a thumbnail: cheap enough to be looked at before the long work."""

from __future__ import annotations

import hashlib
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from edgeres.artifacts import Preprocessing
from edgeres.errors import SampleError
from edgeres.preprocess import MOST_PIXELS, prepare
from edgeres.samples.collection import Samples, in_order

THUMBNAIL = 32  # pixels on a side
PATCH = 64  # pixels on a side: the middle of the network's input, where sharpness is measured
SHORT_SIDE = 256  # a frame's pixels that a thumbnail is made from: eight or more for each of its own
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
STEP = 1 / 255
# Threads that have little to do wait for one another: measured, two are slower than one with frames of 32 × 32 pixels,
# and faster with 256 × 341.
TOGETHER = 16  # frames
WORTH_A_THREAD = 3 * 128 * 128  # bytes of a frame
STATISTICS = (
    "brightness",
    "contrast",
    "sharpness",
    "colour",
    "red-blue",
    "green-magenta",
    "red",
    "green",
    "blue",
    "red contrast",
    "green contrast",
    "blue contrast",
)
"""What is measured of every image; its place here is its column in ``Appearance.statistics``."""

Watch = Callable[[int, int], None]


class Appearance(NamedTuple):
    """What some samples look like, in their order."""

    names: Tuple[str, ...]
    luma: np.ndarray
    """float64 (N, 32, 32): the frame's middle square, scaled down, 0…1."""
    statistics: np.ndarray
    """float64 (N, S), a column for each of ``STATISTICS``."""
    spread: np.ndarray
    """float64 (N,): the largest standard deviation of a colour channel over the thumbnail, 0…1."""
    grain: np.ndarray
    """float64 (N,): the same over the pixels of the middle, where noise is not yet averaged out."""
    sides: np.ndarray
    """int64 (N,): the short side of the frame as it was looked at, in pixels."""
    pixels: Tuple[str, ...]
    """SHA-256 of the pixels, so that a copy in another format is known; of a large JPEG's decoding, scaled down."""


class Part(NamedTuple):
    """Some rows of an :class:`Appearance`."""

    luma: np.ndarray
    statistics: np.ndarray
    spread: np.ndarray
    grain: np.ndarray
    sides: np.ndarray
    pixels: List[str]


def look(samples: Samples, size: Optional[Tuple[int, int]], resize: Optional[int], watch: Watch) -> Appearance:
    """Return what samples look like to a network whose input is ``size`` (height, width) after ``resize``.

    ``size`` None: not known yet; sharpness is then measured at the frames' own scale.

    Raises:
        SampleError: a sample cannot be read, or does not cover the input.
    """
    patch = min([PATCH, *(size or ()), *([resize] if resize else [])])
    side = max(SHORT_SIDE, 2 * (resize or max(size or (SHORT_SIDE,))))
    enlarge = size is None and resize is None
    parts: List[Part] = []

    def part(start: int) -> Part:
        places = range(start, min(start + TOGETHER, len(samples)))
        thumbs = np.empty((len(places), 3, THUMBNAIL, THUMBNAIL))
        middles = np.empty((len(places), 3, patch, patch))
        sides, digests = [], []
        for row, index in enumerate(places):
            frame = samples.glimpse(index, side)
            try:
                middles[row] = prepare(_covering(frame, patch) if enlarge else frame, _plain(patch, resize))
            except SampleError as problem:
                raise samples.located(index, problem) from None
            thumbs[row] = thumbnail(frame)
            sides.append(min(frame.shape[:2]))
            digests.append(_digest(frame))
        luma = _luma(thumbs)
        spread, grain = (images.std((2, 3)).max(1) for images in (thumbs, middles))
        return Part(luma, measured(thumbs, sharpness(middles)), spread, grain, np.array(sides, np.int64), digests)

    threads = None if samples.glimpse(0, side).size >= WORTH_A_THREAD else 1
    for one in in_order(part, range(0, len(samples), TOGETHER), threads):
        parts.append(one)
        watch(min(len(parts) * TOGETHER, len(samples)), len(samples))
    return Appearance(
        samples.names,
        np.concatenate([one.luma for one in parts]),
        np.concatenate([one.statistics for one in parts]),
        np.concatenate([one.spread for one in parts]),
        np.concatenate([one.grain for one in parts]),
        np.concatenate([one.sides for one in parts]),
        tuple(digest for one in parts for digest in one.pixels),
    )


def _digest(frame: np.ndarray) -> str:
    digest = hashlib.sha256(f"{frame.shape}\n".encode())
    digest.update(frame.tobytes())
    return digest.hexdigest()


def _luma(images: np.ndarray) -> np.ndarray:
    """Return float64 (N, h, w) of images (N, 3, h, w). Not by a matrix product, whose threads would stall ours."""
    red, green, blue = (images[:, channel] * weight for channel, weight in enumerate(LUMA))
    luma: np.ndarray = red + green + blue
    return luma


def _plain(side: int, resize: Optional[int]) -> Preprocessing:
    """Return the preprocessing that cuts a square out of the middle and leaves pixels as they are, 0…1."""
    return Preprocessing((side, side), resize, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _covering(frame: np.ndarray, side: int) -> np.ndarray:
    """Return a frame, repeated where it is smaller than a square of ``side``: the network will enlarge it too."""
    times = [-(-side // extent) for extent in frame.shape[:2]]
    if max(times) == 1:
        return frame
    height, width = (extent * often for extent, often in zip(frame.shape, times))
    if height * width > MOST_PIXELS:
        raise SampleError(
            f"a frame of {frame.shape[1]} x {frame.shape[0]} (width x height) is too thin to be enlarged: that makes "
            f"more than the limit of {MOST_PIXELS:,} pixels. Cut it, or leave it out."
        )
    return frame.repeat(times[0], 0).repeat(times[1], 1)


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """Return float32 (3, 32, 32), RGB, 0…1: the middle square of a frame uint8 (H, W, 3), scaled as the network's
    input is. Of a frame much larger than that, pixels are skipped evenly."""
    step = max(1, min(frame.shape[:2]) // SHORT_SIDE)
    return prepare(frame[::step, ::step], _plain(THUMBNAIL, THUMBNAIL))


def sharpness(images: np.ndarray) -> np.ndarray:
    """Return float64 (N,): how much of an image's contrast lies between neighbouring pixels, 0 (blur) to 1.4 (noise).

    The root mean square of the brightness gradient over that of the contrast, so that neither exposure nor contrast
    counts as focus.

    Args:
        images: float64 (N, 3, h, w), RGB, 0…1.

    Source: Subbarao, Choi, Nikzad, "Focusing Techniques", Optical Engineering 32 (11), 1993, section 3: the energy of
        the image gradient as a measure of focus.
    """
    luma = _luma(images)
    energy = np.zeros(len(luma))
    for axis in (1, 2):
        if luma.shape[axis] > 1:
            energy += np.mean(np.diff(luma, axis=axis) ** 2, axis=(1, 2)) / 2
    sharp: np.ndarray = np.sqrt(energy) / (luma.std((1, 2)) + STEP)
    return sharp


def measured(thumbs: np.ndarray, sharp: np.ndarray) -> np.ndarray:
    """Return float64 (N, S), a column for each of ``STATISTICS``, of thumbnails (N, 3, h, w) and their sharpness (N,).

    Contrast is the standard deviation of pixels (Peli, "Contrast in complex images", JOSA A 7 (10), 1990). What tells
    of colour is relative to brightness, so that a darker exposure has the same colours.
    """
    levels, contrasts = thumbs.mean((2, 3)), thumbs.std((2, 3))
    columns: Dict[str, np.ndarray] = dict(coloured(levels, (thumbs.max(1) - thumbs.min(1)).mean((1, 2))))
    columns["contrast"] = _luma(thumbs).std((1, 2))
    columns["sharpness"] = sharp
    for channel, name in enumerate(("red", "green", "blue")):
        columns[f"{name} contrast"] = contrasts[:, channel]
    return np.stack([columns[name] for name in STATISTICS], 1)


def coloured(levels: np.ndarray, chroma: np.ndarray) -> Dict[str, np.ndarray]:
    """Return the statistics that follow from the channels' means (N, 3) and the mean of largest less smallest channel
    (N,), by name, each (N,)."""
    brightness = (levels * np.array(LUMA)).sum(1)
    total = levels.sum(1) + 3 * STEP
    return {
        "brightness": brightness,
        "red": levels[:, 0],
        "green": levels[:, 1],
        "blue": levels[:, 2],
        "red-blue": (levels[:, 0] - levels[:, 2]) / total,
        "green-magenta": (levels[:, 1] - (levels[:, 0] + levels[:, 2]) / 2) / total,
        "colour": chroma / (brightness + STEP),
    }
