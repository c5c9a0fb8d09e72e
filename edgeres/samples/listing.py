"""Which image files a folder or a list file names, in which order, with which labels. No image is opened here."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from edgeres.errors import SampleError, numbered
from edgeres.files import read_bounded

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
LARGEST_LIST = 1 << 28  # bytes: 128 for each of the most samples
LONGEST_LINE = 1 << 13  # characters: a path that Linux opens has 4,096 bytes at most, and a label stands behind it
MOST_SAMPLES = 1 << 21  # ImageNet has 1.3 million to train on
LARGEST_FILE = 1 << 30  # bytes of an image: the most pixels take half of it with 64 bits each
MOST_ENTRIES = 1 << 22  # files and folders, looked at one by one
MOST_LINKS = 1 << 15  # folders reached by a link: few links into one another make paths without end
DEEPEST = 64  # folders within folders
LARGEST_LABEL = 2**31 - 1
# Python refuses to read numbers of thousands of digits, with an error of its own.
LONGEST_LABEL = 20
SHOWN = 10

LABELLED_LINE = re.compile(r"(?P<path>.*[^\s,])(?:\s*,\s*|\s+)(?P<label>[^\s,]+)")


class Piece(NamedTuple):
    """An image that is no file by itself: ``size`` bytes from ``offset`` on of ``file``, which is a tar or an object of
    a store; its path or its URL."""

    file: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.name else self.file

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            SampleError: they cannot be read, or are too many.
        """
        from edgeres.samples.stores import read_piece

        return read_piece(self.file, self.offset, self.size)


Classes = Optional[Tuple[str, ...]]
Place = Union[Path, Piece]
"""Where an image is."""


class Listing(NamedTuple):
    """Image files in order. ``names`` say which file it is, without the machine's own folders where possible."""

    paths: Tuple[Place, ...]
    names: Tuple[str, ...]
    labels: Optional[np.ndarray]
    """int64 (N,), or None."""
    classes: Optional[Tuple[str, ...]]


def is_image(name: str) -> bool:
    """Return whether a file's name ends like that of an image which edgeres reads, in either case."""
    return name.lower().endswith(IMAGE_ENDINGS)


def tars_in(folder: Path) -> Tuple[str, ...]:
    """Return the paths of the tars that lie in a folder itself, sorted; none where it cannot be read."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".tar"))
    except OSError:
        return ()
    return tuple(str(folder / name) for name in names if is_visible(name))


def list_folder(folder: Path, labelled: bool) -> Listing:
    """Return the images under a folder, sorted by relative path; with ``labelled``, one class per subfolder. A folder
    without images gives those of the tars that lie in it.

    Raises:
        SampleError: there is no image, a folder cannot be read, or it is not clear what the classes are.
    """
    try:
        names = sorted(_Walk(folder).images(folder, "", frozenset()))
        subfolders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name))
    except OSError as problem:
        raise SampleError(
            f"cannot read {problem.filename or folder}: {problem.strerror or problem}. Check its permissions."
        ) from None
    tars = () if names else tars_in(folder)
    if tars:
        from edgeres.samples.stores import list_tars

        return list_tars(tars, labelled, str(folder))
    if not names:
        raise SampleError(
            f"{folder} holds no image ({', '.join(ending[1:] for ending in IMAGE_ENDINGS)}). Name a folder that does."
        )
    paths = tuple(folder / name for name in names)
    labels, classes = labels_of_folders(folder, names, subfolders) if labelled else (None, None)
    return Listing(paths, tuple(map(shown, names)), labels, classes)


class _Walk:
    """One walk through a folder, which may be anybody's: it comes to an end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries = self._links = self._images = 0

    def images(self, folder: Path, prefix: str, ancestors: FrozenSet[Tuple[int, int]]) -> Iterator[str]:
        """Yield relative paths with forward slashes. Links are followed, except back to a folder that they lie in."""
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in ancestors:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                self._count(entry.is_symlink() and entry.is_dir(), len(ancestors))
                if not is_visible(entry.name):
                    continue
                if entry.is_dir():
                    yield from self.images(Path(entry.path), f"{prefix}{entry.name}/", ancestors | {identity})
                elif is_image(entry.name):
                    self._images += 1
                    yield prefix + entry.name

    def _count(self, linked: bool, depth: int) -> None:
        self._entries += 1
        self._links += linked
        if self._entries <= MOST_SAMPLES and self._links <= MOST_LINKS and depth <= DEEPEST:  # as nearly always
            return
        for found, most, what in (
            (self._images, MOST_SAMPLES, "images"),
            (self._entries, MOST_ENTRIES, "files and folders"),
            (self._links, MOST_LINKS, "links to folders"),
            (depth, DEEPEST, "folders within one another"),
        ):
            if found > most:
                raise SampleError(
                    f"{self._folder} holds more than {most:,} {what}. Name a folder of images alone, or a list file."
                )


