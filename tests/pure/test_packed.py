"""A packed bundle: any tar reads it, the same bundle is the same file, and nothing else than one is unpacked."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeres
from edgeres import files as files_module
from edgeres import inspection, packing
from edgeres import packed as packed_module
from edgeres import workspace as workspace_module
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, to_json
from edgeres.bundle import verify
from edgeres.cli import cli
from edgeres.errors import BundleError, IntegrityError, SignatureError, SigningKeyError
from edgeres.files import MANIFEST, SIGNATURES, content_ref, sha256_file
from edgeres.inspection import inspect_bundle, verify_bundle
from edgeres.packed import header, is_packed, read_packed
from edgeres.workspace import Workspace

CONTENTS = {
    "engines/gpu.engine": bytes(range(256)) * 20,
    "model.int8.onnx": b"model" * 300,
    "recipe.toml": b'precision = "int8"\n',
    "zero": b"",
    "exactly.one": bytes(512),
}


PATHS = st.from_regex(r"[a-z0-9]{1,8}(/[a-z]{1,8})?", fullmatch=True)


def make(folder: Path, contents: Optional[Dict[str, bytes]] = None, name: str = "net") -> Path:
    """Write a bundle of these files, with an engine where there is a file for one."""
    contents = CONTENTS if contents is None else contents
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / MANIFEST).write_bytes(to_json(manifest_of(contents, name)))
    return folder


def manifest_of(contents: Dict[str, bytes], name: str = "net") -> Manifest:
    refs = tuple(content_ref(path, content) for path, content in contents.items())
    engines = tuple(
        Engine("gpu", "tensorrt", "int8", ref, {"tensorrt": "10.3.0"}, {})
        for ref in refs
        if ref.path.endswith(".engine")
    )
    return Manifest(name, "int8", {"name": name}, Preprocessing((4, 4)), refs, {}, {}, engines)


def tree(folder: Path) -> Dict[str, bytes]:
    """Return every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


@pytest.fixture
def file(bundle: Path, tmp_path: Path) -> Path:
    return Path(edgeres.pack(bundle, tmp_path / "ship.edgeres").path)


def run(*arguments: object) -> Tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeres", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def refused(file: Path, out: Path, *words: str) -> None:
    """Hold that a file is neither unpacked nor verified nor looked into, for a reason in words, and leaves nothing."""
    before = sorted(path.name for path in out.parent.iterdir())
    for enter in (lambda: edgeres.unpack(file, out), lambda: verify_bundle(file)):
        with pytest.raises(BundleError) as caught:
            enter()
        for word in words:
            assert word in str(caught.value)
    after = sorted(path.name for path in out.parent.iterdir() if not path.name.endswith(".lock"))
    assert after == [name for name in before if not name.endswith(".lock")]


# What is packed


def test_any_tar_reads_it_and_the_manifest_comes_first(bundle: Path, file: Path, tmp_path: Path) -> None:
    with tarfile.open(str(file), "r:") as archive:
        members = archive.getmembers()
        assert [one.name for one in members] == [MANIFEST, *CONTENTS]
        for one in members:
            assert one.isreg()
            assert (one.mode, one.uid, one.gid, one.uname, one.gname, one.mtime) == (0o644, 0, 0, "", "", 0)
            stream = archive.extractfile(one)
            assert stream is not None
            assert stream.read() == (bundle / one.name).read_bytes()
    (tmp_path / "by tar").mkdir()
    subprocess.run(["tar", "-xf", str(file), "-C", str(tmp_path / "by tar")], check=True, stderr=subprocess.PIPE)
    assert tree(tmp_path / "by tar") == tree(bundle)


