"""A bundle: every way in which a file can be another than the one its manifest binds is found and named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres import bundle as bundle_module
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, to_json
from edgeres.bundle import intact, read_manifest, read_verified, unlisted, verify, verify_and_read
from edgeres.errors import BundleError, IntegrityError
from edgeres.files import MANIFEST, file_ref, sha256_bytes

CONTENTS = {
    "recipe.toml": b'precision = "int8"\n',
    "model.int8.onnx": bytes(range(256)) * 20,
    "engines/cpu/a.engine": b"\x00",
    "empty": b"",
}


def bind(folder: Path, refs: Tuple[FileRef, ...]) -> Manifest:
    manifest = Manifest("net", "int8", {"name": "net"}, Preprocessing((32, 32)), refs, {}, {})
    (folder / MANIFEST).write_bytes(to_json(manifest))
    return manifest


def make(folder: Path) -> Manifest:
    for path, content in CONTENTS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return bind(folder, tuple(file_ref(folder, path) for path in CONTENTS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a small whole bundle, made by hand."""
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def ref_of(folder: Path, path: str) -> FileRef:
    return next(ref for ref in read_manifest(folder).files if ref.path == path)


def problems_of(folder: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        verify(folder)
    return str(caught.value)


def assert_all_refuse(folder: Path, path: str) -> None:
    """Every door to a file is shut, and the message names the file."""
    ref = ref_of(folder, path)
    assert path in problems_of(folder)
    with pytest.raises(IntegrityError, match=path):
        read_verified(folder, ref)
    for wanted in ((), (path,)):
        with pytest.raises(IntegrityError, match=path):
            verify_and_read(folder, wanted)
    assert not intact(folder, ref)


def test_a_whole_bundle_is_verified(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest == verify(str(folder)) == read_manifest(folder)
    assert {ref.path for ref in manifest.files} == set(CONTENTS)
    assert all(intact(folder, ref) for ref in manifest.files)


def test_a_bundle_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("bundle")
    assert verify(tmp_path / "current") == read_manifest(folder)


@pytest.mark.parametrize("path", CONTENTS)
def test_what_is_read_is_what_was_checked(folder: Path, path: str) -> None:
    assert read_verified(folder, ref_of(folder, path)) == CONTENTS[path]


def test_wanted_files_come_with_the_manifest(folder: Path) -> None:
    manifest, contents = verify_and_read(folder, ("recipe.toml", "empty", "not there"))
    assert manifest == read_manifest(folder)
    assert contents == {path: CONTENTS[path] for path in ("recipe.toml", "empty")}


@pytest.mark.parametrize("path", [path for path, content in CONTENTS.items() if content])
@given(data=st.data())
def test_one_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, path: str, data: Any) -> None:
    folder = tmp_path_factory.mktemp("flip")
    make(folder)
    content = bytearray(CONTENTS[path])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / path).write_bytes(bytes(content))
    assert f"{path} has changed since it was built" in problems_of(folder)
    with pytest.raises(IntegrityError, match=f"{path} has changed since it was built"):
        read_verified(folder, ref_of(folder, path))


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


def linked(path: Path) -> None:
    """Put a link to identical content in the place of a file."""
    path.rename(path.parent / "same")
    path.symlink_to("same")


def linked_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def made_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def parent_made_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


def parent_linked(path: Path) -> None:
    """Put a link to an identical folder in the place of the folder that a file is in."""
    path.parent.rename(path.parent.parent / "same")
    path.parent.symlink_to("same")


ANYWHERE = {
    "removed": (removed, "is missing"),
    "shortened": (shortened, "has 5119 bytes instead of 5120"),
    "emptied": (emptied, "has 0 bytes instead of 5120"),
    "extended": (extended, "has 5121 bytes instead of 5120"),
    "linked": (linked, "is a link"),
    "linked nowhere": (linked_nowhere, "is a link"),
    "made a folder": (made_folder, "is not an ordinary file"),
    "made a pipe": (made_fifo, "is not an ordinary file"),
}


@pytest.mark.parametrize(("change", "words"), ANYWHERE.values(), ids=ANYWHERE)
def test_a_replaced_file_is_found(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder / "model.int8.onnx")
    assert f"{folder}: model.int8.onnx {words}" in problems_of(folder)
    assert_all_refuse(folder, "model.int8.onnx")


PARENTS = {
    "a link": (parent_linked, "is a link"),
    "a file": (parent_made_file, "cannot be read: Not a directory"),
    "gone": (lambda path: shutil.rmtree(path.parent), "is missing"),
}


