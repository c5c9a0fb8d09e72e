"""Copies of images: the hash against SciPy's transform, what it survives, and which pairs and groups it finds."""

from __future__ import annotations

import io
from typing import Any, List, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.samples.appearance import LUMA, thumbnail
from edgeres.samples.likeness import ALIKE, alike, differing_bits, equal, perceptual_hash, spare

seeds = st.integers(0, 2**32 - 1)


def hashes(*frames: np.ndarray) -> np.ndarray:
    return perceptual_hash(np.tensordot(np.array([thumbnail(frame) for frame in frames], np.float64), LUMA, (1, 0)))


def test_the_hash_is_of_the_cosine_transforms_lowest_frequencies() -> None:
    fft = pytest.importorskip("scipy.fft")
    luma = np.random.default_rng(0).random((5, 32, 24))
    transformed = np.stack([fft.dctn(one, type=2)[1:17, 1:17].ravel() for one in luma])
    bits = transformed > np.median(transformed, axis=1, keepdims=True)
    np.testing.assert_array_equal(np.unpackbits(perceptual_hash(luma), axis=1), bits)
    assert (bits.sum(1) == 128).all()


@given(seed=seeds, gain=st.floats(0.1, 4), offset=st.floats(-2, 2))
def test_exposure_does_not_change_it(seed: int, gain: float, offset: float) -> None:
    luma = np.random.default_rng(seed).random((2, 32, 32))
    # A coefficient that equals the median but for rounding may fall on either side of it.
    assert differing_bits(perceptual_hash(luma), perceptual_hash(gain * luma + offset)).diagonal().max() <= 2


@given(seed=seeds, rows=st.integers(0, 70))
def test_differing_bits_are_counted(seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    left, right = (random.integers(0, 256, (count, 32), dtype=np.uint8) for count in (rows, 3))
    bits = [np.unpackbits(side, axis=1).astype(int) for side in (left, right)]
    np.testing.assert_array_equal(differing_bits(left, right), np.abs(bits[0][:, None] - bits[1][None]).sum(2))


@given(seed=seeds, quality=st.integers(40, 95), side=st.sampled_from([32, 48, 96]))
def test_a_jpeg_of_an_image_is_alike_and_another_image_is_not(
    pictures: Any, seed: int, quality: int, side: int
) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = pictures(3, seed, side)
    stream = io.BytesIO()
    image.fromarray(frames[0]).save(stream, "JPEG", quality=quality)
    copy = np.asarray(image.open(stream).convert("RGB"))
    assert alike(hashes(copy), hashes(*frames)) == [(0, 0)]


@given(seed=seeds, side=st.integers(28, 96), off=st.integers(-1, 1))
def test_an_image_of_another_size_is_alike(pictures: Any, seed: int, side: int, off: int) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = pictures(3, seed, 40)
    copy = np.asarray(image.fromarray(frames[0]).resize((side, side + off), image.BILINEAR))
    assert alike(hashes(copy), hashes(*frames)) == [(0, 0)]


def test_different_images_are_far_from_alike(pictures: Any) -> None:
    made = hashes(*pictures(300))
    bits = differing_bits(made, made)[np.triu_indices(300, 1)]
    assert bits.min() > ALIKE
    assert bits.mean() == pytest.approx(128, abs=2)  # half the bits, as for independent hashes


def test_nothing_is_like_nothing(pictures: Any) -> None:
    none = np.empty((0, 32), np.uint8)
    assert alike(none, hashes(*pictures(2))) == []
    assert perceptual_hash(np.empty((0, 32, 32))).shape == (0, 32)


@given(left=st.lists(st.sampled_from("abcde")), right=st.lists(st.sampled_from("abcde")))
def test_equal_words_are_paired_with_their_first_place(left: List[str], right: List[str]) -> None:
    assert equal(left, right) == [(i, right.index(word)) for i, word in enumerate(left) if word in right]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_groups_keep_their_earliest(pairs: List[Tuple[int, int]]) -> None:
    groups = [{item} for item in range(10)]
    for one, other in pairs:  # by merging sets, the slow way
        merged = groups[one] | groups[other]
        for item in merged:
            groups[item] = merged
    wanted = [(min(group), item) for item, group in enumerate(groups) if min(group) != item]
    assert spare(10, pairs) == wanted
