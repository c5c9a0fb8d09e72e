"""Engines as a stage of a build: the one that the recipe wants, those that stay, and the one that is judged."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Optional

from edgeres.artifacts import Engine, ExportedModel, QuantizedModel, from_data, to_data
from edgeres.provenance import versions
from edgeres.stages import MODEL_STAGES, STAGES, Reached

if TYPE_CHECKING:
    from edgeres.pipeline import Build
    from edgeres.stages import Made


def made(job: Build, exported: ExportedModel, model: QuantizedModel) -> Engine:
    """Make the backend's engine; engines of the earlier bundle that were compiled from the same models stay."""
    try:
        engine: Optional[Engine] = _compiled(job, exported, model)
    except Reached:  # not asked for
        engine = None
    others = job.workspace.take_engines(MODEL_STAGES, None if engine is None else engine.target)
    if engine is None and others:
        job.progress.reused("compile", ", ".join(other.target for other in others))
    for text in (text for other in others for text in other.warnings or other.not_as_planned):
        job.warn(text)
    job.engines = others if engine is None else (engine, *others)
    if not job.engines:
        raise Reached
    return job.engines[0]


def _compiled(job: Build, exported: ExportedModel, model: QuantizedModel) -> Engine:
    """Make the engine that the recipe wants."""
    from edgeres.compilation import Source, compile_engine, engine_words
    from edgeres.targets import resolve

    section = job.recipe.engine
    backend, target = resolve(section)
    inputs = {
        "models": [to_data(ref) for ref in (exported.file, model.file, model.mixed, model.integer) if ref is not None],
        "precision": model.precision,
        "preprocessing": to_data(job.recipe.preprocessing),
        "engine": {name: value for name, value in to_data(section).items() if name != "timeout_minutes"},
        "backend": backend,
        "target": target,
        "tools": versions(("onnxruntime", "tensorrt", "tensorrt_rtx")),
        "machine": platform.machine(),
    }
    if backend != "cpu":
        inputs["once"] = os.urandom(16).hex()  # a GPU, its driver and its library may change unseen by any hash

    def work() -> Made:
        equalized = "equalize" in job.workspace.records
        source = Source(job.workspace.folder, exported, model, equalized, job.recipe.preprocessing)
        engine, warnings = compile_engine(source, section, lambda _, done, total: job.progress.advance(done, total))
        for text in warnings:
            job.warn(text)
        paths = () if backend == "cpu" else (engine.file.path,)
        return engine, paths, f"{target}: {engine_words(engine)}"

    record = job.stage("compile", inputs, target, work)
    return from_data(record.facts, Engine, "stage compile")


def meaning(job: Build, model: QuantizedModel) -> Engine:
    """Return what stands for an engine that is made elsewhere: the model on the CPU. Engines of the earlier bundle,
    which may have come from there, stay where they were compiled from the same models."""
    from edgeres.backends import cpu

    job.engines = job.workspace.take_engines(MODEL_STAGES, None)
    if STAGES.index("compile") > job.last:
        raise Reached
    job.warn(
        f"the engine is to be made elsewhere, so the verdict is on what {model.file.path} means, computed on the "
        "CPU. There, when it is compiled: edgeres validate BUNDLE"
    )
    return cpu.compile_engine(model.file, model.precision, model.activation_range)


def judged(job: Build, model: QuantizedModel, engine: Engine) -> Engine:
    """Return the engine to judge: the one that was made, or where no GPU here can run it, the model on the CPU."""
    from edgeres.backends import cpu
    from edgeres.targets import gpu_is_usable

    if engine.backend == "cpu" or gpu_is_usable(engine.backend):
        return engine
    job.warn(
        f"no GPU here can run {engine.file.path}, so the verdict is on what {model.file.path} means, computed on "
        f"the CPU. Where the engine will run: edgeres validate BUNDLE --backend {engine.backend}"
    )
    return cpu.compile_engine(model.file, model.precision, model.activation_range)
