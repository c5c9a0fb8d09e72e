"""The nouns: to JSON and back without loss, and nothing but our own error for what is no such noun."""

from __future__ import annotations

import inspect
import json
from typing import Any, Dict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres import artifacts, inputs, measurements, nets, verdicts
from edgeres.artifacts import (
    Attribution,
    BaselineChange,
    Bundle,
    CalibrationTable,
    Change,
    ClassChange,
    Climb,
    Comparison,
    Confidence,
    Discordant,
    Engine,
    EngineLayer,
    ExportedModel,
    FileGrid,
    FileRef,
    Finding,
    Hygiene,
    Imported,
    LayerCost,
    LayerError,
    LayerPlan,
    LayerSummary,
    Manifest,
    Preprocessing,
    QuantizationErrors,
    QuantizedModel,
    Report,
    Rung,
    SampleSet,
    StageRecord,
    TensorRange,
    from_data,
    from_json,
    summaries,
    to_data,
    to_json,
)
from edgeres.errors import BundleError
from edgeres.measurements import Benchmark, BoardState, Latency, LatencyLimit, LatencyReport, Memory, Speedup

# Any text that UTF-8 can hold, among it control characters, quotes and what lies beyond the basic plane.
words = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(1 << 63), (1 << 63) - 1)
facts = st.recursive(
    st.none() | st.booleans() | whole | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


def many(inner: Any) -> Any:
    return st.lists(inner, max_size=3).map(tuple)


triples = st.tuples(numbers, numbers, numbers)
file_refs = st.builds(FileRef, words, words, whole)
preprocessings = st.builds(
    Preprocessing, st.tuples(whole, whole), resize=st.none() | whole, mean=triples, std=triples, color=words
)
sample_sets = st.builds(SampleSet, words, words, many(words), many(words))
grids = st.builds(FileGrid, numbers, whole, whole)
imports = st.builds(
    Imported,
    words,
    st.dictionaries(words, grids, max_size=2),
    st.dictionaries(words, many(numbers), max_size=2),
    many(words),
    many(words),
)
exported_models = st.builds(
    ExportedModel,
    file_refs,
    whole,
    words,
    words,
    st.tuples(whole, whole, whole),
    whole,
    st.dictionaries(words, words, max_size=3),
    max_relative_error=st.none() | numbers,
    imported=st.none() | imports,
)
ranges = st.builds(
    TensorRange, numbers, numbers, words, numbers, numbers, whole, numbers, numbers, sqnr_db=st.none() | numbers
)
engine_layers = st.builds(EngineLayer, words, words, words, many(words), many(words), many(words), many(words), words)
layers = st.builds(LayerPlan, words, words, words, words, words)
engines = st.builds(
    Engine,
    words,
    words,
    words,
    file_refs,
    st.dictionaries(words, words, max_size=2),
    st.dictionaries(words, words, max_size=2),
    layers=many(engine_layers),
    not_as_planned=many(words),
)
summary_nouns = st.builds(LayerSummary, words, words, st.dictionaries(words, whole, max_size=3), many(words))
discordants = st.builds(Discordant, whole, whole)
ratios = st.none() | numbers
changes = st.builds(Change, numbers, ratios, drop_pp=ratios)
attributions = st.builds(Attribution, changes, changes)
class_changes = st.builds(ClassChange, whole, words, whole, whole, whole, numbers, numbers, st.booleans())
confidences = st.builds(Confidence, numbers, numbers, ratios, ratios)
baseline_changes = st.builds(
    BaselineChange,
    numbers,
    numbers,
    st.tuples(numbers, numbers),
    discordants,
    numbers,
    numbers,
    words,
    st.none() | whole,
)
layer_errors = st.builds(
    LayerError, words, words, words, words, numbers, ratios, ratios, ratios, ratios, *[numbers] * 8
)
reports = st.builds(
    Report,
    whole,
    numbers,
    st.none() | numbers,
    numbers,
    words,
    words,
    words,
    policy=words,
    drop_ci95_pp=st.none() | st.tuples(numbers, numbers),
    discordant=st.none() | discordants,
    samples_to_decide=st.none() | whole,
    classes=many(class_changes),
    confidence=st.none() | confidences,
    answers=words,
    baseline=st.none() | baseline_changes,
    layers=many(summary_nouns),
    attribution=st.none() | attributions,
)
layer_costs = st.builds(LayerCost, words, many(words), whole, numbers, numbers, ratios)
rungs = st.builds(Rung, words, whole, many(words), ratios, numbers, ratios, words, numbers, bought_pp=ratios)
records = st.builds(
    StageRecord, words, many(file_refs), numbers, st.dictionaries(words, facts, max_size=3), warnings=many(words)
)
manifests = st.builds(
    Manifest,
    words,
    words,
    st.dictionaries(words, facts, max_size=2),
    preprocessings,
    many(file_refs),
    st.dictionaries(words, records, max_size=2),
    st.dictionaries(words, facts, max_size=2),
    engines=many(engines),
    report=st.none() | reports,
    warnings=many(words),
)
findings = st.builds(Finding, words, words, words, whole, many(words))
comparisons = st.builds(Comparison, words, numbers, numbers, numbers, numbers, st.booleans())
latencies = st.builds(Latency, words, whole, whole, *[numbers] * 7, many(numbers))
limits = st.builds(LatencyLimit, words, numbers, numbers, st.none() | st.tuples(numbers, numbers), words, words)
speedups = st.builds(Speedup, words, words, whole, numbers, st.none() | st.tuples(numbers, numbers), whole, words)
memories = st.builds(Memory, st.none() | whole, st.none() | whole)
spreads = st.dictionaries(words, st.tuples(numbers, numbers, numbers), max_size=3)
states = st.builds(BoardState, whole, spreads, spreads)
NOUNS: Dict[type, Any] = {
    Finding: findings,
    Comparison: comparisons,
    Hygiene: st.builds(Hygiene, whole, whole, many(findings), comparisons=many(comparisons)),
    EngineLayer: engine_layers,
    FileRef: file_refs,
    Preprocessing: preprocessings,
    SampleSet: sample_sets,
    FileGrid: grids,
    Imported: imports,
    ExportedModel: exported_models,
    TensorRange: ranges,
    CalibrationTable: st.builds(
        CalibrationTable,
        words,
        preprocessings,
        sample_sets,
        words,
        numbers,
        st.dictionaries(words, ranges, max_size=3),
    ),
    LayerPlan: layers,
    LayerError: layer_errors,
    QuantizationErrors: st.builds(QuantizationErrors, whole, ratios, ratios, many(layer_errors)),
    Change: changes,
    Attribution: attributions,
    QuantizedModel: st.builds(QuantizedModel, file_refs, words, many(layers)),
    Engine: engines,
    LayerSummary: summary_nouns,
    Discordant: discordants,
    ClassChange: class_changes,
    Confidence: confidences,
    BaselineChange: baseline_changes,
    Report: reports,
    StageRecord: records,
    LayerCost: layer_costs,
    Rung: rungs,
    Climb: st.builds(Climb, many(rungs), whole, many(layer_costs), words),
    Manifest: manifests,
    Latency: latencies,
    LatencyLimit: limits,
    LatencyReport: st.builds(LatencyReport, words, whole, whole, numbers, numbers, many(limits), many(words)),
    Speedup: speedups,
    Memory: memories,
    BoardState: states,
    Benchmark: st.builds(
        Benchmark,
        *[words] * 4,
        st.tuples(whole, whole, whole),
        st.none() | whole,
        st.dictionaries(words, words, max_size=3),
        many(latencies),
        many(speedups),
        st.dictionaries(words, memories, max_size=3),
        st.none() | whole,
        many(states),
        many(words),
    ),
    Bundle: st.builds(Bundle, words, manifests),
}
IDS = [kind.__name__ for kind in NOUNS]
TABLE = CalibrationTable(
    model_sha256="0" * 64,
    preprocessing=Preprocessing((224, 192), 256),
    samples=SampleSet("images", "1" * 64, ("a.png", "ü\n.png"), ("2" * 64, "3" * 64)),
    method="mse",
    percentile=99.99,
    tensors={"conv1": TensorRange(1.5, 1.5 / 127, "mse", -1.0, 1.75, 4096, 0.5, 0.25, None)},
)


def test_no_noun_is_left_out() -> None:
    there = {
        kind
        for room in (artifacts, inputs, nets, verdicts, measurements)
        for _, kind in inspect.getmembers(room, inspect.isclass)
        if kind.__module__ == room.__name__
    }
    assert there == set(NOUNS)


@pytest.mark.parametrize("kind", NOUNS, ids=IDS)
@given(data=st.data())
@settings(max_examples=25)
def test_there_and_back(kind: type, data: Any) -> None:
    noun = data.draw(NOUNS[kind])
    content = to_json(noun)
    assert from_json(content, kind, "here") == noun
    assert from_json(content.decode(), kind, "here") == noun
    assert from_data(to_data(noun), kind, "here") == noun
    assert from_data(json.loads(content), kind, "here") == noun


def reversed_dicts(value: Any) -> Any:
    """Return equal data whose dictionaries were filled in the opposite order."""
    if isinstance(value, dict):
        return {key: reversed_dicts(value[key]) for key in reversed(list(value))}
    return [reversed_dicts(item) for item in value] if isinstance(value, list) else value


@given(manifests)
def test_equal_nouns_give_equal_bytes(manifest: Manifest) -> None:
    twin = from_data(reversed_dicts(to_data(manifest)), Manifest, "here")
    assert twin == manifest
    assert to_json(twin) == to_json(manifest)


def test_json_is_for_people_too() -> None:
    text = to_json(TABLE).decode("utf-8")
    assert text.startswith('{\n  "model_sha256": "')
    assert text.endswith("\n}\n")
    assert "ü\\n.png" in text


@pytest.mark.parametrize("kind", NOUNS, ids=IDS)
def test_nouns_are_frozen(kind: type) -> None:
    assert kind.__struct_config__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [kind for kind in NOUNS if kind is not Bundle])
