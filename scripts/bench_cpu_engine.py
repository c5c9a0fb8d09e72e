#!/usr/bin/env python3
"""The CPU's int8 engines against FP32, one image at a time, in turns in one run: milliseconds, ratios, and how far each
is from what the int8 file means. OpenVINO takes part where it is installed. Prints a Markdown table:

    python scripts/bench_cpu_engine.py [--bundle BUNDLE] [--threads 1 2] [--seconds 20] [--images FOLDER]

Without --bundle it builds ResNet-50 with random weights (two minutes), whose batch norms have seen the images and whose
blocks begin as small additions; --images is then needed, a folder of photographs. A bundle's own verdict tells its
accuracy: the decibels here are against the meaning of `model.int8.onnx`, computed in float without optimization.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import save_file

import edgeres
from edgeres import files, models
from edgeres.artifacts import Preprocessing
from edgeres.backends.cpu import EXACT, FAST, cpu_flags, open_engine
from edgeres.benchmark import Pace, speedup, summarize, take_turns
from edgeres.bundle import read_manifest
from edgeres.samples import open_samples
from edgeres.validation import compare

IMAGES = 16
Engine = Callable[[np.ndarray], np.ndarray]


def random_weights(images: Path, folder: Path) -> Path:
    """Return ResNet-50's weights, random but for batch norms: their statistics are those of some images."""
    torch.manual_seed(0)
    net = models.create("resnet50")
    for name, part in net.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0, 0.2)
            if name.endswith("bn3"):
                part.weight.data *= 0.25
    with torch.no_grad():
        for batch in open_samples(images, count=48).batches(Preprocessing(size=(224, 224), resize=256), 16):
            net.train()(torch.from_numpy(batch))
    path = folder / "resnet50.safetensors"
    save_file({name: value.contiguous() for name, value in net.eval().state_dict().items()}, str(path))
    return path


def bundle_for(arguments: argparse.Namespace, folder: Path) -> Path:
    """Return the bundle to measure: the given one, or ResNet-50 with random weights, built now."""
    if arguments.bundle is not None:
        return Path(arguments.bundle)
    if arguments.images is None:
        raise SystemExit("name a --bundle, or a folder of photographs to build ResNet-50 with: --images FOLDER")
    options: dict[str, Any] = {"method": "minmax", "recovery": "none", "budget_minutes": 0, "calibration_count": IMAGES}
    weights = random_weights(arguments.images, folder)
    out = folder / "resnet50"
    edgeres.build(out=out, model="resnet50", weights=weights, calibration=arguments.images, backend="cpu", **options)
    return out


def openvino(path: Path, shape: tuple[int, ...], threads: int) -> Engine:
    """Return OpenVINO's engine of an ONNX file, for one image at a time."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    model.reshape([1, *shape])
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    return lambda x: np.array(request.infer([x])[compiled.output(0)])


def engines(bundle: Path, shape: tuple[int, ...], threads: int) -> dict[str, Engine]:
    """Return what takes turns, by name, FP32 first."""
    found: dict[str, Engine] = {
        "FP32": open_engine((bundle / files.FP32_MODEL).read_bytes(), FAST, threads),
        "INT8 in float (Q/DQ)": open_engine((bundle / files.model_file("int8")).read_bytes(), EXACT, threads),
        "INT8 as onnxruntime fuses it": open_engine((bundle / files.model_file("int8")).read_bytes(), FAST, threads),
        "INT8 in integers": open_engine((bundle / files.INTEGER_MODEL).read_bytes(), EXACT, threads),
    }
    if importlib.util.find_spec("openvino") is not None:
        found["OpenVINO, FP32"] = openvino(bundle / files.FP32_MODEL, shape, threads)
        found["OpenVINO, INT8"] = openvino(bundle / files.model_file("int8"), shape, threads)
    return found


def measure(bundle: Path, x: np.ndarray, threads: int, seconds: float) -> None:
    """Print a row for each engine."""
    found = engines(bundle, x.shape[1:], threads)
    answers = {name: np.concatenate([run(x[i : i + 1]) for i in range(len(x))]) for name, run in found.items()}
    meaning = answers["INT8 in float (Q/DQ)"]
    rounds = take_turns({name: lambda run=run: run(x[:1]) for name, run in found.items()}, Pace(seconds=seconds))
    times = {name: summarize(name, 1, parts) for name, parts in rounds.items()}
    for name, time in times.items():
        ratio = speedup(time, times["FP32"])
        low, high = ratio.ci95 or (float("nan"), float("nan"))
        near = compare(meaning, answers[name], None, max_drop_pp=0.0, backend="cpu", precision="int8").sqnr_db
        told = "" if "INT8" not in name else "the same" if near is None else f"{near:.1f}"
        fastest = min(part.min() for part in rounds[name]) / 1e6
        print(
            f"| {name} | {threads} | {time.p50_ms:.2f} | {fastest:.2f} | {ratio.ratio:.2f} ({low:.2f} to {high:.2f}) "
            f"| {told} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="an int8 bundle for the CPU")
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of threads (default: 20)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = bundle_for(arguments, Path(temporary))
        preprocessing = read_manifest(bundle).preprocessing
        if arguments.images is None:
            x = np.random.default_rng(0).standard_normal((IMAGES, 3, *preprocessing.size), dtype=np.float32)
        else:
            (x,) = open_samples(arguments.images, count=IMAGES).batches(preprocessing, IMAGES)
        vnni = "VNNI" if {"avx512_vnni", "avx_vnni"} & cpu_flags() else "no VNNI"
        print(f"onnxruntime {ort.__version__}, {platform.machine()}, {vnni}, {bundle.name}\n")
        print("| engine | threads | p50 ms | fastest ms | times as fast as FP32 (95 %) | dB to the file's meaning |")
        print("| --- |" + " --- |" * 5)
        for threads in arguments.threads:
            measure(bundle, x, threads, arguments.seconds)


if __name__ == "__main__":
    main()
