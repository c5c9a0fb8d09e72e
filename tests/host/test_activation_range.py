"""The full int8 range as a choice: what the recipe says, what a target makes of ``auto``, and where it is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto

import edgeres
from edgeres import compilation, targets
from edgeres.artifacts import Bundle, CalibrationTable, Engine, QuantizedModel, from_data, from_json, to_json
from edgeres.bundle import verify
from edgeres.compilation import FOR_A_DLA, SYMMETRIC_INSTEAD, Source, activation_range, compile_bundle
from edgeres.errors import BackendError, EdgeresError
from edgeres.files import file_ref
from edgeres.progress import Progress
from edgeres.quantize.describe import describe_file
from edgeres.recipe import dossier, engine_section, load_recipe


class Watcher(Progress):
    def __init__(self) -> None:
        self.ran: list[str] = []

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.ran.append(name)


def build(out: Path, **options: object) -> tuple[Bundle, list[str]]:
    """Return a small build's bundle, and the stages that ran for it."""
    watcher, digits = Watcher(), dossier() / "digits"
    given = {
        "model": "resnet8_cifar",
        "weights": digits / "weights.safetensors",
        "calibration": digits / "calibration",
        "calibration_count": 20,
        "backend": "cpu",
        **options,
    }
    return edgeres.build(out=out, progress=watcher, **given), watcher.ran


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as it is built for the CPU with nothing said."""
    out = tmp_path_factory.mktemp("range") / "bundle"
    build(out)
    return out


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(built, tmp_path / "bundle")
    return tmp_path / "bundle"


def model_of(bundle: Path) -> QuantizedModel:
    return from_data(verify(bundle).stages["quantize"].facts, QuantizedModel, "stage quantize")


def shifts_of(bundle: Path) -> list[float]:
    table = from_json((bundle / "calibration.json").read_bytes(), CalibrationTable, "table")
    return [value.shift for value in table.tensors.values()]


def relus(bundle: Path) -> int:
    return sum(node.op_type == "Relu" for node in onnx.load(bundle / "model.int8.onnx").graph.node)


def test_the_cpu_gets_the_full_range_with_nothing_said(built: Path) -> None:
    manifest = verify(built)
    assert model_of(built).activation_range == "shifted"
    assert manifest.recipe["quantization"]["activation_range"] == "auto"
    assert [engine.activation_range for engine in manifest.engines] == ["shifted"]
    assert manifest.report is not None
    assert manifest.report.activation_range == "shifted"
    assert sum(shift > 0 for shift in shifts_of(built)) == len(shifts_of(built)) - 1  # all but the input
    assert relus(built) == 0


def test_each_way_is_a_flag_away_and_nothing_is_observed_again(bundle: Path) -> None:
    changed, ran = build(bundle, activation_range="symmetric")
    assert ran == ["equalize", "calibrate", "quantize", "compile", "validate"]
    assert model_of(bundle).activation_range == "symmetric"
    assert changed.report is not None
    assert changed.report.activation_range == "symmetric"
    assert 0 < sum(shift > 0 for shift in shifts_of(bundle)) < len(shifts_of(bundle)) // 2  # what comes for nothing
    assert relus(bundle) > 0
    assert describe_file(bundle / "model.int8.onnx")["activation_range"] == "symmetric"
    symmetric = (bundle / "model.int8.onnx").read_bytes()
    again, ran = build(bundle, activation_range="shifted")
    assert ran == ["equalize", "calibrate", "quantize", "compile", "validate"]
    assert relus(bundle) == 0
    assert again.report is not None
    assert again.report.sqnr_db is not None
    assert changed.report.sqnr_db is not None
    assert again.report.sqnr_db > changed.report.sqnr_db
    assert (bundle / "model.int8.onnx").read_bytes() != symmetric
    assert build(bundle)[1] == []  # auto means the same here


def test_without_recovery_a_symmetric_model_has_no_shift_at_all(bundle: Path) -> None:
    build(bundle, activation_range="symmetric", recovery="none")
    assert model_of(bundle).activation_range == "symmetric"
    assert not any(shifts_of(bundle))
    assert "edgeres.shifts" not in {e.key for e in onnx.load(bundle / "model.int8.onnx").metadata_props}


def test_beside_what_a_symmetric_model_shifts_weights_are_paired_for_a_cpu(bundle: Path) -> None:
    """So that no kernel could saturate. The first layer reads pixels; what is not shifted has no byte beyond 127."""
    slow = {}
    for name in ("auto", "full"):
        build(bundle, activation_range="symmetric", weight_range=name)
        weights = [w for w in onnx.load(bundle / "model.int8-cpu.onnx").graph.initializer if len(w.dims) > 1]
        slow[name] = sum(tensor.data_type == TensorProto.UINT8 for tensor in weights)
    assert slow["auto"] <= 1 < slow["full"]


def test_a_model_has_the_name_that_its_file_tells(bundle: Path) -> None:
    """Whichever form was built before, and where no layer inside is in int8."""
    keep = ["layer1.0.conv2", "layer2*", "layer3*"]
    told = []
    for form in ("symmetric", "shifted", "symmetric"):
        build(bundle, activation_range=form, keep_float=keep, weight_range="full")
        told.append((model_of(bundle).activation_range, model_of(bundle).shifted))
        facts = describe_file(bundle / "model.int8.onnx")
        assert (facts["activation_range"], facts["shifted"]) == told[-1]
    assert told[0] == told[2] != told[1]


def test_where_nothing_can_be_shifted_the_model_is_symmetric(bundle: Path) -> None:
    build(bundle, activation_range="shifted", keep_float=["layer*", "fc"])
    assert model_of(bundle).activation_range == "symmetric"
    assert shifts_of(bundle) == [0.0]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"engine.backend": "cpu"}, "shifted"),
        ({"engine.target": "cpu"}, "shifted"),
        ({"engine.target": "rtx"}, "shifted"),
        ({"engine.backend": "tensorrt-rtx"}, "shifted"),
        ({"engine.backend": "tensorrt"}, "symmetric"),
        ({"engine.target": "gpu"}, "symmetric"),
        ({"engine.target": "dla0"}, "symmetric"),
        ({"engine.target": "dla1"}, "symmetric"),
    ],
    ids=str,
)
def test_auto_takes_what_suits_the_target(flags: dict[str, Any], wanted: str) -> None:
    assert activation_range(load_recipe(None, flags)) == wanted
    for said in ("symmetric", "shifted"):
        if said == "symmetric" or not str(flags.get("engine.target", "")).startswith("dla"):
            assert activation_range(load_recipe(None, {**flags, "quantization.activation_range": said})) == said


@pytest.mark.parametrize(("usable", "wanted"), [(True, "symmetric"), (False, "shifted")])
def test_auto_follows_the_backend_that_auto_means(usable: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "gpu_is_usable", lambda *_: usable)
    assert activation_range(load_recipe(None, {"engine.backend": "auto"})) == wanted


def test_a_bundle_that_is_quantized_for_a_dla_is_symmetric(bundle: Path) -> None:
    run("quantize", bundle, "--backend", "tensorrt", "--target", "dla0")
    assert model_of(bundle).activation_range == "symmetric"
    assert not any(shifts_of(bundle))  # a DLA has no recovery


def run(command: str, bundle: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "edgeres", command, str(bundle), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(("target", "form"), [("dla0", "shifted"), ("dla1", "symmetric")])
def test_a_dla_refuses_any_shift_and_says_what_to_type(target: str, form: str, bundle: Path) -> None:
    build(bundle, activation_range=form)
    assert model_of(bundle).shifted == sum(shift > 0 for shift in shifts_of(bundle)) > 0
    before = (bundle / "manifest.json").read_bytes()
    done = run("compile", bundle, "--target", target, code=1)
    assert "shifted to the full int8 range" in done.stderr
    assert FOR_A_DLA in done.stderr
    assert (bundle / "manifest.json").read_bytes() == before
    run("quantize", bundle, *FOR_A_DLA.split()[3:])
    with pytest.raises(EdgeresError) as caught:  # whatever is missing here for a DLA, it is not the range any more
        compile_bundle(bundle, engine_section({}, {"target": target}), lambda *_: None)
    assert "shifted" not in str(caught.value)
    assert "equalized" not in str(caught.value)


def test_inspect_tells_the_range_and_what_became_of_each_layer(bundle: Path) -> None:
    facts = json.loads(run("inspect", bundle, "--json").stdout)
    assert facts["activation_range"] == "shifted"
    reasons = {layer["module"]: layer["reason"] for layer in facts["plan"]}
    assert "ends at zero" in reasons["relu"]
    assert "gives that back" in reasons["layer1.0.conv1"]
    text = run("inspect", bundle).stdout
    assert "0 to " in text
    assert "±" in text
    file_facts = json.loads(run("inspect", bundle / "model.int8.onnx", "--json").stdout)
    assert file_facts["activation_range"] == "shifted"
    assert file_facts["lint"] == []


def compiled_for_gpu(source: Source, section: Any, watch: Any) -> tuple[Engine, tuple[str, ...]]:
    """What the builder would return, on a machine that has none."""
    folder = source.folder
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines/gpu.engine").write_bytes(b"plan")
    ref = file_ref(folder, "engines/gpu.engine")
    engine = Engine("gpu", "tensorrt", "int8", ref, {}, {}, activation_range=source.model.activation_range)
    return engine, ("the builder's own",)


def test_on_full_tensorrt_its_cost_is_said_to_be_unmeasured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_tensorrt_engine", compiled_for_gpu)
    section = engine_section({}, {"target": "gpu"})
    made, _, warnings = compile_bundle(bundle, section, lambda *_: None)
    assert warnings[0] == "the builder's own"
    assert "not measured yet" in warnings[1]
    assert SYMMETRIC_INSTEAD in warnings[1]
    assert set(warnings) <= set(verify(bundle).warnings)
    assert {engine.target: engine.activation_range for engine in made.manifest.engines}["gpu"] == "shifted"


@pytest.mark.parametrize(("target", "shifted"), [("gpu", False), ("rtx", True), ("cpu", True)])
def test_elsewhere_nothing_is_said(target: str, shifted: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shifted:
        build(bundle, activation_range="symmetric")
    monkeypatch.setattr(compilation, "_tensorrt_engine", compiled_for_gpu)
    warnings = compile_bundle(bundle, engine_section({}, {"target": target}), lambda *_: None)[2]
    assert not any("not measured" in text for text in warnings)


def test_a_table_and_a_manifest_from_before_are_symmetric(bundle: Path) -> None:
    build(bundle, activation_range="symmetric", recovery="none")
    table = json.loads((bundle / "calibration.json").read_bytes())
    for value in table["tensors"].values():
        del value["shift"]
    old = from_json(json.dumps(table), CalibrationTable, "table")
    assert to_json(old) == (bundle / "calibration.json").read_bytes()
    model = json.loads(to_json(model_of(bundle)))
    del model["activation_range"]
    assert from_data(model, QuantizedModel, "stage quantize") == model_of(bundle)
    engine = msgspec.to_builtins(verify(bundle).engines[0])
    del engine["activation_range"]
    assert from_data(engine, Engine, "engine").activation_range == "symmetric"


def test_a_shifted_target_that_is_a_dla_is_a_mistake_in_the_recipe() -> None:
    with pytest.raises(EdgeresError, match="a DLA takes symmetric ranges only"):
        load_recipe(None, {"engine.target": "dla0", "quantization.activation_range": "shifted"})
    with pytest.raises(BackendError):
        activation_range(load_recipe(None, {"engine.target": "rtx", "engine.backend": "cpu"}))
