"""The preprocessing equals Pillow's resampling and torch's normalisation bit for bit."""

from __future__ import annotations

import math
from typing import Tuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeres.artifacts import Preprocessing
from edgeres.errors import SampleError
from edgeres.preprocess import fit_batch, output_shape, pixels_of, prepare, prepare_batch, problems

# A mean of 0 and a standard deviation of 1/255 give the pixels themselves back, which shows the resampling alone.
RAW = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    frame: np.ndarray = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return frame


def extremes(height: int, width: int, seed: int) -> np.ndarray:
    """Return only 0 and 255: sharp edges, where an overshoot or a wrong rounding shows first."""
    frame: np.ndarray = np.where(noise(height, width, seed) < 128, np.uint8(0), np.uint8(255))
    return frame


def pixels(frame: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return uint8 (h, w, 3): what ``prepare`` resampled, before normalisation."""
    resampled: np.ndarray = np.rint(prepare(frame, preprocessing)).astype(np.uint8).transpose(1, 2, 0)
    return resampled


def pillow(frame: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return uint8 (h, w, 3) by Pillow, with torchvision's sizes and offsets.

    Landscapes are resized at once. Portraits are resized across, then down, which is what ``resize`` itself did until
    Pillow 11; since then the order depends on the shape.
    """
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.fromarray(frame)
    short, (width, height) = preprocessing.resize, image.size
    if short is not None:
        wanted = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        if width < height:
            image = image.resize((wanted[0], height), image_module.BILINEAR)
        image = image.resize(wanted, image_module.BILINEAR)
    (width, height), (h, w) = image.size, preprocessing.size
    top, left = round((height - h) / 2.0), round((width - w) / 2.0)
    return np.asarray(image.crop((left, top, left + w, top + h)))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    margin=st.integers(0, 30),
    seed=st.integers(0, 2**32 - 1),
    sharp=st.booleans(),
)
def test_resampling_is_pillows(
    shape: Tuple[int, int], size: Tuple[int, int], margin: int, seed: int, sharp: bool
) -> None:
    frame = (extremes if sharp else noise)(*shape, seed)
    preprocessing = Preprocessing(size, max(size) + margin, *RAW)
    np.testing.assert_array_equal(pixels(frame, preprocessing), pillow(frame, preprocessing))


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (224, 224), (256, 341), (1080, 1920), (1920, 1080), (40, 1200), (1200, 40)]
)
def test_resampling_is_pillows_at_photograph_sizes(shape: Tuple[int, int]) -> None:
    frame = noise(*shape)
    preprocessing = Preprocessing((224, 224), 256, *RAW)
    np.testing.assert_array_equal(pixels(frame, preprocessing), pillow(frame, preprocessing))


@pytest.mark.parametrize("shape", [(500, 375), (640, 480), (1280, 720), (333, 250)])
def test_ordinary_portraits_are_pillows_in_one_call(shape: Tuple[int, int]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    frame, (height, width) = noise(*shape), shape
    tall = int(224 * height / width)
    wanted = image_module.fromarray(frame).resize((224, tall), image_module.BILINEAR)
    top = round((tall - 224) / 2)
    got = pixels(frame, Preprocessing((224, 224), 224, *RAW))
    np.testing.assert_array_equal(got, np.asarray(wanted)[top : top + 224])


def test_a_long_thin_frame_costs_no_more_than_its_crop() -> None:
    # Resized in full, 2 x 20,000 would be 224 x 2,240,000.
    frame = noise(2, 20_000)
    preprocessing = Preprocessing((224, 224), 224, *RAW)
    got = pixels(frame, preprocessing)
    # The crop is 224 of 2,240,000 columns, so it lies within 2 input columns and their neighbours.
    near = frame[:, 9_997:10_003]
    assert got.shape == (224, 224, 3)
    assert near.min() <= got.min() <= got.max() <= near.max()
    assert got.std() > 0


@settings(max_examples=60, deadline=None)
@given(
    mean=st.tuples(*[st.floats(-2, 2, width=32)] * 3),
    std=st.tuples(*[st.floats(0.0078125, 4, width=32)] * 3),
)
def test_normalisation_is_torchs(mean: Tuple[float, float, float], std: Tuple[float, float, float]) -> None:
    torch = pytest.importorskip("torch")
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    got = prepare(frame, Preprocessing((16, 16), None, mean, std))
    tensor = torch.from_numpy(frame.transpose(2, 0, 1).copy()).float().div(255)
    wanted = tensor.sub(torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1))
    np.testing.assert_array_equal(got, wanted.numpy())


