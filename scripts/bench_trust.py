#!/usr/bin/env python3
"""What trusting a bundle costs: verifying and loading one, against reading its bytes once.

The bundle has 100 MB, is signed, and has the proportions of a ResNet-50's for a GPU: an FP32 model, and an INT8 model
and an engine of a quarter of its size each. (`--engine 1`: an engine alone, the worst case, for its bytes are kept, and
nothing is hashed beside it.) All calls take turns, each right after a `Path.read_bytes` of every file. What is
told are medians: of the time on the clock, of the processor's time, which other programs disturb less, and of each
call's ratios to the reading before it. `read, forgotten` reads into one buffer of 1 MiB again and again: what the
kernel's copying alone takes. `load` ends where a backend would get the bytes. For the second table the kernel is asked
to forget the files before each call and each reading (posix_fadvise), so that they come from the disk.

    python scripts/bench_trust.py [--megabytes 100] [--engine 0.167] [--rounds 15] [--cold-rounds 5]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeres.artifacts import Engine, Manifest, Preprocessing, to_json
from edgeres.bundle import verify
from edgeres.files import CHUNK, MANIFEST, content_ref
from edgeres.runtime.loading import read_engine
from edgeres.signing import make_pair, sign_bundle

READ = "read (`Path.read_bytes`)"


def make(folder: Path, megabytes: int, share: float) -> list[Path]:
    """Write a bundle of random bytes, an engine's ``share`` of them, and return the places of its files."""
    size = megabytes * 1_000_000
    sizes = {"engines/gpu.engine": round(size * share)}
    sizes["model.int8.onnx"] = min(sizes["engines/gpu.engine"], size - sum(sizes.values()))
    sizes["model.fp32.onnx"] = size - sum(sizes.values())
    refs = []
    for path, count in sizes.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = os.urandom(count)
        (folder / path).write_bytes(content)
        refs.append(content_ref(path, content))
    engine = Engine("gpu", "tensorrt", "int8", refs[0], {}, {})
    manifest = Manifest("net", "int8", {}, Preprocessing((224, 224)), tuple(refs), {}, {}, (engine,))
    (folder / MANIFEST).write_bytes(to_json(manifest))
    return [folder / path for path in sizes]


def read(places: list[Path]) -> None:
    for place in places:
        place.read_bytes()


def read_and_forget(places: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for place in places:
        with open(place, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def hash_in_memory(contents: list[bytes]) -> None:
    for content in contents:
        hashlib.sha256(content).digest()


def forget(places: list[Path]) -> None:
    """Ask the kernel to drop files' pages from its cache."""
    for place in places:
        with open(place, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def spent(call: Callable[[], object]) -> np.ndarray:
    """Return the seconds that a call takes, float64 ``(2,)``: on the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - clock, time.process_time() - processor])


def measure(calls: dict[str, Callable[[], object]], rounds: int, before: Callable[[], None]) -> dict[str, np.ndarray]:
    """Return the seconds of each call, and of the reading before it, float64 ``(rounds, 2, 2)``."""
    found: dict[str, list[list[np.ndarray]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            pair = []
            for one in (call, calls[READ])[::-1]:
                before()
                pair.append(spent(one))
            if number:  # the first round warms up
                found[name].append(pair[::-1])
    return {name: np.array(pairs) for name, pairs in found.items()}


def show(title: str, found: dict[str, np.ndarray]) -> None:
    """Print the calls as a Markdown table."""
    print(f"\n{title}\n\n| | ms | fastest ms | times reading | processor ms | times reading |")
    print("| --- |" + " ---: |" * 5)
    for name, seconds in found.items():
        own, ratios = 1000 * seconds[:, 0], np.median(seconds[:, 0] / seconds[:, 1], axis=0)
        clock, processor = np.median(own, axis=0)
        fastest = own[:, 0].min()
        print(f"| {name} | {clock:.0f} | {fastest:.0f} | {ratios[0]:.2f} | {processor:.0f} | {ratios[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--engine", type=float, default=1 / 6, help="the engine's share of the bundle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold-rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as folder:
        bundle = Path(folder) / "bundle"
        places = make(bundle, arguments.megabytes, arguments.engine)
        contents = [place.read_bytes() for place in places]
        public, _ = make_pair(Path(folder) / "key")
        sign_bundle(bundle, Path(folder) / "key")
        calls: dict[str, Callable[[], object]] = {
            READ: lambda: read(places),
            "read, forgotten": lambda: read_and_forget(places),
            "SHA-256 of bytes in memory": lambda: hash_in_memory(contents),
            "`verify`": lambda: verify(bundle),
            "`verify --key`": lambda: verify(bundle, [public]),
            "`load`": lambda: read_engine(bundle, "auto"),
            "`load(trusted_keys=…)`": lambda: read_engine(bundle, "auto", (), [public]),
        }
        show("In the kernel's cache:", measure(calls, arguments.rounds, lambda: None))
        del calls["SHA-256 of bytes in memory"]
        show("From the disk:", measure(calls, arguments.cold_rounds, lambda: forget(places)))
    load_average = os.getloadavg()[0]
    print(f"\n{os.cpu_count()} cores, load average {load_average:.1f}")


if __name__ == "__main__":
    main()
