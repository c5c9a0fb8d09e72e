"""Object stores, through fsspec. The only file that imports it."""

from __future__ import annotations

import contextlib
from typing import Any, BinaryIO, Iterator, List, Tuple

import fsspec.core

from edgeres.errors import MissingPackageError, SampleError, first_line
from edgeres.samples.listing import MOST_ENTRIES


def find(url: str) -> List[Tuple[str, int]]:
    """Return the files under a URL, by their names relative to it, with their sizes, sorted.

    Raises:
        SampleError: it cannot be listed, or holds too many.
        MissingPackageError: the store needs a package of its own.
    """
    with _words(url):
        system, path = _system(url)
        found = system.find(path, detail=True)
        prefix = path.rstrip("/") + "/"
        files = [(name, entry) for name, entry in found.items() if name.startswith(prefix)]
    if len(files) > MOST_ENTRIES:
        raise SampleError(f"{url} holds more than {MOST_ENTRIES:,} files. Name a folder of images alone.")
    return sorted((name[len(prefix) :], int(entry.get("size") or 0)) for name, entry in files)


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
        size = int(system.size(path) or 0)
        with system.open(path, "rb") as stream:
            yield stream, size


def _system(url: str) -> Tuple[Any, str]:
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
