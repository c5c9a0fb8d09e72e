"""Engines into bundles: which ONNX a backend gets, what the engine was built for, and where it is kept.

Nothing here needs torch or onnx: a bundle that was built on a host is compiled on the robot that will run it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Tuple

import msgspec

from edgeres import files
from edgeres.artifacts import (
    Bundle,
    CalibrationTable,
    Engine,
    ExportedModel,
    FileRef,
    Manifest,
    Preprocessing,
    QuantizedModel,
    Report,
    from_data,
    from_json,
    summaries,
    to_data,
    to_json,
)
from edgeres.bundle import read_verified, verify
from edgeres.errors import BackendError, BundleError
from edgeres.files import content_ref, file_ref
from edgeres.noise import scalings_from_bytes
from edgeres.recipe import EngineSection, Recipe
from edgeres.reporting import page_loss, with_page
from edgeres.signatures import Keys, key_list
from edgeres.targets import cpu_instead, gpu_is_usable, require_onnxruntime, resolve
from edgeres.workspace import Workspace

if TYPE_CHECKING:
    from edgeres.backends.tensorrt import BuildRequest

Watch = Callable[[str, int, int], None]

SHIFTED_TARGETS = ("cpu", "rtx")
"""Where the full int8 range is known to cost nothing; see CONTRIBUTING, Decisions."""

SLOW_GROUPS = ("gpu",)
"""Where int8 convolutions in groups are reported slower than float16 ones; see CONTRIBUTING, Decisions."""

SYMMETRIC_INSTEAD = "edgeres quantize BUNDLE --activation-range symmetric"
FLOAT_GROUPS = "edgeres quantize BUNDLE --grouped float"
FOR_A_DLA = f"{SYMMETRIC_INSTEAD} --recovery none"
"""Recovery makes another float model, and up to TensorRT 10.7 a DLA gets scales for the plain one."""


def activation_range(recipe: Recipe) -> str:
    """Return ``symmetric`` or ``shifted`` for a recipe: what it says, or what suits its target on this machine.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    wanted = recipe.quantization.activation_range
    if wanted != "auto":
        return wanted
    return "shifted" if resolve(recipe.engine)[1] in SHIFTED_TARGETS else "symmetric"


def grouped_precision(recipe: Recipe) -> str:
    """Return ``int8`` or ``float``, for a recipe's convolutions in groups: what it says, or what suits its target.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    wanted = recipe.quantization.grouped
    if wanted != "auto":
        return wanted
    return "float" if resolve(recipe.engine)[1] in SLOW_GROUPS else "int8"


def pairs_weights(recipe: Recipe) -> bool:
    """Whether a recipe's weights are to be such that no CPU's multiply–add saturates: what it says, or what suits its
    target on this machine. Behind a symmetric range hardly any does; see :func:`pairs_where_shifted`.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    wanted = recipe.quantization.weight_range
    if wanted != "auto":
        return wanted == "paired"
    return resolve(recipe.engine)[1] == "cpu" and activation_range(recipe) == "shifted"


def pairs_where_shifted(recipe: Recipe) -> bool:
    """Whether a recipe's weights are to be such beside those tensors that are shifted, where not all are.

    Raises:
        BackendError: the target is not one of the backend's.
    """
    return recipe.quantization.weight_range == "auto" and resolve(recipe.engine)[1] == "cpu"


class Source(NamedTuple):
    """What an engine is compiled from: the files in ``folder`` and their records. ``equalized`` says whether there was
    a stage of that name, whose ``scalings.npz`` the ranges then belong to; a file of that name proves nothing, for an
    interrupted build may have left it. ``preprocessing`` is how frames become the model's input."""

    folder: Path
    exported: ExportedModel
    model: QuantizedModel
    equalized: bool
    preprocessing: Preprocessing


