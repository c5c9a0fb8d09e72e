"""A build's workspace: whatever happens to the build, the bundle's folder is the whole old or the whole new bundle."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from edgeres import bundle as bundle_module
from edgeres import workspace as workspace_module
from edgeres.artifacts import Manifest, Preprocessing
from edgeres.bundle import read_manifest, undisturbed, unlisted, verify, verify_and_read
from edgeres.errors import BundleError, IntegrityError
from edgeres.files import MANIFEST, RECIPE, file_ref
from edgeres.workspace import Workspace, aside_of, exchange, stage_key

STAGES: Dict[str, Tuple[str, ...]] = {"export": ("model.onnx",), "compile": ("engines/a.engine", "engines/notes.txt")}


def write_stages(workspace: Workspace, word: str, names: Tuple[str, ...] = tuple(STAGES)) -> List[str]:
    """Run those stages that have no result for ``word`` yet, and return which ran."""
    ran = []
    for name in names:
        key = stage_key(name, {"word": word})
        if workspace.reuse(name, key) is None:
            for path in STAGES[name]:
                workspace.write(path, f"{word} {path}\n".encode() * 100)
            workspace.finish(name, key, STAGES[name], 0.1234567, {"word": word})
            ran.append(name)
    return ran


def manifest_of(workspace: Workspace, word: str) -> Manifest:
    workspace.write(RECIPE, f'name = "{word}"\n'.encode())
    paths = [RECIPE, *(ref.path for record in workspace.records.values() for ref in record.files)]
    refs = tuple(file_ref(workspace.folder, path) for path in paths)
    return Manifest(word, "int8", {}, Preprocessing((8, 8)), refs, workspace.records, {})


def make(out: Path, word: str) -> List[str]:
    """Build the bundle ``word`` at ``out``, and return the stages that ran."""
    with Workspace(out) as workspace:
        ran = write_stages(workspace, word)
        workspace.commit(manifest_of(workspace, word))
    return ran


def interrupted(out: Path, word: str, reason: BaseException) -> None:
    """Begin to build the bundle ``word`` at ``out``, and end by an exception after its first stage."""
    with contextlib.suppress(type(reason)), Workspace(out) as workspace:
        assert write_stages(workspace, word, ("export",)) == ["export"]
        raise reason


def test_what_a_stage_has_reached_outlives_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "net-int8"
    for content in (b"", b"half\n\x00", b"all"):  # each in the place of the one before
        with contextlib.suppress(KeyboardInterrupt), Workspace(out) as workspace:
            workspace.keep("export", "a key", content)
            raise KeyboardInterrupt
        with Workspace(out) as workspace:
            assert workspace.kept("export", "a key") == content
            assert workspace.kept("export", "another") is None
            assert workspace.kept("quantize", "a key") is None
            assert workspace.reuse("export", "a key") is None


def test_what_is_taken_over_was_made_with_what_vouches_for_it(out: Path) -> None:
    """A stage whose key is not known is never taken from an interrupted build, which may have been another recipe's."""

    def finish(workspace: Workspace, word: str) -> None:
        for name in ("budget", "sensitivity"):
            if name not in workspace.records:
                workspace.finish(name, f"{name} {word}", (), 0.0, {"word": word})

    with Workspace(out) as workspace:
        finish(workspace, "old")
        write_stages(workspace, "old")
        workspace.commit(manifest_of(workspace, "old"))
    with Workspace(out) as workspace:
        assert workspace.take_over("sensitivity", "budget") is None  # nobody vouches for it yet
        assert workspace.reuse("budget", "budget old") is not None
        found = workspace.take_over("sensitivity", "budget")
        assert found is not None
        assert found.facts == {"word": "old"}
    with contextlib.suppress(KeyboardInterrupt), Workspace(out) as workspace:
        finish(workspace, "interrupted")
        write_stages(workspace, "interrupted", ("export",))
        raise KeyboardInterrupt
    with Workspace(out) as workspace:
        assert workspace.reuse("budget", "budget interrupted") is not None
        assert workspace.take_over("sensitivity", "budget") is None
        assert workspace.reuse("budget", "budget old") is not None
        found = workspace.take_over("sensitivity", "budget")
        assert found is not None
        assert found.facts == {"word": "old"}