@given(name=st.from_regex(r"[A-Za-z0-9_]{1,99}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_a_header_is_read_as_the_standard_says(name: str, size: int) -> None:
    """Python's tarfile is somebody else's reader of the format."""
    told = tarfile.TarInfo.frombuf(header(name, size), "ascii", "strict")  # which checks the sum
    assert (told.name, told.size, told.type, told.linkname) == (name, size, tarfile.REGTYPE, "")


def test_the_same_bundle_is_the_same_file_wherever_and_whenever(
    bundle: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "of another name"
    for path in reversed(list(CONTENTS)):  # in another order
        (other / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(bundle / path), str(other / path))
        os.utime(other / path, (1e9, 1e9))
        (other / path).chmod(0o600)
    shutil.copyfile(str(bundle / MANIFEST), str(other / MANIFEST))
    (other / "notes of mine").write_text("not listed")
    monkeypatch.chdir(other)
    os.umask(os.umask(0o077))
    made = edgeres.pack(".")
    assert made.path == f"{other}.edgeres"
    assert made.unlisted == ("notes of mine",)
    assert Path(made.path).read_bytes() == file.read_bytes()
    assert (made.sha256, made.bytes) == (files_module.sha256_file(file), file.stat().st_size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    contents=st.dictionaries(
        st.from_regex(r"[a-z0-9]{1,8}(/[a-z]{1,8})?", fullmatch=True), st.binary(max_size=1500), min_size=1
    )
)
def test_what_was_packed_comes_out_again(contents: Dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    if any(path.split("/")[0] in contents and "/" in path for path in contents):
        return  # a file cannot be a folder
    if {"con", "prn", "aux", "nul"} & {part for path in contents for part in path.split("/")}:
        return  # no path of a bundle
    place = tmp_path_factory.mktemp("any")
    make(place / "bundle", contents)
    made = edgeres.pack(place / "bundle")
    again = edgeres.unpack(made.path, place / "again")
    assert tree(place / "again") == tree(place / "bundle")
    assert again.manifest == verify(place / "bundle") == verify(place / "again")


def test_a_damaged_bundle_is_not_packed_and_all_mistakes_are_told(bundle: Path, file: Path) -> None:
    before = file.read_bytes()
    (bundle / "recipe.toml").write_bytes(b"other")
    (bundle / "zero").unlink()
    with pytest.raises(IntegrityError, match=r"(?s)recipe.toml has 5 bytes.*zero is missing"):
        edgeres.pack(bundle, file)
    assert file.read_bytes() == before


def test_what_changes_while_it_is_packed_is_not_packed(
    bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    check = packing.check_files

    def late(*told: Any) -> Any:
        found = check(*told)
        (bundle / "model.int8.onnx").write_bytes(b"MODEL" * 300)
        return found

    monkeypatch.setattr(packing, "check_files", late)
    with pytest.raises(IntegrityError, match=r"model\.int8\.onnx changed while it was packed"):
        edgeres.pack(bundle, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_a_packed_bundle_is_replaced_and_nothing_else(bundle: Path, file: Path, tmp_path: Path) -> None:
    make(bundle, {"other": b"more"})
    assert edgeres.pack(bundle, file).files == 1
    assert read_packed(file)[0].manifest.files[0].path == "other"
    (tmp_path / "mine.edgeres").write_bytes(b"a text of mine")
    for name, words in (("mine.edgeres", "is no packed bundle"), ("bundle", "is no packed bundle")):
        with pytest.raises(BundleError, match=words):
            edgeres.pack(bundle, tmp_path / name)
    with pytest.raises(BundleError, match="lies in the bundle"):
        edgeres.pack(bundle, bundle / "it.edgeres")
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(BundleError, match="lies in the bundle"):
        edgeres.pack(bundle, tmp_path / "link" / "it.edgeres")
    assert (tmp_path / "mine.edgeres").read_bytes() == b"a text of mine"


def test_what_a_tar_does_not_hold_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(bundle, {"a" * 101: b""})
    with pytest.raises(BundleError, match="name of more than 100 bytes"):
        edgeres.pack(bundle)
    make(bundle, {"a" * 100: b"12345"})
    edgeres.unpack(edgeres.pack(bundle).path, bundle.parent / "again")
    monkeypatch.setattr(packed_module, "LARGEST_MEMBER", 4)
    with pytest.raises(BundleError, match="5 bytes, more than the 4"):
        edgeres.pack(bundle)


# What is not unpacked


def rewritten(file: Path, change: Callable[[List[Tuple[tarfile.TarInfo, bytes]]], Any], **how: Any) -> bytes:
    """Return a packed bundle as tarfile writes it after a change of its members."""
    with tarfile.open(str(file), "r:") as archive:
        members = [(one, (archive.extractfile(one) or io.BytesIO()).read()) for one in archive.getmembers()]
    change(members)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=how.pop("mode", "w"), **{"format": tarfile.USTAR_FORMAT, **how}) as archive:
        for one, content in members:
            one.size = len(content)
            archive.addfile(one, io.BytesIO(content))
    return stream.getvalue()


def put(number: int, **fields: Any) -> Callable[[List[Tuple[tarfile.TarInfo, bytes]]], None]:
    """Return a change of some fields of one member."""

    def change(members: List[Tuple[tarfile.TarInfo, bytes]]) -> None:
        content = fields.pop("content", members[number][1])
        for name, value in fields.items():
            setattr(members[number][0], name, value)
        members[number] = (members[number][0], content)

    return change


def added(name: str, at: int = 99, kind: bytes = tarfile.REGTYPE, **fields: Any) -> Callable[[List[Any]], None]:
    """Return a change that puts another member among the others."""

    def change(members: List[Any]) -> None:
        one = tarfile.TarInfo(name)
        one.type = kind
        for field, value in fields.items():
            setattr(one, field, value)
        members.insert(at, (one, b"more" if kind == tarfile.REGTYPE else b""))

    return change


FIRST = next(iter(CONTENTS))
HOSTILE: Dict[str, Tuple[Callable[[List[Any]], Any], Dict[str, Any], str]] = {
    "a link in a file's place": (put(1, type=tarfile.SYMTYPE, linkname="/etc/passwd", content=b""), {}, ""),
    "a hard link": (put(1, type=tarfile.LNKTYPE, linkname="manifest.json", content=b""), {}, ""),
    "a device": (put(2, type=tarfile.CHRTYPE, devmajor=1, devminor=5, content=b""), {}, ""),
    "a pipe": (put(2, type=tarfile.FIFOTYPE, content=b""), {}, ""),
    "a folder": (added("engines", 1, tarfile.DIRTYPE), {}, ""),
    "a link to a folder, before what goes there": (added("engines", 1, tarfile.SYMTYPE, linkname="/tmp"), {}, ""),
    "an absolute path": (put(1, name="/tmp/owned"), {}, ""),
    "a path that leads out": (put(1, name="../owned"), {}, ""),
    "one file more": (added("owned"), {}, ""),
    "one file less": (lambda members: members.pop(), {}, ""),
    "a file twice": (added(FIRST, 2), {}, ""),
    "a name in capitals": (put(3, name="Recipe.toml"), {}, ""),
    "two files exchanged": (lambda members: members.insert(1, members.pop(2)), {}, ""),
    "the manifest twice": (lambda members: members.insert(1, members[0]), {}, ""),
    "the manifest last": (lambda members: members.append(members.pop(0)), {}, "does not stand in front"),
    "no manifest": (lambda members: members.pop(0), {}, "does not stand in front"),
    "no members": (lambda members: members.clear(), {}, "does not stand in front"),
    "another size": (put(2, content=b"model" * 299), {}, ""),
    "another content": (put(2, content=b"MODEL" * 300), {}, ""),
    "another owner": (put(2, uid=1000, uname="me"), {}, ""),
    "another time": (put(2, mtime=1e9), {}, ""),
    "a manifest of another time": (put(0, mtime=1), {}, "does not stand in front"),
    "set user id": (put(2, mode=0o4755), {}, ""),
    "pax headers": (put(2, pax_headers={"comment": "owned"}), {"format": tarfile.PAX_FORMAT}, ""),
    "a pax header's path": (put(2, pax_headers={"path": "../owned"}), {"format": tarfile.PAX_FORMAT}, ""),
    "GNU's form": (lambda members: None, {"format": tarfile.GNU_FORMAT}, ""),
    "compressed": (lambda members: None, {"mode": "w:gz"}, "does not stand in front"),
    "as tar pads it": (lambda members: None, {}, "bytes stand behind its end"),
}


def test_what_makes_them_hostile_is_the_change_alone(file: Path) -> None:
    written = rewritten(file, lambda members: None)
    if written[329:337] != bytes(8):
        pytest.skip("this Python's tarfile writes a device's numbers for what is none")
    content = file.read_bytes()
    assert written[: len(content)] == content


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused_and_leave_nothing(name: str, file: Path, tmp_path: Path) -> None:
    change, how, words = HOSTILE[name]
    file.write_bytes(rewritten(file, change, **how))
    refused(file, tmp_path / "out", str(file), words)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("number", "fields", "words"),
    [
        (1, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link stands where engines/gpu.engine"),
        (2, {"name": "../owned"}, "'../owned' stands where model.int8.onnx"),
        (3, {"mode": 0o755}, "recipe.toml has a header that edgeres does not write"),
    ],
)
def test_what_is_strange_about_a_member_is_told(
    number: int, fields: Dict[str, Any], words: str, file: Path, tmp_path: Path
) -> None:
    """As much bytes as before, so that it is the header that tells."""
    content = bytearray(file.read_bytes())
    with tarfile.open(str(file), "r:") as archive:
        one = archive.getmembers()[number]
    for name, value in fields.items():
        setattr(one, name, value)
    content[one.offset : one.offset + 512] = one.tobuf(tarfile.USTAR_FORMAT)
    file.write_bytes(content)
    refused(file, tmp_path / "out", words)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["../owned"], "not a path inside the bundle"),
        (["/tmp/owned"], "not a path inside the bundle"),
        (["a//b"], "not a path inside the bundle"),
        (["NUL"], "not a path inside the bundle"),
        (["manifest.JSON"], "not a path inside the bundle"),
        (["a", "manifest.sig"], "not a path inside the bundle"),
        (["a", "A"], "differ in case alone"),
        (["a", "a"], "lists a file twice"),
        ([], "lists no file"),
    ],
)
def test_a_manifest_that_lists_what_no_build_would_is_refused(
    paths: List[str], words: str, bundle: Path, tmp_path: Path
) -> None:
    refs = tuple(content_ref(path, b"x") for path in paths)
    content = to_json(Manifest("net", "int8", {}, Preprocessing((4, 4)), refs, {}, {}))
    parts = [(MANIFEST, content), *((path, b"x") for path in paths)]
    written = b"".join(header(path, len(it)) + it + bytes(-len(it) % 512) for path, it in parts) + bytes(1024)
    (tmp_path / "x.edgeres").write_bytes(written)
    refused(tmp_path / "x.edgeres", tmp_path / "out", words)


def test_a_file_that_is_cut_off_or_goes_on_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for size in [*range(0, len(content), 509), len(content) - 1]:
        file.write_bytes(content[:size])
        refused(file, tmp_path / "out")
    for more in (b"\0", b"owned", bytes(512), content):
        file.write_bytes(content + more)
        refused(file, tmp_path / "out", "stand behind its end")


def test_any_flipped_bit_outside_of_the_manifest_is_found(file: Path, tmp_path: Path) -> None:
    """Within it, as in a folder, a signature finds it: see below."""
    content = file.read_bytes()
    begin, end = 512, 512 + len((tmp_path / "bundle" / MANIFEST).read_bytes())
    places = [at for at in range(0, len(content), 101) if not begin <= at < end]
    for number, at in enumerate([*places, *range(512), *range(end, end + 600)]):
        bad = bytearray(content)
        bad[at] ^= 1 << number % 8
        file.write_bytes(bad)
        with pytest.raises(BundleError):
            read_packed(file)


@pytest.mark.parametrize("size", [8**11 - 1, 17 << 20])
def test_a_manifest_of_gigabytes_is_refused_before_it_is_read(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.edgeres"
    path.write_bytes(header(MANIFEST, size))
    os.truncate(path, size + 2048)
    tracemalloc.start()
    try:
        refused(path, tmp_path / "out", "larger than any")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "empty", "text"])
def test_what_is_no_file_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.edgeres"
    makers: Dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_bytes(b"text"),
    }
    makers[kind]()
    with pytest.raises(BundleError, match=r"x\.edgeres"):
        edgeres.unpack(path, tmp_path / "out")
    assert not is_packed(path)
    assert not (tmp_path / "out").exists()


