"""When a stage's earlier result may be taken over, and when it must not be; what a build leaves out is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import edgeres
from edgeres import comparison
from edgeres.artifacts import CalibrationTable, Engine, EngineLayer, FileRef, from_json
from edgeres.bundle import verify
from edgeres.errors import EdgeresError
from edgeres.pipeline import Build
from edgeres.progress import Progress
from edgeres.recipe import dossier, load_recipe
from edgeres.workspace import Workspace

Make = Callable[..., tuple[list[str], list[str]]]


class Watcher(Progress):
    def __init__(self) -> None:
        self.ran: list[str] = []
        self.warnings: list[str] = []

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.ran.append(name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return ``make(**options)``: a small build into ``bundle``; it answers which stages ran and what was warned of.

    Without recovery, but where a test asks for it: most of these are about other stages.
    """
    for split in ("calibration", "validation"):
        for digit in range(10):
            (tmp_path / split / str(digit)).mkdir(parents=True)
            for image in sorted((dossier() / "digits" / split / str(digit)).glob("*.png"))[:2]:
                shutil.copy(image, tmp_path / split / str(digit))
    shutil.copy(dossier() / "digits/weights.safetensors", tmp_path)

    def build(**options: object) -> tuple[list[str], list[str]]:
        watcher = Watcher()
        given = {
            "model": "resnet8_cifar",
            "weights": tmp_path / "weights.safetensors",
            "calibration": tmp_path / "calibration",
            "validation": tmp_path / "validation",
            "recovery": "none",
            **options,
        }
        edgeres.build(out=tmp_path / "bundle", **{"progress": watcher, **given})
        return watcher.ran, watcher.warnings

    return build


def table(folder: Path) -> CalibrationTable:
    return from_json((folder / "bundle/calibration.json").read_bytes(), CalibrationTable, "table")


