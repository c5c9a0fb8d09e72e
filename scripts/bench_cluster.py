#!/usr/bin/env python3
"""What a cluster gains: one calibration pass by this machine alone, by 1, 2 and 4 Dask workers with a core each, and by
2 of which one is killed half-way. Prints a Markdown table:

    python scripts/bench_cluster.py [--images FOLDER] [--model resnet50] [--count 192] [--workers 1 2 4] [--size 224]

FOLDER is by default data/imagenet-samples in $EDGERES_SHARED or in ../shared beside the checkout. Weights are random:
the work is the same. The exit code is 1 where any table is not the one of this machine alone, byte for byte.

`start` is the time until all workers are there; `look` is reading and hashing all samples by the workers; `pass` is the
calibration pass, whose speed-up is told against the one worker. `results` is what came back, `wire` all that went over
the loopback device meanwhile, Dask's own messages and the model included (in MB, 10⁶ bytes).
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
COLUMNS = ("calibration", "start s", "look s", "pass s", "speed-up", "shards", "kB per shard", "wire MB", "same table")


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


def wire() -> int:
    """Return the bytes that have gone over the loopback device since the machine was started."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def one_pass(wanted: Observation, samples: Samples, workforce: Workforce, kill: bool = False) -> tuple[float, bytes]:
    """Return the seconds of a pass and the table that comes of it; ``kill``: a worker, once a third is done."""
    struck: list[int] = []

    def watch(done: int, total: int) -> None:
        if kill and not struck and done >= total // 3:
            own = psutil.Process().children(recursive=True)
            struck.extend(one.pid for one in own if "spawn_main" in " ".join(one.cmdline()))
            os.kill(struck[0], signal.SIGKILL)

    begun = time.perf_counter()
    statistics = workforce.observe(wanted, samples, watch, None, lambda statistics: None)
    seconds = time.perf_counter() - begun
    if kill and not struck:
        raise SystemExit("no worker could be killed half-way: take more samples, --count")
    return seconds, table_of(statistics)


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
        seconds, table = one_pass(wanted, samples, Alone())
        print(f"| this machine alone, {cores()} cores | | {looked:.1f} | {seconds:.1f} | | | | | |", flush=True)
        base = None
        for count, kill in [*((count, False) for count in given.workers), (2, True)]:
            lost: list[str] = []
            with workers(count, lost) as (cluster, start):
                again = open_samples(given.images, count=given.count)
                before, begun = wire(), time.perf_counter()
                cluster.look(again)
                looked, done, received = time.perf_counter() - begun, cluster.shards, cluster.received
                seconds, found = one_pass(wanted, again, cluster, kill)
                done, received, sent = cluster.shards - done, cluster.received - received, wire() - before
            base = base or seconds
            different += found != table
            name = f"{count} worker{'s' * (count > 1)}" + (", one killed" if kill else "")
            print(
                f"| {name} | {start:.1f} | {looked:.1f} | {seconds:.1f} | {base / seconds:.2f} | {done} | "
                f"{received / done / 1e3:.0f} | {sent / 1e6:.1f} | {'yes' if found == table else 'NO'} |",
                flush=True,
            )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
