"""A sensor_msgs/Image as a frame that an engine takes, or a sentence that says what is wrong with it."""

from __future__ import annotations

from typing import Any, NamedTuple, Tuple

import numpy as np

from edgeres.errors import SampleError


class FrameError(SampleError):
    """An image message that is damaged, or in an encoding that is not read here."""


class Encoding(NamedTuple):
    """Bytes per pixel, and which of them are red, green and blue."""

    channels: int
    rgb: Tuple[int, int, int]


# Channels of one byte each, so that ``is_bigendian`` means nothing here.
ENCODINGS = {
    "rgb8": Encoding(3, (0, 1, 2)),
    "bgr8": Encoding(3, (2, 1, 0)),
    "rgba8": Encoding(4, (0, 1, 2)),
    "bgra8": Encoding(4, (2, 1, 0)),
    "mono8": Encoding(1, (0, 0, 0)),
}


def frame_of(message: Any) -> np.ndarray:
    """Return an image message's pixels, uint8 (height, width, 3), RGB; those of ``rgb8`` share the message's memory.

    Args:
        message: has the fields of sensor_msgs/Image. Its rows may be longer than their pixels (``step``).

    Raises:
        FrameError: with everything that is wrong with it.
    """
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        raise FrameError(
            f"images in {message.encoding!r} are not read, only {', '.join(ENCODINGS)}. Set the camera's driver to one "
            "of these, or put a node in front that converts"
        )
    height, width, step, size = message.height, message.width, message.step, len(message.data)
    row = width * encoding.channels
    wrong = []
    if height < 1 or width < 1:
        wrong.append(f"it is {width} × {height} pixels")
    if step < row:
        wrong.append(f"its rows have {step} bytes, and {width} pixels of {message.encoding} need {row}")
    if size != step * height:
        wrong.append(f"it has {size} bytes of data, and {height} rows of {step} are {step * height}")
    if wrong:
        raise FrameError(f"a damaged image: {'; '.join(wrong)}")
    pixels = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, :row]
    pixels = pixels.reshape(height, width, encoding.channels)
    if encoding == ENCODINGS["rgb8"]:
        return np.ascontiguousarray(pixels)
    frame = np.empty((height, width, 3), np.uint8)
    for channel, source in enumerate(encoding.rgb):
        frame[..., channel] = pixels[..., source]
    return frame