# How it is unpacked


def test_an_earlier_bundle_is_replaced_whole_and_own_files_stay(file: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"old": b"old", "engines/dla0.engine": b"plan"}, "older")
    (out / "notes of mine").write_text("mine")
    bundle, contents, warnings = packing.unpack(file, out)
    assert bundle.path == str(out)
    assert contents.signatures == ()
    assert tree(out) == {**tree(tmp_path / "bundle"), "notes of mine": b"mine"}
    assert warnings == (
        "engines/dla0.engine of the bundle that was there before is gone. Compile again: "
        f"edgeres compile {out} --target dla0",
    )


@pytest.mark.parametrize("what", ["content", "disk", "strangers", "unfinished", "busy", "link"])
def test_what_was_there_is_untouched_by_a_failure(
    what: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", {"old": b"old"}, "older")
    lock = None
    if what == "content":
        content = bytearray(file.read_bytes())
        content[-1025] ^= 1  # of the last file, so all others have been written by then
        file.write_bytes(content)
    elif what == "disk":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    elif what == "strangers":
        (out / MANIFEST).unlink()
    elif what == "unfinished":
        (tmp_path / ".out.work" / ".stages").mkdir(parents=True)
        (tmp_path / ".out.work" / ".stages" / "export.json").write_text("{}")
    elif what == "busy":
        lock = Workspace(out)
        lock.__enter__()
    elif what == "link":
        out.rename(tmp_path / "real")
        out.symlink_to(tmp_path / "real")
    before = tree(tmp_path)
    with pytest.raises(BundleError):
        packing.unpack(file, out)
    if lock is not None:
        lock.__exit__(None, None, None)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith(".lock") for name in after.keys() - before.keys())


