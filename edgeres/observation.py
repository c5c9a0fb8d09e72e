"""The calibration pass as a stage of a build: who counts, and what is kept for an interruption."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Optional, Tuple

from edgeres import files
from edgeres.artifacts import ExportedModel, FileRef, to_data
from edgeres.errors import CalibrationError
from edgeres.progress import counted
from edgeres.provenance import versions
from edgeres.stages import STAGES, Reached
from edgeres.workforce import Observation

if TYPE_CHECKING:
    from edgeres.calibrate import Statistics
    from edgeres.pipeline import Build
    from edgeres.stages import Made

KEEP_EVERY = 30.0  # seconds of calibration that an interruption may cost; writing it takes a few tenths of one


def observe(job: Build, exported: ExportedModel, tensors: Tuple[str, ...]) -> FileRef:
    """Run a build's calibration samples through the FP32 model and keep the statistics.

    Raises:
        CalibrationError: there are no samples, or the model does not run on them.
    """
    samples = job.calibration
    if samples is None and STAGES.index("observe") > job.last:
        raise Reached
    if samples is None:
        raise CalibrationError("int8 needs calibration samples. Name a folder of images: --calibration FOLDER")
    preprocessing = job.recipe.preprocessing
    inputs = {
        "model": exported.file.sha256,
        "tensors": tensors,
        "samples": samples.sample_set().digest,
        "preprocessing": to_data(preprocessing),
        "tools": versions(("onnxruntime", "numpy")),
    }

    def work() -> Made:
        key = job.key("observe", inputs)
        earlier, last = _kept(job, key, tensors, len(samples)), time.monotonic()

        def keep(statistics: Statistics) -> None:
            nonlocal last
            if time.monotonic() - last >= KEEP_EVERY:
                job.workspace.keep("observe", key, statistics.to_bytes())
                last = time.monotonic()

        wanted = Observation(job.workspace.folder / files.FP32_MODEL, tensors, preprocessing)
        statistics = job.workforce.observe(wanted, samples, job.progress.advance, earlier, keep)
        job.workspace.write(files.STATISTICS, statistics.to_bytes())
        return {"tensors": len(tensors), "samples": len(samples)}, (files.STATISTICS,), counted(len(tensors), "tensor")

    return job.stage("observe", inputs, counted(len(samples), "sample"), work).files[0]


def _kept(job: Build, key: str, tensors: Tuple[str, ...], samples: int) -> Optional[Statistics]:
    """Return what an interrupted observe stage with this key had counted; None: it begins from the start."""
    from edgeres.calibrate import Statistics

    content = job.workspace.kept("observe", key)
    if content is None:
        return None
    try:
        statistics = Statistics.from_bytes(content, "an interrupted calibration")
    except CalibrationError:  # kept by another version
        return None
    return statistics if statistics.tensors.keys() == set(tensors) and statistics.samples <= samples else None
