"""The engine on a real GPU: its answers against what the ONNX means, threads, reloading. Runs as it is on a board."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeres
from edgeres.runtime.engine import LoadedEngine
from edgeres.targets import gpu_is_usable

pytestmark = pytest.mark.skipif(not gpu_is_usable(), reason="needs a GPU with tensorrt, and cuda-python or pycuda")


@pytest.fixture(scope="module", params=["symmetric", "shifted"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, compiled by TensorRT for the GPU here, with a CPU engine beside it.

    It is built here where the packages for that are; a board compiles one that was built elsewhere, with
    ``edgeres build --backend cpu``: ``EDGERES_BUNDLE`` names its folder, which is copied (then
    the tests run once).
    """
    from edgeres.compilation import compile_bundle
    from edgeres.recipe import engine_section

    out = tmp_path_factory.mktemp("gpu") / "digits-int8"
    made = os.environ.get("EDGERES_BUNDLE")
    if made is not None:
        if request.param == "shifted":
            pytest.skip("the bundle named by EDGERES_BUNDLE is tested already")
        shutil.copytree(made, out)
    else:
        for package in ("torch", "onnx", "onnxruntime", "safetensors", "tomli_w"):
            pytest.importorskip(package, reason="to build a bundle here; or set EDGERES_BUNDLE to one")
        edgeres.build(precision="int8", backend="cpu", out=out, activation_range=request.param)
    compile_bundle(out, engine_section({}, {"backend": "tensorrt"}), lambda *_: None)
    return out


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)  # more than the largest batch


def test_the_engine_answers_what_the_onnx_means(bundle: Path, frames: np.ndarray) -> None:
    pytest.importorskip("onnxruntime", reason="computes what the ONNX means: pip install 'edgeres[cpu]'")
    with edgeres.load(bundle, backend="tensorrt") as gpu, edgeres.load(bundle, backend="cpu") as cpu:
        got, wanted = gpu(frames), cpu(frames)
    noise = np.square(got.astype(np.float64) - wanted).sum()
    assert 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise) >= 25
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= 0.97


def test_pixels_on_the_gpu_are_what_normalized_input_is(bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    """The engine takes uint8; one that is compiled for float32 answers the same frames alike."""
    from edgeres.compilation import compile_bundle
    from edgeres.recipe import engine_section

    other = Path(shutil.copytree(bundle, tmp_path / "floats"))
    compile_bundle(other, engine_section({}, {"backend": "tensorrt", "input": "float32"}), lambda *_: None)
    with edgeres.load(bundle, backend="tensorrt") as pixels, edgeres.load(other, backend="tensorrt") as floats:
        assert (pixels.record.input, floats.record.input) == ("uint8", "float32")
        got, wanted = pixels(frames), floats(frames)
    noise = np.square(got.astype(np.float64) - wanted).sum()
    assert noise == 0 or 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise) >= 40


def test_the_engine_keeps_the_accuracy(bundle: Path) -> None:
    pytest.importorskip("PIL", reason="reads the digits: pip install 'edgeres[images]'")
    report = edgeres.validate(bundle, backend="tensorrt")
    assert report.backend == "tensorrt"
    assert report.verdict in ("pass", "inconclusive")
    assert report.agreement >= 0.995


def test_every_weighted_layer_runs_in_int8(bundle: Path) -> None:
    """Seven convolutions and the classifier, by the builder's own table, which names whatever is not as planned."""
    with edgeres.load(bundle, backend="tensorrt") as engine:
        record = engine.record
    assert record.not_as_planned == ()
    assert record.summary is not None
    assert record.summary.precisions["int8"] >= 8
    report = edgeres.validate(bundle, np.zeros((4, 32, 32, 3), np.uint8), backend="tensorrt")
    assert report.layers == (record.summary,)


def test_threads_get_the_answers_of_one_thread(bundle: Path, frames: np.ndarray) -> None:
    with edgeres.load(bundle, backend="tensorrt") as engine:
        wanted = [engine(frames[i : i + 7]) for i in range(0, 70, 7)]
        wrong: list[int] = []

        def work() -> None:
            for _ in range(20):
                for i, logits in enumerate(wanted):
                    if not np.array_equal(engine(frames[7 * i : 7 * i + 7]), logits):
                        wrong.append(i)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def latencies(engine: LoadedEngine, frames: np.ndarray, calls: int) -> np.ndarray:
    """Return how long each of some calls took, in milliseconds, sorted; the first ones, which warm up, left out."""
    batch = np.ascontiguousarray(
        np.random.default_rng(1).standard_normal((len(frames), *engine.input_shape)), np.float32
    )
    times = []
    for _ in range(calls + 20):
        start = time.perf_counter()
        engine(batch)
        times.append(1000 * (time.perf_counter() - start))
    return np.sort(times[20:])


