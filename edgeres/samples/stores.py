"""Samples that are no files by themselves: within tars, or in a store that fsspec reaches by a URL."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import stat
from typing import BinaryIO, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from edgeres.errors import MissingPackageError, SampleError, few
from edgeres.files import is_url
from edgeres.samples.listing import (
    LARGEST_FILE,
    MOST_SAMPLES,
    Listing,
    Piece,
    is_image,
    is_visible,
    labels_of_folders,
    shown,
)
from edgeres.samples.tars import Contents, Member, contents, expanded, key_of

TAR = ".tar"
PACKED = re.compile(r".*\.(tar\.[a-z0-9]+|tgz|tbz2?|txz)", re.IGNORECASE)
SECRET = re.compile("://[^/]*@")
SCHEMES = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "http", "https")
"""Of fsspec's many some reach into archives, other URLs or other programs: these only read files."""


def is_tar(name: str) -> bool:
    """Return whether a name is that of a tar, or a pattern of such names; a packed one is, too, to be refused."""
    return name.lower().endswith(TAR) or PACKED.fullmatch(name) is not None


def local_path(source: str) -> Optional[str]:
    """Return the path that a ``file://`` URL names; None of any other.

    Raises:
        SampleError: it is a URL that edgeres does not read.
    """
    scheme = source.partition(":")[0]
    # First what would be a secret: it is in no message, either.
    if SECRET.search(source) or (scheme != "file" and re.search("[?#]", source)):
        raise SampleError(
            "a URL that holds a name or a password, or something behind a ? or #, would be written into the bundle. "
            "Leave it out, and let the store's own variables or files tell who you are."
        )
    if not re.match(r"[a-z0-9]+://", source) or scheme not in SCHEMES or (scheme != "file" and "::" in source):
        raise SampleError(
            f"{source}: edgeres reads URLs of {', '.join(SCHEMES)} alone, and none within another. Copy the samples to "
            "one."
        )
    return source[len("file://") :] if scheme == "file" else None


def list_url(url: str, labelled: bool) -> Listing:
    """Return the images under a URL: a folder of images, as :func:`list_folder` does, a tar, or a folder of tars.

    Raises:
        SampleError: there is none, or it is not clear what the classes are.
        MissingPackageError: fsspec is missing, or the store's own package.
    """
    _require_fsspec(url)
    if is_tar(url):
        return list_tars(expanded(url), labelled)
    if url.startswith("http"):  # whose pages are no list, and tell no sizes
        raise SampleError(f"{url}: of a web server edgeres reads {TAR} files alone. Name some, or copy the folder.")
    from edgeres.samples import remote

    found = [(name, size) for name, size in remote.find(url) if is_visible(name)]
    images = [(name, size) for name, size in found if is_image(name)]
    if images:
        pieces = [Piece(f"{url}/{name}", "", 0, size) for name, size in images]
        folders = sorted({name.split("/")[0] for name, _ in found if "/" in name})
        return _listing(url, [name for name, _ in images], pieces, {}, folders if labelled else None)
    tars = tuple(f"{url}/{name}" for name, _ in found if is_tar(name))
    if tars:
        return list_tars(tars, labelled, url)
    raise SampleError(f"{url} holds no image and no {TAR}. Name a folder of a store that does.")


def list_tars(tars: Sequence[str], labelled: bool, where: str = "") -> Listing:
    """Return the images in tars, sorted by name as if all were unpacked into one folder: so samples are the same ones
    whether they are packed or not, and however they are spread over tars.

    With ``labelled``, labels are those of ``.cls`` files beside the images, or where there are none, of folders.

    Raises:
        SampleError: a tar cannot be read, or two hold a file of one name, or some images have no label, or two.
    """
    where = where or few(tars)
    names: List[str] = []
    pieces: List[Piece] = []
    labels: List[Tuple[str, int]] = []
    folders: Dict[str, None] = {}
    for tar in tars:
        found = _contents(tar, labelled)
        for member in found.images:
            names.append(member.name)
            pieces.append(_piece(tar, member))
        labels += found.labels
        folders.update(dict.fromkeys(found.folders))
        if len(names) > MOST_SAMPLES:
            raise SampleError(f"{where} holds more than {MOST_SAMPLES:,} images. Name fewer tars.")
    if not names:
        raise SampleError(f"{where} holds no image.")
    return _listing(where, names, pieces, _by_key(where, labels), sorted(folders) if labelled else None)


