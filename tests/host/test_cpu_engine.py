"""The CPU engine computes what the Q/DQ file says, also where fused int8 kernels would saturate."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from edgeres import models
from edgeres.artifacts import FileRef, Preprocessing, TensorRange
from edgeres.backends.cpu import EXACT, compile_engine, cpu_flags, describe, open_engine, open_model
from edgeres.calibrate import choose, observe
from edgeres.errors import BackendError
from edgeres.export import export_module
from edgeres.preprocess import prepare_batch
from edgeres.quantize import plan, write_int8

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]


def images(folder: Path, count: int) -> np.ndarray:
    """Return ``count`` images, evenly over the classes, as the network reads them."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(path.iterdir()) for path in classes]
    chosen = [files[i % len(files)][i // len(files)] for i in range(count)]
    frames = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in chosen])
    return prepare_batch(frames, Preprocessing(size=(32, 32)))


def test_a_trained_net_keeps_its_meaning(shared_data: Path, tmp_path: Path, exact: Exact) -> None:
    cifar = shared_data / "cifar10"
    module = models.create("resnet20_cifar")
    models.load_weights(module, cifar / "checkpoints" / "resnet20-12fca82f.th")
    exported = export_module(module, (32, 32))
    path = tmp_path / "model.fp32.onnx"
    path.write_bytes(exported.content)
    fp32 = onnx.load(path)
    placement = plan(fp32, exported.modules)
    ranges = choose(observe(path, placement.tensors, [images(cifar / "calibration", 64)]), "mse", 99.99)
    int8 = write_int8(fp32, placement, ranges)

    x = images(cifar / "validation", 200)
    wanted, reference = exact(int8, x), exact(fp32, x)
    runner = open_engine(int8.SerializeToString(), EXACT)
    got = runner(x)
    noise = np.square(got.astype(np.float64) - wanted).sum()
    assert 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(float(noise), 1e-30)) >= 60
    np.testing.assert_array_equal(got.argmax(1), wanted.argmax(1))
    assert (got.argmax(1) == reference.argmax(1)).mean() >= 0.95  # and int8 itself is worth having
    assert np.abs(got - reference).max() > 1e-3  # it is int8 that was compared, not float with float


def fixed_range(scale: float) -> TensorRange:
    return TensorRange(127 * scale, scale, "minmax", -128 * scale, 127 * scale, 1, 0.0, 0.0, None)


