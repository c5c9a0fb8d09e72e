"""Where a quantized model's error comes from, as part of a build: which images are read for it, and what is kept."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Dict, Generator, Tuple

from edgeres import files
from edgeres.artifacts import ExportedModel, QuantizationErrors, to_data, to_json
from edgeres.errors import QuantizationError, printable

if TYPE_CHECKING:
    import numpy as np

    from edgeres.pipeline import Build
    from edgeres.quantize.simulate import Twin
    from edgeres.stages import Made

SECONDS = 30.0  # after which no further images are read; a ResNet-50 at 224×224 takes a third of that on two cores
WORST = 3  # layers that a build's line names


def explained(job: Build, made: Made, exported: ExportedModel, twin: Twin) -> Made:
    """Write ``errors.json`` beside a quantized model, and return what the stage made with it.

    A network that cannot be followed layer by layer goes without, and a warning says so.
    """
    from edgeres.quantize.attribution import attribute_errors

    noun, paths, text = made
    total, batches = _images(job)
    try:
        with contextlib.closing(batches):
            errors = attribute_errors(
                twin, exported.modules, batches, SECONDS, lambda done: job.progress.advance(done, total)
            )
    except QuantizationError as problem:
        job.warn(f"the error is not traced to its layers: {str(problem).partition('. ')[0]}")
        return made
    job.workspace.write(files.ERRORS, to_json(errors))
    return noun, (*paths, files.ERRORS), f"{text}; {worst_words(errors)}" if errors.layers else text


def depends_on(job: Build) -> Dict[str, Any]:
    """Return what the explanation depends on, besides the model and its ranges."""
    assert job.calibration is not None  # observe() has refused that
    return {"samples": job.calibration.sample_set().digest, "preprocessing": to_data(job.recipe.preprocessing)}


def worst_words(errors: QuantizationErrors) -> str:
    """Return in a few words which layers cause most of the error."""
    worst = [f"{printable(layer.module or layer.node)} {100 * layer.share:.0f} %" for layer in errors.layers[:WORST]]
    return f"most noise from {', '.join(worst)}"


def _images(job: Build) -> Tuple[int, Generator[np.ndarray, None, None]]:
    """Return how many calibration images are read, and these in batches, float32 ``(n, 3, H, W)``, normalized."""
    from edgeres.quantize.attribution import images_for

    assert job.calibration is not None
    count, batch = images_for(job.workspace.folder / files.FP32_MODEL)
    samples = job.calibration.subset(min(count, len(job.calibration)))
    return len(samples), samples.batches(job.recipe.preprocessing, batch)
