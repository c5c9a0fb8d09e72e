"""The recipe: from TOML and flags, complete, with every mistake reported at once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.architectures import ARCHITECTURES
from edgeres.artifacts import Preprocessing
from edgeres.errors import RecipeError
from edgeres.preprocess import problems
from edgeres.recipe import (
    DEFAULT_RECIPE,
    FLAGS,
    METHODS,
    PRECISIONS,
    SECTIONS,
    dossier,
    engine_section,
    load_recipe,
    locate,
    recipe_data,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def toml(data: Dict[str, Any]) -> str:
    """Return a dictionary as TOML: values first, then its tables, one deep."""
    lines = [f"{key_words(key)} = {value_words(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for name, table in data.items():
        if isinstance(table, dict):
            lines.append(f"[{key_words(name)}]")
            lines += [f"{key_words(key)} = {value_words(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def key_words(key: str) -> str:
    return json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_words(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_words(key)} = {value_words(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, float) else key_words(value)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for recipes; the current folder is another."""
    (tmp_path / "current").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return tmp_path / "recipes"


def written(place: Path, content: str) -> Path:
    (place / "net.toml").write_text(content, encoding="utf-8")
    return place / "net.toml"


def problems_of(source: Optional[Path], overrides: Optional[Dict[str, Any]] = None) -> List[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def problem_of(source: Optional[Path], overrides: Optional[Dict[str, Any]] = None) -> str:
    problems = problems_of(source, overrides)
    assert len(problems) == 1, problems
    return problems[0]


# Places in the dossier


@pytest.mark.parametrize(
    "inside", ["../../secret", "..", "digits/../../secret", "/etc/passwd", "./../x", "//etc/passwd", "digits/..//.."]
)
def test_what_is_said_to_come_with_edgeres_does_not_lead_out_of_it(inside: str, place: Path) -> None:
    path = f"edgeres:{inside}"
    said = f"{path} leads out of the data that comes with edgeres. Name its own place, without edgeres: in front"
    keys = ("model.weights", "calibration.samples", "validation.samples", "engine.timing_cache")
    sections = {key.split(".")[0]: {key.split(".")[1]: path} for key in keys}
    told = problems_of(written(place, toml({**sections, "model": {"source": "resnet18", "weights": path}})))
    assert sorted(told) == sorted(f"{key}: {said}" for key in keys)
    assert problem_of(None, {"model.source": f"{path}/x.onnx"}).startswith(f"--model: {path}/x.onnx leads out")
    with pytest.raises(RecipeError, match="leads out"):
        locate(path)


@pytest.mark.parametrize("inside", ["digits/weights.safetensors", "digits/../digits/validation", "", "..a/b", "a..b"])
def test_what_stays_in_the_dossier_is_found_there(inside: str) -> None:
    assert dossier() in (locate(f"edgeres:{inside}") / "x").parents


# The embedded default


def test_the_embedded_default_loads(place: Path) -> None:
    recipe = load_recipe()
    assert recipe == load_recipe(DEFAULT_RECIPE) == load_recipe(REPOSITORY / "calibration/recipes/digits-int8.toml")
    assert recipe.name == "digits"
    assert recipe.precision == "int8"
    assert recipe.architecture is ARCHITECTURES["resnet8_cifar"]
    assert recipe.preprocessing == Preprocessing((32, 32), 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "rgb")
    assert recipe.validation.max_drop == 0.5


def test_the_embedded_default_has_its_files() -> None:
    recipe = load_recipe()
    for path in (recipe.model.weights, recipe.calibration.samples, recipe.validation.samples):
        assert path is not None
        assert path.startswith("edgeres:")
        assert locate(path).exists()
        assert dossier() in locate(path).parents


def test_a_flag_alone_changes_the_embedded_default() -> None:
    changed = load_recipe(None, {"precision": "fp16", "calibration.count": 10})
    default = load_recipe()
    plan = msgspec.structs.replace(default.calibration, count=10)
    assert changed == msgspec.structs.replace(default, precision="fp16", calibration=plan)


# Flags and files


def test_flags_override_the_file_key_by_key(place: Path) -> None:
    path = written(
        place,
        'name = "net"\n[model]\nsource = "resnet18"\nseed = 3\n[calibration]\ncount = 7\nmethod = "entropy"\n',
    )
    recipe = load_recipe(path, {"calibration.method": "minmax", "validation.max_drop": 1, "name": "other"})
    assert recipe.name == "other"
    assert recipe.model.seed == 3
    assert recipe.calibration.count == 7
    assert recipe.calibration.method == "minmax"
    assert recipe.validation.max_drop == 1.0


def test_a_flag_that_was_not_given_changes_nothing(place: Path) -> None:
    path = written(place, '[model]\nsource = "resnet18"\n')
    assert load_recipe(path, {"model.source": None, "precision": None, "input.size": None}) == load_recipe(path)
    assert load_recipe(None, {"model.source": None}) == load_recipe()


def test_a_model_named_by_flag_needs_no_file(place: Path) -> None:
    recipe = load_recipe(None, {"model.source": "resnet50"})
    assert recipe.name == "resnet50"
    assert recipe.precision == "int8"
    assert recipe.model.weights is None
    assert recipe.calibration.samples is None


def test_flags_may_be_lists_or_tuples() -> None:
    flags = {
        "model.source": "resnet18",
        "input.mean": (0, 0, 0),
        "input.size": [64, 48],
        "quantization.keep_float": ["fc"],
    }
    recipe = load_recipe(None, flags)
    assert recipe.input.mean == (0.0, 0.0, 0.0)
    assert recipe.input.size == (64, 48)
    assert recipe.quantization.keep_float == ("fc",)


def test_the_callers_flags_stay_as_they_were(place: Path) -> None:
    flags = {"model.source": "resnet18", "model.weights": "w.pth", "precision": None}
    before = dict(flags)
    load_recipe(None, flags)
    assert flags == before


def test_a_bundle_is_its_own_recipe(place: Path) -> None:
    (place / "recipe.toml").write_text('[model]\nsource = "resnet34"\nweights = "w.pth"\n')
    recipe = load_recipe(place)
    assert recipe == load_recipe(place / "recipe.toml") == load_recipe(str(place))
    assert recipe.model.weights == str(place / "w.pth")


# Where paths lead


PATHS = (
    '[model]\nsource = "resnet18"\nweights = "w.pth"\n[calibration]\nsamples = "a/b"\n[validation]\nsamples = "../v"\n'
)


def test_paths_of_a_file_are_relative_to_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(place, PATHS)
    monkeypatch.chdir(place.parent)
    recipe = load_recipe("recipes/net.toml")
    assert recipe == load_recipe(place / "net.toml")
    assert recipe.model.weights == str(place / "w.pth")
    assert recipe.calibration.samples == str(place / "a" / "b")
    assert recipe.validation.samples is not None
    assert os.path.normpath(recipe.validation.samples) == str(place.parent / "v")


def test_paths_of_flags_are_relative_to_the_current_folder(place: Path) -> None:
    path = written(place, PATHS)
    recipe = load_recipe(path, {"model.weights": "other.pth", "validation.samples": "x"})
    assert recipe.model.weights == str(place.parent / "current" / "other.pth")
    assert recipe.validation.samples == str(place.parent / "current" / "x")
    assert recipe.calibration.samples == str(place / "a" / "b")


def test_an_onnx_file_is_a_path_too(place: Path) -> None:
    path = written(place, '[model]\nsource = "nets/NET.ONNX"\n')
    assert load_recipe(path).model.source == str(place / "nets" / "NET.ONNX")
    assert load_recipe(path, {"model.source": "a.onnx"}).model.source == str(place.parent / "current" / "a.onnx")


def test_a_name_and_a_callable_are_no_paths(place: Path) -> None:
    for source in ("resnet18", "package.module:make"):
        assert load_recipe(written(place, toml({"model": {"source": source}}))).model.source == source


def test_absolute_and_home_paths(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = written(
        place, toml({"model": {"source": "resnet18", "weights": "/w.pth"}, "validation": {"samples": "~/v"}})
    )
    recipe = load_recipe(path)
    assert recipe.model.weights == "/w.pth"
    assert recipe.validation.samples == "/home/somebody/v"


def test_the_home_of_nobody_is_a_path_like_any_other(place: Path) -> None:
    recipe = load_recipe(written(place, toml({"model": {"source": "resnet18", "weights": "~no-such-user/w.pth"}})))
    assert recipe.model.weights == str(place / "~no-such-user" / "w.pth")


def test_the_dossier_is_meant_by_its_prefix(place: Path) -> None:
    path = written(place, toml({"model": {"source": "resnet18", "weights": "edgeres:digits/weights.safetensors"}}))
    weights = load_recipe(path).model.weights
    assert weights == "edgeres:digits/weights.safetensors"
    assert locate(weights) == dossier() / "digits" / "weights.safetensors"
    assert load_recipe("edgeres:recipes/digits-int8.toml") == load_recipe()


def test_locate(place: Path) -> None:
    assert locate("a/b", place) == place / "a" / "b"
    assert locate("a/b") == place.parent / "current" / "a" / "b"
    assert locate("/a", place) == Path("/a")


# What is filled in


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_fills_in_its_own(name: str) -> None:
    recipe, architecture = load_recipe(None, {"model.source": name}), ARCHITECTURES[name]
    assert recipe.architecture is architecture
    assert recipe.name == name
    assert recipe.model.num_classes == architecture.num_classes
    assert recipe.preprocessing.size == (architecture.size, architecture.size)
    assert recipe.preprocessing.resize == architecture.resize


def filled(source: str, **flags: Any) -> Any:
    """Return the size and the resize of a recipe with those flags."""
    frame = load_recipe(None, {"model.source": source, **{f"input.{key}": value for key, value in flags.items()}}).input
    return frame.size, frame.resize


def test_size_and_resize() -> None:
    assert filled("resnet18") == ((224, 224), 256)
    assert filled("resnet18", size=[160, 192]) == ((160, 192), 192)  # as much of a frame as fits the crop
    assert filled("resnet18", size=[160, 192], resize=200) == ((160, 192), 200)
    assert filled("resnet18", resize=230) == ((224, 224), 230)
    assert filled("resnet20_cifar") == ((32, 32), 32)
    assert filled("package.module:make") == ((224, 224), 256)
    assert filled("package.module:make", size=[64, 32]) == ((64, 32), 64)
    assert filled("net.onnx") == (None, None)
    assert filled("net.onnx", resize=40) == (None, 40)
    assert filled("net.onnx", size=[64, 32]) == ((64, 32), 64)


def test_num_classes_are_the_users_where_given() -> None:
    assert load_recipe(None, {"model.source": "resnet18", "model.num_classes": 10}).model.num_classes == 10
    assert load_recipe(None, {"model.source": "package:make"}).model.num_classes is None
    for number in (0, 999_999_999):
        with pytest.raises(RecipeError, match="not a number of classes from 1 to 1,000,000"):
            load_recipe(None, {"model.source": "resnet18", "model.num_classes": number})


def test_the_size_of_an_onnx_file_is_open_until_it_is_looked_up() -> None:
    recipe = load_recipe(None, {"model.source": "net.onnx"})
    assert recipe.architecture is None
    with pytest.raises(RecipeError, match=r"input\.size.*--input-size"):
        _ = recipe.preprocessing
    assert recipe.with_size((48, 64)).preprocessing == Preprocessing((48, 64), 64)
    wide = load_recipe(None, {"model.source": "net.onnx", "input.resize": 80})
    assert wide.with_size((48, 64)).preprocessing == Preprocessing((48, 64), 80)


NAMES = {
    "resnet18": "resnet18",
    "my.package:make_net": "make_net",
    "my.package:Nets.wide": "Nets.wide",
    "my.package:": "model",
    "my.package:a/b c": "a-b-c",
    "my.package:..": "model",
    "nets/My Net.onnx": "My-Net",
    "nets/net.v2.ONNX": "net.v2",
    ".onnx": "onnx",
}


@pytest.mark.parametrize(("source", "name"), NAMES.items())
def test_a_recipe_without_name_is_called_after_its_model(place: Path, source: str, name: str) -> None:
    assert load_recipe(None, {"model.source": source}).name == name


@pytest.mark.parametrize("name", ["net", "net-int8", "netz_1.2", "größe", "a b"])
def test_a_plain_name_is_kept(name: str) -> None:
    assert load_recipe(None, {"name": name}).name == name


@pytest.mark.parametrize("name", ["a/b", "/", "..", ".", ".hidden", "a/", "../a", "a\nb", "a\x00b", 3, ["a"]])
def test_a_name_that_is_no_folders_is_refused(name: Any) -> None:
    assert problem_of(None, {"name": name}).startswith("name: ")


# What is refused


MISTAKES = """
name = "a/b"
precision = "int4"
colour = "rgb"

[model]
source = "resnet81"
num_classes = 0
seed = -1

[input]
size = 32
mean = [0.5, 0.5]
colr = "bgr"

[calibration]
count = 0
method = "entrpy"
percentile = 50

[quantisation]
keep_float = []

[quantization]
keep_float = "fc"

[validation]
max_drop = nan
policy = "maybe"
samples = 1

[engine]
backend = "tpu"
"""


def test_every_mistake_is_reported_at_once(place: Path) -> None:
    path = written(place, MISTAKES)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == sorted(
        [
            "name",
            "precision",
            "colour",
            "model.source",
            "model.num_classes",
            "model.seed",
            "input.size",
            "input.mean",
            "input.colr",
            "calibration.count",
            "calibration.method",
            "calibration.percentile",
            "quantisation",
            "quantization.keep_float",
            "validation.max_drop",
            "validation.policy",
            "validation.samples",
            "engine.backend",
        ]
    )
    assert caught.value.where == str(path)
    assert str(caught.value).startswith(f"{path}: 18 problems\n")


def test_a_section_that_is_no_table_hides_no_other_mistake(place: Path) -> None:
    path = written(place, 'model = "resnet18"\n[calibration]\ncount = 0\n')
    assert problems_of(path) == [
        "model: must be a table, not str",
        "calibration.count: 0 is not a positive number of samples",
    ]
    assert problems_of(path, {"model.source": "resnet18"})[0] == "model: must be a table, not str"


def test_a_wrong_type_is_reported_once(place: Path) -> None:
    assert problem_of(written(place, "[model]\nsource = 18\n")).startswith("model.source: Expected `str`")


def test_mistakes_of_flags_are_reported_with_those_of_the_file(place: Path) -> None:
    path = written(place, '[model]\nsource = "resnet18"\n[calibration]\ncount = 0\n')
    keys = [
        problem.partition(":")[0] for problem in problems_of(path, {"validation.max_drop": -1.0, "model.wights": "w"})
    ]
    assert sorted(keys) == ["--max-drop", "calibration.count", "model.wights"]


def test_a_flag_is_blamed_by_its_own_name(place: Path) -> None:
    path = written(place, '[model]\nsource = "resnet18"\n')
    with pytest.raises(RecipeError, match=r"^options: --max-drop: -1\.0 is not between") as caught:
        load_recipe(path, {"validation.max_drop": -1})
    assert caught.value.where == "options"
    with pytest.raises(RecipeError, match=r"--workspace-mib: 0 is not a number of MiB") as caught:
        engine_section({}, {"workspace_mib": 0})
    with pytest.raises(RecipeError, match=r"engine\.batch: \[2, 1, 1\]"):
        engine_section({"batch": [2, 1, 1]}, {"strict": True})


def test_a_list_that_was_written_as_text_is_shown_as_one(place: Path) -> None:
    path = written(place, '[model]\nsource = "resnet18"\n[quantization]\nkeep_float = "fc"\n')
    assert problem_of(path) == 'quantization.keep_float: is a list: keep_float = ["fc"]'


def test_without_a_file_the_options_are_to_blame() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {"model.source": "resnet81"})
    assert caught.value.where == "options"


HINTS = {
    "modell": "did you mean model?",
    "precison": "did you mean precision?",
    "calibration.methd": "did you mean calibration.method?",
    "validation.maxdrop": "did you mean validation.max_drop?",
}


@pytest.mark.parametrize(("key", "hint"), HINTS.items())
def test_a_key_that_is_nearly_right_is_named(key: str, hint: str) -> None:
    problem = problem_of(None, {key: "x"})
    assert problem == f"{key}: there is no such key; {hint}"


def test_a_key_that_is_nothing_like_another_gets_no_hint() -> None:
    assert problem_of(None, {"qqqq": 1}) == "qqqq: there is no such key"


def test_a_model_that_is_nearly_right_is_named() -> None:
    assert "did you mean resnet50" in problem_of(None, {"model.source": "resnet-50"})
    assert "edgeres models" in problem_of(None, {"model.source": "yolo"})


def test_no_model_at_all_is_named(place: Path) -> None:
    for content in ("", "[model]\n", '[model]\nsource = ""\n'):
        assert problem_of(written(place, content)).startswith("model.source: is missing")


def test_an_onnx_file_has_its_weights_inside() -> None:
    assert problem_of(None, {"model.source": "a.onnx", "model.weights": "w.pth"}).startswith("--weights: ")


VALUES = {
    "model.num_classes": ([1, 1000], [0, -5, 1.5, "10"]),
    "model.seed": ([0, (1 << 63) - 1], [-1, 1 << 63, 0.5]),
    "input.size": ([[1, 1], [224, 160]], [224, [224], [1, 2, 3], ["a", "b"], [1.5, 2]]),
    "input.resize": ([256], ["256", 1.5]),
    "input.mean": ([[0, 0.5, 1]], [[0.5, 0.5], 0.5, [0.5, 0.5, "x"]]),
    "input.color": (["rgb", "bgr"], [1, ["rgb"]]),
    "input.fit": (["crop", "letterbox"], [1, ["crop"]]),
    "input.pad": ([[0, 0, 0], [124, 116, 104]], [114, [114, 114], [0.5, 0, 0], "grey"]),
    "calibration.count": ([1, 50_000], [0, -1, 1.5, "many", 1 << 64, True]),
    "calibration.method": (METHODS, ["", "MSE", "kl", 1]),
    "calibration.percentile": ([50.1, 99.99, 100], [50, 0, 100.1, -1, math.nan, math.inf, "99", 10**400]),
    "quantization.keep_float": ([[], ["fc", "layer*"]], ["fc", [1], {"fc": True}]),
    "quantization.budget_minutes": ([0, 0.5, 10080], [-1, 10080.5, math.nan, math.inf, "10"]),
    "quantization.activation_range": (["auto", "symmetric", "shifted"], ["full", "", "Shifted", 1]),
    "quantization.grouped": (["auto", "int8", "float"], ["full", "", "Int8", 1]),
    "quantization.weight_range": (["auto", "full", "paired"], ["half", "", "Paired", 1]),
    "quantization.recovery": (["auto", "none", "fast", "full"], ["some", "", "Fast", 1]),
    "validation.max_drop": ([0, 0.0, 0.5, 100], [-0.1, 100.1, math.nan, math.inf, -math.inf, "0.5", 10**400]),
    "validation.policy": (["ci", "point"], ["CI", ""]),
    "engine.backend": (["auto", "cpu", "tensorrt", "tensorrt-rtx"], ["gpu", ""]),
    "engine.target": (["cpu", "gpu", "dla0", "dla1", "rtx"], ["GPU", "", 0]),
    "engine.batch": ([[1, 1, 1], [1, 8, 32]], [[8, 1, 32], [0, 1, 2], [1, 8], "1,8,32", [1, 8, 4], [1, 8, 1 << 31]]),
    "engine.workspace_mib": ([1, 4096, (1 << 43) - 1], [0, -1, "1G", 1 << 43, 1 << 50]),
    "engine.optimization_level": ([0, 5], [-1, 6, "high"]),
    "engine.gpu_fallback": ([True, False], [1, "yes"]),
    "engine.version_compatible": ([True, False], [1, "yes"]),
    "engine.hardware_compatible": ([True, False], [1, "yes"]),
    "engine.strict": ([True, False], [1, "yes"]),
    "engine.input": (["auto", "uint8", "float32"], ["UINT8", "", "int8", 8]),
    "engine.timeout_minutes": ([0.5, 240.0, 10080.0], [0, -1, 10081, float("nan"), float("inf"), "long"]),
    "precision": (PRECISIONS, ["int4", "INT8", "", 8, ["int8"], 1 << 20_000]),
}


@pytest.mark.parametrize("key", VALUES)
def test_good_values_are_taken_and_bad_ones_refused(place: Path, key: str) -> None:
    good, bad = VALUES[key]
    section, _, field = key.partition(".")
    for value in good:
        recipe = load_recipe(None, {key: value})
        found = getattr(getattr(recipe, section), field) if field else recipe.precision
        assert found == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        assert problem_of(None, {key: value}).startswith(f"{FLAGS.get(key, key)}: "), value
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {key: bad[0], "name": "a/b"})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("target", ["dla0", "dla1"])
def test_a_dla_takes_symmetric_ranges_only(place: Path, target: str) -> None:
    flags = {"engine.target": target, "quantization.activation_range": "shifted"}
    assert problem_of(None, flags).startswith("--activation-range: a DLA takes symmetric ranges only")
    for good in ("auto", "symmetric"):
        assert load_recipe(None, {**flags, "quantization.activation_range": good}).engine.target == target


