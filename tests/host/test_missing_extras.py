"""What each command says where a package of an extra is not installed, and that all others do without."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeres
from edgeres.guide import LESSONS
from edgeres.recipe import dossier
from edgeres.signing import make_pair, sign_bundle

HIDE = """
import runpy
import sys

hidden = set(sys.argv[1].split(","))


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.argv[:] = ["edgeres", *sys.argv[2:]]
runpy.run_module("edgeres", run_name="__main__", alter_sys=True)
"""
EVERY = "torch,onnx,onnxruntime,safetensors,numba,tomli_w,jinja2,PIL,cryptography,tensorrt,tensorrt_rtx,pycuda,cuda"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed bundle, build/digits-int8, packed too, and the keys of two."""
    folder = tmp_path_factory.mktemp("missing")
    for digit in range(10):
        (folder / "images" / str(digit)).mkdir(parents=True)
        for image in sorted((dossier() / "digits/validation" / str(digit)).glob("*.png"))[:2]:
            shutil.copy(image, folder / "images" / str(digit))
    edgeres.build(
        calibration=folder / "images",
        validation=folder / "images",
        recovery="none",
        backend="cpu",
        out=folder / "build/digits-int8",
    )
    make_pair(folder / "lab.key")
    sign_bundle(folder / "build/digits-int8", folder / "lab.key")
    edgeres.pack(folder / "build/digits-int8")
    return folder


def run(place: Path, hidden: str, line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE, hidden, *line.split()]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done


BUNDLE, KEY = "build/digits-int8", "--key lab.key.pub"
MISSING = [
    *((package, "build", "host") for package in ("torch", "onnx", "onnxruntime", "safetensors", "numba", "tomli_w")),
    *(("onnx", command, "host") for command in ("export", "calibrate", "quantize")),
    *(("numba", f"{command} {BUNDLE} --method mse", "host") for command in ("calibrate", "quantize")),
    ("onnx", f"inspect {BUNDLE}/model.int8.onnx", "host"),
    ("onnx", f"build --check --out {BUNDLE}", "host"),
    ("PIL", "build --calibration images", "images"),
    ("PIL", f"validate {BUNDLE}", "images"),
    ("PIL", f"validate {BUNDLE} --validation images", "images"),
    ("onnxruntime", f"compile {BUNDLE} --target cpu", "cpu"),
    ("onnxruntime", f"validate {BUNDLE}", "cpu"),
    ("onnxruntime", f"bench {BUNDLE}", "cpu"),
    ("tensorrt,tensorrt_rtx", f"compile {BUNDLE} --target gpu", "tensorrt"),
    ("jinja2", f"report {BUNDLE}", "report"),
    ("cryptography", "keygen other.key", "sign"),
    ("cryptography", f"sign {BUNDLE} --key lab.key", "sign"),
    *(("cryptography", f"{name} {BUNDLE} {KEY}", "sign") for name in ("verify", "validate", "bench", "compile")),
    *(("cryptography", f"{name} {BUNDLE} {KEY}", "sign") for name in ("inspect", "report", "pack")),
    ("cryptography", f"diff {BUNDLE} {BUNDLE} {KEY}", "sign"),
    ("cryptography", f"unpack {BUNDLE}.edgeres {KEY}", "sign"),
    ("cryptography", f"verify {BUNDLE}.edgeres {KEY}", "sign"),
]


@pytest.mark.parametrize(("hidden", "line", "extra"), MISSING)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    hidden: str, line: str, extra: str, place: Path
) -> None:
    done = run(place, hidden, line)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert f"pip install 'edgeres[{extra}]'" in said


NEEDS_NOTHING = (
    "models",
    "doctor",
    "init starter",
    f"verify {BUNDLE}",
    f"verify {BUNDLE}.edgeres",
    f"inspect {BUNDLE}",
    f"inspect {BUNDLE} --sbom",
    f"inspect {BUNDLE}.edgeres",
    f"diff {BUNDLE} {BUNDLE}",
    f"pack {BUNDLE} -o again.edgeres",
    "unpack again.edgeres",
    "compile --list-targets",
    "completion bash",
    "manual",
)


def test_all_other_commands_do_without_any(place: Path) -> None:
    for line in NEEDS_NOTHING:
        done = run(place, EVERY, line)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert (place / "again.edgeres").read_bytes() == (place / f"{BUNDLE}.edgeres").read_bytes()


def test_every_command_is_among_them() -> None:
    assert {line.split()[0] for line in (*(line for _, line, _ in MISSING), *NEEDS_NOTHING)} == set(LESSONS)


def test_a_matrix_tells_it_of_each_row(place: Path) -> None:
    recipe = (dossier() / "recipes/digits-int8.toml").read_text("utf-8")
    (place / "many.toml").write_text(f'{recipe}[[targets]]\ntarget = "cpu"\n[[targets]]\nprecision = "fp16"\n', "utf-8")
    done = run(place, "torch", "build many.toml")
    assert done.returncode == 1
    assert done.stdout.count("pip install 'edgeres[host]'") == 2