@pytest.mark.parametrize(("change", "words"), PARENTS.values(), ids=PARENTS)
@pytest.mark.parametrize("path", ["engines/cpu/a.engine", "engines/cpu"])
def test_a_replaced_folder_is_found(folder: Path, change: Callable[[Path], None], words: str, path: str) -> None:
    change(folder / path)
    with pytest.raises(IntegrityError, match=f"engines/cpu/a.engine {words}"):
        verify(folder)
    assert_all_refuse(folder, "engines/cpu/a.engine")


def test_all_problems_are_named_at_once(folder: Path) -> None:
    removed(folder / "empty")
    extended(folder / "recipe.toml")
    linked(folder / "engines/cpu/a.engine")
    message = problems_of(folder)
    assert message.startswith(f"{folder}: 3 problems\n")
    with pytest.raises(IntegrityError) as caught:
        verify_and_read(folder, ("empty", "recipe.toml"))
    for text in (message, str(caught.value)):
        assert "empty is missing" in text
        assert "recipe.toml has 20 bytes instead of 19" in text
        assert "engines/cpu/a.engine is a link" in text
        assert "build it again" in text
        assert "model.int8.onnx" not in text


ELSEWHERE = ["/etc/hostname", "../stranger", "engines/../../stranger", "..", "/", "//x"]
EMPTY_PARTS = ["", ".", "a//b", "a/", "./a", "a/./b"]
OF_WINDOWS = ["engines\\stranger", "C:stranger", "C:/stranger", "file:stream", "ends.", "ends ", "engines./a", "a*"]
DEVICES = ["con", "engines/NUL", "aux.onnx", "COM1", "lpt9.engine/a", "prn.tar.gz"]
OTHER_NAMES = ["manifest.json", "Manifest.JSON", "manifest.sig", ".hidden", "em\0pty", "new\nline", "\x1b[2J"]
UNICODE = ["caf\u00e9", "cafe\u0301"]  # one name to some file systems, two to others
OUTSIDE = [*ELSEWHERE, *EMPTY_PARTS, *OF_WINDOWS, *DEVICES, *OTHER_NAMES, *UNICODE]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_out_of_the_bundle_is_refused(folder: Path, path: str) -> None:
    """Even where the manifest has the right hash of what lies there."""
    (folder.parent / "stranger").write_bytes(b"stranger")
    (folder / "engines\\stranger").write_bytes(b"stranger")
    ref = FileRef(path, sha256_bytes(b"stranger"), 8)
    bind(folder, (ref,))
    assert "which is not a path inside the bundle" in problems_of(folder)
    with pytest.raises(IntegrityError, match="which is not a path inside the bundle"):
        read_verified(folder, ref)
    with pytest.raises(IntegrityError, match="which is not a path inside the bundle"):
        verify_and_read(folder, (path,))


@pytest.mark.parametrize("path", ["console", "nulls.onnx", "com", "engines/com10", "a.con", "lpt"])
def test_a_name_that_begins_as_a_device_does_is_none(folder: Path, path: str) -> None:
    (folder / path).write_bytes(b"")
    bind(folder, (file_ref(folder, path),))
    verify(folder)


def test_threads_are_started_where_they_are_used_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(*told: Any) -> None:
        raise AssertionError("a few kilobytes are no work for threads")

    monkeypatch.setattr(bundle_module, "ThreadPoolExecutor", pool)
    verify(folder)


def test_where_no_thread_can_be_started_files_are_checked_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    refused: List[threading.Thread] = []
    monkeypatch.setattr(bundle_module, "SMALL", 0)
    monkeypatch.setattr(threading.Thread, "start", start)
    verify(folder)
    extended(folder / "recipe.toml")
    assert "recipe.toml has 20 bytes instead of 19" in problems_of(folder)
    assert refused


def test_names_that_differ_in_case_alone_are_refused(folder: Path) -> None:
    """On some file systems they are one file."""
    (folder / "Recipe.toml").write_bytes(b"")
    bind(folder, (*read_manifest(folder).files, file_ref(folder, "Recipe.toml")))
    assert "names differ in case alone" in problems_of(folder)


@pytest.mark.parametrize("path", ["em\0pty", "a" * 300, "b/" * 3000 + "c"], ids=["NUL", "long name", "long path"])
def test_a_path_that_no_file_can_have_is_refused(folder: Path, path: str) -> None:
    bind(folder, (FileRef(path, sha256_bytes(b""), 0),))
    problems_of(folder)
    with pytest.raises(IntegrityError):
        verify_and_read(folder, (path,))


