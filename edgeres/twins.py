"""Open a bundle's engine and the models that it has to beat, and have them measured in turns: what ``bench`` is."""

from __future__ import annotations

import importlib.util
import os
import platform
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import msgspec
import numpy as np

from edgeres.artifacts import Engine, Manifest, Preprocessing
from edgeres.benchmark import Pace, answer, minding, speedup, summarize, take_turns
from edgeres.board import Reading, open_board, resident_bytes
from edgeres.board import summarize as summarize_board
from edgeres.bundle import Folder, read_manifest, read_verified
from edgeres.cpu_settings import THREADS
from edgeres.errors import BackendError, MissingPackageError
from edgeres.judge import fp32_record
from edgeres.measurements import Benchmark, BoardState, Latency, Memory
from edgeres.preprocess import prepare_batch
from edgeres.provenance import cores, version
from edgeres.runtime.engine import LoadedEngine
from edgeres.runtime.loading import load, open_record
from edgeres.signatures import Keys

T = TypeVar("T")
Watch = Callable[[int, int], None]

BATCHES = (1, 8, 32)
CPUINFO = Path("/proc/cpuinfo")
BUSY = 0.5
"""The load average, per core, from which a benchmark says that the machine was not idle."""


class Settings(NamedTuple):
    """What to measure. ``batches`` None: 1, 8 and 32, as far as the engine takes them. ``frames`` (height, width) adds
    uint8 camera frames of that size; ``against`` is another bundle to beat; ``alone`` leaves the float twin out.
    ``trusted_keys`` are as of :func:`edgeres.load`, for both bundles; ``cuda_graphs`` too, for all engines."""

    backend: str = "auto"
    batches: Optional[Tuple[int, ...]] = None
    pace: Pace = Pace()
    threads: Optional[int] = None
    frames: Optional[Tuple[int, int]] = None
    against: Optional[Folder] = None
    alone: bool = False
    trusted_keys: Optional[Keys] = None
    cuda_graphs: bool = False


class Entrant(NamedTuple):
    """What takes turns: its name, the engine, and the batches that it is given, by their size."""

    name: str
    engine: LoadedEngine
    inputs: Dict[int, np.ndarray]


def bench_bundle(
    bundle: Folder, settings: Optional[Settings] = None, watch: Watch = lambda done, total: None
) -> Benchmark:
    """Return how fast a bundle's engine is, beside its float twin on the same backend. The bundle is verified and not
    changed.

    Raises:
        BundleError: the bundle is damaged or has no such engine.
        BackendError: an engine does not open or run here, or takes other inputs than what it is compared with.
        SampleError: no input of the engine can be made of frames of that size.
    """
    settings = settings or Settings()
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with ExitStack() as held:
        meter = Meter(_device_memory(bundle, settings, held))
        engine = meter.watch("", lambda: _load(bundle, settings.backend, settings))
        held.callback(engine.close)
        record = engine.record
        meter.rename("", record.precision)
        engines = {record.precision: engine}
        for name, opening in _twins(bundle, engine, settings).items():
            engines[name] = held.enter_context(closing(meter.watch(name, opening)))
        batches = settings.batches or tuple(size for size in BATCHES if size <= _most(engine))
        entrants = _entrants(engines, batches, settings.frames)
        for one in entrants[: len(engines)]:
            meter.watch(one.name, partial(one.engine, one.inputs[max(batches)]))
        latencies, states = _measured(entrants, batches, settings.pace, watch)
        resident = resident_bytes()
    by_name = {(found.model, found.batch): found for found in latencies}
    twins = [name for name in engines if name != record.precision]
    speedups = [speedup(by_name[record.precision, size], by_name[name, size]) for size in batches for name in twins]
    place = "this CPU" if record.backend == "cpu" else f"this {record.target}"
    return Benchmark(
        bundle=os.fspath(bundle),
        target=record.target,
        backend=record.backend,
        precision=record.precision,
        input_shape=engine.input_shape,
        threads=settings.threads,
        host=_host(record, load_average),
        latencies=tuple(latencies),
        speedups=tuple(speedups),
        memory=meter.growth,
        resident_bytes=resident,
        board=tuple(states),
        answers=tuple(answer(found, place) for found in speedups),
        notes=(
            *_without_twin(bundle, record, settings, twins),
            *_takes(engines),
            *(_recorded(engines) if settings.cuda_graphs else ()),
            *(note for name, one in engines.items() for note in _pieces(name, one, batches)),
            *_busy(load_average),
            *minding(latencies),
        ),
        engine_sha256=record.file.sha256,
    )


