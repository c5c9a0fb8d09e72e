#!/usr/bin/env python3
"""What calibration costs: time over one plain FP32 pass, and memory, of edgeres and of ONNX Runtime's own methods.

Each configuration runs in a process of its own: first alone, for its peak memory, with images decoded as they are
needed; then for its time, with images decoded beforehand, and before each batch the plain FP32 session (all graph
optimizations) runs on the same images, so that both see the same load of the machine. Prints a Markdown table:

    python scripts/bench_calibration.py [--images FOLDER] [--model resnet50] [--counts 50 125 250]
        [--peer-counts 16 32 48] [--peers minmax percentile entropy] [--rounds 3] [--size 224] [--resize 256]

FOLDER is by default data/imagenet-samples in $EDGERES_SHARED or in ../shared beside the checkout. Short run:
--model resnet18 --counts 12 24 --peer-counts 4 8 --rounds 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from edgeres.artifacts import Preprocessing
from edgeres.calibrate import AUTO, METHODS, choose, observe
from edgeres.samples import Samples, open_samples

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
COLUMNS = (
    "calibration",
    "images",
    "FP32 pass s",
    "calibration s",
    "of it ranges s",
    "ratio",
    "peak MB",
    "MB per further image",
)
Batches = Iterable[np.ndarray]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds ONNX Runtime's calibrators one image at a time, as its examples do: in larger batches they need more."""

    def __init__(self, batches: Batches) -> None:
        self._feeds = ({"input": batch[i : i + 1]} for batch in batches for i in range(len(batch)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


class Plain:
    """One plain FP32 pass, batch by batch, woven into the pass that is measured: ``seconds`` is what it took."""

    def __init__(self, model: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or it would slow down what comes next
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.seconds = 0.0

    def before(self, batches: Batches) -> Iterator[np.ndarray]:
        """Yield the batches; each has been run when it comes out."""
        for batch in batches:
            start = time.perf_counter()
            self._session.run(None, {"input": batch})
            self.seconds += time.perf_counter() - start
            yield batch


def calibrate_edgeres(folder: Path, batches: Batches, method: str) -> float:
    """Observe and choose; return the seconds that choosing took."""
    counted = observe(folder / "model.onnx", json.loads((folder / "tensors.json").read_text()), batches)
    start = time.perf_counter()
    choose(counted, method, 99.99)
    return time.perf_counter() - start


def calibrate_peer(folder: Path, batches: Batches, method: str) -> float:
    """Find ranges by ONNX Runtime's calibrator, of the tensors that its quantize_static asks for."""
    kinds = sorted({*QLinearOpsRegistry, *QDQRegistry})
    augmented = folder / f"augmented-{os.getpid()}.onnx"
    with contextlib.redirect_stdout(sys.stderr):  # it prints its progress
        calibrator = create_calibrator(str(folder / "model.onnx"), kinds, str(augmented), PEERS[method])
        calibrator.collect_data(Reader(batches))
        calibrator.compute_data()
    return 0.0


def samples_of(arguments: argparse.Namespace, count: int) -> tuple[Samples, Preprocessing]:
    size = (arguments.size, arguments.size)
    return open_samples(arguments.images, count=count), Preprocessing(size, resize=arguments.resize or None)


def export(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the model and the names of the tensors that its INT8 form quantizes into ``folder``."""
    from edgeres import models
    from edgeres.export import export_module
    from edgeres.quantize import plan

    exported = export_module(models.create(arguments.model), (arguments.size, arguments.size))
    (folder / "model.onnx").write_bytes(exported.content)
    placement = plan(onnx.load(folder / "model.onnx"), exported.modules)
    (folder / "tensors.json").write_text(json.dumps(list(placement.tensors)))
    return {}


def measure(arguments: argparse.Namespace, folder: Path, tool: str, count: int) -> dict[str, Any]:
    """Return the peak memory of one calibration, MB, and of ``rounds`` others the seconds, theirs and the pass's."""
    ours = tool == "edgeres"
    run: Callable[[Path, Batches, str], float] = calibrate_edgeres if ours else calibrate_peer
    method = arguments.method if ours else tool
    samples, preprocessing = samples_of(arguments, count)
    run(folder, samples.batches(preprocessing, preprocessing.batch_size), method)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batches = list(samples.batches(preprocessing, preprocessing.batch_size))
    plain = Plain(folder / "model.onnx")
    list(plain.before(batches[:1]))  # the first run of a session also allocates
    rounds = []
    for _ in range(arguments.rounds if ours else 1):
        plain.seconds, start = 0.0, time.perf_counter()
        choosing = run(folder, plain.before(batches), method)
        rounds.append((plain.seconds, time.perf_counter() - start - plain.seconds, choosing))
    return {"peak": peak, "images": len(samples), "rounds": rounds}


def in_a_process(arguments: list[str], folder: Path, *work: str) -> dict[str, Any]:
    """Return what this script prints as its last line when it does one piece of work in a new process."""
    command = [sys.executable, __file__, *arguments, "--work", str(folder), *work]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows(given: list[str], arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    in_a_process(given, folder, "export")
    for tool, counts in [("edgeres", arguments.counts), *((peer, arguments.peer_counts) for peer in arguments.peers)]:
        before: dict[str, Any] | None = None
        for count in counts:
            found = in_a_process(given, folder, tool, str(count))
            plain, seconds, choosing = (statistics.median(column) for column in zip(*found["rounds"], strict=True))
            ratio = statistics.median(mine / one for one, mine, _ in found["rounds"])
            grown = "" if before is None else f"{_growth(before, found):.2f}"
            name = f"edgeres, {arguments.method}" if tool == "edgeres" else f"ONNX Runtime, {tool}"
            ranges = f"{choosing:.1f}" if tool == "edgeres" else ""
            cells = [name, found["images"], f"{plain:.1f}", f"{seconds:.1f}", ranges, f"{ratio:.2f}"]
            yield "| " + " | ".join(map(str, [*cells, f"{found['peak']:.0f}", grown])) + " |"
            before = found


def _growth(before: dict[str, Any], now: dict[str, Any]) -> float:
    return float(now["peak"] - before["peak"]) / max(1, now["images"] - before["images"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("EDGERES_SHARED") or REPOSITORY.parent / "shared")
    parser.add_argument("--images", type=Path, default=shared / "data/imagenet-samples")
    parser.add_argument("--model", default="resnet50", help="a name of `edgeres models`; its weights are random")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--resize", type=int, default=256, help="short side before cropping; 0: none (default: 256)")
    parser.add_argument(
        "--method", choices=[AUTO, *METHODS], default="mse", help="edgeres' range method (default: mse)"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 125, 250], help="images for edgeres")
    parser.add_argument("--peers", choices=[*PEERS], nargs="*", default=[*PEERS], help="methods of ONNX Runtime")
    parser.add_argument("--peer-counts", type=int, nargs="+", default=[16, 32, 48], help="images for ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of edgeres; the median counts (default: 3)")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # for the processes that it starts itself
    arguments = parser.parse_args()
    if arguments.work:
        folder, tool, *count = arguments.work
        folder = Path(folder)
        print(json.dumps(measure(arguments, folder, tool, int(count[0])) if count else export(arguments, folder)))
        return
    versions = f"onnxruntime {ort.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    print(f"{arguments.model} at {arguments.size}×{arguments.size}, {versions}\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(sys.argv[1:], arguments, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