def test_a_full_disk_is_told_and_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*told: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left"):
        packing.unpack(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [".out.lock"]


STEPS = ("open", "replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


def killed_before(step: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a child that is killed right before so many steps on files; return whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which the child does not need
        child = os.fork()
    if child == 0:
        left = step

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*told: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*told, **named)

            return counted

        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        workspace_module.exchange = counting(workspace_module.exchange)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_step_leaves_a_whole_bundle_and_the_next_unpacking_is_good(file: Path, tmp_path: Path) -> None:
    make(tmp_path / "kept", {"old": b"old"}, "older")
    old, new = tree(tmp_path / "kept"), tree(tmp_path / "bundle")
    out, steps = tmp_path / "place" / "out", 0
    while True:
        shutil.rmtree(str(tmp_path / "place"), ignore_errors=True)
        shutil.copytree(str(tmp_path / "kept"), str(out))
        struck = killed_before(steps, lambda: packing.unpack(file, out))
        assert tree(out) in (old, new)
        verify(out)
        packing.unpack(file, out)
        assert tree(out) == new
        assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]
        if not struck:
            break
        steps += 1
    assert steps > 30  # or nothing was tried


def test_what_cannot_be_read_is_not_blamed_on_the_place(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = packed_module.Source.read

    class Bad:
        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    def reading(self: packed_module.Source, most: int, what: str) -> bytes:
        if what == "model.int8.onnx":
            monkeypatch.setattr(self, "_stream", Bad())
        return read(self, most, what)

    monkeypatch.setattr(packed_module.Source, "read", reading)
    with pytest.raises(BundleError, match=r"ship.edgeres cannot be read at model.int8.onnx: Input/output error"):
        packing.unpack(file, tmp_path / "out")


def test_memory_is_bounded_however_large_the_files_are(tmp_path: Path) -> None:
    make(tmp_path / "bundle", {"large": os.urandom(48 << 20)})
    tracemalloc.start()
    try:
        edgeres.pack(tmp_path / "bundle")
        edgeres.unpack(tmp_path / "bundle.edgeres", tmp_path / "again")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert verify(tmp_path / "again") == verify(tmp_path / "bundle")


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_that_no_build_writes_is_refused_before_it_is_read(packed: bool, tmp_path: Path) -> None:
    bundle = make(tmp_path / "net", {"model.int8.onnx": b"model", "calibration.json": b""})
    with open(bundle / "calibration.json", "wb") as stream:
        stream.truncate(inspection.LARGEST + 1)
    digest, model = sha256_file(bundle / "calibration.json"), content_ref("model.int8.onnx", b"model")
    refs = (FileRef("calibration.json", digest, inspection.LARGEST + 1), model)
    (bundle / MANIFEST).write_bytes(to_json(Manifest("net", "int8", {}, Preprocessing((4, 4)), refs, {}, {})))
    place = Path(edgeres.pack(bundle).path) if packed else bundle
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match=r"calibration\.json has 67,108,865 bytes, more than 67,108,864"):
            (inspection.inspect_packed if packed else inspect_bundle)(place)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_of_another_version_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    """Its bytes may be written otherwise than this edgeres writes them, and may be signed."""
    compact = json.dumps(json.loads((bundle / MANIFEST).read_bytes())).encode()
    (bundle / MANIFEST).write_bytes(compact)
    edgeres.unpack(edgeres.pack(bundle).path, tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == compact


def test_files_are_as_open_as_the_umask_says(file: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        edgeres.unpack(file, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}


# Who vouches for it


@pytest.fixture
def keys(tmp_path: Path) -> Tuple[Path, Path, Path]:
    """Return my private and public key, and somebody else's public one."""
    pytest.importorskip("cryptography", reason="signatures need it: pip install 'edgeres[sign]'")
    from edgeres.signing import make_pair

    return tmp_path / "mine", make_pair(tmp_path / "mine")[0], make_pair(tmp_path / "yours")[0]


def test_a_signed_bundle_is_packed_with_its_signatures_and_asked_for_them_first(
    bundle: Path, keys: Tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeres.signing import sign_bundle

    private, mine, yours = keys
    with pytest.raises(SignatureError, match="it is not signed"):
        edgeres.pack(bundle, trusted_keys=mine)
    unsigned = edgeres.pack(bundle).path
    key = sign_bundle(bundle, private).key
    made = edgeres.pack(bundle, tmp_path / "signed.edgeres", trusted_keys=mine)
    assert [one.key for one in made.signatures] == [key]
    with tarfile.open(made.path, "r:") as archive:
        assert archive.getnames()[:2] == [MANIFEST, SIGNATURES]
    edgeres.unpack(made.path, tmp_path / "again", trusted_keys=[yours, mine])
    assert tree(tmp_path / "again") == tree(bundle)
    assert verify_bundle(Path(made.path), [mine])[1]["signatures"] == [{"key": key, "current": True, "trusted": True}]
    assert verify_bundle(Path(made.path))[1]["trusted"] is None
    monkeypatch.setattr(packed_module, "parse_manifest", lambda *told: pytest.fail("it was parsed"))
    for file, trusted, words in (
        (unsigned, mine, "it is not signed"),
        (made.path, yours, "and you trust"),
    ):
        with pytest.raises(SignatureError, match=words):
            edgeres.unpack(file, tmp_path / "never", trusted_keys=trusted)
    with pytest.raises(SigningKeyError, match="list of trusted keys is empty"):
        edgeres.unpack(made.path, tmp_path / "never", trusted_keys=[])
    assert not (tmp_path / "never").exists()


def test_the_signatures_that_were_checked_are_the_ones_that_are_packed_and_told(
    bundle: Path, keys: Tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeres.signing import sign_bundle

    key = sign_bundle(bundle, keys[0]).key
    signed = (bundle / SIGNATURES).read_bytes()
    for module, door in ((packing, edgeres.pack), (inspection, inspection.verify_bundle)):
        (bundle / SIGNATURES).write_bytes(signed)
        parse = module.parse_manifest

        def late(*told: Any, parse: Callable[..., Manifest] = parse) -> Manifest:
            (bundle / SIGNATURES).unlink()
            return parse(*told)

        monkeypatch.setattr(module, "parse_manifest", late)
        made = door(bundle, trusted_keys=[keys[1]])
        told = (
            [one.key for one in made.signatures]
            if door is edgeres.pack
            else [one["key"] for one in made[1]["signatures"]]
        )
        assert told == [key]
    edgeres.unpack(f"{bundle}.edgeres", tmp_path / "again", trusted_keys=[keys[1]])


def test_with_a_key_any_flipped_bit_is_found(bundle: Path, keys: Tuple[Path, Path, Path], tmp_path: Path) -> None:
    from edgeres.signing import sign_bundle

    sign_bundle(bundle, keys[0])
    path = Path(edgeres.pack(bundle).path)
    content = path.read_bytes()
    for number, at in enumerate([*range(0, 4 << 10, 31), *range(4 << 10, len(content), 211)]):
        bad = bytearray(content)
        bad[at] ^= 1 << number % 8
        path.write_bytes(bad)
        with pytest.raises(BundleError):
            read_packed(path, (), keys[1])


def test_signatures_that_are_none_are_refused(bundle: Path, file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    end = 512 + len((bundle / MANIFEST).read_bytes())
    end += -end % 512
    for signed in (b"", b"text", b"edgeres signatures 1\n", bytes(20_000)):
        member = header(SIGNATURES, len(signed)) + signed + bytes(-len(signed) % 512)
        file.write_bytes(content[:end] + member + content[end:])
        refused(file, tmp_path / "out", SIGNATURES)


def test_a_signature_that_was_left_by_a_killed_commit_does_not_come_along(file: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.work" / "bundle").mkdir(parents=True)
    (tmp_path / ".out.work" / "bundle" / SIGNATURES).write_text("left")
    edgeres.unpack(file, tmp_path / "out")
    assert not (tmp_path / "out" / SIGNATURES).exists()


@pytest.mark.parametrize("name", ["..edgeres", "...edgeres"])
def test_a_files_name_does_not_lead_out_of_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its ending the one is the current folder, the other its parent; bundles there would be replaced."""
    parent = make(tmp_path / "parent", name="parent")
    current = make(parent / "current", name="current")
    hostile = tmp_path / name
    edgeres.pack(make(tmp_path / "other", name="other"), hostile)
    before = tree(tmp_path)
    monkeypatch.chdir(current)
    code, out, err = run("unpack", hostile)
    assert (code, out) == (1, "")
    assert err == f"error: {hostile} has a name that gives no folder in the current one. Name one: --out FOLDER\n"
    assert run("verify", hostile)[0] == 0
    assert tree(tmp_path) == before
    assert edgeres.unpack(hostile, "net").manifest.name == "other"


def test_an_empty_name_is_not_the_current_folder(
    file: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    before = tree(tmp_path)
    code, out, err = run("unpack", file, "--out", "")
    assert (code, out) == (1, "")
    assert err == "error: an empty name is no folder. Name one: --out FOLDER\n"
    with pytest.raises(BundleError, match="an empty name"):
        edgeres.unpack(file, "")
    assert tree(tmp_path) == before


# The command line


def test_the_commands_pack_verify_and_unpack(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (bundle / "notes").write_text("mine")
    code, out, _ = run("pack", "bundle", "-o", "net.edgeres")
    assert code == 0
    assert out.splitlines()[0].startswith("net.edgeres: 5 files, ")
    assert files_module.sha256_file("net.edgeres") in out
    assert "not packed: notes" in out
    assert out.splitlines()[-1] == "next, where it goes: edgeres unpack net.edgeres"
    for command in (("verify", "net.edgeres"), ("unpack", "net.edgeres"), ("verify", "net")):
        code, out, _ = run(*command)
        assert code == 0
        assert "all 5 files are as they were built" in out
    assert json.loads(run("inspect", "net.edgeres", "--json")[1])["name"] == inspect_bundle(Path("net"))["name"]
    told = json.loads(run("unpack", "net.edgeres", "--out", "other", "--json")[1])
    assert (told["bundle"], told["files"], told["intact"], told["trusted"]) == ("other", 5, True, None)
    assert "no engine" not in out
    told = json.loads(run("pack", "other", "--json")[1])
    assert (told["path"], told["files"], told["unlisted"]) == ("other.edgeres", 5, [])
    code, out, err = run("unpack", "bundle/recipe.toml")
    assert (code, out) == (1, "")
    assert err.startswith("error: bundle/recipe.toml is no packed bundle")
    for command in ("validate", "compile", "diff"):
        code, out, err = run(command, "net.edgeres", *(["net"] if command == "diff" else []))
        assert code == 1
        assert "edgeres unpack net.edgeres" in err


def test_a_bundle_without_an_engine_is_packed_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "half", {"model.fp32.onnx": b"net"})
    for command in (("pack", "half"), ("verify", "half"), ("verify", "half.edgeres")):
        code, out, _ = run(*command)
        assert code == 0
        assert "it has no engine yet. Make the model, and one: edgeres build half" in out


def test_an_engine_that_is_gone_is_warned_of(file: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", {"engines/dla1.engine": b"plan"})
    told = CliRunner().invoke(cli, ["unpack", str(file), "--out", str(tmp_path / "out")], standalone_mode=False)
    assert told.exception is None
    assert "edgeres compile" in told.output
    assert "--target dla1" in told.output
