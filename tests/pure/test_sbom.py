"""The bill of materials has what CycloneDX 1.5 asks for, and names every file and tool of a bundle."""

from __future__ import annotations

import re
import uuid
from typing import Any, Dict

import pytest

from edgeres.artifacts import FileRef, Manifest, Preprocessing
from edgeres.errors import BundleError
from edgeres.sbom import bill_of_materials

TYPES = {"library", "platform", "file", "machine-learning-model"}  # of those that the standard lists
REFS = (FileRef("engines/gpu.engine", "a" * 64, 1), FileRef("recipe.toml", "b" * 64, 2))


def manifest(**provenance: Any) -> Manifest:
    return Manifest("net", "int8", {}, Preprocessing((4, 4)), REFS, {}, provenance)


def bill(**provenance: Any) -> Dict[str, Any]:
    return bill_of_materials(manifest(**provenance))


def test_it_has_what_the_standard_requires() -> None:
    found = bill(tools={"numpy": "2.1.0", "onnxruntime": "1.20+cpu"}, python="3.12.1")
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.5", 1)
    assert uuid.UUID(found["serialNumber"]).urn == found["serialNumber"]
    tools, files = found["metadata"]["tools"]["components"], found["components"]
    for component in (found["metadata"]["component"], *tools, *files):
        assert component["type"] in TYPES
        assert component["name"]
    for component in files:
        assert component["hashes"][0]["alg"] == "SHA-256"
        assert re.fullmatch("[a-f0-9]{64}", component["hashes"][0]["content"])
    references = [found["metadata"]["component"]["bom-ref"], *(component["bom-ref"] for component in files)]
    assert len(set(references)) == len(references)
    assert {*found["dependencies"][0]["dependsOn"], found["dependencies"][0]["ref"]} == set(references)


def test_every_file_and_tool_is_in_it() -> None:
    found = bill(tools={"edgeres": "0.1.0", "numpy": "2.1.0", "onnxruntime": "1.20+cpu"}, python="3.12.1")
    assert {one["name"]: one["hashes"][0]["content"] for one in found["components"]} == {
        ref.path: ref.sha256 for ref in REFS
    }
    tools = found["metadata"]["tools"]["components"]
    purls = [None, "pkg:pypi/numpy@2.1.0", "pkg:pypi/onnxruntime@1.20%2Bcpu", None]
    assert [one.get("purl") for one in tools] == purls
    assert tools[-1] == {"type": "platform", "name": "Python", "version": "3.12.1"}


def test_equal_bundles_have_equal_bills_and_others_another_number() -> None:
    assert bill() == bill()
    assert bill()["serialNumber"] != bill(python="3.12.1")["serialNumber"]


@pytest.mark.parametrize("tools", [7, ["numpy"], {"numpy": 2}])
def test_tools_that_no_build_tells_are_refused(tools: Any) -> None:
    with pytest.raises(BundleError, match=r"provenance\.tools"):
        bill(tools=tools)
