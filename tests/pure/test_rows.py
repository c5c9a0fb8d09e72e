"""The rows of a matrix: each is a whole recipe, and every mistake is told at once and of its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.errors import RecipeError
from edgeres.recipe import METHODS, PRECISIONS, TARGETS, load_recipe
from edgeres.rows import KEYS, Planned, load_rows

BASE = """name = "net"
[model]
source = "resnet20_cifar"
weights = "w.pth"
[calibration]
samples = "images"
method = "mse"
[validation]
max_drop = 0.3
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return ``write(rows)``: the place of a recipe with these rows behind what they share."""

    def made(rows: str) -> Path:
        (tmp_path / "recipe.toml").write_text(BASE + rows, encoding="utf-8")
        return tmp_path / "recipe.toml"

    return made


def rows_of(path: Path, **overrides: Any) -> List[Planned]:
    return list(load_rows(path, {name.replace("__", "."): value for name, value in overrides.items()}) or ())


def problems_of(path: Path, **overrides: Any) -> List[str]:
    with pytest.raises(RecipeError) as caught:
        rows_of(path, **overrides)
    return caught.value.problems


def test_a_recipe_without_rows_is_none_and_reads_as_before(write: Write) -> None:
    assert load_rows(write("")) is None
    assert load_rows(None) is None  # the embedded default
    assert load_recipe(write("")).name == "net"


def test_each_row_is_the_recipe_with_its_own_values(write: Write, tmp_path: Path) -> None:
    path = write(
        """
[[targets]]
target = "cpu"
[[targets]]
name = "robot"
precision = "fp16"
target = "gpu"
max_drop = 1
[[targets]]
activation_range = "shifted"
method = "entropy"
"""
    )
    cpu, robot, here = rows_of(path)
    assert [row.name for row in (cpu, robot, here)] == ["int8-cpu", "robot", "int8"]
    assert [row.place(None) for row in (cpu, robot, here)] == [
        Path("build/net-int8-cpu"),
        Path("build/net-robot"),
        Path("build/net-int8"),
    ]
    assert cpu.place(tmp_path) == tmp_path / "net-int8-cpu"
    shared = load_recipe(write(""))
    assert cpu.recipe == load_recipe(path, {"engine.target": "cpu"})
    assert robot.recipe == load_recipe(path, {"engine.target": "gpu", "precision": "fp16", "validation.max_drop": 1.0})
    assert here.recipe == load_recipe(
        path, {"quantization.activation_range": "shifted", "calibration.method": "entropy"}
    )
    assert shared.calibration.samples == str(tmp_path / "images")  # relative to the file, as ever


@given(
    precision=st.sampled_from([None, *PRECISIONS]),
    target=st.sampled_from([None, *TARGETS]),
    method=st.sampled_from([None, *METHODS]),
    max_drop=st.none() | st.floats(0, 100),
)
def test_a_row_is_what_its_flags_would_make(
    precision: Optional[str],
    target: Optional[str],
    method: Optional[str],
    max_drop: Optional[float],
    tmp_path_factory: Any,
) -> None:
    given_here = {"precision": precision, "target": target, "method": method, "max_drop": max_drop}
    said = "".join(f"{name} = {value!r}\n" for name, value in given_here.items() if value is not None)
    folder = tmp_path_factory.mktemp("rows")
    (folder / "one.toml").write_text(BASE, encoding="utf-8")
    (folder / "many.toml").write_text(f"{BASE}[[targets]]\n{said}", encoding="utf-8")
    rows = load_rows(folder / "many.toml")
    assert rows is not None
    assert rows[0].recipe == load_recipe(folder / "one.toml", {KEYS[name]: value for name, value in given_here.items()})


def test_flags_are_for_what_no_row_says(write: Write) -> None:
    path = write('[[targets]]\ntarget = "cpu"\n[[targets]]\nprecision = "fp16"\n')
    assert [row.recipe.calibration.count for row in rows_of(path, calibration__count=9)] == [9, 9]
    assert problems_of(path, precision="fp32", engine__backend="cpu", engine__target="gpu") == [
        "--precision: targets[2] say their own precision. Leave the flag out, or theirs",
        "--backend: targets[1] say their own target. Leave the flag out, or theirs",
        "--target: targets[1] say their own target. Leave the flag out, or theirs",
    ]


def test_a_target_brings_its_backend(write: Write) -> None:
    path = write('[engine]\nbackend = "cpu"\n[[targets]]\ntarget = "gpu"\n[[targets]]\nprecision = "fp32"\n')
    assert [row.recipe.engine.backend for row in rows_of(path)] == ["auto", "cpu"]


def test_all_mistakes_are_told_at_once_those_of_all_rows_once(write: Write) -> None:
    path = write(
        """[engine]
batch = [8, 1, 1]
[quantization]
activation_range = "shifted"
[[targets]]
precison = "int8"
target = "cpu"
[[targets]]
precision = "int4"
method = "magic"
target = "gpu"
[[targets]]
target = "dla0"
max_drop = "much"
"""
    )
    assert problems_of(path) == [
        "targets[1].precison: there is no such key; did you mean targets[1].precision?",
        "targets[3].max_drop: Expected `float | null`, got `str`",
        "engine.batch: [8, 1, 1] is not [min, opt, max] with 1 <= min <= opt <= max",
        "targets[2].precision: 'int4' is not one of fp32, fp16, int8",
        "targets[2].method: 'magic' is not one of auto, minmax, percentile, entropy, mse",
        "targets[3]: quantization.activation_range: a DLA takes symmetric ranges only; leave out, or say symmetric",
    ]


@pytest.mark.parametrize("said", ["targets = []", "targets = 3", 'targets = ["cpu"]', "[targets]\nprecision = 'int8'"])
def test_rows_are_a_list_of_tables(said: str, tmp_path: Path) -> None:
    head = f"{said}\n{BASE}" if said.startswith("targets") else BASE + said
    (tmp_path / "r.toml").write_text(head, encoding="utf-8")
    assert problems_of(tmp_path / "r.toml") == ["targets: is a list of tables, one for each bundle: [[targets]]"]


def test_there_are_not_more_than_anybody_would_build(write: Write) -> None:
    assert problems_of(write("[[targets]]\n" * 101)) == ["targets: 101 are more than 100"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "/", "a\\nb", "a/"])
def test_a_name_is_a_folders(name: str, write: Write) -> None:
    (problem,) = problems_of(write(f'[[targets]]\nname = "{name}"\n'))
    assert "targets[1].name" in problem
    assert "is not a plain folder name" in problem


def test_two_rows_of_one_name_are_told(write: Write) -> None:
    assert problems_of(write('[[targets]]\n[[targets]]\nmethod = "mse"\n[[targets]]\nname = "INT8"\n')) == [
        "targets[2] is called int8, as targets[1] is. Give it another: name = ...",
        "targets[3] is called INT8, as targets[1] is. Give it another: name = ...",
    ]


def test_who_wants_one_bundle_is_told_that_there_are_several(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"targets: this recipe is of several bundles.*edgeres build RECIPE"):
        load_recipe(write("[[targets]]\n"))
