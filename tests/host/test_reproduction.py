"""The same recipe, data and tools make the same files; ``edgeres build --check`` tells where they do not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from command_line import edgeres
from edgeres.artifacts import Manifest
from edgeres.bundle import verify
from edgeres.files import sha256_file
from edgeres.recipe import Recipe, dossier, load_recipe
from edgeres.reproduction import MARK, reproduce

COMPUTED = {
    "calibration.json",
    "model.fp32.onnx",
    "model.int8.onnx",
    "model.int8-cpu.onnx",
    "quantized.npz",
    "reference.npz",
    "report.json",
    "statistics.npz",
}


def lay(folder: Path, backwards: bool) -> list[str]:
    """Put samples and weights into a folder, in one order or the other, and return the options of a build of them."""
    for split, count in (("calibration", 1), ("validation", 2)):
        for digit in sorted(range(10), reverse=backwards):
            (folder / split / str(digit)).mkdir(parents=True)
            images = sorted((dossier() / "digits" / split / str(digit)).glob("*.png"))[:count]
            for image in sorted(images, reverse=backwards):
                shutil.copy(image, folder / split / str(digit))
    shutil.copy(dossier() / "digits/weights.safetensors", folder)
    paths = ("weights", "weights.safetensors"), ("calibration", "calibration"), ("validation", "validation")
    given = [word for option, name in paths for word in (f"--{option}", str(folder / name))]
    return ["--model", "resnet8_cifar", *given, "--recovery", "none", "--method", "mse"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verified_paths(bundle: Path) -> set[str]:
    return {ref.path for ref in verify(bundle).files}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with samples, weights and the bundle of them."""
    folder = tmp_path_factory.mktemp("place")
    edgeres("build", *lay(folder, backwards=False), "--out", folder / "bundle")
    return folder


def test_another_place_and_order_and_as_many_threads_as_there_are_make_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    edgeres("build", *lay(tmp_path, backwards=True), "--out", tmp_path / "other" / "bundle")
    made = [tree(folder) for folder in (place / "bundle", tmp_path / "other" / "bundle")]
    assert COMPUTED < made[0].keys() == made[1].keys()
    assert {name for name in COMPUTED if made[0][name] != made[1][name]} == set()


def test_a_check_builds_anew_and_touches_nothing(place: Path) -> None:
    before, entries = tree(place), sorted(place.rglob("*"))
    told = json.loads(edgeres("build", "--check", "--out", place / "bundle", "--json").stdout)
    assert (told["same"], told["recipe"], told["tools"]) == (True, {}, {})
    assert told["files"] == dict.fromkeys(sorted(COMPUTED), "same")
    assert told["not_compared"] == sorted(verified_paths(place / "bundle") - COMPUTED)
    assert (tree(place), sorted(place.rglob("*"))) == (before, entries)


