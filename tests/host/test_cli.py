"""The command line from outside: a process, its exit code, and what stands on stdout and stderr."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from command_line import edgeres
from edgeres import cli
from edgeres.bundle import verify
from edgeres.recipe import dossier
from edgeres.runtime.loading import load
from edgeres.samples import open_samples

REPORT_KEYS = {
    "samples", "top1_reference", "top1_engine", "drop_pp", "drop_ci95_pp", "discordant", "agreement", "sqnr_db",
    "max_drop_pp", "verdict", "backend", "precision",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `edgeres build` has been run once, with --json; its answer is in ``answer.json``."""
    folder = tmp_path_factory.mktemp("user")
    done = edgeres("build", "--precision", "int8", "--json", cwd=folder)
    assert done.stderr == ""
    (folder / "answer.json").write_text(done.stdout)
    return folder


def test_build_answers_json(place: Path) -> None:
    answer = json.loads((place / "answer.json").read_text())
    assert set(answer["validation"]) >= {*REPORT_KEYS, "outcome"}
    assert answer["validation"]["discordant"].keys() == {"only_reference_correct", "only_engine_correct"}
    assert (place / "build/digits-int8/manifest.json").is_file()
    assert answer["stages"]["observe"] == {
        "seconds": answer["stages"]["observe"]["seconds"],
        "reused": False,
        "files": ["statistics.npz"],
    }
    assert answer["files"]["model.int8.onnx"]


def test_build_prints_both_accuracies_and_says_what_it_reused(place: Path) -> None:
    out = edgeres("build", cwd=place).stdout
    assert "FP32" in out
    assert "INT8" in out
    assert "top-1" in out
    assert out.count("reused") == 9
    assert "\x1b" not in out  # no colour codes where there is no terminal


def test_validate_is_a_gate(place: Path) -> None:
    done = edgeres("validate", "build/digits-int8", "--max-drop", "1", "--json", cwd=place)
    assert set(json.loads(done.stdout)) >= {*REPORT_KEYS, "outcome"}
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(place / "few.npz", images=frames, labels=np.zeros(20, np.int64))
    edgeres("validate", "build/digits-int8", "--validation", "few.npz", cwd=place, code=3)
    edgeres(
        "validate", "build/digits-int8", "--validation", "few.npz", "--policy", "point", "--max-drop", "100", cwd=place
    )
    np.save(place / "unlabelled.npy", frames)
    gate = ("validate", "build/digits-int8", "--validation", "unlabelled.npy")
    assert "without labels" in edgeres(*gate, cwd=place, code=3).stdout
    edgeres(*gate, "--policy", "point", cwd=place, code=3)
    before = (place / "build/digits-int8/manifest.json").read_bytes()
    assert verify(place / "build/digits-int8").report is not None
    assert (place / "build/digits-int8/manifest.json").read_bytes() == before


def test_a_ruined_build_fails_and_so_does_its_gate(place: Path) -> None:
    np.save(place / "grey.npy", np.full((4, 32, 32, 3), 128, np.uint8))
    done = edgeres("build", "--calibration", "grey.npy", "--out", "ruined", "--json", cwd=place, code=1)
    assert json.loads(done.stdout)["validation"]["verdict"] == "fail"
    done = edgeres("validate", "ruined", "--baseline", "build/digits-int8/report.json", cwd=place, code=1)
    assert "against the baseline it loses" in done.stdout
    assert "fell" in done.stdout


def test_a_build_writes_its_page_and_binds_it(place: Path) -> None:
    """The same build, all of it reused or nothing, has the same page; `report` finds nothing to change."""
    bundle = place / "build/digits-int8"
    page = (bundle / "report.html").read_bytes()
    assert "report.html" in [ref.path for ref in verify(bundle).files]
    assert verify(bundle).report is not None
    assert b"pass" in page[: page.index(b"</header>")]
    edgeres("build", cwd=place)
    assert (bundle / "report.html").read_bytes() == page
    before = (bundle / "manifest.json").read_bytes()
    done = edgeres("report", "build/digits-int8", cwd=place)
    assert done.stdout.strip() == str(bundle / "report.html")
    assert (bundle / "manifest.json").read_bytes() == before
    assert (bundle / "report.html").read_bytes() == page


