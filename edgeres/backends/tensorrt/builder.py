"""ONNX → plan, in this process: one code path on the interface that TensorRT 8.5 to 11 share."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import msgspec

from edgeres.backends.tensorrt import timing_cache
from edgeres.backends.tensorrt.frames import Frames, frames_for
from edgeres.backends.tensorrt.layers import layers_from_inspector, layers_from_log
from edgeres.backends.tensorrt.logger import Record, make_logger
from edgeres.backends.tensorrt.module import load_module, member, words
from edgeres.backends.tensorrt.monitor import Report, Watch, make_monitor
from edgeres.backends.tensorrt.network import add_profile, check_network, create_network, parse
from edgeres.backends.tensorrt.place import here
from edgeres.backends.tensorrt.records import BuildRequest, BuildResult, EngineLayer
from edgeres.backends.tensorrt.settings import (
    HARDWARE_LEVEL,
    check_level,
    check_request,
    choose_device,
    choose_form,
    configure,
    pin_half,
    set_calibration,
)
from edgeres.errors import BackendError
from edgeres.files import sha256_bytes, write_atomic

ADVICE: Tuple[Tuple[str, str], ...] = (
    ("workspace limit", "Give the builder more workspace, or leave the limit out."),
    ("insufficient memory", "Give the builder more workspace, close other programs, or lower the largest batch."),
    ("out of memory", "Close other programs, lower the largest batch, or give the builder less workspace."),
    ("outofmemory", "Close other programs, lower the largest batch, or give the builder less workspace."),
    (
        "could not find any implementation",
        "Keep that layer out of int8 in the recipe, or give the builder more workspace.",
    ),
    ("driver version is insufficient", "The NVIDIA driver is missing or too old: edgeres doctor"),
    ("cuda initialization failure", "There is no GPU here that this TensorRT can use: edgeres doctor"),
    ("no cuda-capable device", "There is no GPU here that this TensorRT can use: edgeres doctor"),
)
"""By what TensorRT said, in lower case, what to do about it."""

DISOBEYED = ("obeys the requested constraints",)
"""Warnings that a layer does not run in the precision that it was pinned to."""

WRONG = ("Defaulting to INT8 instead",)
"""Warnings behind which an engine computes wrong numbers: a uint8 tensor read as int8."""

FALLBACK = ("falling back to GPU", "Switching to GPU fallback")
"""Warnings that a layer does not run on the DLA that it was built for."""

UNKNOWN_GPU = (
    "the engine fits this machine's GPU alone, but nothing here can tell which that is, so nothing will check it; "
    "install cuda-bindings or pycuda and compile again"
)

_ONE_AT_A_TIME = threading.Lock()
"""A process has one logger of TensorRT: what two builds say could not be told apart."""

Surroundings = Callable[[Any], Dict[str, str]]
"""From the loaded package to what its plans fit here; see :func:`edgeres.backends.tensorrt.place.here`."""


class _Bench(NamedTuple):
    """What a build works with. ``kept`` holds, in order of making, what must live until the build has returned;
    ``frames`` is the form of the model that takes pixels, where that is wanted."""

    trt: Any
    request: BuildRequest
    frames: Optional[Frames]
    record: Record
    watch: Watch
    warnings: List[str]
    kept: List[Any]


def build_plan(
    request: BuildRequest, progress: Report, cancelled: Callable[[], bool], surroundings: Surroundings = here
) -> BuildResult:
    """Build one engine and write its plan, whole or not at all.

    Args:
        request: what to build.
        progress: called with a phase of the builder, its steps done and all its steps; from TensorRT 10 on.
        cancelled: asked before the build and, from TensorRT 10 on, after every step of it.
        surroundings: says what a plan built here fits.

    Raises:
        MissingPackageError: TensorRT is not installed.
        BackendError: TensorRT refuses the request or the model, the build fails, or it was cancelled.
        BundleError: the plan cannot be written, or the bundle lacks the form of the model that this TensorRT reads.
        CalibrationError: a range is none.
    """
    started = time.monotonic()
    trt = load_module(request.flavour)
    request = choose_form(trt, request)
    check_request(trt, request)
    frames = frames_for(request)
    if frames is not None:
        request = msgspec.structs.replace(request, input_name=frames.input, shape=(*request.shape[1:], 3))
    bench = _Bench(trt, request, frames, Record((*WRONG, *DISOBEYED, *FALLBACK)), Watch(progress, cancelled), [], [])
    if cancelled():
        raise _cancelled(request)
    with _ONE_AT_A_TIME:
        try:
            built_for = {**surroundings(trt), **_promised(request)}
            content = _built(bench, built_for)
            layers = _layers(bench, content, bool(built_for.get("device")))
        finally:
            while bench.kept:  # what was made last goes first
                bench.kept.pop()
    if not built_for.get("compute_capability"):
        bench.warnings.append(UNKNOWN_GPU)
    write_atomic(request.plan, content)
    told = dict.fromkeys([*bench.record.errors, *bench.record.noticed(*DISOBEYED, *FALLBACK)])
    bench.warnings.extend(f"{words(trt)} reported: {' '.join(text.split())}" for text in told)
    return BuildResult(
        plan=request.plan,
        sha256=sha256_bytes(content),
        bytes=len(content),
        built_for=built_for,
        layers=layers,
        warnings=tuple(bench.warnings),
        seconds=time.monotonic() - started,
        source=request.onnx,
        input="float32" if frames is None else "uint8",
        whole_pixels=frames is not None and frames.whole,
    )


def _built(bench: _Bench, built_for: Dict[str, str]) -> bytes:
    """Return the plan's bytes."""
    trt, request, record, kept = bench.trt, bench.request, bench.record, bench.kept
    logger = make_logger(trt, record)
    kept.append(logger)
    builder = _builder(trt, logger, record)
    kept.append(builder)
    network = create_network(trt, builder, record)
    kept.append(network)
    config = builder.create_builder_config()
    if config is None:
        raise BackendError(f"TensorRT made no builder configuration: {record.last_words()}. See: edgeres doctor")
    kept.append(config)
    configure(trt, config, request)
    choose_device(trt, builder, config, request, built_for.get("module") or built_for.get("device", ""))
    kept.append(parse(trt, network, logger, request.onnx, record, bench.frames and bench.frames.content))
    check_network(network, request)
    profile = add_profile(builder, config, network, request, record)
    kept.append(profile)
    kept.append(set_calibration(trt, config, network, profile, request, record))
    bench.warnings.extend(pin_half(trt, config, network, request))
    monitor = make_monitor(trt, bench.watch)
    if monitor is not None:
        config.progress_monitor = monitor
        kept.append(monitor)
    cache = _TimingCache(bench, config, built_for)
    memory = builder.build_serialized_network(network, config)
    bench.watch.raise_failure()
    if bench.watch.stopped:
        raise _cancelled(request)
    if memory is None:
        raise _failed(bench)
    wrong = record.noticed(*WRONG)
    if wrong:
        raise BackendError(f"{words(trt)} would compute other numbers than the model: {wrong[0]}. Build it again.")
    cache.save()
    return bytes(memory)


