"""What ``edgeres doctor`` says of a machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Optional

import pytest

from edgeres import doctor
from edgeres.doctor import ABILITIES, DISTRIBUTIONS, examine
from edgeres.provenance import version

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
    assert [ability["what"] for ability in abilities] == [what for what, _, _ in ABILITIES]
    for ability, (_, needed, _) in zip(abilities, ABILITIES):
        there = [importlib.util.find_spec(package) is not None for package in needed]
        assert ability["can"] == all(there)
        assert len(ability["missing"]) == there.count(False)
        assert (ability["install"] is None) == ability["can"]


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
