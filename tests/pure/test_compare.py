"""Comparisons of logits, their verdicts, and their words."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any, Optional, Tuple, Type

import msgspec
import numpy as np
import pytest

import edgeres
from edgeres.artifacts import Report, from_json, to_json
from edgeres.errors import BackendError, EdgeresError, ModelError, RecipeError, SampleError
from edgeres.validation import advice, attribute_drop, compare, confidence, doubts, headline
from edgeres.validation.statistics import mcnemar_exact, paired_difference_interval, samples_to_decide


def answers(classes: np.ndarray, count: int = 10) -> np.ndarray:
    """Return logits float32 (N, count) whose largest is that of ``classes``."""
    logits: np.ndarray = np.eye(count, dtype=np.float32)[classes] * np.float32(4) + np.float32(0.5)
    return logits


def experiment(b: int, c: int, n: int, both_wrong: int = 0) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reference, engine and labels of ``n`` samples with ``b`` and ``c`` discordant ones."""
    labels = np.arange(n) % 10
    reference, engine = labels.copy(), labels.copy()
    engine[:b] = (labels[:b] + 1) % 10
    reference[b : b + c] = (labels[b : b + c] + 1) % 10
    for wrong in (reference, engine):
        wrong[b + c : b + c + both_wrong] = (labels[b + c : b + c + both_wrong] + 2) % 10
    return answers(reference), answers(engine), labels