class Interrupter(Watcher):
    """Interrupts the calibration after so many samples, as Ctrl-C would; and keeps what it was told."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.told: list[int] = []
        self.running = ""

    def stage(self, name: str, text: str) -> None:
        self.running = name

    def advance(self, done: int, total: int) -> None:
        if self.running == "observe":
            self.told.append(done)
            if done >= self.after:
                raise KeyboardInterrupt


@given(data=st.data())
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_interrupted_calibration_goes_on_and_comes_to_the_same_bytes(
    make: Make, tmp_path: Path, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeres.artifacts.Preprocessing.batch_size", property(lambda self: 3))
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        make()
        whole = (tmp_path / "bundle/statistics.npz").read_bytes()
        shutil.rmtree(tmp_path / "bundle")
        patch.setattr("edgeres.observation.KEEP_EVERY", 0.0)
        reached = 0
        for after in data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3).map(sorted)):
            if reached == 20:
                break  # nothing is left to interrupt
            watcher = Interrupter(after)
            with pytest.raises(KeyboardInterrupt):
                make(progress=watcher)
            assert all(done > reached for done in watcher.told)  # nothing is counted twice
            reached = watcher.told[-1] if watcher.told else reached
        last = Interrupter(after=1000)
        make(progress=last)
        assert last.told == sorted({*range(reached + 3, 20, 3), 20} if reached < 20 else [])
        assert (tmp_path / "bundle/statistics.npz").read_bytes() == whole
        assert not list((tmp_path / "bundle").rglob("*.partial"))


def test_what_other_samples_had_reached_is_not_gone_on_from(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeres.artifacts.Preprocessing.batch_size", property(lambda self: 4))
    monkeypatch.setattr("edgeres.observation.KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(progress=Interrupter(8))
    next((tmp_path / "calibration/0").iterdir()).unlink()
    watcher = Interrupter(1000)
    make(progress=watcher)
    assert watcher.told == [4, 8, 12, 16, 19]


def test_a_damaged_rest_of_an_interrupted_calibration_is_left_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeres.artifacts.Preprocessing.batch_size", property(lambda self: 5))
    monkeypatch.setattr("edgeres.observation.KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(progress=Interrupter(10))
    partial = tmp_path / ".bundle.work/.stages/observe.partial"
    partial.write_bytes(partial.read_bytes()[:-100] + bytes(100))
    watcher = Interrupter(1000)
    make(progress=watcher)
    assert watcher.told == [5, 10, 15, 20]


def test_a_renamed_image_is_another_set_of_samples(make: Make, tmp_path: Path) -> None:
    make()
    image = next((tmp_path / "calibration/3").iterdir())
    image.rename(image.with_name("renamed.png"))
    ran, _ = make()
    assert "calibrate" in ran
    assert any(name.endswith("renamed.png") for name in table(tmp_path).samples.names)


def test_another_classifier_behind_the_same_features_is_another_model(make: Make, tmp_path: Path) -> None:
    make(recovery="fast")
    weights = load_file(tmp_path / "weights.safetensors")
    weights["fc.bias"] = weights["fc.bias"] + np.float32(0.01)
    save_file(weights, tmp_path / "weights.safetensors")
    ran, _ = make(recovery="fast")
    assert {"export", "equalize", "calibrate", "quantize", "validate"} <= set(ran)
    assert table(tmp_path).model_sha256 == verify(tmp_path / "bundle").stages["export"].files[0].sha256


def test_other_images_under_the_same_names_are_observed_again(make: Make, tmp_path: Path) -> None:
    make(recovery="fast")
    one, other = sorted((tmp_path / "calibration").rglob("*.png"))[:2]
    shutil.copy(other, one)
    ran, _ = make(recovery="fast")
    assert {"observe", "equalize", "calibrate", "quantize"} <= set(ran)
    assert "export" not in ran


def test_other_labels_are_judged_again(make: Make, tmp_path: Path) -> None:
    make()
    (tmp_path / "validation/0").rename(tmp_path / "validation/x")
    (tmp_path / "validation/1").rename(tmp_path / "validation/0")
    (tmp_path / "validation/x").rename(tmp_path / "validation/1")
    ran, _ = make()
    assert ran == ["hygiene", "reference", "validate"]


def test_weights_beside_an_onnx_file_are_part_of_it(make: Make, tmp_path: Path) -> None:
    make()
    model = onnx.load(tmp_path / "bundle/model.fp32.onnx")
    path = tmp_path / "outside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="outside.data", size_threshold=100)
    make(model=path, weights=None)
    assert make(model=path, weights=None)[0] == []
    data = np.fromfile(tmp_path / "outside.data", np.float32)
    (data * np.float32(0.9)).tofile(tmp_path / "outside.data")
    assert "export" in make(model=path, weights=None)[0]
    (tmp_path / "outside.data").unlink()
    with pytest.raises(EdgeresError, match=r"outside\.data, which is no file"):
        make(model=path, weights=None)


def test_a_bundle_in_another_precision_can_be_loaded(make: Make, tmp_path: Path) -> None:
    _, warnings = make(keep_float=["*"])
    assert any("NOT ONE layer" in text for text in warnings)
    _, warnings = make(precision="fp32")
    assert any("model.int8.onnx" in text and "left out" in text for text in warnings)
    with edgeres.load(tmp_path / "bundle") as engine:
        assert engine.record.file.path == "model.fp32.onnx"
        assert engine(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 10)


def test_what_was_warned_of_is_said_again_where_the_result_is_reused(make: Make, tmp_path: Path) -> None:
    """Also of a stage that an interrupted build has finished."""
    first = make(keep_float=["*"])[1]
    assert any("NOT ONE layer" in text for text in first)
    told = verify(tmp_path / "bundle").warnings
    for _ in range(2):
        ran, again = make(keep_float=["*"])
        assert ran == []
        assert sorted(again) == sorted(first) == sorted(told)
        assert verify(tmp_path / "bundle").warnings == told

    class Stop(Watcher):
        def stage(self, name: str, text: str) -> None:
            if name == "compile":
                raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "bundle")
    with pytest.raises(KeyboardInterrupt):
        make(keep_float=["*"], progress=Stop())
    watcher = Watcher()
    make(keep_float=["*"], progress=watcher)
    assert "quantize" not in watcher.ran
    assert any("NOT ONE layer" in text for text in watcher.warnings)


def test_a_report_that_tells_of_other_engines_too_keeps_the_quantized_models_logits(make: Make, tmp_path: Path) -> None:
    make()
    layers = (EngineLayer("conv1", "Convolution", "int8", (), (), (), (), ""),)
    with Workspace(tmp_path / "bundle") as workspace:
        job = Build(load_recipe(tmp_path / "bundle"), workspace, "validate", Progress())
        stages = verify(tmp_path / "bundle").stages
        record = workspace.reuse("validate", stages["validate"].key)
        assert record is not None
        job.engines = (Engine("gpu", "tensorrt", "int8", FileRef("engines/gpu.engine", "0", 1), {}, {}, layers=layers),)
        report = comparison.told(job, record)
        assert report.layers
        assert [ref.path for ref in workspace.records["validate"].files] == ["report.json", "quantized.npz"]


def test_a_missing_class_folder_would_shift_every_label(make: Make, tmp_path: Path) -> None:
    make()
    shutil.rmtree(tmp_path / "validation/0")
    with pytest.raises(EdgeresError, match="9 class folders and the model answers 10"):
        make()
    with pytest.raises(EdgeresError, match="9 class folders and the model answers 10"):
        edgeres.validate(tmp_path / "bundle", tmp_path / "validation")


def test_a_callables_random_weights_follow_the_seed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seeded_net.py").write_text(
        "import torch\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(4, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = {"model": "seeded_net:net", "weights": None, "input_size": (16, 16)}
    make(**options, seed=1)
    first = (tmp_path / "bundle/model.fp32.onnx").read_bytes()
    ran, _ = make(**options, seed=1)
    assert ran == ["export"]  # its code may have changed, so it is exported again; what comes out is the same
    assert (tmp_path / "bundle/model.fp32.onnx").read_bytes() == first
    make(**options, seed=2)
    assert (tmp_path / "bundle/model.fp32.onnx").read_bytes() != first


def test_no_samples_are_asked_for_by_stages_that_use_none(tmp_path: Path) -> None:
    from edgeres.pipeline import build

    recipe = load_recipe(None, {"model.source": "resnet8_cifar"})
    build(recipe, tmp_path / "bundle", until="export")
    assert (tmp_path / "bundle/model.fp32.onnx").is_file()
    with pytest.raises(EdgeresError, match="--calibration FOLDER"):
        build(recipe, tmp_path / "bundle", until="calibrate")
    with pytest.raises(EdgeresError, match="needs no ranges"):
        build(
            load_recipe(None, {"model.source": "resnet8_cifar", "precision": "fp32"}), tmp_path / "b", until="calibrate"
        )
