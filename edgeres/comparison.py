"""Reference and verdict as stages of a build: the engine is compared with the FP32 model on the same samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeres import files
from edgeres.artifacts import Engine, ExportedModel, QuantizedModel, Report, StageRecord, from_data, to_data, to_json
from edgeres.progress import counted
from edgeres.provenance import versions

if TYPE_CHECKING:
    from edgeres.pipeline import Build
    from edgeres.stages import Made


def validate(job: Build, exported: ExportedModel, model: QuantizedModel, engine: Engine) -> None:
    """Compare the engine with the FP32 model, on the validation samples or else on those of calibration."""
    from edgeres.backends import cpu
    from edgeres.compilation import with_layers
    from edgeres.judge import judge, known_meaning, read_reference, reference_content
    from edgeres.validation import doubts

    samples, source = job.validation, "validation"
    if samples is None:
        samples, source = job.calibration, "calibration"
    if samples is None:
        job.warn("no validation samples were given, so nothing was compared. Name a folder: --validation FOLDER")
        return
    if samples.labels is None:
        job.warn("the samples have no labels, so agreement and SQNR are measured, not accuracy")
    preprocessing, chosen = job.recipe.preprocessing, samples.sample_set()
    watch = job.progress.advance
    data = {"samples": chosen.digest, "preprocessing": to_data(preprocessing), "tools": versions(("onnxruntime",))}

    def answers(record: Engine) -> Any:
        content = (job.workspace.folder / record.file.path).read_bytes()
        return job.workforce.answer(content, record, samples, preprocessing, watch)

    def refer() -> Made:
        logits = answers(cpu.compile_engine(exported.file, "fp32"))
        job.workspace.write(files.REFERENCE, reference_content(logits, samples))
        return {"samples": len(samples)}, (files.REFERENCE,), f"FP32 logits of {counted(len(samples), 'sample')}"

    reference = job.stage(
        "reference",
        {"model": exported.file.sha256, **data},
        f"FP32 on {counted(len(samples), f'{source} sample')}",
        refer,
    )
    judged = job.recipe.validation
    inputs = {
        "reference": reference.files[0].sha256,
        "engine": engine.file.sha256,
        "model": model.file.sha256,
        "options": engine.options,
        "max_drop": judged.max_drop,
        "policy": judged.policy,
        "source": source,
        **data,
    }

    def work() -> Made:
        logits = answers(engine)
        content = (job.workspace.folder / files.REFERENCE).read_bytes()
        meaning = known_meaning(engine, read_reference(content, files.REFERENCE)["logits"], logits)
        if meaning is None:
            meaning = answers(cpu.compile_engine(model.file, model.precision))
        report = judge(content, logits, engine, (judged.max_drop, judged.policy), source, meaning)
        report = with_layers(report, job.engines)
        job.workspace.write(files.REPORT, to_json(report))
        if model.precision == "fp32":
            return report, (files.REPORT,), report.verdict
        # A robot without onnxruntime tells the engine's part of a drop by these.
        job.workspace.write(files.MEANING, reference_content(meaning, samples))
        return report, (files.REPORT, files.MEANING), report.verdict

    record = job.stage("validate", inputs, f"{engine.precision} on {engine.backend}", work)
    job.report = told(job, record)
    for text in doubts(job.report):
        job.warn(text)


def told(job: Build, record: StageRecord) -> Report:
    """Return a report that tells of the layers of each engine in the bundle, which may have others by now."""
    from edgeres.compilation import with_layers

    found = from_data(record.facts, Report, "stage validate")
    report = with_layers(found, job.engines)
    if report != found:
        job.workspace.write(files.REPORT, to_json(report))
        paths = tuple(ref.path for ref in record.files)
        job.workspace.finish("validate", record.key, paths, record.seconds, to_data(report), record.warnings)
    return report
