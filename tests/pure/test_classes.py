"""Losses by class: exact tests against scipy, Holm's correction against its definition and its published example."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres.artifacts import ClassChange
from edgeres.validation.classes import class_changes, holm
from edgeres.validation.statistics import binomial_tail


def changes(*counts: Tuple[int, int, int], names: Tuple[str, ...] = ()) -> List[ClassChange]:
    """Return what is found where class k has ``counts[k]``: only the reference right, only the engine, samples."""
    labels = np.repeat(np.arange(len(counts)), [n for _, _, n in counts])
    reference, engine = np.ones(len(labels), bool), np.ones(len(labels), bool)
    start = 0
    for b, c, n in counts:
        engine[start : start + b] = False
        reference[start + b : start + b + c] = False
        start += n
    order = np.random.default_rng(0).permutation(len(labels))
    return list(class_changes(labels[order], reference[order], engine[order], names))


@settings(max_examples=200)
@given(successes=st.integers(0, 200), more=st.integers(0, 200))
def test_the_tail_is_that_of_a_fair_coin(successes: int, more: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    total = successes + more
    wanted = stats.binom.sf(successes - 1, total, 0.5)
    assert binomial_tail(successes, total) == pytest.approx(wanted, rel=1e-9, abs=1e-14)


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_by_bonferroni(chances: List[float]) -> None:
    """A hypothesis is rejected where every set of hypotheses with it is, by the least of its p-values."""
    count = len(chances)
    for index, corrected in enumerate(holm(chances)):
        sets = [s for s in range(1, 1 << count) if s >> index & 1]
        wanted = max(min(1.0, bin(s).count("1") * min(chances[k] for k in range(count) if s >> k & 1)) for s in sets)
        assert corrected == pytest.approx(wanted, rel=1e-12)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_one_class_fell_among_many() -> None:
    """Ten classes of 100: one loses 12 answers and wins none; the others swap a few."""
    found = changes((12, 0, 100), *[(2, 3, 100)] * 9, names=tuple("abcdefghij"))
    first = found[0]
    assert (first.label, first.name, first.samples) == (0, "a", 100)
    assert (first.only_reference_correct, first.only_engine_correct, first.drop_pp) == (12, 0, 12.0)
    assert first.p_adjusted == pytest.approx(10 / 2**12)
    assert [change.fell for change in found] == [True] + [False] * 9


def test_the_same_loss_is_chance_among_a_thousand_classes() -> None:
    assert changes((8, 0, 50), (0, 0, 50))[0].fell
    assert not changes((8, 0, 50), *[(0, 0, 5)] * 999)[0].fell


def test_classes_that_gained_did_not_fall_and_unchanged_ones_are_left_out() -> None:
    found = changes((0, 20, 60), (0, 0, 60))
    assert [change.label for change in found] == [0]
    assert not found[0].fell
    assert found[0].drop_pp == pytest.approx(-100 / 3)


def test_classes_without_samples_and_without_names() -> None:
    found = changes((0, 0, 0), (1, 0, 3), names=("only",))
    assert [(change.label, change.name) for change in found] == [(1, "")]
    assert found[0].p_adjusted == 0.5  # the one class of the samples


def test_false_alarms_are_rare() -> None:
    """Where nothing changed but by chance, at most 5 % of experiments have a class that fell."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(20), 60)
    alarms = 0
    for _ in range(400):
        flips = rng.random(len(labels))
        alarms += any(change.fell for change in class_changes(labels, flips > 0.1, (flips < 0.1) | (flips > 0.2)))
    assert alarms <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5