@given(path=st.text(max_size=20), size=st.integers(-(1 << 63), (1 << 63) - 1), sha256=st.text(max_size=5))
def test_an_arbitrary_entry_is_an_integrity_error(
    tmp_path_factory: pytest.TempPathFactory, path: str, size: int, sha256: str
) -> None:
    with pytest.raises(IntegrityError):
        read_verified(tmp_path_factory.getbasetemp(), FileRef(path, sha256, size))
    assert not intact(tmp_path_factory.getbasetemp(), FileRef(path, sha256, size))


def exchanged(path: Path) -> None:
    """Put a link to something of the same size in the place of a file."""
    (path.parent / "other").write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to("other")


def with_a_linked_parent(path: Path) -> None:
    """Put a link to a folder that somebody else may write in the place of the folder that a file is in."""
    path.parent.rename(path.parent.parent / "same")
    path.parent.symlink_to("same")


MEANWHILE = {
    "removed": ("recipe.toml", removed, "is missing"),
    "a link": ("recipe.toml", exchanged, "cannot be read: Too many levels of symbolic links"),
    "a pipe": ("recipe.toml", made_fifo, "is not an ordinary file"),
    "a folder": ("recipe.toml", made_folder, "cannot be read: Is a directory"),
    "a linked parent": ("engines/cpu/a.engine", with_a_linked_parent, "cannot be read: Not a directory"),
}


