"""A loaded engine: what it takes, what it gives, and into whose memory."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Tuple

import msgspec
import numpy as np
import pytest

import edgeres
from edgeres.errors import BackendError, SampleError
from edgeres.runtime.engine import LoadedEngine
from edgeres.runtime.frames import Fed

Summing = Callable[..., Any]


def camera(count: int, side: int = 4, seed: int = 0) -> np.ndarray:
    """Return frames uint8 (count, side, side, 3)."""
    frames: np.ndarray = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return frames


def sums(frames: np.ndarray) -> np.ndarray:
    """Return what the summing engine answers frames of its own size, by integers."""
    return frames.sum((1, 2), dtype=np.int64)


def normalized(frames: np.ndarray) -> np.ndarray:
    """Return frames as that engine's normalized input: float32 (N, 3, 4, 4), contiguous."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), np.float32)


def taking(engine: Any, **facts: Any) -> Any:
    """Return an engine whose record says something else."""
    return LoadedEngine(engine._runner, engine.manifest, msgspec.structs.replace(engine.record, **facts))


class Planes:
    """Between an engine that takes pixels and one that takes planes; ``given`` is the last that came."""

    def __init__(self, runner: Any) -> None:
        self.contexts, self.largest, self.close = runner.contexts, runner.largest, runner.close
        self._runner = runner

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.given = batch
        answer: np.ndarray = self._runner(normalized(batch))
        return answer


def test_an_engine_of_pixels_gets_the_cameras_own(summing: Summing) -> None:
    """Nothing is computed and nothing copied where frames fit; others are resampled."""
    engine, runner = summing()
    planes = Planes(runner)
    engine._runner = planes
    pixels = taking(engine, input="uint8")
    frames = camera(3)
    np.testing.assert_array_equal(pixels(frames), sums(frames))
    assert planes.given.dtype == np.uint8
    assert np.shares_memory(planes.given, frames)
    np.testing.assert_array_equal(list(pixels.stream(iter(frames))), sums(frames))
    np.testing.assert_array_equal(pixels(normalized(frames)), sums(frames))
    with pytest.raises(BackendError, match=r"0\.25 steps .*--engine-input float32"):
        pixels(normalized(frames) + np.float32(0.25))
    rounding = taking(engine, input="uint8", whole_pixels=True)
    np.testing.assert_array_equal(rounding(normalized(frames) + np.float32(0.25)), sums(frames))
    assert pixels.profile(frames, runs=3).runs == 3


@pytest.mark.parametrize("takes", ["float32", "uint8"])
def test_a_camera_that_gives_bgr(summing: Summing, takes: str) -> None:
    engine, runner = summing()
    engine._runner = Planes(runner) if takes == "uint8" else runner
    record = msgspec.structs.replace(engine.record, input=takes)
    turned = LoadedEngine(engine._runner, engine.manifest, record, "bgr")
    frames = camera(3)
    np.testing.assert_array_equal(turned(frames), sums(frames)[:, ::-1])
    np.testing.assert_array_equal(list(turned.stream(iter(frames))), sums(frames)[:, ::-1])
    np.testing.assert_array_equal(turned(normalized(frames)), sums(frames))  # in the network's order already


def test_a_channel_order_that_there_is_not_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BackendError, match="frames is 'yuv': choose one of rgb, bgr"):
        edgeres.load("no/such/bundle", frames="yuv")


def test_a_runner_of_pixels_is_fed_with_normalized_input(summing: Summing) -> None:
    engine, runner = summing(largest=2)
    record = msgspec.structs.replace(engine.record, input="uint8")
    fed = Fed(Planes(runner), record, engine.manifest.preprocessing)
    assert fed.largest == 2
    np.testing.assert_array_equal(fed(normalized(camera(2))), sums(camera(2)))
    fed.close()
    assert runner.closed


