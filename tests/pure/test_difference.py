"""``edgeres diff``: what differs between two bundles, paired where the samples are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
import pytest

from edgeres import files
from edgeres.artifacts import (
    CalibrationTable,
    Engine,
    EngineLayer,
    LayerError,
    LayerPlan,
    Manifest,
    Preprocessing,
    QuantizationErrors,
    QuantizedModel,
    SampleSet,
    StageRecord,
    TensorRange,
    to_data,
    to_json,
)
from edgeres.benchmark import summarize
from edgeres.difference import difference, tables, words
from edgeres.errors import IntegrityError
from edgeres.judge import judge, reference_content
from edgeres.measurements import Benchmark
from edgeres.samples import samples_from_arrays

COUNT, KINDS = 40, 4
LABELS = np.arange(COUNT) % KINDS
FRAMES = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 3), dtype=np.uint8)


def logits(answers: np.ndarray) -> np.ndarray:
    """Return logits, float32 (N, K), whose largest is the answer's."""
    return np.float32(np.eye(KINDS)[answers])


def bundle(
    folder: Path,
    answers: Optional[np.ndarray],
    recipe: Optional[Dict[str, Any]] = None,
    amax: Optional[Dict[str, float]] = None,
    kinds: Sequence[str] = ("int8", "int8", "float"),
    own: Sequence[Optional[float]] = (30.0, 20.0),
    latency: Tuple[float, ...] = (),
    labelled: bool = True,
    frames: np.ndarray = FRAMES,
) -> Path:
    """Write a bundle without a model; the engine's answers are ``answers``, FP32 is always right."""
    folder.mkdir()
    (folder / "model.int8.onnx").write_bytes(str(folder).encode())
    ref = files.file_ref(folder, "model.int8.onnx")
    layers = tuple(EngineLayer(f"layer {i}", "conv", kind, (), (), (kind,), ()) for i, kind in enumerate(kinds))
    engine = Engine("gpu", "tensorrt", "int8", ref, {}, {}, layers=layers)
    report = None
    if answers is not None:
        content = reference_content(logits(LABELS), samples_from_arrays(frames, LABELS if labelled else None))
        (folder / files.REFERENCE).write_bytes(content)
        report = judge(content, logits(answers), engine, (0.5, "ci"))
    ranges = {
        name: TensorRange(value, value / 127, "mse", -value, value, 10, 0.0, 0.0, 30.0)
        for name, value in (amax or {"a": 1.0}).items()
    }
    table = CalibrationTable("0", Preprocessing((2, 2)), SampleSet("", "", (), ()), "mse", 99.9, ranges)
    (folder / files.TABLE).write_bytes(to_json(table))
    found = [
        LayerError(f"n{i}", "Conv", f"conv{i}", "a", 0.5, sqnr, sqnr, sqnr, sqnr, *[0.0] * 8)
        for i, sqnr in enumerate(own)
    ]
    (folder / files.ERRORS).write_bytes(to_json(QuantizationErrors(8, 30.0, 30.0, tuple(found))))
    plan = tuple(LayerPlan(f"n{i}", "Conv", f"conv{i}", kind, f"why {kind}") for i, kind in enumerate(kinds))
    stages = {"quantize": StageRecord("", (), 0.0, to_data(QuantizedModel(ref, "int8", plan)))}
    refs = tuple(files.file_ref(folder, path.name) for path in sorted(folder.iterdir()))
    manifest = Manifest(
        folder.name, "int8", recipe or {}, Preprocessing((2, 2)), refs, stages, {}, (engine,), report
    )  # fmt: skip
    (folder / files.MANIFEST).write_bytes(to_json(manifest))
    if latency:
        found_ms = [
            summarize(name, size, [np.full(10, int(ms * factor * 1e6))] * 2)
            for size, ms in zip((1, 8), latency)
            for name, factor in (("int8", 1.0), ("fp32", 3.0))
        ]
        measured = Benchmark(
            "", "gpu", "tensorrt", "int8", (3, 2, 2), None, {}, tuple(found_ms), (), {}, None, (), (),
            engine_sha256=ref.sha256,
        )  # fmt: skip
        (folder.parent / f"{folder.name}.bench.json").write_bytes(to_json(measured))
    return folder


def wrong(*positions: int) -> np.ndarray:
    """Return the right answers, but at some positions."""
    answers = LABELS.copy()
    answers[list(positions)] = (answers[list(positions)] + 1) % KINDS
    return answers


def test_a_bundle_does_not_differ_from_itself(tmp_path: Path) -> None:
    one = bundle(tmp_path / "one", wrong(3), latency=(1.0,))
    found = difference(one, one)
    empty = ("recipe", "ranges", "layers", "engines", "answers")
    assert [found[name] for name in empty] == [{}, [], [], [], []]
    assert found["accuracy"]["drop_pp"] == 0
    assert found["accuracy"]["agreement"] == 1
    assert [table.title.partition(",")[0] for table in tables(found)] == ["accuracy", "latency"]


