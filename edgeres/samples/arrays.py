"""Samples that are arrays: uint8 (N, H, W, 3) in memory, in a ``.npy`` (memory-mapped) or in a ``.npz``."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Mapping, Optional, Sequence, Tuple

import numpy as np

from edgeres.archive import header_of, names_in, read_npz
from edgeres.errors import SampleError, few, first_line
from edgeres.preprocess import MOST_PIXELS
from edgeres.samples.listing import MOST_SAMPLES

# What a .npz may claim to hold once it is unpacked: more is a mistake, or meant to fill the memory.
LARGEST_BYTES = 64 << 30


class ArraySource:
    """Frames of one array. ``images`` is uint8 (N, H, W, 3); ``labels`` int64 (N,) or None."""

    classes: Optional[Tuple[str, ...]] = None
    in_memory = True

    def __init__(self, name: str, images: np.ndarray, labels: Optional[np.ndarray]) -> None:
        self.names = tuple(f"{name}[{index}]" for index in range(len(images)))
        self.labels = labels
        self.weight = int(images[0].nbytes)
        self._images = images

    def frame(self, index: int) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB; a view."""
        return np.asarray(self._images[index])

    def glimpse(self, index: int, side: int) -> np.ndarray:
        """Return the frame: nothing has to be decoded."""
        return self.frame(index)

    def sha256(self, index: int) -> str:
        """Return the hash of a frame's shape and bytes."""
        frame = self._images[index]
        digest = hashlib.sha256(f"uint8 {tuple(frame.shape)}\n".encode())
        digest.update(frame.tobytes())
        return digest.hexdigest()

    def problem(self, index: int) -> Optional[str]:
        """Return None: a frame of an array that could be opened can be read."""

    def part(self, indices: Sequence[int], sha256: Mapping[int, str]) -> ArraySource:
        """Return some of the frames, copied: whoever gets them need not be able to read the file."""
        source = ArraySource("", np.stack([self._images[index] for index in indices]), None)
        source.names = tuple(self.names[index] for index in indices)
        return source


def open_array(path: Path) -> ArraySource:
    """Return the samples of a ``.npy`` or ``.npz`` file. Nothing in it is ever unpickled.

    Raises:
        SampleError: the file is damaged, or its arrays are not uint8 (N, H, W, 3) and one label per image.
    """
    zipped = path.suffix.lower() == ".npz"
    try:
        images, labels = _read_zip(path) if zipped else (_mapped(path), None)
    except (OSError, ValueError, MemoryError) as problem:
        reason = (getattr(problem, "strerror", None) or first_line(problem)).rstrip(".")
        writer = "numpy.savez" if zipped else "numpy.save"
        raise SampleError(
            f"cannot read {path}: {reason}. Write it again, with {writer} and without object arrays."
        ) from None
    return from_arrays(images, labels, str(path), path.name)


def from_arrays(images: np.ndarray, labels: Optional[np.ndarray], where: str, name: str = "images") -> ArraySource:
    """Return the samples that arrays hold; ``where`` names them in messages, ``name`` in the samples' names.

    Raises:
        SampleError: they are not uint8 (N, H, W, 3) and, if there are labels, integers (N,) from 0 on.
    """
    images = np.asanyarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise SampleError(
            f"{where} holds {images.dtype} {images.shape}: give uint8 (N, H, W, 3), RGB from 0 to 255, at least one."
        )
    if len(images) > MOST_SAMPLES or images.shape[1] * images.shape[2] > MOST_PIXELS:
        raise SampleError(
            f"{where} holds {images.shape}, more than {MOST_SAMPLES:,} frames or {MOST_PIXELS:,} pixels in each. "
            "Divide it, or make the frames smaller."
        )
    return ArraySource(name, images, None if labels is None else _labels(np.asarray(labels), len(images), where))


def _labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise SampleError(f"{where}: labels are {labels.dtype}. Give one integer per image, from 0 on.")
    if labels.shape != (count,):
        raise SampleError(f"{where}: labels have shape {labels.shape} for {count} images. Give shape ({count},).")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int64).max:
        wrong = int(np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int64).max))[0])
        raise SampleError(f"{where}: labels[{wrong}] is {labels[wrong]}. Labels count the classes from 0 on.")
    return labels.astype(np.int64)


def _mapped(path: Path) -> np.ndarray:
    """Return the array of a ``.npy``, which stays in the file until it is read."""
    if zipfile.is_zipfile(path):
        raise SampleError(f"{path} is a .npz under another name. Rename it to end in .npz.")
    with open(path, "rb") as stream:
        header, size = header_of(stream), os.fstat(stream.fileno()).st_size
    if header.bytes > size:
        raise ValueError(f"its header promises {header.shape} {header.dtype}, and it has {size:,} bytes")
    images: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return images


def _read_zip(path: Path) -> Tuple[np.ndarray, Optional[np.ndarray]]:
    """Return ``images`` and ``labels`` of a ``.npz``."""
    found = read_npz(path, ("images", "labels"), LARGEST_BYTES)
    if "images" not in found:
        held = few(names_in(path), 8) or "nothing"
        raise SampleError(f"{path} holds {held}. Name the frames images, and their classes, if any, labels.")
    return found["images"], found.get("labels")