def test_a_damaged_rest_is_none(tmp_path: Path) -> None:
    with Workspace(tmp_path / "net-int8") as workspace:
        workspace.keep("export", "a key", b"content")
        (path,) = (workspace.work / ".stages").iterdir()
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole[:position])
            assert workspace.kept("export", "a key") is None
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert workspace.kept("export", "a key") is None


def test_a_finished_stage_leaves_no_rest(tmp_path: Path) -> None:
    with Workspace(tmp_path / "net-int8") as workspace:
        workspace.keep("export", "a key", b"content")
        write_stages(workspace, "whole")
        assert workspace.kept("export", "a key") is None
        workspace.commit(manifest_of(workspace, "whole"))
    assert_is(tmp_path / "net-int8", "whole")


def tree(folder: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_is(out: Path, word: str) -> None:
    """``out`` is the whole bundle ``word`` and nothing else."""
    manifest = verify(out)
    assert manifest.name == word
    assert unlisted(out, manifest) == []
    assert {ref.path for ref in manifest.files} == {RECIPE, *(path for paths in STAGES.values() for path in paths)}
    assert (out / "model.onnx").read_text().startswith(f"{word} ")


def beside(out: Path) -> List[str]:
    """Return what lies around a bundle; the empty lock file stays, for removing it would let two builds in."""
    return sorted(name for name in os.listdir(out.parent) if name not in (out.name, f".{out.name}.lock"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the place of a bundle that is not there yet, nor is the folder that it will be in."""
    return tmp_path / "build" / "net-int8"


# Making a bundle, and making it again


def test_commit_makes_the_bundle(out: Path) -> None:
    assert make(out, "old") == list(STAGES)
    assert_is(out, "old")
    assert beside(out) == []
    assert (out.parent / f".{out.name}.lock").stat().st_size == 0


def test_commit_replaces_the_bundle_whole(out: Path) -> None:
    make(out, "old")
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_a_file_of_the_earlier_bundle_alone_is_dropped(out: Path) -> None:
    make(out, "old")
    with Workspace(out) as workspace:
        write_stages(workspace, "old", ("export",))
        workspace.commit(manifest_of(workspace, "less"))
    assert sorted(tree(out)) == [MANIFEST, "model.onnx", RECIPE]
    verify(out)
    assert not (out / "engines").exists()


def test_an_empty_folder_may_become_a_bundle(out: Path) -> None:
    out.mkdir(parents=True)
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_a_build_that_fails_before_it_made_a_file_leaves_nothing(out: Path) -> None:
    make(out, "old")
    with contextlib.suppress(ZeroDivisionError), Workspace(out) as workspace:
        workspace.finish("look", "key", (), 0.1, {"seen": 3})
        raise ZeroDivisionError
    assert beside(out) == []
    with contextlib.suppress(ZeroDivisionError), Workspace(out) as workspace:
        workspace.finish("look", "key", (), 0.1, {"seen": 3})
        write_stages(workspace, "new")
        raise ZeroDivisionError
    with Workspace(out) as workspace:
        assert workspace.unfinished
        assert workspace.reuse("look", "key") is not None


def test_a_relative_place_stays_where_it_was_meant(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.parent.mkdir()
    monkeypatch.chdir(out.parent)
    with Workspace(Path("net-int8")) as workspace:
        monkeypatch.chdir("/")
        write_stages(workspace, "new")
        workspace.commit(manifest_of(workspace, "new"))
    assert_is(out, "new")


def test_a_bundle_named_by_two_dots_is_itself(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(out, "old")
    monkeypatch.chdir(out.parent)
    make(Path(out.name) / "engines" / "..", "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_a_bundle_that_somebody_stands_in_is_not_replaced(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(out, "old")
    monkeypatch.chdir(out / "engines")
    with pytest.raises(BundleError, match=r"you are inside .*cd \.\."):
        make(Path(".."), "new")
    monkeypatch.chdir("/")
    assert_is(out, "old")


def test_a_record_says_what_was_made(out: Path) -> None:
    make(out, "old")
    record = read_manifest(out).stages["compile"]
    assert record.key == stage_key("compile", {"word": "old"})
    assert record.files == tuple(file_ref(out, path) for path in STAGES["compile"])
    assert record.seconds == 0.123
    assert record.facts == {"word": "old"}


def test_the_bundles_folder_is_as_open_as_the_umask_says(out: Path) -> None:
    before = os.umask(0o027)
    try:
        make(out, "old")
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert stat.S_IMODE((out / MANIFEST).stat().st_mode) == 0o640


# Stages that are taken over


def test_a_finished_build_is_reused(out: Path) -> None:
    make(out, "old")
    assert make(out, "old") == []
    assert_is(out, "old")
    assert beside(out) == []


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), BundleError("the disk is full"), RuntimeError("a bug")])
def test_an_interrupted_build_is_continued(out: Path, reason: BaseException) -> None:
    make(out, "old")
    before = tree(out)
    interrupted(out, "new", reason)
    assert tree(out) == before
    assert make(out, "new") == ["compile"]
    assert_is(out, "new")


def test_another_key_is_another_stage(out: Path) -> None:
    make(out, "old")
    with Workspace(out) as workspace:
        assert workspace.reuse("export", stage_key("export", {"word": "new"})) is None
        assert workspace.reuse("nothing", stage_key("export", {"word": "old"})) is None
        assert workspace.records == {}
        record = workspace.reuse("export", stage_key("export", {"word": "old"}))
        assert record is not None
        assert workspace.records == {"export": record}


def damage_content(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"X" + content[1:])


def damage_by_link(path: Path) -> None:
    """The same content, but a bundle has ordinary files only."""
    path.rename(path.parent / "same")
    path.symlink_to("same")


DAMAGES = {"changed": damage_content, "removed": lambda path: path.unlink(), "a link": damage_by_link}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("path", STAGES["compile"])
def test_a_damaged_file_makes_its_stage_run_again(out: Path, path: str, damage: Callable[[Path], None]) -> None:
    make(out, "old")
    damage(out / path)
    assert make(out, "old") == ["compile"]
    verify(out)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("path", STAGES["compile"])
def test_a_file_damaged_after_an_interruption_makes_its_stage_run_again(
    out: Path, path: str, damage: Callable[[Path], None]
) -> None:
    with Workspace(out) as workspace:
        write_stages(workspace, "new")
    damage(workspace.folder / path)
    assert make(out, "new") == ["compile"]
    assert_is(out, "new")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 50])
def test_a_damaged_record_makes_its_stage_run_again(out: Path, content: bytes) -> None:
    with Workspace(out) as workspace:
        write_stages(workspace, "new")
    (workspace.work / ".stages" / "export.json").write_bytes(content)
    assert make(out, "new") == ["export"]
    assert_is(out, "new")


INPUTS: List[Dict[str, Any]] = [
    {},
    {"a": 1, "b": {"c": 2, "d": None}},
    {"a": 1, "b": {"c": 2, "d": 0}},
    {"a": 2, "b": {"c": 1, "d": None}},
    {"a": 1, "b": {"c": 2}},
    {"a": "1", "b": {"c": 2, "d": None}},
    {"a": [1, 2]},
    {"a": [2, 1]},
    {"b": [1, 2]},
    {"a": [1.5, 2]},
]


def test_a_key_tells_inputs_apart() -> None:
    keys = [stage_key(name, inputs) for name in ("export", "compile") for inputs in INPUTS]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_a_key_does_not_depend_on_the_order_of_inputs() -> None:
    backwards = {"b": {"d": None, "c": 2}, "a": 1}
    assert list(backwards) != list(INPUTS[1])
    assert stage_key("export", backwards) == stage_key("export", INPUTS[1])


# The user's own files


def test_the_users_own_files_are_carried_over(out: Path, tmp_path: Path) -> None:
    make(out, "old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far").write_text("far")
    (out / "notes.md").write_text("mine")
    (out / "engines" / "mine" / "deep").mkdir(parents=True)
    (out / "engines" / "mine" / "deep" / "run.sh").write_text("mine")
    (out / "engines" / "mine" / "deep" / "run.sh").chmod(0o755)
    (out / "link").symlink_to("notes.md")
    (out / "folder link").symlink_to(tmp_path / "elsewhere")
    (out / "broken link").symlink_to("nowhere")
    make(out, "new")
    assert verify(out).name == "new"
    assert (out / "notes.md").read_text() == "mine"
    assert os.access(out / "engines" / "mine" / "deep" / "run.sh", os.X_OK)
    assert os.readlink(out / "link") == "notes.md"
    assert os.readlink(out / "folder link") == str(tmp_path / "elsewhere")
    assert os.readlink(out / "broken link") == "nowhere"
    assert (tmp_path / "elsewhere" / "far").read_text() == "far"
    assert beside(out) == []


def test_a_file_that_the_new_bundle_has_itself_is_not_carried_over(out: Path) -> None:
    make(out, "old")
    manifest = read_manifest(out)
    with Workspace(out) as workspace:
        write_stages(workspace, "new", ("export",))
        workspace.commit(manifest_of(workspace, "new"))
    assert manifest != read_manifest(out)
    (out / "engines").mkdir()
    (out / "engines" / "a.engine").write_text("the user's own")
    make(out, "new")
    assert_is(out, "new")


def test_what_cannot_be_carried_over_stops_the_commit(out: Path) -> None:
    """A pipe cannot be copied; the user is told its name, and everything stays."""
    make(out, "old")
    os.mkfifo(out / "pipe")
    with pytest.raises(BundleError, match="pipe"):
        make(out, "new")
    assert verify(out).name == "old"
    (out / "pipe").unlink()
    assert make(out, "new") == []  # all of it had been made
    assert_is(out, "new")


def test_a_disk_that_is_full_at_the_very_end_costs_no_stage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: Workspace, path: str, content: bytes) -> None:
        if path == MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, content)

    write = Workspace.write
    make(out, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write", fill)
        with pytest.raises(BundleError, match=r"No space left on device.*untouched"):
            make(out, "new")
    assert_is(out, "old")
    assert make(out, "new") == []
    assert_is(out, "new")
    assert beside(out) == []


def test_the_users_own_files_outlive_a_damaged_manifest(out: Path) -> None:
    make(out, "old")
    (out / "notes.md").write_text("mine")
    (out / MANIFEST).write_bytes(b"{")
    make(out, "new")
    assert verify(out).name == "new"
    assert (out / "notes.md").read_text() == "mine"


# What is left alone


def test_a_folder_that_is_no_bundle_is_left_alone(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(BundleError, match=r"is not a bundle; it is left alone.*--out"):
        make(out, "new")
    assert tree(out) == {"thesis.tex": b"precious"}
    assert beside(out) == []


def test_somebody_elses_manifest_is_left_alone(out: Path) -> None:
    """Web applications have a manifest.json too."""
    out.mkdir(parents=True)
    (out / MANIFEST).write_text('{"short_name": "App", "start_url": "/"}')
    with pytest.raises(BundleError, match=r"is not a bundle; it is left alone.*--out"):
        make(out, "new")
    assert list(tree(out)) == [MANIFEST]
    assert beside(out) == []


def test_a_file_is_left_alone(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("precious")
    with pytest.raises(BundleError, match=r"is not a folder.*--out"):
        make(out, "new")
    assert out.read_text() == "precious"


def test_a_mount_point_is_refused_before_the_work() -> None:
    with pytest.raises(BundleError, match=r"/proc is a mount point.*--out /proc/bundle"):
        make(Path("/proc"), "new")


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_is_left_alone(out: Path, target: str) -> None:
    make(out.parent / "elsewhere", "old")
    out.symlink_to(target)
    with pytest.raises(BundleError, match=r"is a link\. Name the folder itself: /"):
        make(out, "new")
    assert os.readlink(out) == target
    assert_is(out.parent / "elsewhere", "old")


def test_a_parent_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BundleError, match=r"cannot write beside .*: Not a directory.*--out"):
        make(tmp_path / "file" / "below" / "net", "new")
    assert tree(tmp_path) == {"file": b"precious"}


def test_a_name_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"File name too long.*--out"):
        make(tmp_path / ("a" * 300), "new")


def test_a_work_folder_that_is_a_file_is_named(out: Path) -> None:
    out.parent.mkdir()
    (out.parent / f".{out.name}.work").write_text("precious")
    with pytest.raises(BundleError, match=r"cannot write beside .*--out"):
        make(out, "new")


# Two builds at once


def test_the_second_of_two_builds_is_refused(out: Path) -> None:
    with Workspace(out) as first:
        write_stages(first, "first")
        with pytest.raises(BundleError, match="another edgeres is building"):
            make(out, "second")
        first.commit(manifest_of(first, "first"))
    assert_is(out, "first")
    make(out, "second")
    assert_is(out, "second")


def test_two_builds_at_two_places_do_not_meet(out: Path) -> None:
    other = out.parent / "other"
    with Workspace(out) as first:
        make(other, "other")
        write_stages(first, "first")
        first.commit(manifest_of(first, "first"))
    assert_is(out, "first")
    assert_is(other, "other")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_lock_is_let_go_however_a_build_ends(out: Path) -> None:
    make(out, "old")
    before = descriptors()
    interrupted(out, "new", RuntimeError("a bug"))
    with Workspace(out):
        for _ in range(3):
            with pytest.raises(BundleError, match="another edgeres"):
                make(out, "new")
    assert descriptors() == before
    make(out, "new")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_to_be_one(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    make(out, "old")
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(workspace_module.fcntl, "flock", refuse)
        with pytest.raises(BundleError, match=rf"{out.parent} has no locks \({os.strerror(code)}\).*--out"):
            make(out, "new")
    assert descriptors() == before
    assert_is(out, "old")
    assert beside(out) == []


@pytest.mark.parametrize("place", [".net-int8.work", ".net-int8.work/bundle", ".net-int8.work/.stages"])
def test_a_work_folder_that_is_a_link_is_refused(out: Path, tmp_path: Path, place: str) -> None:
    make(out, "old")
    (tmp_path / "elsewhere").mkdir()
    link = out.parent / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"is a link.*Remove it"):
        make(out, "new")
    assert os.listdir(tmp_path / "elsewhere") == []
    assert_is(out, "old")


def test_a_lock_that_is_a_link_is_refused(out: Path, tmp_path: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / f".{out.name}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"\.lock is a link.*Remove it"):
        make(out, "new")
    assert not (tmp_path / "elsewhere").exists()


def test_a_process_that_was_forked_during_a_build_does_not_keep_its_lock(out: Path) -> None:
    source, sink = os.pipe()
    with Workspace(out) as workspace:
        write_stages(workspace, "old")
        workspace.commit(manifest_of(workspace, "old"))
        process = os.fork()
        if not process:
            os.close(sink)
            os.read(source, 1)  # until the other end is closed
            os._exit(0)
    try:
        make(out, "new")
    finally:
        os.close(sink)
        os.close(source)
        os.waitpid(process, 0)
    assert_is(out, "new")


def test_what_is_left_of_an_exchange_is_no_unfinished_build(out: Path) -> None:
    """Its stages are in the bundle; who compiles need not finish it first."""
    make(out, "old")
    assert run(out, "workspace_module.shutil.rmtree = lambda *_, **__: os._exit(9); make(out, 'new')") == 9
    with Workspace(out) as workspace:
        assert not workspace.unfinished
        assert workspace.reuse("export", stage_key("export", {"word": "new"})) is not None
    interrupted(out, "newer", KeyboardInterrupt())
    with Workspace(out) as workspace:
        assert workspace.unfinished


HOLD = "workspace = Workspace(out); workspace.__enter__(); print('ready', flush=True); time.sleep(600)"


def test_the_lock_dies_with_its_owner(out: Path) -> None:
    owner = child(out, HOLD)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        with pytest.raises(BundleError, match="another edgeres is building"):
            make(out, "new")
    finally:
        owner.kill()
        owner.communicate()
    make(out, "new")
    assert_is(out, "new")


# A build that dies


def child(out: Path, code: str) -> subprocess.Popen:
    """Start another process that has this file's helpers, and ``out``."""
    script = f"""
        import importlib.util, os, sys, time
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("helpers", {str(Path(__file__).resolve())!r})
        helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        globals().update({{name: value for name, value in vars(helpers).items() if not name.startswith("__")}})
        out = Path({str(out)!r})
    """
    command = [sys.executable, "-B", "-c", textwrap.dedent(script) + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(out: Path, code: str) -> int:
    process = child(out, code)
    process.communicate()
    return process.returncode


DEATHS = {
    "at the start": "with Workspace(out): os._exit(9)",
    "after a stage": "with Workspace(out) as w: write_stages(w, 'new', ('export',)); os._exit(9)",
    "in the midst of a stage": "with Workspace(out) as w: w.write('model.onnx', b'half'); os._exit(9)",
    "before commit": "with Workspace(out) as w: write_stages(w, 'new'); manifest_of(w, 'new'); os._exit(9)",
    "before the exchange": "workspace_module.exchange = lambda *_: os._exit(9); make(out, 'new')",
}


@pytest.mark.parametrize("code", DEATHS.values(), ids=DEATHS)
def test_a_build_that_dies_leaves_the_earlier_bundle(out: Path, code: str) -> None:
    make(out, "old")
    before = tree(out)
    assert run(out, code) == 9
    assert tree(out) == before
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_what_is_left_of_an_earlier_bundle_is_cleared_away_first(out: Path, tmp_path: Path) -> None:
    """What lies there may be a bundle that was exchanged and not removed; nothing is written through its links."""
    left = out.parent / f".{out.name}.work/bundle"
    (tmp_path / "elsewhere").mkdir()
    left.mkdir(parents=True)
    (left / "engines").symlink_to(tmp_path / "elsewhere")
    make(out, "new")
    assert_is(out, "new")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_build_that_dies_before_there_is_any_bundle_leaves_none(out: Path) -> None:
    assert run(out, DEATHS["before the exchange"]) == 9
    assert not out.exists()
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_a_build_that_dies_after_the_exchange_leaves_the_new_bundle(out: Path) -> None:
    """The old one lies in the work folder then; nothing of it comes back."""
    make(out, "old")
    (out / "notes.md").write_text("mine")
    (out / "engines" / "link").symlink_to("/")
    assert run(out, "workspace_module.shutil.rmtree = lambda *_, **__: os._exit(9); make(out, 'new')") == 9
    assert verify(out).name == "new"
    assert beside(out) == [f".{out.name}.work"]
    for name in ("notes.md", "engines/link"):
        (out / name).unlink()
    make(out, "newer")
    assert_is(out, "newer")
    assert beside(out) == []


def die_after(count: int) -> None:
    """Let this process live for so many more of the steps that change what lies where."""
    left = [count]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*arguments, **options)

        return step

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    workspace_module._exchange_in_one_step = dying(workspace_module._exchange_in_one_step)


def die_at_every_step(out: Path) -> None:
    """Die at the first step of a build, then at the second, until a build comes through; and build again after each."""
    names, again = [], []
    for count in range(1000):
        make(out, "old")
        assert_is(out, "old")
        process = os.fork()
        if not process:
            die_after(count)
            make(out, "new")
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        assert status in (0, 9 << 8), status
        names.append(verify(out).name)
        assert_is(out, names[-1])
        again.append(make(out, "new"))
        assert_is(out, "new")
        assert beside(out) == []
        if status == 0:
            break
    assert names == sorted(names, reverse=True)  # old until the exchange, and new ever after
    assert names.count("old") > 10
    assert names.count("new") > 3
    # A stage that was finished is never run again, however late the build died.
    assert again == sorted(again, key=len, reverse=True)
    assert [ran for ran, _ in itertools.groupby(again)] == [list(STAGES), ["compile"], []]
    assert again.index([]) < names.index("new")


def kill_at_any_moment(out: Path) -> None:
    """Kill a process that builds one bundle after the other, at moments spread over a build."""
    make(out, "odd")
    for attempt in range(40):
        ready, started = os.pipe()
        process = os.fork()
        if not process:
            for number in range(1_000_000):
                make(out, ("even", "odd")[number % 2])
                os.write(started, b".")
        os.close(started)
        assert os.read(ready, 1) == b"."
        time.sleep(0.0007 * attempt)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        os.close(ready)
        name = verify(out).name
        assert name in ("even", "odd")
        assert_is(out, name)
    make(out, "after")
    assert_is(out, "after")
    assert beside(out) == []


@pytest.mark.parametrize("torment", [die_at_every_step, kill_at_any_moment])
def test_at_every_moment_there_is_a_whole_bundle(out: Path, torment: Callable[[Path], None]) -> None:
    assert run(out, f"{torment.__name__}(out)") == 0


# Readers meanwhile


def test_who_reads_while_it_is_built_sees_the_one_or_the_other(out: Path) -> None:
    """Never a mixture, and no complaint about damage; at most that it changes too often to be read."""
    make(out, "odd")
    paths = tuple(path for stage in STAGES.values() for path in stage)
    builder = child(out, "while True: [make(out, word) for word in ('even', 'odd')]")
    seen: List[str] = []
    refused: List[str] = []
    try:
        end = time.monotonic() + 60
        while len(set(seen)) < 2 or len(seen) < 300:
            assert time.monotonic() < end, f"{len(seen)} readings, {set(seen)}"
            try:
                manifest, contents = verify_and_read(out, paths)
            except BundleError as problem:
                refused.append(str(problem))
                continue
            assert {content.split()[0].decode() for content in contents.values()} == {manifest.name}
            seen.append(manifest.name)
    finally:
        builder.kill()
        builder.communicate()
    assert all("changed while it was being read" in text for text in refused)


def test_an_exchange_between_the_manifest_and_the_files_is_no_damage(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["new"]

    def read_and_be_overtaken(*arguments: Any) -> Manifest:
        manifest = read_manifest(*arguments)
        if words:
            make(out, words.pop())
        return manifest

    make(out, "old")
    monkeypatch.setattr(bundle_module, "read_manifest", read_and_be_overtaken)
    manifest, contents = verify_and_read(out, ("model.onnx",))
    assert manifest.name == "new"
    assert contents["model.onnx"].startswith(b"new ")


def test_damage_is_not_read_again_and_again(out: Path) -> None:
    make(out, "old")
    damage_content(out / "model.onnx")
    tries = []

    def read() -> Manifest:
        tries.append(1)
        return verify(out)

    with pytest.raises(IntegrityError, match="has changed since it was built"):
        undisturbed(out, read)
    assert len(tries) == 1


def test_damage_is_not_read_again_where_only_the_folder_is_touched(out: Path) -> None:
    make(out, "old")
    tries = []

    def read() -> None:
        tries.append(1)
        (out / f"note {len(tries)}").write_text("mine")
        raise IntegrityError("damage")

    with pytest.raises(IntegrityError, match="damage"):
        undisturbed(out, read)
    assert len(tries) == 1


def test_of_a_bundle_that_never_stays_the_last_error_is_told(out: Path) -> None:
    words = itertools.cycle(("odd", "even"))
    tries = []

    def read() -> None:
        make(out, next(words))
        tries.append(1)
        raise IntegrityError(f"a file of the other one, {len(tries)}")

    make(out, "even")
    with pytest.raises(IntegrityError, match="the other one, 5"):
        undisturbed(out, read)
    assert len(tries) == 5


# The exchange itself


def no_exchange(one: Path, other: Path) -> bool:
    return False


@pytest.fixture
def two_folders(tmp_path: Path) -> Tuple[Path, Path]:
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "new", tmp_path / "place"


@pytest.mark.parametrize("steps", [1, 2])
def test_the_new_folder_takes_the_place(
    two_folders: Tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    new, place = two_folders
    if steps == 2:
        monkeypatch.setattr(workspace_module, "_exchange_in_one_step", no_exchange)
        aside_of(place).mkdir()  # of an earlier exchange that was killed before it had tidied up
    exchange(new, place)
    assert (place / "file").read_text() == "new"
    assert os.listdir(place.parent) == ["place"]


def test_the_new_folder_takes_an_empty_place(two_folders: Tuple[Path, Path]) -> None:
    new, place = two_folders
    (place / "file").unlink()
    place.rmdir()
    exchange(new, place)
    assert (place / "file").read_text() == "new"
    assert os.listdir(place.parent) == ["place"]


@pytest.mark.parametrize("steps", [1, 2])
def test_an_exchange_that_fails_leaves_both(
    two_folders: Tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    new, place = two_folders
    if steps == 2:
        monkeypatch.setattr(workspace_module, "_exchange_in_one_step", no_exchange)
    with pytest.raises(OSError, match="No such file"):
        exchange(new.parent / "not there", place)
    assert (place / "file").read_text() == "place"
    assert sorted(os.listdir(place.parent)) == ["new", "place"]


def test_a_build_goes_the_long_way_where_it_must(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_module, "_exchange_in_one_step", no_exchange)
    make(out, "old")
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []


def test_a_build_that_dies_on_the_long_way_loses_nothing(out: Path) -> None:
    """Between its two steps the bundle lies aside; the next build puts it back before anything else."""
    make(out, "old")
    (out / "notes.md").write_text("mine")
    code = "rename = os.rename; os.rename = lambda *names: (rename(*names), os._exit(9)); "
    assert run(out, code + "workspace_module._exchange_in_one_step = no_exchange; make(out, 'new')") == 9
    assert not out.exists()
    with Workspace(out):
        assert verify(out).name == "old"
    make(out, "new")
    assert (out / "notes.md").read_text() == "mine"
    assert verify(out).name == "new"
    assert beside(out) == []


def test_a_commit_that_fails_says_so_and_leaves_the_earlier_bundle(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    make(out, "old")
    with monkeypatch.context() as patch:
        patch.setattr(workspace_module, "_exchange_in_one_step", fail)
        with pytest.raises(BundleError, match=r"cannot put the bundle at .*Input/output error"):
            make(out, "new")
    assert_is(out, "old")
    make(out, "new")
    assert_is(out, "new")
    assert beside(out) == []
