"""A report against an earlier one: pairing, verdicts, and what cannot be paired."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any, List, Optional

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeres import files
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, Report, from_json, to_json
from edgeres.errors import BundleError, SampleError
from edgeres.judge import judge, reference_content, validate_bundle
from edgeres.samples import open_samples
from edgeres.validation import advice, against_baseline, baseline_headline, compare
from edgeres.validation.baseline import packed, unpacked
from edgeres.validation.statistics import paired_difference_interval

LABELS = np.arange(1000) % 10


def judged(wrong: int, start: int = 0, samples: str = "these", policy: str = "ci", count: int = 1000) -> Report:
    """Return the report on an engine that is wrong on ``wrong`` samples from ``start`` on; FP32 is always right."""
    labels = LABELS[:count]
    answers = labels.copy()
    answers[start : start + wrong] = (labels[start : start + wrong] + 1) % 10
    reference, engine = np.eye(10, dtype=np.float32)[labels], np.eye(10, dtype=np.float32)[answers]
    report = compare(reference, engine, labels, max_drop_pp=1.0, policy=policy, backend="cpu", precision="int8")
    return msgspec.structs.replace(report, samples_sha256=samples)


def accepted(report: Report) -> Report:
    """Return a report as it would be by a budget that anything keeps."""
    return msgspec.structs.replace(report, max_drop_pp=100.0, verdict="pass")


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_answers_come_back(answers: List[int]) -> None:
    np.testing.assert_array_equal(unpacked(packed(np.array(answers)), len(answers)), answers)


def test_the_numbers_are_those_of_the_pairs() -> None:
    """The baseline is wrong on 0 to 9, this one on 5 to 24: 5 were right only now, 15 only before."""
    found = against_baseline(judged(20, 5), from_json(to_json(judged(10)), Report, "x"), LABELS, 10).baseline
    assert found is not None
    assert found.top1 == 0.99
    assert found.drop_pp == 1.0
    assert (found.discordant.only_reference_correct, found.discordant.only_engine_correct) == (15, 5)
    low, high = paired_difference_interval(15, 5, 1000)
    assert found.drop_ci95_pp == pytest.approx((100 * low, 100 * high))
    assert found.agreement == 1 - 20 / 1000
    assert found.verdict == "inconclusive"


def test_repeats_do_not_pass_against_a_baseline() -> None:
    found = against_baseline(judged(0), judged(0), LABELS, 10, [str(place % 20) for place in range(1000)]).baseline
    assert found is not None
    assert found.verdict == "inconclusive"
    assert found.samples_to_decide is not None
    assert found.samples_to_decide > 20


@pytest.mark.parametrize(
    ("before", "after", "against_fp32", "against_baseline_", "outcome"),
    [
        (2, 2, "pass", "pass", "pass"),
        (0, 2, "pass", "pass", "pass"),
        (40, 40, "fail", "pass", "fail"),  # no worse than before, and yet too bad
        (0, 40, "fail", "fail", "fail"),
        (0, 8, "inconclusive", "inconclusive", "inconclusive"),
    ],
)
def test_the_outcome_is_the_worse_verdict(
    before: int, after: int, against_fp32: str, against_baseline_: str, outcome: str
) -> None:
    report = against_baseline(judged(after), accepted(judged(before)), LABELS, 10)
    assert report.baseline is not None
    assert (report.verdict, report.baseline.verdict, report.outcome()) == (against_fp32, against_baseline_, outcome)
    assert {"pass": "passes", "fail": "fails", "inconclusive": "cannot be decided"}[
        against_baseline_
    ] in baseline_headline(report)
    assert from_json(to_json(report), Report, "report.json") == report


def test_a_regression_within_the_budget_of_fp32_is_seen() -> None:
    """FP32 is wrong where the baseline was right: the new build equals FP32, and is worse than the last one."""
    wrong = np.arange(1000) < 40
    answers = np.where(wrong, (LABELS + 1) % 10, LABELS)
    logits = np.eye(10, dtype=np.float32)[answers]
    report = compare(logits, logits.copy(), LABELS, max_drop_pp=1.0, backend="cpu", precision="int8")
    report = against_baseline(msgspec.structs.replace(report, samples_sha256="these"), judged(0), LABELS, 10)
    assert report.verdict == "pass"
    assert report.outcome() == "fail"


def test_where_only_the_baseline_fails_or_is_open_it_is_said_what_to_do() -> None:
    good = judged(0)
    assert advice(against_baseline(good, judged(0), LABELS, 10)) == []
    for verdict, said in (
        ("fail", "edgeres diff ACCEPTED BUNDLE"),
        ("inconclusive", "Validate on about 5,000 samples"),
    ):
        change = against_baseline(good, judged(0), LABELS, 10).baseline
        assert change is not None
        change = msgspec.structs.replace(change, verdict=verdict, samples_to_decide=4_950)
        (step,) = advice(msgspec.structs.replace(good, baseline=change))
        assert said in step


def test_without_a_baseline_the_verdict_is_the_outcome() -> None:
    assert judged(40).outcome() == "fail"
    assert baseline_headline(judged(40)) == ""


def bomb(count: int) -> str:
    return base64.b64encode(zlib.compress(bytes(100 * count))).decode()


@pytest.mark.parametrize(
    ("baseline", "labels", "said"),
    [
        (judged(1, samples="others"), LABELS, "other samples"),
        (judged(1, count=900), LABELS, "900 other samples than these 1000"),
        (msgspec.structs.replace(judged(1), answers=""), LABELS, "sample by sample"),
        (msgspec.structs.replace(judged(1), samples_sha256=""), LABELS, "sample by sample"),
        (msgspec.structs.replace(judged(1), answers="AAAA"), LABELS, "does not hold"),
        (msgspec.structs.replace(judged(1), answers="no base64"), LABELS, "does not hold"),
        (msgspec.structs.replace(judged(1), answers=packed(LABELS[:10])), LABELS, "does not hold"),
        (msgspec.structs.replace(judged(1), answers=bomb(1000)), LABELS, "does not hold"),
        (judged(1), None, "with labels"),
    ],
)
def test_what_cannot_be_paired(baseline: Report, labels: Optional[np.ndarray], said: str) -> None:
    with pytest.raises(SampleError, match=said):
        against_baseline(judged(1), baseline, labels, 10)


def lying(answers: np.ndarray, **changes: Any) -> Report:
    """Return an accepted report in which other answers, or other numbers, stand than the engine's."""
    return msgspec.structs.replace(judged(1), answers=packed(answers), **changes)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        (judged(40), ["its verdict is fail"]),
        (
            msgspec.structs.replace(
                accepted(judged(40)), baseline=against_baseline(judged(40), judged(0), LABELS, 10).baseline
            ),
            ["its verdict is fail"],
        ),
        (
            lying(np.where(LABELS == 3, 99, LABELS), top1_engine=0.9),
            ["100 answers are none of the network's 10 classes (0 to 9), the first of them that to sample 3: 99"],
        ),
        (lying(np.where(np.arange(1000) == 7, -1, LABELS), top1_engine=0.999), ["1 answer is none", "sample 7: -1"]),
        (lying(np.zeros(1000, int)), ["says top1_engine 0.999, and of its answers 100 of 1,000 are right"]),
        (lying(LABELS, top1_engine=None), ["tells no top1_engine"]),
        (lying(LABELS + 10, verdict="fail"), ["verdict", "sample 0: 10", "0 of 1,000"]),
    ],
)
def test_a_baseline_that_was_never_accepted_is_not_believed(baseline: Report, said: List[str]) -> None:
    """Answers that are all wrong, beside numbers of a good engine, would let any engine pass."""
    with pytest.raises(SampleError) as caught:
        against_baseline(judged(0), baseline, LABELS, 10)
    assert all(words in str(caught.value) for words in [*said, "the baseline", "--update-baseline"])