def _promised(request: BuildRequest) -> Dict[str, str]:
    """Return the facts of a plan that the request decides; the options are read back when they are set."""
    return {
        "target": request.target,
        "version_compatible": "yes" if request.version_compatible else "",
        "hardware_compatible": HARDWARE_LEVEL if request.hardware_compatible else "",
    }


def _builder(trt: Any, logger: Any, record: Record) -> Any:
    """Return a builder; without a usable GPU the package's constructor fails with a TypeError."""
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as problem:
        said = record.last_words() if record.errors else str(problem)
        raise BackendError(f"{words(trt)} makes no builder: {said}. {_advice(said)}") from problem


class _TimingCache:
    """The timing cache of one build, where one is asked for. What is wrong with it becomes a warning."""

    def __init__(self, bench: _Bench, config: Any, built_for: Dict[str, str]) -> None:
        self._bench = bench
        self._path: Optional[str] = bench.request.timing_cache
        self._key = timing_cache.key_of(built_for)
        self._cache: Any = None
        if self._path is None:
            return
        if bench.request.optimization_level == 0:
            bench.warnings.append("at optimization level 0 TensorRT measures nothing: the timing cache is not used")
            self._path = None
            return
        found = timing_cache.load(self._path, self._key)
        if found.warning is not None:
            bench.warnings.append(found.warning)
        for content in dict.fromkeys((found.content, b"")):
            if self._taken(config, content):
                break
        if not found.ours:
            self._path = None

    def _taken(self, config: Any, content: bytes) -> bool:
        """Offer a cache to TensorRT. What it cannot read it replaces by an empty one, with no more than a complaint."""
        record = self._bench.record
        before = record.count
        cache = config.create_timing_cache(content)
        taken = cache is not None and config.set_timing_cache(cache, False)
        if taken:
            self._cache = cache
            self._bench.kept.append(cache)
        said = record.take(before)
        if not taken or said:
            reason = " ".join(said[0].split()) if said else "it gave no reason"
            self._bench.warnings.append(
                f"TensorRT does not take the timing cache {self._path}, it is ignored: {reason}"
            )
            return False
        return True

    def save(self) -> None:
        """Write what was measured."""
        if self._path is None or self._cache is None:
            return
        memory = self._cache.serialize()
        warning = "the timing cache was not kept: TensorRT did not give it out"
        if memory is not None:
            warning = timing_cache.save(self._path, self._key, bytes(memory)) or ""
        if warning:
            self._bench.warnings.append(warning)


