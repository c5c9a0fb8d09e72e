"""Which form of a model runs on this CPU, and how fast: the integer form where it computes what the model means, else
Q/DQ in float; measured beside FP32 where a bundle is compiled for the machine that will run it."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import msgspec
import numpy as np

from edgeres.artifacts import Engine, ExportedModel, FileRef, Preprocessing, QuantizedModel
from edgeres.benchmark import Pace, summarize, take_turns
from edgeres.cpu_settings import THREADS
from edgeres.errors import BackendError
from edgeres.measurements import Latency
from edgeres.preprocess import prepare_batch
from edgeres.provenance import cores
from edgeres.validation import compare

PACE = Pace(seconds=1.0, warmup=0.1)
"""For all candidates of a round together: a choice between numbers that are far apart needs no more."""
INTEGERS, FLOAT, FP32 = "int8 in integers", "int8 in float", "fp32"
FAITHFUL_DB = (15.0, 30.0)
"""What lies below the first is no rounding on the border between two steps, however sensitive the net, but another
function; what lies above the second is none. Between, it may be no more than int8 itself changes: sums that saturate,
as on a processor or a kernel that pairs other weights than ours, change more."""
CLEARLY = 0.9
"""Of the time of what was built and judged, what another choice has to come below: a few rounds tell no less."""
ONE_THREAD = ", 1 thread"
SLOWER = (
    ". Answers are right, and slower. Another onnxruntime may run it: pip install -U onnxruntime, and then edgeres "
    "compile BUNDLE --target cpu"
)


def cpu_engine(
    folder: Path, exported: ExportedModel, model: QuantizedModel, preprocessing: Preprocessing, measure: bool
) -> Tuple[Engine, Tuple[str, ...]]:
    """Return a model's engine for this CPU, and warnings.

    Args:
        folder: holds the files of the two records.
        preprocessing: makes what the model sees; frames for trial are at random.
        measure: whether to time the forms, FP32 and thread counts, and take what is fastest of the model's precision;
            without, it is the integer form, if there is one.

    Raises:
        BackendError: onnxruntime does not accept the model.
    """
    from edgeres.backends import cpu

    refs = {FLOAT if model.precision == "int8" else model.precision: model.file}
    frames = np.random.default_rng(0).integers(0, 256, (2, *preprocessing.size, 3), np.uint8)
    images = prepare_batch(frames, msgspec.structs.replace(preprocessing, resize=None))
    with closing(cpu.open_model(folder / model.file.path, model.precision)) as run:
        meant = run(images)
    obstacle = None if model.integer is None else _obstacle(folder, exported, model.integer, images, meant)
    if model.integer is not None and obstacle is None:
        refs[INTEGERS] = model.integer
    warnings = (obstacle,) if obstacle else ()
    chosen = refs[list(refs)[-1]]
    engine = cpu.compile_engine(chosen, model.precision, model.activation_range)
    if not measure or model.precision != "int8":
        return engine, warnings
    engine, said = _fastest(folder, exported, engine, refs, images[:1])
    return engine, (*warnings, *said)


def _obstacle(
    folder: Path, exported: ExportedModel, integer: FileRef, images: np.ndarray, meant: np.ndarray
) -> Optional[str]:
    """Return why the integer form cannot be used here; None where it can.

    Args:
        images: float32 ``(N, 3, h, w)``, what the model sees.
        meant: the logits of these that the model's file means.
    """
    from edgeres.backends import cpu

    with closing(cpu.open_model(folder / exported.file.path, "fp32")) as run:
        own = _decibels(run(images), meant)
    try:
        with closing(cpu.open_model(folder / integer.path, "int8")) as run:
            found = _decibels(meant, run(images))
    except BackendError as problem:
        return f"int8 is computed in float, because this onnxruntime does not run {integer.path}: {problem}{SLOWER}"
    if found < max(FAITHFUL_DB[0], min(own, FAITHFUL_DB[1])):
        return f"int8 is computed in float, because {integer.path} answers otherwise here ({found:.1f} dB){SLOWER}"
    return None


def _decibels(meant: np.ndarray, found: np.ndarray) -> float:
    """Return how far answers are from what is meant; infinite where they are equal, minus that where one is none."""
    if not (np.isfinite(meant).all() and np.isfinite(found).all()):
        return -math.inf
    compared = compare(meant, found, None, max_drop_pp=0.0, backend="cpu", precision="int8").sqnr_db
    return math.inf if compared is None else compared


def _fastest(
    folder: Path, exported: ExportedModel, engine: Engine, refs: Dict[str, FileRef], image: np.ndarray
) -> Tuple[Engine, Tuple[str, ...]]:
    """Return the engine in the form and with the threads that are fastest here, and whether int8 pays at all."""
    from edgeres.backends import cpu

    opened = {name: (ref, cpu.options_for("int8")) for name, ref in refs.items()}
    opened[FP32] = (exported.file, cpu.options_for("fp32"))
    times = _timed(folder, opened, image)
    best = list(refs)[-1]
    if times[FLOAT].p50_ms < CLEARLY * times[best].p50_ms:
        best = FLOAT
    if cores() > 1:
        alone = {f"{name}{ONE_THREAD}": (opened[name][0], {**opened[name][1], THREADS: "1"}) for name in (best, FP32)}
        again = _timed(folder, {best: opened[best], FP32: opened[FP32], **alone}, image)
        times = {**times, **again}
        opened.update(alone)
        if times[f"{best}{ONE_THREAD}"].p50_ms < CLEARLY * times[best].p50_ms:
            best += ONE_THREAD
    floats = [name for name in times if name.startswith(FP32)]
    fp32 = min(floats, key=lambda name: times[name].p50_ms)
    measured = {name: round(found.p50_ms, 4) for name, found in times.items()}
    file, options = opened[best]
    made = msgspec.structs.replace(engine, file=file, options=options, measured_ms=measured)
    if times[best].p50_ms < times[fp32].p50_ms:
        return made, ()
    advice = "The engine stays int8, whose verdict the bundle holds; for FP32, build with --precision fp32"
    if INTEGERS not in refs:
        advice = "The form in integers may, which this bundle does not have: edgeres quantize BUNDLE --backend cpu"
    return made, (
        f"int8 does not pay on this CPU: {times[best].p50_ms:.2f} ms an image, and {times[fp32].p50_ms:.2f} ms in "
        f"FP32. {advice}",
    )


def _timed(folder: Path, opened: Dict[str, Tuple[FileRef, Dict[str, str]]], image: np.ndarray) -> Dict[str, Latency]:
    """Return the latencies of some models on one image, measured in turns."""
    from edgeres.backends import cpu

    with ExitStack() as held:
        calls = {
            name: partial(
                held.enter_context(closing(cpu.open_engine((folder / ref.path).read_bytes(), options))), image
            )
            for name, (ref, options) in opened.items()
        }
        rounds: Dict[str, List[np.ndarray]] = take_turns(calls, PACE)
    return {name: summarize(name, 1, found) for name, found in rounds.items()}
