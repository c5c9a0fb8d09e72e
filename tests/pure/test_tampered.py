"""Bundles that somebody edited and bound again: what is wrong in them is a sentence, and never a bug of ours."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import msgspec
import numpy as np
import pytest

from edgeres import files
from edgeres.artifacts import (
    CalibrationTable,
    Engine,
    LayerPlan,
    Manifest,
    Preprocessing,
    QuantizedModel,
    SampleSet,
    StageRecord,
    TensorRange,
    to_data,
    to_json,
)
from edgeres.bundle import read_manifest
from edgeres.difference import difference
from edgeres.errors import BundleError, EdgeresError, SampleError
from edgeres.inspection import repairs
from edgeres.judge import judge, read_baseline, read_reference, reference_content
from edgeres.reporting import benchmark_of
from edgeres.samples import samples_from_arrays
from edgeres.validation.baseline import packed

COUNT, KINDS = 20, 4
LABELS = np.arange(COUNT) % KINDS
LOGITS = np.float32(np.eye(KINDS)[LABELS])
FRAMES = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 3), dtype=np.uint8)
Edit = Callable[[Dict[str, Any]], Any]


def bound(folder: Path, edit: Optional[Edit] = None, amax: float = 1.0) -> Path:
    """Write a bundle without a model, whose manifest is edited at last."""
    folder.mkdir()
    (folder / "model.int8.onnx").write_bytes(b"no model")
    ref = files.file_ref(folder, "model.int8.onnx")
    engine = Engine("cpu", "cpu", "int8", ref, {}, {})
    content = reference_content(LOGITS, samples_from_arrays(FRAMES, LABELS))
    (folder / files.REFERENCE).write_bytes(content)
    report = judge(content, LOGITS, engine, (0.5, "ci"))
    ranges = {"a": TensorRange(amax, abs(amax) / 127, "mse", -1.0, 1.0, 10, 0.0, 0.0, 30.0)}
    table = CalibrationTable("0", Preprocessing((2, 2)), SampleSet("", "", (), ()), "mse", 99.9, ranges)
    (folder / files.TABLE).write_bytes(to_json(table))
    plan = (LayerPlan("n", "Conv", "conv", "int8", "why"),)
    stages = {"quantize": StageRecord("", (), 0.0, to_data(QuantizedModel(ref, "int8", plan)))}
    refs = tuple(files.file_ref(folder, path.name) for path in sorted(folder.iterdir()))
    manifest = Manifest("n", "int8", {}, Preprocessing((2, 2)), refs, stages, {}, (engine,), report)
    data = json.loads(to_json(manifest))
    if edit is not None:
        edit(data)
    (folder / files.MANIFEST).write_text(json.dumps(data))
    return folder


def test_what_was_not_edited_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(bound(tmp_path / "a"))
    assert repairs(tmp_path / "a", manifest) == ((), "")
    assert difference(tmp_path / "a", bound(tmp_path / "b"))["accuracy"]["samples"] == COUNT


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data["recipe"].update(quantization=[1]), "recipe.quantization"),
        (lambda data: data["recipe"].update(quantization={"keep_float": 7}), "recipe.quantization"),
        (lambda data: data["recipe"].update(engine=7), "recipe.engine"),
        (lambda data: data["recipe"].update(engine={"target": ["dla0"]}), "recipe.engine"),
        (lambda data: data["recipe"].update(validation=3), "recipe.validation"),
        (lambda data: data["recipe"].update(validation={"max_drop": "much"}), "recipe.validation"),
        (lambda data: data["recipe"].update(calibration=None), "recipe.calibration"),
        (lambda data: data.update(precision="int8\x1b[31m"), "precision 'int8\\x1b[31m'"),
        (lambda data: data["engines"][0].update(precision="int9"), "precision 'int9'"),
        (lambda data: data["engines"][0].update(backend="cpu\n| a |"), "backend"),
        (lambda data: data["engines"][0].update(target="toaster"), "target 'toaster'"),
        (lambda data: data["report"].update(backend="::error::"), "backend '::error::'"),
        (lambda data: data["report"].update(precision="<b>"), "precision '<b>'"),
    ],
)
def test_a_manifest_that_no_build_writes_is_refused(tmp_path: Path, edit: Edit, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(bound(tmp_path / "a", edit))
    assert words in str(caught.value)
    assert "again" in str(caught.value)


@pytest.mark.parametrize("target", ["gpu", "dla0", "dla1", "rtx", ""])
def test_every_target_of_a_build_is_read(tmp_path: Path, target: str) -> None:
    manifest = read_manifest(bound(tmp_path / "a", lambda data: data["report"].update(target=target)))
    assert manifest.report is not None
    assert manifest.report.target == target


def test_settings_of_another_version_are_no_mistake(tmp_path: Path) -> None:
    later = {"quantization": {"a_new_key": 1}, "a_new_section": [1]}
    assert read_manifest(bound(tmp_path / "a", lambda data: data["recipe"].update(later))).recipe == later


def stored(**changes: Any) -> bytes:
    """Return a reference file some arrays of which are others; None leaves one out."""
    arrays = {
        "logits": LOGITS,
        "labels": LABELS,
        "names": np.array([f"{i}.png" for i in range(COUNT)]),
        "sha256": np.array(["0" * 64] * COUNT),
    }
    arrays.update(changes)
    stream = io.BytesIO()
    np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})
    return stream.getvalue()


def damaged() -> bytes:
    """Return an archive whose compressed bytes are no such stream, though its CRC is never reached."""
    stream = io.BytesIO()
    np.savez_compressed(stream, logits=np.random.default_rng(0).standard_normal((50, 50)))
    content = bytearray(stream.getvalue())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        begin = archive.infolist()[0].header_offset + 60
    content[begin : begin + 400] = b"\xff" * 400
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(stored())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + place] |= 1
    return bytes(content)


def packed_otherwise() -> bytes:
    content = bytearray(stored())
    for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.find(signature) + place] = 99
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (damaged(), "not a reference file"),
        (encrypted(), "not a reference file"),
        (packed_otherwise(), "not a reference file"),
        (stored(logits=LOGITS[:, 0]), "logits"),
        (stored(logits=LABELS), "logits"),
        (stored(logits=np.float32(3)), "logits"),
        (stored(logits=LOGITS[:, :0]), "logits"),
        (stored(logits=LOGITS.astype(str)), "logits"),
        (stored(labels=LABELS[:3]), "labels has 3 entries for 20 rows of logits"),
        (stored(labels=np.float32(LABELS)), "labels"),
        (stored(labels=LABELS[:, None]), "labels"),
        (stored(names=np.arange(COUNT)), "names"),
        (stored(names=np.array(["a"])), "names has 1 entries"),
        (stored(sha256=np.array(["a"] * 21)), "sha256 has 21 entries"),
        (stored(sha256=np.array(["ü"] * COUNT)), "no hash"),
        (stored(classes=np.float32(3)), "classes"),
        (stored(names=None), "lacks"),
    ],
)
def test_a_reference_that_no_build_writes_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_reference(content, "reference.npz")
    assert words in str(caught.value)
    assert "again" in str(caught.value)


def test_what_a_build_writes_is_read() -> None:
    written = reference_content(LOGITS, samples_from_arrays(FRAMES, None))
    assert set(read_reference(written, "it")) == {"logits", "names", "sha256"}
    assert np.array_equal(read_reference(stored(), "it")["labels"], LABELS)


@pytest.mark.parametrize("amax", [-1.0, 0.0, 1e-300])
def test_ranges_of_any_sign_are_told_apart(tmp_path: Path, amax: float) -> None:
    found = difference(bound(tmp_path / "a"), bound(tmp_path / "b", amax=amax))
    assert [row["amax"] for row in found["ranges"]] == [[1.0, amax]]


def test_answers_that_are_damaged_do_not_send_people_to_a_baseline_alone(tmp_path: Path) -> None:
    harmed = bound(tmp_path / "a", lambda data: data["report"].update(answers="AAAA"))
    with pytest.raises(SampleError, match="the report does not hold the answers") as caught:
        difference(harmed, bound(tmp_path / "b"))
    assert "edgeres build" in str(caught.value)


def test_a_verdict_on_other_samples_than_the_reference_is_not_paired(tmp_path: Path) -> None:
    answers = packed(LABELS[:7])
    first, second = (
        bound(tmp_path / name, lambda data: data["report"].update(samples=7, answers=answers)) for name in "ab"
    )
    assert "of other samples than its verdict" in difference(first, second)["unpaired"]


def test_a_rung_that_was_never_tried_is_refused(tmp_path: Path) -> None:
    rung = {"rung": "fast", "level": 1, "layers": [], "drop_pp": 1.0, "agreement": 0.9, "sqnr_db": 20.0,
            "verdict": "fail", "seconds": 1.0}  # fmt: skip
    stage = {"key": "", "files": [], "seconds": 0.0, "facts": {"rungs": [rung], "taken": 7}}
    manifest = read_manifest(bound(tmp_path / "a", lambda data: data["stages"].update(budget=stage)))
    with pytest.raises(BundleError, match="stage budget"):
        repairs(tmp_path / "a", msgspec.structs.replace(manifest, stages={**manifest.stages, "sensitivity": facts([])}))


def facts(layers: Any) -> StageRecord:
    return StageRecord("", (), 0.0, {"layers": layers})


@pytest.mark.parametrize("layers", [7, "layers", [3], {"a": 1}])
def test_costs_that_are_none_are_refused(tmp_path: Path, layers: Any) -> None:
    manifest = read_manifest(bound(tmp_path / "a"))
    with pytest.raises(BundleError, match="stage sensitivity"):
        repairs(
            tmp_path / "a", msgspec.structs.replace(manifest, stages={**manifest.stages, "sensitivity": facts(layers)})
        )


def command(*arguments: object) -> Tuple[int, List[str]]:
    """Run edgeres and return its exit code and what it says on stderr; whatever waits for ever is an error."""
    line = [sys.executable, "-m", "edgeres", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert "bug in edgeres" not in done.stderr
    return done.returncode, done.stderr.splitlines()


def test_pipes_and_devices_are_no_baselines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    bundle = bound(tmp_path / "a")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        code, said = command("validate", bundle, "--baseline", place)
        assert code == 1
        assert "not an ordinary file" in said[0]
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(1 << 32)
    with pytest.raises(EdgeresError, match="larger than"):
        read_baseline(tmp_path / "large")


def test_pipes_and_devices_are_no_benchmarks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.bench.json")
    bundle = bound(tmp_path / "a")
    manifest = read_manifest(bundle)
    assert benchmark_of(bundle, manifest) is None  # as where there is none
    for place in (tmp_path / "a.bench.json", Path("/dev/zero")):
        with pytest.raises(BundleError, match="not an ordinary file"):
            benchmark_of(bundle, manifest, place)
