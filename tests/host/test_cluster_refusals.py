"""A cluster that does not answer, is not like this machine, cannot read the samples or ends: told in words, in time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_work
import numpy as np
import psutil
import pytest

import edgeres
from edgeres import cluster as room
from edgeres import connection, files, pipeline, provenance, shards
from edgeres.artifacts import Preprocessing
from edgeres.backends import cpu
from edgeres.errors import ClusterError, EdgeresError, MissingPackageError
from edgeres.recipe import dossier, load_recipe
from edgeres.samples import open_samples, samples_from_arrays

PACKAGE = Path(edgeres.__file__).parent
DIGITS = dossier() / "digits"


def nothing(*told: object) -> None:
    """Warn nobody."""


@contextlib.contextmanager
def running(*command: str, path: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of Dask's as long as the block lasts; ``path`` is where it finds another edgeres first."""
    places = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, str(PACKAGE.parent), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-m", "dask", *command],
        env=environment,
        cwd=path or PACKAGE.parent,  # the first place where Python looks
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """Return the address of a scheduler without workers, the file that workers find it by, and its process."""
    from distributed import Client

    file = tmp_path / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0")
    with running("scheduler", *options, "--scheduler-file", str(file)) as child:
        deadline = time.monotonic() + 120
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.2)
        with Client(scheduler_file=str(file), timeout=60) as client:
            address = client.scheduler.address
        yield address, file, child


