#!/usr/bin/env python3
"""INT8 accuracy of trained CIFAR-10 nets: edgeres' range methods against other quantizers, in one run.

Every quantizer gets the same FP32 ONNX and the same calibration images; every result is evaluated exactly, by ONNX
Runtime with graph optimizations off, so that no kernel's saturation hides in the figures. edgeres' methods come twice:
with symmetric activations, and with those shifted to the full int8 range. ONNX Runtime's quantizer always runs; NNCF
(nncf 3.4.0) and NVIDIA's modelopt (nvidia-modelopt[onnx] 0.47.0) where installed, and a line on stderr says where not.
They deserve an environment of their own: modelopt's extra asks for other versions of onnx and ONNX Runtime. Legal for
TensorRT is what edgeres' linter has nothing against; it holds models to TensorRT 8.5, and modelopt writes opset 19,
which is newer. Prints a Markdown table:

    python scripts/bench_accuracy.py [--shared FOLDER] [--count 512] [--nets 20 32]

FOLDER holds data/cifar10 (checkpoints, calibration, validation, validation-jpeg); by default $EDGERES_SHARED or
../shared beside the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import nn

from edgeres import models
from edgeres.affine import SHIFTED, SYMMETRIC
from edgeres.artifacts import Preprocessing
from edgeres.calibrate import AUTO, METHODS, choose, expected_noise, observe
from edgeres.export import export_module
from edgeres.quantize import lint, plan, shiftable, write_int8
from edgeres.quantize.reconstruct import rounds_for
from edgeres.quantize.recover import Recovery, find_scalings, images_for, recovered_content
from edgeres.samples import Samples, open_samples
from edgeres.validation import compare

REPOSITORY = Path(__file__).resolve().parent.parent
PREPROCESSING = Preprocessing(size=(32, 32))
SETS = ("validation-jpeg", "validation")
RUNGS = ("recovery fast", "recovery full")
PEER_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
T = TypeVar("T")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration images to ONNX Runtime's calibrators, one by one."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = ({name: images[i : i + 1]} for i in range(len(images)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def batched(samples: Samples) -> np.ndarray:
    """Return all samples as network input, float32 (N, 3, 32, 32)."""
    return np.concatenate(list(samples.batches(PREPROCESSING, PREPROCESSING.batch_size)))


def evaluate(model: bytes, images: np.ndarray) -> np.ndarray:
    """Return logits, float32 (N, K), as the ONNX specification has them: no graph optimization at all."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + 50]})[0] for i in range(0, len(images), 50)])


