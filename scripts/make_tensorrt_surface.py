#!/usr/bin/env python3
"""Reduce dumps of TensorRT's Python bindings to what edgeres could ever touch.

Usage: make_tensorrt_surface.py DUMPS [OUT]

DUMPS is a folder of ``tensorrt-<version>.json``, one per release: for each class its methods (name and signature, as
the binding itself prints it), its properties (settable or not) and, for an enum, its members and their values. OUT
(default: tests/tensorrt/surface) gets one small file per release for tests/tensorrt/tensorrt_double. Nothing but names,
types and values goes through. The same dumps give the same bytes.

TensorRT 8.5 never had a wheel to dump. It is 8.6 without what 8.6 added: ADDED_BY_8_6.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "tests" / "tensorrt" / "surface"

CLASSES = (
    "Builder",
    "Dims",
    "EngineInspector",
    "IActivationLayer",
    "IBuilderConfig",
    "ICudaEngine",
    "IElementWiseLayer",
    "IExecutionContext",
    "IHostMemory",
    "IInt8Calibrator",
    "IInt8EntropyCalibrator2",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IPoolingLayer",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
)

ENUMS = (
    "ActivationType",
    "BuilderFlag",
    "CalibrationAlgoType",
    "DataType",
    "DeviceType",
    "ElementWiseOperation",
    "EngineCapability",
    "EngineStat",
    "ErrorCode",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "ILogger.Severity",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "PoolingType",
    "PreviewFeature",
    "ProfilingVerbosity",
    "QuantizationFlag",
    "RuntimePlatform",
    "TacticSource",
    "TempfileControlFlag",
    "TensorFormat",
    "TensorIOMode",
    "TensorLocation",
    "TilingOptimizationLevel",
)

FUNCTIONS = ("init_libnvinfer_plugins", "nptype", "volume")

# edgeres parses ONNX and builds no layer by hand; context managers are deprecated in every release.
IGNORED = re.compile(r"INetworkDefinition\.add_|\.__(enter|exit|del)__$")

SPELLINGS = (
    (r"nvinfer1::|nvonnxparser::", ""),
    (r"::", "."),
    (r"\bIParserError\b", "ParserError"),
    (r"\bIEngineInspector\b", "EngineInspector"),
    (r"typing\.SupportsInt", "int"),
    (r"typing\.SupportsFloat", "float"),
    (r"typing_extensions\.Buffer", "buffer"),
    (r"typing_extensions\.CapsuleType", "capsule"),
    (r"collections\.abc\.Sequence|\bList\b", "list"),
    (r"\bTuple\b", "tuple"),
)

ADDED_BY_8_6 = (
    "BuilderFlag.EXCLUDE_LEAN_RUNTIME",
    "BuilderFlag.FP8",
    "BuilderFlag.VERSION_COMPATIBLE",
    "DataType.FP8",
    "HardwareCompatibilityLevel",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.max_aux_streams",
    "IBuilderConfig.plugins_to_serialize",
    "ICudaEngine.hardware_compatibility_level",
    "ICudaEngine.num_aux_streams",
    "IExecutionContext.set_aux_streams",
    "OnnxParser.clear_flag",
    "OnnxParser.flags",
    "OnnxParser.get_flag",
    "OnnxParser.get_used_vc_plugin_libraries",
    "OnnxParser.set_flag",
    "OnnxParserFlag",
    "PreviewFeature.PROFILE_SHARING_0806",
    "Runtime.engine_host_code_allowed",
    "Runtime.load_runtime",
    "Runtime.tempfile_control_flags",
    "Runtime.temporary_directory",
    "TempfileControlFlag",
)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    dumps, out = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else OUT
    files = sorted(dumps.glob("tensorrt-*.json"))
    if not files:
        sys.exit(f"{dumps} holds no tensorrt-<version>.json")
    for file in files:
        release = re.sub(r"\.post\d+$", "", file.stem.split("-", 1)[1])
        surface = reduced(json.loads(file.read_text(encoding="utf-8")), release)
        write(surface, out)
        if release.startswith("8.6."):
            write(without(surface, ADDED_BY_8_6, "8.5.2"), out)


def reduced(dump: dict[str, Any], release: str) -> dict[str, Any]:
    """Return the surface of one release: enums, classes and module-level functions."""
    return {
        "version": release,
        "enums": {name: by_value(dump[name]["enum_values"]) for name in ENUMS if name in dump},
        "classes": {name: reduced_class(name, dump[name]) for name in CLASSES if name in dump},
        "functions": {
            name: signature(dump["__module__"]["methods"][name])
            for name in FUNCTIONS
            if name in dump["__module__"]["methods"]
        },
    }


def by_value(members: dict[str, int]) -> dict[str, int]:
    """Return an enum's members in the order of their values."""
    return dict(sorted(members.items(), key=lambda member: (member[1], member[0])))


