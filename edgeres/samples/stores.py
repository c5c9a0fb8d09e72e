"""Bytes of samples that are no files by themselves: within a tar, or in a store that fsspec reaches."""

from __future__ import annotations

from edgeres.errors import SampleError
from edgeres.samples.listing import LARGEST_FILE


def read_piece(file: str, offset: int, size: int) -> bytes:
    """Return ``size`` bytes from ``offset`` on of a file; ``file`` is its path or its URL.

    Raises:
        SampleError: they cannot be read, are too many, or end early.
    """
    if size > LARGEST_FILE:
        raise SampleError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) != size:
        raise SampleError(f"its file ends after {len(content):,} of {size:,} bytes")
    return content
