"""A bundle whose texts are hostile and whose verdict is real, for tests of its page; there is no model in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from edgeres import files
from edgeres.artifacts import (
    CalibrationTable,
    Climb,
    Engine,
    EngineLayer,
    LayerError,
    LayerPlan,
    Manifest,
    Preprocessing,
    QuantizationErrors,
    QuantizedModel,
    Rung,
    StageRecord,
    TensorRange,
    to_data,
    to_json,
)
from edgeres.benchmark import answer, speedup, summarize
from edgeres.judge import judge, reference_content
from edgeres.measurements import Benchmark
from edgeres.samples import open_samples

HOSTILE = "<script>alert('x')</script>\"'&\u202e\x1b"
"""What a name may hold, a slash aside: markup, quotes of both kinds, a mark that turns the text around, an escape."""
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
CLASSES = ("<script>alert(1)", 'it\'s "quoted" & more', "plain")


def photos(folder: Path, pictures: Callable[..., np.ndarray], each: int = 20, side: int = 96) -> Path:
    """Write images into one subfolder per class, whose names and whose files' names are hostile."""
    frames = iter(pictures(each * len(CLASSES), side=side))
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(next(frames)).save(folder / name / f"\"><img src=x onerror='1' {number}.png")
    return folder


def layer_error(name: str, share: float) -> LayerError:
    return LayerError(
        f"/{name}/Conv", "Conv", name, f"/{name}/in", share, 40.0, 30.0, 41.0, None, 2.5, 2.5 / 127, -2.5, 2.5, -1.0,
        2.6, 0.001, 0.002,
    )  # fmt: skip


def tensor_range(amax: float, sqnr_db: float | None, shift: float = 0.0) -> TensorRange:
    return TensorRange(amax, amax / 127, "auto", -amax / 2, 1.1 * amax, 1000, 0.5, 0.001, sqnr_db, shift)


def benchmark(engine_sha256: str) -> Benchmark:
    """A result of `bench` whose latencies are 1 ms for int8 and 2 ms for fp32, give or take a little."""
    random = np.random.default_rng(0)
    found = [
        summarize(name, size, [np.int64(size * ms * 1e6 * random.uniform(0.9, 1.2, 20)) for _ in range(8)])
        for size in (1, 8)
        for name, ms in (("int8", 1.0), (f"fp32 {HOSTILE}", 2.0))
    ]
    ratios = [speedup(found[0], found[1]), speedup(found[2], found[3])]
    return Benchmark(
        HOSTILE, "cpu", "cpu", "int8", (3, 32, 32), None, {"processor": HOSTILE}, tuple(found), tuple(ratios), {}, None,
        (), tuple(answer(ratio, "this CPU") for ratio in ratios), ("mind this",), engine_sha256=engine_sha256,
    )  # fmt: skip


def made(folder: Path, samples_at: Path, noise: float = 0.6, name: str = "a net", backend: str = "cpu") -> Path:
    """Write a bundle whose verdict is real (on made-up logits) and whose texts are hostile; there is no model in it."""
    samples = open_samples(samples_at, labelled=True)
    assert samples.labels is not None
    random = np.random.default_rng(1)
    reference = random.standard_normal((len(samples), len(CLASSES))) + 3.0 * np.eye(len(CLASSES))[samples.labels]
    logits = np.float32(reference + noise * random.standard_normal(reference.shape))
    folder.mkdir(parents=True)
    (folder / files.REFERENCE).write_bytes(reference_content(reference, samples))
    (folder / files.MEANING).write_bytes(reference_content(logits, samples))
    (folder / "model.int8.onnx").write_bytes(b"no model")
    layers = tuple(
        EngineLayer(f"layer {kind}", "conv", kind, ("int8",), (), (kind,), ()) for kind in ("int8", "int8", "fp16")
    )
    engine = Engine(
        "cpu", backend, "int8", files.file_ref(folder, "model.int8.onnx"), {"machine": HOSTILE}, {}, layers=layers,
        not_as_planned=(f"{HOSTILE} runs in fp16",),
    )  # fmt: skip
    report = judge((folder / files.REFERENCE).read_bytes(), logits, engine, (0.5, "ci"), meaning=logits)
    (folder / files.REPORT).write_bytes(to_json(report))
    errors = QuantizationErrors(8, 30.0, 31.0, tuple(layer_error(f"{HOSTILE}{i}", 0.3 / (i + 1)) for i in range(15)))
    (folder / files.ERRORS).write_bytes(to_json(errors))
    chosen = samples.sample_set()
    ranges = {f"{HOSTILE}{i}": tensor_range(i + 1.0, 20.0 + i, i % 2 * 0.5) for i in range(14)}
    table = CalibrationTable(
        "0" * 64, Preprocessing((32, 32)), chosen, "auto", 99.99, {**ranges, "dead": tensor_range(0.0, None)}
    )
    (folder / files.TABLE).write_bytes(to_json(table))
    plan = tuple(
        LayerPlan(f"node{i}", "Conv", f"{HOSTILE}{i}", kind, f"because of {HOSTILE}")
        for i, kind in enumerate(("int8", "int8", "float"))
    )
    model = QuantizedModel(engine.file, "int8", plan)
    rungs = (
        Rung("fast", 1, (), 9.0, 0.8, 20.0, "fail", 1.0),
        Rung("give back", 1, (HOSTILE,), 1.0, 0.9, 25.0, "fail", 1.0, 8.0),
    )
    stages = {
        "quantize": StageRecord("q", (), 1.0, to_data(model)),
        "budget": StageRecord("b", (), 1.0, to_data(Climb(rungs, 1))),
    }
    there = [files.file_ref(folder, path.name) for path in sorted(folder.iterdir())]
    manifest = Manifest(
        name, "int8", {"model": {"source": HOSTILE}, "validation": {"samples": str(samples_at), "max_drop": 0.5}},
        Preprocessing((32, 32)), tuple(there), stages, {"tools": {"numpy": HOSTILE}, "host": {}, "git": None},
        (engine,), report, (f"warned of {HOSTILE}",),
    )  # fmt: skip
    (folder / files.MANIFEST).write_bytes(to_json(manifest))
    return folder
