"""The accuracy budget on a trained net, two of whose layers int8 ruins: they are given back to float, and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import command_line
import edgeres
from edgeres import calibration, models
from edgeres.artifacts import Bundle, Climb
from edgeres.bundle import verify
from edgeres.inspection import inspect_bundle
from edgeres.pipeline import Build, build
from edgeres.progress import Progress
from edgeres.quantize import lint
from edgeres.recipe import dossier, load_recipe
from edgeres.workspace import Workspace

FRAGILE = {"conv1", "fc"}


class Stopped(BaseException):
    """The build was interrupted."""


@dataclass
class Watcher(Progress):
    """Remembers what a build told; ``until`` is the rung behind which it is interrupted."""

    until: str = ""
    ran: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.ran.append(name)
        if name == self.until:
            raise Stopped

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def fragile(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights of the digits net with the same answers in float, whose first layer and classifier int8 ruins.

    The first layer also sees the difference of red and green, a thousand times as strongly as all it saw before. The
    images are grey, so there is none, and float computes what it did; but the steps of int8 now fit that difference,
    and what counts is far below half a step. The classifier adds the same large multiple of the sum of all features to
    every class. That moves all logits alike, so no answer changes; but the classes differ by less than half a step.

    No rung mends that. Equalization scales channels between layers, and here input channels and features are alike;
    the input is exact already; nor can weights be fitted that have only steps of such a size to fit with.
    """
    made = {name: values.copy() for name, values in weights.items()}
    strong = 1000 * np.abs(made["conv1.weight"]).max()
    made["conv1.weight"][:, 0] += strong
    made["conv1.weight"][:, 1] -= strong
    made["fc.weight"] += 1000 * np.abs(made["fc.weight"]).max()
    return made


@dataclass
class Climbed:
    """A build that had to climb, and was interrupted behind its first rung."""

    bundle: Bundle
    climb: Climb
    options: dict[str, Any]
    before: Watcher
    after: Watcher

    @property
    def path(self) -> Path:
        return Path(self.bundle.path)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> Climbed:
    folder = tmp_path_factory.mktemp("fragile")
    save_file(fragile(load_file(dossier() / "digits/weights.safetensors")), folder / "weights.safetensors")
    for digit in range(10):
        target = folder / "validation" / str(digit)
        target.mkdir(parents=True)
        for image in sorted((dossier() / "digits/validation" / str(digit)).glob("*.png"))[:20]:
            shutil.copy(image, target)
    options = {
        "model": "resnet8_cifar",
        "weights": folder / "weights.safetensors",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "calibration": dossier() / "digits/calibration",
        "calibration_count": 60,
        "validation": folder / "validation",
        "max_drop": 1.0,
        "policy": "point",  # 200 images
        "out": folder / "bundle",
    }
    before, after = Watcher(until="rung 0"), Watcher()
    with pytest.raises(Stopped):
        edgeres.build(progress=before, **options)
    bundle = edgeres.build(progress=after, **options)
    assert bundle.manifest.climb is not None
    return Climbed(bundle, bundle.manifest.climb, options, before, after)