def test_diff_informs_and_is_no_gate(place: Path) -> None:
    """The oracle are the two engines themselves, run here."""
    names = ("build/digits-int8", "ruined")
    found = json.loads(edgeres("diff", *names, "--json", cwd=place).stdout)
    samples, answers = open_samples(dossier() / "digits/validation", labelled=True), []
    for name in names:
        with load(place / name) as engine:
            batches = samples.batches(engine.manifest.preprocessing, 64)
            answers.append(np.concatenate([engine(batch) for batch in batches]).argmax(1))
    reference = np.load(place / "ruined/reference.npz")
    changed = np.flatnonzero(answers[0] != answers[1])
    assert [row["name"] for row in found["answers"]] == reference["names"][changed].tolist()
    right = [int(np.sum(one == reference["labels"])) for one in answers]
    assert found["accuracy"]["drop_pp"] == pytest.approx(100 * (right[0] - right[1]) / len(reference["labels"]))
    assert found["recipe"]["calibration.samples"][1].endswith("grey.npy")
    assert len(found["ranges"]) >= 8
    out = edgeres("diff", *names, cwd=place).stdout
    assert f"(20 of {len(changed)}; all: --json)" in out
    assert "The second loses" in out
    assert "\x1b" not in out
    edgeres("diff", names[0], "nowhere", cwd=place, code=1)


def test_a_baseline_is_written_by_hand_and_compared_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ("validate", "build/digits-int8", "--max-drop", "1", "--baseline", "accepted.json")
    assert "--update-baseline" in edgeres(*gate, cwd=place, code=1).stderr  # there is none yet
    monkeypatch.setenv("CI", "true")
    assert "by hand" in edgeres(*gate, "--update-baseline", cwd=place, code=2).stderr
    assert not (place / "accepted.json").exists()
    monkeypatch.delenv("CI")
    edgeres(*gate, "--update-baseline", cwd=place)
    found = json.loads(edgeres(*gate, "--json", cwd=place).stdout)
    assert found["baseline"]["drop_pp"] == 0
    assert found["baseline"]["agreement"] == 1
    (place / "printed.json").write_text(json.dumps(found))  # what --json prints is a report, too
    printed = (*gate[:-1], "printed.json", "--json")
    assert json.loads(edgeres(*printed, cwd=place).stdout)["baseline"]["agreement"] == 1
    assert "against the baseline it keeps top-1" in edgeres(*gate, cwd=place).stdout
    np.savez(place / "other.npz", images=np.zeros((20, 32, 32, 3), np.uint8), labels=np.zeros(20, np.int64))
    assert "other samples" in edgeres(*gate, "--validation", "other.npz", cwd=place, code=1).stderr
    (place / "accepted.json").write_text("{}")
    assert "accepted.json" in edgeres(*gate, cwd=place, code=1).stderr
    edgeres("validate", "build/digits-int8", "--update-baseline", cwd=place, code=2)


def test_stages_continue_a_bundle(place: Path) -> None:
    names = ["model.fp32.onnx", "calibration.json", "model.int8.onnx"]
    edgeres("export", "--out", "steps", cwd=place)
    assert [(place / "steps" / name).is_file() for name in names] == [True, False, False]
    edgeres("calibrate", "steps", "--method", "entropy", cwd=place)
    assert [(place / "steps" / name).is_file() for name in names] == [True, True, False]
    done = edgeres("quantize", "steps", "--json", cwd=place)
    assert json.loads(done.stdout)["stages"]["calibrate"]["reused"]
    assert json.loads(done.stdout)["validation"] is None
    edgeres("compile", "steps", cwd=place)
    edgeres("validate", "steps", cwd=place)
    edgeres("build", "steps", cwd=place)
    # an earlier stage that changes nothing takes nothing away
    edgeres("calibrate", "steps", cwd=place)
    assert verify(place / "steps").report is not None


