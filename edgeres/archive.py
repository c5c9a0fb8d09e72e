"""Arrays out of .npy and .npz files that anybody may have made: nothing is unpacked before its size is known.

Source: NumPy Enhancement Proposal 1 (the .npy format) and PKWARE's APPNOTE.TXT, section 4.3 (ZIP).
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from pathlib import Path
from typing import IO, Dict, Iterator, NamedTuple, Sequence, Tuple, Union

import numpy as np

LARGEST_HEADER = 10_000  # bytes; numpy reads no longer one either, but only says so once it has read it
LARGEST_DIRECTORY = 1 << 24  # bytes: some 200,000 arrays
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1
# Arrays of one number are packed 1,000 times as tight as they unpack. Small ones are welcome; gigabytes are a bomb.
FREELY = 1 << 30  # bytes
TIGHTEST = 100


class Header(NamedTuple):
    """What an array's header promises; ``bytes`` are the header's own and the array's."""

    shape: Tuple[int, ...]
    dtype: np.dtype
    bytes: int


class TooLong(ValueError):
    """A ZIP file claims a directory that fills the memory."""


class Careful(io.FileIO):
    """A file that is never read in one piece larger than ``largest``, as only a forged directory of a ZIP file is."""

    def __init__(self, path: Path, largest: int = LARGEST_DIRECTORY) -> None:
        super().__init__(path)
        self._largest = largest

    def read(self, size: int = -1, /) -> bytes:  # type: ignore[override]
        if size > self._largest:
            raise TooLong(f"its directory has {size:,} bytes")
        return super().read(size) or b""


def header_of(stream: IO[bytes]) -> Header:
    """Return the header that a stream begins with.

    Raises:
        ValueError: it is none, or promises Python objects.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its arrays are of format {version}")
    length = stream.read(2 if version == (1, 0) else 4)
    if int.from_bytes(length, "little") > LARGEST_HEADER:
        raise ValueError(f"the header of an array has {int.from_bytes(length, 'little'):,} bytes")
    text = stream.read(int.from_bytes(length, "little"))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(io.BytesIO(length + text))
    except Exception:  # numpy takes it for Python, and what is none fails in as many ways as Python's parser has
        raise ValueError("the header of an array is damaged") from None
    if not dtype.itemsize:
        raise ValueError(f"its numbers, of type {dtype}, have no bytes")
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    # numpy counts in 64 bits, and what has no bytes has as many numbers as it likes
    if min(shape, default=0) < 0 or math.prod(extent or 1 for extent in shape) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"its header promises the shape {shape}")
    return Header(shape, dtype, np.lib.format.MAGIC_LEN + len(length) + len(text) + math.prod(shape) * dtype.itemsize)


def read_npz(source: Union[Path, bytes], wanted: Sequence[str], largest: int) -> Dict[str, np.ndarray]:
    """Return those of the ``wanted`` arrays that a .npz file has. Nothing in it is ever unpickled.

    Args:
        source: its path, or its bytes.
        largest: so many bytes may the wanted arrays have, once they are unpacked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, is damaged, or would fill the memory.
    """
    with _opened(source) as archive:
        chosen = _chosen(archive, wanted, largest)
        return {name: _array(archive, member) for name, member in chosen.items()}


@contextlib.contextmanager
def _opened(source: Union[Path, bytes]) -> Iterator[zipfile.ZipFile]:
    with Careful(source) if isinstance(source, Path) else io.BytesIO(source) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                yield archive
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as problem:  # damaged bytes make zipfile, zlib and numpy raise nearly anything
            raise ValueError(str(problem) or type(problem).__name__) from None


def _chosen(archive: zipfile.ZipFile, wanted: Sequence[str], largest: int) -> Dict[str, zipfile.ZipInfo]:
    """Return the wanted members by name, once their sizes are found to be sound."""
    members = [member for member in archive.infolist() if member.filename in {f"{name}.npy" for name in wanted}]
    chosen = {member.filename[: -len(".npy")]: member for member in members}
    if len(chosen) != len(members):
        raise ValueError(f"it holds {' or '.join(sorted(chosen))} twice")
    if any(member.compress_type not in PACKED or member.flag_bits & ENCRYPTED for member in members):
        raise ValueError("it is encrypted, or packed in another way than numpy packs")
    unpacked, packed = (sum(sizes) for sizes in zip((0, 0), *((m.file_size, m.compress_size) for m in members)))
    if unpacked > largest or (unpacked > FREELY and unpacked > TIGHTEST * packed):
        raise ValueError(f"it claims to unpack from {packed:,} to {unpacked:,} bytes")
    for name, member in chosen.items():
        with archive.open(member) as stream:
            header = header_of(stream)
        if header.bytes != member.file_size:
            raise ValueError(f"{name} is damaged: its header promises {header.shape} {header.dtype}")
    return chosen


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def names_in(path: Path) -> Tuple[str, ...]:
    """Return the names of the arrays in a .npz file, in its order.

    Raises:
        OSError, ValueError: as :func:`read_npz`.
    """
    with _opened(path) as archive:
        return tuple(name[:-4] if name.endswith(".npy") else name for name in archive.namelist())
