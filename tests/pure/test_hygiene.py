"""What is said about calibration samples before any time is spent on them, and what is not said about good ones."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres.artifacts import Finding, Hygiene, from_json, to_json
from edgeres.errors import SampleError
from edgeres.samples import Samples, examine, open_samples, samples_from_arrays
from edgeres.samples.hygiene import LOOKED_AT, needed, promised

SIZE = {"size": (32, 32), "resize": 32}


def hygiene(
    calibration: np.ndarray,
    validation: Optional[np.ndarray] = None,
    labels: Tuple[Optional[Sequence[int]], Optional[Sequence[int]]] = (None, None),
) -> Hygiene:
    own, others = (None if one is None else np.array(one) for one in labels)
    there = None if validation is None else samples_from_arrays(validation, others)
    return examine(samples_from_arrays(calibration, own), there, size=(32, 32), resize=32)


def found(hygiene: Hygiene, kind: str) -> Finding:
    (one,) = [finding for finding in hygiene.findings if finding.kind == kind]
    return one


def kinds(hygiene: Hygiene) -> List[str]:
    return [finding.kind for finding in hygiene.findings]


def jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.fromarray(frame).save(stream, "JPEG", quality=quality)
    copy: np.ndarray = np.asarray(image.open(stream).convert("RGB"))
    return copy


# Nothing to say


def test_of_good_samples_nothing_is_said(pictures: Any) -> None:
    made = hygiene(pictures(64, 1), pictures(200, 2))
    assert made.findings == ()
    assert (made.calibration, made.validation) == (64, 200)
    assert len(made.comparisons) == 12
    assert from_json(to_json(made), Hygiene, "x") == made
    alone = hygiene(pictures(64, 1))
    assert (alone.findings, alone.comparisons, alone.validation) == ((), (), 0)


def test_no_more_than_512_of_each_are_decoded() -> None:
    class Counting:
        labels: Optional[np.ndarray] = None
        classes: Optional[Tuple[str, ...]] = None
        names = tuple(map(str, range(5000)))
        weight = 0
        in_memory = False

        def __init__(self) -> None:
            self.asked: List[int] = []

        def glimpse(self, index: int, side: int) -> np.ndarray:
            self.asked.append(index)
            return np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)

        frame = glimpse

        def sha256(self, index: int) -> str:
            return str(index)

        def problem(self, index: int) -> None:
            return None

    own, others = Counting(), Counting()
    told: List[Tuple[int, int]] = []
    made = examine(Samples("a", own), Samples("b", others), **SIZE, watch=lambda *done: told.append(done))
    assert (made.calibration, made.validation) == (LOOKED_AT, LOOKED_AT)
    assert len(set(own.asked)) == len(set(others.asked)) == LOOKED_AT
    assert max(own.asked) > 4900  # spread over all, not the first ones
    assert told[-1] == (2 * LOOKED_AT, 2 * LOOKED_AT)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_order_does_not_matter(pictures: Any, seed: int) -> None:
    own = np.concatenate([pictures(60, 1), pictures(6, 1), np.full((2, 32, 32, 3), 7, np.uint8)])
    others = np.concatenate([pictures(40, 2)[..., ::-1], pictures(4, 1)])
    shuffled = np.random.default_rng(seed).permutation(len(own))
    before, after = hygiene(own, others), hygiene(own[shuffled], others[::-1])
    assert before.comparisons == after.comparisons
    assert [(f.kind, f.severity, f.count) for f in before.findings] == [
        (f.kind, f.severity, f.count) for f in after.findings
    ]


# Too few


@pytest.mark.parametrize("count", [1, 12, 58, 59, 300])
def test_what_a_number_of_images_promises(count: int) -> None:
    # The largest of n uniform values follows Beta(n, 1); one-sided, its lower 5 % quantile is what is promised.
    stats = pytest.importorskip("scipy.stats")
    assert promised(count) == pytest.approx(stats.beta.ppf(0.05, count, 1))


def test_how_many_are_needed_is_wilks_table() -> None:
    assert (needed(0.95), needed(0.99), needed(0.9)) == (59, 299, 29)  # Wilks 1941; NIST handbook, section 7.2.6.4


def test_too_few_are_said_and_why(pictures: Any) -> None:
    assert "too few" not in kinds(hygiene(pictures(59)))
    few = found(hygiene(pictures(58)), "too few")
    assert few.severity == "warning"
    assert "58 different" in few.text
    assert "59 promise 95 %, 299 promise 99 %" in few.text
    assert "86 %" in found(hygiene(pictures(20)), "too few").text


def test_copies_do_not_count_as_samples(pictures: Any) -> None:
    made = hygiene(pictures(20).repeat(5, 0))
    assert found(made, "too few").count == 20
    assert found(made, "duplicates").count == 80


# Flat images


def test_constant_images_are_named(pictures: Any) -> None:
    frames = pictures(80)
    frames[7], frames[9] = 0, (200, 10, 30)
    frames[11] = np.random.default_rng(0).integers(100, 104, (32, 32, 3))  # noise of a covered lens
    made = found(hygiene(frames), "constant")
    assert (made.severity, made.count) == ("warning", 3)
    assert made.names == ("images[7]", "images[9]", "images[11]")
    assert "3 of 80" in made.text
    assert "images[7], images[9], images[11]" in made.text
    flat = hygiene(np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8))
    assert "all 8 calibration samples are constant" in found(flat, "constant").text
    assert "of no use" in found(flat, "constant").text


def test_hardly_any_contrast_is_said(pictures: Any) -> None:
    frames = pictures(100)
    frames[:5] = 128 + (frames[:5].astype(int) - 128) // 16
    made = found(hygiene(frames), "contrast")
    assert (made.severity, made.count) == ("warning", 5)
    assert "constant" not in kinds(hygiene(frames))


def test_noise_is_not_flat_at_any_size() -> None:
    for side in (32, 224):
        noise = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
        assert kinds(examine(samples_from_arrays(noise), size=(side, side), resize=side)) == ["too few"]


def test_two_colours_of_one_brightness_are_not_flat() -> None:
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    frame[:, :16] = (200, 0, 0)
    frame[:, 16:] = (0, 102, 0)
    assert kinds(hygiene(frame)) == ["too few"]


# Copies


def test_exact_copies_are_paired_with_their_first(pictures: Any) -> None:
    made = found(hygiene(np.concatenate([pictures(70), pictures(70)[[3, 5, 3]]])), "duplicates")
    assert (made.severity, made.count) == ("warning", 3)
    assert "images[70] = images[3], images[71] = images[5], images[72] = images[3]" in made.text


def test_copies_in_another_file_format_are_exact(pictures: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index, frame in enumerate(pictures(3)):
        image.fromarray(frame).save(tmp_path / f"{index}.png")
    image.fromarray(pictures(3)[1]).save(tmp_path / "copy.bmp")
    made = examine(open_samples(tmp_path), **SIZE)
    assert found(made, "duplicates").names == ("copy.bmp",) or "copy.bmp = 1.png" in found(made, "duplicates").text


def test_near_copies_are_a_note_until_there_are_many(pictures: Any) -> None:
    frames = pictures(300)
    one = np.concatenate([frames, [jpeg(frames[4], 60)]])
    made = found(hygiene(one), "near duplicates")
    assert (made.severity, made.count, made.names) == ("note", 1, ("images[300]",))
    assert hygiene(one).warnings == ()
    many = np.concatenate([frames, [jpeg(frame, 60) for frame in frames[:4]]])
    made = found(hygiene(many), "near duplicates")
    assert (made.severity, made.count) == ("warning", 4)
    assert "images[300] = images[0]" in made.text
    assert "duplicates" not in kinds(hygiene(many))


def test_images_too_small_for_a_hash_are_not_called_alike() -> None:
    """Handwritten digits of 8 × 8 pixels do look alike, and are different images."""
    digit = np.random.default_rng(0).integers(0, 2, (1, 8, 8, 1)).repeat(3, 3) * 200
    frames = digit.repeat(64, 0)
    for place in range(64):
        frames[place, place % 8, place // 8] = 255
    assert kinds(hygiene(frames.astype(np.uint8))) == []
    assert "near duplicates" in kinds(hygiene(frames.repeat(4, 1).repeat(4, 2).astype(np.uint8)))


# Overlap


def test_overlap_is_exact_or_near(pictures: Any) -> None:
    own, others = pictures(100, 1), pictures(100, 2)
    others[10:14] = own[20:24]
    others[30:33] = [jpeg(frame, 70) for frame in own[40:43]]
    made = hygiene(own, others)
    exact, near = found(made, "overlap"), found(made, "near overlap")
    assert (exact.severity, exact.count) == ("warning", 4)
    assert "4 of 100" in exact.text
    assert "images[20] = images[10]" in exact.text
    assert (near.severity, near.count) == ("warning", 3)
    assert "images[40] = images[30]" in near.text
    assert near.names == ("images[40]", "images[41]", "images[42]")


def test_an_exact_overlap_is_found_beyond_what_is_looked_at() -> None:
    random = np.random.default_rng(0)
    own, others = (random.integers(0, 256, (1600, 4, 4, 3), dtype=np.uint8) for _ in range(2))
    others[1599] = own[1]  # neither is among the 512 that are decoded
    made = found(hygiene(own, others), "overlap")
    assert made.names == ("images[1]",)


def test_a_folder_and_an_array_of_the_same_images_overlap(pictures: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = pictures(5)
    for index, frame in enumerate(frames):
        image.fromarray(frame).save(tmp_path / f"{index}.png")
    made = examine(open_samples(tmp_path), samples_from_arrays(frames[2:]), **SIZE)
    assert found(made, "overlap").names == ("2.png", "3.png", "4.png")


# Looks


def test_other_looks_are_said_with_examples(pictures: Any) -> None:
    others = (pictures(200, 2) * 0.4).astype(np.uint8)
    others[77] = others[77] // 4
    made = found(hygiene(pictures(200, 1), others), "distribution")
    assert (made.severity, made.count) == ("warning", 200)
    assert made.names[0] == "images[77]"
    assert "200 looked at, such as images[77]" in made.text
    median = np.median(others.mean((1, 2)) @ (0.299, 0.587, 0.114)) / 255
    assert f"they are darker: mean {median:.2f} against 0.4" in made.text
    assert "calibrate on images as the network will get them" in made.text


def test_swapped_channels_have_a_sentence_of_their_own(pictures: Any) -> None:
    made = found(hygiene(pictures(200, 1), pictures(200, 2)[..., ::-1]), "distribution")
    assert "Red and blue seem to be swapped in one of the two sets" in made.text


# Files


def test_a_damaged_file_is_named(pictures: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pictures(1)[0]).save(tmp_path / "000.png")
    (tmp_path / "001.png").write_bytes(b"nonsense")
    with pytest.raises(SampleError, match=r"001\.png"):
        examine(open_samples(tmp_path), **SIZE)


def test_glimpses_of_large_jpegs_are_cheaper_and_large_enough(pictures: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frame = pictures(1, side=640)[0][:, :512]
    image.fromarray(frame).save(tmp_path / "a.jpg", quality=95)
    image.fromarray(frame).save(tmp_path / "b.png")
    samples = open_samples(tmp_path)
    assert samples.glimpse(0, 256).shape == (320, 256, 3)
    assert samples.glimpse(0, 257).shape == (640, 512, 3)
    np.testing.assert_array_equal(samples.glimpse(1, 64), frame)
    halved = frame.reshape(320, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(samples.glimpse(0, 256) - halved).mean() < 4
    assert found(examine(samples, size=(224, 224), resize=256), "near duplicates").count == 1


def test_the_whole_of_a_subset_is_all_there_is(pictures: Any) -> None:
    samples = samples_from_arrays(pictures(10), np.arange(10))
    whole = samples.subset(3).whole()
    assert whole.names == samples.names
    assert whole.labels is not None
    assert whole.labels.tolist() == list(range(10))


# Real images


def test_real_calibration_images_fit_real_validation_images(shared_data: Path) -> None:
    cifar = shared_data / "cifar10"
    calibration = open_samples(cifar / "calibration", count=512)
    for name in ("validation", "validation-jpeg"):
        made = examine(calibration, open_samples(cifar / name, labelled=True), **SIZE)
        assert made.warnings == ()
        assert max(one.distance for one in made.comparisons) < 0.1
    assert examine(open_samples(shared_data / "imagenet-samples"), size=(224, 224), resize=256).findings == ()


def _bgr(image: Any) -> Any:
    return pytest.importorskip("PIL.Image").fromarray(np.ascontiguousarray(np.asarray(image)[..., ::-1]))


def _blur() -> Any:
    return pytest.importorskip("PIL.ImageFilter").GaussianBlur(1.5)


REAL: Dict[str, Tuple[Callable[[Any], Any], str]] = {
    "inverted": (lambda image: image.point(lambda level: 255 - level), "inverted"),
    "darkened": (lambda image: image.point(lambda level: level * 0.5), "darker: mean 0.2"),
    "BGR": (_bgr, "Red and blue seem to be swapped"),
    "blurred": (lambda image: image.filter(_blur()), "softer, as if blurred"),
    "grey": (lambda image: image.convert("L").convert("RGB"), "less colourful"),
}


@pytest.mark.parametrize("folder", ["cifar10", "imagenet-samples"])
@pytest.mark.parametrize(("change", "said"), REAL.values(), ids=REAL)
def test_real_images_that_were_changed_are_told(
    shared_data: Path, tmp_path: Path, folder: str, change: Callable[[Any], Any], said: str
) -> None:
    image = pytest.importorskip("PIL.Image")
    if folder == "cifar10":
        own = open_samples(shared_data / "cifar10" / "calibration", count=512)
        paths = sorted((shared_data / "cifar10" / "validation").rglob("*.png"))
        size: Dict[str, Any] = dict(SIZE)
    else:
        every = sorted((shared_data / folder).glob("*.JPEG"))
        (tmp_path / "own").mkdir()
        for path in every[::2]:
            shutil.copy(path, tmp_path / "own")
        own, paths = open_samples(tmp_path / "own"), every[1::2]
        size = {"size": (224, 224), "resize": 256}
    (tmp_path / "others").mkdir()
    for index, path in enumerate(paths):
        change(image.open(path).convert("RGB")).save(tmp_path / "others" / f"{index:04}.bmp")
    made = examine(own, open_samples(tmp_path / "others"), **size)
    assert said in found(made, "distribution").text
    assert kinds(made) == ["distribution"]


def test_real_images_in_two_encodings_are_found(shared_data: Path) -> None:
    """The lossless validation images of CIFAR-10 are among its JPEG ones, of which one in six is looked at."""
    cifar = shared_data / "cifar10"
    made = examine(open_samples(cifar / "validation"), open_samples(cifar / "validation-jpeg", labelled=True), **SIZE)
    near = found(made, "near overlap")
    looked_at = open_samples(cifar / "validation-jpeg").subset(LOOKED_AT).names
    # In each class, JPEG number k is the k-th PNG, as long as there are any.
    there = Counter(path.parent.name for path in (cifar / "validation").rglob("*.png"))
    assert near.count == sum(int(Path(name).stem) < there[Path(name).parent.name] for name in looked_at) > 50
    assert near.severity == "warning"
