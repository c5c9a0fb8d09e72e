#!/usr/bin/env python3
"""Try bad files at every door of edgeres, in children with little memory and time, and count what comes of it.

First come the files that were made by hand (tests/outside/hostile*.py), then valid ones that are changed at random
(tests/outside/mutations.py), door by door in turns, for so many minutes. Whatever is neither accepted nor refused in
words is kept, with what was said, and makes the exit code 1. The same seed tries the same files in the same order.

`executions` are files whose orders were obeyed: they leave something called `owned`. `losses` are earlier bundles at
--out that a refused build, validation or compilation changed; only the command line could. What takes more than a
gibibyte counts as `out of memory`, whatever came of it.

With --guided, and atheris installed, each door is first explored by coverage for a tenth of the time; what that finds
is tried like all else.

    python scripts/fuzz.py [--minutes 10] [--door NAME]... [--seed 0] [--keep build/fuzz] [--guided]
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from random import Random

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/outside")]  # where all that is entered late lies
TOGETHER = 20  # files of a door in one child; a new one for each takes longer than the files


def explored(name: str, seconds: float) -> list[bytes]:
    """Return what atheris finds at a door, in a process of its own: libFuzzer ends the one that it runs in."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--door", name, "--explore", place, "--minutes", str(seconds / 60)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 300)
        if not any(Path(place).iterdir()):
            raise SystemExit(f"{name} could not be explored:\n{done.stderr}")
        return [path.read_bytes() for path in sorted(Path(place).iterdir())]


def explore(name: str, place: str, seconds: float) -> None:
    """Let atheris look for inputs that reach new code behind a door; they lie in ``place`` then."""
    import atheris

    # numba compiles what it reads, and does not read what atheris has changed
    compiled = [f"edgeres.calibrate.{path.stem}" for path in (REPOSITORY / "edgeres/calibrate").glob("*.py")]
    with atheris.instrument_imports(include=["edgeres"], exclude=compiled):
        from host_doors import all_doors
    from sandbox import outcome_of
    from trial import changed

    door = all_doors(Path(tempfile.mkdtemp()), [name])[name]
    folder = Path(tempfile.mkdtemp())
    path = folder / f"x{door.suffix}"

    def enter(content: bytes) -> None:
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        path.write_bytes(content)
        outcome_of(lambda: door.enter(path))

    def mutate(content: bytes, largest: int, seed: int) -> bytes:
        return changed(door, [content], Random(seed))[1][:largest]

    for number, content in enumerate(door.seeds):
        (Path(place) / f"seed{number}").write_bytes(content)
    limits = [f"-max_total_time={int(seconds)}", "-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={place}/"]
    atheris.Setup([name, place, *limits], enter, custom_mutator=mutate)
    atheris.Fuzz()


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--door", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where bad endings are kept")
    parser.add_argument("--guided", action="store_true", help="explore each door by coverage first (needs atheris)")
    parser.add_argument("--explore", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.explore:
        explore(options.door[0], options.explore, 60 * options.minutes)
    from host_doors import all_doors
    from trial import AS_IT_WAS, Trial, Try, by_hand, changed, commands, table, turns

    with tempfile.TemporaryDirectory() as place:
        doors = all_doors(Path(place), options.door)
        if not doors:
            parser.error(f"there is no such door; there are {', '.join(all_doors(Path(tempfile.mkdtemp())))}")
        seeds = {name: list(door.seeds) for name, door in doors.items()}
        if options.guided and importlib.util.find_spec("atheris") is None:
            parser.error("--guided needs atheris: pip install atheris")
        if options.guided:
            for name in doors:
                seeds[name] += explored(name, 6 * options.minutes / len(doors))
        trial = Trial(options.keep)
        by_hand(trial, doors)
        if not options.door:
            commands(trial)
        for number, name in enumerate(turns(doors, options.minutes)):
            random = Random(f"{options.seed} {number}")
            files = [changed(doors[name], seeds[name], random) for _ in range(TOGETHER)]
            tries = [Try(kind, partial(_write, content)) for kind, content in files if kind != AS_IT_WAS]
            trial.attempt(name, doors[name], tries)
    print(table("door", trial.by_door), table("kind", trial.by_kind), sep="\n\n")
    return 1 if trial.bad else 0


if __name__ == "__main__":
    sys.exit(main())
