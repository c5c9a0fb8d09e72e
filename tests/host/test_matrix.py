"""A build matrix: every row as if it were built alone, what rows share done once, and a failure that stops no other."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import edgeres
from command_line import edgeres as command
from edgeres import matrix as matrix_module
from edgeres import pipeline
from edgeres.artifacts import Manifest
from edgeres.bundle import verify
from edgeres.errors import BackendError, BundleError, EdgeresError, MissingPackageError, RecipeError
from edgeres.files import MANIFEST
from edgeres.matrix import BUILT, FAILED, NEEDS_A_BOARD, Row
from edgeres.pipeline import Build
from edgeres.progress import Progress
from edgeres.recipe import dossier
from edgeres.samples import Samples
from edgeres.workforce import Alone, Workforce

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return ``write(*rows, **shared)``: the place of a recipe of a small net on few images, without recovery."""
    for split in ("calibration", "validation"):
        for digit in range(10):
            (tmp_path / split / str(digit)).mkdir(parents=True)
            for image in sorted((dossier() / "digits" / split / str(digit)).glob("*.png"))[:2]:
                shutil.copy(image, tmp_path / split / str(digit))

    def made(*rows: str, max_drop: float = 50, recovery: str = "none", weights: str = "") -> Path:
        weights = weights or str(dossier() / "digits/weights.safetensors")
        shared = f"""name = "net"
model = {{ source = "resnet8_cifar", weights = "{weights}" }}
calibration = {{ samples = "calibration", count = 20 }}
validation = {{ samples = "validation", max_drop = {max_drop} }}
quantization = {{ recovery = "{recovery}", budget_minutes = 0 }}
"""
        (tmp_path / "recipe.toml").write_text(shared + "".join(f"[[targets]]\n{row}\n" for row in rows))
        return tmp_path / "recipe.toml"

    return made


