"""Where a build works: beside the bundle, stage by stage, and exchanged for it whole at the end.

``build/net-int8`` is made in ``build/.net-int8.work/bundle``. Each finished stage leaves a record beside that folder,
so that a build that was interrupted goes on where it stopped, and a stage whose key (a hash of everything it depends
on) has not changed is taken over, from the work folder or from the bundle that is there already. Nothing in the old
bundle is touched until the new one is complete; then the two folders change places in one step, and only then the
records go: whatever ends a build, also in its very last steps, no finished stage has to be run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Optional, Tuple, Type

import msgspec

from edgeres.artifacts import Bundle, Engine, Manifest, StageRecord, from_json, to_json
from edgeres.bundle import intact, manifest_bytes, read_manifest, read_verified, unlisted
from edgeres.errors import BundleError, SignatureError
from edgeres.files import (
    INTEGER_MODEL,
    MANIFEST,
    RECIPE,
    SIGNATURES,
    TEMPORARY,
    file_ref,
    sha256_bytes,
    sync_file,
    sync_folder,
    write_atomic,
)
from edgeres.signatures import Keys, Signature, key_list, read_signatures, signatures_content

RECORDS = ".stages"
BUNDLE = "bundle"
RUNGS = ".rungs"
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100


def stage_key(name: str, inputs: Dict[str, Any]) -> str:
    """Return the hash of everything that a stage's result depends on."""
    return hashlib.sha256(msgspec.json.encode([name, inputs], order="sorted")).hexdigest()