@pytest.mark.parametrize(("path", "change", "words"), MEANWHILE.values(), ids=MEANWHILE)
def test_whoever_exchanges_a_file_between_look_and_opening_wins_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, change: Callable[[Path], None], words: str
) -> None:
    ref, look, place = ref_of(folder, path), os.stat, folder / path
    seen = "cpu" if change is with_a_linked_parent else place.name

    def then_change(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        status = look(name, *arguments, **options)
        if name == seen:
            monkeypatch.undo()
            change(place)
        return status

    monkeypatch.setattr("edgeres.files.os.stat", then_change)
    with pytest.raises(IntegrityError, match=f"{path} {words}"):
        read_verified(folder, ref)
    assert os.stat is look  # the change was made


def test_an_open_file_stays_the_one_that_was_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is given to another file while the first is read changes nothing."""
    hashed = bundle_module.read_hashed

    def then_exchange(stream: Any, size: int, keep: bool) -> Tuple[bytes, str]:
        (folder / "other").write_bytes(b"another")
        os.replace(folder / "other", folder / "recipe.toml")
        return hashed(stream, size, keep)

    ref = ref_of(folder, "recipe.toml")
    monkeypatch.setattr(bundle_module, "read_hashed", then_exchange)
    assert read_verified(folder, ref) == CONTENTS["recipe.toml"]


def test_what_the_manifest_does_not_know_is_listed(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert unlisted(folder, manifest) == []
    (folder / "notes.md").write_text("mine")
    (folder / "engines" / "old.engine").write_text("old")
    (folder / "engines" / "nothing here").mkdir()
    (folder / "a link").symlink_to("notes.md")
    (folder / "a link to a folder").symlink_to("engines")
    (folder / "a link to nowhere").symlink_to("nowhere")
    os.mkfifo(folder / "a pipe")
    expected = ["a link", "a link to a folder", "a link to nowhere", "a pipe", "engines/old.engine", "notes.md"]
    assert unlisted(folder, manifest) == expected
    verify(folder)  # and they harm nothing


def not_there(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def a_folder_for_manifest(folder: Path) -> None:
    made_folder(folder / MANIFEST)


def a_pipe_for_manifest(folder: Path) -> None:
    made_fifo(folder / MANIFEST)


def an_endless_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/dev/zero")


def a_looping_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(MANIFEST)


def a_truncated_manifest(folder: Path) -> None:
    shortened(folder / MANIFEST)
    shortened(folder / MANIFEST)


def a_newer_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b'"name"', b'"from_the_future"', 1))


NO_BUNDLE: Dict[str, Tuple[Callable[[Path], None], str]] = {
    "not there": (not_there, "there is no bundle at .*edgeres build --out"),
    "a file": (a_file, "is a file, not a bundle.*edgeres unpack"),
    "without manifest": (without_manifest, "it has no manifest.json.*edgeres build --out"),
    "manifest is a folder": (a_folder_for_manifest, "is not an ordinary file"),
    "manifest is a pipe": (a_pipe_for_manifest, "is not an ordinary file"),
    "manifest is endless": (an_endless_manifest, "is not an ordinary file"),
    "manifest is a loop": (a_looping_manifest, "not an ordinary file"),
    "manifest is truncated": (a_truncated_manifest, "not a Manifest that this edgeres understands"),
    "manifest is newer": (a_newer_manifest, "not a Manifest that this edgeres understands"),
}


@pytest.mark.parametrize(("change", "words"), NO_BUNDLE.values(), ids=NO_BUNDLE)
def test_what_is_no_bundle_is_named_so(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder)
    for read in (read_manifest, verify, lambda folder: verify_and_read(folder, ())):
        with pytest.raises(BundleError, match=words) as caught:
            read(folder)
        assert not isinstance(caught.value, IntegrityError)


@pytest.mark.parametrize("place", ["a" * 300, "em\0pty"], ids=["long", "NUL"])
def test_a_place_that_cannot_be_is_no_bundle(tmp_path: Path, place: str) -> None:
    with pytest.raises(BundleError):
        read_manifest(tmp_path / place)


def test_an_oversized_manifest_is_not_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / MANIFEST).stat().st_size
    monkeypatch.setattr(bundle_module, "LARGEST_MANIFEST", size)
    verify(folder)
    monkeypatch.setattr(bundle_module, "LARGEST_MANIFEST", size - 1)
    with pytest.raises(BundleError, match="larger than any manifest"):
        verify(folder)


def test_the_largest_manifest_that_is_parsed_is_bearable_on_a_robot(folder: Path) -> None:
    """Empty lists are the worst: each takes three bytes in the file and fifty-six in memory."""
    content = (folder / MANIFEST).read_bytes().rstrip()
    nested = b",".join([b"[]"] * (6 << 20))
    (folder / MANIFEST).write_bytes(content[:-1] + b',"more":[' + nested + b"]}")
    code = (
        "import resource, sys; from edgeres import bundle; from edgeres.errors import BundleError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try:\n    bundle.read_manifest(sys.argv[1])\n"
        "except BundleError as problem:\n    print(problem)\n"
    )
    child = subprocess.run([sys.executable, "-B", "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert "larger than any manifest" in child.stdout


def test_a_manifest_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    (folder / MANIFEST).rename(elsewhere)
    (folder / MANIFEST).symlink_to(elsewhere)
    with pytest.raises(BundleError, match="not an ordinary file"):
        read_manifest(folder)


def test_an_oversized_manifest_is_refused_in_bounded_memory(folder: Path) -> None:
    """A sparse file of a terabyte: nobody can hold it, and nobody has to."""
    os.truncate(folder / MANIFEST, 1 << 40)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from edgeres import bundle\n"
        "from edgeres.errors import BundleError\n"
        "bundle.LARGEST_MANIFEST = 1 << 20\n"
        "try:\n    bundle.read_manifest(sys.argv[1])\n"
        "except BundleError as problem:\n    print(problem)\n"
    )
    command = [sys.executable, "-B", "-c", code, str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "larger than any manifest" in child.stdout


def test_the_same_entry_twice_with_another_hash_is_found(folder: Path) -> None:
    manifest = read_manifest(folder)
    wrong = msgspec.structs.replace(manifest.files[0], sha256="0" * 64)
    bind(folder, (*manifest.files, wrong))
    assert "recipe.toml has changed" in problems_of(folder)
    with pytest.raises(IntegrityError):
        verify_and_read(folder, ("recipe.toml",))


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("cpu", {"session.optimized_model_filepath": "x.pth"}, "settings that edgeres does not write: session.opt"),
        ("cpu", {"threads": "many"}, "threads=many"),
        ("cpu", {"graph_optimization_level": "all", "session.disable_quant_qdq": "1", "threads": "4"}, ""),
        ("tensorrt", {"batch": "1,8,32"}, ""),
    ],
)
def test_settings_that_no_build_writes_are_a_contradiction(
    folder: Path, backend: str, options: Dict[str, str], said: str
) -> None:
    manifest = read_manifest(folder)
    engine = Engine("cpu", backend, "int8", manifest.files[1], {}, options)
    (folder / MANIFEST).write_bytes(to_json(msgspec.structs.replace(manifest, engines=(engine,))))
    if said:
        with pytest.raises(BundleError, match=said):
            verify(folder)
    else:
        verify(folder)
