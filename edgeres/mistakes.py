"""What is wrong with a recipe whose values have the right types, all of it at once."""

from __future__ import annotations

import difflib
from typing import List, Optional

from edgeres.architectures import ARCHITECTURES
from edgeres.places import STRAYS, strays
from edgeres.sections import (
    ACTIVATION_RANGES,
    BACKENDS,
    ENGINE_INPUTS,
    GROUPED,
    METHODS,
    POLICIES,
    RECOVERIES,
    TARGETS,
    WEIGHT_RANGES,
    EngineSection,
    ModelSection,
    Recipe,
)

LARGEST_BATCH = (1 << 31) - 1
LARGEST_WORKSPACE = (1 << 43) - 1  # in MiB; in bytes it has 63 bits
MOST_CLASSES = 1_000_000  # a classifier of ResNet-50 for so many has 8 GB
MOST_MINUTES = 7 * 24 * 60


def mistakes(recipe: Recipe) -> List[str]:
    """Return what is wrong with values that have the right type."""
    problems = []
    problems.extend(_model_mistakes(recipe.model))
    problems.extend(_strays("calibration.samples", recipe.calibration.samples))
    problems.extend(_strays("validation.samples", recipe.validation.samples))
    if recipe.calibration.count < 1:
        problems.append(f"calibration.count: {recipe.calibration.count} is not a positive number of samples")
    if recipe.calibration.method not in METHODS:
        problems.append(f"calibration.method: {recipe.calibration.method!r} is not one of {', '.join(METHODS)}")
    if not 50 < recipe.calibration.percentile <= 100:
        problems.append(f"calibration.percentile: {recipe.calibration.percentile} is not above 50 and at most 100")
    if not 0 <= recipe.validation.max_drop <= 100:
        problems.append(f"validation.max_drop: {recipe.validation.max_drop} is not between 0 and 100 percentage points")
    if recipe.validation.policy not in POLICIES:
        problems.append(f"validation.policy: {recipe.validation.policy!r} is not one of {', '.join(POLICIES)}")
    problems.extend(engine_mistakes(recipe.engine))
    recovery = recipe.quantization.recovery
    if recovery not in RECOVERIES:
        problems.append(f"quantization.recovery: {recovery!r} is not one of {', '.join(RECOVERIES)}")
    if not 0 <= recipe.quantization.budget_minutes <= MOST_MINUTES:
        minutes = recipe.quantization.budget_minutes
        problems.append(f"quantization.budget_minutes: {minutes} is not between 0 and {MOST_MINUTES} minutes")
    wanted = recipe.quantization.activation_range
    if wanted not in ACTIVATION_RANGES:
        ranges = ", ".join(ACTIVATION_RANGES)
        problems.append(f"quantization.activation_range: {wanted!r} is not one of {ranges}")
    elif wanted == "shifted" and (recipe.engine.target or "").startswith("dla"):
        problems.append("quantization.activation_range: a DLA takes symmetric ranges only; leave out, or say symmetric")
    if recipe.quantization.grouped not in GROUPED:
        given = recipe.quantization.grouped
        problems.append(f"quantization.grouped: {given!r} is not one of {', '.join(GROUPED)}")
    if recipe.quantization.weight_range not in WEIGHT_RANGES:
        given = recipe.quantization.weight_range
        problems.append(f"quantization.weight_range: {given!r} is not one of {', '.join(WEIGHT_RANGES)}")
    return problems


def engine_mistakes(engine: EngineSection) -> List[str]:
    problems = []
    if engine.backend not in BACKENDS:
        problems.append(f"engine.backend: {engine.backend!r} is not one of {', '.join(BACKENDS)}")
    problems.extend(_strays("engine.timing_cache", engine.timing_cache))
    if engine.target is not None and engine.target not in TARGETS:
        problems.append(f"engine.target: {engine.target!r} is not one of {', '.join(TARGETS)}")
    if not 1 <= engine.batch[0] <= engine.batch[1] <= engine.batch[2]:
        problems.append(f"engine.batch: {list(engine.batch)} is not [min, opt, max] with 1 <= min <= opt <= max")
    if engine.batch[2] > LARGEST_BATCH:
        problems.append(f"engine.batch: {engine.batch[2]} is more than TensorRT can count ({LARGEST_BATCH})")
    if engine.workspace_mib is not None and not 1 <= engine.workspace_mib <= LARGEST_WORKSPACE:
        problems.append(
            f"engine.workspace_mib: {engine.workspace_mib} is not a number of MiB from 1 to {LARGEST_WORKSPACE}"
        )
    if engine.optimization_level is not None and not 0 <= engine.optimization_level <= 5:
        problems.append(f"engine.optimization_level: {engine.optimization_level} is not between 0 and 5")
    if not 0 < engine.timeout_minutes <= MOST_MINUTES:
        problems.append(f"engine.timeout_minutes: {engine.timeout_minutes} is not above 0 and at most {MOST_MINUTES}")
    if engine.input not in ENGINE_INPUTS:
        problems.append(f"engine.input: {engine.input!r} is not one of {', '.join(ENGINE_INPUTS)}")
    elif engine.input == "uint8" and (engine.target or "").startswith("dla"):
        problems.append("engine.input: an engine for a DLA takes float32; leave out, or say float32")
    return problems


def _strays(key: str, path: Optional[str]) -> List[str]:
    return [f"{key}: {path} {STRAYS}"] if path is not None and strays(path) else []


def _model_mistakes(model: ModelSection) -> List[str]:
    problems = _strays("model.weights", model.weights) + _strays("model.source", model.source)
    onnx = model.source.lower().endswith(".onnx")
    if not model.source:
        problems.append("model.source: is missing. Name a model: see `edgeres models`")
    elif not onnx and ":" not in model.source and model.source not in ARCHITECTURES:
        near = difflib.get_close_matches(model.source, list(ARCHITECTURES), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `edgeres models`"
        others = "or give package.module:callable or a .onnx file"
        problems.append(f"model.source: there is no model {model.source!r} ({hint}; {others})")
    if onnx and model.weights:
        problems.append("model.weights: an .onnx file has its weights inside; leave weights out")
    if model.num_classes is not None and not 1 <= model.num_classes <= MOST_CLASSES:
        problems.append(f"model.num_classes: {model.num_classes} is not a number of classes from 1 to {MOST_CLASSES:,}")
    if model.seed < 0:
        problems.append(f"model.seed: {model.seed} is negative")
    return problems
