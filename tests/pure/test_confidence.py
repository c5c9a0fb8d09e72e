"""Confidence, calibration error and top-5, against their definitions written out and against scipy's softmax."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres.validation import confidence as room
from edgeres.validation.confidence import BINS, calibration_error, sureness


def some(count: int, classes: int, seed: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """Return logits float32 (count, classes) with ties among them, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (count, classes)).astype(np.float32) / 2, rng.integers(0, classes, count)


@settings(max_examples=50)
@given(count=st.integers(1, 40), classes=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_confidence_is_the_softmax_of_the_answer(count: int, classes: int, seed: int) -> None:
    special = pytest.importorskip("scipy.special")
    logits, _ = some(count, classes, seed)
    wanted = special.softmax(logits.astype(np.float64), axis=1).max(axis=1)
    np.testing.assert_allclose(sureness(logits, None).confidence, wanted, rtol=1e-12)


@settings(max_examples=50)
@given(count=st.integers(1, 40), classes=st.integers(6, 12), seed=st.integers(0, 10**6))
def test_top5_is_membership_in_a_stable_order(count: int, classes: int, seed: int) -> None:
    logits, labels = some(count, classes, seed)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    wanted = np.mean([label in row for label, row in zip(labels, order)])
    assert sureness(logits, labels).top5 == pytest.approx(wanted)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_of_so_few_classes_there_is_no_top5(classes: int) -> None:
    assert sureness(*some(9, classes)).top5 is None


def test_without_labels_nothing_is_right_or_wrong() -> None:
    found = sureness(some(9, 10)[0], None)
    assert found.error is None
    assert found.top5 is None


@settings(max_examples=100)
@given(
    pairs=st.lists(
        st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([k / BINS for k in range(BINS + 1)])), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_the_calibration_error_is_the_mean_gap_over_bins(pairs: List[Tuple[float, bool]]) -> None:
    """Equation 3 of the paper, bin by bin; its bins are open at the left."""
    confidence, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs])
    wanted = 0.0
    edges = np.arange(BINS + 1)
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (confidence * BINS > low) & (confidence * BINS <= high)
        if low == 0:
            inside |= confidence == 0
        if inside.any():
            wanted += inside.sum() / len(pairs) * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(wanted, abs=1e-12)


def test_who_is_always_sure_and_right_has_no_error() -> None:
    assert calibration_error(np.ones(10), np.ones(10, bool)) == 0
    assert calibration_error(np.ones(10), np.arange(10) < 3) == pytest.approx(0.7)
    assert calibration_error(np.full(4, 0.75), np.arange(4) < 3) == 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = some(101, 7)
    whole = sureness(logits, labels)
    monkeypatch.setattr(room, "CHUNK_VALUES", 50)
    parts = sureness(logits, labels)
    np.testing.assert_array_equal(whole.confidence, parts.confidence)
    assert whole[1:] == parts[1:]


def test_huge_logits_do_not_overflow() -> None:
    top = np.finfo(np.float32).max
    found = sureness(np.array([[top, -top, 0]], np.float32), np.array([0]))
    assert found.confidence.tolist() == [1.0]
    assert found.error == 0
