"""A run of bad files through doors: each in a child, counted by how it ends, and told as tables."""

from __future__ import annotations

import collections
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from doors import Door
from hostile import BASE, host
from refusals import old_bundle, refusals, tree
from sandbox import ACCEPTED, CRASH, GOOD, HANG, MEMORY, OUTCOMES, REFUSED, TRACEBACK, Enter, Outcome, attempt, attempts

MARK = "owned"
CHECKS = ("executions", "losses")  # which not every door is tried for
AS_IT_WAS = "as it was"
WORDS = {
    **{ACCEPTED: "accepted", REFUSED: "refused in words", TRACEBACK: "traceback", MEMORY: "out of memory"},
    **{CRASH: "crashed", HANG: "over a minute"},
}
KEPT = 1 << 24  # bytes; a larger file can be made again
Counts = dict[str, collections.Counter[str]]


class Try(NamedTuple):
    """A bad file, of a ``kind``, which ``write`` makes at the path that it is given."""

    kind: str
    write: Callable[[Path], object]


class Trial:
    """All attempts of a run: how many of each kind ended how, and what is kept of those that ended badly."""

    def __init__(self, keep: Path) -> None:
        self.by_door: Counts = collections.defaultdict(collections.Counter)
        self.by_kind: Counts = collections.defaultdict(collections.Counter)
        self.bad = 0
        self._keep = keep

    def record(self, door: str, kind: str, outcome: Outcome, more: dict[str, int], content: Path | None = None) -> None:
        """Count one attempt; keep the file where it ended badly."""
        for counts in (self.by_door[door], self.by_kind[kind]):
            counts.update([outcome.end], **more)
        if outcome.end in GOOD and not any(more.values()):
            return
        self.bad += 1
        self._keep.mkdir(parents=True, exist_ok=True)
        name = f"{self.bad:03}-{door}".replace(" ", "-").replace(",", "")
        (self._keep / f"{name}.txt").write_text(f"{door}: {kind}: {outcome.end} {more}\n{outcome.words}\n", "utf-8")
        if content is not None and content.is_file():
            shutil.copy(content, self._keep / f"{name}{content.suffix}")
        last = outcome.words.strip().splitlines()[-1:] or [""]
        sys.stderr.write(f"{door}: {kind}: {outcome.end} {more} {last[0][:200]}\n")

    def attempt(self, name: str, door: Door, tries: Sequence[Try]) -> None:
        """Make each file in a folder of its own, and let it in."""
        with tempfile.TemporaryDirectory() as place:
            paths = [Path(place) / f"{number}/in/x{door.suffix}" for number in range(len(tries))]
            copies = [path.parent.parent / f"kept{door.suffix}" for path in paths]
            for one, path, copy in zip(tries, paths, copies, strict=True):
                path.parent.mkdir(parents=True)
                one.write(path)
                if path.is_file() and path.stat().st_size < KEPT:
                    shutil.copy(path, copy)
            outcomes = attempts([_entering(door, path) for path in paths])
            for one, copy, outcome in zip(tries, copies, outcomes, strict=True):
                obeyed = sum("touch" not in found.name for found in copy.parent.rglob(f"*{MARK}*"))
                self.record(name, one.kind, outcome, {"executions": obeyed}, copy)


def _entering(door: Door, path: Path) -> Enter:
    def enter() -> None:
        os.chdir(path.parent)  # where an order that is obeyed leaves its mark
        door.enter(path)

    return enter


def changed(door: Door, seeds: Sequence[bytes], random: Random) -> tuple[str, bytes]:
    """Return one of a door's seeds, changed in one to three ways, and the name of the first of these."""
    content, kind, names = random.choice(seeds), "", list(door.mutations)
    wanted = random.choice((1, 1, 2, 3))
    for name in (*random.choices(names, k=wanted), *random.sample(names, len(names))):
        try:
            changed_to = door.mutations[name](content, random)
        except Exception:  # this one, or an earlier change, has left nothing that could be taken apart
            continue
        if changed_to != content:
            content, kind, wanted = changed_to, kind or name, wanted - 1
        if not wanted:
            break
    return kind or AS_IT_WAS, content


def by_hand(trial: Trial, doors: dict[str, Door]) -> None:
    """Try all files that were made by hand, at their doors."""
    for one in (*BASE, *host()):
        if one.door in doors:
            trial.attempt(one.door, doors[one.door], [Try(one.kind, one.write)])


def commands(trial: Trial) -> None:
    """Try the command line on bad files, with an earlier bundle where the answer would go."""
    with tempfile.TemporaryDirectory() as place:
        old = old_bundle(Path(place) / "old")
        before = tree(old)
        for one in refusals(old):
            outcome = attempt(lambda one=one: one.run(Path(place)))
            trial.record("command line", one.kind, outcome, {"losses": int(tree(old) != before)})


def turns(doors: dict[str, Door], minutes: float) -> Iterator[str]:
    """Yield the names of doors in turns until the time is over."""
    end = time.monotonic() + 60 * minutes
    while True:
        for name, door in doors.items():
            if time.monotonic() > end:
                return
            if door.seeds:
                yield name


def table(first: str, counts: Counts) -> str:
    """Return counts as a Markdown table, with a dash for what was never looked for."""
    total: collections.Counter[str] = collections.Counter()
    for found in counts.values():
        total.update(found)
    rows = [
        (first, "tried", *(WORDS[end] for end in OUTCOMES), *CHECKS),
        ("---", *["---:"] * (1 + len(OUTCOMES) + len(CHECKS))),
    ]
    for name, found in (*sorted(counts.items()), ("all", total)):
        ends = [f"{found[end]:,}" for end in OUTCOMES]
        checks = [f"{found[check]:,}" if check in found else "–" for check in CHECKS]
        rows.append((name, f"{sum(found[end] for end in OUTCOMES):,}", *ends, *checks))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
