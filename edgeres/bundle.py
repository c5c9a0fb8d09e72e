"""Reading a bundle: its manifest, who vouches for that, and the check that every file is the one the manifest binds.

Nothing is parsed but the manifest itself until its files' hashes are known to be right, and the manifest neither, where
keys are trusted, until its signature is. What was checked is what is used: the very bytes, read once.
"""

from __future__ import annotations

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple, TypeVar, Union

from edgeres.artifacts import FileRef, Manifest, from_data, from_json
from edgeres.cpu_settings import strange
from edgeres.errors import BundleError, IntegrityError, few, numbered
from edgeres.files import MANIFEST, SIGNATURES, NotOrdinary, open_inside, read_at_most, read_hashed
from edgeres.recipe import BACKENDS, PRECISIONS, SECTIONS, TARGETS
from edgeres.signatures import Keys, Signature, check, key_list, read_signatures

Folder = Union[str, "os.PathLike[str]"]
T = TypeVar("T")
FORMAT = 1
ATTEMPTS = 5
LARGEST_MANIFEST = 16 << 20  # bytes; one has tens of kB, and read it may take 25 times as much memory
HASHING = 4  # threads: Python lets go of its lock while it reads and hashes, and files do not wait for one another
SMALL = 4 << 20  # bytes of a bundle that are hashed sooner than threads have begun
INSIDE = re.compile(r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z))[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
"""A part of a file's path in a bundle. So no path leads out, and each is one file's alone, on any file system: no part
is empty or begins or ends with a dot, none is a device of Windows, and there is nothing to normalize in Unicode."""


def read_manifest(folder: Folder, trusted_keys: Optional[Keys] = None) -> Manifest:
    """Return a bundle's manifest; its files are not looked at.

    Args:
        trusted_keys: public keys, one of which has to have signed it; None: whoever wrote it is believed.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be understood, or has words that this edgeres does not
            know.
        SignatureError: no trusted key vouches for it; it was not parsed.
        SigningKeyError: what is to be trusted is no public key.
    """
    return parse_manifest(folder, vouched_bytes(folder, trusted_keys)[0])


def vouched_bytes(folder: Folder, trusted_keys: Optional[Keys]) -> Tuple[bytes, Tuple[str, ...]]:
    """Return a manifest's bytes, not parsed yet, and the ids of those trusted keys that vouch for them; without keys
    nobody is asked.

    Raises: as :func:`read_manifest`.
    """
    if trusted_keys is None:
        return manifest_bytes(folder), ()
    content, _, good = signed_bytes(folder, trusted_keys)
    return content, good


def signed_bytes(folder: Folder, trusted_keys: Optional[Keys]) -> Tuple[bytes, Tuple[Signature, ...], Tuple[str, ...]]:
    """Return as :func:`vouched_bytes` does, and between the two the signatures beside it: the very ones that were
    checked, where keys are trusted, and else none of them checked.

    Raises: as :func:`read_manifest`; SignatureError too where no keys are trusted and the signatures are none.
    """
    keys = key_list(trusted_keys)

    def read() -> Tuple[bytes, Tuple[Signature, ...], Tuple[str, ...]]:
        content = manifest_bytes(folder)
        if keys is None:
            return content, read_signatures(folder), ()
        return (content, *check(folder, content, keys))

    return undisturbed(folder, read)


def manifest_bytes(folder: Folder) -> bytes:
    """Return a bundle's manifest as it lies there, neither checked nor parsed.

    Raises:
        BundleError: there is none, or it is no manifest by its size or its kind.
    """
    path = Path(folder) / MANIFEST
    how = f"Build one: edgeres build --out {folder}"
    try:
        if Path(folder).is_file():
            raise BundleError(f"{folder} is a file, not a bundle. If it is a packed one: edgeres unpack {folder}")
        if not Path(folder).is_dir():
            raise BundleError(f"there is no bundle at {folder}. {how}")
        with open_inside(folder, MANIFEST) as stream:
            content = read_at_most(stream, LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}. {how}") from None
    except NotOrdinary:
        raise BundleError(
            f"{path} is not an ordinary file, so {folder} is not a bundle. Copy it again, files instead of links."
        ) from None
    except OSError as problem:
        raise BundleError(
            f"{path} cannot be read: {problem.strerror}. Check its permissions, or copy it again."
        ) from None
    if len(content) > LARGEST_MANIFEST:
        raise BundleError(
            f"{path} is larger than any manifest (over {LARGEST_MANIFEST} bytes): it is not one. Copy the bundle again."
        )
    return content


def parse_manifest(folder: Folder, content: bytes) -> Manifest:
    """Return the manifest that some bytes hold.

    Raises:
        BundleError: they cannot be understood.
    """
    path = Path(folder) / MANIFEST
    manifest = from_json(content, Manifest, str(path))
    for name, kind in SECTIONS.items():
        from_data(manifest.recipe.get(name, {}), kind, f"{path}: recipe.{name}")
    unknown = _unknown_words(manifest)
    if unknown:
        raise BundleError(f"{path}: this edgeres does not know {', '.join(unknown)}. Build the bundle again with it.")
    return manifest


def _unknown_words(manifest: Manifest) -> List[str]:
    """Return the precisions, backends and targets that no build of this edgeres writes."""
    told: List[Tuple[str, str, Tuple[str, ...]]] = [("precision", manifest.precision, PRECISIONS)]
    judged = (manifest.report,) if manifest.report is not None else ()
    for noun in (*manifest.engines, *judged):
        told += [("precision", noun.precision, PRECISIONS), ("backend", noun.backend, BACKENDS[1:])]
        told += [("target", noun.target, TARGETS)] if noun.target else []  # an earlier report tells none
    return [f"the {what} {word!r}" for what, word, known in dict.fromkeys(told) if word not in known]


def verify(folder: Folder, trusted_keys: Optional[Keys] = None) -> Manifest:
    """Return a bundle's manifest after checking every file that it binds: present, regular, of that size and SHA-256.

    Raises:
        BundleError: there is no readable manifest; or, as :func:`read_manifest`, nobody trusted vouches for it.
        IntegrityError: with every file that is missing, changed or outside the bundle.
    """
    return verify_and_read(folder, (), trusted_keys)[0]


def unlisted(folder: Folder, manifest: Manifest) -> List[str]:
    """Return the files in a bundle's folder that its manifest does not know, relative to the folder."""
    known = {ref.path for ref in manifest.files} | {MANIFEST, SIGNATURES}
    folder = Path(folder)
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = (path.relative_to(folder).as_posix() for path in entries)
    return sorted(path for path in found if path not in known)


def read_verified(folder: Folder, ref: FileRef) -> bytes:
    """Return a file's bytes after checking them.

    Raises:
        IntegrityError: the file is not the one that ``ref`` describes.
    """
    content, problem = _examine(folder, ref, keep=True)
    if problem:
        raise IntegrityError(f"{folder}: {problem}. Build the bundle again, or copy it again.")
    return content


def read_listed(folder: Folder, manifest: Manifest, path: str) -> Optional[bytes]:
    """Return the bytes of a bundle's file by its name, checked; None where the bundle has none of that name.

    Raises:
        IntegrityError: it is not the one that the manifest binds.
    """
    return next((read_verified(folder, ref) for ref in manifest.files if ref.path == path), None)


def intact(folder: Folder, ref: FileRef) -> bool:
    """Whether a file is the one that ``ref`` describes."""
    return not _examine(folder, ref, keep=False)[1]


def verify_and_read(
    folder: Folder, wanted: Tuple[str, ...], trusted_keys: Optional[Keys] = None, most: Optional[int] = None
) -> Tuple[Manifest, Dict[str, bytes]]:
    """Return the manifest and the bytes of the ``wanted`` files, after checking every file of the bundle once.

    Args:
        most: as of :func:`refuse_larger`.
    """
    return undisturbed(folder, lambda: _verified(folder, wanted, trusted_keys, most))


def _verified(
    folder: Folder, wanted: Tuple[str, ...], trusted_keys: Optional[Keys], most: Optional[int]
) -> Tuple[Manifest, Dict[str, bytes]]:
    manifest = read_manifest(folder, trusted_keys)
    refuse_larger(str(folder), manifest, wanted, most)
    return manifest, check_files(folder, manifest, wanted)


def refuse_larger(place: str, manifest: Manifest, wanted: Tuple[str, ...], most: Optional[int]) -> None:
    """Refuse a bundle of which one of the ``wanted`` files has more than ``most`` bytes, before it is read.

    Raises:
        IntegrityError: with each of them.
    """
    large = [ref for ref in manifest.files if ref.path in wanted and most is not None and ref.bytes > most]
    if large:
        problems = [f"{ref.path} has {ref.bytes:,} bytes, more than {most:,}: no build writes that" for ref in large]
        raise IntegrityError(numbered(place, problems) + "\nDo not use it: build it again, or copy it again.")


def check_files(folder: Folder, manifest: Manifest, wanted: Tuple[str, ...] = ()) -> Dict[str, bytes]:
    """Return the bytes of the ``wanted`` files, after checking every file that a manifest binds once.

    Raises:
        IntegrityError: with every file that is missing, changed or outside the bundle.
    """
    problems = contradictions(manifest)
    contents: Dict[str, bytes] = {}

    def examined(ref: FileRef) -> Tuple[bytes, str]:
        return _examine(folder, ref, keep=ref.path in wanted)

    for ref, (content, problem) in zip(manifest.files, _all_examined(examined, manifest.files)):
        if problem:
            problems.append(problem)
        elif ref.path in wanted:
            contents[ref.path] = content
    if problems:
        raise IntegrityError(numbered(str(folder), problems) + "\nDo not use it: build it again, or copy it again.")
    return contents


def _all_examined(examined: Callable[[FileRef], Tuple[bytes, str]], refs: Sequence[FileRef]) -> List[Tuple[bytes, str]]:
    """Return what is found of each file, by several threads where that is sooner and they can be started."""
    if sum(ref.bytes for ref in refs) > SMALL:
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(HASHING) as pool:
            return list(pool.map(examined, refs))
    return list(map(examined, refs))


def undisturbed(folder: Folder, read: Callable[[], T]) -> T:
    """Return what ``read`` reads of a bundle; where a build put another one in its place meanwhile, it reads again.

    Raises:
        BundleError: as ``read`` does, at last also where the bundle was another each time.
    """
    for _ in range(ATTEMPTS - 1):
        before = _identity(folder)
        try:
            return read()
        except BundleError:
            if _identity(folder) == before:
                raise
    return read()


def _identity(folder: Folder) -> Optional[Tuple[int, int, int]]:
    """Return what tells one manifest in this place from another; each bundle has its own."""
    try:
        status = os.stat(Path(folder) / MANIFEST)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def contradictions(manifest: Manifest) -> List[str]:
    """Return what a manifest says that no build would write."""
    problems = []
    if manifest.format != FORMAT:
        problems.append(f"the manifest is of format {manifest.format}; this edgeres reads format {FORMAT}")
    refs = {ref.path: ref for ref in manifest.files}
    if len(refs) != len(manifest.files):
        problems.append("the manifest lists a file twice")
    elif len({path.lower() for path in refs}) != len(refs):
        problems.append("the manifest lists files whose names differ in case alone")
    if not refs:
        problems.append("the manifest lists no file")
    for engine in manifest.engines:
        if refs.get(engine.file.path) != engine.file:
            problems.append(f"the engine for {engine.target} is {engine.file.path}, which is not in the list of files")
        foreign = strange(engine.options) if engine.backend == "cpu" else []
        if foreign:
            problems.append(f"the engine for {engine.target} has settings that edgeres does not write: {few(foreign)}")
    return problems


def misplaced(ref: FileRef) -> str:
    """Return what is to be said of a file whose path does not lie in the bundle for certain; else nothing."""
    if ref.path.lower() in (MANIFEST, SIGNATURES) or not all(map(INSIDE.fullmatch, ref.path.split("/"))):
        return f"the manifest names {ref.path!r}, which is not a path inside the bundle"
    return ""


def _examine(folder: Folder, ref: FileRef, keep: bool) -> Tuple[bytes, str]:
    """Return a file's bytes, where they are to be kept, and what is wrong with the file (empty: nothing)."""
    outside = misplaced(ref)
    if outside:
        return b"", outside
    try:
        with open_inside(folder, ref.path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != ref.bytes:
                return b"", f"{ref.path} has {size} bytes instead of {ref.bytes}"
            content, sha256 = read_hashed(stream, size, keep)
    except FileNotFoundError:
        return b"", f"{ref.path} is missing"
    except NotOrdinary as problem:
        return b"", f"{ref.path} {problem.strerror}"
    except OSError as problem:
        return b"", f"{ref.path} cannot be read: {problem.strerror}"
    if sha256 != ref.sha256:
        return b"", f"{ref.path} has changed since it was built (its SHA-256 is another)"
    return content, ""
