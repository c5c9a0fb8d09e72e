"""Real plans and the real runtime of TensorRT for RTX, without a GPU: what it refuses, in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

OPEN = """
import json, sys
sys.path.insert(0, sys.argv[3])
from tiny_tensorrt import HostDevice
from edgeres.backends.tensorrt.session import open_session
from edgeres.errors import BackendError

plan = open(sys.argv[1], "rb").read()
said = {}
for name, content in {
    "empty": b"",
    "short": plan[:20],
    "text": b"no plan at all\\n" * 99,
    "half": plan[: len(plan) // 2],
    "a byte short": plan[:-1],
    "a byte long": plan + b"x",
    "another header": b"ftrt" + plan[4:],
    "whole": plan,
}.items():
    device = HostDevice()
    try:
        open_session(content, json.loads(sys.argv[2]), flavour="tensorrt-rtx", device=device, place="build/net")
    except BackendError as problem:
        said[name] = [str(problem), device.held]
print("\\n" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(rtx: Any, small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What opening a plan ends with, by what was done to it, and how much was not freed."""
    plan = tmp_path_factory.mktemp("plans") / "a.engine"
    result = rtx.build(small.request(plan))
    place = str(Path(__file__).with_name("libcuda"))
    facts = msgspec.json.encode({**result.built_for, "cuda": ""}).decode()
    answers: dict[str, list[Any]] = json.loads(rtx.run(OPEN, str(plan), facts, place).splitlines()[-1])
    return answers


@pytest.mark.parametrize("damage", ["empty", "short", "text", "half", "a byte short", "a byte long", "another header"])
def test_a_damaged_plan_is_refused_in_tensorrts_words_with_what_to_do(damage: str, said: dict[str, list[Any]]) -> None:
    text, held = said[damage]
    assert text.startswith("TensorRT for RTX 1.7.1 failed at opening this plan: ")
    assert "it gave no reason" not in text
    assert text.endswith("Compile it again: edgeres compile build/net")
    assert held == 0


def test_a_whole_plan_without_a_driver_is_not_called_damaged(said: dict[str, list[Any]]) -> None:
    text, held = said["whole"]
    assert "CUDA driver version is insufficient" in text
    assert text.endswith("The NVIDIA driver is older than this package wants: edgeres doctor")
    assert held == 0