@pytest.mark.parametrize("target", ["dla0", "dla1"])
def test_a_dla_takes_no_pixels(place: Path, target: str) -> None:
    flags = {"engine.target": target, "engine.input": "uint8"}
    assert problem_of(None, flags).startswith("--engine-input: an engine for a DLA takes float32")
    assert load_recipe(None, {**flags, "engine.input": "auto"}).engine.target == target


@pytest.mark.parametrize("model", ["resnet50", "net.py:make", "net.onnx"])
def test_a_letterbox_needs_no_resize_and_has_a_colour(place: Path, model: str) -> None:
    """What the model's own preprocessing would have filled in contradicts a letterbox; what the user says stays."""
    flags = {"model.source": model, "input.fit": "letterbox"}
    recipe = load_recipe(None, flags)
    recipe = recipe if recipe.input.size else recipe.with_size((64, 48))
    assert (recipe.preprocessing.resize, recipe.preprocessing.pad) == (None, (114, 114, 114))
    assert problems(recipe.preprocessing) == []
    black = load_recipe(None, {**flags, "input.pad": [0, 0, 0], "input.size": [64, 48]})
    assert (black.preprocessing.size, black.preprocessing.pad) == ((64, 48), (0, 0, 0))
    crop = load_recipe(None, {"model.source": model, "input.size": [64, 48]})
    assert (crop.preprocessing.fit, crop.preprocessing.pad, crop.preprocessing.resize) == ("crop", None, 64)


