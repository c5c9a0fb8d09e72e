#!/usr/bin/env python3
"""What edgeres adds to a call of onnxruntime and to a start of Python, and what raw frames and a stream save; with
--soak, whether it leaks.

Whatever is compared takes turns in one run, call by call, on one session of onnxruntime. Prints Markdown tables:

    python scripts/bench_runtime.py [--bundle BUNDLE] [--calls 2000] [--threads N] [--camera 480 640]
    python scripts/bench_runtime.py --soak [--bundle BUNDLE] [--calls 100000] [--loads 200]

Without --bundle it builds ResNet-20 for 32 × 32 pixels with random weights, in int8. The engine has to be one for the
CPU. Short run: --calls 200; --soak --calls 2000 --loads 20.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import edgeres
from edgeres.backends.cpu import open_engine
from edgeres.bundle import read_manifest
from edgeres.preprocess import prepare_batch
from edgeres.recipe import dossier
from edgeres.runtime import LoadedEngine

Call = Callable[[], Any]


def bundle_for(arguments: argparse.Namespace, folder: str) -> Path:
    """Return the bundle to measure: the given one, or ResNet-20 with random weights, built now."""
    if arguments.bundle is not None:
        return Path(arguments.bundle)
    images = dossier() / "digits/calibration"
    options = {"model": "resnet20_cifar", "calibration": images, "method": "minmax", "recovery": "none"}
    return Path(edgeres.build(out=Path(folder) / "resnet20", backend="cpu", **options).path)


def open_both(bundle: Path, threads: int | None) -> tuple[LoadedEngine, ort.InferenceSession]:
    """Return a bundle's engine and the very session in it: of two sessions, each would disturb the other's threads."""
    manifest = read_manifest(bundle)
    record = next(engine for engine in manifest.engines if engine.backend == "cpu")
    runner = open_engine((bundle / record.file.path).read_bytes(), record.options, threads)
    assert runner._session is not None
    return LoadedEngine(runner, manifest, record), runner._session


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call; each round makes all of them, and every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 10):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 10:  # the first are slower
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print(f"\n{title}\n")
    for row in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(row)} |")


def compare(title: str, calls: dict[str, Call], rounds: int) -> None:
    """Print each call's latency, and what it adds to the first: at p10, which other work on the machine moves least."""
    seconds = in_turns(calls, rounds)
    found = {name: np.percentile(1e6 * np.array(times), (10, 50, 99)) for name, times in seconds.items()}
    bare, *_ = found.values()
    rows = []
    for name, (p10, p50, p99) in found.items():
        more = f"{p10 - bare[0]:+.0f}", f"{100 * (p10 / bare[0] - 1):+.1f}"
        rows.append((name, f"{p10:.0f}", f"{p50:.0f}", f"{p99:.0f}", *(more if rows else ("", ""))))
    table(title, ("call", "p10 µs", "p50 µs", "p99 µs", "more µs", "more %"), rows)


def bench_calls(engine: LoadedEngine, session: ort.InferenceSession, rounds: int) -> None:
    """One image, normalized already and as the camera gives it, through edgeres and through onnxruntime alone."""
    preprocessing = engine.manifest.preprocessing
    height, width = preprocessing.size
    frames = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    x, name = prepare_batch(frames, preprocessing), session.get_inputs()[0].name
    out = engine(x)
    np.testing.assert_array_equal(out, session.run(None, {name: x})[0])
    compare(
        "Normalized float32, batch 1",
        {
            "onnxruntime": lambda: session.run(None, {name: x}),
            "edgeres": lambda: engine(x),
            "edgeres, out=": lambda: engine(x, out=out),
        },
        rounds,
    )
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    short = min(height, width)
    if preprocessing.resize not in (None, short):
        print(f"\n(uint8 frames of {width} × {height} are resized by this bundle, which the NumPy line does not do.)")

    def by_hand() -> Any:
        normalized = (frames.astype(np.float32) / 255 - mean) / std
        return session.run(None, {name: np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))})

    compare("uint8 frames, batch 1", {"NumPy, onnxruntime": by_hand, "edgeres": lambda: engine(frames)}, rounds)


def camera(frames: np.ndarray, count: int, wait: float) -> Iterator[np.ndarray]:
    """Yield frames as a driver does: a copy of its buffer, after so many seconds of waiting for the shutter."""
    for number in range(count):
        if wait:
            time.sleep(wait)
        yield frames[number % len(frames)].copy()