def test_a_check_names_what_differs(place: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"]["tools"]["torch"] = "0.4.1"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    before = tree(tmp_path)
    told = json.loads(edgeres("build", bundle, "--check", "--method", "minmax", "--json", code=1).stdout)
    assert not told["same"]
    assert (
        told["files"]["model.fp32.onnx"] == told["files"]["statistics.npz"] == told["files"]["reference.npz"] == "same"
    )
    assert told["files"]["calibration.json"] == told["files"]["model.int8.onnx"] == "different"
    assert told["recipe"] == {"calibration.method": ["mse", "minmax"]}
    assert told["tools"]["tools.torch"][0] == "0.4.1"
    assert tree(tmp_path) == before
    assert "NOT the same" in edgeres("build", "--check", "--out", bundle, "--precision", "fp32", code=1).stdout


def test_what_somebody_laid_beside_a_forged_bundle_is_not_believed(place: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    manifest = (bundle / "manifest.json").read_text()
    report = bundle / "report.json"
    honest, size = sha256_file(report), report.stat().st_size
    report.write_bytes(report.read_bytes()[:-1] + b" " + report.read_bytes()[-1:])
    manifest = manifest.replace(honest, sha256_file(report)).replace(f'"bytes":{size}', f'"bytes":{size + 1}')
    (bundle / "manifest.json").write_text(manifest.replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    verify(bundle)
    shutil.copytree(bundle, tmp_path / ".bundle.check" / "bundle")
    before = tree(tmp_path)
    told = json.loads(edgeres("build", "--check", "--out", bundle, "--json", code=1).stdout)
    assert [path for path, word in told["files"].items() if word != "same"] == ["report.json"]
    assert tree(tmp_path) == before


def test_what_a_killed_check_left_is_removed_by_the_next_and_what_a_live_one_works_in_is_not(
    place: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    dead, live, young, other = (tmp_path / f".bundle.check-{name}" for name in ("dead", "live", "young", "other"))
    for folder in (dead, live, young, other):
        (folder / "bundle").mkdir(parents=True)
        (folder / "bundle/model.fp32.onnx").write_bytes(b"half")
        if folder is not other:  # a folder of somebody's, under such a name
            (folder / MARK).touch()
    for folder in (dead, live):
        os.utime(folder / MARK, (1e9, 1e9))
    os.utime(other, (1e9, 1e9))
    descriptor = os.open(live / MARK, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        edgeres("build", "--check", "--out", bundle)
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, other.name, young.name, "bundle"]


def test_a_bundle_of_a_single_stage_is_built_as_far(place: Path, tmp_path: Path) -> None:
    edgeres("calibrate", *lay(tmp_path, backwards=False), "--out", tmp_path / "bundle")
    told = json.loads(edgeres("build", "--check", "--out", tmp_path / "bundle", "--json").stdout)
    assert told["files"].keys() < COMPUTED
    assert told["files"]["calibration.json"] == "same"


def test_it_is_built_beside_the_bundle_also_where_that_is_named_from_within(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    (bundle / "mine").mkdir()
    places: list[Path] = []

    def copied(recipe: Recipe, out: Path, *rest: object) -> None:
        places.append(out)
        shutil.copytree(place / "bundle", out)

    monkeypatch.setattr("edgeres.reproduction.build", copied)
    assert reproduce(bundle / "mine" / "..", load_recipe(str(bundle))).same
    assert places[0].parent.parent == tmp_path
    assert not places[0].parent.exists()


@pytest.mark.parametrize("backend", ["cpu", "tensorrt"])
def test_what_an_engine_of_a_gpu_answered_is_not_compared(
    place: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    def built(recipe: Recipe, out: Path, *rest: object) -> None:
        shutil.copytree(place / "bundle", out)

    def verified(bundle: Path) -> Manifest:
        manifest = verify(bundle)
        engines = tuple(replace(engine, backend=backend) for engine in manifest.engines)
        return replace(manifest, engines=engines)

    monkeypatch.setattr("edgeres.reproduction.build", built)
    monkeypatch.setattr("edgeres.reproduction.verify", verified)
    found = reproduce(place / "bundle", load_recipe(str(place / "bundle")))
    assert ({"report.json", "quantized.npz"} <= set(found.not_compared)) == (backend != "cpu")
    assert found.files.keys() | (set(found.not_compared) & COMPUTED) == COMPUTED


def test_other_weights_under_the_same_name_are_found(tmp_path: Path) -> None:
    edgeres("build", *lay(tmp_path, backwards=False), "--out", tmp_path / "bundle")
    weights = load_file(tmp_path / "weights.safetensors")
    save_file(
        {name: np.asarray(1.5 * value, value.dtype) for name, value in weights.items()},
        tmp_path / "weights.safetensors",
    )
    done = edgeres("build", "--check", "--out", tmp_path / "bundle", code=1)
    assert "model.fp32.onnx" in done.stdout
    assert "NOT the same" in done.stdout
    verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda folder: (folder / "bundle/model.int8.onnx").write_bytes(b""), 1, "model.int8.onnx"),
        (lambda folder: shutil.rmtree(folder / "calibration"), 1, "calibration.samples"),
        (lambda folder: shutil.rmtree(folder / "bundle"), 1, "there is no"),
    ],
)
def test_what_cannot_be_checked_is_a_sentence(
    place: Path, tmp_path: Path, damage: object, code: int, words: str
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    recipe = (tmp_path / "bundle/recipe.toml").read_text().replace(str(place), str(tmp_path))
    assert callable(damage)
    damage(tmp_path)
    if (tmp_path / "bundle").is_dir():
        (tmp_path / "recipe.toml").write_text(recipe)
        said = edgeres("build", tmp_path / "recipe.toml", "--check", "--out", tmp_path / "bundle", code=code).stderr
    else:
        said = edgeres("build", "--check", "--out", tmp_path / "bundle", code=code).stderr
    assert words in said
    assert not list(tmp_path.glob(".bundle.check*"))


def test_a_check_has_to_know_of_what() -> None:
    assert "--out BUNDLE" in edgeres("build", "--check", code=2).stderr