@given(data=st.data())
@settings(max_examples=5)
def test_an_unknown_field_is_refused(kind: type, data: Any) -> None:
    """A file of a newer edgeres must be named as that, not half understood."""
    newer = {**to_data(data.draw(NOUNS[kind])), "from_the_future": 1}
    with pytest.raises(BundleError, match="from_the_future"):
        from_json(json.dumps(newer), kind, "here")
    with pytest.raises(BundleError, match="from_the_future"):
        from_data(newer, kind, "here")


def test_an_unknown_field_far_inside_is_refused() -> None:
    newer = to_data(TABLE)
    newer["tensors"]["conv1"]["axis"] = 0
    with pytest.raises(BundleError, match=r"calibration\.json: not a CalibrationTable.*axis"):
        from_json(json.dumps(newer), CalibrationTable, "calibration.json")


@pytest.mark.parametrize("field", ["model_sha256", "preprocessing", "samples", "method", "tensors"])
def test_a_field_that_is_missing_or_of_another_type_is_refused(field: str) -> None:
    data = to_data(TABLE)
    for wrong in ({**data, field: 17}, {key: value for key, value in data.items() if key != field}):
        with pytest.raises(BundleError, match=field):
            from_json(json.dumps(wrong), CalibrationTable, "here")


def test_every_truncation_is_refused() -> None:
    content = to_json(TABLE)
    for length in range(len(content) - 2):  # without the newline at its end it is still whole
        with pytest.raises(BundleError, match=r"^here: not a CalibrationTable"):
            from_json(content[:length], CalibrationTable, "here")


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(100),
    "not UTF-8": b'{"key": "\xff", "files": [], "seconds": 1, "facts": {}}',
    "not UTF-8, in a fact": b'{"key": "", "files": [], "seconds": 1, "facts": {"a": "\xff"}}',
    "half a surrogate": b'{"key": "\\ud800", "files": [], "seconds": 1, "facts": {}}',
    "half a surrogate, as text": '{"key": "\ud800", "files": [], "seconds": 1, "facts": {}}',
    "another noun": to_json(TABLE),
    "a list": b"[]",
    "twice": to_json(StageRecord("", (), 1.0, {})) * 2,
    "arrays in arrays": b'{"key": "", "files": [], "seconds": 1, "facts": {"a": ' + b"[" * 100_000,
    "arrays in arrays, whole": b'{"key": "", "files": [], "seconds": 1, "facts": {"a": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}}",
    "objects in objects": b'{"key": "", "files": [], "seconds": 1, "facts": ' + b'{"a":' * 100_000,
    "thousands of digits": b'{"key": "", "files": [], "seconds": 1, "facts": {"a": ' + b"1" * 6000 + b"}}",
    "beyond float64": b'{"key": "", "files": [], "seconds": 1e999, "facts": {}}',
    "NaN": b'{"key": "", "files": [], "seconds": NaN, "facts": {}}',
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_by_name(content: Any) -> None:
    with pytest.raises(BundleError, match=r"^here: not a StageRecord that this edgeres understands"):
        from_json(content, StageRecord, "here")


