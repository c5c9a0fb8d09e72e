"""What can be known to be wrong before any work starts, all of it in one answer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Callable, List, Optional, Tuple

from edgeres.errors import MissingPackageError, RecipeError, SampleError
from edgeres.files import LARGEST_WEIGHTS
from edgeres.preprocess import problems as preprocessing_problems
from edgeres.recipe import Recipe, locate, place_of
from edgeres.samples import Samples, open_samples
from edgeres.targets import resolve

Look = Callable[[Samples], List[str]]

SHOWN = 5  # broken images named one by one; the rest are counted


def require_host_packages(recipe: Recipe) -> None:
    """Refuse to start a build where the packages that build are not installed.

    Raises:
        MissingPackageError: naming them and the command that installs them.
    """
    wanted = {"onnx": "onnx", "onnxruntime": "onnxruntime", "tomli_w": "tomli-w"}
    if recipe.model.onnx is None:
        wanted = {"torch": "torch", "safetensors": "safetensors", **wanted}
    if recipe.precision == "int8":
        wanted["numba"] = "numba"
    missing = [name for package, name in wanted.items() if importlib.util.find_spec(package) is None]
    if missing and sys.version_info < (3, 10):
        raise MissingPackageError(
            f"building a bundle needs {', '.join(missing)} and Python 3.10 or newer; this is Python "
            f"{sys.version_info[0]}.{sys.version_info[1]}. Build on another machine, and run the bundle here"
        )
    if missing:
        raise MissingPackageError.for_extra(", ".join(missing), "building a bundle", "host")


def require_backend(recipe: Recipe) -> None:
    """Refuse to start a build whose engine cannot be made here for want of a package; nothing is imported for it.

    Raises:
        BackendError: the target is not one of the backend's.
        MissingPackageError: naming the package and how to get it.
    """
    backend, _ = resolve(recipe.engine)
    if backend == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        from edgeres.backends.tensorrt.module import missing_tensorrt

        raise missing_tensorrt()
    if backend == "tensorrt-rtx" and not any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt"))):
        raise MissingPackageError(
            "an engine of TensorRT for RTX needs the package tensorrt_rtx. Install it: pip install tensorrt-rtx"
        )


def open_inputs(
    recipe: Recipe, calibrates: bool = True, judges: bool = True, look: Look = Samples.check
) -> Tuple[Optional[Samples], Optional[Samples]]:
    """Return the calibration and the validation samples of a recipe, or refuse the recipe.

    Calibration samples are needed for int8, or to compare on where there are no others; samples that only a later stage
    needs are opened where they are there, and are not missed where they are not.

    Args:
        calibrates: whether the calibration stage will be reached.
        judges: whether the validation stage will be.
        look: says of every sample that cannot be read what is wrong with it.

    Raises:
        RecipeError: with everything that is wrong with files, folders, images and sizes.
    """
    plan, judged = recipe.calibration, recipe.validation
    problems = _model_files(recipe)
    if recipe.input.size is not None:
        problems.extend(f"input: {problem}" for problem in preprocessing_problems(recipe.preprocessing))
    calibration = validation = None
    later: List[str] = []
    if plan.samples is not None and (recipe.precision == "int8" or judged.samples is None):
        calibration = _open("calibration", plan.samples, plan.count, look, problems if calibrates else later)
    elif recipe.precision == "int8" and calibrates:
        problems.append("calibration.samples: int8 needs a folder of images to calibrate on: --calibration FOLDER")
    if judged.samples is not None:
        validation = _open("validation", judged.samples, None, look, problems if judges else later)
        if validation is not None:
            problems.extend(label_problems(validation, recipe.model.num_classes))
    if problems:
        raise RecipeError("cannot start", problems)
    return calibration, validation


def _model_files(recipe: Recipe) -> List[str]:
    problems: List[str] = []
    onnx, weights = recipe.model.onnx, recipe.model.weights
    if onnx is not None:
        problems.extend(f"model.source: {problem}" for problem in _unreadable(onnx))
    if weights is not None:
        problems.extend(f"model.weights: {problem}" for problem in _unreadable(locate(weights)))
    return problems


def _unreadable(path: Path) -> List[str]:
    """Return why a file cannot be read; nothing where it can."""
    try:
        if not path.is_file():
            return [f"there is no file {path}"]
        with open(path, "rb") as stream:
            stream.read(1)
        size = path.stat().st_size
        if size > LARGEST_WEIGHTS:  # said before it is hashed
            return [f"{path} has {size:,} bytes, more than {LARGEST_WEIGHTS:,}. Save the weights alone"]
    except OSError as problem:
        return [f"{path} cannot be read: {problem.strerror or problem}"]
    return []


def _open(section: str, source: str, count: Optional[int], look: Look, problems: List[str]) -> Optional[Samples]:
    """Return samples whose every file can be opened; add what is wrong to ``problems``."""
    try:
        samples = open_samples(place_of(source), count=count, labelled=section == "validation")
        broken = look(samples)
    except SampleError as problem:
        problems.append(f"{section}.samples: {problem}")
        return None
    problems.extend(f"{section}.samples: {problem}" for problem in broken[:SHOWN])
    if len(broken) > SHOWN:
        problems.append(f"{section}.samples: {len(broken) - SHOWN} more files cannot be read as images")
    return samples


def label_problems(samples: Samples, num_classes: Optional[int]) -> List[str]:
    """Return what is wrong with labels for a model that answers ``num_classes`` (None: not known yet).

    Folders' labels are the places of their sorted names: one folder too few and every later label is another class.
    """
    if samples.labels is None or num_classes is None:
        return []
    if samples.classes is not None and len(samples.classes) != num_classes:
        return [
            f"validation.samples: {samples.source} has {len(samples.classes)} class folders and the model answers "
            f"{num_classes} classes. Folder names, sorted, are the labels 0 to {num_classes - 1}, so each class needs "
            "its folder; for some classes only, give an .npz with images and labels"
        ]
    if int(samples.labels.max()) >= num_classes:
        return [
            f"validation.samples: {samples.source} has labels up to {int(samples.labels.max())}, "
            f"the model answers {num_classes} classes (0 to {num_classes - 1})"
        ]
    return []
