"""The calibration table as a stage of a build: each tensor's range, chosen from the statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, FrozenSet, Tuple

from edgeres import files, imported
from edgeres.artifacts import CalibrationTable, ExportedModel, FileRef, from_json, to_data, to_json
from edgeres.errors import CalibrationError
from edgeres.progress import counted

if TYPE_CHECKING:
    from edgeres.noise import Scaling
    from edgeres.pipeline import Build
    from edgeres.stages import Made


def calibrate(
    job: Build,
    exported: ExportedModel,
    tensors: Tuple[str, ...],
    statistics: FileRef,
    shifted: FrozenSet[str],
    scalings: Dict[str, Scaling],
) -> CalibrationTable:
    """Choose each tensor's range, once scaled, from the statistics; ``shifted`` may use the full int8 range."""
    plan = job.recipe.calibration
    assert job.calibration is not None  # observe() has refused that
    chosen = job.calibration.sample_set()
    # The same counts may come from other samples or another model (a new classifier behind the same features), and
    # the table binds these too.
    inputs = {
        "statistics": statistics.sha256,
        "tensors": tensors,
        "method": plan.method,
        "percentile": plan.percentile,
        "model": exported.file.sha256,
        "samples": chosen.digest,
        "source": chosen.source,
        "preprocessing": to_data(job.recipe.preprocessing),
        "shifted": sorted(shifted),
        "scalings": files.sha256_file(job.workspace.folder / files.SCALINGS) if scalings else "",
    }
    given: Dict[str, float] = {}
    if job.imported is not None:
        given, own = imported.amax_of(job.imported, tensors, shifted)
        shifted = own | shifted.difference(given)
        inputs["given"] = given

    def work() -> Made:
        from edgeres.calibrate import Statistics, choose

        path = job.workspace.folder / files.STATISTICS
        found = Statistics.from_bytes(path.read_bytes(), str(path))
        ranges = choose(found, plan.method, plan.percentile, shifted, scalings, given)
        table = CalibrationTable(
            model_sha256=exported.file.sha256,
            preprocessing=job.recipe.preprocessing,
            samples=chosen,
            method=plan.method,
            percentile=plan.percentile,
            tensors={name: ranges[name] for name in tensors},
        )
        job.workspace.write(files.TABLE, to_json(table))
        for text in imported.range_notes(job.imported, table.tensors) if job.imported else ():
            job.warn(text)
        how = f"{counted(len(tensors), 'range')} by {plan.method}"
        how = f"{counted(len(given), 'range')} of the file, others by {plan.method}" if given else how
        return {"method": plan.method}, (files.TABLE,), how

    job.stage("calibrate", inputs, f"method {plan.method}", work)
    return table(job, exported)


def table(job: Build, exported: ExportedModel) -> CalibrationTable:
    """Return the calibration table, refusing one that belongs to something else."""
    path = job.workspace.folder / files.TABLE
    table = from_json(path.read_bytes(), CalibrationTable, str(path))
    samples = job.calibration.sample_set() if job.calibration is not None else None
    for what, same in (
        ("model", table.model_sha256 == exported.file.sha256),
        ("preprocessing", table.preprocessing == job.recipe.preprocessing),
        ("set of samples", samples is None or table.samples.digest == samples.digest),
    ):
        if not same:
            raise CalibrationError(f"{path} belongs to another {what}. Calibrate again: edgeres calibrate")
    return table
