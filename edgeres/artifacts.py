"""The nouns that flow through edgeres: frozen records of files and of facts, never a file's content.

::

    Recipe ─export─▶ ExportedModel ─calibrate─▶ CalibrationTable ─quantize─▶ QuantizedModel ─compile─▶ Engine
                          └─ FP32 reference logits ──────────▶ validate ◀── engine logits ◀── load ──────┘
                                                                  └─▶ Report;   Manifest binds them all, written last

Each converts to JSON and back by msgspec (:func:`to_json`, :func:`from_json`); unknown fields are refused, so that a
file from a newer edgeres is named as that instead of being half understood. Paths are relative to the bundle.

Most stand in files by their theme (:mod:`edgeres.inputs`, :mod:`edgeres.nets`, :mod:`edgeres.verdicts`); all
are imported from here.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Type, TypeVar, Union

import msgspec

from edgeres.errors import BundleError
from edgeres.inputs import Comparison, FileGrid, FileRef, Finding, Hygiene, Imported, Preprocessing, SampleSet
from edgeres.nets import (
    LEARNED,
    CalibrationTable,
    Engine,
    EngineLayer,
    ExportedModel,
    LayerError,
    LayerPlan,
    LayerSummary,
    QuantizationErrors,
    QuantizedModel,
    TensorRange,
    final_ranges,
    summaries,
)
from edgeres.verdicts import (
    Attribution,
    BaselineChange,
    Change,
    ClassChange,
    Climb,
    Confidence,
    Discordant,
    LayerCost,
    Report,
    Rung,
)

__all__ = [
    "LEARNED",
    "Attribution",
    "BaselineChange",
    "Bundle",
    "CalibrationTable",
    "Change",
    "ClassChange",
    "Climb",
    "Comparison",
    "Confidence",
    "Discordant",
    "Engine",
    "EngineLayer",
    "ExportedModel",
    "FileGrid",
    "FileRef",
    "Finding",
    "Hygiene",
    "Imported",
    "JsonSource",
    "LayerCost",
    "LayerError",
    "LayerPlan",
    "LayerSummary",
    "Manifest",
    "Preprocessing",
    "QuantizationErrors",
    "QuantizedModel",
    "Report",
    "Rung",
    "SampleSet",
    "StageRecord",
    "TensorRange",
    "final_ranges",
    "from_data",
    "from_json",
    "summaries",
    "to_data",
    "to_json",
]

# Python 3.8 (JetPack 5) evaluates these annotations through typing, so they are spelled the old way.


class StageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished stage: ``key`` hashes everything that its result depends on; ``facts`` is its noun, as JSON data.

    ``warnings`` are what was said while it ran, to be said again where its result is taken over.
    """

    key: str
    files: Tuple[FileRef, ...]
    seconds: float
    facts: Dict[str, Any]
    warnings: Tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written last: what was wanted, what was made, with which tools, and how it was judged."""

    name: str
    precision: str
    recipe: Dict[str, Any]
    preprocessing: Preprocessing
    files: Tuple[FileRef, ...]
    stages: Dict[str, StageRecord]
    provenance: Dict[str, Any]
    engines: Tuple[Engine, ...] = ()
    report: Optional[Report] = None
    warnings: Tuple[str, ...] = ()
    format: int = 1

    @property
    def climb(self) -> Optional[Climb]:
        """What was done for the accuracy budget; None where the first net kept it, or nothing was to be done."""
        record = self.stages.get("budget")
        if record is None:
            return None
        found = from_data(record.facts, Climb, "stage budget")
        if not 0 <= found.taken < len(found.rungs):
            raise BundleError("stage budget: the rung that was taken is none of those tried. Build the bundle again.")
        return found


class Bundle(msgspec.Struct, frozen=True):
    """A finished bundle: its folder and its manifest. ``report`` is the comparison with FP32, if there was one."""

    path: str
    manifest: Manifest

    @property
    def report(self) -> Optional[Report]:
        return self.manifest.report


T = TypeVar("T")
JsonSource = Union[bytes, str]


def to_json(noun: Any) -> bytes:
    """Return a noun as indented UTF-8 JSON that ends in a newline; equal nouns give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(noun, order="deterministic"), indent=2) + b"\n"


def from_json(content: JsonSource, kind: Type[T], where: str) -> T:
    """Return the noun of ``kind`` that JSON holds.

    Raises:
        BundleError: it is not JSON, or not such a noun; ``where`` names the file in the message.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as problem:
        raise BundleError(
            f"{where}: not a {kind.__name__} that this edgeres understands ({problem}). "
            "It is damaged or was written by another version: build it again."
        ) from None


def to_data(noun: Any) -> Any:
    """Return a noun as plain dicts, lists, strings and numbers."""
    return msgspec.to_builtins(noun)


def from_data(data: Any, kind: Type[T], where: str) -> T:
    """Return the noun of ``kind`` that plain data holds.

    Raises:
        BundleError: the data is not such a noun; ``where`` names its place in the message.
    """
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as problem:
        raise BundleError(f"{where}: {problem}. Build the bundle again.") from None
