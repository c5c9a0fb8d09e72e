"""Camera frame → network input: the same code calibrates, judges and serves.

The steps are those of torchvision's ``Resize(short side)``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` on a Pillow
image, or of Pillow's ``ImageOps.pad`` for a letterbox, without torch or Pillow: NumPy alone, so that a robot feeds its
engine the very numbers that it was judged on.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from edgeres.artifacts import Preprocessing
from edgeres.errors import SampleError
from edgeres.resample import resample

COLORS = ("rgb", "bgr")
FITS = ("crop", "letterbox")
PAD = (114, 114, 114)
"""What fills a letterbox where nobody says: the grey of Ultralytics' LetterBox, near the mean of photographs."""
MIDDLE = 128.0
"""The pixel that int8 holds as zero."""
LARGEST_SIDE = 8192  # pixels: more is a typing mistake, and would ask for gigabytes per frame
MOST_PIXELS = LARGEST_SIDE**2  # of a frame: 67 million, more than the cameras of robots have
LONGEST_SIDE = MOST_PIXELS // 128  # pixels: a side more is a file made to hurt; decoders and weights pay for each row


class Window(NamedTuple):
    """The crop, in pixels of the resized frame: ``frame`` is that frame's (height, width). In a letterbox, where the
    whole resized frame stands in the network's input."""

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
        elif size_is_good and preprocessing.fit != "letterbox" and preprocessing.resize < max(preprocessing.size):
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
    return [*found, *_fit_problems(preprocessing)]


def _fit_problems(preprocessing: Preprocessing) -> List[str]:
    fit, pad, found = preprocessing.fit, preprocessing.pad, []
    if fit not in FITS:
        found.append(f"fit is {fit!r}: choose one of {', '.join(FITS)}")
    if fit == "letterbox" and preprocessing.resize is not None:
        found.append(
            f"resize is {preprocessing.resize}, and a letterbox scales the whole frame into size: leave resize out, or "
            "set fit to crop"
        )
    if fit == "crop" and pad is not None:
        found.append(f"pad is {tuple(pad)}, and a crop fills nothing: leave pad out, or set fit to letterbox")
    if fit == "letterbox" and (pad is None or len(pad) != 3 or not all(0 <= value <= 255 for value in pad)):
        given = None if pad is None else tuple(pad)
        found.append(f"pad is {given}: give red, green and blue of what fills a letterbox, each 0 to 255")
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
    _normalize(_fitted(frame, preprocessing), preprocessing, result)
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
    whole = _unsampled(frames, preprocessing)
    if whole is not None:
        _normalize(_planes(whole), preprocessing, result)  # one table look-up for the whole batch
        return result
    for index, frame in enumerate(frames):
        _check(frame, f"frames[{index}]", 3)
        _normalize(_fitted(frame, preprocessing), preprocessing, result[index])
    return result


def fit_batch(frames: Union[np.ndarray, Sequence[np.ndarray]], preprocessing: Preprocessing) -> np.ndarray:
    """Return several frames as the pixels that :func:`prepare_batch` normalizes.

    Args:
        frames: as there.

    Returns:
        uint8 (N, h, w, 3), channels in the network's order; a view of the frames where nothing is resampled.

    Raises:
        SampleError: as there.
    """
    fitted = _unsampled(frames, preprocessing)
    if fitted is None:
        fitted = np.empty((len(frames), *preprocessing.size, 3), np.uint8)
        for index, frame in enumerate(frames):
            _check(frame, f"frames[{index}]", 3)
            fitted[index] = _fitted(frame, preprocessing).transpose(1, 2, 0)
    return fitted if preprocessing.color == "rgb" else fitted[..., ::-1]


def pixels_of(batch: np.ndarray, preprocessing: Preprocessing) -> Tuple[np.ndarray, float]:
    """Return the pixels that a normalized batch was made of, and how far the farthest number lay from a pixel.

    The arithmetic is that of a network that rounds its input to whole pixels, in float32, and the result what it would
    round to; so whoever gives it these pixels changes nothing.

    Args:
        batch: float32 (N, 3, h, w), finite, normalized, channels in the network's order.

    Returns:
        uint8 (N, h, w, 3), channels in the network's order; and the distance, in steps of a pixel.
    """
    mean, std = (np.asarray(given, np.float64).reshape(3, 1, 1) for given in (preprocessing.mean, preprocessing.std))
    with np.errstate(over="ignore"):  # what becomes infinite is clipped, and far from any pixel
        steps = batch * (255.0 * std).astype(np.float32) + (255.0 * mean - MIDDLE).astype(np.float32)
    pixels = np.clip(np.rint(steps), -MIDDLE, MIDDLE - 1)
    distance = float(np.abs(steps - pixels).max())
    return np.ascontiguousarray((pixels + MIDDLE).astype(np.uint8).transpose(0, 2, 3, 1)), distance


