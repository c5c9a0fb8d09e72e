"""What a tar holds, from its headers alone: nothing is unpacked, and a forged header costs no more than its 512 bytes.

Image files and their labels, as WebDataset writes them: ``key.jpg``, and ``key.cls`` with a whole number beside it.

Source: POSIX.1-2017, pax (ustar and extended headers); GNU tar's manual, section "Basic Tar Format" (long names).
"""

from __future__ import annotations

import itertools
import re
import tarfile
from typing import BinaryIO, Dict, Iterator, List, NamedTuple, Set, Tuple

from edgeres.errors import SampleError
from edgeres.samples.listing import LARGEST_FILE, LARGEST_LABEL, LONGEST_LABEL, MOST_ENTRIES, is_image

BLOCK = tarfile.BLOCKSIZE
LARGEST_HEADER = 1 << 16  # bytes of an extended header, which holds a name and a few numbers
LONGEST_NAME = 1 << 12  # bytes, as of a path that Linux opens
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: no content follows, whatever size is told."""
EXTENDED = {tarfile.XHDTYPE: b"x", tarfile.SOLARIS_XHDTYPE: b"x", tarfile.GNUTYPE_LONGNAME: b"L"}
"""Headers that tell of the file behind them, which has one of a kind."""
SPARSE = "GNU.sparse"
LABEL = ".cls"
RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=")


class Member(NamedTuple):
    """An ordinary file in a tar: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


class Contents(NamedTuple):
    """The images in a tar, in its order, and the labels, each with the name of its file."""

    images: List[Member]
    labels: List[Tuple[str, int]]
    folders: List[str]


def key_of(name: str) -> str:
    """Return what the files of one sample have in common, as WebDataset has it: a path up to the first dot of its last
    part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def contents(stream: BinaryIO, size: int, labelled: bool) -> Contents:
    """Return the images and labels in a tar of ``size`` bytes.

    Links, devices and hidden files are left out, as those of a folder are; ``labelled``: labels are read at all.

    Raises:
        SampleError: it is none, ends early, or holds what cannot be meant.
    """
    images: List[Member] = []
    labels: List[Tuple[str, int]] = []
    folders: Dict[str, None] = {}
    for member in members(stream, size):
        name = _plain(member.name)
        if not name:
            continue
        if "/" in name:
            folders[name.split("/")[0]] = None
        if is_image(name):
            if member.size > LARGEST_FILE:
                raise SampleError(f"{name} has {member.size:,} bytes, more than {LARGEST_FILE:,}")
            images.append(member._replace(name=name))
        elif labelled and name.endswith(LABEL):
            labels.append((name, _label(name, _read(stream, member.offset, min(member.size, LONGEST_LABEL + 2)))))
    return Contents(images, labels, sorted(folders))


def members(stream: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the ordinary files of a tar, in its order.

    Raises:
        SampleError: as :func:`contents`.
    """
    position, more, seen = 0, b"", 0
    told: Dict[str, bytes] = {}  # of the next member, by an extended header
    extended: Set[bytes] = set()  # of which kinds it has one
    while True:
        block = _read(stream, position, BLOCK)
        if not block.strip(b"\0"):
            if not block and position == 0:
                raise SampleError("it is not a tar")
            return
        header = _header(block, position)
        position += BLOCK
        seen += 1
        if seen > MOST_ENTRIES:
            raise SampleError(f"it holds more than {MOST_ENTRIES:,} files and folders")
        if header.type in EXTENDED:
            if EXTENDED[header.type] in extended:
                raise SampleError(f"a file has a second extended header, at byte {position - BLOCK:,}")
            extended.add(EXTENDED[header.type])
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            told.update(_pax(_extended(stream, position, header.size)))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            more = _extended(stream, position, header.size).rstrip(b"\0")
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if header.type == tarfile.GNUTYPE_SPARSE or SPARSE in told:
                raise SampleError(f"{header.name} is sparse; write it anew with --format=ustar")
            header.size = _number(told["size"]) if "size" in told else header.size
            name = told.get("path") or more or header.name.encode("utf-8", "surrogateescape")
            if len(name) > LONGEST_NAME or b"\0" in name:
                raise SampleError(f"a name has {len(name):,} bytes, or one that no name has")
            if header.type in REGULAR and not header.name.endswith("/"):
                if position + header.size > size:
                    raise SampleError("it ends in the midst of a file; it was not copied whole")
                yield Member(name.decode("utf-8", "surrogateescape"), position, header.size)
            elif header.type in EMPTY:
                header.size = 0
            told, more, extended = {}, b"", set()
        position += -(-header.size // BLOCK) * BLOCK
        if position > size:
            raise SampleError("it ends in the midst of a file; it was not copied whole")


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as problem:
        what = "it is not a tar" if position == 0 else f"its header at byte {position:,} is damaged"
        raise SampleError(f"{what} ({problem})") from None
    if header.size < 0:
        raise SampleError(f"its header at byte {position:,} tells of {header.size:,} bytes")
    return header


def _read(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    content = stream.read(size)
    # The two empty blocks at the end are often left out.
    if len(content) < size and content:
        raise SampleError("it ends in the midst of a file; it was not copied whole")
    return content


def _extended(stream: BinaryIO, position: int, size: int) -> bytes:
    if size > LARGEST_HEADER:
        raise SampleError(f"an extended header has {size:,} bytes, more than {LARGEST_HEADER:,}")
    return _read(stream, position, size)


def _pax(content: bytes) -> Dict[str, bytes]:
    """Return those records of an extended header that matter: each is its own length, a key and a value."""
    records: Dict[str, bytes] = {}
    content, place = content.rstrip(b"\0"), 0
    while place < len(content):
        found = PAX_RECORD.match(content, place)
        end = place + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise SampleError("an extended header is damaged")
        key = found[2].decode("utf-8", "replace")
        key = SPARSE if key.startswith(SPARSE) else key
        if key in (SPARSE, "path", "size"):
            records[key] = content[found.end() : end - 1]
        place = end
    return records


def _number(text: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise SampleError("an extended header is damaged")
    return int(text)


def _plain(name: str) -> str:
    """Return a name as a folder would have it, or nothing where it is hidden.

    Raises:
        SampleError: it leads out of any folder.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise SampleError(f"the name {name!r} leads out of it; write it anew, with relative names")
    return "" if any(part.startswith(".") for part in parts) else "/".join(parts)


def _label(name: str, content: bytes) -> int:
    text = content.strip()
    if not re.fullmatch(rb"[0-9]{1,%d}" % LONGEST_LABEL, text) or int(text) > LARGEST_LABEL:
        raise SampleError(f"{name} holds {text[:20]!r}, not a whole number from 0 on")
    return int(text)


def expanded(source: str) -> Tuple[str, ...]:
    """Return the names that a pattern such as ``shard-{0000..0012}.tar`` stands for; the name itself where it is none.

    Raises:
        SampleError: they are too many.
    """
    parts = RANGE.split(source)  # text, first, last, text, first, last, …, text
    ranges = [(first, int(first), int(last)) for first, last in zip(parts[1::3], parts[2::3])]
    count = 1
    for _, first, last in ranges:  # counted before a name is made
        count *= max(0, last - first + 1)
        if count > MOST_SHARDS:
            raise SampleError(f"{source} stands for more than {MOST_SHARDS:,} files")
    numbers = [[f"{n:0{len(text)}}" for n in range(first, last + 1)] for text, first, last in ranges]
    return tuple(
        parts[0] + "".join(number + text for number, text in zip(chosen, parts[3::3]))
        for chosen in itertools.product(*numbers)
    )


MOST_SHARDS = 100_000
