"""A bundle into one file, and a file's bundle into a folder: to ship it, and to receive it whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

from edgeres.artifacts import Bundle, FileRef
from edgeres.bundle import check_files, parse_manifest, signed_bytes, undisturbed, unlisted
from edgeres.errors import BundleError, IntegrityError, numbered, printable
from edgeres.files import CHUNK, MANIFEST, SIGNATURES, open_inside, writing
from edgeres.inspection import missing_engine
from edgeres.packed import (
    END,
    SUFFIX,
    Contents,
    Place,
    check_members,
    contents_of,
    header,
    is_packed,
    opened,
    padding,
    too_large,
    unpacked_name,
)
from edgeres.signatures import Keys, Signature, signatures_content
from edgeres.workspace import Workspace


class Packed(NamedTuple):
    """A packed bundle: its ``path``, size in ``bytes`` and SHA-256, how many ``files`` it holds, and which files of the
    folder it does not (``unlisted``: the manifest does not name them); ``missing`` says what to do where it holds no
    engine."""

    path: str
    bytes: int
    sha256: str
    files: int
    unlisted: Tuple[str, ...]
    signatures: Tuple[Signature, ...]
    missing: str


def pack(bundle: Place, file: Optional[Place] = None, trusted_keys: Optional[Keys] = None) -> Packed:
    """Write a bundle into one file, after checking all of it; the same bundle gives the same bytes anywhere.

    Args:
        file: by default the bundle's folder with ``.edgeres`` behind its name. A packed bundle there is replaced.
        trusted_keys: one of them has to have signed the bundle; None: nobody is asked.

    Raises:
        BundleError: the bundle is damaged, nobody trusted vouches for it, or the file cannot be written or is there
            and is something else. What was there is whole.
    """
    place = Path(packed_name(bundle) if file is None else file)
    if place.name in ("", ".."):
        raise BundleError(f"{place} is no name of a file. Name one: --out FILE{SUFFIX}")
    if Path(os.path.realpath(bundle)) in Path(os.path.realpath(place)).parents:
        raise BundleError(f"{place} lies in the bundle that is to be packed. Name another: --out FILE{SUFFIX}")
    if os.path.lexists(place) and not is_packed(place):
        raise BundleError(f"{place} is there, and is no packed bundle. Name another: --out FILE{SUFFIX}")
    return undisturbed(bundle, lambda: _packed(bundle, place, trusted_keys))


def packed_name(bundle: Place) -> str:
    """Return the file that a bundle is packed into unless told otherwise, beside it."""
    name = os.path.basename(os.path.normpath(bundle))
    path = os.path.abspath(bundle) if name in ("", ".", "..") else os.path.normpath(bundle)
    return f"{path}{SUFFIX}"


def _packed(bundle: Place, place: Path, trusted_keys: Optional[Keys]) -> Packed:
    content, signatures, _ = signed_bytes(bundle, trusted_keys)
    manifest = parse_manifest(bundle, content)
    check_files(bundle, manifest)
    problems = [problem for ref in manifest.files for problem in too_large(ref)]
    if problems:
        raise BundleError(numbered(f"{bundle} cannot be packed", problems))
    with writing(place) as stream:
        whole = hashlib.sha256()
        total = 0

        def write(piece: bytes) -> None:
            nonlocal total
            stream.write(piece)
            whole.update(piece)
            total += len(piece)

        fronts = [(MANIFEST, content)]
        fronts += [(SIGNATURES, signatures_content(signatures))] if signatures else []
        for name, front in fronts:
            write(header(name, len(front)) + front + padding(len(front)))
        for ref in manifest.files:
            write(header(ref.path, ref.bytes))
            _copy(bundle, ref, write)
            write(padding(ref.bytes))
        write(END)
    left = tuple(unlisted(bundle, manifest))
    missing = missing_engine(manifest, os.fspath(bundle))
    return Packed(str(place), total, whole.hexdigest(), len(manifest.files), left, signatures, missing)


def _copy(bundle: Place, ref: FileRef, write: Callable[[bytes], None]) -> None:
    """Hand on the very bytes that a bundle's file was checked by.

    Raises:
        IntegrityError: it is not the file that ``ref`` describes.
    """
    digest, left = hashlib.sha256(), ref.bytes
    try:
        with open_inside(bundle, ref.path) as stream:
            while left:
                piece = stream.read(min(CHUNK, left))
                if not piece:
                    break
                digest.update(piece)
                write(piece)
                left -= len(piece)
    except FileNotFoundError:
        left = 1
    if left or digest.hexdigest() != ref.sha256:
        raise IntegrityError(f"{bundle}: {ref.path} changed while it was packed. Pack it again.")


def unpack(
    file: Place, out: Optional[Place] = None, trusted_keys: Optional[Keys] = None
) -> Tuple[Bundle, Contents, Tuple[str, ...]]:
    """Unpack a bundle, and return it with what stood in front of it and warnings.

    It is written beside ``out``, checked while it is written, and put there whole at the end, in the place of an
    earlier bundle; the user's own files in that one stay, and engines that were compiled for it do not.

    Args:
        out: the bundle's folder; by default the file's name without its ending, in the current folder.
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed what is unpacked.

    Raises:
        BundleError: it is no packed bundle, ``out`` cannot be written or holds something else, or there is no ``out``
            and the file's name gives none.
        IntegrityError: with every file that is not as it was packed.
        SignatureError: none of the trusted keys vouches for it; the manifest was not parsed. Whatever is raised, what
            was at ``out`` is untouched.
    """
    with opened(file) as source:
        place = _unpacked_place(file, out)
        contents = contents_of(source, trusted_keys)
        manifest = contents.manifest
        with Workspace(place) as workspace:
            if workspace.unfinished:
                raise BundleError(
                    f"an unfinished build stands beside {place}. Finish it first: edgeres build {place}. Or unpack "
                    "elsewhere: --out FOLDER"
                )
            _require_space(workspace.folder, sum(ref.bytes for ref in manifest.files))

            @contextlib.contextmanager
            def sink(ref: FileRef) -> Iterator[Callable[[bytes], object]]:
                with writing(workspace.folder / ref.path) as stream:
                    yield stream.write

            check_members(source, manifest, sink)
            lost = workspace.left_out(manifest)
            workspace.commit(manifest, (contents.content, contents.signatures))
    return Bundle(str(place), manifest), contents, _losses(lost, place)


def _unpacked_place(file: Place, out: Optional[Place]) -> Path:
    if out is None:
        name = unpacked_name(file)
        if not name:
            shown = printable(os.fspath(file))
            raise BundleError(f"{shown} has a name that gives no folder in the current one. Name one: --out FOLDER")
        return Path(name)
    if not os.fspath(out):  # which pathlib takes for the current folder
        raise BundleError("an empty name is no folder. Name one: --out FOLDER")
    return Path(out)


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise BundleError(
            f"the bundle has {size:,} bytes, and {folder.parent.parent} has {free:,} left. Free some, or unpack "
            "elsewhere: --out FOLDER"
        )


def _losses(paths: List[str], place: Path) -> Tuple[str, ...]:
    """Return what to say of files of the earlier bundle that are no longer there."""
    engines = [path for path in paths if path.endswith(".engine")]
    again = " and ".join(f"edgeres compile {place} --target {Path(path).stem}" for path in engines)
    said = f"{', '.join(engines)} of the bundle that was there before is gone. Compile again: {again}"
    return (said,) if engines else ()
