"""Files: hashes, atomic writes, and the names of a bundle's files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Tuple, Union

from edgeres.artifacts import FileRef
from edgeres.errors import BundleError

MANIFEST = "manifest.json"
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

CHUNK = 1 << 20
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")
"""The name of a file that :func:`write_atomic` has not finished; the group is what it is to become."""


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


def read_bounded(path: Union[str, Path], largest: int) -> bytes:
    """Return the content of an ordinary file of at most ``largest`` bytes.

    Pipes and devices, which may never end or never begin, are not opened at all.

    Raises:
        OSError: it cannot be read, is not an ordinary file, or is larger.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    with open(path, "rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
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
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no ordinary file")
        _remove_orphans(path)
        temporary, descriptor = _begun(path)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return attempt, descriptor
        os.close(descriptor)  # somebody took it for an orphan before it was locked


def _remove_orphans(path: Path) -> None:
    """Remove what killed writers of a file have left beside it: their locks died with them."""
    for name in os.listdir(path.parent):
        found = TEMPORARY.fullmatch(name)
        if found is None or found.group(1) != path.name:
            continue
        with contextlib.suppress(OSError):  # it is being written, or it is not ours
            descriptor = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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