def labels_of_folders(
    folder: Union[str, Path], names: Sequence[str], subfolders: Sequence[str]
) -> Tuple[Optional[np.ndarray], Classes]:
    """Return the images' labels, int64 (N,), and the classes that these count, as text; neither of a flat folder.

    Raises:
        SampleError: it is not clear what the classes are.
    """
    classes = _class_folders(folder, names, subfolders)
    if classes is None:
        return None, None
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name.split("/")[0]] for name in names], np.int64), tuple(map(shown, classes))


def _class_folders(folder: Union[str, Path], names: Sequence[str], subfolders: Sequence[str]) -> Classes:
    """Return the class folders, sorted, or None where the folder is flat.

    A label is a position among the folders' names, so one folder too many or too few would shift all labels behind it
    without a trace: whatever is not plainly one folder per class is refused.
    """
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return None
    if loose:
        raise SampleError(
            f"{folder} holds both images ({loose[0]}) and folders with images, so it is not clear which classes there "
            "are. Move the images into their class folders, or name a list file with labels."
        )
    deeper = [name for name in names if name.count("/") > 1]
    if deeper:
        raise SampleError(
            f"{folder} should hold one folder per class, but {deeper[0]} lies deeper than that. Name the folder whose "
            "subfolders are the classes, or a list file with labels."
        )
    filled = {name.split("/")[0] for name in names}
    empty = [name for name in subfolders if name not in filled]
    if empty:
        raise SampleError(
            f"{folder} should hold one folder per class, but {', '.join(map(shown, empty[:SHOWN]))} "
            f"hold{'s' if len(empty) == 1 else ''} no image, and labels are positions among the folders' names. Add an "
            "image, remove what is no class, or name a list file with labels."
        )
    return tuple(subfolders)


def list_file(path: Path) -> Listing:
    """Return the images that a list file names, in its order: one path per line, relative to it, label or none behind.

    Raises:
        SampleError: it is no text, names no image or missing ones, or its labels are malformed; every line is told.
    """
    try:
        text = read_bounded(path, LARGEST_LIST).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise SampleError(f"{path} is not UTF-8 text. A list file names one image per line.") from None
    except OSError as problem:
        advice = "Divide it" if problem.errno == errno.EFBIG else "Check its permissions"
        raise SampleError(f"cannot read {path}: {problem.strerror or problem}. {advice}.") from None
    if text.count("\n") > MOST_SAMPLES:
        raise SampleError(f"{path} has more than {MOST_SAMPLES:,} lines. Divide it.")
    names: List[str] = []
    labels: List[int] = []
    problems: List[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > LONGEST_LINE:
            problems.append(f"line {number} is longer than any path, {len(line):,} characters")
            continue
        name, word = _split(line)
        names.append(name)
        # os.path.isfile answers False to names that no file system can hold, where Path.is_file raises.
        if not os.path.isfile(os.path.join(path.parent, name)):
            problems.append(f"line {number}: there is no file {name}; paths are relative to the list file")
        if word is not None and not re.fullmatch(r"\+?\d+", word):
            problems.append(f"line {number}: label {word} is not a whole number from 0 on")
        elif word is not None and (len(word) > LONGEST_LABEL or int(word) > LARGEST_LABEL):
            problems.append(f"line {number}: label {word} is larger than {LARGEST_LABEL}")
        elif word is not None:
            labels.append(int(word))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise SampleError(numbered(str(path), problems[:SHOWN] + more))
    if not names:
        raise SampleError(f"{path} names no image. Write one path per line, relative to the list file.")
    if labels and len(labels) != len(names):
        raise SampleError(f"{path} gives labels to {len(labels)} of {len(names)} images. Give one to each, or to none.")
    paths = tuple(path.parent / name for name in names)
    return Listing(paths, tuple(names), np.array(labels, np.int64) if labels else None, None)


def _split(line: str) -> Tuple[str, Optional[str]]:
    """Return a line's path and its label, if any. Paths may hold spaces, commas and numbers."""
    found = LABELLED_LINE.fullmatch(line)
    if found is None or is_image(line):
        return line, None
    is_number = re.fullmatch(r"[+-]?\d+", found["label"]) is not None
    return (found["path"], found["label"]) if is_number or is_image(found["path"]) else (line, None)


def is_visible(name: str) -> bool:
    """Return whether no part of a path is hidden."""
    return not any(part.startswith(".") for part in name.split("/"))


def shown(name: str) -> str:
    """Return a file's name as text that JSON can hold, also where its bytes are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
