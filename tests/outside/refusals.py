"""Every command that reads a file, on files that are none: what it must refuse, in words, and without a loss."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from doors import RECIPE
from host_doors import NET
from hostile import holding, linked, sparse
from onnx_mutations import graph

from command_line import called
from edgeres.errors import EdgeresError
from edgeres.files import MANIFEST, model_file
from examples import FRAMES, png, write_bundle

MANIFESTS = f"/{MANIFEST}"  # the ending of a place where a whole bundle is meant
COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("build BAD --out OLD", (".toml",)),
    ("build --model BAD --calibration GOOD --out OLD", (".onnx",)),
    ("build --weights BAD --calibration GOOD --out OLD", (".pt", ".safetensors")),
    ("build --calibration BAD --out OLD", (".npz", ".npy", ".txt")),
    ("build --validation BAD --calibration GOOD --out OLD", (".npz", ".txt")),
    ("validate OLD --baseline BAD", (".json",)),
    ("validate OLD --validation BAD", (".npz", ".txt")),
    ("report OLD --bench BAD", (".json",)),
    ("inspect BAD", (".onnx", ".edgeres", MANIFESTS)),
    ("verify BAD", (MANIFESTS, ".edgeres")),
    ("unpack BAD", (".edgeres",)),
    ("unpack BAD --out OLD", (".edgeres",)),
    ("pack BAD", (MANIFESTS,)),
    ("diff OLD BAD", (MANIFESTS,)),
    ("report BAD", (MANIFESTS,)),
    ("compile BAD", (MANIFESTS,)),
    ("validate BAD", (MANIFESTS,)),
    ("bench BAD", (MANIFESTS,)),
)


@dataclass(frozen=True)
class Refusal:
    """``command`` with a bad file of a ``kind`` in the place of BAD, which ends in ``ending``."""

    command: str
    ending: str
    kind: str
    write: Callable[[Path], object]
    old: Path

    def run(self, place: Path) -> None:
        """Run it in an empty folder of ``place``.

        Raises:
            EdgeresError: it was refused, as it must be.
            AssertionError: it was refused without words, or obeyed orders.
        """
        folder = place / hashlib.sha256(f"{self.command}{self.ending}{self.kind}".encode()).hexdigest()[:12]
        folder.mkdir()
        os.chdir(folder)
        np.save("good.npy", FRAMES)
        bad = folder / f"x$(touch owned){self.ending}"
        bad.parent.mkdir(exist_ok=True)
        self.write(bad)
        named = {"BAD": bad.parent if self.ending == MANIFESTS else bad, "OLD": self.old, "GOOD": "good.npy"}
        code, out, err = called(*(named.get(word, word) for word in self.command.split()))
        assert code in (1, 2), f"exit code {code}: {err}"
        assert not out, "it was refused, and answers"
        assert "Traceback" not in err
        assert "error" in err.lower()
        assert bad.name.partition(".")[0] in err or folder.name in err, f"what is wrong is somewhere else: {err}"
        assert not (folder / "owned").exists(), "a file's name was obeyed"
        raise EdgeresError(err)


def refusals(old: Path) -> Iterator[Refusal]:
    """Yield every command with every kind of bad file; ``old`` is an earlier bundle."""
    bad: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": holding(b""),
        "another kind of file": holding(png(FRAMES[0])),
        "no UTF-8": holding(b"\xff\xfe\x00\xd8" * 20),
        "nested deeply": holding(b"[" * 50_000),
        "cut off": holding(RECIPE[:200]),
        "larger than any (10 GB)": sparse(),
        "pipes, devices, folders, links": os.mkfifo,
        "a device": linked("/dev/zero"),
        "a folder": Path.mkdir,
    }
    for command, endings in COMMANDS:
        for ending in endings:
            for kind, write in bad.items():
                yield Refusal(command, ending, kind, write, old)


def old_bundle(folder: Path) -> Path:
    """Write the bundle that must not be touched."""
    return write_bundle(folder, {model_file("int8"): graph(NET)})


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
