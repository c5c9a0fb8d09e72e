"""The runtime with onnxruntime behind it: threads, streams, and the bench, which must find no leak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import edgeres
from edgeres.artifacts import Manifest, Preprocessing, to_json
from edgeres.backends.cpu import compile_engine
from edgeres.errors import BackendError
from edgeres.files import MANIFEST, file_ref

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 8


@pytest.fixture(scope="module")
def bundle(graph: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small float net with random weights, made by hand."""
    random = np.random.default_rng(0)
    text = """net (float[N,3,8,8] x) => (float[N,10] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        h = Gemm (f, wide)
        y = Gemm (h, k)
    }"""
    shapes = {"w": (16, 3, 3, 3), "wide": (16, 20000), "k": (20000, 10)}  # 2 MB, so that a leak is seen
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "model.fp32.onnx").write_bytes(graph(text, weights).SerializeToString())
    file = file_ref(folder, "model.fp32.onnx")
    engine = compile_engine(file, "fp32")
    manifest = Manifest("tiny", "fp32", {}, Preprocessing((SIDE, SIDE)), (file,), {}, {}, engines=(engine,))
    (folder / MANIFEST).write_bytes(to_json(manifest))
    return folder


def images(count: int, seed: int = 0) -> np.ndarray:
    frames: np.ndarray = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return frames


def test_eight_threads_get_what_one_gets(bundle: Path) -> None:
    inputs = [images(1 + index % 3, index) for index in range(8)]
    with edgeres.load(bundle) as engine:
        alone = [engine(frames) for frames in inputs]

        def call(index: int) -> int:
            return sum(bool((engine(inputs[index]) == alone[index]).all()) for _ in range(500))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(call, range(8))) == [500] * 8


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stream_answers_as_onnxruntime_does(bundle: Path, depth: int) -> None:
    frames = images(100)
    mean, std = ([[[v]] for v in values] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((frames.transpose(0, 3, 1, 2) / 255 - mean) / std).astype(np.float32)
    wanted = ort.InferenceSession(bundle / "model.fp32.onnx").run(None, {"x": x})[0]
    with edgeres.load(bundle, threads=1) as engine:
        found = np.stack(list(engine.stream(frames, depth)))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.stack(list(engine.stream(frames, depth))), found)


def test_read_only_input_and_torch_tensors_are_taken(bundle: Path) -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, SIDE, SIDE), np.float32)
    with edgeres.load(bundle) as engine:
        wanted = engine(x)
        np.testing.assert_array_equal(engine(torch.from_numpy(x)), wanted)
        np.testing.assert_array_equal(torch.from_dlpack(engine(torch.from_numpy(x).clone())).numpy(), wanted)
        x.flags.writeable = False
        np.testing.assert_array_equal(engine(x), wanted)
        with pytest.raises(BackendError, match=r"this Tensor does not give out its numbers: .*grad"):
            engine(torch.zeros((1, 3, SIDE, SIDE), requires_grad=True))


def bench(*arguments: str) -> dict[str, list[dict[str, str]]]:
    """Return the bench's tables by their titles."""
    command = [sys.executable, str(REPOSITORY / "scripts/bench_runtime.py"), "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables: dict[str, list[dict[str, str]]] = {}
    title, head = "", []
    for line in filter(None, done.stdout.splitlines()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            title, head = line, []
        elif not head:
            head = cells
        elif cells[0] != "---":
            tables.setdefault(title, []).append(dict(zip(head, cells, strict=True)))
    return tables


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="memory and files are read from /proc")
def test_calls_streams_and_loads_leave_nothing(bundle: Path) -> None:
    (rows,) = bench("--bundle", str(bundle), "--soak", "--calls", "2000", "--loads", "20").values()
    assert {row["work"]: row["times"] for row in rows} == {
        "call": "2000",
        "stream of ten items": "20",
        "load, call and close": "20",
    }
    for row in rows:
        assert len(set(row["open files before, after"].split(", "))) == 1
        assert float(row["after all"]) - float(row["after a tenth"]) < 12  # 18 engines that stay open take over 36


def test_the_bench_compares_calls_frames_and_streams(bundle: Path) -> None:
    tables = bench("--bundle", str(bundle), "--calls", "40", "--camera", "12", "16")
    imports, floats, frames, streams = tables.values()
    assert [row["import"] for row in imports][:2] == ["import numpy", "import edgeres"]
    assert all(0 < float(row["best ms"]) <= float(row["median ms"]) for row in imports)
    assert [row["call"] for row in floats] == ["onnxruntime", "edgeres", "edgeres, out="]
    assert [row["call"] for row in frames] == ["NumPy, onnxruntime", "edgeres"]
    assert all(0 < float(row["p10 µs"]) <= float(row["p50 µs"]) <= float(row["p99 µs"]) for row in floats + frames)
    assert [row["way"] for row in streams[:4]] == ["loop", "stream, depth=1", "stream, depth=2", "stream, depth=3"]
    assert len(streams) == 8
    assert all(float(row["times the loop"]) > 0 for row in streams)
