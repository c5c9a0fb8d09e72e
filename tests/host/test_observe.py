"""The calibration pass counts the very activations that the network has, however the samples are batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional as F

from edgeres.calibrate import Statistics, TensorStatistics, observe
from edgeres.errors import CalibrationError

TEXT = """
net (float[batch,3,8,8] image) => (float[batch,5] logits) {
    conv = Conv <pads = [1, 1, 1, 1]> (image, w, b)
    relu = Relu (conv)
    pooled = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (relu)
    mean = GlobalAveragePool (pooled)
    flat = Flatten (mean)
    logits = Gemm <transB = 1> (flat, fc, fb)
}"""
TENSORS = ("image", "conv", "relu", "pooled", "mean", "flat", "logits")


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Small integers: every activation is then exact in float32, in whatever order it is summed up."""
    rng = np.random.default_rng(5)
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "fc": (5, 4), "fb": (5,)}
    return {name: rng.integers(-4, 5, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path: Path, graph: Callable[..., onnx.ModelProto], weights: dict[str, np.ndarray]) -> Path:
    onnx.save(graph(TEXT, weights), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def images(count: int) -> np.ndarray:
    return np.random.default_rng(6).integers(-128, 128, (count, 3, 8, 8)).astype(np.float32)


def by_torch(x: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    w = {name: torch.from_numpy(values) for name, values in weights.items()}
    image = torch.from_numpy(x)
    conv = F.conv2d(image, w["w"], w["b"], padding=1)
    relu = conv.relu()
    pooled = F.max_pool2d(relu, 2)
    mean = pooled.mean((2, 3), keepdim=True)
    flat = mean.flatten(1)
    logits = F.linear(flat, w["fc"], w["fb"])
    values = (image, conv, relu, pooled, mean, flat, logits)
    return {name: value.numpy() for name, value in zip(TENSORS, values, strict=True)}


def test_it_counts_what_torch_computes(path: Path, weights: dict[str, np.ndarray]) -> None:
    x = images(12)
    observed = observe(path, TENSORS, [x[:5], x[5:]])
    assert observed.samples == 12
    for name, values in by_torch(x, weights).items():
        wanted = TensorStatistics()
        wanted.update(values)
        np.testing.assert_array_equal(observed.tensors[name].counts, wanted.counts, err_msg=name)
        np.testing.assert_array_equal(observed.tensors[name].channels, wanted.channels, err_msg=name)
        channels = (0, *range(2, values.ndim))
        np.testing.assert_array_equal(observed.tensors[name].channel_minimum, values.min(channels), err_msg=name)
        np.testing.assert_array_equal(observed.tensors[name].channel_maximum, values.max(channels), err_msg=name)


def test_batches_and_order_change_nothing(path: Path) -> None:
    x = images(21)
    whole = observe(path, TENSORS, [x]).to_bytes()
    for size in (1, 4, 20):
        assert observe(path, TENSORS, [x[i : i + size] for i in range(0, len(x), size)]).to_bytes() == whole
    assert observe(path, TENSORS, [x[::-1].copy()]).to_bytes() == whole


def test_batches_change_nothing_for_real_activations_either(path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((21, 3, 8, 8)).astype(np.float32)
    quantized = ("image", "relu", "pooled", "mean", "flat")
    whole = observe(path, quantized, [x]).to_bytes()
    assert observe(path, quantized, [x[i : i + 2] for i in range(0, len(x), 2)]).to_bytes() == whole


@pytest.mark.parametrize("cores", [1, 3, 64, None])
def test_the_number_of_cores_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, cores: int | None) -> None:
    x = np.random.default_rng(2).standard_normal((11, 3, 8, 8)).astype(np.float32)
    batches, told = [x[:7], x[7:10], x[10:]], list[int]()
    whole = observe(path, TENSORS, batches).to_bytes()
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert observe(path, TENSORS, batches, told.append).to_bytes() == whole
    assert told == [7, 10, 11]


def test_parts_merge_to_the_whole(path: Path) -> None:
    x = images(9)
    merged = Statistics.empty(TENSORS)
    for part in (x[:2], x[2:7], x[7:]):
        merged.merge(observe(path, TENSORS, [part]))
    assert merged.to_bytes() == observe(path, TENSORS, [x]).to_bytes()


@pytest.mark.parametrize("done", [1, 2, 3])
def test_it_goes_on_from_what_was_kept(path: Path, done: int) -> None:
    batches = [images(9)[i : i + 3] for i in range(0, 9, 3)]
    kept: list[bytes] = []
    whole = observe(path, TENSORS, batches, keep=lambda statistics: kept.append(statistics.to_bytes())).to_bytes()
    assert kept[-1] == whole
    earlier = Statistics.from_bytes(kept[done - 1], "kept")
    told: list[int] = []
    assert observe(path, TENSORS, batches[done:], told.append, earlier).to_bytes() == whole
    assert told == [6, 9][done - 1 :]
    assert earlier.to_bytes() == kept[done - 1]  # left as it was


def test_what_was_kept_of_another_model_is_refused(path: Path) -> None:
    earlier = observe(path, ["relu"], [images(2)])
    with pytest.raises(CalibrationError, match="different tensors"):
        observe(path, TENSORS, [images(2)], earlier=earlier)


def test_only_the_wanted_tensors_are_counted(path: Path) -> None:
    assert list(observe(path, ["relu", "relu", "image"], [images(1)]).tensors) == ["image", "relu"]


def test_the_input_alone_can_be_observed(path: Path) -> None:
    x = images(3)
    statistics = observe(path, ["image"], [x])
    assert statistics.tensors["image"].elements == x.size
    assert statistics.tensors["image"].minimum == x.min()
    assert observe(path, [], [x]).samples == 3


def test_progress_tells_the_samples_done(path: Path) -> None:
    told: list[int] = []
    observe(path, ["relu"], [images(2), images(3), images(1)], told.append)
    assert told == [2, 5, 6]


@pytest.mark.parametrize("name", ["no such tensor", "w", ""])
def test_a_tensor_that_is_no_activation_is_refused(path: Path, name: str) -> None:
    with pytest.raises(CalibrationError, match="has no tensor named"):
        observe(path, ["relu", name], [images(1)])


@pytest.mark.parametrize("batches", [[], [np.empty((0, 3, 8, 8), np.float32)]], ids=["none", "empty"])
def test_no_samples_are_refused(path: Path, batches: list[np.ndarray]) -> None:
    with pytest.raises(CalibrationError, match="no calibration samples"):
        observe(path, ["relu"], batches)


def test_images_of_the_wrong_shape_are_refused_in_words(path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"\(2, 3, 9, 9\)") as caught:
        observe(path, ["relu"], [np.zeros((2, 3, 9, 9), np.float32)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_overflow_are_refused(path: Path, bad: float) -> None:
    x = images(2)
    x[1, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite during calibration, the first is image"):
        observe(path, ["image", "relu", "conv"], [images(2), x])


def test_a_file_that_onnxruntime_does_not_take_is_refused_in_words(
    tmp_path: Path, graph: Callable[..., onnx.ModelProto], weights: dict[str, np.ndarray]
) -> None:
    model = graph(TEXT, weights)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(CalibrationError, match=r"odd\.onnx"):
        observe(tmp_path / "odd.onnx", ["relu"], [images(1)])


def test_an_error_without_a_word_is_told_by_its_kind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Exception):
        pass

    def refuse(*arguments: object, **options: object) -> None:
        raise Silent

    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run", refuse)
        with pytest.raises(CalibrationError, match=r"does not run on samples of shape .*: Silent"):
            observe(path, ["relu"], [images(1)])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(CalibrationError, match=r"does not accept net\.onnx: Silent"):
        observe(path, ["relu"], [images(1)])
