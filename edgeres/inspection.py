"""What is inside a bundle or an ONNX file, as plain data: for ``edgeres inspect`` and for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, TypeVar

from edgeres import files
from edgeres.artifacts import (
    LEARNED,
    CalibrationTable,
    ExportedModel,
    Hygiene,
    LayerCost,
    LayerError,
    Manifest,
    QuantizationErrors,
    QuantizedModel,
    TensorRange,
    final_ranges,
    from_data,
    from_json,
    summaries,
    to_data,
)
from edgeres.bundle import check_files, parse_manifest, read_listed, signed_bytes, unlisted, verify_and_read
from edgeres.errors import BundleError, MissingPackageError
from edgeres.files import sha256_bytes
from edgeres.packed import Contents, read_packed
from edgeres.signatures import Keys

T = TypeVar("T")
LOOKED_INTO = (files.TABLE, files.ERRORS)
LARGEST = 64 << 20  # bytes of such a file; half a million calibration samples fit
WORST = 3  # layers that are named in short
WEIGHTED = ("Conv", "Gemm", "MatMul")


def inspect_bundle(folder: Path, trusted_keys: Optional[Keys] = None) -> Dict[str, Any]:
    """Return a verified bundle's layers with the reason and the error of each, its ranges, engines, provenance and
    verdict."""
    return read_and_inspect(folder, trusted_keys)[1]


def read_and_inspect(folder: Path, trusted_keys: Optional[Keys] = None) -> Tuple[Manifest, Dict[str, Any]]:
    """Return a verified bundle's manifest, and what :func:`inspect_bundle` returns, from one reading."""
    manifest, contents = verify_and_read(folder, LOOKED_INTO, trusted_keys, LARGEST)
    return manifest, {**_inside(folder, manifest, contents), "unlisted": unlisted(folder, manifest)}


def inspect_packed(file: Path, trusted_keys: Optional[Keys] = None) -> Tuple[Manifest, Dict[str, Any]]:
    """Return a verified packed bundle's manifest, and what :func:`inspect_bundle` returns, from one reading."""
    front, contents = read_packed(file, LOOKED_INTO, trusted_keys, LARGEST)
    return front.manifest, {**_inside(file, front.manifest, contents), "unlisted": []}


def _inside(folder: Path, manifest: Manifest, contents: Dict[str, bytes]) -> Dict[str, Any]:
    table = errors = None
    if files.TABLE in contents:
        table = from_json(contents[files.TABLE], CalibrationTable, str(folder / files.TABLE))
    if files.ERRORS in contents:
        errors = from_json(contents[files.ERRORS], QuantizationErrors, str(folder / files.ERRORS))
    climb = manifest.climb
    exported = _stage(manifest, "export", ExportedModel)
    quantized = _stage(manifest, "quantize", QuantizedModel)
    return {
        "bundle": str(folder),
        "name": manifest.name,
        "precision": manifest.precision,
        "preprocessing": to_data(manifest.preprocessing),
        "opset": exported.opset if exported else None,
        "layers": _engine_layers(manifest) or _layers(quantized),
        "plan": _layers(quantized),
        "activation_range": quantized.activation_range if quantized else None,
        "ranges": {name: to_data(value) for name, value in final_ranges(table, quantized).items()},
        "errors": to_data(errors) if errors else None,
        "calibration": _calibration(table),
        "hygiene": to_data(_stage(manifest, "hygiene", Hygiene)),
        "ladder": [to_data(rung) for rung in climb.rungs] if climb else [],
        "given_back": [to_data(cost) for cost in climb.taken_layers] if climb else [],
        "budget_ended": climb.ended if climb else "",
        "sensitivity": _sensitivity(manifest),
        "engines": [to_data(engine) for engine in manifest.engines],
        "summaries": [to_data(summary) for summary in summaries(manifest.engines)],
        "validation": to_data(manifest.report) if manifest.report else None,
        "provenance": manifest.provenance,
        "files": [to_data(ref) for ref in manifest.files],
        "warnings": list(manifest.warnings),
    }


def verify_bundle(folder: Path, trusted_keys: Optional[Keys] = None) -> Tuple[Manifest, Dict[str, Any]]:
    """Return a verified bundle's manifest, and what of the bundle was verified; ``folder`` may be a packed one, too.

    ``signatures`` has the ``key`` of each and whether it says to be of this manifest (``current``); ``trusted`` whether
    one of the trusted keys really signed it: None where none were given, and then no signature was checked.

    Raises:
        BundleError: it is damaged, or none of the trusted keys vouches for it.
        SigningKeyError: what is to be trusted is no public key.
    """
    asked = trusted_keys is not None
    if os.path.isfile(folder):
        contents, _ = read_packed(folder, (), trusted_keys)
        return contents.manifest, signatures_found(str(folder), contents, asked)
    content, found, good = signed_bytes(folder, trusted_keys)
    manifest = parse_manifest(folder, content)
    check_files(folder, manifest)
    facts = signatures_found(str(folder), Contents(manifest, content, found, good), asked)
    return manifest, {**facts, "unlisted": unlisted(folder, manifest)}


