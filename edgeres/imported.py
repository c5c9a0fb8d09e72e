"""A file that is quantized already, as part of a build: whether its own ranges are kept, in which form, what is said.

Whoever trained with quantization has ranges and weights that no calibration finds again. So they are kept, where the
recipe leaves the method open: each range in the form that TensorRT reads, each weight on its own steps, layers that the
file leaves in float in float, and no recovery, which would change both. A range method, or recovery, that the recipe
names begins anew, from the float network within the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Collection, Dict, FrozenSet, List, Optional, Tuple

import numpy as np

from edgeres import files
from edgeres.affine import QMAX
from edgeres.artifacts import ExportedModel, FileGrid, Imported, TensorRange
from edgeres.errors import EdgeresError, few
from edgeres.progress import counted
from edgeres.recipe import Recipe

if TYPE_CHECKING:
    from edgeres.pipeline import Build

FAR_DB = 10.0  # below it the answers differ by a third
OUTSIDE = 0.01  # of the values of calibration images; calibration itself cuts off less
IMAGES = 32  # that the file and what was made of it are compared on
REASON = "the file leaves it in float"


def kept(recipe: Recipe, exported: ExportedModel) -> Optional[Imported]:
    """Return the file's own quantization where it is kept; None where there is none, or the recipe begins anew.

    A file without a range that int8 can say (its weights alone are quantized, or all is FP8) has nothing to keep.
    """
    found = exported.imported
    return found if found is not None and _keeps(recipe, found) else None


def _keeps(recipe: Recipe, found: Imported) -> bool:
    wanted = recipe.calibration.method == "auto" and recipe.quantization.recovery in ("auto", "none")
    return recipe.precision == "int8" and wanted and bool(found.activations)


def fate(recipe: Recipe, found: Imported) -> str:
    """Return in words what becomes of a file's own quantization."""
    made = f"quantized already, by {found.tool}" if found.tool else "quantized already"
    what = f"{counted(len(found.activations), 'range')} and the steps of {counted(len(found.weights), 'weight')}"
    if recipe.precision != "int8":
        return f"the model is {made}; its Q/DQ are taken out ({what})"
    if _keeps(recipe, found):
        anew = "To calibrate anew: --method mse, or --recovery fast (--recovery none alone keeps them)"
        return f"the model is {made}: {what} are kept. {anew}"
    return f"the model is {made}; its Q/DQ are taken out ({what}), and it is calibrated anew"


def amax_of(
    found: Imported, tensors: Collection[str], allowed: Collection[str]
) -> Tuple[Dict[str, float], FrozenSet[str]]:
    """Return the ``amax`` of each tensor that the file has a range for, and which of these are shifted.

    Symmetric int8 stays as it is, and so does, shifted, what begins at zero in 8 bits. Any other range (int4,
    int16, another zero point), or one that may not be shifted, becomes the symmetric one that just reaches as far.

    Args:
        tensors: what will be quantized.
        allowed: which of these may be shifted.
    """
    given: Dict[str, float] = {}
    shifted = set()
    for name in tensors:
        grid = found.activations.get(name)
        if grid is None:
            continue
        if grid.low == 0 and name in allowed:
            shifted.add(name)
        symmetric = grid.high == QMAX and QMAX <= -grid.low <= QMAX + 1
        given[name] = grid.scale * (QMAX if symmetric else max(grid.high, -grid.low))
    return given, frozenset(shifted)


def steps_for(found: Optional[Imported], recipe: Recipe) -> Dict[str, Tuple[float, ...]]:
    """Return the weights' steps that are kept: none for a DLA, which up to TensorRT 10.7 finds steps of its own."""
    for_dla = (recipe.engine.target or "").startswith("dla")
    return {} if found is None or for_dla else dict(found.weights)


def range_notes(found: Imported, ranges: Dict[str, TensorRange]) -> List[str]:
    """Return in words which ranges are no longer the file's own, and which the file did not have."""
    rescaled, missing = [], []
    for name, chosen in ranges.items():
        grid = found.activations.get(name)
        if grid is None:
            missing.append(name)
        elif abs(chosen.scale - grid.scale) > 1e-6 * grid.scale:
            rescaled.append(f"{name} (step {grid.scale:.3g} to {chosen.scale:.3g})")
    said = []
    if rescaled:
        said.append(f"{counted(len(rescaled), 'range')} of the file are said in other steps: {few(rescaled)}")
    if missing:
        said.append(f"the file has no range for {few(missing)}; calibrated here")
    return said


def likeness(job: Build, name: str, entry: str) -> List[str]:
    """Return in words how the file and what was made of it answer the same calibration images.

    A comparison that fails is told, and ends no build: what was made of the file does not depend on it.

    Args:
        name: the int8 model, in the build's folder.
        entry: the tensor of the images.
    """
    from edgeres.export import answers_of
    from edgeres.judge import open_file
    from edgeres.validation import compare, decibels

    assert job.calibration is not None
    assert job.recipe.model.onnx is not None
    assert job.imported is not None
    samples = job.calibration.subset(min(IMAGES, len(job.calibration)))
    images = np.concatenate(list(samples.batches(job.recipe.preprocessing, IMAGES)))
    said = _outside(images, job.imported.activations.get(entry))
    try:
        theirs = answers_of(job.recipe.model.onnx, images)
        made = ((files.FP32_MODEL, "fp32"), (name, "int8"))
        found = {
            which: compare(
                theirs, open_file(job.workspace.folder / which, kind)(images), None,
                max_drop_pp=0.0, backend="cpu", precision=kind,
            )
            for which, kind in made
        }  # fmt: skip
    except EdgeresError as problem:
        return [*said, f"the file and {name} could not be compared: {problem}"]
    same, plain = found[name], found[files.FP32_MODEL]
    said.append(
        f"the file and {name} choose the same class for {100 * same.agreement:.1f} % of "
        f"{counted(len(images), 'calibration sample')} (SQNR {decibels(same.sqnr_db)})"
    )
    if plain.sqnr_db is not None and plain.sqnr_db < FAR_DB:
        said.append(
            f"FAR FROM THE FILE: the float network that edgeres finds in it answers those samples differently (SQNR "
            f"{decibels(plain.sqnr_db)}); compare the accuracy of both before you use it"
        )
    return said


def _outside(images: np.ndarray, grid: Optional[FileGrid]) -> List[str]:
    """Return a warning where images leave the grid that the file puts them on: their mean or std is another."""
    if grid is None:
        return []
    low, high = grid.low * grid.scale, grid.high * grid.scale
    share = float(((images < low - grid.scale) | (images > high + grid.scale)).mean())
    if share <= OUTSIDE:
        return []
    return [
        f"{100 * share:.1f} % of the calibration values are outside the file's input range, {low:.3g} to {high:.3g}: "
        "check --mean and --std against what the file was made with"
    ]
