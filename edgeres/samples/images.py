"""Samples that are image files, decoded by Pillow. The only file that imports it."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from edgeres.errors import SampleError
from edgeres.files import sha256_bytes, sha256_file
from edgeres.preprocess import LONGEST_SIDE, MOST_PIXELS
from edgeres.samples.listing import LARGEST_FILE, Listing, Place

FULL_SCALE = 65535
LOSSLESS = 64  # pixels: a frame no larger is a few kB as it is, and JPEG would smear what little it has
# Which format it is, is not left to Pillow alone: some of its others run a program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
LARGEST_GIF = 1 << 26  # bytes: Pillow looks for the first picture byte by byte
DECODERS = ("jpg", "libjpeg_turbo", "webp", "libtiff")  # as Pillow calls them
QUALITY = 80  # of a JPEG; 160 pixels of a photograph take some 5 kB


class ImageSource:
    """Frames of image files."""

    weight = 256  # a path and a hash
    in_memory = False

    def __init__(self, listing: Listing, known: Optional[Dict[int, str]] = None) -> None:
        """``known`` are hashes of files that must be the same when they are decoded."""
        self.names = listing.names
        self.labels = listing.labels
        self.classes = listing.classes
        self._paths = listing.paths
        self._known = known or {}

    def part(self, indices: Sequence[int], sha256: Mapping[int, str]) -> ImageSource:
        """Return some of the files, without labels; those whose hash is told must be the same when they are decoded."""
        paths = tuple(self._paths[index] for index in indices)
        names = tuple(self.names[index] for index in indices)
        known = {place: sha256[index] for place, index in enumerate(indices) if index in sha256}
        return ImageSource(Listing(paths, names, None, None), known)

    def frame(self, index: int) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB.

        The orientation that a camera wrote into EXIF is not applied: torchvision's and timm's loaders do not apply it
        either, so networks were trained, and their accuracy was published, on pixels as they are stored.

        Raises:
            SampleError: the file is missing, damaged, too large or of a kind without a meaning as RGB.
        """
        return self._decoded(index, None)

    def glimpse(self, index: int, side: int) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB: the frame, or one scaled down whose short side still has ``side`` pixels.

        A JPEG is decoded at a half, a quarter or an eighth of its size, in a fraction of the time; nothing else is
        scaled.

        Raises:
            SampleError: as :meth:`frame`.
        """
        return self._decoded(index, side)

    def _decoded(self, index: int, side: Optional[int]) -> np.ndarray:
        path = self._paths[index]
        try:
            with _opened(path, self._known.get(index)) as image:
                if side is not None and image.format == "JPEG":
                    image.draft(None, (side, side))  # None: the mode stays
                return _rgb(image)
        except MemoryError:
            raise  # which is not the file's fault
        except Exception as problem:
            # Decoders fail on damaged files with nearly every kind of exception; each of them means this file.
            raise SampleError(f"cannot read {path}: {_words(problem)}. Repair or remove it.") from None

    def sha256(self, index: int) -> str:
        """Return the hash of the file's bytes.

        Raises:
            SampleError: the file cannot be read.
        """
        try:
            path = self._paths[index]
            return sha256_file(path) if isinstance(path, Path) else sha256_bytes(path.read())
        except (OSError, SampleError) as problem:
            raise SampleError(f"cannot read {path}: {_words(problem)}. Repair or remove it.") from None

    def problem(self, index: int) -> Optional[str]:
        """Return what is wrong with a file, in a sentence, or None.

        Checksums are checked where a format has them (PNG); a JPEG, which has none, is decoded at an eighth of its
        size: that reads all of it, at a fraction of the time.
        """
        path = self._paths[index]
        try:
            with _opened(path) as image:
                _check_mode(image)
                if image.format == "JPEG":
                    image.draft("RGB", (1, 1))
                    image.load()
                else:
                    image.verify()
        except MemoryError:
            raise
        except Exception as problem:  # as in frame()
            return f"cannot read {path}: {_words(problem)}. Repair or remove it."
        return None


def encoded(frame: np.ndarray, side: int) -> Tuple[bytes, str, Tuple[int, int]]:
    """Return a small picture of a frame, its MIME type, and its (width, height): no side is longer than ``side``.

    Args:
        frame: uint8 (H, W, 3), RGB.
    """
    image, content = Image.fromarray(frame), io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(content, "PNG")
        return content.getvalue(), "image/png", image.size
    image.thumbnail((side, side))
    image.save(content, "JPEG", quality=QUALITY)
    return content.getvalue(), "image/jpeg", image.size


def decoders() -> str:
    """Return which libraries Pillow decodes with, whose other version may give other pixels: builds of one version of
    Pillow have different ones. PNG and GIF are exact, whoever decodes them."""
    return ", ".join(f"{name} {features.version(name) or 'none'}" for name in DECODERS)


@contextlib.contextmanager
def _opened(path: Place, known: Optional[str] = None) -> Iterator[Image.Image]:
    """Open an image of which nothing is decoded yet, and whose file and size are no larger than an image's.

    Where its hash is known, what is decoded are the very bytes that have it.
    """
    with _stream(path) as (stream, size):
        largest = LARGEST_GIF if stream.read(3) == b"GIF" else LARGEST_FILE
        if size > largest:
            raise SampleError(f"it has {size:,} bytes, more than {largest:,}")
        stream.seek(0)
        if known is not None:
            content = stream.read(largest + 1)
            if sha256_bytes(content) != known:
                raise SampleError("it is another file than the one of this name that was looked at before the work")
            stream = io.BytesIO(content)
        with Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > _most_pixels():
                raise SampleError(
                    f"{image.width} x {image.height} pixels are more than the limit of {_most_pixels():,}"
                )
            # Pillow keeps a pointer to each row, and a thin image has as many rows as pixels: 65 million take 2 GB.
            if max(image.size) > LONGEST_SIDE:
                raise SampleError(
                    f"{image.width} x {image.height} pixels are too thin: a side has {LONGEST_SIDE:,} at most"
                )
            yield image


@contextlib.contextmanager
def _stream(path: Place) -> Iterator[Tuple[BinaryIO, int]]:
    """Yield a sample's bytes as a stream, and how many there are."""
    if not isinstance(path, Path):
        content = path.read()
        yield io.BytesIO(content), len(content)
        return
    # Opening a pipe or a device may wait for ever, or never come to an end.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("it is not an ordinary file")
    with open(path, "rb") as stream:
        yield stream, status.st_size


def _most_pixels() -> int:
    # Pillow itself only warns up to twice its limit; a warning in a thread helps nobody.
    return min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS)


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise SampleError("its pixels are floating-point numbers, which have no fixed range; save it with 8 bits")


def _rgb(image: Image.Image) -> np.ndarray:
    """Return uint8 (H, W, 3) of an image of any mode; transparency is dropped, as torchvision's loader drops it."""
    _check_mode(image)
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB, Pillow warns about the transparency that it drops; the colours are the same.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) of greyscale 0…65535 (H, W). Pillow's own conversion would clip it at 255."""
    if values.min() < 0 or values.max() > FULL_SCALE:
        raise SampleError(f"its pixels go from {values.min()} to {values.max()}, beyond 16 bits; save it with 8 bits")
    grey = (values.astype(np.uint32) * 255 + FULL_SCALE // 2) // FULL_SCALE
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _words(problem: Exception) -> str:
    if isinstance(problem, UnidentifiedImageError):
        return "it is not an image, or its header is damaged"
    if isinstance(problem, Image.DecompressionBombError):
        return f"it has more pixels than the limit of {_most_pixels():,}"
    reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return str(reason).rstrip(".")