def signatures_found(place: str, contents: Contents, asked: bool) -> Dict[str, Any]:
    """Return what :func:`verify_bundle` does of a bundle in which there is nothing else; ``asked`` says whether keys
    were to be trusted."""
    digest = sha256_bytes(contents.content)
    signatures = [
        {"key": one.key, "current": one.manifest == digest, "trusted": one.key in contents.trusted if asked else None}
        for one in contents.signatures
    ]
    return {
        "bundle": place,
        "files": len(contents.manifest.files),
        "unlisted": [],
        "intact": True,
        "trusted": True if asked else None,
        "signatures": signatures,
    }


def missing_engine(manifest: Manifest, folder: str) -> str:
    """Return what to do where a bundle has no engine; an empty text where it has one."""
    if manifest.engines:
        return ""
    model = "quantize" in manifest.stages or manifest.precision == "fp32"
    make = "one where it runs: edgeres compile" if model else "the model, and one: edgeres build"
    return f"it has no engine yet. Make {make} {folder}"


def signature_words(signature: Dict[str, Any]) -> str:
    """Return one of ``signatures`` of :func:`verify_bundle` in words."""
    if signature["trusted"]:
        return f"signed by {signature['key']}, which you trust"
    what = "" if signature["current"] else " for another manifest"
    doubt = "whom you do not trust" if signature["trusted"] is False else "not checked against a key that you trust"
    return f"says to be signed by {signature['key']}{what}, {doubt}"


def layer_errors(folder: Path, manifest: Manifest) -> Optional[QuantizationErrors]:
    """Return where a bundle's error comes from, layer by layer; None where that was not found out.

    Raises:
        BundleError: the file is not what the manifest says.
    """
    content = read_listed(folder, manifest, files.ERRORS)
    return None if content is None else from_json(content, QuantizationErrors, str(folder / files.ERRORS))


def worst_errors(errors: Optional[QuantizationErrors]) -> List[Dict[str, Any]]:
    """Return the layers that cause most of the noise: ``module``, its ``share``, the SQNR of its own quantization."""
    return [
        {"module": layer.module or layer.node, "share": layer.share, "own_sqnr_db": layer.own_sqnr_db}
        for layer in (errors.layers[:WORST] if errors else ())
    ]


def repairs(folder: Path, manifest: Manifest) -> Tuple[Tuple[str, ...], str]:
    """Return what ``edgeres.validation.advice`` has to know of a bundle: the layers to keep in float besides those that
    its recipe keeps, and the flag that kept its build from looking for them, or an empty text."""
    wanted = manifest.recipe.get("quantization", {})
    untried = ""
    if wanted.get("recovery", "auto") in ("none", "fast"):
        untried = f"--recovery {wanted['recovery']}"
    elif wanted.get("budget_minutes") == 0:
        untried = "--budget-minutes 0"
    if (manifest.recipe.get("engine", {}).get("target") or "").startswith("dla"):
        untried = ""  # a DLA gets no recovery, whatever was asked for
    worst = _costliest(manifest) or [
        layer.module or layer.node
        for layer in getattr(layer_errors(folder, manifest), "layers", ())
        if layer.op in WEIGHTED
    ]
    return (*wanted.get("keep_float", ()), *dict.fromkeys(worst[:WORST])) if worst else (), untried


def _stage(manifest: Manifest, name: str, kind: Type[T]) -> Optional[T]:
    """Return what a stage found, checked as all that is read is: whoever can write a manifest can write facts."""
    return from_data(manifest.stages[name].facts, kind, f"stage {name}") if name in manifest.stages else None


def _sensitivity(manifest: Manifest) -> Optional[Dict[str, Any]]:
    if "sensitivity" not in manifest.stages:
        return None
    return {**manifest.stages["sensitivity"].facts, "layers": [to_data(cost) for cost in _costs(manifest)]}


def _costs(manifest: Manifest) -> List[LayerCost]:
    layers = manifest.stages["sensitivity"].facts.get("layers", ())
    return from_data(layers, List[LayerCost], "stage sensitivity")