def reduced_class(name: str, dump: dict[str, Any]) -> dict[str, Any]:
    """Return the bases, methods and properties of one class; no ``__init__`` where Python cannot construct it."""
    methods = {
        method: signature(text)
        for method, text in sorted(dump["methods"].items())
        if not IGNORED.search(f"{name}.{method}") and "*args" not in text
    }
    properties = {key: facts["settable"] for key, facts in sorted(dump.get("properties", {}).items())}
    return {"bases": dump.get("bases", []), "methods": methods, "properties": properties}


def signature(text: str) -> dict[str, str]:
    """Return parameter → type and, as ``return``, the result's type.

    A parameter with a default ends in ``?``; where the default is None the type ends in ``?`` as well.
    """
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    match = re.fullmatch(r"\w+\((.*)\)(?: -> (.+))?", text)
    if match is None:
        raise ValueError(f"not a signature: {text!r}")
    found = {}
    for parameter in re.split(r", (?=\w+(?::|,|$))", match[1]) if match[1] else []:
        kind, _, default = parameter.partition(" = ")
        name, _, kind = kind.partition(": ")
        if name != "self":
            found[name + ("?" if default else "")] = (kind or "object") + ("?" if default == "None" else "")
    found["return"] = match[2] or "object"
    return found


def without(surface: dict[str, Any], absent: Sequence[str], release: str) -> dict[str, Any]:
    """Return a copy of a surface that lacks some classes, enums or members; each must have been there."""
    left = json.loads(json.dumps(surface))
    left["version"] = release
    for path in absent:
        owner, _, member = path.partition(".")
        places = [left["enums"], left["classes"]]
        if member:
            places = [left["enums"].get(owner, {}), *(left["classes"].get(owner, {}).get(part, {}) for part in PARTS)]
        place = next((place for place in places if (member or owner) in place), None)
        if place is None:
            raise ValueError(f"{surface['version']} has no {path}")
        del place[member or owner]
    return left


PARTS = ("methods", "properties")


def write(surface: dict[str, Any], out: Path) -> None:
    """Write one surface as ``<major>.<minor>.json``: a line per method and enum, for readable diffs."""
    lines = []
    for section in ("enums", "functions"):
        rows = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in surface[section].items()]
        lines.append(f'  "{section}": {{\n' + ",\n".join(rows) + "\n  }")
    classes = []
    for name, facts in surface["classes"].items():
        methods = [f"        {json.dumps(key)}: {json.dumps(value)}" for key, value in facts["methods"].items()]
        classes.append(
            f'    {json.dumps(name)}: {{\n      "bases": {json.dumps(facts["bases"])},\n'
            f'      "properties": {json.dumps(facts["properties"])},\n'
            '      "methods": {' + ("\n" + ",\n".join(methods) + "\n      " if methods else "") + "}\n    }"
        )
    lines.append('  "classes": {\n' + ",\n".join(classes) + "\n  }")
    text = f'{{\n  "version": {json.dumps(surface["version"])},\n' + ",\n".join(lines) + "\n}\n"
    if json.loads(text) != surface:
        raise AssertionError("what was written does not read back as what was meant")
    major, minor = surface["version"].split(".")[:2]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{major}.{minor}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