def test_every_key_has_a_value_that_was_tried() -> None:
    keys = {f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)}
    paths = {"model.weights", "calibration.samples", "validation.samples", "engine.timing_cache"}
    elsewhere = {"model.source", "input.std", *paths}
    assert keys == {key for key in VALUES if "." in key} | elsewhere


# What is no recipe


def test_a_recipe_that_is_not_there_is_named(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.toml: there is no such recipe"):
        load_recipe(place / "missing.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml: there is no such recipe"):
        load_recipe(place)


UNREADABLE = {
    "not TOML": b"precision = int8",
    "half a table": b"[model",
    "a key twice": b'precision = "int8"\nprecision = "fp16"',
    "JSON": b'{"model": "resnet18"}',
    "not UTF-8": b'name = "\xff"',
    "UTF-16": 'name = "net"'.encode("utf-16"),
    "zeros": bytes(100),
    "a control character": b'name = "\x01"',
    "half a surrogate": b'name = "\\ud800"',
    "arrays in arrays": b"a = " + b"[" * 50_000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_toml_is_named(place: Path, content: bytes) -> None:
    (place / "net.toml").write_bytes(content)
    assert problem_of(place / "net.toml").startswith("is not TOML: ")


STRANGE_NUMBERS = {
    "thousands of digits": b"[validation]\nmax_drop = " + b"1" * 5000,
    "hundreds of digits": b"[validation]\nmax_drop = " + b"1" * 500,
    "thousands of hexadecimal digits": b"[calibration]\ncount = 0x" + b"f" * 10_000,
    "thousands of digits for a word": b"precision = 0x" + b"f" * 10_000,
    "thousands of digits in a list": b"[input]\nsize = [0x" + b"f" * 10_000 + b", 1]",
}


@pytest.mark.parametrize("content", STRANGE_NUMBERS.values(), ids=STRANGE_NUMBERS)
def test_a_number_that_nobody_can_mean_is_refused(place: Path, content: bytes) -> None:
    (place / "net.toml").write_bytes(content)
    assert problems_of(place / "net.toml", {"model.source": "resnet18"})


def test_a_path_through_a_file_cannot_be_read(place: Path) -> None:
    path = written(place, "")
    assert problem_of(path / "below.toml") == "cannot be read: Not a directory"


@pytest.mark.parametrize("name", ["a" * 300, "em\0pty"], ids=["long", "NUL"])
def test_a_path_that_no_file_can_have_cannot_be_read(place: Path, name: str) -> None:
    assert problem_of(place / name).startswith("cannot be read: ")


# Anything at all


# Characters that a file can hold: no half surrogates, and carriage returns only where they are escaped.
words = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
keys = st.sampled_from(
    [
        "name",
        "precision",
        *SECTIONS,
        *(field.name for kind in SECTIONS.values() for field in msgspec.structs.fields(kind)),
    ]
)
sensible = st.sampled_from(
    ["resnet18", "a.onnx", "p:q", "int8", "mse", "cpu", "~", "~x/y", "edgeres:", "..", "a/b", ""]
)
values = st.recursive(
    st.booleans() | st.integers() | st.floats() | words | sensible,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
tables = st.dictionaries(keys | words, values, max_size=5)
recipes = st.dictionaries(keys | words, values | tables, max_size=6)


@given(data=recipes, flags=st.none() | st.dictionaries(st.sampled_from(sorted(VALUES)), values, max_size=3))
def test_any_data_is_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, data: Dict[str, Any], flags: Optional[Dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(toml(data).encode("utf-8"))
    problems: List[str] = []
    try:
        load_recipe(path, flags)
    except RecipeError as error:
        problems = error.problems or ["none was named"]
    assert "none was named" not in problems
    assert not any("is not TOML" in problem for problem in problems), toml(data)


@given(st.binary(max_size=60) | st.text("[]{}=\"'.#\n\\u0123ef_-: a", max_size=40).map(str.encode))
def test_any_bytes_are_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


# There and back


finite = st.floats(allow_nan=False, allow_infinity=False)
triples = st.lists(finite, min_size=3, max_size=3)
sizes = st.integers(1, 4096)
paths = st.sampled_from(["a", "a/b c", "/a/b", "../ü", "edgeres:digits/validation", 'quo"te', "back\\slash", "tab\t\n"])
GOOD = {
    "name": st.sampled_from(["net", "a b", "größe", "x.y"]),
    "precision": st.sampled_from(PRECISIONS),
    "model.weights": paths,
    "model.num_classes": st.integers(1, 1_000_000),
    "model.seed": st.integers(0, (1 << 63) - 1),
    "input.size": st.lists(sizes, min_size=2, max_size=2),
    "input.resize": sizes,
    "input.mean": triples,
    "input.std": triples,
    "input.color": words,
    "calibration.samples": paths,
    "calibration.count": st.integers(1, 1 << 40),
    "calibration.method": st.sampled_from(METHODS),
    "calibration.percentile": st.floats(50, 100, exclude_min=True),
    "quantization.keep_float": st.lists(words, max_size=3),
    "validation.samples": paths,
    "validation.max_drop": st.floats(0, 100),
    "validation.policy": st.sampled_from(["ci", "point"]),
    "engine.backend": st.sampled_from(["auto", "cpu"]),
}
sources = st.fixed_dictionaries({"model.source": st.sampled_from(["resnet18", "resnet20_cifar", "a.b:c"])})
good_flags = st.fixed_dictionaries({}, optional=GOOD)


@given(first=sources, second=good_flags)
def test_a_recipe_repeats_itself(
    tmp_path_factory: pytest.TempPathFactory, first: Dict[str, Any], second: Dict[str, Any]
) -> None:
    recipe = load_recipe(None, {**first, **second})
    data = recipe_data(recipe)
    path = tmp_path_factory.getbasetemp() / "again" / "recipe.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(toml(data).encode("utf-8"))
    assert load_recipe(path) == recipe
    assert load_recipe(path.parent) == recipe
    assert recipe_data(load_recipe(path)) == data


def test_what_a_build_writes_is_the_same_recipe(place: Path) -> None:
    tomli_w = pytest.importorskip("tomli_w", reason="tomli-w writes recipes; it comes with the extra [host]")
    flags = {"model.source": "net.onnx", "quantization.keep_float": ["fc", 'a"b'], "input.mean": [0, 1e-7, 1]}
    for recipe in (load_recipe(), load_recipe(None, flags)):
        path = written(place, tomli_w.dumps(recipe_data(recipe)))
        assert load_recipe(path) == recipe


def test_what_is_none_is_left_out() -> None:
    data = recipe_data(load_recipe(None, {"model.source": "net.onnx"}))
    assert data["model"] == {"source": str(Path("net.onnx").absolute()), "seed": 0}
    assert "size" not in data["input"]
