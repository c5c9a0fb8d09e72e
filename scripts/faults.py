"""What becomes of a bundle when builds are killed, disks fill up, files vanish and memory ends: a Markdown table.

One process has imported everything and forks a child for each run, so that hundreds of real builds (the smallest net,
20 images) are killed in minutes. Before each run lies an earlier bundle. After it that bundle has to be whole (every
byte, or the new one's), to verify, to load and to answer what it answered; the next build has to come out as one that
nobody disturbed, byte for byte, without running a finished stage again; and nothing else may lie there.

    OMP_NUM_THREADS=1 python scripts/faults.py [--kills 200] [--full-disk 50] [--others 20] [--seed 0] [--only WORD]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import edgeres
from edgeres import cli, exits, workspace
from edgeres.bundle import unlisted, verify
from edgeres.errors import EdgeresError
from edgeres.progress import Progress
from edgeres.recipe import dossier

NAME = "net"
SAME = ("model.fp32.onnx", "model.int8.onnx", "model.int8-cpu.onnx", "calibration.json", "statistics.npz")
OLD, NEW = ("--method", "minmax"), ("--method", "mse")
STEPS = ("open", "replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
KILLED = (-signal.SIGKILL,)
ABORTED = (-signal.SIGABRT, -signal.SIGSEGV)  # what native libraries do that get no memory
PATIENCE = 300.0  # seconds
Inject = Callable[[], None]


class Run(NamedTuple):
    """One fault: what is run, and what is done to it in the child (``inject``) or from outside (``strike``), on a disk
    of so many bytes (0: the one that there is). ``changes``: it may leave the earlier bundle with another engine or
    page, or with ranges alone, whole. ``ends``: the exit codes that tell that the fault has struck."""

    arguments: tuple[str, ...]
    inject: Inject = lambda: None
    strike: Callable[[int], None] = lambda process: None
    disk: int = 0
    changes: bool = False
    ends: tuple[int, ...] = (exits.FAILED,)


class Watcher(Progress):
    """Remembers which stages ran, and which did not have to."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.ran.append(name)


def warm() -> None:
    """Import what builds import; no session is made and no thread started, for these do not survive a fork."""
    for found in pkgutil.walk_packages(edgeres.__path__, "edgeres."):
        if not found.name.startswith(("edgeres.backends.tensorrt", "edgeres.pytest_plugin", "edgeres.__main__")):
            importlib.import_module(found.name)


def forked(work: Callable[[], int], log: Path) -> int:
    """Start a child that does ``work`` and exits with what that returns; its output goes to ``log``."""
    process = os.fork()
    if process:
        return process
    code = exits.BUG
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a child and return its exit code, negative for a signal."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"child {process} took longer than {PATIENCE:g} s")