class Dlpack:
    """Another library's tensor, which speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray, device: Tuple[int, int] = (1, 0)) -> None:
        self._array = array
        self._device = device

    def __dlpack_device__(self) -> Tuple[int, int]:
        return self._device

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)


class Arraylike:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array


class Guarded(Arraylike):
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("it has a gradient,\nand many more lines to say so")


class Cuda:
    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return {"shape": (1, 3, 4, 4), "typestr": "<f4", "data": (0, False), "version": 3}


def test_frames_and_normalized_input_are_answered_alike(summing: Summing) -> None:
    engine, _ = summing()
    frames = camera(5)
    np.testing.assert_array_equal(engine(frames), sums(frames))
    np.testing.assert_array_equal(engine(normalized(frames)), sums(frames))
    assert engine(frames).dtype == np.float32


@pytest.mark.skipif(not hasattr(np, "from_dlpack"), reason="NumPy reads DLPack from 1.23 on")
def test_a_tensor_of_another_library_is_taken_without_a_copy(summing: Summing) -> None:
    engine, runner = summing()
    x = normalized(camera(2))
    for given in (x, Dlpack(x), Dlpack(x, (3, 0)), Arraylike(x)):
        np.testing.assert_array_equal(engine(given), sums(camera(2)))
        assert np.shares_memory(runner.batches[-1], x)
    np.testing.assert_array_equal(engine(Dlpack(camera(2))), sums(camera(2)))
    np.testing.assert_array_equal(np.from_dlpack(engine(x)), sums(camera(2)))  # and out by the same way


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Dlpack(np.zeros((1, 3, 4, 4), np.float32), (2, 0)), "Dlpack lies on a GPU.* Copy it there"),
        (Cuda(), "Cuda lies on a GPU"),
        (Guarded(np.zeros(1)), "Guarded does not give out its numbers: it has a gradient,$"),
        ([[1, 2]], "takes an array, not a list"),
        (None, "takes an array, not a NoneType"),
        (np.zeros((4, 4, 3), np.uint8), r"normalized float32 \(N, 3, 4, 4\), not uint8 \(4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"not uint8 \(0, 4, 4, 3\)"),
        (np.zeros((1, 3, 4, 4)), "not float64"),
        (np.full((1, 3, 4, 4), np.nan, np.float32), "NaN or infinite"),
        (np.full((1, 3, 4, 4), -np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_what_is_no_input_is_refused_in_one_line(summing: Summing, given: Any, told: str) -> None:
    engine, runner = summing()
    with pytest.raises(BackendError, match=told) as caught:
        engine(given)
    assert "\n" not in str(caught.value)
    assert runner.batches == []


@pytest.mark.parametrize("bad", [(np.nan,), (np.inf,), (-np.inf,), (np.inf, -np.inf), (np.nan, np.inf), ()])
@pytest.mark.parametrize("huge", [(), (3e38, 3e38), (3e38, -3e38), (-2e19,)])
@pytest.mark.parametrize("count", [1, 209])
def test_one_number_that_is_none_is_found_among_huge_ones(
    summing: Summing, bad: Tuple[float, ...], huge: Tuple[float, ...], count: int
) -> None:
    engine, _ = summing()
    x = normalized(camera(count))
    x[-1, 1].flat[: len(bad) + len(huge)] = (*huge, *bad)
    if not bad:
        with np.errstate(over="ignore"):  # the double's own sum
            assert engine(x).shape == (count, 3)
        return
    with pytest.raises(BackendError, match="NaN or infinite"):
        engine(x)


def test_a_frame_that_does_not_cover_the_crop_is_told(summing: Summing) -> None:
    with pytest.raises(SampleError, match="does not cover the crop"):
        summing()[0](camera(1, side=3))


@pytest.mark.parametrize("largest", [None, 1, 3, 10])
@pytest.mark.parametrize("count", [1, 3, 7, 64, 65])
def test_logits_go_into_the_callers_array(summing: Summing, count: int, largest: int) -> None:
    engine, runner = summing(largest=largest)
    frames, out = camera(count), np.full((count, 3), -1, np.float32)
    assert engine(frames, out) is out
    np.testing.assert_array_equal(out, sums(frames))
    np.testing.assert_array_equal(engine(frames), sums(frames))
    assert max(len(batch) for batch in runner.batches) <= (largest or 64)


def read_only(shape: Tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (np.zeros((2, 3)), "it is float64$"),
        (np.zeros((3, 2), np.float32), r"shape is \(3, 2\)$"),
        (np.zeros((2, 3), np.float32, order="F"), "it is not C-contiguous$"),
        (read_only((2, 3)), "it is read-only$"),
        (np.zeros(6, np.uint8)[::2], r"shape is \(3,\), it is uint8, it is not C-contiguous$"),
        ([0.0] * 6, "out is a list"),
    ],
)
@pytest.mark.parametrize("largest", [None, 1])
def test_an_array_that_cannot_take_the_logits_is_left_alone(
    summing: Summing, out: Any, told: str, largest: int
) -> None:
    before = np.array(out)
    with pytest.raises(BackendError, match=told):
        summing(largest=largest)[0](camera(2), out=out)
    np.testing.assert_array_equal(out, before)


def test_threads_that_share_an_engine_get_their_own_answers(summing: Summing) -> None:
    engine, runner = summing(largest=4)
    inputs = [camera(1 + index % 6, seed=index) for index in range(8)]
    expected = [sums(frames) for frames in inputs]

    def call(index: int) -> int:
        out = np.empty((len(inputs[index]), 3), np.float32)
        return sum(
            bool((engine(inputs[index], out=out if turn % 2 else None) == expected[index]).all()) for turn in range(500)
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == [500] * 8
    assert len(runner.batches) == 500 * sum(1 + (len(frames) > 4) for frames in inputs)


def test_warming_up_gives_the_first_and_the_last_call(summing: Summing, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = summing()
    clock = itertools.accumulate(itertools.chain([0.0, 0.25, 0.25], itertools.repeat(1.0)))
    monkeypatch.setattr("edgeres.runtime.engine.perf_counter", lambda: next(clock))
    assert engine.warmup(runs=3) == (0.5, 2.0)
    assert [batch.shape for batch in runner.batches] == [(1, 3, 4, 4)] * 3
    engine.warmup(1, camera(2, side=9))
    assert runner.batches[-1].shape == (2, 3, 4, 4)


def test_a_profile_splits_calls_into_preprocessing_and_inference(
    summing: Summing, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = summing()
    frames = camera(2)
    # Ten calls that do not count; then preprocessing takes 0.1, 0.2, … 10 s and inference always 2 s.
    steps = [1.0] * 30
    for call in range(1, 101):
        steps += [0.0, call / 10, 2.0]
    clock = itertools.accumulate(steps)
    monkeypatch.setattr("edgeres.runtime.engine.perf_counter", lambda: next(clock))
    profile = engine.profile(frames, runs=100)
    assert (profile.shape, profile.runs, len(runner.batches)) == ((2, 4, 4, 3), 100, 110)
    split = profile.preprocess
    # Of 0.1 … 10 s: halfway between the 50th and the 51st, and so on, linearly between the first and the last.
    np.testing.assert_allclose((split.p50, split.p90, split.p99, split.max), (5050.0, 9010.0, 9901.0, 10000.0))
    assert profile.inference.p50 == pytest.approx(2000.0)
    assert profile.total.max == pytest.approx(12000.0)


def test_a_profile_of_nothing_in_particular_is_of_one_frame(summing: Summing) -> None:
    engine, _ = summing(resize=6)
    profile = engine.profile(runs=2)
    assert profile.shape == (1, 4, 4, 3)
    assert 0 <= profile.preprocess.p50 <= profile.preprocess.max <= profile.total.max


@pytest.mark.parametrize("runs", [0, -1])
def test_no_runs_are_no_measurement(summing: Summing, runs: int) -> None:
    engine, _ = summing()
    for measure in (engine.warmup, engine.profile):
        with pytest.raises(BackendError, match=f"runs is {runs}"):
            measure(runs=runs)
