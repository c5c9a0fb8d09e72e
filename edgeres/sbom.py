"""What a bundle was made with and what is in it, as a software bill of materials: CycloneDX 1.5, in JSON.

Source: CycloneDX 1.5 (ECMA-424), the objects ``bom``, ``metadata``, ``component`` and ``hash``; purl's type ``pypi``.
"""

from __future__ import annotations

import uuid
from typing import Any, Dict, List, Tuple
from urllib.parse import quote

from edgeres.artifacts import FileRef, Manifest, from_data, to_json
from edgeres.files import sha256_bytes

MODELS = (".onnx", ".engine")


def bill_of_materials(manifest: Manifest) -> Dict[str, Any]:
    """Return a bundle's bill of materials; equal manifests have equal ones, the serial number included.

    Raises:
        BundleError: the manifest does not tell its tools as a build would.
    """
    digest = sha256_bytes(to_json(manifest))
    tools = from_data(manifest.provenance.get("tools", {}), Dict[str, str], "provenance.tools")
    python = from_data(manifest.provenance.get("python", ""), str, "provenance.python")
    bundle = {"type": "machine-learning-model", "bom-ref": "bundle", "name": manifest.name, "version": digest[:12]}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.UUID(digest[:32], version=5).urn,
        "version": 1,
        "metadata": {"component": bundle, "tools": {"components": [*map(_tool, tools.items()), *_python(python)]}},
        "components": [_file(ref) for ref in manifest.files],
        "dependencies": [{"ref": "bundle", "dependsOn": [ref.path for ref in manifest.files]}],
    }


def _tool(told: Tuple[str, str]) -> Dict[str, Any]:
    name, version = told
    component = {"type": "library", "name": name, "version": version}
    if name == "edgeres":  # until it is published, whatever an index has under this name is something else
        return component
    package = quote(name.lower().replace("_", "-"), safe="")
    return {**component, "purl": f"pkg:pypi/{package}@{quote(version, safe='')}"}


def _python(version: str) -> List[Dict[str, Any]]:
    return [{"type": "platform", "name": "Python", "version": version}] if version else []


def _file(ref: FileRef) -> Dict[str, Any]:
    return {
        "type": "machine-learning-model" if ref.path.endswith(MODELS) else "file",
        "bom-ref": ref.path,
        "name": ref.path,
        "hashes": [{"alg": "SHA-256", "content": ref.sha256}],
    }