@pytest.mark.parametrize("kind", [Manifest, CalibrationTable, StageRecord])
@given(content=st.binary(max_size=60) | facts.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_content_is_a_bundle_error(kind: type, content: bytes) -> None:
    with pytest.raises(BundleError):
        from_json(content, kind, "here")


@given(st.data())
def test_damage_is_a_bundle_error_or_another_noun(data: Any) -> None:
    """One byte of a good file is changed: the answer is our error, or a noun that says something else."""
    content = bytearray(to_json(TABLE))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = from_json(bytes(content), CalibrationTable, "here")
    except BundleError:
        return
    assert isinstance(found, CalibrationTable)


@given(facts)
def test_arbitrary_data_is_a_bundle_error(value: Any) -> None:
    with pytest.raises(BundleError, match=r"(?s)^stage export: .*Build the bundle again"):
        from_data(value, FileRef, "stage export")


def test_a_batch_has_at_least_one_sample() -> None:
    assert Preprocessing((32, 32)).batch_size == 64
    assert Preprocessing((224, 224)).batch_size == 12
    assert Preprocessing((4000, 4000)).batch_size == 1


def test_a_sample_set_counts_its_names() -> None:
    assert TABLE.samples.count == 2


def test_a_bundle_shows_its_report() -> None:
    report = Report(10, 1.0, None, 0.5, "pass", "cpu", "int8")
    manifest = Manifest("net", "int8", {}, TABLE.preprocessing, (), {}, {}, report=report)
    assert Bundle("build/net", manifest).report is report
    assert Bundle("build/net", msgspec.structs.replace(manifest, report=None)).report is None


def an_engine(*precisions: str, **fields: Any) -> Engine:
    found = tuple(EngineLayer(f"l{i}", "conv", one, (), (), (), ()) for i, one in enumerate(precisions))
    return Engine("rtx", "tensorrt-rtx", "int8", FileRef("e", "0" * 64, 1), {}, {}, layers=found, **fields)


def test_layers_are_counted_by_what_they_compute_in() -> None:
    engine = an_engine("int8", "fp16", "int8", "", "fp32", "int8", not_as_planned=("fc runs in fp32",))
    summary = engine.summary
    assert summary == LayerSummary("rtx", "tensorrt-rtx", {"int8": 3, "fp16": 1, "fp32": 1}, ("fc runs in fp32",))
    assert summary.words == "3 layers in int8, 1 in fp16, 1 in fp32"
    assert LayerSummary("gpu", "tensorrt", {}).words == "no layer of a known type"


def test_an_engine_whose_builder_told_nothing_has_no_summary() -> None:
    assert an_engine().summary is None
    assert summaries([an_engine(), an_engine("fp16")]) == (LayerSummary("rtx", "tensorrt-rtx", {"fp16": 1}),)


def test_a_report_from_before_attribution_is_read() -> None:
    report = Report(10, 1.0, None, 0.5, "pass", "cpu", "int8")
    older = {name: value for name, value in to_data(report).items() if name != "attribution"}
    assert from_data(older, Report, "report.json") == report