def _costliest(manifest: Manifest) -> List[str]:
    """Return the layers with weights that cost most where each alone is quantized, as far as the build measured it."""
    if "sensitivity" not in manifest.stages:
        return []
    costs = _costs(manifest)
    given = {node for cost in (manifest.climb.taken_layers if manifest.climb else ()) for node in cost.nodes}
    return [
        cost.layer
        for cost in costs
        if cost.weighted == len(cost.nodes) == 1 and cost.expected and given.isdisjoint(cost.nodes)
    ]


def inspect_file(path: Path) -> Dict[str, Any]:
    """Return what an ONNX file says about itself.

    Raises:
        MissingPackageError: onnx is not installed.
        BundleError: the file is not ONNX by its name.
        ExportError: the file cannot be read as ONNX.
    """
    if path.suffix.lower() != ".onnx":
        raise BundleError(f"{path} is neither a bundle's folder nor an .onnx file")
    if not path.is_file():
        raise BundleError(f"there is no ordinary file {path}. Check the path.")
    try:
        from edgeres.export import files_of
        from edgeres.quantize.describe import describe_file
    except ImportError:
        raise MissingPackageError.for_extra("onnx", "looking into an .onnx file", "host") from None
    files_of(path)  # which refuses what is too large to be read
    return {"file": str(path), **describe_file(path)}


def _layers(quantized: Any) -> List[Dict[str, str]]:
    if quantized is None:
        return []
    return [
        {"name": x.node, "type": x.op, "precision": x.precision, "module": x.module, "reason": x.reason}
        for x in quantized.layers
    ]


def _engine_layers(manifest: Manifest) -> List[Dict[str, Any]]:
    """Return the layers of the bundle's first engine that has a builder's report."""
    for engine in manifest.engines:
        if engine.layers:
            return [{**to_data(layer), "target": engine.target} for layer in engine.layers]
    return []


def _calibration(table: Any) -> Any:
    if table is None:
        return None
    return {
        "method": table.method,
        "samples": table.samples.count,
        "source": table.samples.source,
        "digest": table.samples.digest,
    }


def range_words(value: TensorRange) -> str:
    """Return one tensor's range in a line."""
    sqnr = "" if value.sqnr_db is None else f", {value.sqnr_db:.1f} dB alone"
    reach = f"0 to {value.amax:.4g}" if value.shift else f"±{value.amax:.4g}"
    how = "as learned" if value.method == LEARNED else f"by {value.method}"
    return (
        f"{reach} {how} (seen {value.minimum:.4g} to {value.maximum:.4g}, "
        f"{100 * value.zeros:.0f} % zeros, {100 * value.clipped:.3g} % clipped{sqnr})"
    )


def grouped(problems: Sequence[str]) -> List[str]:
    """Return breaches of rules with those of a kind in one sentence, after the names of the first few nodes."""
    kinds: Dict[str, List[str]] = {}
    for problem in problems:
        node, _, text = problem.partition(": ")
        kinds.setdefault(text or node, []).extend([node] if text else [])
    said = []
    for text, nodes in kinds.items():
        more = f" and {len(nodes) - WORST} more" if len(nodes) > WORST else ""
        said.append(f"{', '.join(nodes[:WORST])}{more}: {text}" if nodes else text)
    return said


def pair_row(name: str, pair: Dict[str, Any]) -> List[str]:
    """Return what one Q/DQ pair of an ONNX file says, for a table: tensor, role, type, zero point, reach, channels."""
    if pair["scale"] is None:
        return [name, pair["role"], pair["type"], "computed", "computed", ""]
    zeros = pair["zero_point"]
    reach = "" if pair["minimum"] is None else f"{pair['minimum']:.4g} to {pair['maximum']:.4g}"
    points = str(zeros[0]) if len(zeros) == 1 else f"{zeros[0]} to {zeros[-1]}"
    return [name, pair["role"], pair["type"], points, reach, str(pair["channels"])]


ERROR_COLUMNS = (
    "module",
    "type",
    "of the noise",
    "own",
    "up to it",
    "input",
    "weights",
    "range",
    "clipped",
    "saturated",
)


def error_row(error: LayerError) -> List[str]:
    """Return one layer's error in words, for ``ERROR_COLUMNS``."""
    return [
        error.module or error.node,
        error.op,
        f"{100 * error.share:.1f} %",
        _ratio(error.own_sqnr_db),
        _ratio(error.accumulated_sqnr_db),
        _ratio(error.input_sqnr_db),
        _ratio(error.weight_sqnr_db) if error.op in WEIGHTED else "",
        f"{error.lowest:.3g} to {error.highest:.3g}",
        f"{100 * error.clipped:.2g} %",
        f"{100 * error.saturated:.2g} %",
    ]


def _ratio(decibels: Optional[float]) -> str:
    return "exact" if decibels is None else f"{decibels:.1f} dB"