def convolved(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the exact integer 3×3 convolution with a border of zeros; int64."""
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return np.asarray(np.einsum("nchwij,kcij->nkhw", windows, w.astype(np.int64)))


def on_grid(x: np.ndarray, step: float) -> np.ndarray:
    """Return the int8 integers of real numbers; int64."""
    return np.asarray(np.clip(np.rint(x / step), -128, 127).astype(np.int64))


@pytest.mark.parametrize("activation", ["full", "random"])
@pytest.mark.parametrize(
    ("relu", "sign"), [(True, "positive"), (True, "mixed"), (False, "positive"), (False, "negative"), (False, "mixed")]
)
def test_sums_that_overflow_16_bits_are_exact(relu: bool, activation: str, sign: str, graph: Graph) -> None:
    # Pairs of products, 2 × 255 × 127, saturate in pmaddubsw. All scales are powers of two: floats are exact integers.
    rng = np.random.default_rng(0)
    channels = 32
    shape = (channels, channels, 3, 3)
    w = np.full(shape, 127) * {"positive": 1, "negative": -1, "mixed": rng.choice([-1, 1], shape)}[sign]
    v = rng.integers(-127, 128, shape)
    v[:, 0, 0, 0] = 127  # every channel reaches the end of its grid, so that its scale is known
    k = rng.choice([-127, 127], (10, channels * 36))
    images = (2, channels, 6, 6)
    x = np.full(images, 127) if activation == "full" else rng.choice([-128, -127, 126, 127], images)
    # Without the ReLU each convolution stands between pairs of its own: what onnxruntime fuses into an int8 kernel.
    text = f"""net (float[N,{channels},6,6] x) => (float[N,10] y) {{
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        {"r = Relu (c)" if relu else ""}
        d = Conv <pads = [1, 1, 1, 1]> ({"r" if relu else "c"}, v)
        f = Flatten (d)
        y = Gemm <transB = 1> (f, k)
    }}"""
    step_x, step_w, step_c, step_f = 2.0**-5, 2.0**-7, 2.0**4, 2.0**6
    model = graph(text, {name: (t * step_w).astype(np.float32) for name, t in (("w", w), ("v", v), ("k", k))})
    ranges = {"x": step_x, "r" if relu else "c": step_c, "f": step_f}
    int8 = write_int8(model, plan(model, {}), {name: fixed_range(step) for name, step in ranges.items()})

    hidden = on_grid(np.maximum(sums := convolved(x, w), 0 if relu else sums) * step_x * step_w, step_c)
    flat = on_grid(convolved(hidden, v).reshape(2, -1) * step_c * step_w, step_f)
    wanted = flat @ k.T * step_f * step_w
    assert np.abs(sums).max() > 2 * 2**15
    assert len(np.unique(flat)) > 20
    got = open_engine(int8.SerializeToString(), EXACT)((x * step_x).astype(np.float32))
    # The convolutions' sums fit into a float32's 24 bits and are exact; those of the last layer are rounded.
    rounding = 2.0**-23 * float((np.abs(flat) @ np.abs(k.T)).max()) * step_f * step_w
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rounding)


def test_the_engine_is_the_file_and_the_options_that_keep_its_meaning() -> None:
    file = FileRef("model.int8.onnx", "0" * 64, 10)
    engine = compile_engine(file, "int8")
    assert (engine.file, engine.target, engine.backend, engine.precision) == (file, "cpu", "cpu", "int8")
    assert engine.options == EXACT
    assert engine.options is not EXACT
    assert engine.built_for["onnxruntime"] == ort.__version__


@pytest.fixture
def content(net: Callable[[str], Any]) -> bytes:
    data: bytes = net("cifar").int8.SerializeToString()
    return data


def test_batches_and_threads_change_nothing(content: bytes) -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    runner = open_engine(content, EXACT, threads=1)
    whole = runner(x)
    assert whole.shape == (8, 10)
    assert whole.dtype == np.float32
    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(runner, [x] * 8):
            np.testing.assert_array_equal(part, whole)
    singles = np.concatenate([runner(x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(singles, whole, rtol=1e-4, atol=1e-4 * float(np.abs(whole).max()))


def test_a_file_is_opened_with_the_exact_options(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(open_model(tmp_path / "model.onnx", "int8")(x), open_engine(content, EXACT)(x))


def test_a_closed_engine_says_so_and_closes_twice(content: bytes) -> None:
    runner = open_engine(content, EXACT)
    runner.close()
    runner.close()
    with pytest.raises(BackendError, match=r"closed\. Load the bundle again"):
        runner(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("broken", [b"", b"hello", b"\x08\x08", "truncated"])
def test_what_is_no_model_is_refused_in_one_line(broken: bytes | str, content: bytes) -> None:
    data = content[: len(content) // 2] if isinstance(broken, str) else broken
    with pytest.raises(BackendError, match="onnxruntime does not accept this model") as caught:
        open_engine(data, EXACT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [np.zeros((1, 3, 31, 32), np.float32), np.zeros((1, 3, 32, 32)), np.zeros((3, 32, 32), np.float32), np.zeros(0)],
    ids=["size", "double", "rank", "empty"],
)
def test_what_is_no_batch_is_refused_in_one_line(batch: np.ndarray, content: bytes) -> None:
    runner = open_engine(content, EXACT)
    with pytest.raises(BackendError, match="failed on a batch of shape") as caught:
        runner(batch)
    assert "\n" not in str(caught.value)
    assert runner(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)  # and it goes on working


def test_options_that_do_not_exist_are_told(content: bytes) -> None:
    with pytest.raises(BackendError, match=f"does not write: {'k' * 100}[.]"):
        open_engine(content, {"k" * 5000: "1"})


def test_the_processor_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exact" in describe()
    assert isinstance(cpu_flags(), frozenset)
    monkeypatch.setattr("edgeres.backends.cpu.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("edgeres.backends.cpu.cpu_flags", lambda: frozenset({"avx2"}))
    assert "saturate" in describe()
    monkeypatch.setattr("edgeres.backends.cpu.cpu_flags", lambda: frozenset({"avx2", "avx_vnni"}))
    assert "saturate" not in describe()
    monkeypatch.setattr("edgeres.backends.cpu.platform.machine", lambda: "aarch64")
    monkeypatch.setattr("edgeres.backends.cpu.cpu_flags", frozenset)
    assert "saturate" not in describe()
