"""What ``edgeres doctor`` says of a machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from edgeres import doctor
from edgeres.doctor import ABILITIES, DISTRIBUTIONS, examine
from edgeres.provenance import version

GPU = "compile for and run on a GPU by TensorRT"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have none of the packages that edgeres may ask for."""
    needed = {package for _, packages, _ in ABILITIES for package in packages}
    find = importlib.util.find_spec

    def find_none(name: str, package: Optional[str] = None) -> object:
        return None if name in needed else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_none)


def test_the_facts_are_this_machines() -> None:
    facts = examine()
    assert facts["python"] == platform.python_version()
    assert platform.machine() in facts["system"]
    assert facts["cores"] == os.cpu_count()
    assert facts["packages"]["onnxruntime"] == version("onnxruntime")
    assert facts["cpu_int8"]
    json.dumps(facts, allow_nan=False)


def test_the_memory_is_that_of_the_kernel() -> None:
    line = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert line is not None
    assert abs(examine()["memory_bytes"] - 1024 * int(line.group(1))) <= 0.01 * 1024 * int(line.group(1))


def test_a_machine_that_hides_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", refuse)
    assert examine()["memory_bytes"] == 0


def test_an_ability_is_there_just_where_nothing_is_missing() -> None:
    abilities = examine()["abilities"]
    assert [ability["what"] for ability in abilities] == [*(what for what, _, _ in ABILITIES), GPU]
    for ability, (_, needed, _) in zip(abilities, ABILITIES):
        there = [importlib.util.find_spec(package) is not None for package in needed]
        assert ability["can"] == all(there)
        assert len(ability["missing"]) == there.count(False)
        assert (ability["install"] is None) == ability["can"]


def test_what_signatures_need_is_among_what_it_names() -> None:
    facts = examine()
    assert facts["packages"]["cryptography"] == version("cryptography")
    assert any(ability["what"] == "sign bundles, and check signatures" for ability in facts["abilities"])


@pytest.mark.usefixtures("bare")
def test_a_bare_machine_is_told_what_to_install() -> None:
    facts = examine()
    assert facts["cpu_int8"] == "onnxruntime is not installed"
    for ability, (_, needed, extra) in zip(facts["abilities"], ABILITIES):
        assert not ability["can"]
        assert ability["missing"] == [DISTRIBUTIONS.get(package, package) for package in needed]
        assert ability["install"] == f"pip install 'edgeres[{extra}]'"


def test_every_extra_that_it_names_exists() -> None:
    extras = set(
        re.findall(r"^([a-z]+) = \[$", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {extra for _, _, extra in doctor.ABILITIES} <= extras


def gpu_facts(**given: object) -> Dict[str, Any]:
    """Return the facts of a machine with nothing but what is given."""
    bare: Dict[str, Any] = {
        "tensorrt": None,
        "tensorrt_rtx": None,
        "cuda_python": None,
        "pycuda": None,
        "gpu_usable": False,
        "jetson": {},
    }
    return {**bare, **given}


L4T = {
    "5": "# R35 (release), REVISION: 4.1, GCID: 33958178",
    "6": "# R36 (release), REVISION: 4.3, GCID: 38968081",
    "7": "# R38 (release), REVISION: 2.0, GCID: 41844464",
}


@pytest.mark.parametrize(
    ("facts", "missing", "install"),
    [
        (gpu_facts(), ["tensorrt", "cuda-bindings or pycuda"], "pip install 'edgeres[tensorrt]'"),
        (gpu_facts(tensorrt="10.3.0"), ["cuda-bindings or pycuda"], "pip install cuda-bindings"),
        (gpu_facts(pycuda="2026.1"), ["tensorrt"], "pip install 'edgeres[tensorrt]'"),
        (gpu_facts(tensorrt="10.3.0", cuda_python="12.9"), [], "an NVIDIA GPU and its driver"),
        (
            gpu_facts(tensorrt="8.5.2.2", jetson={"l4t": L4T["5"]}),
            ["cuda-bindings or pycuda"],
            "pip install 'cuda-python==11.8.*'",
        ),
        (
            gpu_facts(tensorrt="10.3.0", jetson={"l4t": L4T["6"]}),
            ["cuda-bindings or pycuda"],
            "pip install 'cuda-bindings==12.*'",
        ),
        (
            gpu_facts(tensorrt="10.13.3", jetson={"l4t": L4T["7"]}),
            ["cuda-bindings or pycuda"],
            "pip install 'cuda-bindings==13.*'",
        ),
        (
            gpu_facts(tensorrt="8.4", jetson={"l4t": "# R34 (release), REVISION: 1.1"}),
            ["cuda-bindings or pycuda"],
            "pip install pycuda",
        ),
    ],
)
def test_what_is_missing_for_a_gpu_is_named_with_the_command(
    facts: Dict[str, Any], missing: List[str], install: str
) -> None:
    ability = doctor.tensorrt_ability(facts)
    assert ability == {"what": GPU, "can": False, "missing": missing, "install": install}


def test_a_jetson_without_tensorrt_is_sent_to_its_own() -> None:
    ability = doctor.tensorrt_ability(gpu_facts(jetson={"l4t": L4T["6"]}, cuda_python="12.9"))
    assert ability["install"].startswith("sudo apt install python3-libnvinfer")
    assert "pip install" not in ability["install"]
    both = doctor.tensorrt_ability(gpu_facts(jetson={"l4t": L4T["5"]}))["install"]
    assert "python3-libnvinfer" in both
    assert both.endswith("pip install 'cuda-python==11.8.*'")


def test_with_everything_there_a_gpu_can_be_used() -> None:
    ability = doctor.tensorrt_ability(gpu_facts(tensorrt="10.3.0", pycuda="2026.1", gpu_usable=True))
    assert ability == {"what": GPU, "can": True, "missing": [], "install": None}


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("# R35 (release), REVISION: 2.1, GCID: 1", "5.1"),
        ("# R35 (release), REVISION: 6.4, GCID: 1", "5.1"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "6.0"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "6.1 or newer"),
        ("# R36 (release), REVISION: 5.0, GCID: 1", "6.1 or newer"),
        ("# R38 (release), REVISION: 2.1, GCID: 1", "7.0"),
        ("# R38 (release), REVISION: 4.0, GCID: 1", "7.1"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "7.2 or newer"),
        ("# R32 (release), REVISION: 7.1, GCID: 1", None),
        ("something else", None),
    ],
)
def test_a_jetson_is_known_by_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, jetpack: Optional[str]
) -> None:
    (tmp_path / "release").write_text(f"{release}\nmore\n", encoding="utf-8")
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    monkeypatch.setattr(doctor, "RELEASE", tmp_path / "release")
    monkeypatch.setattr(doctor, "MODEL", tmp_path / "model")
    found = doctor.jetson()
    assert found["model"] == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert found["l4t"] == release
    assert found.get("jetpack") == jetpack


def test_any_other_machine_is_no_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"Raspberry Pi 4 Model B\0")
    monkeypatch.setattr(doctor, "RELEASE", tmp_path / "absent")
    monkeypatch.setattr(doctor, "MODEL", tmp_path / "model")
    assert doctor.jetson() == {}
