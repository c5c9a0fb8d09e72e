"""The FP32 ONNX as a stage of a build: where the model comes from, and what its export depends on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator

from edgeres import files, imported
from edgeres.artifacts import ExportedModel, from_data
from edgeres.errors import EdgeresError, ExportError, RecipeError
from edgeres.provenance import versions
from edgeres.recipe import Recipe, locate

if TYPE_CHECKING:
    from edgeres.export.exported import Exported
    from edgeres.pipeline import Build
    from edgeres.stages import Made


def export(job: Build) -> ExportedModel:
    """Write the FP32 ONNX."""
    model, size = job.recipe.model, job.recipe.input.size

    def work() -> Made:
        exported = _exported(job.recipe)
        if model.num_classes not in (None, exported.num_classes):
            raise ExportError(
                f"{model.source} answers {exported.num_classes} classes, not the {model.num_classes} asked for. "
                "Leave --num-classes out, or let the model take it."
            )
        for text in exported.notes:
            job.warn(text)
        job.workspace.write(files.FP32_MODEL, exported.content)
        noun = exported.record(files.file_ref(job.workspace.folder, files.FP32_MODEL))
        made = f"{files.FP32_MODEL}, opset {noun.opset}, within {noun.max_relative_error:.0e} of the original"
        return noun, (files.FP32_MODEL,), made

    inputs: Dict[str, Any] = {
        "classes": model.num_classes,
        "size": size,
        "tools": versions(("torch", "onnx", "onnxruntime")),
    }
    if model.onnx is not None:
        from edgeres.export import files_of

        inputs["files"] = [_input_hash(path) for path in files_of(model.onnx)]
    else:
        inputs["source"] = model.source
    if model.onnx is None and job.recipe.architecture is None:
        inputs["once"] = os.urandom(16).hex()  # a callable's code may change in ways that no hash of ours sees
    if model.weights is not None:
        inputs["weights"] = _input_hash(locate(model.weights))
    elif job.recipe.architecture is not None:
        inputs["seed"] = model.seed
        job.warn(
            f"NO WEIGHTS: {model.source} has random ones (seed {model.seed}), so its answers mean nothing. "
            "For a trained network: --weights FILE"
        )
    exported = from_data(job.stage("export", inputs, model.source, work).facts, ExportedModel, "stage export")
    if exported.imported is not None:
        job.imported = imported.kept(job.recipe, exported)
        job.warn(imported.fate(job.recipe, exported.imported))
    if size is None:
        job.recipe = job.recipe.with_size((exported.input_shape[1], exported.input_shape[2]))
    if job.validation is not None:
        from edgeres.preflight import label_problems

        problems = label_problems(job.validation, exported.num_classes)
        if problems:
            raise RecipeError("cannot go on", problems)
    return exported


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell of an input that vanished, or cannot be read any more, after it was found to be there."""
    try:
        yield
    except OSError as problem:
        if problem.filename not in (None, str(path)):  # a failing read tells no name
            raise
        raise EdgeresError(
            f"{path}: {problem.strerror or problem}. The build stopped there; put that right and build again, and it "
            "goes on where it stopped."
        ) from problem


def _input_hash(path: Path) -> str:
    with _reading(path):
        return files.sha256_file(path)


def _exported(recipe: Recipe) -> Exported:
    """Return the model of a recipe, exported; the one place where the models' room and the export's room meet."""
    from edgeres.export import adopt_onnx, export_module

    model = recipe.model
    if model.onnx is not None:
        return adopt_onnx(model.onnx, recipe.input.size)
    from edgeres import models

    if recipe.architecture is not None:
        module = models.create(model.source, model.num_classes, model.seed)
    else:
        module = models.from_callable(model.source, model.num_classes, model.seed)
    if model.weights is not None:
        with _reading(locate(model.weights)):
            models.load_weights(module, locate(model.weights))
    return export_module(module, recipe.preprocessing.size)
