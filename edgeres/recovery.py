"""Accuracy recovery as stages of a build: which images it reads, what it keeps, and what its results depend on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Dict, FrozenSet, Mapping, Optional, Tuple, Union

import numpy as np

from edgeres import files
from edgeres.artifacts import (
    LEARNED,
    CalibrationTable,
    ExportedModel,
    FileRef,
    LayerCost,
    LayerPlan,
    TensorRange,
    from_data,
    from_json,
    to_data,
)
from edgeres.errors import QuantizationError
from edgeres.noise import Scaling, scalings_from_bytes, scalings_to_bytes
from edgeres.provenance import versions

if TYPE_CHECKING:
    from edgeres.pipeline import Build
    from edgeres.quantize import Placement, Solo
    from edgeres.quantize.recover import Recovery
    from edgeres.quantize.simulate import Twin
    from edgeres.stages import Made

LEVELS = {"none": 0, "fast": 1, "auto": 1, "full": 2}
TOOLS = ("torch", "onnx", "numpy")


def level(job: Build) -> int:
    """Return how much recovery a build starts with: 0 none, 1 what is fast, 2 all.

    None for a DLA: up to TensorRT 10.7 it gets scales for the FP32 model, and not the graph in which these hold. None
    either for a file whose own ranges are kept.
    """
    if job.imported is not None or (job.recipe.engine.target or "").startswith("dla"):
        return 0
    return LEVELS[job.recipe.quantization.recovery] if job.level is None else job.level


def reconstruction(job: Build) -> Tuple[int, float]:
    """Return how many rounds of reconstruction the model is small enough for, 0: none; and about how many seconds."""
    from edgeres.quantize.reconstruct import rounds_for

    return rounds_for(job.workspace.folder / files.FP32_MODEL)


def images_of(job: Build) -> Tuple[np.ndarray, int]:
    """Return the calibration images that the rungs read, float32 ``(N, 3, H, W)``, and how many to take at a time."""
    from edgeres.quantize.recover import images_for

    assert job.calibration is not None  # observe() has refused that
    count, batch = images_for(job.workspace.folder / files.FP32_MODEL)
    samples = job.calibration.subset(min(count, len(job.calibration)))
    preprocessing = job.recipe.preprocessing
    return np.concatenate(list(samples.batches(preprocessing, preprocessing.batch_size))), batch


def equalize(
    job: Build, exported: ExportedModel, placement: Placement, statistics: FileRef, shifted: FrozenSet[str]
) -> Dict[str, Scaling]:
    """Find how sensitive the answer is to noise on each channel, and factors that make the least of it.

    Empty where recovery is off, or cannot follow the model; the latter is a warning.
    """
    from edgeres.compilation import activation_range

    if not level(job) or not placement.weights:
        return {}
    free = activation_range(job.recipe) == "symmetric"
    inputs: Dict[str, Any] = {
        "model": exported.file.sha256,
        "statistics": statistics.sha256,
        "tensors": placement.tensors,
        "points": [(point.tensor, point.range_of, point.readers) for point in placement.points],
        "weights": [(weight.tensor, weight.axis, weight.readers) for weight in placement.weights],
        "shifted": sorted(shifted),
        "free": free,
        **_samples(job),
    }

    def work() -> Made:
        from edgeres.calibrate import Statistics, expected_noise
        from edgeres.quantize.recover import find_scalings, grid_of

        path = job.workspace.folder / files.STATISTICS
        counted = Statistics.from_bytes(path.read_bytes(), str(path))
        found = counted.tensors
        inner = [name for name in placement.tensors if name != exported.input_name]  # its pixels will be exact
        tables = {
            name: expected_noise(found[name], grid_of(name in shifted and found[name].minimum >= 0)) for name in inner
        }
        # What comes for nothing is no reason to believe the factors less.
        before = {name: expected_noise(found[name], grid_of(False)) for name in inner} if free else tables
        fp32 = job.workspace.folder / files.FP32_MODEL
        images, batch = images_of(job)
        try:
            scalings = find_scalings(
                fp32, placement, tables, counted.samples, images, batch, job.progress.advance, before
            )
        except QuantizationError as problem:
            job.warn(f"accuracy recovery is off: {problem}")
            scalings = {}
        job.workspace.write(files.SCALINGS, scalings_to_bytes(scalings))
        scaled = sum(not part.is_plain for name, part in scalings.items() if name in tables)
        return (
            {"images": len(images)},
            (files.SCALINGS,),
            f"{scaled} of {len(tables)} tensors, on {len(images)} samples",
        )

    job.stage("equalize", inputs, "channels by the noise that reaches the answer", work)
    path = job.workspace.folder / files.SCALINGS
    return scalings_from_bytes(path.read_bytes(), str(path))


def content(
    job: Build, exported: ExportedModel, ranges: Mapping[str, TensorRange], scalings: Mapping[str, Scaling]
) -> Optional[Tuple[bytes, Tuple[LayerPlan, ...], Twin]]:
    """Return the recovered Q/DQ model, its plan and its twin; None where recovery is off."""
    if not scalings:
        return None
    from edgeres.quantize.recover import recovered_content

    recovery = _recovery(job, scalings, ranges)
    keep = job.recipe.quantization.keep_float
    fp32 = job.workspace.folder / files.FP32_MODEL
    return recovered_content(fp32, exported.modules, keep, ranges, recovery, job.progress.advance)


def learned(job: Build, ranges: Mapping[str, TensorRange], scalings: Mapping[str, Scaling]) -> Dict[str, TensorRange]:
    """Return those of the int8 model's ranges that reconstruction learned, with what the statistics say of them."""
    from edgeres.calibrate import Statistics, described

    changed = {name: found for name, found in ranges.items() if found.method == LEARNED}
    if not changed:
        return {}
    path = job.workspace.folder / files.STATISTICS
    return described(Statistics.from_bytes(path.read_bytes(), str(path)), changed, scalings)