def peer(fp32: Path, images: np.ndarray, method: str, folder: Path) -> bytes:
    """Return ONNX Runtime's quantization: int8 symmetric, weights per channel, float biases."""
    out = folder / "peer.onnx"
    with contextlib.redirect_stdout(sys.stderr):  # it prints its progress
        quantize_static(
            str(fp32),
            str(out),
            Reader(images, "input"),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=PEER_METHODS[method],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
    return out.read_bytes()


def nncf_peer(fp32: Path, images: np.ndarray, method: str, folder: Path) -> bytes:
    """Return NNCF's quantization: its defaults, every image taken; activations behind a ReLU come out as uint8."""
    import nncf

    dataset = nncf.Dataset([{"input": images[i : i + 1]} for i in range(len(images))])
    preset = nncf.QuantizationPreset(method)
    quantized: onnx.ModelProto = nncf.quantize(onnx.load(fp32), dataset, preset=preset, subset_size=len(images))
    return quantized.SerializeToString()


def modelopt_peer(fp32: Path, images: np.ndarray, method: str, folder: Path) -> bytes:
    """Return modelopt's quantization: its defaults, float32 where not int8, calibrated on the CPU."""
    from modelopt.onnx.quantization import quantize

    out = folder / "modelopt.onnx"
    quantize(
        str(fp32),
        quantize_mode="int8",
        calibration_data={"input": images},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        log_level="WARNING",
    )
    return out.read_bytes()


class Peer(NamedTuple):
    """A quantizer that this script can do without, and what to try with it."""

    tool: str
    package: str
    module: str
    quantize: Callable[[Path, np.ndarray, str, Path], bytes]
    methods: tuple[str, ...]


PEERS = (
    Peer("NNCF", "nncf", "nncf", nncf_peer, ("performance",)),
    Peer("modelopt", "nvidia-modelopt[onnx]", "modelopt.onnx.quantization", modelopt_peer, ("entropy", "max")),
)


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Return what the function answers in a process of its own: modelopt changes ONNX Runtime's quantizer for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def why_missing(module: str) -> str:
    """Return why a module cannot be imported, in one line; empty where it can."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except ImportError as error:
        return " ".join(str(error).split())
    return ""


def installed_peers() -> Iterator[Peer]:
    """Yield the peers that can be imported; of each other one says on stderr why not."""
    for candidate in PEERS:
        reason = apart(why_missing, candidate.module)
        if reason:
            print(f"{candidate.tool} is left out ({reason}): pip install '{candidate.package}'", file=sys.stderr)
        else:
            yield candidate


def timed_peer(chosen: Peer, fp32: Path, images: np.ndarray, method: str, folder: Path) -> tuple[bytes, float]:
    """Return a peer's int8 model, and the seconds that it took once imported."""
    with contextlib.redirect_stdout(sys.stderr):  # both log to stdout, as it is when they are imported
        importlib.import_module(chosen.module)
        start = time.perf_counter()
        return chosen.quantize(fp32, images, method, folder), time.perf_counter() - start


def make_hostile(model: nn.Module) -> None:
    """Scale each block's inner channels by 2^u, u uniform in [−4, 4], and take it back in the next convolution.

    In float nothing changes. Per-tensor int8 is ruined, unless somebody finds the factors.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.modules():
            if hasattr(block, "conv1") and hasattr(block, "bn1") and hasattr(block, "conv2"):
                factors = 2.0 ** (8 * torch.rand(block.bn1.num_features, generator=generator) - 4)
                block.bn1.weight *= factors
                block.bn1.bias *= factors
                block.conv2.weight /= factors[:, None, None]


def rows(depth: int, data: Path, count: int, hostile: bool, peers: Sequence[Peer]) -> Iterator[str]:
    """Yield a table row for each quantizer of one net."""
    model = models.create(f"resnet{depth}_cifar")
    models.load_weights(model, next(data.glob(f"checkpoints/resnet{depth}-*.th")))
    if hostile:
        make_hostile(model)
    exported = export_module(model, PREPROCESSING.size)
    fp32 = onnx.load_from_string(exported.content)
    calibration = batched(open_samples(data / "calibration", count=count))
    judged = {name: open_samples(data / name, labelled=True) for name in SETS}
    images = {name: batched(samples) for name, samples in judged.items()}
    reference = {name: evaluate(exported.content, images[name]) for name in SETS}

    def row(tool: str, method: str, int8: bytes, seconds: float) -> str:
        cells = [f"ResNet-{depth}" + (", hostile" if hostile else ""), tool, method]
        for name in SETS:
            report = compare(
                reference[name], evaluate(int8, images[name]), judged[name].labels,
                max_drop_pp=0.5, backend="cpu", precision="int8",
            )  # fmt: skip
            low, high = report.drop_ci95_pp or (0.0, 0.0)
            cells += [
                f"{report.sqnr_db:.2f}",
                f"{report.agreement:.4f}",
                f"{report.drop_pp:+.2f} ({low:+.2f}, {high:+.2f})",
            ]
        legal = "yes" if not lint(onnx.load_from_string(int8)) else "no"
        return "| " + " | ".join([*cells, legal, f"{seconds:.1f}"]) + " |"

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fp32.onnx"
        path.write_bytes(exported.content)
        for method in PEER_METHODS:
            start = time.perf_counter()
            int8 = peer(path, calibration, method, Path(temporary))
            yield row("ONNX Runtime", method, int8, time.perf_counter() - start)
        for other in peers:
            for method in other.methods:
                int8, seconds = apart(timed_peer, other, path, calibration, method, Path(temporary))
                yield row(other.tool, method, int8, seconds)
        start = time.perf_counter()
        placement = plan(fp32, exported.modules)
        batches = (calibration[i : i + 64] for i in range(0, len(calibration), 64))
        statistics = observe(path, placement.tensors, batches)
        observing = time.perf_counter() - start
        for activations in ("symmetric", "shifted"):
            for method in METHODS:
                start = time.perf_counter()
                allowed = shiftable(fp32, placement) if activations == "shifted" else ()
                ranges = choose(statistics, method, 99.99, allowed)
                int8 = write_int8(fp32, placement, ranges).SerializeToString()
                yield row(f"edgeres, {activations}", method, int8, observing + time.perf_counter() - start)
            for rungs in RUNGS:
                start = time.perf_counter()
                allowed = shiftable(fp32, placement, free=activations == "symmetric")
                tables = {
                    name: expected_noise(statistics.tensors[name], SHIFTED if name in allowed else SYMMETRIC)
                    for name in placement.tensors
                    if name != "input"
                }
                images_wanted, batch = images_for(path)
                few = calibration[:: max(1, len(calibration) // images_wanted)]
                scalings = find_scalings(path, placement, tables, statistics.samples, few, batch)
                ranges = choose(statistics, AUTO, 99.99, allowed, scalings)
                parts = [few[i : i + batch] for i in range(0, len(few), batch)]
                rounds = rounds_for(path)[0] if rungs == RUNGS[1] else 0
                recovery = Recovery(scalings, PREPROCESSING, parts, rounds=rounds)
                int8 = recovered_content(path, exported.modules, (), ranges, recovery)[0]
                yield row(f"edgeres, {activations}", f"auto, {rungs}", int8, observing + time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("EDGERES_SHARED")
    parser.add_argument("--shared", type=Path, default=Path(shared) if shared else REPOSITORY.parent / "shared")
    parser.add_argument("--count", type=int, default=512, help="calibration images (default: 512)")
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 32], help="depths (default: 20 32)")
    parser.add_argument("--hostile", action="store_true", help="scale channels so that float answers the same")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    peers = list(installed_peers())
    packages = [found.package.partition("[")[0] for found in peers]
    versions = ", ".join([f"onnxruntime {ort.__version__}", *(f"{name} {version(name)}" for name in packages)])
    print(f"{versions}, {machine}, {arguments.count} calibration images\n")
    heads = [f"{name}: SQNR dB | agreement | drop pp (95 %)" for name in ("JPEG", "lossless")]
    print("| net | tool | ranges | " + " | ".join(heads) + " | TensorRT-legal | s |")
    print("| --- | --- | --- |" + " --- |" * 8)
    for depth in arguments.nets:
        for line in rows(depth, arguments.shared / "data/cifar10", arguments.count, arguments.hostile, peers):
            print(line, flush=True)


if __name__ == "__main__":
    main()
