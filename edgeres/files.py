"""Files: hashes, atomic writes, and the names of a bundle's files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import mmap
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, Iterator, List, Tuple, Union

from edgeres.artifacts import FileRef
from edgeres.errors import BundleError

MANIFEST = "manifest.json"
SIGNATURES = "manifest.sig"
RECIPE = "recipe.toml"
FP32_MODEL = "model.fp32.onnx"
MIXED_MODEL = "model.int8-fp16.onnx"
INTEGER_MODEL = "model.int8-cpu.onnx"
TABLE = "calibration.json"
STATISTICS = "statistics.npz"
SCALINGS = "scalings.npz"
ERRORS = "errors.json"
REFERENCE = "reference.npz"
MEANING = "quantized.npz"
REPORT = "report.json"
PAGE = "report.html"
ENGINES = "engines/"

LARGEST_WEIGHTS = 1 << 33  # bytes: an ONNX file holds 2 GB at most, a checkpoint the optimizer's state as well
CHUNK = 1 << 20
HUGE_PAGE = 2 << 20  # bytes, on x86 and on ARM with pages of 4 kB
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")
"""The name of a file that :func:`write_atomic` has not finished; the group is what it is to become."""


def is_url(source: str) -> bool:
    """Return whether a source of samples is named by a URL, and not by a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", source) is not None


def model_file(precision: str) -> str:
    """Return the name of the ONNX file that holds the model in ``precision``."""
    return f"model.{precision}.onnx"


def sha256_bytes(content: bytes) -> str:
    """Return the SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Union[str, Path]) -> str:
    """Return the SHA-256 of a file's content, as 64 hex digits, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


class NotOrdinary(OSError):
    """What was to be opened is a link, or something else than an ordinary file; ``strerror`` says it of a subject."""


@contextlib.contextmanager
def open_inside(folder: Union[str, os.PathLike[str]], path: str) -> Iterator[io.FileIO]:
    """Open an ordinary file somewhere in a folder for reading; ``path`` is relative, with slashes.

    No link is followed on the way, also none that is put there meanwhile; pipes and devices are not opened.

    Raises:
        NotOrdinary: something on the way is a link, or at its end is no ordinary file.
        OSError: it cannot be opened.
    """
    *parents, name = path.split("/")
    with contextlib.ExitStack() as held:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, place)
        for part in parents:
            _refuse_link(part, place)
            place = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            held.callback(os.close, place)
        _refuse_extraordinary(_refuse_link(name, place))
        # Whoever changes the name after the look at it wins nothing: a link is not followed, a pipe does not block.
        careful = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

        def opener(name: str, flags: int, folder: int = place) -> int:
            return os.open(name, flags | careful, dir_fd=folder)

        stream = held.enter_context(io.FileIO(name, opener=opener))
        _refuse_extraordinary(os.fstat(stream.fileno()))
        yield stream


