"""What is measured of images, and how far two sets of images are from looking alike, in numbers and in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.errors import SampleError
from edgeres.samples import open_samples, samples_from_arrays
from edgeres.samples.appearance import STATISTICS, Appearance, look, sharpness, thumbnail
from edgeres.samples.distance import CHANCE, FAR, chance_distance, compare, differences, distance, twisted

values = st.lists(st.floats(-1, 1), min_size=4, max_size=30).map(np.array)


def seen(frames: np.ndarray, size: Optional[Tuple[int, int]] = (32, 32), resize: Optional[int] = 32) -> Appearance:
    return look(samples_from_arrays(frames), size, resize, lambda done, total: None)


def column(appearance: Appearance, name: str) -> np.ndarray:
    measured: np.ndarray = appearance.statistics[:, STATISTICS.index(name)]
    return measured


# One image


def test_levels_and_contrasts_are_pillows(pictures: Any) -> None:
    image, stat = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageStat")
    frames = pictures(5)
    appearance = seen(frames)
    for row, frame in enumerate(frames):
        colour, grey = (stat.Stat(image.fromarray(frame).convert(mode)) for mode in ("RGB", "L"))
        for place, name in enumerate(("red", "green", "blue")):
            assert column(appearance, name)[row] == pytest.approx(colour.mean[place] / 255, abs=1e-6)
            assert column(appearance, f"{name} contrast")[row] == pytest.approx(colour.stddev[place] / 255, abs=1e-6)
        # Pillow rounds each pixel of L to a whole step.
        assert column(appearance, "brightness")[row] == pytest.approx(grey.mean[0] / 255, abs=2e-3)
        assert column(appearance, "contrast")[row] == pytest.approx(grey.stddev[0] / 255, abs=2e-3)


def test_a_thumbnail_is_pillows_bilinear_one(pictures: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    frame = pictures(1, side=200)[0]
    wanted = np.asarray(image.fromarray(frame).resize((32, 32), image.BILINEAR)) / np.float32(255)
    np.testing.assert_allclose(thumbnail(frame), wanted.transpose(2, 0, 1), atol=1e-6)


def test_huge_frames_are_sampled_to_much_the_same_thumbnail(pictures: Any) -> None:
    frame = pictures(1, side=256)[0]
    np.testing.assert_allclose(thumbnail(frame.repeat(5, 0).repeat(5, 1)), thumbnail(frame), atol=0.02)


def test_sharpness_is_the_gradient_in_units_of_contrast() -> None:
    checks = (np.indices((8, 8)).sum(0) % 2)[None, None].repeat(3, 1).astype(float)
    assert sharpness(checks)[0] == pytest.approx(1 / (0.5 + 1 / 255))  # neighbours differ by 1, contrast is a half
    ramp = np.linspace(0, 1, 65)[None, None, None].repeat(3, 1).repeat(65, 2)
    step, contrast = 1 / 64, np.linspace(0, 1, 65).std()
    assert sharpness(ramp)[0] == pytest.approx(step / np.sqrt(2) / (contrast + 1 / 255))
    assert sharpness(np.full((1, 3, 8, 8), 0.5))[0] == 0


def test_blur_lowers_sharpness_and_exposure_does_not(pictures: Any) -> None:
    image, filters = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageFilter")
    frames = pictures(20, side=64)
    blurred = np.stack([np.asarray(image.fromarray(f).filter(filters.GaussianBlur(1))) for f in frames])
    sharp, soft, dark = (column(seen(f, (64, 64), 64), "sharpness") for f in (frames, blurred, frames // 2))
    assert (soft < 0.8 * sharp).all()
    np.testing.assert_allclose(dark, sharp, rtol=0.1)


def test_sharpness_is_measured_at_the_scale_of_the_network(pictures: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = pictures(8, side=100)
    small = np.stack([np.asarray(image.fromarray(frame).resize((50, 50), image.BILINEAR)) for frame in frames])
    scaled = column(seen(frames, (48, 48), 50), "sharpness")
    np.testing.assert_allclose(scaled, column(seen(small, (48, 48), None), "sharpness"), rtol=1e-6)
    assert not np.allclose(scaled, column(seen(frames, (48, 48), 100), "sharpness"), rtol=0.05)


def test_frames_smaller_than_the_patch_can_be_looked_at() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 1, 7, 3), dtype=np.uint8)
    assert np.isfinite(seen(frames, None, None).statistics).all()
    assert seen(frames, None, None).sides.tolist() == [1, 1, 1]


def test_a_thin_frame_is_not_repeated_to_gigabytes() -> None:
    frames = np.broadcast_to(np.uint8(7), (1, 1, 5_000_000, 3))
    with pytest.raises(SampleError, match=r"images\[0\].* 5000000 x 1 .* too thin to be enlarged"):
        seen(frames, None, None)


def test_a_frame_that_does_not_cover_the_input_is_named() -> None:
    with pytest.raises(SampleError, match=r"images\[0\].*does not cover"):
        seen(np.zeros((2, 20, 20, 3), np.uint8), (32, 32), None)


def test_image_files_and_arrays_of_the_same_pixels_look_the_same(pictures: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = pictures(20, side=150)  # large enough for threads
    for index, frame in enumerate(frames):
        image.fromarray(frame).save(tmp_path / f"{index:02}.png")
    files = look(open_samples(tmp_path), (32, 32), 32, lambda done, total: None)
    arrays = seen(frames)
    np.testing.assert_array_equal(files.statistics, arrays.statistics)
    assert files.pixels == arrays.pixels
    assert len(set(files.pixels)) == 20


def test_progress_is_told(pictures: Any) -> None:
    told: List[Tuple[int, int]] = []
    look(samples_from_arrays(pictures(40)), (32, 32), 32, lambda done, total: told.append((done, total)))
    assert told == [(16, 40), (32, 40), (40, 40)]


# Two sets


@given(left=values, right=values)
def test_distance_is_scipys(left: np.ndarray, right: np.ndarray) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert distance(left, right) == pytest.approx(stats.ks_2samp(left, right, method="asymp").statistic)


@given(left=values, right=values)
def test_distance_depends_on_order_alone(left: np.ndarray, right: np.ndarray) -> None:
    whole = distance(left, right)
    assert distance(right, left) == whole
    assert distance(left[::-1], right) == whole
    # A monotone map that keeps different numbers different.
    both = np.unique(np.concatenate([left, right]))
    assert (
        distance(np.searchsorted(both, left).astype(float) ** 3, np.searchsorted(both, right).astype(float) ** 3)
        == whole
    )
    assert 0 <= whole <= 1


@pytest.mark.parametrize(("left", "right"), [(512, 512), (59, 423), (2000, 100)])
def test_chance_is_what_kolmogorovs_distribution_says(left: int, right: int) -> None:
    special = pytest.importorskip("scipy.special")
    limit = chance_distance(left, right, tests=7)
    assert special.kolmogorov(limit * np.sqrt(left * right / (left + right))) == pytest.approx(CHANCE / 7, rel=1e-3)


def test_chance_is_everything_for_a_handful() -> None:
    assert chance_distance(2, 2) == 1.0


def test_like_sets_are_hardly_ever_called_different(pictures: Any) -> None:
    statistics = seen(pictures(1200)).statistics
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        order = random.permutation(1200)
        alarms += any(one.far for one in compare(statistics[order[:60]], statistics[order[60:200]]))
    assert alarms <= 2  # 0.2 are to be expected


def blur(frames: np.ndarray) -> np.ndarray:
    wide = np.pad(frames.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    return sum(wide[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / 9  # type: ignore[return-value]


CHANGES: Dict[str, Tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "darker": (lambda x: 0.5 * x, "darker: mean 0.2"),
    "brighter": (lambda x: 0.5 * x + 127, "brighter: mean 0.7"),
    "less contrast": (
        lambda x: x.mean((1, 2), keepdims=True) * 0.6 + 0.4 * x,
        "of less contrast: standard deviation 0.0",
    ),
    "more contrast": (lambda x: 2 * x - x.mean((1, 2), keepdims=True), "of more contrast: standard deviation 0.3"),
    "blurred": (blur, "softer, as if blurred or enlarged: detail 0."),
    "grey": (lambda x: x.mean(3, keepdims=True).repeat(3, 3), "less colourful: colour 0.00"),
    "one exposure": (lambda x: x - x.mean((1, 2, 3), keepdims=True) + 115, "less varied in brightness: half of them"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_differs_is_said(pictures: Any, change: Callable[[np.ndarray], np.ndarray], said: str) -> None:
    own, others = pictures(300, 1), pictures(300, 2)
    changed = np.clip(np.rint(change(others.astype(float))), 0, 255).astype(np.uint8)
    before, after = (said_of(seen(own).statistics, seen(frames).statistics) for frames in (others, changed))
    assert before == ([], None)
    assert any(words.startswith(said) for words in after[0]), after
    assert after[1] is None


def said_of(calibration: np.ndarray, validation: np.ndarray) -> Tuple[List[str], Optional[str]]:
    far = {one.statistic: one for one in compare(calibration, validation) if one.far}
    return differences(calibration, validation, far), twisted(calibration, validation, far)


@pytest.mark.parametrize("exposure", [1.0, 0.5])
def test_swapped_channels_are_recognized_at_any_exposure(pictures: Any, exposure: float) -> None:
    own, others = seen(pictures(300, 1)), seen((pictures(300, 2)[..., ::-1] * exposure).astype(np.uint8))
    words, mistake = said_of(own.statistics, others.statistics)
    assert any(one.startswith("bluer: red minus blue -0.0") for one in words)
    assert mistake is not None
    assert mistake.startswith("Red and blue seem to be swapped")


def test_negatives_are_recognized(pictures: Any) -> None:
    _, mistake = said_of(seen(pictures(300, 1)).statistics, seen(255 - pictures(300, 2)).statistics)
    assert mistake is not None
    assert "inverted" in mistake


def test_a_small_drift_of_nearly_equal_images_is_not_far(pictures: Any) -> None:
    scene = pictures(1, side=32).repeat(200, 0).astype(int)
    noise = np.random.default_rng(0).integers(-3, 4, (2, *scene.shape))
    own, others = (np.clip(scene + noise[place] + 2 * place, 0, 255).astype(np.uint8) for place in (0, 1))
    comparisons = compare(seen(own).statistics, seen(others).statistics)
    assert max(one.distance for one in comparisons) > FAR
    assert not any(one.far for one in comparisons)