class Ran(Progress):
    """Which stages ran, and which were reused, row by row."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.ran: list[list[str]] = []
        self.warnings: list[str] = []

    def row(self, number: int, total: int, text: str) -> None:
        self.rows.append(f"{number}/{total} {text}")
        self.ran.append([])

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.ran[-1].append(name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def models_of(folder: Path) -> dict[str, str]:
    """Return the hashes of what a build makes the same each time."""
    kept = {MANIFEST, "report.html", "recipe.toml", "errors.json"}
    return {ref.path: ref.sha256 for ref in verify(folder).files if ref.path not in kept}


def test_each_row_is_as_if_it_were_built_alone_and_nothing_is_done_twice(write: Write, tmp_path: Path) -> None:
    rows = ('target = "cpu"', 'target = "cpu"\nprecision = "fp16"', 'name = "wide"\nmethod = "minmax"\ntarget = "cpu"')
    ran = Ran()
    matrix = edgeres.build_matrix(write(*rows), out=tmp_path / "out", progress=ran)
    assert matrix.good
    assert [row.state for row in matrix.rows] == [BUILT] * 3
    assert [Path(row.bundle).name for row in matrix.rows] == ["net-int8-cpu", "net-fp16-cpu", "net-wide"]
    assert ran.rows[1] == f"2/3 fp16-cpu: {tmp_path / 'out' / 'net-fp16-cpu'}"
    # The one pass over the images, the export and FP32's answers are the first row's.
    assert {"export", "hygiene", "observe", "reference"} <= set(ran.ran[0])
    assert ran.ran[1] == ["quantize", "compile", "validate"]
    assert ran.ran[2] == ["calibrate", "quantize", "compile", "validate"]
    assert matrix.rows[0].reused == ()
    assert matrix.rows[1].reused == ("export", "reference")
    assert matrix.rows[2].reused == ("hygiene", "export", "observe", "reference")
    first = verify(Path(matrix.rows[0].bundle)).stages
    saved = sum(first[name].seconds for name in matrix.rows[2].reused)
    assert matrix.rows[2].saved_seconds == pytest.approx(saved, abs=0.01)
    assert saved > 0
    for row, more in zip(matrix.rows, ({}, {"precision": "fp16"}, {"method": "minmax"}), strict=True):
        alone = edgeres.build(write(), target="cpu", out=tmp_path / f"alone {row.name}", **more)
        assert models_of(Path(row.bundle)) == models_of(Path(alone.path))
        assert (row.verdict, row.drop_pp) == (alone.report.verdict, alone.report.drop_pp)
        edgeres.load(row.bundle).close()
        # Its own recipe, as resolved, is of one bundle, and repeats it.
        again = edgeres.build(row.bundle, out=tmp_path / f"again {row.name}")
        assert models_of(Path(again.path)) == models_of(Path(alone.path))


def test_what_cannot_be_compiled_here_becomes_a_bundle_that_waits_for_its_engine(write: Write, tmp_path: Path) -> None:
    path = write('target = "cpu"', 'target = "dla0"', 'target = "rtx"\nprecision = "fp16"')
    out = command("build", path, "--out", tmp_path / "out", "--json")
    rows = [msgspec.convert(row, Row) for row in json.loads(out.stdout)["rows"]]
    assert [(row.state, row.target, row.precision) for row in rows] == [
        (BUILT, "cpu", "int8"),
        (NEEDS_A_BOARD, "dla0", "int8"),
        (NEEDS_A_BOARD, "rtx", "fp16"),
    ]
    for row, target in zip(rows[1:], ("dla0", "rtx"), strict=True):
        manifest = verify(row.bundle)
        assert manifest.engines == ()
        assert row.verdict == manifest.report.verdict == "pass"
        assert manifest.report.backend == "cpu"  # of what the model means
        assert row.message.splitlines()[-1] == f"There: edgeres compile {Path(row.bundle).name} --target {target}"
        assert "cannot be compiled here" in row.message
        assert "pip install" in row.message
        assert any("made elsewhere" in text for text in row.warnings)
        assert manifest.recipe["engine"]["target"] == target
        with pytest.raises(BundleError, match="edgeres compile"):
            edgeres.load(row.bundle)
    assert rows[1].model_bytes == (Path(rows[1].bundle) / "model.int8.onnx").stat().st_size
    # Where it was made, it can be checked and built again; for another target its engine would have to be made here.
    checked = command("build", "--check", "--out", rows[2].bundle, "--json")
    assert json.loads(checked.stdout)["files"]["report.json"] == "same"
    again = edgeres.build(rows[2].bundle, out=tmp_path / "again")
    assert models_of(Path(again.path)) == models_of(Path(rows[2].bundle))
    with pytest.raises(MissingPackageError, match="needs the package"):
        edgeres.build(rows[2].bundle, target="dla0", out=tmp_path / "other")
    # It goes where its engine is made as any other bundle does.
    edgeres.unpack(edgeres.pack(rows[1].bundle).path, tmp_path / "there")
    assert verify(tmp_path / "there") == verify(rows[1].bundle)


def test_a_row_that_fails_stops_no_other(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Build.quantize

    def broken(self: Build, exported: object) -> object:
        if self.recipe.calibration.method == "entropy":
            raise BackendError("something that only this row has")
        return quantize(self, exported)

    monkeypatch.setattr(Build, "quantize", broken)
    path = write('target = "cpu"', 'name = "bad"\nmethod = "entropy"', 'name = "good"\nmethod = "minmax"')
    matrix = edgeres.build_matrix(path, out=tmp_path / "out")
    assert [row.state for row in matrix.rows] == [BUILT, FAILED, BUILT]
    assert matrix.rows[1].message == "something that only this row has"
    assert not matrix.good
    assert not (tmp_path / "out" / "net-bad").exists()
    assert "observe" in matrix.rows[2].reused


def test_the_exit_code_is_1_for_a_verdict_that_fails_and_for_a_row_that_does(write: Write, tmp_path: Path) -> None:
    good = write('target = "cpu"')
    assert "needs a board" not in command("build", good, "--out", tmp_path / "out").stdout
    bad = write('target = "cpu"', weights="nowhere.pth")
    failed = command("build", bad, "--out", tmp_path / "bad", code=1)
    assert "failed" in failed.stdout
    assert "nowhere.pth" in failed.stdout


def test_a_cluster_is_joined_once_for_all_rows(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    went = []

    class Counted(Alone):
        def look(self, samples: Samples) -> list[str]:
            went.append("looked")
            return super().look(samples)

    @contextlib.contextmanager
    def counted(cluster: str, warn: object) -> Iterator[Workforce]:
        went.append(f"joined {cluster}")
        yield Counted()
        went.append("left")

    for module in (matrix_module, pipeline):
        monkeypatch.setattr(module, "hired", counted)
    path = write('target = "cpu"', 'name = "other"\ntarget = "cpu"', weights="nowhere.pth")
    assert len(edgeres.build_matrix(path, out=tmp_path / "out", cluster="tcp://here").rows) == 2
    assert went == ["joined tcp://here", *["looked"] * 4, "left"]


def test_a_verdict_that_fails_is_not_good(tmp_path: Path) -> None:
    row = Row("a", "b", "int8", "cpu", BUILT, verdict="fail")
    assert not row.good
    for verdict in ("pass", "inconclusive", "unlabelled", ""):
        assert msgspec.structs.replace(row, verdict=verdict).good


def test_a_second_run_reuses_its_own_bundles_and_keeps_engines_of_a_board(write: Write, tmp_path: Path) -> None:
    path = write('target = "cpu"', 'target = "gpu"')
    first = edgeres.build_matrix(path, out=tmp_path / "out")
    place = Path(first.rows[1].bundle)
    # As if it had been compiled there, and copied back: the CPU's engine, under the other name, is as good as any file.
    manifest = verify(place)
    (place / "engines").mkdir()
    (place / "engines/gpu.engine").write_bytes(b"a plan")
    bind_engine(place, manifest)
    assert edgeres.build(place).manifest.engines[0].target == "gpu"
    second = edgeres.build_matrix(path, out=tmp_path / "out")
    assert second.rows[1].state == BUILT
    assert (place / "engines/gpu.engine").read_bytes() == b"a plan"
    assert {"export", "observe", "quantize", "validate"} <= set(second.rows[1].reused)
    assert second.rows[0].seconds < first.rows[0].seconds


def bind_engine(place: Path, manifest: Manifest) -> None:
    from edgeres.artifacts import Engine, to_json
    from edgeres.compilation import with_engine
    from edgeres.files import file_ref

    engine = Engine("gpu", "tensorrt", "int8", file_ref(place, "engines/gpu.engine"), {"tensorrt": "10.3.0"}, {})
    changed = with_engine(manifest, engine, ())
    (place / "report.json").write_bytes(to_json(changed.report))
    (place / MANIFEST).write_bytes(to_json(changed))


def test_what_wants_one_bundle_says_so(write: Write, tmp_path: Path) -> None:
    path = write('target = "cpu"')
    with pytest.raises(RecipeError, match="several bundles"):
        edgeres.build(path)
    for arguments in (("export", path), ("calibrate", path), ("build", path, "--check", "--out", tmp_path)):
        assert "several bundles" in command(*arguments, code=1).stderr
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(BundleError, match="is a bundle, and one of several cannot lie in it"):
        edgeres.build_matrix(path, out=tmp_path)


def test_one_bundle_is_a_matrix_of_one_row(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = edgeres.build_matrix(write(), target="cpu").rows
    assert (row.name, row.bundle, row.state) == ("int8", "build/net-int8", BUILT)
    with pytest.raises(TypeError, match="build_matrix\\(\\) has no option 'colour'"):
        edgeres.build_matrix(write(), colour="red")
    assert issubclass(RecipeError, EdgeresError)


def test_a_lender_that_is_damaged_lends_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken over is checked by its hash; the stage is run again."""
    ran = Ran()
    row = Ran.row

    def damage(self: Ran, number: int, total: int, text: str) -> None:
        if number == 2:
            (tmp_path / "out/net-int8-cpu/statistics.npz").write_bytes(b"damaged")
        row(self, number, total, text)

    monkeypatch.setattr(Ran, "row", damage)
    path = write('target = "cpu"', 'name = "other"\nmethod = "minmax"\ntarget = "cpu"')
    matrix = edgeres.build_matrix(path, out=tmp_path / "out", progress=ran)
    assert matrix.good
    assert "observe" in ran.ran[1]
    assert "export" not in ran.ran[1]
