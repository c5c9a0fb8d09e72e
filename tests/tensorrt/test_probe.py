"""Whether a GPU is used, for which flavour, and what is said where none is: by packages that lie on disk."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeres import targets
from edgeres.backends.tensorrt import child, module, probe
from edgeres.errors import MissingPackageError
from edgeres.recipe import EngineSection

BROKEN = "raise ImportError('libnvinfer.so.10: cannot open shared object file')\n"
NO_TRACE = Path("/nowhere/at/all")

SAME_PATH = "import json, os, sys; sys.path[:] = json.loads(os.environ['EDGERES_SYS_PATH'])\n"
ASK = """
import json, sys
from edgeres.targets import gpu_obstacle, resolve
from edgeres.recipe import EngineSection
reason = gpu_obstacle("tensorrt")
loaded = [name for name in ("tensorrt", "cuda", "pycuda") if name in sys.modules]
print(json.dumps([reason, resolve(EngineSection()), loaded]))
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the path, and no trace of NVIDIA elsewhere."""
    for name in ("tensorrt", "tensorrt_rtx", "cuda", "pycuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "JETSON", NO_TRACE)
    monkeypatch.setattr(probe, "DRIVER", NO_TRACE)
    return tmp_path


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else real(name, *more))


def ask(packages: Path) -> list[Any]:
    """Return what a program finds out, and which of the packages it has loaded for that."""
    done = subprocess.run(
        [sys.executable, "-c", SAME_PATH + ASK], env=child.environment(), stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def test_who_only_asks_loads_neither_tensorrt_nor_cuda(packages: Path) -> None:
    (packages / "tensorrt.py").write_text(
        "__version__ = '10.3.0'\n" + f"open({str(packages / 'seen')!r}, 'w').close()\n"
    )
    reason, resolved, loaded = ask(packages)
    assert (packages / "seen").exists()  # it was asked
    assert loaded == []
    assert resolved == ["cpu", "cpu"]
    assert "driver" in reason or "cuda-python or pycuda" in reason


def test_what_is_broken_or_dies_is_the_reason(packages: Path) -> None:
    (packages / "tensorrt.py").write_text(BROKEN)
    reason, resolved, loaded = ask(packages)
    assert "libnvinfer.so.10: cannot open shared object file" in reason
    assert (resolved, loaded) == (["cpu", "cpu"], [])
    (packages / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert "did not answer" in ask(packages)[0]


def test_the_choice_that_was_left_open_tells_why_it_is_the_cpu(packages: Path) -> None:
    left, chosen = EngineSection(), EngineSection(backend="cpu")
    assert targets.cpu_instead(left) is None  # a machine without a trace of NVIDIA: nobody wonders
    (packages / "tensorrt.py").write_text(BROKEN)
    targets.gpu_obstacle.cache_clear()
    said = targets.cpu_instead(left)
    assert said is not None
    assert "for the CPU" in said
    assert "libnvinfer.so.10" in said
    assert targets.cpu_instead(chosen) is None
    assert targets.cpu_instead(EngineSection(target="cpu")) is None


@pytest.mark.parametrize("trace", ["jetson", "driver"])
def test_a_robot_without_the_package_is_told_too(packages: Path, monkeypatch: pytest.MonkeyPatch, trace: str) -> None:
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    (packages / "trace").touch()
    place = (module, "JETSON") if trace == "jetson" else (probe, "DRIVER")
    monkeypatch.setattr(*place, packages / "trace")
    said = targets.cpu_instead(EngineSection())
    assert said is not None
    assert ("apt install python3-libnvinfer" in said) == (trace == "jetson")


def test_without_onnxruntime_the_cpu_is_refused_with_both_reasons(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime", "tensorrt")
    with pytest.raises(MissingPackageError, match=r"(?s)edgeres\[tensorrt\].*onnxruntime.*edgeres\[cpu\]"):
        targets.require_onnxruntime(EngineSection())
    for section in (EngineSection(backend="cpu"), EngineSection(target="cpu")):
        with pytest.raises(MissingPackageError) as caught:
            targets.require_onnxruntime(section)
        assert "tensorrt" not in str(caught.value)
