"""Classes that calibration samples lack, or have far more or less of than validation samples, and what is no class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.artifacts import Finding
from edgeres.samples import examine, open_samples, samples_from_arrays
from edgeres.samples.balance import class_findings, imbalance


@pytest.fixture
def folders(pictures: Any, tmp_path: Path) -> Callable[[str, Dict[str, int]], Path]:
    """Return ``folders(name, counts)``: a folder of class folders, with so many images in each."""
    image = pytest.importorskip("PIL.Image")
    seed = iter(range(100))

    def make(name: str, counts: Dict[str, int]) -> Path:
        for kind, count in counts.items():
            (tmp_path / name / kind).mkdir(parents=True)
            for index, frame in enumerate(pictures(count, next(seed))):
                image.fromarray(frame).save(tmp_path / name / kind / f"{index:03}.png")
        return tmp_path / name

    return make


def classes(calibration: Path, validation: Optional[Path], count: Optional[int] = None) -> List[Finding]:
    others = None if validation is None else open_samples(validation, labelled=True)
    own = open_samples(calibration, count=count)
    found = class_findings(own, others)
    everything = examine(own, others, size=(32, 32), resize=32).findings
    assert found == [finding for finding in everything if "class" in finding.kind]
    return found


Folders = Callable[[str, Dict[str, int]], Path]
EVEN = {"ape": 10, "bee": 10, "cat": 10, "dog": 10}


def test_even_classes_are_good(folders: Folders) -> None:
    assert classes(folders("c", EVEN), folders("v", EVEN)) == []
    assert classes(folders("one", EVEN), None) == []


def test_missing_classes_are_named(folders: Folders) -> None:
    (made,) = classes(folders("c", {"ape": 10, "cat": 10}), folders("v", EVEN))
    assert (made.kind, made.severity, made.names) == ("missing classes", "warning", ("bee", "dog"))
    assert "no sample of 2 of the 4 classes that are validated (bee, dog)" in made.text


def test_a_class_that_few_samples_happen_to_miss_is_not_missing(folders: Folders) -> None:
    assert classes(folders("c", EVEN), folders("v", EVEN), count=3) == []


def test_a_class_of_which_none_was_taken_though_there_are_some(folders: Folders) -> None:
    calibration = folders("c", {"ape": 39, "bee": 1})
    (missing,) = classes(calibration, folders("v", {"ape": 20, "bee": 20}), count=20)
    assert missing.names == ("bee",)


def test_classes_out_of_balance_are_measured(folders: Folders) -> None:
    (made,) = classes(folders("c", {"ape": 50, "bee": 4, "cat": 3, "dog": 3}), folders("v", EVEN))
    assert made.kind == "class shares"
    assert made.severity == "warning"
    # 50 of 60 are apes, and a quarter should be.
    assert made.count == 35
    assert "ape 83 % instead of 25 %" in made.text
    assert "58 % of the 60 samples" in made.text
    (alone,) = classes(folders("a", {"ape": 50, "bee": 4, "cat": 3, "dog": 3}), None)
    assert "even shares" in alone.text


def test_folders_that_are_no_classes_are_let_be(folders: Folders) -> None:
    assert classes(folders("c", {"monday": 20, "tuesday": 1}), folders("v", EVEN)) == []


def test_labels_are_compared_by_number(pictures: Any) -> None:
    validation = samples_from_arrays(pictures(60, 2), np.array([0, 1, 2] * 20))
    two, three = (samples_from_arrays(pictures(60, 1), np.array(labels)) for labels in ([0, 1] * 30, [0, 1, 2] * 20))
    (made,) = class_findings(two, validation)
    assert (made.kind, made.names) == ("missing classes", ("2",))
    assert class_findings(three, validation) == []


def test_a_list_with_labels_is_compared_with_folders(folders: Folders, pictures: Any) -> None:
    validation = open_samples(folders("v", EVEN), labelled=True)
    (made,) = class_findings(samples_from_arrays(pictures(60, 50), np.array([0, 1, 3] * 20)), validation)
    assert (made.kind, made.names) == ("missing classes", ("cat",))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8))
def test_equal_shares_are_no_distance_apart(counts: List[int]) -> None:
    own = {str(place): count for place, count in enumerate(counts)}
    twice = {name: 2 * count for name, count in own.items()}
    assert imbalance(own, twice, sum(twice.values()))[0] == pytest.approx(0, abs=1e-12)
    assert imbalance(own, {"other": 1}, None)[0] == pytest.approx(1)


@pytest.mark.parametrize(("kinds_of", "count"), [(10, 512), (3, 60), (40, 400)])
def test_chance_is_what_sampling_gives(kinds_of: int, count: int) -> None:
    random = np.random.default_rng(0)
    even = {str(place): 1 for place in range(kinds_of)}
    drawn = random.multinomial(count, np.full(kinds_of, 1 / kinds_of), 500)
    distances = [imbalance(dict(zip(even, row.tolist())), even, None)[0] for row in drawn]
    assert imbalance(dict(zip(even, drawn[0].tolist())), even, None)[1] == pytest.approx(np.mean(distances), rel=0.05)