def _recovery(job: Build, scalings: Mapping[str, Scaling], ranges: Mapping[str, TensorRange]) -> Recovery:
    from edgeres.quantize.recover import Recovery

    images, batch = images_of(job)
    return Recovery(
        scalings=scalings,
        exact_input=job.recipe.preprocessing,
        images=[images[start : start + batch] for start in range(0, len(images), batch)],
        rounds=reconstruction(job)[0] if level(job) > 1 else 0,
        left_float=job.left_float,
        paired=_paired(job, ranges),
    )


def _paired(job: Build, ranges: Mapping[str, TensorRange]) -> Union[bool, FrozenSet[str]]:
    """Return whether all weights are paired, or beside which tensors they are: what a CPU reads shifted in a symmetric
    model takes up to 255 in its bytes, what is not at most 127."""
    from edgeres.compilation import pairs_weights, pairs_where_shifted

    if pairs_weights(job.recipe):
        return True
    if not pairs_where_shifted(job.recipe):
        return False
    return frozenset(name for name, found in ranges.items() if found.shift > 0)


def depends_on(job: Build, scalings: Mapping[str, Scaling]) -> Dict[str, Any]:
    """Return what the recovered model depends on, besides ranges and model."""
    if not scalings:
        return {"recovery": 0}
    rounds = reconstruction(job)[0] if level(job) > 1 else 0
    if level(job) > 1 and not rounds:
        job.warn("the model is too large for reconstruction, which is left out: all else of recovery is done")
    return {
        "recovery": 1,
        "rounds": rounds,
        "left_float": job.left_float,
        "scalings": files.sha256_file(job.workspace.folder / files.SCALINGS),
        **_samples(job),
    }


def done(job: Build) -> int:
    """Return how much recovery the present net has: less than :func:`level` where the model does not allow it."""
    if not follows(job):
        return 0
    return level(job) if reconstruction(job)[0] else min(level(job), 1)


def follows(job: Build) -> bool:
    """Whether there is recovery, and it could follow the model."""
    path = job.workspace.folder / files.SCALINGS
    return "equalize" in job.workspace.records and bool(scalings_from_bytes(path.read_bytes(), str(path)))


def calibration_sqnr(job: Build) -> Optional[float]:
    """Return the SQNR of the int8 model's logits on calibration images, in dB; None where there is no noise."""
    from edgeres.judge import open_file
    from edgeres.validation import compare

    images, batch = images_of(job)
    logits = []
    for name, precision in ((files.FP32_MODEL, "fp32"), (files.model_file("int8"), "int8")):
        run = open_file(job.workspace.folder / name, precision)
        logits.append(np.concatenate([run(images[i : i + batch]) for i in range(0, len(images), batch)]))
    return compare(logits[0], logits[1], None, max_drop_pp=0.0, backend="cpu", precision="int8").sqnr_db


def costs(
    job: Build, exported: ExportedModel, watch: Callable[[int, int], None]
) -> Tuple[Callable[[], Solo], Tuple[LayerCost, ...]]:
    """Return what each layer of the present int8 model costs alone, and what measures any choice of layers."""
    table = from_json((job.workspace.folder / files.TABLE).read_bytes(), CalibrationTable, files.TABLE)
    path = job.workspace.folder / files.SCALINGS
    keep = job.recipe.quantization.keep_float

    @functools.lru_cache(maxsize=None)
    def solo() -> Solo:
        from edgeres.quantize import Solo

        recovery = _recovery(job, scalings_from_bytes(path.read_bytes(), str(path)), table.tensors)
        fp32 = job.workspace.folder / files.FP32_MODEL
        return Solo(fp32, exported.modules, keep, table.tensors, recovery, watch)

    def work() -> Made:
        found, images = solo().costs(watch)
        worst = found[0].layer if found else "nothing"
        return {"images": images, "layers": to_data(found)}, (), f"{len(found)} layers and blocks alone; worst: {worst}"

    paired = _paired(job, table.tensors)
    inputs: Dict[str, Any] = {
        "model": exported.file.sha256,
        "ranges": to_data(table.tensors),
        "scalings": files.sha256_file(path),
        "keep_float": keep,
        "left_float": sorted(job.left_float),
        "paired": paired if isinstance(paired, bool) else sorted(paired),
        **_samples(job),
    }
    record = job.stage("sensitivity", inputs, "each layer alone, on calibration samples", work)
    return solo, tuple(from_data(cost, LayerCost, "stage sensitivity") for cost in record.facts["layers"])


def _samples(job: Build) -> Dict[str, Any]:
    assert job.calibration is not None
    return {
        "samples": job.calibration.sample_set().digest,
        "preprocessing": to_data(job.recipe.preprocessing),
        "tools": versions(TOOLS),
    }
