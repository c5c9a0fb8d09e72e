"""Object stores, through fsspec. The only file that imports it."""

from __future__ import annotations

import contextlib
from typing import Any, BinaryIO, Dict, Iterator, List, Tuple

import fsspec.core

from edgeres.errors import MissingPackageError, SampleError, first_line
from edgeres.samples.listing import DEEPEST, MOST_ENTRIES, is_visible


def find(url: str) -> List[Tuple[str, int]]:
    """Return the files under a URL, by their names relative to it, with their sizes, sorted.

    Raises:
        SampleError: it cannot be listed, or holds too many.
        MissingPackageError: the store needs a package of its own.
    """
    files: List[Tuple[str, int]] = []
    with _words(url):
        system, path = _system(url)
        top = path.rstrip("/")
        folders, seen = [top], 0
        while folders:  # each by itself, so that a whole bucket is not listed before it is found to be too large
            folder = folders.pop()
            for entry in system.ls(folder, detail=True):
                seen += 1
                name = entry["name"].rstrip("/")
                if not name.startswith(folder + "/"):  # the folder itself, or a file where a folder was named
                    continue
                inner = name[len(top) + 1 :]
                if entry["type"] != "directory":
                    files.append((inner, _size(entry, url)))
                elif is_visible(inner):
                    folders.append(name)
                if seen > MOST_ENTRIES or inner.count("/") >= DEEPEST:
                    raise SampleError(
                        f"{url} holds more than {MOST_ENTRIES:,} files and folders, or {DEEPEST} within one another. "
                        "Name a folder of images alone."
                    )
    return sorted(files)


def _size(entry: Dict[str, Any], where: str) -> int:
    if entry.get("size") is None:
        raise SampleError(f"{where} does not tell how large {entry['name']} is. Copy the samples to another store.")
    return int(entry["size"])


def exists(url: str) -> bool:
    """Return whether there is such a file or folder.

    Raises: as :func:`find`.
    """
    with _words(url):
        system, path = _system(url)
        return bool(system.exists(path))


def read(url: str, offset: int, size: int) -> bytes:
    """Return bytes of a file.

    Raises: as :func:`find`.
    """
    with _words(url):
        system, path = _system(url)
        content: bytes = system.cat_file(path, start=offset, end=offset + size)
        return content


@contextlib.contextmanager
def opened(url: str) -> Iterator[Tuple[BinaryIO, int]]:
    """Yield a file as a stream, read ahead in large pieces, and its size.

    Raises: as :func:`find`.
    """
    with _words(url):
        system, path = _system(url)
        size = _size({"name": "it", "size": system.size(path)}, url)
        with system.open(path, "rb") as stream:
            yield stream, size


def _system(url: str) -> Tuple[Any, str]:
    if "::" in url:  # in a name that a store told: fsspec would follow it to wherever it leads
        raise SampleError(f"{url}: a name with :: in it is not read. Rename it.")
    system, path = fsspec.core.url_to_fs(url)
    return system, path


@contextlib.contextmanager
def _words(url: str) -> Iterator[None]:
    """Let what fails be told in our words; what a store raises has no common base but Exception."""
    try:
        yield
    except (SampleError, MemoryError):
        raise
    except ImportError as problem:
        raise MissingPackageError(f"{url} needs a package of its store's own: {first_line(problem)}") from None
    except FileNotFoundError:
        raise SampleError(f"{url} does not exist") from None
    except Exception as problem:
        raise SampleError(f"cannot read {url}: {first_line(problem)}") from None