def test_latency(bundle: Path, frames: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """One frame at a time, steadily; and less per frame in a batch."""
    with edgeres.load(bundle, backend="tensorrt") as engine:
        one, many = latencies(engine, frames[:1], 500), latencies(engine, frames[:32], 200)
    with capsys.disabled():
        for name, found in (("1 frame", one), ("32 frames", many)):
            p50, p90, p99 = (np.percentile(found, share) for share in (50, 90, 99))
            sys.stdout.write(f"\nlatency of {name}: p50 {p50:.3f} ms, p90 {p90:.3f} ms, p99 {p99:.3f} ms")
        sys.stdout.write("\n")
    assert np.median(one) < 20  # a net of 0.3 M weights; what takes longer does not run on the GPU
    assert np.median(many) / 32 < np.median(one)
    assert np.percentile(one, 90) < 5 * np.median(one) + 1


def test_loading_again_and_again(bundle: Path, frames: np.ndarray) -> None:
    answers = []
    for _ in range(5):
        with edgeres.load(bundle, backend="tensorrt") as engine:
            answers.append(engine(frames[:3]))
    assert all(np.array_equal(answers[0], other) for other in answers[1:])


class Dlpack:
    """An array of another library, by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)


class Torch:
    """Tensors of torch on the GPU. ``late`` is written on a stream of its own, behind a long wait."""

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("torch does not see the GPU")

    def there(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array).cuda()

    def here(self, tensor: Any) -> np.ndarray:
        return tensor.cpu().numpy()

    def late(self, array: np.ndarray) -> Any:
        source, target = self.there(array), self.there(np.zeros_like(array))
        self.torch.cuda.synchronize()
        with self.torch.cuda.stream(self.torch.cuda.Stream()):
            self.torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
            target.copy_(source)
        return target


class Cupy:
    """The same of CuPy, whose streams do not wait for the default stream either."""

    def __init__(self) -> None:
        self.cupy = pytest.importorskip("cupy")

    def there(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array)

    def here(self, array: Any) -> np.ndarray:
        return self.cupy.asnumpy(array)

    def late(self, array: np.ndarray) -> Any:
        source, target = self.there(array), self.there(np.zeros_like(array))
        square = self.cupy.ones((4096, 4096), np.float32)
        self.cupy.cuda.Device().synchronize()
        with self.cupy.cuda.Stream(non_blocking=True):
            for _ in range(20):
                square = square @ square
            target[...] = source
        return target


@pytest.fixture(params=[Torch, Cupy])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param()


def normalized(engine: LoadedEngine, count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *engine.input_shape)).astype(np.float32)


@pytest.mark.parametrize("as_given", [lambda array: array, Dlpack], ids=["interface", "DLPack"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_arrays_on_the_gpu_are_read_and_filled(bundle: Path, library: Any, as_given: Any, cuda_graphs: bool) -> None:
    with edgeres.load(bundle, backend="tensorrt", cuda_graphs=cuda_graphs) as engine:
        for count in (1, 3, 70, *[4] * 9):
            x = normalized(engine, count)
            wanted = engine(x)
            there, late = library.there(x), library.late(x)
            assert np.array_equal(engine(as_given(late)), wanted)
            assert np.array_equal(engine(as_given(there)), wanted)
            for given in (as_given(there), x):
                out = library.there(np.zeros_like(wanted))
                engine(given, out=as_given(out))
                assert np.array_equal(library.here(out), wanted)
        stream = engine.stream((as_given(library.late(normalized(engine, 2))) for _ in range(20)), depth=3)
        wanted = engine(normalized(engine, 2))
        assert all(np.array_equal(answer, wanted) for answer in stream)


def test_graphs_answer_alike_and_are_timed(
    bundle: Path, frames: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = edgeres.load(bundle, backend="tensorrt")
    graphs = edgeres.load(bundle, backend="tensorrt", cuda_graphs=True)
    with plain, graphs:
        for count in [1] * 10 + [5] * 10 + [70, 1, 5]:
            assert np.array_equal(graphs(frames[:count]), plain(frames[:count]))
        profiles = [engine.profile(frames[:1]) for engine in (plain, graphs)]
    with capsys.disabled():
        for profile in profiles:
            sys.stdout.write(f"\ngraphs {profile.cuda_graphs}: {profile.inference}")
        sys.stdout.write("\n")
    assert profiles[0].cuda_graphs == "off"
    try:
        import cuda  # noqa: F401
    except ImportError:
        assert "pycuda has no CUDA graphs" in profiles[1].cuda_graphs
    else:
        assert profiles[1].cuda_graphs == "on"