class Meter:
    """Tells by how much memory grows while something is done: the process's own, and a device's if its is told.

    ``growth`` is by name. What one model leaves free another may use again, so the first one's is the surest.
    """

    def __init__(self, free_on_device: Optional[Callable[[], int]] = None) -> None:
        self._free_on_device = free_on_device
        self.growth: Dict[str, Memory] = {}

    def watch(self, name: str, action: Callable[[], T]) -> T:
        """Return what ``action`` returns, and add what memory grew by to ``name``."""
        before = self._look()
        result = action()
        after = self._look()
        grown = [None if a is None or b is None else b - a for a, b in zip(before, after)]
        earlier = self.growth.get(name)
        if earlier is not None:
            known = (earlier.resident_bytes, earlier.device_bytes)
            grown = [None if a is None or b is None else a + b for a, b in zip(known, grown)]
        self.growth[name] = Memory(*grown)
        return result

    def rename(self, old: str, new: str) -> None:
        """Give what was watched its name, once that is known."""
        self.growth[new] = self.growth.pop(old)

    def _look(self) -> Tuple[Optional[int], Optional[int]]:
        return resident_bytes(), None if self._free_on_device is None else -self._free_on_device()


def _load(bundle: Folder, backend: str, settings: Settings) -> LoadedEngine:
    return load(bundle, backend, settings.threads, settings.cuda_graphs, trusted_keys=settings.trusted_keys)


def _device_memory(bundle: Folder, settings: Settings, held: ExitStack) -> Optional[Callable[[], int]]:
    """Return what tells the free bytes of the GPU that a bundle's engine will run on; None for the CPU, and where no
    GPU opens, of which loading the engine will tell. It opens before anything is measured: CUDA itself needs memory."""
    engines, backend = read_manifest(bundle, settings.trusted_keys).engines, settings.backend
    record = next((one for one in engines if backend in ("auto", one.backend, one.target)), None)
    if record is None:
        return None
    if record.backend == "cpu":
        if importlib.util.find_spec("onnxruntime") is not None:
            import edgeres.backends.cpu  # noqa: F401  the package's own memory is not the engine's
        return None
    from edgeres.backends.tensorrt.device import open_device

    with suppress(BackendError, MissingPackageError):
        device = held.enter_context(closing(open_device()))
        return lambda: device.memory()[0]
    return None


def _twins(bundle: Folder, engine: LoadedEngine, settings: Settings) -> Dict[str, Callable[[], LoadedEngine]]:
    """Return what an engine has to beat, by name, as functions that open it: its FP32 model on the CPU, engines of
    another precision for the same backend, and the bundle that was named."""
    record, manifest = engine.record, engine.manifest
    records = [r for r in manifest.engines if r.backend == record.backend and r.precision != record.precision]
    if record.backend == "cpu" and record.precision != "fp32":
        from edgeres.backends import cpu

        options = {**cpu.options_for("fp32"), **{k: v for k, v in record.options.items() if k == THREADS}}
        records = [msgspec.structs.replace(fp32_record(manifest), options=options)]
    found: Dict[str, Callable[[], LoadedEngine]] = {}
    for twin in () if settings.alone else records:
        found[twin.precision] = partial(_open_twin, bundle, manifest, twin, settings)
    if settings.against is not None:
        other = read_manifest(settings.against, settings.trusted_keys)
        name = f"{other.precision} of {os.fspath(settings.against)}"
        found[name] = partial(_load, settings.against, record.target, settings)
    return found


def _open_twin(bundle: Folder, manifest: Manifest, record: Engine, settings: Settings) -> LoadedEngine:
    content = read_verified(bundle, record.file)
    runner = open_record(content, record, settings.threads, os.fspath(bundle), settings.cuda_graphs)
    return LoadedEngine(runner, manifest, record)


def _without_twin(bundle: Folder, record: Engine, settings: Settings, twins: Sequence[str]) -> List[str]:
    if twins or settings.alone or record.precision == "fp32":
        return []
    return [
        f"the bundle holds no other engine for {record.backend}, so whether {record.precision.upper()} pays is not "
        f"known. Make one in FP16, edgeres build {bundle} --precision fp16 --out OTHER; compile it here, "
        f"edgeres compile OTHER; and compare: edgeres bench {bundle} --against OTHER"
    ]


