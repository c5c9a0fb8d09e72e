#!/usr/bin/env python3
"""What trusting a bundle costs: verifying and loading one, against reading its bytes once.

The bundle is of one file, an engine of 100 MB, signed. In each round everything takes its turn, and what is told is
the median of the rounds' ratios to `read`, which is `Path.read_bytes` of the same file in the same round: the bytes are
then in the program's memory, as an engine's have to be. `read, forgotten` reads them into one buffer of 1 MiB again and
again: what the kernel's copying alone takes. `load` ends where a backend would get the bytes. Before each turn of the
second table the kernel is asked to forget the file (posix_fadvise), so that it comes from the disk.

    python scripts/bench_trust.py [--megabytes 100] [--rounds 15] [--cold-rounds 5]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgeres.artifacts import Engine, Manifest, Preprocessing, to_json
from edgeres.bundle import verify
from edgeres.files import CHUNK, MANIFEST, content_ref
from edgeres.runtime.loading import read_engine
from edgeres.signing import make_pair, sign_bundle

READ = "read (`Path.read_bytes`)"


def make(folder: Path, megabytes: int) -> Path:
    """Write a bundle of one engine of random bytes, and return the engine's place."""
    content = os.urandom(megabytes * 1_000_000)
    place = folder / "engines" / "gpu.engine"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    ref = content_ref("engines/gpu.engine", content)
    engine = Engine("gpu", "tensorrt", "int8", ref, {}, {})
    manifest = Manifest("net", "int8", {}, Preprocessing((224, 224)), (ref,), {}, {}, (engine,))
    (folder / MANIFEST).write_bytes(to_json(manifest))
    return place


def read_and_forget(place: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(place, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def hash_in_memory(content: bytes) -> Callable[[], object]:
    return lambda: hashlib.sha256(content).digest()


def forget(place: Path) -> None:
    """Ask the kernel to drop a file's pages from its cache."""
    with open(place, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(calls: dict[str, Callable[[], object]], rounds: int, before: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            before()
            begun = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def show(title: str, seconds: dict[str, list[float]], size: int) -> None:
    """Print the calls as a Markdown table, with the ratio to reading of the same round."""
    print(f"\n{title}\n\n| | median ms | fastest ms | MB/s | times reading, median | lowest to highest |")
    print("| --- |" + " ---: |" * 5)
    for name, found in seconds.items():
        ratios = [own / read for own, read in zip(found, seconds[READ], strict=True)]
        median = statistics.median(found)
        print(
            f"| {name} | {1000 * median:.1f} | {1000 * min(found):.1f} | {size / median / 1e6:,.0f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold-rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as folder:
        bundle = Path(folder) / "bundle"
        place = make(bundle, arguments.megabytes)
        public, _ = make_pair(Path(folder) / "key")
        sign_bundle(bundle, Path(folder) / "key")
        calls: dict[str, Callable[[], object]] = {
            READ: place.read_bytes,
            "read, forgotten": lambda: read_and_forget(place),
            "SHA-256 of bytes in memory": hash_in_memory(place.read_bytes()),
            "`verify`": lambda: verify(bundle),
            "`verify --key`": lambda: verify(bundle, [public]),
            "`load`": lambda: read_engine(bundle, "auto"),
            "`load(trusted_keys=…)`": lambda: read_engine(bundle, "auto", (), [public]),
        }
        size = place.stat().st_size
        show("In the kernel's cache:", measure(calls, arguments.rounds, lambda: None), size)
        del calls["SHA-256 of bytes in memory"]
        show("From the disk:", measure(calls, arguments.cold_rounds, lambda: forget(place)), size)
    load_average = os.getloadavg()[0]
    print(f"\n{os.cpu_count()} cores, load average {load_average:.1f}")


if __name__ == "__main__":
    main()