def compile_engine(
    source: Source, section: EngineSection, watch: Watch, measure: bool = False
) -> Tuple[Engine, Tuple[str, ...]]:
    """Return the engine of a model, and warnings; its own file is written to the model's folder too.

    Args:
        measure: whether a CPU's engine is chosen by timing what the bundle holds; equal builds are to come out equal.

    Raises:
        BackendError: the backend refuses the model, or cannot serve the target.
        MissingPackageError: the backend's package is not installed.
    """
    backend, target = resolve(section)
    model = source.model
    warnings = (*_range_warnings(model, target), *_grouped_warnings(model, target), *_weight_warnings(source, target))
    if backend == "cpu":
        instead = cpu_instead(section)
        require_onnxruntime(section)
        from edgeres.forms import cpu_engine

        engine, told = cpu_engine(source.folder, source.exported, model, source.preprocessing, measure)
        warnings = (*((instead,) if instead else ()), *told, *warnings)
    else:
        decided = msgspec.structs.replace(section, backend=backend, target=target)
        engine, told = _tensorrt_engine(source, decided, watch)
        warnings = (*told, *warnings)
    return msgspec.structs.replace(engine, warnings=warnings), warnings


def _range_warnings(model: QuantizedModel, target: str) -> Tuple[str, ...]:
    """Return what is to be said of a shifted model on a target.

    Raises:
        BackendError: the target cannot run it.
    """
    if target.startswith("dla") and (model.shifted or model.activation_range == "shifted"):
        raise BackendError(
            f"{model.file.path} has activations shifted to the full int8 range, and a DLA quantizes symmetrically: up "
            "to TensorRT 10.7 it gets scales alone, without the graph that holds the shifts. Where the bundle was "
            f"built: {FOR_A_DLA}. Then compile it here."
        )
    if model.activation_range == "symmetric" or target in SHIFTED_TARGETS:
        return ()
    return (
        "activations are shifted to the full int8 range, and what its border maps cost in time on TensorRT is not "
        f"measured yet. Compare with the model that has none inside: {SYMMETRIC_INSTEAD}",
    )


def _grouped_warnings(model: QuantizedModel, target: str) -> Tuple[str, ...]:
    """Return what is to be said of convolutions in groups on a target."""
    if not model.grouped_int8 or target not in SLOW_GROUPS:
        return ()
    return (
        f"{model.grouped_int8} of the int8 convolutions are in groups; TensorRT is reported to run such slower than in "
        f"float16. Compare with the model that has them in float16: {FLOAT_GROUPS}",
    )


def _weight_warnings(source: Source, target: str) -> Tuple[str, ...]:
    """Return what is to be said of weights on a file's own steps on a target."""
    if source.exported.imported is None or not target.startswith("dla"):
        return ()
    return (
        "the model came quantized, and a DLA up to TensorRT 10.7 rounds weights to steps of its own: its answers may "
        "differ from the verdict's. Where the bundle was built: "
        f"edgeres quantize BUNDLE --backend tensorrt --target {target}",
    )


def _tensorrt_engine(source: Source, section: EngineSection, watch: Watch) -> Tuple[Engine, Tuple[str, ...]]:
    from edgeres.backends.tensorrt import attribute, build_in_child, untold

    backend, target = resolve(section)
    folder, model = source.folder, source.model
    request = _request(source, section)
    result = build_in_child(request, watch, 60 * section.timeout_minutes)
    sources = _sources(source.exported, model).values()
    read = next(ref for ref in sources if str(folder / ref.path) == result.source)
    layers, complaints = attribute(result.layers, model.layers, target)
    if complaints and section.strict:
        raise BackendError("with --strict, every layer must run as planned: " + "; ".join(complaints))
    ref = file_ref(folder, f"{files.ENGINES}{target}.engine")
    if ref.sha256 != result.sha256:
        raise BackendError(f"{ref.path} changed after it was built. Compile again, with nothing else writing there.")
    engine = Engine(
        target=target,
        backend=backend,
        precision=model.precision,
        file=ref,
        built_for=result.built_for,
        options={"source": read.path, **_options(section, request)},
        model_sha256=read.sha256,
        layers=layers,
        activation_range=model.activation_range,
        not_as_planned=complaints,
        input=result.input,
        whole_pixels=result.whole_pixels,
    )
    return engine, (*result.warnings, *complaints, *untold(layers, model.layers))


def _options(section: EngineSection, request: BuildRequest) -> Dict[str, str]:
    """Return what the builder was told, as far as it was left to nobody's default."""
    told: Dict[str, object] = {
        "workspace_mib": section.workspace_mib,
        "optimization_level": section.optimization_level,
        "gpu_fallback": None if request.target == "gpu" else ("yes" if section.gpu_fallback else "no"),
    }
    said = {name: str(value) for name, value in told.items() if value is not None}
    return {"batch": ",".join(map(str, request.batch)), **said}