def judge(b: int, c: int, n: int, budget: float = 0.5, policy: str = "ci", precision: str = "int8") -> Report:
    reference, engine, labels = experiment(b, c, n, n // 20)
    return compare(reference, engine, labels, max_drop_pp=budget, policy=policy, backend="cpu", precision=precision)


def test_the_numbers_of_a_report() -> None:
    report = judge(5, 2, 400)
    assert report.samples == 400
    assert report.top1_reference == (400 - 20 - 2) / 400
    assert report.top1_engine == (400 - 20 - 5) / 400
    assert report.drop_pp == 0.75
    assert report.discordant is not None
    assert (report.discordant.only_reference_correct, report.discordant.only_engine_correct) == (5, 2)
    assert report.agreement == (400 - 7) / 400
    lower, upper = paired_difference_interval(5, 2, 400)
    assert report.drop_ci95_pp == pytest.approx((100 * lower, 100 * upper))
    assert report.mcnemar_p == mcnemar_exact(5, 2)
    assert (report.backend, report.precision, report.policy) == ("cpu", "int8", "ci")
    assert (report.samples_source, report.interval_method) == ("validation", "Tango 1998")
    assert from_json(to_json(report), Report, "report.json") == report


@pytest.mark.parametrize("policy", ["ci", "point"])
@pytest.mark.parametrize("lost", [0, 20])
def test_labels_in_another_order_judge_nothing(policy: str, lost: int) -> None:
    """Labels shifted by one: 0 % against 0 % is no accuracy that was kept, and 20 right answers are none to lose."""
    labels = np.arange(1000) % 10
    reference = answers(np.where(np.arange(1000) < lost, (labels + 1) % 10, labels))
    report = compare(
        reference,
        answers(labels),
        (labels + 1) % 10,
        max_drop_pp=1.0,
        policy=policy,
        backend="cpu",
        precision="int8",
    )
    assert (report.verdict, report.samples_to_decide, report.outcome()) == ("inconclusive", None, "inconclusive")
    assert headline(report).endswith("with 1,000 samples, on which FP32 itself is right less often than by guessing.")
    (step,) = advice(report)
    assert step.startswith(f"FP32 itself is right on {lost / 10:.2f} % of the samples")
    assert "not in the model's order" in step


@pytest.mark.parametrize(
    ("right", "verdict"), [(80, "inconclusive"), (81, "inconclusive"), (82, "pass"), (100, "pass")]
)
def test_guessing_is_told_from_less_by_an_interval(right: int, verdict: str) -> None:
    """SciPy: the 95 % interval of 81 of 1000 ends at 0.0995, that of 82 at 0.1006."""
    labels = np.arange(1000) % 10
    logits = answers(np.where(np.arange(1000) < right, labels, (labels + 1) % 10))
    report = compare(logits, logits, labels, max_drop_pp=1.0, backend="cpu", precision="int8")
    assert report.verdict == verdict


@pytest.mark.parametrize(
    ("right", "chance"),
    [(81, None), (82, 0.1), (103, 0.1), (118, 0.1), (119, None), (1000, None)],
)
def test_a_reference_no_better_than_chance_is_told(right: int, chance: Optional[float]) -> None:
    """SciPy: the 95 % interval of 118 of 1000 begins at 0.0995, that of 119 at 0.1004."""
    labels = np.arange(1000) % 10
    logits = answers(np.where(np.arange(1000) < right, labels, (labels + 1) % 10))
    report = compare(logits, logits, labels, max_drop_pp=1.0, backend="cpu", precision="int8")
    assert report.chance == chance
    assert len(doubts(report)) == (chance is not None)
    if chance is not None:
        assert report.verdict == "pass"
        assert advice(report) == doubts(report)  # once, and no weaker words beside it
        assert f"no better than chance can ({right / 10:.1f} % of 1,000, 10 classes)" in doubts(report)[0]
        assert from_json(to_json(report), Report, "report.json") == report


@pytest.mark.parametrize("policy", ["ci", "point"])
def test_repeats_of_a_sample_do_not_count(policy: str) -> None:
    """20 images, 200 times each: with nothing discordant 765 different ones pass a budget of 0.5."""
    labels = np.arange(4000) % 10
    logits, names = answers(labels), [str(place % 20) for place in range(4000)]
    rules = {"max_drop_pp": 0.5, "policy": policy, "backend": "cpu", "precision": "int8"}
    report = compare(logits, logits, labels, sha256=names, **rules)
    assert report.different == 20
    assert doubts(report)[0].startswith("REPEATED SAMPLES: only 20 of 4,000 are different")
    assert from_json(to_json(report), Report, "report.json") == report
    if policy == "point":
        assert report.verdict == "pass"
        return
    assert (report.verdict, report.samples_to_decide) == ("inconclusive", 765)
    assert headline(report).endswith("with 4,000 samples, of which 20 are different; about 770 would.")
    assert "Validate on about 770 different samples" in advice(report)[0]
    enough = compare(logits, logits, labels, sha256=[str(place % 770) for place in range(4000)], **rules)
    assert (enough.verdict, enough.different) == ("pass", 770)
    relabelled = compare(logits, logits, labels, sha256=[str(place // 10) for place in range(4000)], **rules)
    assert (relabelled.verdict, relabelled.different) == ("pass", None)  # of one image each label once


def test_repeats_do_not_dilute_a_failure_nor_make_one_pass() -> None:
    """Of 20 images one is lost; the 3,980 others of 4,000 are repeats of one that is not."""
    reference, engine, labels = experiment(1, 0, 4000)
    names = [str(min(place, 19)) for place in range(4000)]
    labels[19:], reference[19:], engine[19:] = labels[19], reference[19], engine[19]
    report = compare(
        reference, engine, labels, max_drop_pp=0.5, policy="point", backend="cpu", precision="int8", sha256=names
    )
    assert (report.drop_pp, report.verdict, report.different) == (0.025, "inconclusive", 20)
    assert "Validate on more different samples" in advice(report)[0]
    lost = compare(
        reference, answers((labels + 1) % 10), labels, max_drop_pp=0.5, backend="cpu", precision="int8", sha256=names
    )
    assert lost.verdict == "fail"


def test_equal_logits_know_nothing() -> None:
    logits, labels = np.zeros((1000, 10), np.float32), np.arange(1000) % 10
    report = compare(logits, logits, labels, max_drop_pp=1.0, backend="cpu", precision="int8")
    assert (report.verdict, report.chance) == ("pass", 0.1)


def test_one_class_is_always_guessed() -> None:
    report = compare(
        np.ones((9, 1)), np.ones((9, 1)), np.zeros(9, int), max_drop_pp=50.0, backend="cpu", precision="int8"
    )
    assert (report.verdict, report.below_chance, report.chance) == ("pass", False, None)


def test_samples_that_both_get_wrong_differently_lower_agreement_only() -> None:
    reference, engine, labels = experiment(0, 0, 100)
    reference[:3], engine[:3] = answers((labels[:3] + 1) % 10), answers((labels[:3] + 2) % 10)
    report = compare(reference, engine, labels, max_drop_pp=0.5, backend="cpu", precision="int8")
    assert report.agreement == 0.97
    assert report.drop_pp == 0.0
    assert report.top1_reference == report.top1_engine == 0.97


@pytest.mark.parametrize(
    ("b", "c", "n", "budget", "verdict"),
    [
        # With nothing discordant the upper limit is z^2 / (n + z^2): below 0.5 % from n = 765 on.
        (0, 0, 764, 0.5, "inconclusive"),
        (0, 0, 765, 0.5, "pass"),
        (40, 10, 1000, 0.5, "fail"),
        (40, 10, 1000, 3.0, "inconclusive"),
        (40, 10, 1000, 5.0, "pass"),
        (2, 300, 5000, 0.0, "pass"),
        (0, 0, 50_000, 0.0, "inconclusive"),
    ],
)
def test_verdicts_by_interval(b: int, c: int, n: int, budget: float, verdict: str) -> None:
    report = judge(b, c, n, budget)
    assert report.verdict == verdict
    wanted = samples_to_decide(b, c, n, budget / 100) if verdict == "inconclusive" else None
    assert report.samples_to_decide == wanted
    if wanted is not None:
        assert wanted > n


def test_the_verdict_flips_where_the_budget_passes_a_limit() -> None:
    interval = judge(30, 12, 2000).drop_ci95_pp
    assert interval is not None
    lower, upper = interval
    verdicts = [judge(30, 12, 2000, budget).verdict for budget in (lower - 1e-9, lower, upper, upper + 1e-9)]
    assert verdicts == ["fail", "inconclusive", "inconclusive", "pass"]


@pytest.mark.parametrize(
    ("b", "c", "n", "budget", "verdict"),
    [(3, 0, 1000, 0.3, "pass"), (4, 0, 1000, 0.3, "fail"), (0, 9, 1000, 0.0, "pass"), (7, 0, 100, 7.0, "pass")],
)
def test_the_point_policy_decides_by_the_drop_alone(b: int, c: int, n: int, budget: float, verdict: str) -> None:
    report = judge(b, c, n, budget, "point")
    assert report.verdict == verdict
    assert report.samples_to_decide is None


def test_without_labels_there_is_no_accuracy() -> None:
    reference, engine, _ = experiment(5, 2, 400)
    report = compare(reference, engine, None, max_drop_pp=0.5, backend="cpu", precision="fp16")
    assert report.verdict == "unlabelled"
    assert report.agreement == (400 - 7) / 400
    assert report.sqnr_db is not None
    empty = ("top1_reference", "top1_engine", "drop_pp", "drop_ci95_pp", "discordant", "mcnemar_p", "samples_to_decide")
    assert [getattr(report, name) for name in empty] == [None] * 7


def sqnr(reference: np.ndarray, engine: np.ndarray) -> Optional[float]:
    return compare(reference, engine, None, max_drop_pp=0.5, backend="cpu", precision="int8").sqnr_db


def test_sqnr() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(300, 17)).astype(np.float32)
    engine = reference + rng.normal(scale=0.03, size=reference.shape).astype(np.float32)
    wide = reference.astype(np.float64)
    wanted = 10 * math.log10((wide**2).sum() / ((wide - engine) ** 2).sum())
    assert sqnr(reference, engine) == pytest.approx(wanted, rel=1e-12)
    assert sqnr(reference, reference * np.float32(1.5)) == pytest.approx(20 * math.log10(2), abs=1e-5)


def test_sqnr_that_is_no_number_is_none() -> None:
    reference = answers(np.arange(10))
    assert sqnr(reference, reference.copy()) is None
    assert sqnr(np.zeros_like(reference), reference) is None
    assert sqnr(reference, np.zeros_like(reference)) == 0.0


def test_sqnr_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(101, 7)).astype(np.float32)
    engine = (reference + rng.normal(scale=0.1, size=reference.shape)).astype(np.float32)
    whole = sqnr(reference, engine)
    monkeypatch.setattr(confidence, "CHUNK_VALUES", 50)
    assert sqnr(reference, engine) == pytest.approx(whole, rel=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    reference = np.full((4, 3), np.finfo(np.float32).max, np.float32)
    assert sqnr(reference, reference * np.float32(-1)) == pytest.approx(-20 * math.log10(2))


def test_the_first_of_equal_logits_is_the_answer() -> None:
    tied = np.array([[1, 1, 0], [0, 2, 2]], np.float32)
    report = compare(tied, tied, np.array([0, 1]), max_drop_pp=0.5, backend="cpu", precision="int8")
    assert report.top1_reference == 1.0


def test_memory_stays_bounded() -> None:
    reference = np.zeros((20_000, 1000), np.float32)
    reference[:, 3] = 1
    engine = reference.copy()
    engine[:, 4] = 0.5
    labels = np.full(20_000, 3)
    tracemalloc.start()
    try:
        compare(reference, engine, labels, max_drop_pp=0.5, backend="cpu", precision="int8")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6  # the two arrays in float64 would be 320 MB


GOOD = answers(np.arange(6) % 3, 3)
LABELS = np.arange(6) % 3


def with_value(value: float) -> np.ndarray:
    logits: np.ndarray = GOOD.copy()
    logits[4, 1] = value
    return logits


@pytest.mark.parametrize(
    ("reference", "engine", "labels", "error", "said"),
    [
        (GOOD, GOOD[:5], LABELS, BackendError, r"\(5, 3\) .* \(6, 3\)"),
        (GOOD, GOOD[:, :2], LABELS, BackendError, "same samples"),
        (GOOD, GOOD.astype(np.int32), LABELS, BackendError, "int32"),
        (GOOD, with_value(np.nan), LABELS, BackendError, "engine's logits of 1 samples .* sample 4"),
        (GOOD, with_value(-np.inf), LABELS, BackendError, "not finite"),
        (with_value(np.nan), GOOD, LABELS, ModelError, "reference's logits of 1 samples .* sample 4"),
        (GOOD[0], GOOD[0], LABELS, ModelError, r"\(3,\)"),
        (GOOD[:0], GOOD[:0], LABELS[:0], SampleError, "no samples"),
        (GOOD, GOOD, LABELS[:5], SampleError, r"\(5,\) for 6"),
        (GOOD, GOOD, LABELS[:, None], SampleError, "shape"),
        (GOOD, GOOD, LABELS.astype(float), SampleError, "float64"),
        (GOOD, GOOD, LABELS - 1, SampleError, r"2 labels .* labels\[0\] = -1"),
        (GOOD, GOOD, LABELS + 1, SampleError, r"2 labels .* 3 classes \(0 to 2\), .* labels\[2\] = 3"),
    ],
)
def test_what_cannot_be_compared(
    reference: np.ndarray, engine: np.ndarray, labels: np.ndarray, error: Type[EdgeresError], said: str
) -> None:
    with pytest.raises(error, match=said):
        compare(reference, engine, labels, max_drop_pp=0.5, backend="cpu", precision="int8")


@pytest.mark.parametrize("budget", [-0.1, math.nan, math.inf, 100.5, 1e9, "1", True, [1]])
def test_a_budget_is_a_number_of_points(budget: Any) -> None:
    """As in a recipe; said before a bundle is looked for, where one is judged, and before the work of a build."""
    with pytest.raises(RecipeError) as caught:
        compare(GOOD, GOOD, LABELS, max_drop_pp=budget, policy="mean", backend="cpu", precision="int8")
    assert len(caught.value.problems) == 2
    for work in (lambda: edgeres.validate("nowhere", max_drop=budget), lambda: edgeres.build(max_drop=budget)):
        with pytest.raises(RecipeError, match=r"max.drop") as caught:
            work()
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("budget", [0, 100, np.float32(0.5)])
def test_any_number_of_points_is_a_budget(budget: Any) -> None:
    report = compare(GOOD, GOOD, LABELS, max_drop_pp=budget, backend="cpu", precision="int8")
    assert report.max_drop_pp == budget


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (0.001, "0.001"),
        (1e-5, "0.00001"),
        (0.5, "0.50"),
        (0, "0.00"),
        (100, "100.00"),
        (12.345, "12.345"),
        (0.3, "0.30"),
    ],
)
def test_a_budget_is_told_with_all_its_digits(budget: float, said: str) -> None:
    assert f" against a budget of {said}: " in headline(judge(3, 2, 423, budget))


def test_headlines() -> None:
    assert headline(judge(3, 2, 423, 0.5)) == (
        "INT8 loses 0.24 pp of top-1 (95 % interval of the loss -1.08 to 1.65) against a budget of 0.50: "
        "cannot be decided with 423 samples; about 7,100 would."
    )
    assert headline(judge(40, 10, 1000, 0.5)).endswith("against a budget of 0.50: fails with 1,000 samples.")
    assert headline(judge(0, 0, 1000, 0.5)).startswith("INT8 keeps top-1 (95 % interval of the loss -0.38 to 0.38)")
    assert headline(judge(0, 5, 1000, 0.5)).startswith("INT8 gains 0.50 pp of top-1")
    assert headline(judge(1, 0, 1000, 0.5, "point")).endswith("passes with 1,000 samples by the point estimate alone.")
    assert headline(judge(5, 0, 1000, 0.5)).endswith("no practical number would decide it.")
    assert headline(judge(0, 0, 1, 0.5)).endswith("cannot be decided with 1 sample; about 770 would.")
    unlabelled = compare(GOOD, GOOD, None, max_drop_pp=0.5, backend="cpu", precision="fp16")
    assert headline(unlabelled).startswith("FP16 gives the answer of FP32 on 100.00 % of 6 samples;")


def test_advice_says_what_to_do() -> None:
    assert advice(judge(0, 0, 1000)) == []
    (more,) = advice(judge(3, 2, 423))
    assert "about 7,100 samples" in more
    (same,) = advice(judge(5, 0, 1000))
    assert "--policy point" in same
    assert any("--method" in step for step in advice(judge(40, 10, 1000)))
    named = " ".join(advice(judge(40, 10, 1000), ["fc", "a b"], "--budget-minutes 0"))
    assert "--keep-float fc --keep-float 'a b';" in named
    assert "With --budget-minutes 0 nothing more was tried" in named
    (other,) = advice(judge(40, 10, 1000, precision="fp16"), ["fc"], "--recovery fast")
    assert "--keep-float" not in other
    assert "preprocessing" in other
    unlabelled = compare(GOOD, GOOD, None, max_drop_pp=0.5, backend="cpu", precision="fp16")
    assert "--validation" in advice(unlabelled)[0]


def test_advice_owns_that_the_full_range_is_not_timed_on_tensorrt() -> None:
    report = judge(0, 0, 1000)
    for backend, activations, words in (
        ("tensorrt", "shifted", ["--activation-range symmetric"]),
        ("tensorrt", "symmetric", []),
        ("tensorrt-rtx", "shifted", []),
        ("cpu", "shifted", []),
    ):
        steps = advice(msgspec.structs.replace(report, backend=backend, activation_range=activations))
        assert len(steps) == len(words)
        assert all(word in step for word, step in zip(words, steps))


def test_advice_doubts_labels_that_the_reference_gets_wrong_and_samples_seen_before() -> None:
    labels = np.arange(1000) % 10
    logits = answers((labels + 1) % 10)
    report = compare(
        logits, logits, labels, max_drop_pp=0.5, backend="cpu", precision="int8", samples_source="calibration"
    )
    flattered, doubted = advice(report)
    assert "calibrated" in flattered
    assert "0.00 %" in doubted


def test_a_drop_is_the_sum_of_its_two_steps() -> None:
    """200 samples: quantization turns 6 right answers wrong and 2 right, then the engine 3 more wrong and 1 right."""
    labels = np.arange(200) % 10
    steps = [labels.copy() for _ in range(3)]
    steps[0][:2] = (labels[:2] + 1) % 10
    steps[1][2:8] = (labels[2:8] + 1) % 10
    steps[2][3:8] = steps[1][3:8]
    steps[2][8:11] = (labels[8:11] + 1) % 10
    logits = [answers(step) for step in steps]
    parts = attribute_drop(logits[0], logits[1], logits[2], labels)
    assert parts.quantization.drop_pp == 100 * (6 - 2) / 200
    assert parts.engine.drop_pp == 100 * (3 - 1) / 200
    assert parts.quantization.agreement == 1 - 8 / 200
    assert parts.engine.agreement == 1 - 4 / 200
    whole = compare(logits[0], logits[2], labels, max_drop_pp=0.5, backend="tensorrt", precision="int8")
    assert whole.drop_pp == parts.quantization.drop_pp + parts.engine.drop_pp
    quantized = compare(logits[0], logits[1], None, max_drop_pp=0.5, backend="cpu", precision="int8")
    assert parts.quantization.sqnr_db == quantized.sqnr_db
    assert attribute_drop(logits[0], logits[1], logits[2], None).engine.drop_pp is None


def test_an_engine_that_adds_nothing_has_no_part() -> None:
    reference, engine, labels = experiment(5, 2, 400)
    parts = attribute_drop(reference, engine, engine, labels)
    assert (parts.engine.agreement, parts.engine.sqnr_db, parts.engine.drop_pp) == (1.0, None, 0.0)
    assert parts.quantization.drop_pp == judge(5, 2, 400).drop_pp


def test_logits_of_another_model_are_refused() -> None:
    reference, engine, labels = experiment(5, 2, 400)
    with pytest.raises(BackendError, match="where the reference answered"):
        attribute_drop(reference, engine[:10], engine, labels)


@pytest.mark.parametrize(("quantized", "blamed"), [(5, True), (35, False)])
def test_advice_blames_the_engine_where_most_of_the_loss_is_its_own(quantized: int, blamed: bool) -> None:
    reference, engine, labels = experiment(40, 0, 1000)
    meaning = experiment(quantized, 0, 1000)[1]
    report = compare(reference, engine, labels, max_drop_pp=0.5, backend="tensorrt", precision="int8")
    parts = attribute_drop(reference, meaning, engine, labels)
    steps = " ".join(advice(msgspec.structs.replace(report, attribution=parts)))
    assert ("the engine's: 3.50 pp" in steps) == blamed
    assert ("--method" in steps) != blamed
