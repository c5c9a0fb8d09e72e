"""What can be known to be wrong before any work starts, all of it in one answer."""

from __future__ import annotations

import importlib.util
from typing import List, Optional, Tuple

from edgeres.errors import MissingPackageError, RecipeError, SampleError
from edgeres.preprocess import problems as preprocessing_problems
from edgeres.recipe import Recipe, locate
from edgeres.samples import Samples, open_samples

SHOWN = 5  # broken images named one by one; the rest are counted


def require_host_packages(recipe: Recipe) -> None:
    """Refuse to start a build where the packages that build are not installed.

    Raises:
        MissingPackageError: naming them and the command that installs them.
    """
    wanted = ["onnx", "onnxruntime", "tomli_w"]
    if recipe.model.onnx is None:
        wanted.insert(0, "torch")
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError.for_extra(", ".join(missing), "building a bundle", "host")


def open_inputs(recipe: Recipe) -> Tuple[Optional[Samples], Optional[Samples]]:
    """Return the calibration and the validation samples of a recipe (nothing is decoded yet), or refuse the recipe.

    Calibration samples are opened where they are needed: for int8, or to compare on where there are no others.

    Raises:
        RecipeError: with everything that is wrong with files, folders, images and sizes.
    """
    plan, judged = recipe.calibration, recipe.validation
    problems = _model_files(recipe)
    if recipe.input.size is not None:
        problems.extend(f"input: {problem}" for problem in preprocessing_problems(recipe.preprocessing))
    calibration = validation = None
    if plan.samples is not None and (recipe.precision == "int8" or judged.samples is None):
        calibration = _open("calibration", plan.samples, plan.count, problems)
    elif recipe.precision == "int8":
        problems.append("calibration.samples: int8 needs a folder of images to calibrate on: --calibration FOLDER")
    if judged.samples is not None:
        validation = _open("validation", judged.samples, None, problems)
        if validation is not None:
            problems.extend(_label_problems(validation, recipe.model.num_classes))
    if problems:
        raise RecipeError("cannot start", problems)
    return calibration, validation


def _model_files(recipe: Recipe) -> List[str]:
    problems = []
    onnx, weights = recipe.model.onnx, recipe.model.weights
    if onnx is not None and not onnx.is_file():
        problems.append(f"model.source: there is no file {onnx}")
    if weights is not None and not locate(weights).is_file():
        problems.append(f"model.weights: there is no file {locate(weights)}")
    return problems


def _open(section: str, source: str, count: Optional[int], problems: List[str]) -> Optional[Samples]:
    """Return samples whose every file can be opened; add what is wrong to ``problems``."""
    try:
        samples = open_samples(locate(source), count=count, labelled=section == "validation")
        broken = samples.check()
    except SampleError as problem:
        problems.append(f"{section}.samples: {problem}")
        return None
    problems.extend(f"{section}.samples: {problem}" for problem in broken[:SHOWN])
    if len(broken) > SHOWN:
        problems.append(f"{section}.samples: {len(broken) - SHOWN} more files cannot be read as images")
    return samples


def _label_problems(samples: Samples, num_classes: Optional[int]) -> List[str]:
    if samples.labels is None or num_classes is None or int(samples.labels.max()) < num_classes:
        return []
    return [
        f"validation.samples: {samples.source} has labels up to {int(samples.labels.max())}, "
        f"the model answers {num_classes} classes (0 to {num_classes - 1})"
    ]
