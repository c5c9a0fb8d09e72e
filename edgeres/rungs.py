"""The rungs of an unfinished climb, kept in the work folder: an interruption costs no more than the running rung.

Each rung writes the same files as the one before. So after every validated rung its files and stage records are copied
aside; those of the best rung and of the last are kept, and the ladder is written down last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Collection, Dict

import msgspec

from edgeres.artifacts import Climb, StageRecord, from_json, to_json
from edgeres.bundle import intact
from edgeres.errors import BundleError
from edgeres.files import write_atomic
from edgeres.workspace import Workspace

FOLDER = ".rungs"
LADDER = "ladder.json"
STAGES = ("observe", "equalize", "calibrate", "quantize", "compile", "validate")
"""What differs from rung to rung."""


class _Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``records`` are stage records by rung (its number, as text: JSON's keys are) and stage."""

    key: str
    climb: Climb
    records: Dict[str, Dict[str, StageRecord]]


class Rungs:
    """The rungs of a climb whose ``key`` hashes all that it depends on. ``climb`` is as far as it came."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        self._workspace = workspace
        self._folder = workspace.folder / FOLDER
        self._ladder = _Ladder(key, Climb((), 0), {})
        with contextlib.suppress(BundleError, OSError):
            found = from_json((self._folder / LADDER).read_bytes(), _Ladder, LADDER)
            if found.key == key and self._complete(found):
                self._ladder = found

    @property
    def climb(self) -> Climb:
        return self._ladder.climb

    def add(self, climb: Climb) -> None:
        """Keep what the workspace holds as the last rung of ``climb``, all of whose others were added before."""
        number = str(len(climb.rungs) - 1)
        records = {name: record for name, record in self._workspace.records.items() if name in STAGES}
        for ref in (ref for record in records.values() for ref in record.files):
            write_atomic(self._folder / number / ref.path, (self._workspace.folder / ref.path).read_bytes())
        self._write(climb, {**self._ladder.records, number: records}, {number, str(climb.taken)})

    def bring_back(self, number: int) -> None:
        """Put a kept rung's files and records where they were."""
        for name, record in self._ladder.records[str(number)].items():
            for ref in record.files:
                self._workspace.write(ref.path, (self._folder / str(number) / ref.path).read_bytes())
            paths = tuple(ref.path for ref in record.files)
            self._workspace.finish(name, record.key, paths, record.seconds, record.facts, record.warnings)

    def clear(self) -> None:
        """Forget it all: the climb is over, or starts anew."""
        self._ladder = _Ladder(self._ladder.key, Climb((), 0), {})
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, climb: Climb, records: Dict[str, Dict[str, StageRecord]], kept: Collection[str]) -> None:
        self._ladder = _Ladder(self._ladder.key, climb, {number: records[number] for number in kept})
        write_atomic(self._folder / LADDER, to_json(self._ladder))
        for entry in os.scandir(self._folder):
            if entry.is_dir() and entry.name not in kept:
                shutil.rmtree(entry.path, ignore_errors=True)

    def _complete(self, ladder: _Ladder) -> bool:
        """Whether every kept rung's files are there and as they were, the best and the last among them."""
        wanted = {str(ladder.climb.taken), str(len(ladder.climb.rungs) - 1)}
        return wanted == ladder.records.keys() and all(
            intact(self._folder / number, ref)
            for number, records in ladder.records.items()
            for record in records.values()
            for ref in record.files
        )
