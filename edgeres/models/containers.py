"""The containers that weights come in, looked at before a reader unpacks them: how much they claim to hold."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

import msgspec

from edgeres.archive import Careful, TooLong
from edgeres.files import LARGEST_WEIGHTS

LARGEST_HEADER = 1 << 24  # bytes of safetensors' JSON
LARGEST_PICKLE = 1 << 20  # bytes; torch's reader takes some 4 µs for each, and ResNet-152 has 0.1 MB
LARGEST_DIRECTORY = 1 << 22  # bytes of a ZIP file's; each file has some 100 there
MOST_TENSORS = 1 << 13
LONGEST_NAME = 1 << 10  # characters
PICKLES = 5  # of torch's older format: a number, the version, the system, the content, and the order of the tensors
ZIP = b"PK\x03\x04"


class TooLarge(Exception):
    """A container claims to hold more than any weights; the text says what."""


def check(path: Path) -> None:
    """Refuse a file of weights that would fill the memory, or take hours to read.

    Raises:
        TooLarge: with what is too large.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_WEIGHTS:
        raise TooLarge(f"it has {size:,} bytes, more than {LARGEST_WEIGHTS:,}")
    with open(path, "rb") as stream:
        if path.suffix.lower() == ".safetensors":
            _check_safetensors(stream, size)
        elif stream.read(len(ZIP)) == ZIP:
            _check_zip(path)
        else:
            stream.seek(0)
            _check_pickles(stream.read(LARGEST_PICKLE + 1))


def _check_safetensors(stream: io.BufferedReader, size: int) -> None:
    """The header is JSON, with its length in 8 bytes in front of it."""
    length = int.from_bytes(stream.read(8), "little")
    if length > size:
        return  # the reader has words for it
    if length > LARGEST_HEADER:
        raise TooLarge(f"its header has {length:,} bytes, more than {LARGEST_HEADER:,}")
    try:
        names = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return
    if len(names) > MOST_TENSORS:
        raise TooLarge(f"it holds {len(names):,} tensors, more than {MOST_TENSORS:,}")


def _check_zip(path: Path) -> None:
    """torch.save packs nothing, so what is unpacked is no larger than the file."""
    try:
        with Careful(path, LARGEST_DIRECTORY) as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except TooLong as problem:
        raise TooLarge(f"{problem}, more than {LARGEST_DIRECTORY:,}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # as above
    if len(members) > MOST_TENSORS:
        raise TooLarge(f"it holds {len(members):,} files, more than {MOST_TENSORS:,}")
    packed = [member.filename for member in members if _is_read(member) and member.file_size != member.compress_size]
    if packed:
        raise TooLarge(f"{packed[0]} in it is packed, as torch.save never packs it")
    pickles = max((member.file_size for member in members if member.filename.endswith(".pkl")), default=0)
    if pickles > LARGEST_PICKLE:
        raise TooLarge(f"its pickle has {pickles:,} bytes, more than {LARGEST_PICKLE:,}")


def _is_read(member: zipfile.ZipInfo) -> bool:
    """Whether torch reads a file as a tensor or as the pickle; a TorchScript program, which is refused, has others."""
    name = member.filename.partition("/")[2]
    return name == "data.pkl" or name.startswith("data/")


def _check_pickles(head: bytes) -> None:
    """Walk through the pickles at the beginning, which runs nothing; where they do not end, nobody reads on."""
    stream = io.BytesIO(head)
    try:
        for _ in range(PICKLES):
            for _ in pickletools.genops(stream):
                pass
    except Exception:  # what is no pickle makes pickletools raise nearly anything
        if len(head) > LARGEST_PICKLE:
            raise TooLarge(f"the first {LARGEST_PICKLE:,} bytes are not all of its pickles, or none") from None
