"""A bundle as one file to ship: a tar whose every byte follows from the bundle, so that it can be checked by its bytes.

The manifest comes first, then its signatures where there are any, then the files in the manifest's order. Owners, modes
and times are fixed, so the same bundle is the same file wherever it is packed; any tar reads it. Who unpacks it here
parses no tar: once the manifest is vouched for, each header and each size is known, and compared. So there is no link,
no device, no other path, no second file of a name and nothing behind the end to be careful about.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from edgeres.artifacts import FileRef, Manifest
from edgeres.bundle import (
    LARGEST_MANIFEST,
    contradictions,
    misplaced,
    parse_manifest,
    refuse_larger,
)
from edgeres.errors import BundleError, IntegrityError, numbered, printable
from edgeres.files import CHUNK, MANIFEST, SIGNATURES
from edgeres.signatures import (
    LARGEST,
    Keys,
    Signature,
    public_keys,
    signatures_of,
    vouching,
)

SUFFIX = ".edgeres"
BLOCK = 512  # bytes; POSIX.1-1988, "ustar"
END = bytes(2 * BLOCK)
LARGEST_MEMBER = 8**11 - 1  # bytes: eleven octal digits
LONGEST_NAME = 100  # bytes
SIZE = re.compile(rb"[0-7]{11}\0")
KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}

Place = Union[str, "os.PathLike[str]"]
Sink = Callable[[FileRef], ContextManager[Callable[[bytes], object]]]
"""Opens what a file's bytes go to, piece by piece, before they are known to be right."""


class Contents(NamedTuple):
    """What stands in front of a packed bundle's files: the manifest and its bytes, its signatures, and the ids of those
    trusted keys that made one of them."""

    manifest: Manifest
    content: bytes
    signatures: Tuple[Signature, ...]
    trusted: Tuple[str, ...]


def header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a file in a tar: root's, readable by all, of the beginning of 1970."""
    fields = (
        name.encode("ascii").ljust(LONGEST_NAME, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,  # mode, owner, group
        b"%011o\0" % size,
        b"00000000000\0",  # time
        b" " * 8,  # the sum of all bytes, of which these count as spaces
        b"0" + bytes(100),  # an ordinary file; a link's target
        b"ustar\x0000",  # no names of owner and group, no device's numbers
    )
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def too_large(ref: FileRef) -> List[str]:
    """Return what a tar of 1988 does not hold."""
    problems = []
    if ref.bytes > LARGEST_MEMBER:
        problems.append(f"{ref.path} has {ref.bytes:,} bytes, more than the {LARGEST_MEMBER:,} that a tar counts")
    if len(ref.path) > LONGEST_NAME:
        problems.append(f"{ref.path} has a name of more than {LONGEST_NAME} bytes")
    return problems


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def is_packed(path: Place) -> bool:
    """Whether a path is of an ordinary file that begins as a packed bundle does."""
    with contextlib.suppress(BundleError), opened(path) as stream:
        return stream.read(BLOCK, "its beginning").startswith(MANIFEST.encode("ascii") + b"\0")
    return False


def unpacked_name(file: Place) -> str:
    """Return the folder that a file is unpacked into unless told otherwise, in the current one.

    An empty text where its name would lead elsewhere: ``..edgeres`` without its ending is the current folder, and
    ``...edgeres`` its parent.
    """
    name = Path(file).stem
    return "" if name in (".", "..") else name


class Source:
    """A packed bundle, read from its beginning to its end, once."""

    def __init__(self, stream: io.FileIO, path: str) -> None:
        self.path = path
        self.size = os.fstat(stream.fileno()).st_size
        self._stream = stream

    def read(self, most: int, what: str) -> bytes:
        """Return the next bytes, as many as there are up to ``most``.

        Raises:
            BundleError: they cannot be read.
        """
        parts: List[bytes] = []
        try:
            while most:
                part = self._stream.read(min(most, CHUNK))
                if not part:
                    break
                parts.append(part)
                most -= len(part)
        except OSError as problem:
            raise BundleError(f"{self.path} cannot be read at {what}: {problem.strerror}. {AGAIN}") from None
        return b"".join(parts)

    def pieces(self, size: int, what: str) -> Iterator[bytes]:
        """Yield the next bytes, a mebibyte at a time."""
        while size:
            piece = self.read(min(size, CHUNK), what)
            if not piece:
                return
            yield piece
            size -= len(piece)


@contextlib.contextmanager
def opened(path: Place) -> Iterator[Source]:
    """Open a packed bundle; pipes and devices are not waited for.

    Raises:
        BundleError: it cannot be opened, or is no ordinary file.
    """
    place = printable(os.fspath(path))
    try:
        stream = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))
    except FileNotFoundError:
        raise BundleError(f"there is no file {place}. Make one: edgeres pack BUNDLE --out FILE{SUFFIX}") from None
    except (OSError, ValueError) as problem:
        raise BundleError(
            f"{place} cannot be read: {getattr(problem, 'strerror', problem)}. Name a packed bundle, FILE{SUFFIX}"
        ) from None
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise BundleError(f"{place} is not an ordinary file. Name a packed bundle, FILE{SUFFIX}")
        yield Source(stream, place)