def test_rounding_is_no_lie() -> None:
    third = np.where(np.arange(1000) % 3 == 0, LABELS, (LABELS + 1) % 10)  # 334 are right
    assert against_baseline(judged(0), lying(third, top1_engine=0.334 + 1e-15), LABELS, 10).baseline is not None


def test_the_point_estimate_decides_where_that_is_the_policy() -> None:
    found = against_baseline(judged(8, policy="point"), judged(0), LABELS, 10).baseline
    assert found is not None
    assert found.verdict == "pass"


class Double:
    """What is asked of an engine that is not run."""

    def __init__(self) -> None:
        model = FileRef(files.FP32_MODEL, "", 0)
        self.manifest = Manifest("net", "fp32", {}, Preprocessing((2, 2)), (model,), {}, {})
        self.record = Engine("cpu", "cpu", "fp32", model, {}, {})

    def __enter__(self) -> Double:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        pass


COUNT = 40
RIGHT = np.eye(4, dtype=np.float32)[np.arange(COUNT) % 4]


def folder_of(place: Path, classes: str = "abcd", other: Optional[int] = None) -> Path:
    """Write forty images, one subfolder per class; ``other`` is one that lies in the next class."""
    for n in range(COUNT):
        kind = classes[(n + (n == other)) % 4]
        (place / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.full((2, 2, 3), 3 * n, np.uint8)
        Image.fromarray(pixels).save(place / kind / f"{n % 4}-{n:02}.png")
    return place


def test_a_bundle_without_its_float_model_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the logits of FP32 nor what computes them: nothing to compare with."""
    engine = Double()
    engine.manifest = msgspec.structs.replace(engine.manifest, files=())
    monkeypatch.setattr("edgeres.judge.load_with", lambda *told: (engine, {}))
    with pytest.raises(BundleError, match=r"no model\.fp32\.onnx to compare with"):
        validate_bundle("net", folder_of(tmp_path / "images"))


def test_a_builds_report_is_a_baseline_on_the_same_labels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build and a validation know the samples from different files, and have to tell them by the same digest."""
    samples = open_samples(folder_of(tmp_path / "built"), labelled=True)
    engine = Double()
    built = judge(reference_content(RIGHT, samples), RIGHT, engine.record, (50.0, "ci"))
    contents = {files.FP32_MODEL: b"", engine.record.file.path: b""}
    monkeypatch.setattr("edgeres.judge.load_with", lambda *told: (engine, dict(contents)))
    monkeypatch.setattr("edgeres.workforce.open_record", lambda *told: engine)
    monkeypatch.setattr("edgeres.workforce.run_samples", lambda *told: RIGHT)

    def against(place: Path) -> Report:
        return validate_bundle("net", place, max_drop=50.0, baseline=built)

    again = against(folder_of(tmp_path / "again"))
    assert again.samples_sha256 == built.samples_sha256
    assert again.baseline is not None
    moved = folder_of(tmp_path / "moved", other=36)
    assert open_samples(moved, labelled=True).sha256() == samples.sha256()  # the same images in the same order
    for place in (moved, folder_of(tmp_path / "named", "abce")):
        with pytest.raises(SampleError, match="or by other labels"):
            against(place)