def test_inspect_explains_each_layer(place: Path) -> None:
    facts = json.loads(edgeres("inspect", "build/digits-int8", "--json", cwd=place).stdout)
    layers = {layer["module"]: layer for layer in facts["layers"] if layer["type"] in ("Conv", "Gemm")}
    assert set(layers) >= {"conv1", "layer1.0.conv1", "layer3.0.conv2", "fc"}
    assert {layer["precision"] for layer in layers.values()} == {"int8"}
    assert all(layer["reason"] for layer in facts["layers"])
    assert facts["ranges"]["input"]["amax"] == pytest.approx(1.0, abs=0.05)
    text = edgeres("inspect", "build/digits-int8", cwd=place).stdout
    assert "layer3.0.conv2" in text
    file = json.loads(edgeres("inspect", "build/digits-int8/model.int8.onnx", "--json", cwd=place).stdout)
    assert file["lint"] == []
    assert {layer["precision"] for layer in file["layers"] if layer["type"] == "Conv"} == {"int8"}


def test_verify_finds_a_flipped_bit(place: Path) -> None:
    edgeres("build", "--out", "flipped", cwd=place)
    edgeres("verify", "flipped", cwd=place)
    path = place / "flipped/reference.npz"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    assert "reference.npz" in edgeres("verify", "flipped", cwd=place, code=1).stderr
    assert "reference.npz" in edgeres("validate", "flipped", cwd=place, code=1).stderr


def test_compile_replaces_the_engine_of_its_target_and_nothing_else(place: Path) -> None:
    edgeres("build", "--out", "compiled", cwd=place)
    telling = ("manifest.json", "report.html")  # of the engine that is there now
    before = {path.name: path.read_bytes() for path in (place / "compiled").iterdir() if path.name not in telling}
    answer = json.loads(edgeres("compile", "compiled", "--backend", "cpu", "--json", cwd=place).stdout)
    assert (answer["target"], answer["backend"], answer["file"]["path"]) == ("cpu", "cpu", "model.int8-cpu.onnx")
    assert {"int8 in integers", "int8 in float", "fp32"} <= answer["measured_ms"].keys()
    manifest = verify(place / "compiled")
    assert [engine.target for engine in manifest.engines] == ["cpu"]
    assert manifest.report is not None
    assert before == {
        path.name: path.read_bytes() for path in (place / "compiled").iterdir() if path.name not in telling
    }
    assert "report.html" in [ref.path for ref in manifest.files]
    targets = {
        row["target"]: row for row in json.loads(edgeres("compile", "--list-targets", "--json", cwd=place).stdout)
    }
    assert set(targets) == {"cpu", "gpu", "dla0", "dla1", "rtx"}
    assert targets["cpu"]["obstacle"] is None


def test_models_and_doctor(place: Path) -> None:
    entries = {entry["name"]: entry for entry in json.loads(edgeres("models", "--json", cwd=place).stdout)}
    assert entries["resnet50"]["parameters"] == 25_557_032
    assert entries["resnet50"]["macs"] == pytest.approx(4.089e9, rel=1e-3)
    facts = json.loads(edgeres("doctor", "--json", cwd=place).stdout)
    assert all(ability["can"] for ability in facts["abilities"] if "GPU" not in ability["what"])
    assert "onnxruntime" in edgeres("doctor", cwd=place).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "--model", "resnet51"], 1, ["resnet51", "resnet50"]),
        (["build", "--model", "resnet20_cifar"], 1, ["--calibration FOLDER"]),
        (
            ["build", "--weights", "none.pth", "--calibration", "none", "--validation", "neither"],
            1,
            ["none.pth", "none ", "neither"],
        ),
        (
            ["build", "--max-drop", "-1", "--calibration-count", "0"],
            1,
            ["options: 2 problems", "--max-drop: -1", "--calibration-count: 0"],
        ),
        (["build", "--out", "."], 1, ["not a bundle", "--out"]),
        (["build", "--out", "answer.json"], 1, ["not a folder"]),
        (["build", "--out", "answer.json/below"], 1, ["cannot write"]),
        (["build", "none.toml"], 1, ["none.toml"]),
        (["build", "--model", "none.onnx", "--calibration", "build"], 1, ["none.onnx"]),
        (["build", "--weights", "answer.json"], 1, ["answer.json"]),
        (["build", "--backend", "tensorrt"], 1, ["tensorrt", "pip install"]),
        (["build", "--backend", "cpu", "--target", "rtx"], 1, ["rtx", "--list-targets"]),
        (["compile", "build/digits-int8", "--target", "gpu"], 1, ["tensorrt", "pip install"]),
        (["compile", "build/digits-int8", "--target", "moon"], 1, ["moon", "rtx"]),
        (["compile"], 2, ["name the bundle"]),
        (["build", "--batch", "8,1,4"], 1, ["--batch: [8, 1, 4]"]),
        (["build", "--precision", "int4"], 2, ["int4"]),
        (["build", "--nonsense"], 2, ["--nonsense"]),
        (["build", "--input-size", "big"], 2, ["224x160"]),
        (["build", "--mean", "1,2"], 2, ["three numbers"]),
        (["nonsense"], 2, ["nonsense"]),
        (["validate", "none"], 1, ["none", "edgeres build"]),
        (["verify", "."], 1, ["manifest.json"]),
        (["inspect", "answer.json"], 1, ["answer.json"]),
        (["build", "--model", "no_such_module:net", "--calibration", "grey.npy"], 1, ["no_such_module"]),
    ],
)
def test_bad_input_is_a_sentence(place: Path, arguments: list[str], code: int, words: list[str]) -> None:
    np.save(place / "grey.npy", np.full((4, 32, 32, 3), 128, np.uint8))
    done = edgeres(*arguments, cwd=place, code=code)
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stdout == ""


