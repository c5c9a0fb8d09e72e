"""With a cluster comes out what comes out without one, to the bit: however many workers, whoever dies, in any order."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_work
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres import cluster as room
from edgeres import files, pipeline, provenance, shards
from edgeres.artifacts import Preprocessing, to_json
from edgeres.calibrate import Statistics, choose
from edgeres.errors import ClusterError, SampleError
from edgeres.progress import Progress
from edgeres.recipe import dossier, load_recipe
from edgeres.samples import open_samples, samples_from_arrays
from edgeres.workforce import Alone, Observation

SIZE = 32
DIGITS = dossier() / "digits"
PLAIN = Preprocessing((SIZE, SIZE), SIZE)


def nothing(*told: object) -> None:
    """Watch, keep and warn to nobody."""


def workers() -> set[int]:
    """Return the process ids of all workers that this process has started."""
    own = psutil.Process().children(recursive=True)
    return {one.pid for one in own if "spawn_main" in " ".join(one.cmdline())}


def of_wanted(workforce: Alone | room.Cluster, wanted: Observation, frames: np.ndarray, watch=nothing) -> bytes:
    return workforce.observe(wanted, samples_from_arrays(frames), watch, None, nothing).to_bytes()


@pytest.fixture(scope="module")
def wanted(net: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Observation:
    """What a calibration pass over a small net with random weights counts."""
    made = net("cifar")
    path = tmp_path_factory.mktemp("net") / files.FP32_MODEL
    path.write_bytes(made.exported.content)
    return Observation(path, tuple(sorted(made.placement.tensors)), PLAIN)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (64 * 10 + 5, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def alone(wanted: Observation, frames: np.ndarray) -> bytes:
    """The statistics of one machine."""
    return of_wanted(Alone(), wanted, frames)


@pytest.fixture(scope="module")
def two() -> Iterator[room.Cluster]:
    with room.joined("local:2", nothing) as cluster:
        yield cluster


def test_four_workers_count_the_same(wanted: Observation, frames: np.ndarray, alone: bytes) -> None:
    before = workers()
    with room.joined("local:4", nothing) as cluster:
        assert of_wanted(cluster, wanted, frames) == alone
        assert cluster.shards == 11
    assert workers() == before


def test_two_workers_count_the_same(two: room.Cluster, wanted: Observation, frames: np.ndarray, alone: bytes) -> None:
    assert of_wanted(two, wanted, frames) == alone


def test_a_worker_that_is_killed_changes_nothing(wanted: Observation, frames: np.ndarray, alone: bytes) -> None:
    """The only one, at that: what it had been sent and had not given back is sent again to the one in its place."""
    lost: list[str] = []

    def kill(done: int, total: int) -> None:
        if not struck and done < total:
            struck.extend(workers() - before)
            os.kill(struck[0], signal.SIGKILL)

    before = workers()
    struck: list[int] = []
    with room.joined("local:1", lost.append) as cluster:
        assert of_wanted(cluster, wanted, frames) == alone
        found = of_wanted(cluster, wanted, frames, kill)
        assert struck
        deadline = time.monotonic() + 30
        while not lost and time.monotonic() < deadline:
            time.sleep(room.TICK)
            cluster._attend()
    assert found == alone
    assert len(lost) == 1
    assert "was lost" in lost[0]


@pytest.fixture(scope="module")
def parts(wanted: Observation, frames: np.ndarray) -> list[bytes]:
    """The statistics of each batch by itself."""
    samples = samples_from_arrays(frames)
    cuts = shards.cut(0, len(samples), PLAIN.batch_size, 1)
    return [Alone().observe(wanted, samples.part(*one), nothing, None, nothing).to_bytes() for one in cuts]


@settings(max_examples=30)
@given(data=st.data())
def test_statistics_put_together_in_any_way_are_the_same(parts: list[bytes], alone: bytes, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(parts))))
    groups = data.draw(st.lists(st.integers(1, 5), min_size=len(parts), max_size=len(parts)))
    heaps = []
    rest = [Statistics.from_bytes(parts[place], "part") for place in order]
    for size in groups:  # some are put together first, as by a worker, and then all of these
        heap, rest = rest[:size], rest[size:]
        for other in heap[1:]:
            heap[0].merge(other)
        heaps += heap[:1]
    whole = Statistics.empty(heaps[0].tensors)
    for heap in heaps:
        whole.merge(heap)
    assert whole.to_bytes() == alone


def test_equal_statistics_have_equal_ranges(parts: list[bytes], alone: bytes) -> None:
    """The table holds nothing else of the samples than their hashes; so it is the same, byte for byte."""
    whole = Statistics.empty(Statistics.from_bytes(alone, "alone").tensors)
    for one in reversed(parts):
        whole.merge(Statistics.from_bytes(one, "part"))
    assert to_json(choose(whole, "auto", 99.99)) == to_json(
        choose(Statistics.from_bytes(alone, "alone"), "auto", 99.99)
    )


def test_a_shard_that_is_left_out_or_counted_twice_is_another_table(parts: list[bytes], alone: bytes) -> None:
    for chosen in (parts[1:], [*parts, parts[0]]):
        whole = Statistics.empty(Statistics.from_bytes(alone, "alone").tensors)
        for one in chosen:
            whole.merge(Statistics.from_bytes(one, "part"))
        assert whole.to_bytes() != alone


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 64), st.integers(1, 2000))
def test_shards_are_whole_batches_and_all_there_is(start: int, more: int, batch: int, most: int) -> None:
    cuts = shards.cut(start, start + more, batch, most)
    assert [place for one in cuts for place in range(*one)] == list(range(start, start + more))
    assert all((begin - start) % batch == 0 and end - begin <= max(most, batch) for begin, end in cuts)


class Striking(Progress):
    """Kills a worker as soon as a stage has done something; tells what was warned of."""

    def __init__(self, stage: str) -> None:
        self.wanted, self.running, self.struck, self.before = stage, "", 0, workers()
        self.warnings: list[str] = []

    def stage(self, name: str, text: str) -> None:
        self.running = name

    def advance(self, done: int, total: int) -> None:
        if self.running == self.wanted and not self.struck:
            self.struck = min(workers() - self.before)
            os.kill(self.struck, signal.SIGKILL)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_whole_build_with_killed_workers_is_the_same_bundle(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = load_recipe(None, {"quantization.recovery": "none"})  # which takes its time, on this machine alone
    wanted = pipeline.build(recipe, here).manifest
    striking = Striking("observe")
    made = pipeline.build(recipe, there, progress=striking, cluster="local:2")
    assert striking.struck
    for name in (files.TABLE, files.STATISTICS, files.REFERENCE, files.REPORT, files.model_file("int8")):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert made.manifest.report == wanted.report
    assert workers() == striking.before


def test_answers_of_many_are_the_answers_of_one(two: room.Cluster, wanted: Observation, frames: np.ndarray) -> None:
    from edgeres.backends import cpu

    content = wanted.model.read_bytes()
    record = cpu.compile_engine(files.content_ref(files.FP32_MODEL, content), "fp32")
    samples = samples_from_arrays(frames)
    here, there = (one.answer(content, record, samples, PLAIN, nothing) for one in (Alone(), two))
    assert here.tobytes() == there.tobytes()
    assert here.shape == (len(frames), 10)


def test_files_are_read_by_the_workers_and_hashed_there(two: room.Cluster) -> None:
    samples, wanted = (open_samples(DIGITS / "calibration") for _ in range(2))
    before = two.received
    assert two.look(samples) == []
    assert samples._hashes.keys() == set(range(len(samples)))
    assert samples.sample_set() == wanted.sample_set()
    assert two.received == before  # no pixel came here


def test_arrays_are_not_sent_to_be_hashed(two: room.Cluster, frames: np.ndarray) -> None:
    before = two.shards
    assert two.look(samples_from_arrays(frames)) == []
    assert two.shards == before


def test_all_that_cannot_be_read_is_told(two: room.Cluster, tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes((DIGITS / "calibration/3").glob("*.png").__next__().read_bytes())
    (tmp_path / "2.png").write_bytes(b"none")
    (tmp_path / "5.png").write_bytes(b"none")
    samples = open_samples(tmp_path)
    told = two.look(samples)
    assert len(told) == 2
    assert "2.png" in told[0]
    assert "5.png" in told[1]


def test_a_file_that_changed_after_it_was_looked_at_is_refused(
    two: room.Cluster, wanted: Observation, tmp_path: Path
) -> None:
    pictures = sorted((DIGITS / "calibration/3").glob("*.png"))
    for number, picture in enumerate(pictures[:3]):
        (tmp_path / f"{number}.png").write_bytes(picture.read_bytes())
    samples = open_samples(tmp_path)
    assert two.look(samples) == []
    (tmp_path / "1.png").write_bytes(pictures[4].read_bytes())
    with pytest.raises(SampleError, match=r"worker tls://.*1\.png.*another file"):
        two.observe(wanted, samples, nothing, None, nothing)


def test_what_kills_every_worker_is_told(two: room.Cluster) -> None:
    samples = samples_from_arrays(np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ClusterError, match="workers died over the same samples"):
        list(two._in_order(cluster_work.die, (), samples, [(0, 1)]))
    assert [result for _, result in two._in_order(cluster_work.slow, (), samples, [(0, 2), (2, 3)])] == [2, 1]


def test_each_client_takes_back_its_own_models(
    wanted: Observation, frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two on one cluster, in this process, where one can look: the first to leave leaves the other its model."""
    import onnx
    from distributed import Client, LocalCluster

    monkeypatch.setattr(provenance, "_share", None)  # which a worker sets
    other = onnx.load(wanted.model)
    other.doc_string = "another"
    onnx.save(other, tmp_path / "other.onnx")
    with contextlib.ExitStack() as held:
        port = {"dashboard_address": "127.0.0.1:0"}
        options = {"processes": False, "dashboard_address": None, "scheduler_kwargs": port}
        one = held.enter_context(LocalCluster(1, threads_per_worker=1, **options))
        clients = [held.enter_context(Client(one, set_as_default=False)) for _ in range(2)]
        first, second = (room.Cluster(client, "here", nothing) for client in clients)
        for cluster in (first, second):
            of_wanted(cluster, wanted, frames[:3])
        first.leave()
        of_wanted(second, wanted, frames[:3])
        assert list(shards.MODELS.values()) == [wanted.model.read_bytes()]
        of_wanted(second, wanted._replace(model=tmp_path / "other.onnx"), frames[:3])  # of which one is held at a time
        assert list(shards.MODELS.values()) == [(tmp_path / "other.onnx").read_bytes()]
        second.leave()
        assert shards.MODELS == {}
