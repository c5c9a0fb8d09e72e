#!/usr/bin/env python3
"""What a cluster gains: one calibration pass by this machine alone, by 1, 2 and 4 Dask workers with a core each, and by
2 of which one is killed half-way. Prints a Markdown table:

    python scripts/bench_cluster.py [--images FOLDER] [--model resnet50] [--count 192] [--workers 1 2 4] [--size 224]

FOLDER is by default data/imagenet-samples in $EDGERES_SHARED or in ../shared beside the checkout. Weights are random:
the work is the same. The exit code is 1 where any table is not the one of this machine alone, byte for byte.

`start` is the time until all workers are there; `look` is reading and hashing all samples by the workers; `pass` is the
calibration pass, whose speed-up is told against the one worker. `wire` is all that went over the loopback device
meanwhile, Dask's own messages and the model included (in MB, 10⁶ bytes). `CPU s` are seconds of processors, here and in
the workers, of which other programs do not make many more, as they do of all others. Below stand the numbers of the
cost model of docs/how-to/cluster.md, and what it says of a million samples.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from distributed import LocalCluster

from edgeres import cluster as room
from edgeres import files
from edgeres.artifacts import Preprocessing, to_json
from edgeres.calibrate import AUTO, Statistics, choose
from edgeres.provenance import cores
from edgeres.samples import Samples, open_samples
from edgeres.shards import processor
from edgeres.workforce import Alone, Observation, Workforce

REPOSITORY = Path(__file__).resolve().parent.parent
COLUMNS = (
    "calibration",
    "start s",
    "look s",
    "pass s",
    "CPU s",
    "speed-up",
    "shards",
    "kB per shard",
    "wire MB",
    "same table",
)


def arguments() -> argparse.Namespace:
    shared = Path(os.environ.get("EDGERES_SHARED", REPOSITORY.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=shared / "data/imagenet-samples")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, default=224)
    return parser.parse_args()


def export(name: str, size: int, folder: Path) -> Observation:
    """Write a model with random weights, and return what a calibration pass over it counts."""
    from edgeres import models
    from edgeres.export import export_module
    from edgeres.quantize import plan_file

    exported = export_module(models.create(name), (size, size))
    path = folder / files.FP32_MODEL
    path.write_bytes(exported.content)
    tensors = tuple(sorted(plan_file(path, exported.modules, ()).tensors))
    return Observation(path, tensors, Preprocessing((size, size), size * 256 // 224))


def table_of(statistics: Statistics) -> bytes:
    return to_json(choose(statistics, AUTO, 99.99))


@contextmanager
def workers(count: int, lost: list[str]) -> Iterator[tuple[room.Cluster, float]]:
    """Start so many workers with a core each, and yield them and the seconds that it took."""
    begun = time.perf_counter()
    options = {"dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, dashboard_address=None, scheduler_kwargs=options, silence_logs=50
        ) as started,
        room.joined(started.scheduler_address, lost.append) as cluster,
    ):
        cluster._client.wait_for_workers(count, timeout=120)
        yield cluster, time.perf_counter() - begun


def cpu_seconds() -> float:
    """Return what this process and its workers have spent of processors so far; of dead workers nothing is known."""
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in own)


def model_on_paper(wanted: Observation, samples: Samples, images: Path, statistics: Statistics, seconds: float) -> None:
    """Print what the model on paper is computed from, and what it says; ``seconds`` of a core a sample takes."""
    begun = time.process_time()
    content = statistics.to_bytes()
    written = time.process_time()
    statistics.merge(Statistics.from_bytes(content, "a shard"))
    added = time.process_time() - written
    model = wanted.model.stat().st_size
    stored = sum(Path(images, name).stat().st_size for name in samples.names) / len(samples)
    print(
        f"\nc = {seconds:.3f} s of a core for a sample, b = {stored / 1e3:.0f} kB, model {model / 1e6:.0f} MB; "
        f"a shard: R = {len(content) / 1e6:.1f} MB, m = {added:.2f} s to add it, {written - begun:.2f} s to write it"
    )
    print("\n| workers of 8 cores | pass of a million, s | of it waiting for this machine, s | MB/s from storage |")
    print("| --- | --- | --- | --- |")
    for workers in (1, 4, 16, 64, 256):
        share = min(room.MOST, -(-1_000_000 // (room.SHARDS * workers)))
        counting, adding = 1e6 * seconds / (8 * workers), 1e6 / share * added
        both = max(counting, adding)
        print(f"| {workers} | {both:.0f} | {both - counting:.0f} | {1e6 * stored / both / 1e6:.1f} |")


def wire() -> int:
    """Return the bytes that have gone over the loopback device since the machine was started."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def one_pass(
    wanted: Observation, samples: Samples, workforce: Workforce, kill: bool = False
) -> tuple[float, float, Statistics]:
    """Return the seconds of a pass, those of processors, and what was counted; ``kill``: a worker, after a third."""
    struck: list[int] = []

    def watch(done: int, total: int) -> None:
        if kill and not struck and done >= total // 3:
            own = psutil.Process().children(recursive=True)
            struck.extend(one.pid for one in own if "spawn_main" in " ".join(one.cmdline()))
            os.kill(struck[0], signal.SIGKILL)

    begun, spent = time.perf_counter(), cpu_seconds()
    statistics = workforce.observe(wanted, samples, watch, None, lambda statistics: None)
    seconds = time.perf_counter() - begun
    if kill and not struck:
        raise SystemExit("no worker could be killed half-way: take more samples, --count")
    return seconds, cpu_seconds() - spent, statistics


def main() -> int:
    given = arguments()
    print(f"{given.model}, {given.count} images, {cores()} cores, {processor()}, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}\n")  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    different = 0
    with tempfile.TemporaryDirectory() as place:
        wanted = export(given.model, given.size, Path(place))
        samples = open_samples(given.images, count=given.count)
        begun = time.perf_counter()
        samples.check()
        samples.sha256()
        looked = time.perf_counter() - begun
        seconds, spent, statistics = one_pass(wanted, samples, Alone())
        table = table_of(statistics)
        name = f"this machine alone, {cores()} cores"
        print(f"| {name} | | {looked:.1f} | {seconds:.1f} | {spent:.1f} | | | | | |", flush=True)
        base = None
        for count, kill in [*((count, False) for count in given.workers), (2, True)]:
            lost: list[str] = []
            with workers(count, lost) as (cluster, start):
                again = open_samples(given.images, count=given.count)
                before, begun = wire(), time.perf_counter()
                cluster.look(again)
                looked, done, received = time.perf_counter() - begun, cluster.shards, cluster.received
                seconds, used, counts = one_pass(wanted, again, cluster, kill)
                found = table_of(counts)
                done, received, sent = cluster.shards - done, cluster.received - received, wire() - before
            base = base or seconds
            different += found != table
            name = f"{count} worker{'s' * (count > 1)}" + (", one killed" if kill else "")
            print(
                f"| {name} | {start:.1f} | {looked:.1f} | {seconds:.1f} | "
                f"{'' if kill else f'{used:.1f}'} | {base / seconds:.2f} | {done} | "
                f"{received / done / 1e3:.0f} | {sent / 1e6:.1f} | {'yes' if found == table else 'NO'} |",
                flush=True,
            )
        model_on_paper(wanted, samples, given.images, statistics, spent / given.count)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