def _by_key(where: str, labels: Sequence[Tuple[str, int]]) -> Dict[str, int]:
    """Return labels by the key of their samples.

    Raises:
        SampleError: samples have two. Which one is meant is anybody's guess.
    """
    found: Dict[str, int] = {}
    twice: Dict[str, None] = {}
    for name, label in labels:
        key = key_of(name)
        if key in found:
            twice[shown(key)] = None
        found[key] = label
    if twice:
        raise SampleError(
            f"{where} has more than one label (.cls) for {few(tuple(twice))}. A sample is called what stands before "
            "the first dot of a name, so frame.0001.cls is the label of frame. Name samples without dots "
            "(frame-0001.png, frame-0001.cls), and give each one label, in all tars."
        )
    return found


def _piece(tar: str, member: Member) -> Piece:
    return Piece(tar, shown(member.name), member.offset, member.size)


def _listing(
    where: str, names: List[str], pieces: List[Piece], labels: Dict[str, int], folders: Optional[List[str]]
) -> Listing:
    """Return images sorted by name, with labels if there are any; ``folders`` are those of the top, None: no labels."""
    order = sorted(range(len(names)), key=names.__getitem__)
    names, pieces = [names[place] for place in order], [pieces[place] for place in order]
    twice = [one for one, other in zip(names, names[1:]) if one == other]
    if twice:
        raise SampleError(f"{where} holds {shown(few(twice))} twice. Give each sample a name of its own.")
    numbers, classes = None, None
    if labels and folders is not None:
        lacking = [name for name in names if key_of(name) not in labels]
        if lacking:
            raise SampleError(
                f"{where} has no label (.cls) for {len(lacking)} of {len(names)} images, such as {shown(lacking[0])}. "
                "Give one to each, or to none."
            )
        numbers = np.array([labels[key_of(name)] for name in names], np.int64)
    elif folders is not None:
        numbers, classes = labels_of_folders(where, names, folders)
    return Listing(tuple(pieces), tuple(map(shown, names)), numbers, classes)


def _contents(tar: str, labelled: bool) -> Contents:
    if PACKED.fullmatch(tar):
        raise SampleError(f"{tar} is packed, and would have to be unpacked up to each image. Unpack it: a plain .tar.")
    try:
        with _opened(tar) as (stream, size):
            return contents(stream, size, labelled)
    except SampleError as problem:
        raise SampleError(f"{tar}: {problem}. Copy or write it again.") from None
    except OSError as problem:
        raise SampleError(f"cannot read {tar}: {problem.strerror or problem}. Check its permissions.") from None


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Tuple[BinaryIO, int]]:
    if is_url(file):
        from edgeres.samples import remote

        with remote.opened(file) as (stream, size):
            yield stream, size
        return
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("it is not an ordinary file")
    with open(file, "rb") as stream:
        yield stream, status.st_size


def read_piece(file: str, offset: int, size: int) -> bytes:
    """Return ``size`` bytes from ``offset`` on of a file; ``file`` is its path or its URL.

    Raises:
        SampleError: they cannot be read, are too many, or end early.
        MissingPackageError: fsspec is missing, or the store's own package.
    """
    if size > LARGEST_FILE:
        raise SampleError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
    if is_url(file):
        _require_fsspec(file)
        from edgeres.samples import remote

        content = remote.read(file, offset, size)
    else:
        with _opened(file) as (stream, _):
            stream.seek(offset)
            content = stream.read(size)
    if len(content) != size:
        raise SampleError(f"its file ends after {len(content):,} of {size:,} bytes")
    return content


def _require_fsspec(url: str) -> None:
    if importlib.util.find_spec("fsspec") is None:
        raise MissingPackageError.for_extra("fsspec", f"reading {url}", "cluster")
