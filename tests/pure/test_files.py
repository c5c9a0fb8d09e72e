"""Files: hashes, and writes that are whole or have not happened."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres import files
from edgeres.artifacts import FileRef
from edgeres.errors import BundleError
from edgeres.files import file_ref, model_file, read_at_most, sha256_bytes, sha256_file, write_atomic

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4's empty message


def test_the_hash_is_sha256() -> None:
    assert sha256_bytes(b"") == EMPTY


@pytest.mark.parametrize("size", [0, 1, files.CHUNK - 1, files.CHUNK, files.CHUNK + 1, 2 * files.CHUNK])
def test_a_file_is_hashed_whole(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_read_that_gives_less_than_there_is_goes_on() -> None:
    """As read(2) may, on some file systems and behind a signal."""
    asked: List[int] = []
    parts = [b"a", b"bc", b"def", b""]

    def read(most: int) -> bytes:
        asked.append(most)
        return parts.pop(0)[:most]

    stream: Any = SimpleNamespace(read=read)
    assert read_at_most(stream, 100) == b"abcdef"
    parts = [b"a", b"bc", b"def", b"ghi"]
    assert read_at_most(stream, 5) == b"abcde"
    assert parts == [b"ghi"]
    assert max(asked) <= 100


def test_a_reference_is_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a").write_bytes(b"abc")
    assert file_ref(tmp_path, "engines/a") == FileRef("engines/a", hashlib.sha256(b"abc").hexdigest(), 3)


def test_a_model_is_named_by_its_precision() -> None:
    assert model_file("fp32") == files.FP32_MODEL
    assert model_file("int8") == "model.int8.onnx"


@given(old=st.binary(max_size=50), new=st.binary(max_size=50))
def test_content_is_replaced_whole(tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes) -> None:
    path = tmp_path_factory.mktemp("replace") / "deep" / "er" / "file"
    for content in (old, new):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_a_reader_keeps_the_old_content(tmp_path: Path) -> None:
    """What was opened before stays what it was: the new content is another file, not written over the old one."""
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with open(path, "rb") as reader:
        write_atomic(str(path), b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "file").symlink_to("elsewhere")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_what_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"content")
    finally:
        after = os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert after == mask


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(BundleError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"new")
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(BundleError, match="cannot write"):
        write_atomic(tmp_path / "folder", b"new")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["inner"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("through", ["itself", "link"])
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path: Path, kind: str, through: str) -> None:
    path = Path(os.devnull) if kind == "device" else tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "socket":
            listener.bind(str(path))
        if through == "link" or kind == "device":  # never /dev/null itself: where this fails, it would be gone
            (tmp_path / "link").symlink_to(path)
            path = tmp_path / "link"
        before = os.lstat(path)
        with pytest.raises(BundleError, match="no ordinary file"):
            write_atomic(path, b"new")
    assert (os.lstat(path).st_mode, os.lstat(path).st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(BundleError, match="No space left on device"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import os, sys
from edgeres.files import write_atomic
os.fsync = lambda descriptor: (print("writing", flush=True), sys.stdin.read())
write_atomic(sys.argv[1], b"half")
"""


def test_what_a_killed_writer_leaves_is_gone_with_the_next_one(tmp_path: Path) -> None:
    """But not what somebody is still writing, and nothing of another name."""
    path = tmp_path / "file"
    strangers = [".file.txt", ".file.0123", ".other.0123456789abcdef", "file.0123456789abcdef"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    command = [sys.executable, "-B", "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (begun,) = set(os.listdir(tmp_path)) - set(strangers)
        write_atomic(path, b"mine")
        assert set(os.listdir(tmp_path)) == {*strangers, begun, "file"}
        writer.kill()
    write_atomic(path, b"mine")
    assert set(os.listdir(tmp_path)) == {*strangers, "file"}


def test_a_file_that_is_taken_for_an_orphan_before_it_is_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = []

    def removed_first(descriptor: int, operation: int) -> None:
        if not lost:
            lost.extend(os.listdir(tmp_path))
            os.unlink(tmp_path / lost[0])
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", removed_first)
    write_atomic(tmp_path / "file", b"content")
    assert len(lost) == 1
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_file_that_another_writer_is_about_to_remove_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one has taken it for an orphan and locked it, between this one's open and lock."""
    removers: List[threading.Timer] = []

    def taken_for_an_orphan(path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        if flags & os.O_CREAT and not removers:
            other = opened(path, os.O_RDWR)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removers.append(threading.Timer(0.2, lambda: (os.unlink(path), os.close(other))))
            removers[0].start()
        return descriptor

    opened = os.open
    monkeypatch.setattr(os, "open", taken_for_an_orphan)
    monkeypatch.setattr(os, "fsync", lambda descriptor: [remover.join() for remover in removers])
    write_atomic(tmp_path / "file", b"content")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_that_may_not_be_listed_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", refuse)
        write_atomic(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_what_a_killed_writer_left_on_nfs_is_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file has to be open for writing to be locked against all others. Source: flock(2), NFS details."""

    def as_nfs(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", as_nfs)
    (tmp_path / ".file.0123456789abcdef").write_text("half")
    write_atomic(tmp_path / "file", b"content")
    assert os.listdir(tmp_path) == ["file"]


def test_where_there_are_no_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".file.0123456789abcdef").write_text("perhaps somebody's")
    write_atomic(tmp_path / "file", b"content")
    assert sorted(os.listdir(tmp_path)) == [".file.0123456789abcdef", "file"]


FULL = """
import sys
from edgeres.errors import BundleError
from edgeres.files import write_atomic
try:
    write_atomic(sys.argv[1], bytes(100_000))
except BundleError as problem:
    print(problem)
else:
    print("it was written")
"""


def limited() -> None:
    """Give the child a file system on which no file grows beyond 10 000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    command = [sys.executable, "-B", "-c", FULL, str(path)]
    child = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=True)
    assert child.stdout.startswith(f"cannot write {path}: File too large. Free space")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