def _check(frame: object, name: str, dimensions: int) -> None:
    wanted = "(H, W, 3)" if dimensions == 3 else "(N, H, W, 3)"
    if not isinstance(frame, np.ndarray):
        raise SampleError(f"{name} is a {type(frame).__name__}: give a uint8 array {wanted} of RGB pixels.")
    if frame.dtype != np.uint8:
        raise SampleError(f"{name} is {frame.dtype}: give uint8 {wanted}, RGB from 0 to 255, not yet normalised.")
    if frame.ndim != dimensions or frame.shape[-1] != 3 or 0 in frame.shape[-3:]:
        raise SampleError(f"{name} has shape {frame.shape}: give uint8 {wanted}, RGB, with at least one pixel.")


def _window(height: int, width: int, preprocessing: Preprocessing) -> Window:
    """Return where the crop lies, for frames of height by width, or where a letterbox has them.

    Source: torchvision, transforms.Resize with one int (the long side is truncated) and transforms.CenterCrop
    (offsets are rounded half to even, as Python's round does); Pillow, ImageOps.contain and ImageOps.pad.
    """
    size, short = preprocessing.size, min(height, width)
    resized = (height, width)
    if preprocessing.fit == "letterbox":
        if width * size[0] > height * size[1]:
            resized = (max(1, round(height / width * size[1])), size[1])
        else:
            resized = (size[0], max(1, min(size[1], round(width / height * size[0]))))
        if max(height, width) > LONGEST_SIDE and resized != (height, width):
            raise SampleError(
                f"a frame of {_words((height, width))} is too long to be scaled into a letterbox: a side has "
                f"{LONGEST_SIDE:,} pixels at most. Cut it, or leave it out."
            )
        return Window(resized, *(round((whole - part) * 0.5) for whole, part in zip(size, resized)))
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


def _unsampled(frames: Union[np.ndarray, Sequence[np.ndarray]], preprocessing: Preprocessing) -> Optional[np.ndarray]:
    """Return the pixels of an array of frames that a crop alone gives, uint8 (N, h, w, 3), RGB, a view; None where
    frames are resampled or filled up, or are no array."""
    if not isinstance(frames, np.ndarray):
        return None
    _check(frames, "frames", 4)
    window = _window(frames.shape[1], frames.shape[2], preprocessing)
    filled = preprocessing.fit == "letterbox" and window.frame != preprocessing.size
    return None if filled or window.frame != frames.shape[1:3] else _crop(frames, window, preprocessing.size)


def _fitted(frame: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return uint8 (3, h, w), RGB: the frame resized and cropped, or in its letterbox."""
    height, width, _ = frame.shape
    window, size = _window(height, width, preprocessing), preprocessing.size
    if preprocessing.fit == "letterbox":
        picture = _planes(frame)
        if window.frame != (height, width):
            picture = resample(frame, window.frame, (0, 0), window.frame)
        return picture if window.frame == size else _letterboxed(picture, window, preprocessing)
    if window.frame == (height, width):
        return _planes(_crop(frame, window, size))
    return resample(frame, window.frame, (window.top, window.left), size)


def _letterboxed(picture: np.ndarray, window: Window, preprocessing: Preprocessing) -> np.ndarray:
    """Return uint8 (3, h, w): a picture uint8 (3, H, W) with the rest around it filled."""
    result = np.empty(output_shape(preprocessing), np.uint8)
    result[:] = np.asarray(preprocessing.pad or PAD, np.uint8).reshape(3, 1, 1)
    result[:, window.top : window.top + window.frame[0], window.left : window.left + window.frame[1]] = picture
    return result


def _crop(frames: np.ndarray, window: Window, size: Tuple[int, int]) -> np.ndarray:
    """Return a view uint8 (…, h, w, 3) of frames uint8 (…, H, W, 3)."""
    cropped: np.ndarray = frames[..., window.top : window.top + size[0], window.left : window.left + size[1], :]
    return cropped


def _planes(frames: np.ndarray) -> np.ndarray:
    """Return a view (…, 3, h, w) of frames (…, h, w, 3)."""
    planes: np.ndarray = frames.swapaxes(-1, -3).swapaxes(-1, -2)  # moveaxis spends 5 µs more
    return planes


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
