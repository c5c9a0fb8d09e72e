"""The rungs of an unfinished climb, kept in the work folder: an interruption costs no more than the running rung.

Each rung writes the same files as the one before. So after every validated rung its files and stage records are copied
aside; those of the best rung and of the last are kept, and the ladder is written down last.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from typing import Collection, Dict, Iterable, Optional

import msgspec

from edgeres.artifacts import Climb, LayerCost, Rung, StageRecord, from_json, to_json
from edgeres.bundle import intact
from edgeres.errors import BundleError
from edgeres.files import write_atomic
from edgeres.validation import decibels
from edgeres.workspace import RUNGS, Workspace

LADDER = "ladder.json"
STAGES = ("observe", "equalize", "calibrate", "quantize", "compile", "validate")
"""What differs from rung to rung."""
RANKS = ("fail", "inconclusive", "pass")
NAMES = {0: "none", 1: "fast", 2: "full"}
"""Of rungs that give nothing back, by how much recovery they have."""
WITHOUT_FULL = ("", "size", "loss", "time", "failed")
"""Why no rung has reconstruction."""


class _Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``records`` are stage records by rung (its number, as text: JSON's keys are) and stage."""

    key: str
    climb: Climb
    records: Dict[str, Dict[str, StageRecord]]


def sound(climb: Climb) -> bool:
    """Whether a climb that was read can be one that was written: nothing in it is believed before."""
    names = [cost.layer for cost in climb.given_back]
    layers = [list(rung.layers) for rung in climb.rungs]
    return (
        0 <= climb.taken < len(climb.rungs)
        and climb.without_full in WITHOUT_FULL
        and all(map(_sound_rung, climb.rungs))
        and all(map(_sound_cost, climb.given_back))
        and len(set(names)) == len(names)
        and all(given == names[: len(given)] for given in layers)
        and layers[0] == []
        and layers == sorted(layers, key=len)
        and layers[-1] == names
    )


def _sound_rung(rung: Rung) -> bool:
    numbers = (rung.seconds, rung.agreement, rung.drop_pp, rung.sqnr_db, rung.bought_pp)
    judged = rung.drop_pp is not None and (rung.drop_pp > 0 or rung.verdict != "fail")
    return judged and rung.level in NAMES and rung.verdict in RANKS and rung.seconds >= 0 and all(map(_finite, numbers))


def _sound_cost(cost: LayerCost) -> bool:
    shares = 0 <= cost.expected <= 1 and 0 <= cost.changed <= 1
    return shares and 0 <= cost.weighted <= len(cost.nodes) > 0 and _finite(cost.sqnr_db)


def _finite(number: Optional[float]) -> bool:
    return number is None or math.isfinite(number)


class Rungs:
    """The rungs of a climb whose ``key`` hashes all that it depends on. ``climb`` is as far as it came."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        self._workspace = workspace
        self._folder = workspace.work / RUNGS
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
        if not sound(ladder.climb) or wanted != ladder.records.keys():
            return False
        judged = all(
            "validate" in records
            and records["validate"].facts.get("verdict") == ladder.climb.rungs[int(number)].verdict
            for number, records in ladder.records.items()
        )
        return judged and all(
            name in STAGES
            and 0 <= record.seconds < math.inf
            and all(intact(self._folder / number, ref) for ref in record.files)
            for number, records in ladder.records.items()
            for name, record in records.items()
        )


def reasons(given_back: Iterable[LayerCost]) -> Dict[str, str]:
    """Return, for each node that is given back, why: what ``edgeres inspect`` says of it."""
    return {
        node: f"given back by the accuracy budget: quantized alone, {cost.layer} costs "
        f"{_share(cost.expected)} of the answers ({decibels(cost.sqnr_db)})"
        for cost in given_back
        for node in cost.nodes
    }


def _share(share: float) -> str:
    return "less than 0.01 %" if share < 1e-4 else f"{100 * share:.2g} %"


def rung_words(rung: Rung) -> str:
    """Return a rung in a line: what was done, what it lost, and what that bought."""
    what = f"{', '.join(rung.layers)} in float" if rung.layers else f"recovery {rung.rung}"
    lost = "" if rung.drop_pp is None else f" loses {rung.drop_pp:.2f} pp,"
    bought = "" if rung.bought_pp is None else f", bought {rung.bought_pp:.2f} pp"
    return f"{what}:{lost} {decibels(rung.sqnr_db)}: {rung.verdict}{bought}"


def budget_words(climb: Climb) -> str:
    """Return a climb in a line."""
    rung = climb.rungs[climb.taken]
    layers = f"{', '.join(rung.layers)} given back" if rung.layers else "nothing given back"
    without = f"no reconstruction ({climb.without_full}), " if climb.without_full else ""
    return f"{len(climb.rungs)} rungs, {without}{layers}: {rung.verdict}"
