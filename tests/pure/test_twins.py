"""What is opened to be compared, and what is said where there is nothing; engines are doubles, nothing is timed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional

import msgspec
import numpy as np
import pytest

from edgeres import twins
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, from_json, to_json
from edgeres.benchmark import Pace
from edgeres.errors import BackendError
from edgeres.measurements import Benchmark, Memory
from edgeres.runtime.engine import LoadedEngine
from edgeres.twins import Meter, Settings, bench_bundle

SHORT = Pace(runs=6, warmup=0.0)
PAIRS = (("cpu", "cpu"), ("gpu", "tensorrt"))  # targets and their backends


class Runner:
    """A GPU backend's open engine; keeps the shapes of what it was given."""

    contexts, classes = 1, 10

    def __init__(self, largest: Optional[int], cuda_graphs: bool = False) -> None:
        self.largest = largest
        self.cuda_graphs = "on" if cuda_graphs else "off"
        self.given: List[Any] = []
        self.closed = False

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.given.append(batch.shape)
        return np.zeros((len(batch), 10), np.float32)

    def fill(self, batch: Any, out: Any) -> None:
        out[:] = self(batch)

    def close(self) -> None:
        self.closed = True


def engine(precision: str, backend: str = "tensorrt") -> Engine:
    file = FileRef(f"engines/{precision}.engine", "", 0)
    return Engine("gpu", backend, precision, file, {"tensorrt": "10.3.0"}, {})


def manifest(*engines: Engine, size: int = 8) -> Manifest:
    return Manifest("net", engines[0].precision, {}, Preprocessing((size, size)), (), {}, {}, engines)


class Bundles:
    """Bundles by name, in the place of folders; ``opened`` are the runners of all engines that were opened."""

    def __init__(self, **manifests: Manifest) -> None:
        self.manifests = manifests
        self.opened: Dict[str, Runner] = {}

    def load(self, bundle: str, backend: str, settings: Settings) -> LoadedEngine:
        found = self.manifests[bundle]
        return self.open(bundle, found, found.engines[0], settings)

    def open(self, bundle: str, found: Manifest, record: Engine, settings: Settings) -> LoadedEngine:
        runner = self.opened[f"{bundle}/{record.precision}"] = Runner(4, settings.cuda_graphs)
        return LoadedEngine(runner, found, record)


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundles:
    made = Bundles(
        int8=manifest(engine("int8")),
        fp16=manifest(engine("fp16")),
        both=manifest(engine("int8"), engine("fp16")),
        large=manifest(engine("fp16"), size=16),
    )
    monkeypatch.setattr(twins, "read_manifest", lambda bundle, trusted_keys: made.manifests[bundle])
    monkeypatch.setattr(twins, "_load", made.load)
    monkeypatch.setattr(twins, "_open_twin", made.open)
    monkeypatch.setattr(twins, "_device_memory", lambda bundle, backend, held: None)
    return made


def test_a_bundle_without_a_float_engine_says_what_to_type(bundles: Bundles) -> None:
    found = bench_bundle("int8", Settings(pace=SHORT))
    assert (found.speedups, found.answers) == ((), ())
    assert "--precision fp16" in found.notes[0]
    assert "--against" in found.notes[0]
    alone = bench_bundle("int8", Settings(pace=SHORT, alone=True))
    assert not any("--against" in text for text in alone.notes)


def test_another_precision_in_the_bundle_is_a_twin(bundles: Bundles) -> None:
    found = bench_bundle("both", Settings(pace=SHORT))
    assert [(s.model, s.against, s.batch, s.rounds) for s in found.speedups] == [("int8", "fp16", 1, 6)]
    assert [(x.model, x.batch, x.calls) for x in found.latencies] == [("int8", 1, 6), ("fp16", 1, 6)]
    assert set(found.memory) == {"int8", "fp16"}
    assert all(runner.closed for runner in bundles.opened.values())
    assert "this gpu" in found.answers[0]


def test_another_bundle_is_compared_with(bundles: Bundles) -> None:
    found = bench_bundle("both", Settings(pace=SHORT, against="fp16", alone=True))
    assert [s.against for s in found.speedups] == ["fp16 of fp16"]
    assert set(bundles.opened) == {"both/int8", "fp16/fp16"}


@pytest.mark.parametrize("wanted", [False, True])
def test_cuda_graphs_are_for_all_or_for_none(bundles: Bundles, wanted: bool) -> None:
    found = bench_bundle("both", Settings(pace=SHORT, against="fp16", cuda_graphs=wanted))
    assert {runner.cuda_graphs for runner in bundles.opened.values()} == {"on" if wanted else "off"}
    told = [note for note in found.notes if "CUDA graphs" in note]
    assert len(told) == (len(bundles.opened) if wanted else 0)
    assert all(note.endswith(": on") for note in told)