class Workspace:
    """A build's own folder beside ``out``; use it as a context manager, and call :meth:`commit` last.

    Where ``trusted_keys`` are given, one of them has to have signed the earlier bundle, if there is one. ``lenders``
    are bundles elsewhere, of which stages with the same key are taken over too.

    Raises (on entering):
        BundleError: ``out`` is a file or a folder that is no bundle, the place cannot be written, or another build is
            at work there; ``otherwise`` is what to do then.
        SignatureError: none of the trusted keys vouches for the earlier bundle; its manifest was not parsed.
    """

    def __init__(
        self,
        out: Path,
        otherwise: str = "Choose another folder: --out FOLDER",
        trusted_keys: Optional[Keys] = None,
    ) -> None:
        self.otherwise = otherwise
        self.out = Path(os.path.abspath(out))  # without any ..: its name names the work folder
        self.work = self.out.parent / f".{self.out.name}.work"
        self.folder = self.work / BUNDLE
        self.lenders: Tuple[Bundle, ...] = ()
        self.records: Dict[str, StageRecord] = {}
        self.unfinished = False
        self._trusted_keys = key_list(trusted_keys)
        self._earlier: Optional[Manifest] = None
        self._lock: Optional[int] = None

    def __enter__(self) -> Workspace:
        try:
            self._refuse_strangers()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            restore(self.out)
            self._earlier = self._refuse_strangers()  # again: until now, another build may have been at work
            for folder in (self.work, self.work / RECORDS, self.folder):
                _refuse_link(folder)
                folder.mkdir(exist_ok=True)
            self.unfinished = self._is_unfinished()
            for path in self.folder.rglob("*"):  # it may be an earlier bundle, exchanged and not removed yet
                if path.is_symlink():
                    path.unlink()  # nothing is to be written through it
        except OSError as problem:
            self._release()
            raise BundleError(f"cannot write beside {self.out}: {problem.strerror}. {self.otherwise}") from None
        except BaseException:
            self._release()
            raise
        return self

    def _is_unfinished(self) -> bool:
        """Whether an interrupted build left more than the bundle holds already; after an exchange that was not tidied
        up after it did not."""
        stages = self._earlier.stages if self._earlier is not None else {}
        known = {f"{name}.json": to_json(record) for name, record in stages.items()}
        left = (path for path in (self.work / RECORDS).iterdir() if not TEMPORARY.fullmatch(path.name))
        return any(path.read_bytes() != known.get(path.name) for path in left)

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        made = any(record.files for record in self.records.values())  # what has no files was hardly any work
        if self.work.is_dir() and not made and not self.unfinished:
            shutil.rmtree(self.work, ignore_errors=True)  # nothing in it that the next build should go on from
        self._release()

    def reuse(self, name: str, key: str) -> Optional[StageRecord]:
        """Return the record of an earlier run of this stage with the same key, its files in place; None: there is none.

        A file that is missing or changed makes it none: the stage is run again.
        """
        with contextlib.suppress(BundleError, OSError):
            path = self.work / RECORDS / f"{name}.json"
            record = from_json(path.read_bytes(), StageRecord, str(path))
            if record.key == key and all(intact(self.folder, ref) for ref in record.files):
                self.records[name] = record
                return record
        earlier = [Bundle(str(self.out), self._earlier)] if self._earlier is not None else []
        for bundle in (*earlier, *self.lenders):
            lent = bundle.manifest.stages.get(name)
            if lent is not None and lent.key == key and self._copied(bundle, lent):
                self._record(name, lent)
                return lent
        return None

    def _copied(self, bundle: Bundle, record: StageRecord) -> bool:
        """Whether a stage's files could be copied out of a bundle, all of them as its record says."""
        try:
            for ref in record.files:
                self.write(ref.path, read_verified(bundle.path, ref))
        except (BundleError, OSError):
            return False
        return True

    def take_over(self, name: str, voucher: str) -> Optional[StageRecord]:
        """Return the earlier bundle's record of a stage whose key nobody knows, files in place; None: there is none.

        It holds where the stage ``voucher``, made in the same build, is the same there as here. What lies in the work
        folder may be of another recipe, whose build was interrupted, and is not asked.
        """
        stages = self._earlier.stages if self._earlier is not None else {}
        there, here = stages.get(voucher), self.records.get(voucher)
        if name not in stages or there is None or here is None:
            return None
        if (there.key, _result(there)) != (here.key, _result(here)):
            return None
        return self.reuse(name, stages[name].key)

    def take_engines(self, stages: Tuple[str, ...], made: Optional[str]) -> Tuple[Engine, ...]:
        """Take over the engines of the earlier bundle, where these stages made the same there as here.

        An engine whose file is damaged is left out, and so is that for the target ``made``, which has a new one.
        """
        earlier = self._earlier
        if earlier is None:
            return ()
        if any(_result(earlier.stages.get(name)) != _result(self.records.get(name)) for name in stages):
            return ()
        taken: List[Engine] = []
        for engine in earlier.engines:
            with contextlib.suppress(BundleError, OSError):
                if engine.target == made or engine.file not in earlier.files:
                    continue
                if not intact(self.folder, engine.file):
                    self.write(engine.file.path, read_verified(self.out, engine.file))
                taken.append(engine)
        return tuple(taken)

    def write(self, path: str, content: bytes) -> None:
        """Write a file of the new bundle."""
        write_atomic(self.folder / path, content)

    def keep(self, name: str, key: str, content: bytes) -> None:
        """Keep what a stage has reached, for :meth:`kept` to give back where it is interrupted."""
        write_atomic(self.work / RECORDS / f"{name}.partial", _head(key, content) + content)
        self.unfinished = True

    def kept(self, name: str, key: str) -> Optional[bytes]:
        """Return what an interrupted run of this stage with the same key kept, whole; None: there is nothing."""
        try:
            content = (self.work / RECORDS / f"{name}.partial").read_bytes()
        except OSError:
            return None
        head, rest = content[: len(_head(key, b""))], content[len(_head(key, b"")) :]
        return rest if head == _head(key, rest) else None

    def finish(
        self,
        name: str,
        key: str,
        paths: Tuple[str, ...],
        seconds: float,
        facts: Dict[str, Any],
        warnings: Tuple[str, ...] = (),
    ) -> StageRecord:
        """Record that a stage is done; ``paths`` are its files, relative to the bundle."""
        refs = tuple(file_ref(self.folder, path) for path in paths)
        record = StageRecord(key=key, files=refs, seconds=round(seconds, 3), facts=facts, warnings=warnings)
        self._record(name, record)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.work / RECORDS / f"{name}.partial")
        return record

    def _record(self, name: str, record: StageRecord) -> None:
        write_atomic(self.work / RECORDS / f"{name}.json", to_json(record))
        self.records[name] = record

    def left_out(self, manifest: Manifest) -> List[str]:
        """Return the files of the earlier bundle that a new manifest does not have."""
        now = {ref.path for ref in manifest.files}
        return [ref.path for ref in self._earlier.files if ref.path not in now] if self._earlier is not None else []

    def signature_loss(self, manifest: Manifest) -> Tuple[str, ...]:
        """Return what to say where the earlier bundle is signed, and a new manifest is not the one that was."""
        if not os.path.lexists(self.out / SIGNATURES) or self._kept_signatures(manifest):
            return ()
        return (
            "the bundle was signed as it was, and the signatures are gone. Sign it again: edgeres sign BUNDLE --key "
            "PRIVATE",
        )

    def _kept_signatures(self, manifest: Manifest) -> Tuple[Signature, ...]:
        """Return the signatures of the earlier bundle, where its manifest is this one, byte for byte."""
        with contextlib.suppress(BundleError):  # there is no bundle, or the signatures are none
            if manifest_bytes(self.out) == to_json(manifest):
                return read_signatures(self.out)
        return ()

    def commit(self, manifest: Manifest, received: Optional[Tuple[bytes, Tuple[Signature, ...]]] = None) -> None:
        """Write the manifest, drop what is not in it, take over the user's own files, and exchange the folders.

        Args:
            received: the manifest's bytes and its signatures where it was made elsewhere, and is to stay as it is.

        Raises:
            BundleError: a file cannot be taken over, or the exchange failed; the earlier bundle is whole.
        """
        try:
            for path in unlisted(self.folder, manifest):
                os.unlink(self.folder / path)
            content, signatures = received or (to_json(manifest), self._kept_signatures(manifest))
            self.write(MANIFEST, content)
            if signatures:
                self.write(SIGNATURES, signatures_content(signatures))
            else:
                with contextlib.suppress(FileNotFoundError):  # of a commit that was killed here
                    os.unlink(self.folder / SIGNATURES)
            for folder in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            self._take_over(manifest)
            for folder in (self.folder, *(p for p in self.folder.rglob("*") if p.is_dir() and not p.is_symlink())):
                sync_folder(folder)  # a power cut after the exchange must not find less than was exchanged
            exchange(self.folder, self.out)
            sync_folder(self.out.parent)
        except OSError as problem:
            raise BundleError(
                f"cannot put the bundle at {self.out}: {problem}. What is there is untouched; mend it and build again."
            ) from None
        shutil.rmtree(self.work / RECORDS, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def _take_over(self, manifest: Manifest) -> None:
        """Copy the user's own files; where the earlier manifest cannot be read, whatever the new one does not list."""
        listed = {ref.path for ref in manifest.files}
        for path in unlisted(self.out, self._earlier or manifest):
            if path not in listed:
                target = self.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.out / path, target, follow_symlinks=False)
                if not target.is_symlink():
                    sync_file(target)

    def _refuse_strangers(self) -> Optional[Manifest]:
        """Refuse to replace anything that is not a bundle: --out may be a typing mistake. Return the earlier bundle's
        manifest; None where there is none that can be read."""
        earlier = None
        if self.out.is_symlink():
            raise BundleError(f"{self.out} is a link. Name the folder itself: {os.path.realpath(str(self.out))}")
        if os.path.ismount(str(self.out)):
            raise BundleError(
                f"{self.out} is a mount point, and what is mounted cannot be exchanged for a new folder. Name a folder "
                f"in it: --out {self.out / 'bundle'}"
            )
        if self.out.exists() and not self.out.is_dir():
            raise BundleError(f"{self.out} exists and is not a folder. Choose another: --out FOLDER")
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return None
        try:
            earlier = read_manifest(self.out, self._trusted_keys)
        except SignatureError:
            raise
        except BundleError:
            # A damaged bundle may be built again; others have files called manifest.json too.
            if not ((self.out / MANIFEST).is_file() and (self.out / RECIPE).is_file()):
                raise BundleError(
                    f"{self.out} holds files and is not a bundle; it is left alone. Choose another: --out FOLDER"
                ) from None
        if self.out in (Path.cwd(), *Path.cwd().parents):
            raise BundleError(
                f"you are inside {self.out}, which is about to be replaced. Change to another folder: cd .."
            )
        return earlier

    def _take_lock(self) -> None:
        """Lock the place for this process; the lock dies with it, however it ends."""
        place = self.out.parent / f".{self.out.name}.lock"
        _refuse_link(place)
        self._lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                busy = f"another edgeres is building {self.out}. Wait until it is done. Or: {self.otherwise}"
                raise BundleError(busy) from None
            raise BundleError(
                f"{self.out.parent} has no locks ({problem.strerror}), and two builds at once would spoil each other "
                f"there. Build on another file system. {self.otherwise}"
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a process that was forked meanwhile has the descriptor, too
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None


def _refuse_link(place: Path) -> None:
    if place.is_symlink():  # what is written there would be written elsewhere
        raise BundleError(f"{place} is a link, where this build would work. Remove it.")


def _result(record: Optional[StageRecord]) -> bytes:
    """Return what a stage made, in a form that compares alike whether it was read or has just been made.

    The integer form is left out: it is the same model once more, and made only where the engine is for a CPU.
    """
    if record is None:
        return b""
    made = [ref for ref in record.files if ref.path != INTEGER_MODEL]
    return to_json([made, {name: fact for name, fact in record.facts.items() if name != "integer"}])


def _head(key: str, content: bytes) -> bytes:
    """Return what stands before kept content: whose it is, and how to tell that it is whole."""
    return f"{key}\n{sha256_bytes(content)}\n".encode("ascii")


def exchange(new: Path, place: Path) -> None:
    """Put the folder ``new`` at ``place``; what was there is removed afterwards.

    On Linux both change places in one step. Where the file system cannot, the old folder is moved aside first, and
    moved back if the second step fails.
    """
    if not place.exists():
        os.rename(new, place)
        return
    if _exchange_in_one_step(new, place):
        shutil.rmtree(new, ignore_errors=True)
        return
    aside = aside_of(place)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(place, aside)
    try:
        os.rename(new, place)
    except OSError:
        os.rename(aside, place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def aside_of(place: Path) -> Path:
    """Return where a bundle waits while the new one is put in its place, where that takes two steps."""
    return place.parent / f".{place.name}.old"


def restore(place: Path) -> None:
    """Put back a bundle that was moved aside by an exchange that never came to its second step."""
    aside = aside_of(place)
    if not os.path.lexists(place) and aside.is_dir():
        os.rename(aside, place)


def _exchange_in_one_step(one: Path, other: Path) -> bool:
    """Whether renameat2(2) could exchange two names."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library older than 2.28
        return False
    arguments: List[Any] = [AT_FDCWD, os.fsencode(str(one)), AT_FDCWD, os.fsencode(str(other)), RENAME_EXCHANGE]
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