@contextlib.contextmanager
def worker(file: Path, path: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    options = ("--no-nanny", "--no-dashboard", "--nthreads", "1", "--host", "127.0.0.1")
    with running("worker", "--scheduler-file", str(file), *options, path=path) as child:
        yield child


def test_what_is_no_address_is_told() -> None:
    for address in ("nowhere", "tcp://", "http://host:80", "local:0", "local:x", "tcp://host:1/etc"):
        with pytest.raises(ClusterError, match="is no cluster"), room.joined(address, nothing):
            pass


def test_a_scheduler_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(connection, "CONNECT", 2.0)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 within 2 s"):
        pipeline.build(load_recipe(), tmp_path / "out", cluster="tcp://127.0.0.1:9")
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []  # no work was begun


def test_what_accepts_a_connection_and_says_nothing_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT", 1.0)
    monkeypatch.setattr(connection, "GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with (
            pytest.raises(ClusterError, match="Dask scheduler"),
            room.joined(f"tcp://127.0.0.1:{silent.getsockname()[1]}", nothing),
        ):
            pass
        assert time.monotonic() - begun < 30


def test_tls_without_certificates_is_told_at_once() -> None:
    with (
        pytest.raises(ClusterError, match=r"names no certificates\. Say distributed\.comm\.tls"),
        room.joined("tls://127.0.0.1:9", nothing),
    ):
        pass


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'edgeres\[cluster\]'"):
        pipeline.build(load_recipe(), tmp_path / "out", cluster="local")


def test_a_cluster_without_workers_is_told(
    scheduler: tuple[str, Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE", 1.0)
    told = pytest.raises(ClusterError, match="has no worker, and none came within 1 s")
    with told, room.joined(scheduler[0], nothing):
        pass


def other_edgeres(folder: Path) -> Path:
    """Return a place with an edgeres that is not quite this one."""
    shutil.copytree(PACKAGE, folder / "edgeres", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "edgeres/affine.py", "a", encoding="utf-8") as stream:
        stream.write("\nCHANGED = True\n")
    return folder


def no_edgeres(folder: Path) -> Path:
    (folder / "edgeres").mkdir(parents=True)
    (folder / "edgeres/__init__.py").write_text("raise ImportError('there is no edgeres here')\n")
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_edgeres, r"worker tcp://\S+: edgeres is 0\S+ \(sources \w+\) there and 0\S+ \(sources \w+\) here"),
        (no_edgeres, "no edgeres"),
    ],
    ids=["another", "none"],
)
def test_a_worker_with_another_edgeres_is_refused(
    scheduler: tuple[str, Path, subprocess.Popen[bytes]], tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    refused = pytest.raises(ClusterError, match=words)
    with worker(scheduler[1], make(tmp_path / "other")), refused as told, room.joined(scheduler[0], nothing):
        pass
    assert "pip install 'edgeres[cluster]'" in str(told.value)


def test_a_worker_that_cannot_read_the_samples_is_refused_and_what_ends_is_told(
    scheduler: tuple[str, Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One cluster for several questions: each takes seconds to start."""
    import fsspec

    monkeypatch.setattr(room, "PATIENCE", 3.0)
    for number, picture in enumerate(sorted((DIGITS / "calibration/3").glob("*.png"))[:3]):
        fsspec.filesystem("memory").pipe(f"/here/{number}.png", picture.read_bytes())
    one_frame = samples_from_arrays(np.zeros((1, 8, 8, 3), np.uint8))
    many = samples_from_arrays(np.zeros((200, 8, 8, 3), np.uint8))
    cuts = shards.cut(0, 200, 1, 1)
    lost: list[str] = []
    with worker(scheduler[1]) as child:
        monkeypatch.setattr(room, "PATIENCE", 90.0)
        with room.joined(scheduler[0], lost.append) as cluster:
            monkeypatch.setattr(room, "PATIENCE", 3.0)
            # this process's memory, which no other process sees
            with pytest.raises(ClusterError, match=r"workers cannot read .*memory://here.*worker tcp://.*no.*exist"):
                cluster.look(open_samples("memory://here"))

            # another version than at the start: a worker that joined, or was started anew, in the midst of it
            with monkeypatch.context() as patch:
                patch.setattr(shards, "facts", lambda: {"edgeres": "of another day"})
                with pytest.raises(ClusterError, match="there and of another day here"):
                    list(cluster._in_order(cluster_work.slow, (), one_frame, [(0, 1)]))

            # a processor that computes another last bit
            work = shards.Work("none", None, probe="")  # type: ignore[arg-type]
            monkeypatch.setattr(shards, "probed", lambda work: "these bits")
            monkeypatch.setitem(shards.MODELS, "none", b"")
            with pytest.raises(ClusterError, match="would not give the same bits"):
                cluster._work(b"model", work)

            # the only worker ends in the midst of it, and none takes its place
            begun = time.monotonic()
            results = cluster._in_order(cluster_work.slow, (), many, cuts)
            assert next(results)[1] == 1
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(ClusterError, match="has lost all its workers, and none came within 3 s"):
                list(results)
            assert time.monotonic() - begun < 60
            assert len(lost) == 1

            # and the scheduler
            results = cluster._in_order(cluster_work.slow, (), many, cuts)
            os.kill(scheduler[2].pid, signal.SIGKILL)
            scheduler[2].wait()
            with pytest.raises(ClusterError, match=r"does not answer any more|has dropped the work"):
                list(results)


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeres", "calibrate", "--out", str(tmp_path / "out"), "--cluster", "local:2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    with open(tmp_path / "said", "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        own = psutil.Process(child.pid)
        deadline, family = time.monotonic() + 120, []
        while len(family) < 3 and time.monotonic() < deadline:  # two workers, and what Python itself started
            family = own.children(recursive=True)
            time.sleep(0.05)
        time.sleep(1.0)
        family = own.children(recursive=True)
        assert len(family) >= 3, (tmp_path / "said").read_text()
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
        assert child.wait(timeout=60) == 130, (tmp_path / "said").read_text()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
        said = (tmp_path / "said").read_text()
        assert "interrupted; an earlier bundle is untouched" in said
        assert "Traceback" not in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_the_gate_says_the_same(tmp_path: Path) -> None:
    """From the command line, on a bundle, with a worker for each core; and a sample that cannot be read is told."""
    from edgeres.artifacts import to_data

    recipe = load_recipe(None, {"quantization.recovery": "none"})
    pipeline.build(recipe, tmp_path / "bundle")
    here = edgeres.validate(tmp_path / "bundle", DIGITS / "calibration")
    there = edgeres.validate(tmp_path / "bundle", DIGITS / "calibration", cluster="local:2")
    assert to_data(there) == to_data(here)
    shutil.copytree(DIGITS / "calibration", tmp_path / "samples")
    (tmp_path / "samples/3").joinpath("0000.png").write_bytes(b"none")
    with pytest.raises(EdgeresError, match=r"0000\.png"):
        edgeres.validate(tmp_path / "bundle", tmp_path / "samples", cluster="local:1")


def test_a_worker_takes_the_cores_that_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_share", None)
    every = provenance.cores()
    provenance.share_cores(1)
    assert provenance.cores() == 1
    provenance.share_cores(every + 7)
    assert provenance.cores() == every


class Told:
    """What stands for Dask's client and for a future: it says what Dask says in cases that cannot be made at will."""

    status = "finished"

    def __init__(self, problem: BaseException) -> None:
        self.problem = problem

    def result(self, timeout: float) -> None:
        raise self.problem

    def scheduler_info(self, n_workers: int = 5) -> dict[str, object]:
        names = [f"tcp://10.0.0.{number}:1" for number in range(7)]
        return {"workers": dict.fromkeys(names if n_workers < 0 else names[:n_workers])}


def test_another_decoder_within_the_same_pillow_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each shard is told, on whichever worker; only those that are there at the start show their pixels."""
    here = shards.facts.__wrapped__()
    monkeypatch.setattr("PIL.features.version", lambda name: "3.0.0" if name == "libjpeg_turbo" else "none")
    assert "libjpeg_turbo 3.0.0" in room.difference(here, shards.facts.__wrapped__())


@pytest.mark.parametrize(
    "found",
    [
        ([], ["0" * 64]),
        ([], ["0" * 64, "x"]),
        ([], ["0" * 64, 5]),
        ([], 3 * ["0" * 64]),
        (3 * ["bad"], []),
        (["x" * 10**6], []),
        (["bad"], 2 * ["0" * 64]),
        None,
        [[], [], []],
    ],
)
def test_what_a_worker_says_of_samples_is_bounded(found: object) -> None:
    with pytest.raises(ClusterError, match="looked at 2 samples"):
        room.looked_at(found, 2)
    assert room.looked_at(([], 2 * ("0" * 64,)), 2) == ((), 2 * ("0" * 64,))
    assert room.looked_at((["one is bad"], ()), 2) == (["one is bad"], ())


def test_logits_of_another_number_of_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is room for them: a worker says how many bytes that is."""
    cluster = room.Cluster(Told(OSError()), "here", nothing)  # type: ignore[arg-type]
    monkeypatch.setattr(cluster, "_work", lambda content, work: work._replace(probe=shards.Probe("bits", 10)))
    samples, plain = samples_from_arrays(np.zeros((2, 8, 8, 3), np.uint8)), Preprocessing((8, 8), 8)
    record = cpu.compile_engine(files.content_ref("m", b""), "fp32")
    for answer in (np.zeros((2, 11), np.float32), np.zeros((2, 10)), np.zeros((2, 10, 1), np.float32), "logits"):
        monkeypatch.setattr(cluster, "_in_order", lambda *_, answer=answer: [((0, 2), answer)])
        with pytest.raises(ClusterError, match=r"a worker answered .*, and not float32 \(2, 10\)"):
            cluster.answer(b"", record, samples, plain, nothing)


def test_all_workers_are_counted_also_where_dask_tells_of_five() -> None:
    cluster = room.Cluster(Told(OSError()), "here", nothing)  # type: ignore[arg-type]
    cluster._attend()
    assert len(cluster._known) == 7


def test_work_that_is_dropped_while_it_is_waited_for_is_told() -> None:
    from distributed.client import FutureCancelledError

    cluster = room.Cluster(Told(OSError()), "here", nothing)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="has dropped the work"):
        cluster._result(Told(FutureCancelledError("key", "scheduler-restart")))  # type: ignore[arg-type]


def test_workers_of_this_machine_that_are_late_or_too_many_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="would start 999 processes"), room.joined("local:999", nothing):
        pass
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    monkeypatch.setattr(connection.LocalCluster, "scale", lambda self, count: None)
    with pytest.raises(ClusterError, match="did not all start within"), room.joined("local:1", nothing):
        pass