def test_recipe_ranges_and_layers(tmp_path: Path) -> None:
    one = bundle(
        tmp_path / "one", None, {"name": "x", "calibration": {"count": 5, "method": "mse"}},
        {"a": 1.0, "b": 2.0, "c": 3.0}, own=(30.0, 20.0),
    )  # fmt: skip
    other = bundle(
        tmp_path / "other", None, {"name": "x", "calibration": {"count": 9, "method": "mse"}, "seed": 1},
        {"a": 1.1, "b": 0.5, "c": 3.0, "d": 1.0}, ("int8", "float", "float"), own=(None, 25.0),
    )  # fmt: skip
    found = difference(one, other)
    assert found["recipe"] == {"calibration.count": [5, 9], "seed": [None, 1]}
    assert [(row["tensor"], row["ratio"]) for row in found["ranges"]] == [
        ("d", None), ("b", 0.25), ("a", pytest.approx(1.1)),
    ]  # fmt: skip
    assert found["layers"] == [{"layer": "conv1", "precision": ["int8", "float"], "reason": "why float"}]
    assert found["engines"] == [{"target": "gpu", "layers": [{"int8": 2, "float": 1}, {"int8": 1, "float": 2}]}]
    assert [row["own_sqnr_db"] for row in found["noise"]] == [[30.0, None], [20.0, 25.0]]
    assert (found["accuracy"], found["answers"]) == (None, None)
    assert words(found) == ["Accuracy is not compared: not both bundles hold a verdict."]
    printed = {table.title: table.rows for table in tables(found)}
    assert ["b", "±2", "±0.5", "-75.0 %"] in printed["ranges, the largest change first"]
    assert printed["layers of the engines"] == [["gpu", "1 in float, 2 in int8", "2 in float, 1 in int8"]]


def test_accuracy_is_paired_by_sample(tmp_path: Path) -> None:
    """Six right answers lost and one won of 40: counted by hand, and McNemar's exact test by SciPy."""
    from scipy.stats import binomtest

    one, other = wrong(0), wrong(1, 2, 3, 4, 5, 6)
    found = difference(bundle(tmp_path / "one", one), bundle(tmp_path / "other", other))
    change = found["accuracy"]
    assert change["drop_pp"] == pytest.approx(100 * 5 / 40)
    assert (change["only_first_correct"], change["only_second_correct"]) == (6, 1)
    assert change["mcnemar_p"] == pytest.approx(binomtest(1, 7).pvalue)
    assert change["agreement"] == 33 / 40
    low, high = change["drop_ci95_pp"]
    assert low < change["drop_pp"] < high
    assert [row["name"] for row in found["answers"]] == [
        str(name) for name in samples_from_arrays(FRAMES, LABELS).names[:7]
    ]
    assert found["answers"][0] == {"name": found["answers"][0]["name"], "label": 0, "answers": [1, 0]}
    assert "loses 12.50 pp of top-1" in words(found)[1]
    back = difference(tmp_path / "other", tmp_path / "one")["accuracy"]
    assert (back["drop_pp"], back["drop_ci95_pp"]) == (-change["drop_pp"], pytest.approx([-high, -low]))


def test_other_samples_are_not_paired(tmp_path: Path) -> None:
    found = difference(
        bundle(tmp_path / "one", wrong(0)), bundle(tmp_path / "other", wrong(0), frames=255 - FRAMES)
    )  # fmt: skip
    assert (found["accuracy"], found["answers"]) == (None, None)
    assert "different samples" in words(found)[0]


def test_without_labels_answers_are_compared_all_the_same(tmp_path: Path) -> None:
    pair = [bundle(tmp_path / name, wrong(*at), labelled=False) for name, at in (("one", (0,)), ("other", (0, 7)))]
    found = difference(*pair)
    assert found["accuracy"] == {"samples": COUNT, "agreement": 39 / 40}
    assert [row["label"] for row in found["answers"]] == [None]
    assert "nobody knows" in words(found)[0]


def test_people_see_twenty_samples_and_programs_all(tmp_path: Path) -> None:
    found = difference(bundle(tmp_path / "one", wrong()), bundle(tmp_path / "other", wrong(*range(30))))
    assert len(found["answers"]) == 30
    (shown,) = (table for table in tables(found) if table.title.startswith("samples"))
    assert len(shown.rows) == 20
    assert shown.title.endswith("(20 of 30; all: --json)")
    assert "beyond chance" in words(found)[1]


def test_latency_is_told_where_both_have_one(tmp_path: Path) -> None:
    one = bundle(tmp_path / "one", None, latency=(2.0, 10.0))
    other = bundle(tmp_path / "other", None)
    assert difference(one, other)["latency"] == []
    third = bundle(tmp_path / "third", None, latency=(1.0,))
    assert difference(one, third)["latency"] == [{"batch": 1, "p50_ms": [2.0, 1.0]}]
    (shown,) = (table for table in tables(difference(one, third)) if table.title.startswith("latency"))
    assert shown.rows == [["1", "2.000", "1.000", "-50.0 %"]]


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    one, other = bundle(tmp_path / "one", None), bundle(tmp_path / "other", None)
    (other / files.TABLE).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"calibration\.json"):
        difference(one, other)