def test_imagenet_normalisation_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    frame = noise(32, 48)
    got = prepare(frame, Preprocessing((32, 48)))
    tensor = torch.from_numpy(frame.transpose(2, 0, 1).copy()).float().div(255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    np.testing.assert_array_equal(got, tensor.sub(mean.view(3, 1, 1)).div(std.view(3, 1, 1)).numpy())


@pytest.mark.parametrize(("extra", "top"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
def test_crop_offsets_round_half_to_even(extra: int, top: int) -> None:
    frame = noise(10 + extra, 12)
    np.testing.assert_array_equal(pixels(frame, Preprocessing((10, 12), None, *RAW)), frame[top : top + 10])


def test_bgr_reverses_the_channels_and_keeps_mean_and_std_in_the_networks_order() -> None:
    frame = np.zeros((1, 1, 3), np.uint8)
    frame[0, 0] = 51, 102, 204
    got = prepare(frame, Preprocessing((1, 1), None, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), "bgr"))
    np.testing.assert_allclose(got[:, 0, 0], [0.8 - 0.1, (0.4 - 0.2) / 2, (0.2 - 0.3) / 4], atol=1e-6)


def test_a_frame_of_the_wanted_size_is_not_resampled() -> None:
    frame = extremes(24, 32, 5)
    np.testing.assert_array_equal(pixels(frame, Preprocessing((24, 32), None, *RAW)), frame)
    np.testing.assert_array_equal(pixels(frame, Preprocessing((24, 24), 24, *RAW)), frame[:, 4:28])


@pytest.mark.parametrize("resize", [None, 20, 40])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_a_batch_is_its_frames_stacked(resize: int, color: str) -> None:
    preprocessing = Preprocessing((18, 20), resize, color=color)
    frames = np.stack([noise(31, 37, seed) for seed in range(5)])
    wanted = np.stack([prepare(frame, preprocessing) for frame in frames])
    for batch in (frames, list(frames), tuple(frames)):
        got = prepare_batch(batch, preprocessing)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, wanted)


def test_a_batch_of_frames_of_different_sizes() -> None:
    preprocessing = Preprocessing((16, 16), 20)
    frames = [noise(30, 40), noise(20, 20), noise(17, 90)]
    wanted = np.stack([prepare(frame, preprocessing) for frame in frames])
    np.testing.assert_array_equal(prepare_batch(frames, preprocessing), wanted)


def test_an_empty_batch_has_the_shape_of_one() -> None:
    preprocessing = Preprocessing((16, 24))
    assert prepare_batch([], preprocessing).shape == (0, *output_shape(preprocessing)) == (0, 3, 16, 24)
    assert prepare_batch(np.zeros((0, 20, 30, 3), np.uint8), preprocessing).shape == (0, 3, 16, 24)


@pytest.mark.parametrize("resize", [None, 20, 50])
def test_strides_do_not_matter(resize: int) -> None:
    whole = noise(90, 100)
    preprocessing = Preprocessing((20, 20), resize)
    views = [whole[::2, ::3], whole[::-1, ::-1], whole[5:45, 10:60, ::-1], np.asfortranarray(whole)]
    for view in views:
        before = view.copy()
        got = prepare(view, preprocessing)
        assert got.flags.c_contiguous
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, prepare(np.ascontiguousarray(view), preprocessing))
        np.testing.assert_array_equal(view, before)