def test_the_net_is_the_same_in_float(climbed: Climbed) -> None:
    """Else it would be the net that is broken, and not int8."""
    with np.load(climbed.path / "reference.npz") as reference:
        answers, labels = reference["logits"].argmax(1), reference["labels"]
    module = models.create("resnet8_cifar")
    weights = load_file(dossier() / "digits/weights.safetensors")
    module.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()}, strict=False)
    images = sorted((climbed.options["validation"]).glob("*/*.png"))
    from PIL import Image

    frames = np.stack([np.asarray(Image.open(image).convert("RGB").resize((32, 32), 2)) for image in images])
    x = torch.from_numpy((frames.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (module.eval()(x).argmax(1).numpy() == answers).all()
    assert (answers == labels).mean() > 0.98


def test_without_the_budget_it_fails_and_recovery_alone_does_not_mend_it(climbed: Climbed) -> None:
    fast = climbed.climb.rungs[0]
    assert (fast.rung, fast.layers, fast.verdict) == ("fast", (), "fail")
    assert fast.drop_pp is not None
    assert fast.drop_pp > 50
    assert climbed.climb.without_full == "loss"
    assert any("best of 2 nets" in text for text in climbed.bundle.manifest.warnings)


def test_it_recovers_by_giving_back_exactly_the_two_fragile_layers(climbed: Climbed) -> None:
    report = climbed.bundle.report
    assert report is not None
    assert report.verdict == "pass"
    assert report.drop_pp is not None
    assert report.drop_pp <= 1.0
    last = climbed.climb.rungs[climbed.climb.taken]
    assert (last.rung, set(last.layers), last.verdict) == ("give back", FRAGILE, "pass")
    assert climbed.climb.ended == ""
    facts = inspect_bundle(climbed.path)
    weighted = [layer for layer in facts["plan"] if layer["type"] in ("Conv", "Gemm")]
    assert {layer["module"] for layer in weighted if layer["precision"] != "int8"} == FRAGILE
    assert all(layer["precision"] == "int8 skip" for layer in facts["plan"] if layer["type"] == "Add")
    assert lint(onnx.load(climbed.path / "model.int8.onnx"), kept=["/conv1/Conv", "/fc/Gemm"]) == []


def test_each_of_the_two_is_needed(climbed: Climbed) -> None:
    """Alone, each of them costs more than the budget, and all others together nothing."""
    costs = {cost["layer"]: cost for cost in inspect_bundle(climbed.path)["sensitivity"]["layers"]}
    assert all(costs[layer]["expected"] > 0.1 and costs[layer]["changed"] > 0.1 for layer in FRAGILE)
    assert all(cost["expected"] < 0.001 and cost["changed"] == 0 for name, cost in costs.items() if name not in FRAGILE)
    assert {"layer1.0", "layer2.0", "layer3.0", "layer1.0 (skip)", "avgpool (pool)"} < costs.keys()  # looked at, too


def test_it_says_why_and_what_each_rung_bought(climbed: Climbed) -> None:
    facts = inspect_bundle(climbed.path)
    reasons = {layer["module"]: layer["reason"] for layer in facts["plan"]}
    for layer in FRAGILE:
        assert reasons[layer].startswith(f"given back by the accuracy budget: quantized alone, {layer} costs ")
    assert {cost["layer"] for cost in facts["given_back"]} == FRAGILE
    assert [rung["rung"] for rung in facts["ladder"]] == ["fast", "give back"]
    assert facts["ladder"][1]["bought_pp"] > 50
    keys = {"rung", "layers", "drop_pp", "agreement", "sqnr_db", "verdict", "seconds"}
    assert all(keys <= rung.keys() for rung in facts["ladder"])


def test_what_is_returned_is_what_was_validated(climbed: Climbed) -> None:
    report, again = climbed.bundle.report, edgeres.validate(climbed.path)
    assert report is not None
    assert (again.drop_pp, again.agreement, again.sqnr_db) == (report.drop_pp, report.agreement, report.sqnr_db)
    last = climbed.climb.rungs[climbed.climb.taken]
    assert (again.drop_pp, again.agreement, again.sqnr_db) == (last.drop_pp, last.agreement, last.sqnr_db)


def test_an_interrupted_climb_goes_on_behind_its_last_rung(climbed: Climbed) -> None:
    assert climbed.before.ran[-1] == "rung 0"
    assert climbed.before.ran.count("quantize") == 1
    assert climbed.after.ran == [
        "sensitivity", "equalize", "calibrate", "quantize", "compile", "validate", "rung 1", "budget",
    ]  # fmt: skip
    assert not list(climbed.path.rglob(".rungs"))
    verify(climbed.path)


def test_the_recipe_stays_what_was_asked_for(climbed: Climbed) -> None:
    recipe = load_recipe(climbed.path)
    assert recipe.quantization.keep_float == ()
    assert recipe.quantization.recovery == "auto"
    assert recipe.quantization.budget_minutes == 10.0


def test_a_bundle_that_climbed_is_reused_whole(climbed: Climbed, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(climbed.path, tmp_path / "bundle"))
    model = (copy / "model.int8.onnx").read_bytes()
    watcher = Watcher()
    again = edgeres.build(copy, out=copy, progress=watcher)
    assert watcher.ran == []
    assert again.manifest.climb == climbed.climb
    build(load_recipe(copy), copy, "quantize")  # an earlier stage takes nothing away
    assert (copy / "model.int8.onnx").read_bytes() == model
    manifest = verify(copy)
    assert manifest.climb == climbed.climb
    assert manifest.report == climbed.bundle.report


def test_the_command_line_tells_it(climbed: Climbed, tmp_path: Path) -> None:
    copy = shutil.copytree(climbed.path, tmp_path / "bundle")
    answer = json.loads(command_line.edgeres("build", copy, "--json", cwd=tmp_path).stdout)
    assert [rung["layers"] for rung in answer["ladder"]] == [[], ["conv1", "fc"]]
    assert {cost["layer"] for cost in answer["given_back"]} == FRAGILE
    text = command_line.edgeres("build", copy, cwd=tmp_path).stdout
    assert "what was done for the accuracy budget" in text
    assert "conv1, fc" in text
    text = command_line.edgeres("inspect", copy, cwd=tmp_path).stdout
    assert "given back by the accuracy budget: quantized alone, conv1 costs" in text
    assert "layers and blocks, on calibration samples" in text


def test_where_no_rung_is_enough_the_best_one_is_kept_and_fails(climbed: Climbed, tmp_path: Path) -> None:
    """The time box ends before anything is tried; the exit code is that of a gate that failed."""
    watcher = Watcher()
    options = {**climbed.options, "out": tmp_path / "bundle", "budget_minutes": 1e-4}
    bundle = edgeres.build(progress=watcher, **options)
    assert bundle.report is not None
    assert bundle.report.verdict == "fail"
    climb = bundle.manifest.climb
    assert climb is not None
    assert len(climb.rungs) == 1
    assert "time box" in climb.ended
    assert climb.ended in bundle.manifest.warnings[-1]
    assert watcher.warnings == list(bundle.manifest.warnings)
    assert edgeres.validate(bundle.path).drop_pp == bundle.report.drop_pp
    watcher = Watcher()
    again = edgeres.build(bundle.path, progress=watcher)
    assert watcher.ran == []
    assert watcher.warnings == list(bundle.manifest.warnings)
    assert again.manifest.climb == climb


def test_a_skip_that_loses_the_range_it_shared_gets_one_of_its_own(climbed: Climbed, tmp_path: Path) -> None:
    """Behind option A's slice and padding: the block's first convolution, given back, takes the shared range along."""
    recipe = load_recipe(climbed.path)
    with Workspace(tmp_path / "bundle") as workspace:
        job = Build(recipe, workspace, "quantize", Progress())
        job.open_samples()
        exported = job.export()
        job.given_back = {"/layer2/layer2.0/conv1/Conv": "because"}
        layers = {layer.node: layer for layer in job.quantize(exported).layers}
        table = calibration.table(job, exported)
    assert (layers["/layer2/layer2.0/conv1/Conv"].precision, layers["/layer2/layer2.0/conv1/Conv"].reason) == (
        "float",
        "because",
    )
    assert layers["/layer2/layer2.0/Add"].precision == "int8 skip"
    assert "/layer2/layer2.0/downsample/Pad_output_0" in table.tensors