def _request(source: Source, section: EngineSection) -> BuildRequest:
    """Return what to ask of TensorRT's builder, which chooses the form of the model that its version reads."""
    from edgeres.backends.tensorrt import BuildRequest, kept_in_half

    backend, target = resolve(section)
    folder, exported, model = source.folder, source.exported, source.model
    ranges: Dict[str, float] = {}
    half: Tuple[str, ...] = ()
    if target.startswith("dla") and model.precision == "int8":  # it may take its ranges beside the graph
        ranges = _ranges(folder, source.equalized)
        half = kept_in_half(model.layers)
    return BuildRequest(
        onnx=str(folder / model.file.path),
        forms={form: str(folder / ref.path) for form, ref in _sources(exported, model).items()},
        plan=str(folder / f"{files.ENGINES}{target}.engine"),
        input_name=exported.input_name,
        shape=exported.input_shape,
        batch=section.batch if target in ("gpu", "rtx") else (section.batch[1],) * 3,  # a DLA has one batch size
        precision=model.precision,
        flavour=backend,
        target="gpu" if target == "rtx" else target,
        gpu_fallback=section.gpu_fallback,
        workspace=None if section.workspace_mib is None else section.workspace_mib << 20,
        optimization_level=section.optimization_level,
        timing_cache=section.timing_cache,
        version_compatible=section.version_compatible,
        hardware_compatible=section.hardware_compatible,
        ranges=ranges,
        half=half,
        strict=section.strict,
        input=section.input if target in ("gpu", "rtx") else "float32",
        preprocessing=source.preprocessing,
    )


def _ranges(folder: Path, equalized: bool) -> Dict[str, float]:
    """Return the ``amax`` of each tensor of the FP32 model; none where the ranges are those of an equalized model."""
    if equalized:
        found = scalings_from_bytes(_content(folder, files.SCALINGS), files.SCALINGS)
        if not all(scaling.is_plain for scaling in found.values()):
            return {}
    table = from_json(_content(folder, files.TABLE), CalibrationTable, files.TABLE)
    if any(value.shift > 0 for value in table.tensors.values()):
        return {}  # their reach was chosen for twice as many steps
    return {name: value.amax for name, value in table.tensors.items()}


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"the bundle has no {name}, which a DLA's ranges come from. Build it again.") from None


def _sources(exported: ExportedModel, model: QuantizedModel) -> Dict[str, FileRef]:
    """Return the ONNX files that a builder may get, by form: as ``versions.graph_for`` names them."""
    if model.precision != "int8":
        return {model.precision: model.file}
    forms = {"fp32": exported.file, "qdq": model.file}
    return forms if model.mixed is None else {**forms, "qdq-fp16": model.mixed}


def compile_bundle(
    bundle: Path, section: EngineSection, watch: Watch, trusted_keys: Optional[Keys] = None
) -> Tuple[Bundle, Engine, Tuple[str, ...]]:
    """Return a bundle with one more engine (or a newer one for the same target), that engine, and warnings.

    The bundle is verified first and changed whole, at the end; engines for other targets stay, signatures do not.

    Args:
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed what is compiled.

    Raises:
        BundleError: there is no intact bundle, it was never quantized, or nobody who is trusted vouches for it.
        BackendError: the engine cannot be built.
    """
    trusted_keys = key_list(trusted_keys)
    verify(bundle, trusted_keys)  # before anything is made beside it: the name may be a typing mistake
    otherwise = "Copy the bundle to a folder where you may write, and compile it there."
    with Workspace(bundle, otherwise, trusted_keys) as workspace:
        if workspace.unfinished:
            raise BundleError(f"an unfinished build stands beside {bundle}. Finish it first: edgeres build {bundle}")
        manifest = verify(bundle, trusted_keys)  # again, now that no other build can change it
        exported, model = _models(bundle, manifest)
        for ref in manifest.files:
            workspace.write(ref.path, read_verified(bundle, ref))
        source = Source(workspace.folder, exported, model, "equalize" in manifest.stages, manifest.preprocessing)
        engine, warnings = compile_engine(source, section, watch, measure=True)
        changed = with_engine(manifest, engine, warnings)
        if changed.report is not None:
            workspace.write(files.REPORT, to_json(changed.report))
        changed = with_page(workspace.folder, changed)
        warnings = (*warnings, *workspace.signature_loss(changed))
        workspace.commit(changed)
    if manifest.report is not None and changed.report is None:
        again = f"edgeres validate {shlex.quote(str(bundle))} --backend {engine.target}"
        warnings = (*warnings, f"the verdict was on the engine that this one replaces, and is gone. Judge it: {again}")
    return Bundle(str(bundle), changed), engine, (*warnings, *page_loss(manifest, changed))


