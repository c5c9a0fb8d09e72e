"""`edgeres bench` from outside, on the embedded default: what it prints, keeps and refuses. No time is judged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgeres as package
from command_line import edgeres
from edgeres import cli
from edgeres.artifacts import from_json
from edgeres.benchmark import median_interval
from edgeres.bundle import unlisted, verify
from edgeres.exits import exit_code
from edgeres.measurements import Benchmark

BUNDLE = "build/digits-int8"
SHORT = ("--runs", "8", "--warmup", "0", "--batch", "1,3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the embedded default, built once, as quickly as can be."""
    folder = tmp_path_factory.mktemp("robot")
    package.build(out=folder / BUNDLE, recovery="none", calibration_count=32)
    return folder


def test_the_answer_is_one_object_and_the_bundle_stays(place: Path) -> None:
    before = {path.name: path.read_bytes() for path in (place / BUNDLE).iterdir()}
    done = edgeres("bench", BUNDLE, *SHORT, "--frames", "24x40", "--out", "kept/bench.json", "--json", cwd=place)
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    rows = [(row["model"], row["batch"], row["calls"]) for row in answer["latencies"]]
    assert rows == [(model, n, 8) for n in (1, 3) for model in ("int8", "fp32", "int8 from 24×40 frames")]
    for row in answer["latencies"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["mean_ms"])
    assert answer["memory"].keys() == {"int8", "fp32"}
    assert answer["resident_bytes"] > 1 << 20
    kept = from_json((place / "kept/bench.json").read_bytes(), Benchmark, "bench.json")
    assert kept.latencies[0].p50_ms == answer["latencies"][0]["p50_ms"]
    assert {path.name: path.read_bytes() for path in (place / BUNDLE).iterdir()} == before
    assert unlisted(place / BUNDLE, verify(place / BUNDLE)) == []


def test_verdict_and_words_follow_from_the_rounds(place: Path) -> None:
    answer = json.loads(edgeres("bench", BUNDLE, *SHORT, "--json", cwd=place).stdout)
    rounds = {(row["model"], row["batch"]): np.array(row["rounds_ms"]) for row in answer["latencies"]}
    assert [found["batch"] for found in answer["speedups"]] == [1, 3]
    for found, text in zip(answer["speedups"], answer["answers"], strict=True):
        ratios = rounds["fp32", found["batch"]] / rounds["int8", found["batch"]]
        assert found["ratio"] == pytest.approx(np.median(ratios))
        assert found["ci95"] == pytest.approx(median_interval(ratios))
        low, high = found["ci95"]
        assert found["verdict"] == ("faster" if low > 1 else "slower" if high < 1 else "undecided")
        words = {"faster": "times as fast as FP32", "slower": "does not pay", "undecided": "is open"}
        assert words[found["verdict"]] in text


def test_people_get_a_table_and_the_words(place: Path) -> None:
    out = edgeres("bench", BUNDLE, *SHORT, cwd=place).stdout
    text = " ".join(out.split())  # lines break where they must
    assert all(word in text for word in ("p99", "images/s", "int8", "fp32", "memory", "Batch 3: ", "on this CPU"))
    assert "\x1b" not in out


def test_alone_and_against(place: Path) -> None:
    options = ("--runs", "6", "--warmup", "0", "--batch", "2", "--threads", "1", "--json")
    alone = json.loads(edgeres("bench", BUNDLE, "--alone", *options, cwd=place).stdout)
    assert [row["model"] for row in alone["latencies"]] == ["int8"]
    assert alone["threads"] == 1
    against = json.loads(edgeres("bench", BUNDLE, "--alone", "--against", BUNDLE, *options, cwd=place).stdout)
    assert [found["against"] for found in against["speedups"]] == [f"int8 of {BUNDLE}"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none"], 1, ["none", "edgeres build"]),
        ([BUNDLE, "--backend", "tensorrt"], 1, ["tensorrt", "edgeres compile"]),
        ([BUNDLE, "--against", "none"], 1, ["none", "edgeres build"]),
        ([BUNDLE, "--batch", "1,0"], 2, ["1,8,32"]),
        ([BUNDLE, "--batch", "many"], 2, ["1,8,32"]),
        ([BUNDLE, "--runs", "0"], 2, ["--runs"]),
        ([BUNDLE, "--seconds", "0"], 2, ["--seconds"]),
        ([BUNDLE, "--out", f"{BUNDLE}/manifest.json"], 2, ["in the bundle"]),
        ([BUNDLE, *SHORT, "--frames", "40x40", "--out", "/proc/bench.json"], 1, ["cannot write"]),
        ([], 2, ["BUNDLE"]),
    ],
)
def test_bad_input_is_a_sentence(place: Path, arguments: list[str], code: int, words: list[str]) -> None:
    done = edgeres("bench", *arguments, cwd=place, code=code)
    assert all(word in done.stderr for word in words), done.stderr


def test_a_missing_engine_package_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert exit_code(cli.cli, ["bench", str(place / BUNDLE), *SHORT]) == 1
    assert "pip install 'edgeres[cpu]'" in capsys.readouterr().err


def test_an_interrupt_ends_it(place: Path) -> None:
    code = (
        "import signal, sys; from edgeres import cli, twins; turns = twins.take_turns\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "def told(*arguments):\n"
        "    print('begun', file=sys.stderr, flush=True)\n"
        "    return turns(*arguments)\n"
        "twins.take_turns = told\n"
        f"cli.main(['bench', '{BUNDLE}', '--seconds', '500'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def test_a_robot_needs_neither_torch_nor_onnx(place: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'numba', 'scipy', 'PIL', 'safetensors'): sys.modules[name] = None\n"
        f"from edgeres.cli import main; main(['bench', '{BUNDLE}', '--runs', '6', '--batch', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "option", [("--seconds", "nan"), ("--seconds", "inf"), ("--warmup", "nan"), ("--threads", "9999")], ids="=".join
)
def test_numbers_that_nothing_can_take_are_refused(option: tuple[str, str], place: Path) -> None:
    done = edgeres("bench", BUNDLE, *option, cwd=place, code=2)
    assert option[0] in done.stderr


def test_a_batch_beyond_memory_is_a_sentence(place: Path) -> None:
    done = edgeres("bench", BUNDLE, "--batch", "9999999999999", "--runs", "1", cwd=place, code=1)
    assert "not enough memory" in done.stderr
