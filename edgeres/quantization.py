"""The model in the wanted precision as a stage of a build; int8 observes, equalizes and calibrates first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Mapping, Tuple

from edgeres import calibration, files, imported, observation
from edgeres.artifacts import ExportedModel, LayerPlan, QuantizedModel, TensorRange, from_data, to_data
from edgeres.errors import QuantizationError
from edgeres.progress import counted

if TYPE_CHECKING:
    from edgeres.pipeline import Build
    from edgeres.stages import Made


def quantize(job: Build, exported: ExportedModel) -> QuantizedModel:
    """Write the model in the wanted precision; int8 calibrates first."""
    precision, keep = job.recipe.precision, job.recipe.quantization.keep_float
    name = files.model_file(precision)
    if precision == "fp32":
        return QuantizedModel(exported.file, "fp32", ())
    inputs: Dict[str, Any] = {"model": exported.file.sha256, "precision": precision, "keep_float": keep}
    if precision == "fp16":

        def work() -> Made:
            from edgeres.quantize import fp16_content

            content, layers = fp16_content(job.workspace.folder / files.FP32_MODEL, exported.modules)
            job.workspace.write(name, content)
            ref = files.file_ref(job.workspace.folder, name)
            return QuantizedModel(ref, precision, layers), (name,), f"{name}, all layers in float16"

    else:
        from edgeres import explanation, recovery
        from edgeres.compilation import activation_range, pairs_weights, pairs_where_shifted
        from edgeres.quantize import grouped_in_file, int8_content, plan_file, shiftable_file, twin_file
        from edgeres.targets import resolve

        fp32 = job.workspace.folder / files.FP32_MODEL
        own, job.grouped = job.imported, grouped_in_file(fp32)
        inputs["left_float"] = job.left_float
        paired = pairs_weights(job.recipe)
        inputs["paired"] = [paired, pairs_where_shifted(job.recipe)]
        inputs["for_cpu"] = resolve(job.recipe.engine)[1] == "cpu"
        placement = plan_file(fp32, exported.modules, keep, job.left_float, paired)
        every = {*plan_file(fp32, exported.modules, keep).tensors, *placement.tensors}
        shifted = activation_range(job.recipe) == "shifted"
        statistics = observation.observe(job, exported, tuple(sorted(every)))
        allowed = shiftable_file(fp32, placement, not shifted) if shifted or recovery.level(job) else frozenset()
        scalings = recovery.equalize(job, exported, placement, statistics, allowed)
        if not shifted and not scalings:
            allowed = frozenset()  # what a shift buys for nothing is part of recovery, and there is none
        table = calibration.calibrate(job, exported, placement.tensors, statistics, allowed, scalings)
        inputs.update(ranges=to_data(table.tensors), **recovery.depends_on(job, scalings))
        inputs["errors"] = explanation.depends_on(job)
        steps = imported.steps_for(own, job.recipe)
        if own is not None:
            inputs["imported"], inputs["steps"] = to_data(own), steps  # which a DLA has none of

        def work() -> Made:
            recovered = recovery.content(job, exported, table.tensors, scalings)
            if recovered is None:
                content, layers = int8_content(fp32, placement, table.tensors, steps)
                twin = twin_file(fp32, placement, table.tensors, steps)
            else:
                content, layers, twin = recovered
            if own is not None:
                job.workspace.write(name, content)
                for text in imported.likeness(job, name, exported.input_name):
                    job.warn(text)
            learned = recovery.learned(job, twin.ranges, scalings)
            return explanation.explained(job, _write_int8(job, content, layers, twin.ranges, learned), exported, twin)

    record = job.stage("quantize", inputs, precision, work)
    return from_data(record.facts, QuantizedModel, "stage quantize")


def _write_int8(
    job: Build,
    content: bytes,
    layers: Tuple[LayerPlan, ...],
    ranges: Mapping[str, TensorRange],
    learned: Dict[str, TensorRange],
) -> Made:
    """Write the Q/DQ model, and its second form where that is another."""
    from edgeres.quantize import activation_range_of, mixed_content

    name = files.model_file("int8")
    job.workspace.write(name, content)
    paths, second = [name], name
    try:
        mixed = mixed_content(job.workspace.folder / name)
        if mixed != content:  # a net that is int8 throughout has nothing left to be float16
            job.workspace.write(files.MIXED_MODEL, mixed)
            second = files.MIXED_MODEL
            paths.append(second)
    except QuantizationError as problem:  # the CPU and TensorRT up to 10.11 do without
        job.warn(f"there is no form of this model for TensorRT 10.12 and newer: {problem}")
        second = ""
    if not any(layer.precision == "int8" for layer in layers):
        job.warn("NOT ONE layer is in int8: see `edgeres inspect` for the reason of each")
    integer = _write_integer(job, name)
    paths += [integer] if integer else []
    count = sum(layer.precision == "int8" for layer in layers)
    grouped = sum(layer.precision == "int8" for layer in layers if layer.node in job.grouped)
    full = sum(value.shift > 0 for value in ranges.values())
    noun = QuantizedModel(
        file=files.file_ref(job.workspace.folder, name),
        precision="int8",
        layers=layers,
        mixed=files.file_ref(job.workspace.folder, second) if second else None,
        activation_range=activation_range_of(job.workspace.folder / name),
        shifted=full,
        grouped_int8=grouped,
        integer=files.file_ref(job.workspace.folder, integer) if integer else None,
        learned=learned,
    )
    made = f"{name}, {counted(count, 'layer')} in int8"
    made += f", {counted(full, 'tensor')} over the full range" if full else ""
    return noun, tuple(paths), made


def _write_integer(job: Build, name: str) -> str:
    """Write the Q/DQ model in integer operators where the engine is for a CPU; return the file's name, or none."""
    from edgeres.quantize import integer_content
    from edgeres.targets import resolve

    if resolve(job.recipe.engine)[1] != "cpu":
        return ""
    job.workspace.write(files.INTEGER_MODEL, integer_content(job.workspace.folder / name))
    return files.INTEGER_MODEL