def test_a_read_only_frame_is_fine() -> None:
    frame = noise(30, 30)
    frame.flags.writeable = False
    assert np.isfinite(prepare(frame, Preprocessing((20, 20), 25))).all()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
        ([[1, 2, 3]], "list"),
    ],
)
def test_other_things_than_frames_are_named(frame: object, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        prepare(frame, Preprocessing((8, 8)))  # type: ignore[arg-type]
    with pytest.raises(SampleError, match=r"frames\[1\]"):
        prepare_batch([noise(8, 8), frame], Preprocessing((8, 8)))  # type: ignore[list-item]


def test_one_frame_is_not_taken_for_a_batch() -> None:
    with pytest.raises(SampleError, match=r"\(N, H, W, 3\)"):
        prepare_batch(noise(8, 8), Preprocessing((8, 8)))


@pytest.mark.parametrize("tall", [False, True])
def test_a_frame_too_long_to_be_scaled_into_a_letterbox_is_refused(tall: bool) -> None:
    """Its weights took 7 GB, of 65 million pixels in a row."""
    preprocessing = Preprocessing((32, 32), None, fit="letterbox", pad=(1, 2, 3))

    def line(length: int) -> np.ndarray:  # one pixel, seen many times: it takes no memory
        return np.broadcast_to(np.uint8(7), (length, 1, 3) if tall else (1, length, 3))

    assert prepare(line(524_288), preprocessing).shape == (3, 32, 32)
    with pytest.raises(SampleError, match=r"too long to be scaled into a letterbox: a side has 524,288 pixels at most"):
        prepare(line(524_289), preprocessing)


def test_a_frame_smaller_than_the_crop_is_refused_with_both_sizes() -> None:
    with pytest.raises(SampleError, match=r"30 x 20 .* crop 32 x 24 .* resize to at least 32"):
        prepare(noise(20, 30), Preprocessing((24, 32)))
    with pytest.raises(SampleError, match="does not cover the crop"):
        prepare_batch(np.stack([noise(20, 30)]), Preprocessing((24, 32)))
    with pytest.raises(SampleError, match=r"20 x 20 .* after resizing"):
        prepare(noise(30, 30), Preprocessing((24, 24), 20))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    pad=st.tuples(*[st.integers(0, 255)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_letterbox_is_pillows(
    shape: Tuple[int, int], size: Tuple[int, int], pad: Tuple[int, int, int], seed: int
) -> None:
    """As ``ImageOps.pad``, with its two passes asked for one by one: their order depends on Pillow's version."""
    image_module, operations = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")

    class AcrossFirst(image_module.Image):  # type: ignore[misc, name-defined]
        def resize(self, size: Tuple[int, int], *rest: object, **more: object) -> object:
            across = image_module.Image.resize(self, (size[0], self.height), image_module.BILINEAR)
            return across.resize(size, image_module.BILINEAR)

    frame = noise(*shape, seed)
    image = image_module.fromarray(frame)
    image.__class__ = AcrossFirst
    assume(min(shape) * min(size[0] / shape[0], size[1] / shape[1]) > 0.51)  # Pillow loses what is thinner
    wanted = operations.pad(image, size[::-1], image_module.BILINEAR, color=pad)
    got = pixels(frame, Preprocessing(size, None, *RAW, fit="letterbox", pad=pad))
    np.testing.assert_array_equal(got, np.asarray(wanted))


def test_a_thin_frame_keeps_a_pixel_of_its_thickness() -> None:
    got = pixels(np.full((1, 200, 3), 9, np.uint8), Preprocessing((8, 8), None, *RAW, fit="letterbox", pad=(0, 0, 0)))
    assert got[..., 0].sum(axis=0).tolist() == [9] * 8


def test_a_letterbox_keeps_the_whole_frame_and_fills_the_rest() -> None:
    frame = noise(20, 40)
    got = pixels(frame, Preprocessing((40, 40), None, *RAW, fit="letterbox", pad=(1, 2, 3)))
    np.testing.assert_array_equal(got[10:30], frame)
    assert (got[:10] == (1, 2, 3)).all()
    assert (got[30:] == (1, 2, 3)).all()
    swapped = prepare(frame, Preprocessing((40, 40), None, *RAW, "bgr", "letterbox", (1, 2, 3)))
    np.testing.assert_array_equal(np.rint(swapped).astype(np.uint8), got.transpose(2, 0, 1)[::-1])


BOXES = st.sampled_from(
    [
        Preprocessing((18, 20)),
        Preprocessing((18, 20), 24, color="bgr"),
        Preprocessing((18, 20), None, fit="letterbox", pad=(9, 8, 7)),
        Preprocessing((18, 20), None, color="bgr", fit="letterbox", pad=(114, 114, 114)),
    ]
)


@settings(max_examples=60, deadline=None)
@given(preprocessing=BOXES, height=st.integers(20, 50), width=st.integers(20, 50), listed=st.booleans())
def test_fitted_pixels_are_those_that_are_normalized(
    preprocessing: Preprocessing, height: int, width: int, listed: bool
) -> None:
    """The formula written out, on what ``fit_batch`` gives; and the way back finds them again."""
    frames = np.stack([noise(height, width, seed) for seed in range(2)])
    fitted = fit_batch(list(frames) if listed else frames, preprocessing)
    mean, std = (np.asarray(given, np.float32) for given in (preprocessing.mean, preprocessing.std))
    wanted = (fitted.astype(np.float32) / np.float32(255) - mean) / std
    batch = prepare_batch(frames, preprocessing)
    np.testing.assert_array_equal(batch, wanted.transpose(0, 3, 1, 2))
    found, distance = pixels_of(batch, preprocessing)
    np.testing.assert_array_equal(found, fitted)
    assert found.flags.c_contiguous
    assert distance < 1e-3


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_frames_that_fit_are_not_copied(fit: str) -> None:
    frames = np.stack([noise(18, 20), noise(18, 20, 1)])
    pad = (0, 0, 0) if fit == "letterbox" else None
    for color in ("rgb", "bgr"):
        assert np.shares_memory(fit_batch(frames, Preprocessing((18, 20), color=color, fit=fit, pad=pad)), frames)


def test_what_is_no_pixel_is_rounded_and_told() -> None:
    raw = Preprocessing((1, 4), None, *RAW)
    batch = np.array([[-3.0, 0.4, 254.6, 3e38]], np.float32).reshape(1, 1, 1, 4).repeat(3, axis=1)
    found, distance = pixels_of(batch, raw)
    assert found[0, 0, :, 0].tolist() == [0, 0, 255, 255]
    assert distance > 1e30
    assert pixels_of(batch[..., 1:3], Preprocessing((1, 2), None, *RAW))[1] == pytest.approx(0.4, abs=1e-4)


def test_good_preprocessings_have_no_problems() -> None:
    assert problems(Preprocessing((224, 224), 256)) == []
    assert problems(Preprocessing((32, 48), 48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr")) == []
    assert problems(Preprocessing((1, 1))) == []


def test_every_mistake_is_listed_at_once() -> None:
    found = problems(Preprocessing((0, 224), -1, (0.5, math.nan, 0.5), (0.2, 0.0, math.inf), "hsv"))
    assert len(found) == 5
    for word, problem in zip(("size", "resize", "mean", "std", "color"), found):
        assert problem.startswith(word)


@pytest.mark.parametrize(
    ("preprocessing", "said"),
    [
        (Preprocessing((224, 240), 239), "at least 240"),
        (Preprocessing((8, 8), 0), "resize is 0"),
        (Preprocessing((8, 8), None, std=(0.2, -0.1, 0.2)), "std"),
        (Preprocessing((8, 8), None, std=(0.2, 1e-42, 0.2)), "std"),
        (Preprocessing((8, 8), None, mean=(math.inf, 0.0, 0.0)), "mean"),
        (Preprocessing((8, 8), color="RGB"), "rgb, bgr"),
        (Preprocessing((8, 8), fit="stretch"), "crop, letterbox"),
        (Preprocessing((8, 8), 4, fit="letterbox", pad=(0, 0, 0)), "leave resize out"),
        (Preprocessing((8, 8), 8, pad=(0, 0, 0)), "leave pad out"),
        (Preprocessing((8, 8), fit="letterbox"), "pad is None"),
        (Preprocessing((8, 8), fit="letterbox", pad=(0, 256, 0)), "0 to 255"),
    ],
)
def test_single_mistakes(preprocessing: Preprocessing, said: str) -> None:
    (problem,) = problems(preprocessing)
    assert said in problem