def _refuse_link(name: str, place: int) -> os.stat_result:
    status = os.stat(name, dir_fd=place, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        raise NotOrdinary(errno.ELOOP, "is a link; a bundle has ordinary files only")
    return status


def _refuse_extraordinary(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotOrdinary(errno.EINVAL, "is not an ordinary file")


def read_at_most(stream: io.FileIO, most: int) -> bytes:
    """Return what is left of a file, but no more than ``most`` bytes. One read(2) may give less than there is."""
    parts: List[bytes] = []
    while most > 0:
        part = stream.read(min(most, CHUNK))
        if not part:
            break
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_hashed(stream: io.FileIO, size: int, keep: bool) -> Tuple[bytes, str]:
    """Return the next ``size`` bytes of a file, and the SHA-256 of these very bytes, as 64 hex digits.

    Args:
        keep: otherwise the bytes are forgotten as soon as they are hashed, and none are returned.
    """
    digest, done = hashlib.sha256(), 0
    # Without a copy: the buffer is of the bytes that getvalue() returns at last.
    content = io.BytesIO(bytes(size if keep else min(size, CHUNK)))
    with content.getbuffer() as view:
        if keep:
            _ask_for_huge_pages(view)
        while done < size:
            begin = done if keep else 0
            count = stream.readinto(view[begin : begin + min(CHUNK, size - done)])
            if not count:
                break
            digest.update(view[begin : begin + count])  # while they are in the processor's cache
            done += count
    return content.getvalue()[:done] if keep else b"", digest.hexdigest()


def _ask_for_huge_pages(view: memoryview) -> None:
    """Ask the kernel to give memory that nobody has touched yet in large pieces: given in pages of 4 kB it takes longer
    than hashing what is read into it. Where the kernel does not want to, nothing happens."""
    if MADV_HUGEPAGE is None or len(view) < 2 * HUGE_PAGE:
        return
    begin = ctypes.addressof(ctypes.c_char.from_buffer(view))
    first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, (begin + len(view)) // HUGE_PAGE * HUGE_PAGE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(MADV_HUGEPAGE))


def read_bounded(path: Union[str, Path], largest: int) -> bytes:
    """Return the content of an ordinary file of at most ``largest`` bytes.

    Pipes and devices, which may never end or never begin, are not opened at all.

    Raises:
        OSError: it cannot be read, is not an ordinary file, or is larger.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    content = b""
    if status.st_size <= largest:
        with open(path, "rb") as stream:
            content = stream.read(largest + 1)
    if max(status.st_size, len(content)) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest:,} bytes", str(path))
    return content


def file_ref(folder: Union[str, Path], path: str) -> FileRef:
    """Return the record of ``folder/path``."""
    full = Path(folder) / path
    return FileRef(path, sha256_file(full), full.stat().st_size)


def content_ref(path: str, content: bytes) -> FileRef:
    """Return the record of a file of that content."""
    return FileRef(path, sha256_bytes(content), len(content))


def write_atomic(path: Union[str, Path], content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one, whatever happens in between.

    A link is replaced, and not followed. What a killed writer of the same file has left is removed.

    Raises:
        BundleError: the folder cannot be written, or the disk is full; the old file is whole. Or what is there is no
            ordinary file: root could put one in the place of ``/dev/null``.
    """
    with writing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def writing(path: Union[str, Path]) -> Iterator[BinaryIO]:
    """Write a file piece by piece, as :func:`write_atomic` does: it is there when all of it is, and not after an error.

    Raises: as :func:`write_atomic`, for any OSError while it is written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no ordinary file")
        _remove_orphans(path)
        temporary, descriptor = _begun(path)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, str(path))  # before it is closed, which ends its lock
        temporary = None
    except OSError as problem:
        reason = problem.strerror or problem
        raise BundleError(f"cannot write {path}: {reason}. Free space or choose another folder.") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _begun(path: Path) -> Tuple[str, int]:
    """Return a new file beside ``path``, and its descriptor, by whose lock others know that somebody writes it."""
    while True:
        attempt = str(path.parent / f".{path.name}.{os.urandom(8).hex()}")
        # Unlike tempfile's private files, a bundle's are as open as the user's umask says.
        descriptor = os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # no locks here: then nobody removes it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # who took it for an orphan meanwhile, holds it until it is removed
        if os.fstat(descriptor).st_nlink:
            return attempt, descriptor
        os.close(descriptor)


def _remove_orphans(path: Path) -> None:
    """Remove what killed writers of a file have left beside it: their locks died with them."""
    names: List[str] = []
    with contextlib.suppress(PermissionError):  # a folder may be writable and not be listed
        names = os.listdir(path.parent)
    for name in names:
        found = TEMPORARY.fullmatch(name)
        if found is None or found.group(1) != path.name:
            continue
        with contextlib.suppress(OSError):  # it is being written, or it is not ours
            # NFS locks exclusively only what is open for writing.
            descriptor = os.open(path.parent / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path.parent / name)
            finally:
                os.close(descriptor)


def sync_file(path: Union[str, Path]) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Union[str, Path]) -> None:
    """Wait until the names in a folder are on the disk, where its file system can be asked to."""
    with contextlib.suppress(OSError):
        sync_file(path)