def _entrants(
    engines: Dict[str, LoadedEngine], batches: Sequence[int], size: Optional[Tuple[int, int]]
) -> List[Entrant]:
    """Return who takes turns: every engine on what it takes, normalized input or frames that are only cropped; and the
    first one on uint8 frames too, if their size is given. All see random pixels."""
    shapes = {name: engine.input_shape for name, engine in engines.items()}
    if len(set(shapes.values())) > 1:
        words = "; ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise BackendError(f"engines of different input shapes cannot be compared ({words}). Name another --against.")
    (first, engine), *_ = engines.items()
    frame = engine.manifest.preprocessing
    frames = _noise(max(batches), size or _ready(frame))
    floats = prepare_batch(frames, frame)
    entrants = []
    for name, one in engines.items():
        takes = floats if one.record.input == "float32" else _noise(len(floats), _ready(one.manifest.preprocessing))
        entrants.append(Entrant(name, one, {n: takes[:n] for n in batches}))
    if size is not None:
        entrants.append(Entrant(f"{first} from {size[0]}×{size[1]} frames", engine, {n: frames[:n] for n in batches}))
    return entrants


def _ready(frame: Preprocessing) -> Tuple[int, int]:
    """Return (height, width) of frames that are not resampled."""
    return (frame.resize, frame.resize) if frame.resize else frame.size


def _noise(count: int, size: Tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def _takes(engines: Dict[str, LoadedEngine]) -> List[str]:
    """Return what to say where not all engines take the same."""
    kinds = {name: engine.record.input for name, engine in engines.items()}
    if len(set(kinds.values())) == 1:
        return []
    told = ", ".join(f"the {name} engine {kind}" for name, kind in kinds.items())
    return [f"each engine was given what it takes: {told}; a pixel is a quarter of the bytes of a normalized number"]


def _recorded(engines: Dict[str, LoadedEngine]) -> List[str]:
    return [f"CUDA graphs of the {name} engine: {engine.cuda_graphs}" for name, engine in engines.items()]


def _measured(
    entrants: Sequence[Entrant], batches: Sequence[int], pace: Pace, watch: Watch
) -> Tuple[List[Latency], List[BoardState]]:
    """Return each entrant's latencies, and the state of the board, batch size by batch size."""
    latencies: List[Latency] = []
    states: List[BoardState] = []
    board = open_board()
    for index, size in enumerate(batches):
        readings: List[Reading] = []

        def between(done: int, total: int, index: int = index, readings: List[Reading] = readings) -> None:
            readings.append(board.read())
            watch(index * total + done, len(batches) * total)

        rounds = take_turns({one.name: partial(one.engine, one.inputs[size]) for one in entrants}, pace, between)
        latencies.extend(summarize(name, size, found) for name, found in rounds.items())
        states.append(summarize_board(size, readings))
    return latencies, states


def _most(engine: LoadedEngine) -> int:
    """Return how many frames an engine computes at once; more are computed one piece after the other."""
    return engine.largest or engine.manifest.preprocessing.batch_size


def _pieces(name: str, engine: LoadedEngine, batches: Sequence[int]) -> List[str]:
    larger = ", ".join(str(size) for size in batches if size > _most(engine))
    return (
        [f"the {name} engine computes {_most(engine)} frames at once: batch {larger} is several of its calls"]
        if larger
        else []
    )


def _busy(load_average: Optional[float]) -> List[str]:
    if load_average is None or load_average < BUSY * cores():
        return []
    return [
        f"other programs were at work before (load average {load_average:.1f}, {cores()} cores) and may have been "
        "since: they lengthen latencies and widen intervals. The models took turns, so ratios hold for this load."
    ]


def _host(record: Engine, load_average: Optional[float]) -> Dict[str, str]:
    """Return what the figures belong to."""
    packages = {"cpu": ("onnxruntime",), "tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt-rtx",)}
    versions = {name: version(name) for name in ("edgeres", "numpy", *packages.get(record.backend, ()))}
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(cores()),
        "load_average": None if load_average is None else f"{load_average:.2f}",
        "python": platform.python_version(),
        **versions,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _processor() -> str:
    """Return what the processor calls itself; empty where it does not."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return ""