def test_batches_are_those_that_the_engine_computes_at_once(bundles: Bundles) -> None:
    usual = bench_bundle("int8", Settings(pace=SHORT))
    assert {x.batch for x in usual.latencies} == {1}  # of 1, 8 and 32 an engine for 4 takes the first
    wanted = bench_bundle("int8", Settings(pace=SHORT, batches=(2, 6)))
    assert [x.batch for x in wanted.latencies] == [2, 6]
    assert any("4 frames at once" in text and "batch 6 " in text for text in wanted.notes)
    assert set(bundles.opened["int8/int8"].given) == {(2, 3, 8, 8), (4, 3, 8, 8)}


def test_frames_go_through_the_preprocessing(bundles: Bundles) -> None:
    found = bench_bundle("both", Settings(pace=SHORT, batches=(3,), frames=(10, 12)))
    assert [x.model for x in found.latencies] == ["int8", "fp16", "int8 from 10×12 frames"]
    assert set(bundles.opened["both/int8"].given) == {(3, 3, 8, 8)}
    assert [s.against for s in found.speedups] == ["fp16"]


def test_each_engine_is_given_what_it_takes(bundles: Bundles) -> None:
    pixels = msgspec.structs.replace(engine("int8"), input="uint8")
    bundles.manifests["pixels"] = manifest(pixels, engine("fp16"))
    found = bench_bundle("pixels", Settings(pace=SHORT, batches=(3,)))
    assert set(bundles.opened["pixels/int8"].given) == {(3, 8, 8, 3)}
    assert set(bundles.opened["pixels/fp16"].given) == {(3, 3, 8, 8)}
    assert any("the int8 engine uint8, the fp16 engine float32" in note for note in found.notes)


def test_inputs_of_different_shapes_are_not_compared(bundles: Bundles) -> None:
    with pytest.raises(BackendError, match="different input shapes"):
        bench_bundle("int8", Settings(pace=SHORT, against="large"))
    assert all(runner.closed for runner in bundles.opened.values())


def test_a_busy_machine_is_named(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "cores", lambda: 4)
    for load, said in ((0.3, False), (3.0, True)):
        monkeypatch.setattr(twins.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        found = bench_bundle("int8", Settings(pace=SHORT))
        assert any("other programs" in text for text in found.notes) is said
        assert found.host["load_average"] == f"{load:.2f}"


def test_progress_reaches_its_end(bundles: Bundles) -> None:
    told: List[Any] = []
    bench_bundle("int8", Settings(pace=SHORT, batches=(1, 2)), lambda done, total: told.append((done, total)))
    assert told == [(number + 1, 12) for number in range(12)]


def test_the_result_is_plain_data_and_comes_back(bundles: Bundles) -> None:
    found = bench_bundle("both", Settings(pace=SHORT))
    assert from_json(to_json(found), Benchmark, "bench.json") == found
    assert msgspec.to_builtins(found)["speedups"][0]["verdict"] in ("faster", "slower", "undecided")


def test_memory_is_added_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, free = iter([100, 130, 130, 135, 135, None]), iter([1000, 900, 900, 880, 880, 870])
    monkeypatch.setattr(twins, "resident_bytes", lambda: next(resident))
    meter = Meter(lambda: next(free))
    assert meter.watch("int8", lambda: "opened") == "opened"
    meter.watch("int8", lambda: "run")
    assert meter.growth == {"int8": Memory(35, 120)}
    meter.watch("int8", lambda: "run")
    assert meter.growth == {"int8": Memory(None, 130)}


def test_device_memory_is_asked_of_an_open_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        closed = False

        def memory(self) -> Any:
            return 700, 1000

        def close(self) -> None:
            Gpu.closed = True

    def none_there() -> Gpu:
        raise BackendError("the NVIDIA driver shows no GPU")

    cpu, gpu = (Engine(name, kind, "int8", FileRef("", "", 0), {}, {}) for name, kind in PAIRS)
    monkeypatch.setattr(twins, "read_manifest", lambda bundle, trusted_keys: manifest(cpu, gpu))
    monkeypatch.setattr("edgeres.backends.tensorrt.device.open_device", Gpu)
    with ExitStack() as held:
        assert twins._device_memory("net", Settings("auto"), held) is None  # the first engine is the CPU's
        assert twins._device_memory("net", Settings("dla0"), held) is None  # loading will say that there is none
        free = twins._device_memory("net", Settings("gpu"), held)
        assert free is not None
        assert (free(), Gpu.closed) == (700, False)
    assert Gpu.closed
    monkeypatch.setattr("edgeres.backends.tensorrt.device.open_device", none_there)
    with ExitStack() as held:
        assert twins._device_memory("net", Settings("tensorrt"), held) is None