def contents_of(source: Source, trusted_keys: Optional[Keys]) -> Contents:
    """Return what stands in front of the files; the manifest is parsed after somebody trusted has vouched for it.

    Raises:
        BundleError: it is no packed bundle, or its manifest holds what no build would write.
        SignatureError: none of the trusted keys vouches for it; it was not parsed.
    """
    keys = None if trusted_keys is None else public_keys(trusted_keys)
    place = source.path
    content, following = _front(source, source.read(BLOCK, "its beginning"), MANIFEST, LARGEST_MANIFEST)
    signatures: Tuple[Signature, ...] = ()
    taken = len(content) + len(padding(len(content))) + 2 * BLOCK
    if following.startswith(SIGNATURES.encode("ascii") + b"\0"):
        signed, following = _front(source, following, SIGNATURES, LARGEST)
        signatures = signatures_of(signed, f"{place}: {SIGNATURES}")
        taken += len(signed) + len(padding(len(signed))) + BLOCK
    trusted = () if keys is None else vouching(place, signatures, content, keys)
    manifest = parse_manifest(place, content)
    problems = contradictions(manifest)
    problems += [text for ref in manifest.files for text in (misplaced(ref), *too_large(ref)) if text]
    if not problems:
        first = manifest.files[0]
        whole = taken - BLOCK + sum(BLOCK + ref.bytes + len(padding(ref.bytes)) for ref in manifest.files) + len(END)
        if source.size < whole:
            problems.append(f"it is cut off: it has {source.size:,} bytes, and its manifest speaks of {whole:,}")
        elif source.size > whole:
            problems.append(f"{source.size - whole:,} bytes stand behind its end")
        elif following != header(first.path, first.bytes):
            problems.append(_strange(following, first))
    if problems:
        raise IntegrityError(f"{numbered(place, problems)}\n{AGAIN}")
    return Contents(manifest, content, signatures, trusted)


def _front(source: Source, block: bytes, name: str, largest: int) -> Tuple[bytes, bytes]:
    """Return the content of one of the files in front, whose header is ``block``, and the next file's header."""
    told = SIZE.fullmatch(block[124:136])
    size = int(block[124:135], 8) if told else -1
    if not told or block != header(name, size):
        what = f"{name} does not stand in front as edgeres packs it"
        raise BundleError(f"{source.path} is no packed bundle: {what}. {AGAIN}")
    if size > largest:
        raise BundleError(f"{source.path}: {name} is larger than any (over {largest:,} bytes): it is none. {AGAIN}")
    content = source.read(size, name)
    rest = source.read(len(padding(size)) + BLOCK, f"the end of {name}")
    if len(content) + len(rest) != size + len(padding(size)) + BLOCK or any(rest[:-BLOCK]):
        raise IntegrityError(f"{source.path} is cut off or damaged at {name}. {AGAIN}")
    return content, rest[-BLOCK:]


def _strange(block: bytes, ref: FileRef) -> str:
    """Return in words how a header is not that of the file that was to come."""
    name = block[:LONGEST_NAME].rstrip(b"\0").decode("ascii", "backslashreplace")
    kind = KINDS.get(block[156:157], "")
    if kind:
        return f"{kind} stands where {ref.path} was to come; a bundle has ordinary files only"
    if name != ref.path:
        return f"{name!r} stands where {ref.path} was to come"
    if block[124:136] != b"%011o\0" % ref.bytes:
        return f"{ref.path} is said to have another size than the manifest's {ref.bytes}"
    return f"{ref.path} has a header that edgeres does not write"


def check_members(source: Source, manifest: Manifest, sink: Sink) -> None:
    """Read all files, and hold each against the manifest; the first one's header has been read.

    Raises:
        IntegrityError: with every file that is not the manifest's.
    """
    problems: List[str] = []
    for number, ref in enumerate(manifest.files):
        if number:
            block = source.read(BLOCK, ref.path)
            if block != header(ref.path, ref.bytes):
                problems.append(_strange(block, ref))
        digest = hashlib.sha256()
        with sink(ref) as write:
            for piece in source.pieces(ref.bytes, ref.path):
                digest.update(piece)
                write(piece)
        if digest.hexdigest() != ref.sha256:
            problems.append(f"{ref.path} has changed since it was built (its SHA-256 is another)")
        if any(source.read(len(padding(ref.bytes)), ref.path)):
            problems.append(f"something stands behind {ref.path}")
    if source.read(len(END) + 1, "its end") != END:
        problems.append("it does not end as edgeres ends it")
    if problems:
        raise IntegrityError(f"{numbered(source.path, problems)}\n{AGAIN}")


def read_packed(
    file: Place, wanted: Tuple[str, ...] = (), trusted_keys: Optional[Keys] = None, most: Optional[int] = None
) -> Tuple[Contents, Dict[str, bytes]]:
    """Return what stands in front of a packed bundle, and the bytes of the ``wanted`` files, after checking all of it.

    Args:
        most: as of :func:`edgeres.bundle.refuse_larger`.

    Raises:
        BundleError: it is no packed bundle.
        IntegrityError: with every file that is not as it was packed.
        SignatureError: none of the trusted keys vouches for it; the manifest was not parsed.
    """
    found: Dict[str, List[bytes]] = {}

    def sink(ref: FileRef) -> ContextManager[Callable[[bytes], object]]:
        if ref.path in wanted:
            return contextlib.nullcontext(found.setdefault(ref.path, []).append)
        return contextlib.nullcontext(len)

    with opened(file) as source:
        contents = contents_of(source, trusted_keys)
        refuse_larger(source.path, contents.manifest, wanted, most)
        check_members(source, contents.manifest, sink)
    return contents, {path: b"".join(parts) for path, parts in found.items()}


AGAIN = "Copy it again, or pack it again where the bundle is: edgeres pack BUNDLE"
