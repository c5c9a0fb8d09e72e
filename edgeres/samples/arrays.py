"""Samples that are arrays: uint8 (N, H, W, 3) in memory, in a ``.npy`` (memory-mapped) or in a ``.npz``."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, Optional, Tuple

import numpy as np

from edgeres.errors import SampleError, first_line

# What a .npz may claim to hold once it is unpacked: more is a mistake, or meant to fill the memory.
LARGEST_BYTES = 64 << 30
DAMAGED = (OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error)


class ArraySource:
    """Frames of one array. ``images`` is uint8 (N, H, W, 3); ``labels`` int64 (N,) or None."""

    classes: Optional[Tuple[str, ...]] = None

    def __init__(self, name: str, images: np.ndarray, labels: Optional[np.ndarray]) -> None:
        self.names = tuple(f"{name}[{index}]" for index in range(len(images)))
        self.labels = labels
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


def open_array(path: Path) -> ArraySource:
    """Return the samples of a ``.npy`` or ``.npz`` file. Nothing in it is ever unpickled.

    Raises:
        SampleError: the file is damaged, or its arrays are not uint8 (N, H, W, 3) and one label per image.
    """
    zipped = path.suffix.lower() == ".npz"
    content: Any
    try:
        content, labels = _read_zip(path) if zipped else (np.load(path, mmap_mode="r", allow_pickle=False), None)
    except DAMAGED as problem:
        # numpy's own words may advise to unpickle the file after all: they are not passed on.
        reason = getattr(problem, "strerror", None) or ("" if "pickle" in str(problem) else first_line(problem))
        reason = reason or "it holds Python objects, or is damaged"
        writer = "numpy.savez" if zipped else "numpy.save"
        raise SampleError(
            f"cannot read {path}: {reason.rstrip('.')}. Write it again, with {writer} and without object arrays."
        ) from None
    if not isinstance(content, np.ndarray):
        content.close()
        raise SampleError(f"{path} is a .npz under another name. Rename it to end in .npz.")
    return from_arrays(content, labels, str(path), path.name)


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


def _read_zip(path: Path) -> Tuple[np.ndarray, Optional[np.ndarray]]:
    """Return ``images`` and ``labels`` of a ``.npz``, whose sizes are checked before any memory is taken."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if "images.npy" not in members:
            held = ", ".join(name[:-4] if name.endswith(".npy") else name for name in members) or "nothing"
            raise SampleError(f"{path} holds {held}. Name the frames images, and their classes, if any, labels.")
        wanted = [members[name] for name in ("images.npy", "labels.npy") if name in members]
        declared = sum(info.file_size for info in wanted)
        if declared > LARGEST_BYTES:
            raise SampleError(
                f"{path} claims to unpack to {declared:,} bytes, more than {LARGEST_BYTES:,}. Write smaller files, or "
                "a .npy, which is not unpacked."
            )
        for info in wanted:
            _check_header(archive, info, path)
    with np.load(path, allow_pickle=False) as data:
        return data["images"], data["labels"] if "labels" in data.files else None


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Refuse an array whose own header asks for another amount of memory than the archive holds for it."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise SampleError(f"{path}: {member.filename} is of the array format {version}. Write it with numpy.savez.")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        start = stream.tell()
    if not dtype.hasobject and start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise SampleError(f"{path}: {member.filename} is damaged: its header promises {shape} {dtype}. Write it again.")