def test_corrupt_checkpoints_are_refused(place: Path) -> None:
    weights = (dossier() / "digits/weights.safetensors").read_bytes()
    for name, content in (
        ("cut.safetensors", weights[:-100]),
        ("junk.pth", b"junk"),
        ("empty.pt", b""),
        ("renamed.pth", weights),
    ):
        (place / name).write_bytes(content)
        assert name in edgeres("build", "--weights", name, "--out", "refused", cwd=place, code=1).stderr
    assert not (place / "refused").exists()


def test_interrupt_leaves_the_bundle_whole_and_the_next_build_goes_on(place: Path) -> None:
    edgeres("build", "--out", "interrupted", cwd=place)
    before = {path.name: path.read_bytes() for path in (place / "interrupted").iterdir()}
    records = place / ".interrupted.work/.stages"
    command = [sys.executable, "-m", "edgeres", "build", "--out", "interrupted", "--calibration-count", "150"]
    process = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (records / "export.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 0), stderr  # 0: it was faster than the signal
    assert "Traceback" not in stderr
    if process.returncode == 130:
        assert before == {path.name: path.read_bytes() for path in (place / "interrupted").iterdir()}
    edgeres("build", "--out", "interrupted", "--calibration-count", "150", cwd=place)
    verify(place / "interrupted")
    assert not (place / ".interrupted.work").exists()


def test_a_full_disk_is_a_sentence_and_loses_nothing(place: Path) -> None:
    edgeres("build", "--out", "full", cwd=place)
    before = {path.name: path.read_bytes() for path in (place / "full").iterdir()}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from edgeres.cli import main; main(['build', '--out', 'full', '--method', 'entropy', '--seed', '1'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr
    assert before == {path.name: path.read_bytes() for path in (place / "full").iterdir()}


BUNDLE = "build/digits-int8"
UNREAD = {
    "build": [()],
    "export": [("--out", "staged")],
    "calibrate": [("--out", "staged")],
    "quantize": [("--out", "staged")],
    "compile": [("unread", "--target", "cpu"), ("--list-targets",)],
    "validate": [(BUNDLE, "--max-drop", "1")],
    "bench": [(BUNDLE, "--runs", "1", "--warmup", "0", "--batch", "1")],
    "inspect": [(BUNDLE,), (f"{BUNDLE}/model.int8.onnx",)],
    "report": [(BUNDLE, "--out", "page.html")],
    "diff": [(BUNDLE, BUNDLE)],
    "verify": [(BUNDLE,)],
    "doctor": [()],
    "models": [()],
    "init": [("begun", "--ci", "none")],
    "keygen": [("another.pem",)],
    "sign": [("unread", "--key", "own.pem")],
    "pack": [(BUNDLE, "-o", "unread.edgeres")],
    "unpack": [("packed.edgeres", "--out", "unpacked")],
    "completion": [("bash",)],
    "manual": [()],
}
"""What each command is given where nobody reads its answer."""


def unread(place: Path, *arguments: str) -> tuple[int, str]:
    """Run a command whose answer goes into a pipe that nobody reads, and return its exit code and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgeres", *arguments]
    done = subprocess.run(command, cwd=place, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_a_command_that_nobody_reads_to_its_end_is_no_failure(place: Path, name: str) -> None:
    """As when it is piped into `head`."""
    if name in ("compile", "sign"):
        shutil.copytree(place / BUNDLE, place / "unread", dirs_exist_ok=True)
    if name == "sign":
        edgeres("keygen", "own.pem", cwd=place)
    if name == "unpack":
        edgeres("pack", BUNDLE, "-o", "packed.edgeres", cwd=place)
    for arguments in UNREAD[name]:
        code, said = unread(place, name, *arguments)
        assert code == 0
        assert [line for line in said.splitlines() if "int8 does not pay on this CPU" not in line] == []


def test_a_gate_keeps_its_verdict_when_nobody_reads_it(place: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(place / "few.npz", images=frames, labels=np.zeros(20, np.int64))
    code, told = unread(place, "validate", BUNDLE, "--validation", "few.npz", "--json")
    assert code == 3
    assert told.startswith("warning: FP32 answers no better than chance")  # for noise it is, of which 20 are too few
    assert told.count("\n") == 1


def test_a_model_that_prints_does_not_spoil_the_json(place: Path) -> None:
    (place / "noisy_net.py").write_text(
        "import torch\nprint('hello from the import')\n"
        "def net():\n    print('hello from the model')\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(4, 10))\n"
    )
    np.save(place / "grey.npy", np.full((4, 32, 32, 3), 128, np.uint8))
    options = ["--model", "noisy_net:net", "--input-size", "32", "--calibration", "grey.npy", "--out", "noisy"]
    done = edgeres("build", *options, "--json", cwd=place)
    assert json.loads(done.stdout)["name"] == "net"
    assert "hello from the model" in done.stderr


def test_pipes_and_devices_are_refused_and_not_waited_for(place: Path) -> None:
    (place / "odd").mkdir()
    os.mkfifo(place / "odd/pipe.png")
    os.symlink("/dev/zero", place / "odd/zero.png")
    for name in ("pipe.txt", "pipe.npz", "pipe.toml", "pipe.onnx"):
        os.mkfifo(place / name)
    os.symlink("/dev/zero", place / "zero.txt")
    os.symlink("/dev/zero", place / "zero.toml")
    for source in ("odd", "pipe.txt", "pipe.npz", "zero.txt"):
        assert "ordinary file" in edgeres("build", "--calibration", source, "--out", "never", cwd=place, code=1).stderr
    for recipe in ("pipe.toml", "zero.toml"):
        assert "ordinary file" in edgeres("build", recipe, cwd=place, code=1).stderr
    edgeres("inspect", "pipe.onnx", cwd=place, code=1)


def test_control_characters_from_outside_do_not_reach_the_terminal(place: Path) -> None:
    (place / "names").mkdir()
    (place / "names/\x1b]0;owned\x07.png").write_bytes(b"junk")
    done = edgeres("build", "--calibration", "names", "--out", "never", cwd=place, code=1)
    assert "\x1b" not in done.stderr
    assert "\\x1b]0;owned" in done.stderr


def test_a_read_only_place_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    read_only = Path("/sys") if os.geteuid() == 0 else tmp_path  # where even root may not make a folder
    assert "cannot write" in edgeres("build", "--out", read_only / "bundle", cwd=Path.cwd(), code=1).stderr


@pytest.mark.parametrize("facts", [True, [True], [{"statistic": "brightness", "distance": ""}]])
def test_facts_in_a_manifest_are_checked_like_all_else(place: Path, facts: object) -> None:
    """Whoever can write a manifest can write into its stages; their hashes are of files."""
    shutil.copytree(place / BUNDLE, place / "told", dirs_exist_ok=True)
    manifest = json.loads((place / "told/manifest.json").read_text())
    manifest["stages"]["hygiene"]["facts"]["comparisons"] = facts
    (place / "told/manifest.json").write_text(json.dumps(manifest))
    assert "stage hygiene" in edgeres("inspect", "told", cwd=place, code=1).stderr