def _layers(bench: _Bench, content: bytes, device: bool) -> Tuple[EngineLayer, ...]:
    """Return the engine's layers, from the engine itself where there is a GPU to load it on, else from the log."""
    layers: Tuple[EngineLayer, ...] = ()
    if device:
        text = _inspected(bench, content)
        layers = layers_from_inspector(text) if text else ()
    return layers or layers_from_log(bench.record.tables)


def _inspected(bench: _Bench, content: bytes) -> str:
    """Return the inspector's JSON of a plan, or an empty string where the plan cannot be opened on this machine."""
    trt, record, kept = bench.trt, Record(), bench.kept
    logger = make_logger(trt, record)
    runtime = trt.Runtime(logger)
    kept.extend([logger, runtime])
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        bench.warnings.append(f"the new engine does not open on this machine: {record.last_words()}")
        return ""
    kept.append(engine)
    if bench.request.hardware_compatible:
        check_level(trt, engine)
    context = _shaped_context(bench, engine)
    kept.append(context)
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return ""
    kept.append(inspector)
    if context is not None:
        inspector.execution_context = context
    return str(inspector.get_engine_information(member(trt.LayerInformationFormat, "JSON")) or "")


def _shaped_context(bench: _Bench, engine: Any) -> Any:
    """Return an execution context with the usual batch, or None where it cannot be had: without one, the inspector of
    an engine with a free batch tells no formats, and so no types."""
    request = bench.request
    context = engine.create_execution_context()
    if context is None or not context.set_input_shape(request.input_name, (request.batch[1], *request.shape)):
        bench.warnings.append("the new engine gave no execution context, so it does not tell all types of its layers")
        return None
    return context


def _failed(bench: _Bench) -> BackendError:
    said = bench.record.last_words()
    return BackendError(
        f"{words(bench.trt)} could not build an engine of {Path(bench.request.onnx).name}: {said}. {_advice(said)}"
    )


def _cancelled(request: BuildRequest) -> BackendError:
    return BackendError(f"the build of {Path(request.plan).name} was cancelled; nothing was written. Start it again.")


def _advice(said: str) -> str:
    """Return what to do about a message of TensorRT."""
    lower = said.lower()
    return next((advice for sign, advice in ADVICE if sign in lower), "See what this machine has: edgeres doctor")