class Arena:
    """A folder with samples, weights, an earlier bundle, and what an undisturbed build of the new one comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.done = folder / "done"  # the stages that the last command finished, whatever became of their records
        self.samples()
        self.seconds = 0.0  # of processor time that a build takes
        self.wanted = {word: self.undisturbed(word, options) for word, options in (("old", OLD), ("new", NEW))}

    def samples(self) -> None:
        """Lay out the images and the weights, the ones that vanished too."""
        for split, count in (("calibration", 1), ("validation", 1)):
            for digit in range(10):
                target = self.folder / split / str(digit)
                target.mkdir(parents=True, exist_ok=True)
                for image in sorted((dossier() / "digits" / split / str(digit)).glob("*.png"))[:count]:
                    shutil.copy(image, target)
        shutil.copy(dossier() / "digits/weights.safetensors", self.folder)

    def build(self, out: Path, options: tuple[str, ...]) -> tuple[str, ...]:
        """Return the arguments of a build."""
        paths = ("--weights", "weights.safetensors", "--calibration", "calibration", "--validation", "validation")
        given = [str(self.folder / word) if word in paths[1::2] else word for word in paths]
        return ("build", "--model", "resnet8_cifar", *given, "--recovery", "none", *options, "--out", str(out))

    def undisturbed(self, word: str, options: tuple[str, ...]) -> dict[str, Any]:
        """Build a bundle and return the hashes of its files and its answers."""
        out = self.folder / word / NAME
        self.seconds = self.processor_time(lambda: self.suffer(Run(self.build(out, options))))
        assert out.is_dir(), self.log.read_text()
        (out.parent / f".{NAME}.lock").unlink()
        return {"files": hashes(out), "logits": self.asked(lambda: answers(out))}

    def processor_time(self, work: Callable[[], Any]) -> float:
        """Return the seconds of processor time that children of this process need for some work."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        work()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime

    def asked(self, question: Callable[[], Any]) -> Any:
        """Return what a child answers: threads and sessions stay there."""
        place = self.folder / "answer"

        def work() -> int:
            place.write_text(json.dumps(question()))
            return 0

        log = self.folder / "answer.log"
        code = ended(forked(work, log))
        assert code == 0, log.read_text()
        return json.loads(place.read_text())

    def lay(self, place: Path) -> Path:
        """Put the earlier bundle into an empty folder, and return it."""
        for entry in place.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return Path(shutil.copytree(self.folder / "old" / NAME, place / NAME))

    def suffer(self, run: Run) -> tuple[int, str]:
        """Run a command that something happens to; return its exit code and what it printed."""
        self.done.write_text("")
        self.done.chmod(0o666)

        def work() -> int:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as edgeres.__main__ does
            noting(self.done)
            run.inject()
            cli.main(list(run.arguments))
            return 0

        process = forked(work, self.log)
        run.strike(process)
        code = ended(process)
        return code, self.log.read_text(errors="replace")

    def examined(self, out: Path, changes: bool, mend: Callable[[], None]) -> dict[str, Any]:
        """Return what became of a bundle, and of the next build."""

        def question() -> dict[str, Any]:
            found = self.earlier(out, changes)
            mend()
            return {**found, **self.next_build(out)}

        found: dict[str, Any] = self.asked(question)
        return found

    def earlier(self, out: Path, changes: bool) -> dict[str, Any]:
        try:
            has_engine = bool(verify(out).engines)
            said = answers(out) if has_engine or not changes else []  # a stage alone may leave none
        except EdgeresError as problem:
            return {"lost": str(problem)}
        now = hashes(out)
        compared = [name for name in SAME if said or name in now]
        for word in ("old", "new"):
            files, logits = self.wanted[word]["files"], self.wanted[word]["logits"]
            near = not said or np.allclose(said, logits, atol=0.05 * np.ptp(logits)) if changes else said == logits
            if near and compared and all(now.get(name) == files[name] for name in compared):
                whole = changes or word == "new" or now == files  # a new one tells the time
                return {"lost": "" if whole else "other files", "is": word}
        return {"lost": "it is neither the old nor the new bundle"}

    def next_build(self, out: Path) -> dict[str, Any]:
        done = set(self.done.read_text().split())
        done |= {path.stem for path in (out.parent / f".{NAME}.work/.stages").glob("*.json")}
        watcher = Watcher()
        options: dict[str, Any] = dict(zip(("weights", "calibration", "validation"), self.sources(), strict=True))
        edgeres.build(
            model="resnet8_cifar", recovery="none", method="mse", out=out, progress=watcher, **options
        )  # fmt: skip
        manifest = verify(out)
        files = self.wanted["new"]["files"]
        good = {name: hashes(out)[name] for name in SAME} == {name: files[name] for name in SAME}
        left = [name for name in os.listdir(out.parent) if name not in (NAME, f".{NAME}.lock")]
        return {
            "next": good and answers(out) == self.wanted["new"]["logits"],
            "left": left + unlisted(out, manifest),
            "again": sorted(done & set(watcher.ran)),
            "resumed": len(done),
        }

    def sources(self) -> tuple[Path, Path, Path]:
        return self.folder / "weights.safetensors", self.folder / "calibration", self.folder / "validation"


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def answers(out: Path) -> list[float]:
    """Return a bundle's logits for two frames."""
    frames = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).reshape(2, 32, 32, 3) * 37 % 256
    with edgeres.load(out) as engine:
        return [float(x) for x in engine(frames.astype(np.uint8)).ravel()]


def at_step(number: int, fault: Callable[[], None]) -> Callable[[], dict[str, int]]:
    """Let something happen before a process's step of that number; a step changes, or may change, what lies where."""
    count = {"steps": 0}

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            count["steps"] += 1
            if count["steps"] == number:
                fault()
            return call(*arguments, **options)

        return step

    def inject() -> dict[str, int]:
        for name in STEPS:
            setattr(os, name, faulty(getattr(os, name)))
        workspace._exchange_in_one_step = faulty(workspace._exchange_in_one_step)
        return count

    return inject


def noting(place: Path) -> None:
    """Let this process write down each stage that it finishes; one without files leaves nothing to go on from."""
    finish = workspace.Workspace.finish

    def noted(self: workspace.Workspace, name: str, *arguments: Any) -> Any:
        record = finish(self, name, *arguments)
        if record.files:
            with open(place, "a") as stream:
                stream.write(f"{name}\n")
        return record

    workspace.Workspace.finish = noted  # type: ignore[method-assign]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(seconds: float, number: int) -> Callable[[int], None]:
    """Return what sends a signal to a process once it has had so much processor time, whoever else uses the machine; it
    may have ended before."""

    def strike(process: int) -> None:
        clock = ~process << 3 | 2  # clock_getcpuclockid(3)
        while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.clock_gettime(clock) >= seconds:
                os.kill(process, number)
                return
            time.sleep(0.0005)

    return strike


def limited(extra: int) -> Inject:
    """Let a process have that many bytes more than it has."""

    def inject() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return inject


def vanishing(victim: Path, at: int) -> Inject:
    """Remove a file just before a process opens it for the time of that number."""
    count = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and os.fspath(victim) == str(arguments[0]):
            count += 1
            if count == at:
                os.unlink(victim)

    return lambda: sys.addaudithook(hear)


def nobody() -> None:
    os.setegid(65534)
    os.seteuid(65534)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Let a folder be a disk of that many bytes meanwhile; 0: leave it as it is."""
    if size:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "edgeres-faults", str(place)], check=True)
    try:
        yield
    finally:
        if size:
            subprocess.run(["umount", str(place)], check=True)


def file_limit(size: int) -> Inject:
    """Let no file of a process grow beyond ``size`` bytes."""

    def inject() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return inject


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
