"""Reading a bundle: its manifest, and the check that every file is the one the manifest binds.

Nothing is parsed but the manifest itself until its files' hashes are known to be right, and what was hashed is what is
used: :func:`read_verified` hands out the very bytes it checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Callable, Dict, List, Optional, Tuple, TypeVar, Union

from edgeres.artifacts import FileRef, Manifest, from_data, from_json
from edgeres.errors import BundleError, IntegrityError, numbered
from edgeres.files import MANIFEST, sha256_bytes, sha256_file
from edgeres.recipe import BACKENDS, PRECISIONS, SECTIONS, TARGETS

Folder = Union[str, "os.PathLike[str]"]
T = TypeVar("T")
FORMAT = 1
ATTEMPTS = 5
LARGEST_MANIFEST = 16 << 20  # bytes; one has tens of kB, and read it may take 25 times as much memory


def read_manifest(folder: Folder) -> Manifest:
    """Return a bundle's manifest; its files are not looked at.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be understood, or has words that this edgeres does not
            know.
    """
    path = Path(folder) / MANIFEST
    how = f"Build one: edgeres build --out {folder}"
    try:
        if not Path(folder).is_dir():
            raise BundleError(f"there is no bundle at {folder}. {how}")
        if not stat.S_ISREG(path.lstat().st_mode):  # a link neither
            raise BundleError(f"{path} is not an ordinary file, so {folder} is not a bundle. {how}")
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}. {how}") from None
    except OSError as problem:
        raise BundleError(f"{path} cannot be read: {problem.strerror}") from None
    if len(content) > LARGEST_MANIFEST:
        raise BundleError(f"{path} is larger than any manifest (over {LARGEST_MANIFEST} bytes): it is not one")
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


def verify(folder: Folder) -> Manifest:
    """Return a bundle's manifest after checking every file that it binds: present, regular, of that size and SHA-256.

    Raises:
        BundleError: there is no readable manifest.
        IntegrityError: with every file that is missing, changed or outside the bundle.
    """
    return verify_and_read(folder, ())[0]


def unlisted(folder: Folder, manifest: Manifest) -> List[str]:
    """Return the files in a bundle's folder that its manifest does not know, relative to the folder."""
    known = {ref.path for ref in manifest.files} | {MANIFEST}
    folder = Path(folder)
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = (path.relative_to(folder).as_posix() for path in entries)
    return sorted(path for path in found if path not in known)


def read_verified(folder: Folder, ref: FileRef) -> bytes:
    """Return a file's bytes after checking them.

    Raises:
        IntegrityError: the file is not the one that ``ref`` describes.
    """
    path, problem = _place(Path(folder), ref)
    if problem:
        raise IntegrityError(f"{folder}: {problem}")
    try:
        with open(path, "rb") as stream:
            content = stream.read(ref.bytes + 1)
    except OSError as failure:
        raise IntegrityError(f"{path} cannot be read: {failure.strerror}") from None
    if len(content) != ref.bytes or sha256_bytes(content) != ref.sha256:
        raise IntegrityError(
            f"{path} is not the file that the manifest binds. Build the bundle again or copy it again."
        )
    return content


def read_listed(folder: Folder, manifest: Manifest, path: str) -> Optional[bytes]:
    """Return the bytes of a bundle's file by its name, checked; None where the bundle has none of that name.

    Raises:
        IntegrityError: it is not the one that the manifest binds.
    """
    return next((read_verified(folder, ref) for ref in manifest.files if ref.path == path), None)


def intact(folder: Folder, ref: FileRef) -> bool:
    """Whether a file is the one that ``ref`` describes."""
    return not _problems(Path(folder), ref)


def verify_and_read(folder: Folder, wanted: Tuple[str, ...]) -> Tuple[Manifest, Dict[str, bytes]]:
    """Return the manifest and the bytes of the ``wanted`` files, after checking every file of the bundle once."""
    return undisturbed(folder, lambda: _verified(folder, wanted))


def _verified(folder: Folder, wanted: Tuple[str, ...]) -> Tuple[Manifest, Dict[str, bytes]]:
    manifest = read_manifest(folder)
    problems = _contradictions(manifest)
    contents: Dict[str, bytes] = {}
    for ref in manifest.files:
        if ref.path not in wanted:
            problems.extend(_problems(Path(folder), ref))
            continue
        try:
            contents[ref.path] = read_verified(folder, ref)
        except IntegrityError as problem:
            problems.append(str(problem))
    if problems:
        raise IntegrityError(numbered(str(folder), problems) + "\nDo not use it: build it again, or copy it again.")
    return manifest, contents


def undisturbed(folder: Folder, read: Callable[[], T]) -> T:
    """Return what ``read`` reads of a bundle; where a build put another one in its place meanwhile, it reads again.

    Raises:
        BundleError: as ``read`` does, or because the bundle changed each time.
    """
    for _ in range(ATTEMPTS):
        before = _identity(folder)
        try:
            return read()
        except BundleError:
            if _identity(folder) == before:
                raise
    raise BundleError(f"{folder} changed while it was being read, {ATTEMPTS} times. Read it when the builds are done.")


def _identity(folder: Folder) -> Optional[Tuple[int, int, int]]:
    """Return what tells one manifest in this place from another; each bundle has its own."""
    try:
        status = os.stat(Path(folder) / MANIFEST)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _contradictions(manifest: Manifest) -> List[str]:
    """Return what a manifest says that no build would write."""
    problems = []
    if manifest.format != FORMAT:
        problems.append(f"the manifest is of format {manifest.format}; this edgeres reads format {FORMAT}")
    refs = {ref.path: ref for ref in manifest.files}
    if len(refs) != len(manifest.files):
        problems.append("the manifest lists a file twice")
    if not refs:
        problems.append("the manifest lists no file")
    for engine in manifest.engines:
        if refs.get(engine.file.path) != engine.file:
            problems.append(f"the engine for {engine.target} is {engine.file.path}, which is not in the list of files")
    return problems


def _problems(folder: Path, ref: FileRef) -> List[str]:
    path, problem = _place(folder, ref)
    if problem:
        return [problem]
    try:
        changed = sha256_file(path) != ref.sha256
    except OSError as failure:
        return [f"{ref.path} cannot be read: {failure.strerror}"]
    return [f"{ref.path} has changed since it was built (its SHA-256 is another)"] if changed else []


def _place(folder: Path, ref: FileRef) -> Tuple[Path, str]:
    """Return where a file lies and what is wrong with that (empty: nothing); links are not followed anywhere."""
    pure = PurePosixPath(ref.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in ref.path or not pure.parts:
        return folder, f"the manifest names {ref.path!r}, which is not a path inside the bundle"
    path = folder
    try:
        for part in pure.parts:
            path = path / part
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                return path, f"{ref.path} is a link; a bundle has ordinary files only"
        if not stat.S_ISREG(mode):
            return path, f"{ref.path} is not an ordinary file"
        size = os.lstat(path).st_size
    except FileNotFoundError:
        return path, f"{ref.path} is missing"
    except (OSError, ValueError) as failure:
        return path, f"{ref.path} cannot be looked up: {failure}"
    if size != ref.bytes:
        return path, f"{ref.path} has {size} bytes instead of {ref.bytes}"
    return path, ""
