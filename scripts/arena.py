"""Where scripts/faults.py has builds suffer: an earlier bundle, a command in a child, and what became of both."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from injuries import Inject, noting

import edgeres
from edgeres import cli, exits
from edgeres.bundle import unlisted, verify
from edgeres.errors import EdgeresError
from edgeres.progress import Progress
from edgeres.recipe import dossier

NAME = "net"
SAME = ("model.fp32.onnx", "model.int8.onnx", "model.int8-cpu.onnx", "calibration.json", "statistics.npz")
OLD, NEW = ("--method", "minmax"), ("--method", "mse")
PATIENCE = 300.0  # seconds


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