def bench_stream(engine: LoadedEngine, size: tuple[int, int], count: int) -> None:
    """Frames of a camera in a loop and in a stream: as fast as they are taken, and one for each inference's time."""
    frames = np.random.default_rng(1).integers(0, 256, (8, *size, 3), dtype=np.uint8)
    engine.warmup(10, frames[:1])
    split = engine.profile(frames[:1], runs=50)
    rows = []
    for source, wait in (("frames at hand", 0.0), ("a camera that takes as long as a call", split.total.p50 / 1000)):
        ways: dict[str, Call] = {"loop": lambda wait=wait: [engine(f[np.newaxis]) for f in camera(frames, count, wait)]}
        for depth in (1, 2, 3):
            ways[f"stream, depth={depth}"] = lambda depth=depth, wait=wait: list(
                engine.stream(camera(frames, count, wait), depth=depth)
            )
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                found[way].append((time.perf_counter() - start) / count)
        best = {way: min(seconds) for way, seconds in found.items()}
        rows += [
            (source, way, f"{1000 * seconds:.2f}", f"{best['loop'] / seconds:.2f}") for way, seconds in best.items()
        ]
    title = (
        f"Frames of {size[1]} × {size[0]}: preprocessing {split.preprocess.p50:.2f} ms, inference "
        f"{split.inference.p50:.2f} ms (medians)"
    )
    table(title, ("source", "way", "ms per frame", "times the loop"), rows)


def bench_imports(rounds: int = 10) -> None:
    """Print how long a fresh interpreter takes for imports, in turns: at best, and in the middle."""
    # What `edgeres.load` needs before it reads a bundle, numpy included; onnxruntime comes with the engine.
    ways = ("numpy", "edgeres", "edgeres.runtime", "onnxruntime")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            code = f"import time; start = time.perf_counter(); import {way}; print(time.perf_counter() - start)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds[way].append(float(done.stdout))
    rows = [(f"import {way}", f"{1e3 * min(s):.1f}", f"{1e3 * np.median(s):.1f}") for way, s in seconds.items()]
    table("A fresh interpreter", ("import", "best ms", "median ms"), rows)


def memory_mb() -> float:
    """Return the memory that this process has, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def watched(work: str, times: int, do: Call) -> tuple[str, ...]:
    """Do something many times, and return the memory after the first, a tenth, a half and all, and the open files."""
    do()
    files, stops = open_files(), {1, times // 10, times // 2, times}
    found = []
    for done in range(1, times + 1):
        do()
        if done in stops:
            gc.collect()
            found.append(f"{memory_mb():.1f}")
    return (work, str(times), *found, f"{files}, {open_files()}")


def soak(bundle: Path, arguments: argparse.Namespace) -> None:
    """Print memory and open files over many calls, streams and loads."""
    with edgeres.load(bundle, backend="cpu", threads=arguments.threads) as engine:
        frames = np.random.default_rng(2).integers(0, 256, (1, *engine.input_shape[1:], 3), dtype=np.uint8)
        wanted = engine(frames)
        out = np.empty_like(wanted)

        def load_and_close() -> None:
            with edgeres.load(bundle, backend="cpu", threads=arguments.threads) as another:
                another(frames)

        rows = [
            watched("call", arguments.calls, lambda: engine(frames, out=out)),
            watched("stream of ten items", arguments.calls // 100, lambda: list(engine.stream([frames] * 10))),
            watched("load, call and close", arguments.loads, load_and_close),
        ]
        np.testing.assert_array_equal(out, wanted)
    columns = ("work", "times", "MB after 1", "after a tenth", "after a half", "after all", "open files before, after")
    table("Memory", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="a bundle with an engine for the CPU")
    parser.add_argument("--calls", type=int, help="how many calls (2000; with --soak 100000)")
    parser.add_argument("--threads", type=int, help="for one operator; by default onnxruntime's own choice")
    parser.add_argument("--camera", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--soak", action="store_true", help="memory and open files over many calls and loads")
    parser.add_argument("--loads", type=int, default=200, help="with --soak: how often the bundle is loaded and closed")
    arguments = parser.parse_args()
    arguments.calls = arguments.calls or (100_000 if arguments.soak else 2000)
    with tempfile.TemporaryDirectory() as folder:
        bundle = bundle_for(arguments, folder)
        manifest = read_manifest(bundle)
        print(
            f"{manifest.name}, {manifest.precision}; onnxruntime {ort.__version__}, NumPy {np.__version__}, "
            f"{platform.machine()}, {os.cpu_count()} cores, threads: {arguments.threads or 'default'}"
        )
        if arguments.soak:
            soak(bundle, arguments)
            return
        engine, session = open_both(bundle, arguments.threads)
        bench_imports()
        bench_calls(engine, session, arguments.calls)
        bench_stream(engine, tuple(arguments.camera), max(10, arguments.calls // 20))


if __name__ == "__main__":
    main()