def _models(bundle: Path, manifest: Manifest) -> Tuple[ExportedModel, QuantizedModel]:
    """Return a bundle's models, all of them among its verified files."""
    if "export" not in manifest.stages:
        raise BundleError(f"{bundle} holds no model that edgeres exported. Build it again: edgeres build {bundle}")
    if "quantize" not in manifest.stages and manifest.precision != "fp32":
        raise BundleError(f"{bundle} holds no {manifest.precision} model yet. Make it: edgeres quantize {bundle}")
    exported = from_data(manifest.stages["export"].facts, ExportedModel, "stage export")
    model = QuantizedModel(exported.file, "fp32", ())
    if "quantize" in manifest.stages:
        model = from_data(manifest.stages["quantize"].facts, QuantizedModel, "stage quantize")
    for ref in (exported.file, model.file, model.mixed, model.integer):
        if ref is not None and ref not in manifest.files:
            raise BundleError(
                f"{bundle}: {ref.path} is not in the list of files. Build it again: edgeres build {bundle}"
            )
    return exported, model


def with_engine(manifest: Manifest, engine: Engine, warnings: Tuple[str, ...]) -> Manifest:
    """Return a manifest with ``engine`` in the place of an older one for the same target.

    It goes in front, where ``load`` looks first, if this machine can run it. A verdict on an engine that is replaced by
    another does not hold any more, and is dropped. One that holds tells of the new engine's layers too, so its file has
    to be written again: it is ``to_json(manifest.report)``.
    """
    others = tuple(other for other in manifest.engines if other.target != engine.target)
    runs = engine.backend == "cpu" or gpu_is_usable(engine.backend)
    engines = (engine, *others) if runs else (*others, engine)
    earlier = [other for other in manifest.engines if other.target == engine.target]
    replaced = any(other.file != engine.file for other in earlier)
    refs: Dict[str, FileRef] = {ref.path: ref for ref in manifest.files}
    refs[engine.file.path] = engine.file
    report, stages = manifest.report, dict(manifest.stages)
    if replaced and "compile" in stages and stages["compile"].facts.get("target") == engine.target:
        del stages["compile"]  # it made what is no longer there
    if report is not None and replaced and report.judges(engine):
        report = None
        refs.pop(files.REPORT, None)
        stages.pop("validate", None)
    elif report is not None:
        report = with_layers(report, engines)
        refs[files.REPORT] = content_ref(files.REPORT, to_json(report))
        if "validate" in stages:
            others_of = (ref for ref in stages["validate"].files if ref.path != files.REPORT)
            stages["validate"] = msgspec.structs.replace(
                stages["validate"], files=(refs[files.REPORT], *others_of), facts=to_data(report)
            )
    kept = {text for other in others for text in other.warnings}
    settled = {text for other in earlier for text in (*other.warnings, *other.not_as_planned)} - kept
    known: List[str] = [text for text in manifest.warnings if text not in settled]
    return msgspec.structs.replace(
        manifest,
        engines=engines,
        files=tuple(refs[path] for path in sorted(refs)),
        stages=stages,
        report=report,
        warnings=tuple(dict.fromkeys([*known, *warnings])),
    )


def with_layers(report: Report, engines: Tuple[Engine, ...]) -> Report:
    """Return a bundle's report with what the layers of its engines compute in."""
    return msgspec.structs.replace(report, layers=summaries(engines))


def engine_words(engine: Engine) -> str:
    """Return an engine in a few words, for a line of progress."""
    if engine.backend == "cpu":
        from edgeres.backends import cpu

        how = cpu.describe(engine.precision, engine.file.path == files.INTEGER_MODEL)
        times = [f"{name} {ms:.2f} ms" for name, ms in engine.measured_ms.items()]
        return f"{how}; measured: {', '.join(times)}" if times else how
    made_by = f"{engine.built_for.get('flavour', engine.backend)} {engine.built_for.get('tensorrt', '')}".strip()
    return f"{engine.file.path} by {made_by}, {engine.summary.words if engine.summary else 'its layers are not known'}"
