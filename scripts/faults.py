"""What becomes of a bundle when builds are killed, disks fill up, files vanish and memory ends: a Markdown table.

One process has imported everything and forks a child for each run, so that hundreds of real builds (the smallest net,
20 images) are killed in minutes. Before each run lies an earlier bundle. After it that bundle has to be whole (every
byte, or the new one's), to verify, to load and to answer what it answered; the next build has to come out as one that
nobody disturbed, byte for byte, without running a finished stage again; and nothing else may lie there.

    OMP_NUM_THREADS=1 python scripts/faults.py [--kills 200] [--full-disk 50] [--others 20] [--seed 0] [--only WORD]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arena import NAME, NEW, Arena, Run, warm
from injuries import after, at_step, file_limit, kill, limited, nobody, small_disk, vanishing

from edgeres import exits

KILLED = (-signal.SIGKILL,)
ABORTED = (-signal.SIGABRT, -signal.SIGSEGV)  # what native libraries do that get no memory

LACKING = re.compile("^error: (not enough memory|no thread can be started)", re.MULTILINE)
"""What is said, behind a traceback, where an error is taken for a lack of memory."""


class Table:
    """Counts by kind of fault."""

    COLUMNS = (
        "fault", "runs", "struck", "failed by itself", "lost bundles", "next build good", "stages kept", "run again",
        "left over", "tracebacks",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rows: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, kind: str, ends: tuple[int, ...], code: int, told: str, found: dict[str, Any]) -> None:
        row = self.rows[kind]
        row["runs"] += 1
        row["struck"] += code in ends
        row["failed by itself"] += code not in (0, *ends)
        row["lost bundles"] += bool(found["lost"])
        row["next build good"] += found["next"]
        row["stages kept"] += found["resumed"] - len(found["again"])
        row["run again"] += len(found["again"])
        row["left over"] += len(found["left"])
        row["tracebacks"] += "Traceback" in told and not LACKING.search(told)
        print(f"{kind} {row['runs']}: exit code {code}, {found}\n{told[-300:] if code else ''}", file=sys.stderr)

    def text(self) -> str:
        lines = [" | ".join(self.COLUMNS), " | ".join("---" for _ in self.COLUMNS)]
        lines += [
            " | ".join([kind, *(str(row[name]) for name in self.COLUMNS[1:])]) for kind, row in self.rows.items() if row
        ]
        return "\n".join(f"| {line} |" for line in lines)

    @property
    def bad(self) -> bool:
        """Whether anything went wrong, or a fault never struck, which proves nothing."""
        wrong = ("failed by itself", "lost bundles", "run again", "left over", "tracebacks")
        tried = [row for row in self.rows.values() if row["runs"]]
        return any(
            not row["struck"] or row["next build good"] < row["runs"] or any(row[x] for x in wrong) for row in tried
        )


COMMANDS = (
    "calibrate BUNDLE --method mse",
    "compile BUNDLE",
    "report BUNDLE",
    "validate BUNDLE",
    "validate BUNDLE --policy point --max-drop 100 --baseline FILE --update-baseline",
    "bench BUNDLE --runs 2 --warmup 0 --batch 1 --out FILE",
)


class Torment:
    """All the kinds of faults, in an arena; each returns what it is called, and its runs."""

    def __init__(self, arena: Arena, table: Table, seed: int) -> None:
        self.arena = arena
        self.table = table
        self.chance = random.Random(seed)
        self.place = arena.folder / "place"
        self.place.mkdir(mode=0o755)
        self.build = arena.build(self.place / NAME, NEW)

    def kills(self, runs: int) -> Iterator[tuple[str, Run]]:
        """Yield kills until so many have struck: some builds are done before, but most are not."""
        kind = "kill -9 at a random moment of a build"
        row = self.table.rows[kind]
        while row["struck"] < runs and row["runs"] < 10 * runs:
            yield kind, self.struck(signal.SIGKILL)

    def signals(self, runs: int) -> Iterator[tuple[str, Run]]:
        for number, word in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
            for _ in range(runs):
                yield f"{word} at a random moment of a build", self.struck(number)

    def struck(self, number: int) -> Run:
        strike = after(self.chance.uniform(0, self.arena.seconds), number)
        told, _ = exits.ENDS.get(number, (-number, ""))
        return Run(self.build, strike=strike, ends=(-number, told))  # the first before there is anything to end

    def steps(self, runs: int) -> Iterator[tuple[str, Run]]:
        """Yield a kill before the first step of a build, the second, and so on, until one has not so many."""
        kind = "kill -9 before each step on files of a build"
        row = self.table.rows[kind]
        while runs and row["struck"] == row["runs"]:
            yield kind, Run(self.build, at_step(row["runs"] + 1, kill), ends=KILLED)

    def commands(self, runs: int) -> Iterator[tuple[str, Run]]:
        places = {"BUNDLE": str(self.place / NAME), "FILE": str(self.place / "aside.json")}
        for words in COMMANDS if runs else ():
            given = tuple(places.get(word, word) for word in words.split())
            name = " ".join([given[0], *(word for word in given if word == "--update-baseline")])
            self.arena.lay(self.place)
            seconds = self.arena.processor_time(lambda given=given: self.arena.suffer(Run(given)))
            for _ in range(runs):
                strike = after(self.chance.uniform(0, seconds), signal.SIGKILL)
                changes = given[0] in ("calibrate", "compile", "report")
                yield f"kill -9 of `edgeres {name}`", Run(given, strike=strike, changes=changes, ends=KILLED)

    def full_disks(self, runs: int) -> Iterator[tuple[str, Run]]:
        have = sum(path.stat().st_size for path in (self.arena.folder / "old").rglob("*") if path.is_file())
        for _ in range(runs):
            if os.geteuid() == 0:
                yield "full disk", Run(self.build, disk=int(have * self.chance.uniform(1.1, 2.2)))
            else:
                yield "full disk (RLIMIT_FSIZE)", Run(self.build, file_limit(int(have * self.chance.uniform(0, 0.4))))

    def vanished(self, runs: int) -> Iterator[tuple[str, Run]]:
        folders = [self.arena.folder / split for split in ("calibration", "validation")]
        images = sorted(path for folder in folders for path in folder.rglob("*.png"))
        for turn in range(runs):
            victim = self.chance.choice(images) if turn % 2 else self.arena.folder / "weights.safetensors"
            yield "an image or the weights vanish", Run(self.build, vanishing(victim, self.chance.randrange(1, 4)))

    def memory(self, runs: int) -> Iterator[tuple[str, Run]]:
        for turn in range(runs):
            yield (
                "memory ends (RLIMIT_AS)",
                Run(self.build, limited(2**20 * turn * turn), ends=(exits.FAILED, *ABORTED)),
            )

    def read_only(self, runs: int) -> Iterator[tuple[str, Run]]:
        for _ in range(min(3, runs) if os.geteuid() == 0 else 0):
            yield "a folder that may not be written", Run(self.build, nobody)

    def run(self, kind: str, run: Run) -> None:
        """Do one to a fresh copy of the earlier bundle, and note what became of it."""
        with small_disk(self.place, run.disk):
            out = self.arena.lay(self.place)
            code, told = self.arena.suffer(run)

            def mend() -> None:
                self.arena.samples()
                (self.place / "aside.json").unlink(missing_ok=True)
                if run.disk:
                    subprocess.run(["mount", "-o", "remount,size=64m", str(self.place)], check=True)

            self.table.add(kind, run.ends, code, told, self.arena.examined(out, run.changes, mend))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disk", type=int, default=50)
    parser.add_argument("--others", type=int, default=20, help="runs of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one kind alone: kills, steps, signals, …")
    arguments = parser.parse_args()
    warm()
    table = Table()
    os.environ.pop("CI", None)  # where a baseline is not written
    with tempfile.TemporaryDirectory(prefix="edgeres-faults-") as folder:
        Path(folder).chmod(0o755)
        arena = Arena(Path(folder))
        print(f"a build takes {arena.seconds:.1f} s of processor time", file=sys.stderr)
        torment, others = Torment(arena, table, arguments.seed), arguments.others
        kinds = {
            torment.kills: arguments.kills,
            torment.steps: others,
            torment.full_disks: arguments.full_disk,
            **dict.fromkeys((torment.signals, torment.commands, torment.vanished, torment.memory), others),
            torment.read_only: others,
        }
        try:
            for faults, runs in kinds.items():
                for kind, run in faults(runs) if arguments.only in faults.__name__ else ():
                    torment.run(kind, run)
        finally:
            print(table.text())
    return int(table.bad)


if __name__ == "__main__":
    sys.exit(main())
