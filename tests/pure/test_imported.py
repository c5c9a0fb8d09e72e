"""Weights on a file's own steps, and what a DLA makes of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeres.artifacts import ExportedModel, FileRef, Imported, Preprocessing, QuantizedModel
from edgeres.compilation import Source, _weight_warnings
from edgeres.imported import steps_for
from edgeres.recipe import load_recipe

FILE = Imported("modelopt", {}, {"w": (0.1, 0.2)}, (), ())
MODEL = FileRef("model.int8.onnx", "0" * 64, 1)


@pytest.mark.parametrize(("target", "kept"), [("cpu", True), ("gpu", True), ("dla0", False), ("dla1", False)])
def test_a_dla_finds_steps_of_its_own(target: str, kept: bool) -> None:
    recipe = load_recipe(None, {"engine.target": target})
    assert steps_for(FILE, recipe) == (FILE.weights if kept else {})
    assert steps_for(None, recipe) == {}


def test_compiling_for_a_dla_says_so() -> None:
    exported = ExportedModel(MODEL, 13, "x", "y", (3, 8, 8), 2, {}, imported=FILE)
    source = Source(Path(), exported, QuantizedModel(MODEL, "int8", ()), False, Preprocessing((8, 8)))
    (warning,) = _weight_warnings(source, "dla1")
    assert "edgeres quantize BUNDLE --backend tensorrt --target dla1" in warning
    assert _weight_warnings(source, "gpu") == ()
    plain = source._replace(exported=msgspec.structs.replace(exported, imported=None))
    assert _weight_warnings(plain, "dla1") == ()
