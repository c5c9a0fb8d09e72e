"""What of each target can be built and run on a machine, with or without TensorRT, a GPU, a DLA, CUDA from Python."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeres import targets
from edgeres.backends.tensorrt import logger, module, obstacles
from edgeres.errors import BackendError, MissingPackageError


def _load() -> Any:
    """Return the double's package, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("tensorrt_double")
    if "tensorrt_double" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_double", place / "__init__.py")
        sys.modules["tensorrt_double"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tensorrt_double"])
    return sys.modules["tensorrt_double"]


DOUBLE = _load()
NO_DRIVER = "there is no usable NVIDIA driver here (no libcuda). Install it"
AGX, NANO, THOR = "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Jetson Orin Nano Developer Kit", "NVIDIA Jetson Thor"
TENSORRT = ("gpu", "dla0", "dla1")
every_version = pytest.mark.parametrize("version", DOUBLE.VERSIONS)


class Machine:
    """A machine with some TensorRT, some GPU or none, and some packages or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        monkeypatch.setattr(logger, "_LOGGERS", {})
        self.device: Any = None
        self.double: Any = None
        self.has(module="")

    def has(
        self, *, version: str = "10.3", device: Any = None, module: str = "", seen: bool = False, cores: int = 0
    ) -> None:
        """``device`` is True, or the error that opening one raises; ``seen`` is what the driver itself says."""
        self.double = DOUBLE.Double(version, DOUBLE.Script(dla_cores=cores))
        self._patch.setitem(sys.modules, "tensorrt", self.double.module)
        self.device = DOUBLE.HostDevice(self.double)

        def open_device() -> Any:
            if isinstance(device, Exception):
                raise device
            return self.device

        self._patch.setattr(obstacles, "open_device", open_device)
        self._patch.setattr(obstacles, "jetson_module", lambda tree: module)
        self._patch.setattr(obstacles, "driver_sees_a_gpu", lambda: seen)

    def found(self, flavour: str = "tensorrt", names: Any = TENSORRT) -> dict[str, tuple[str | None, str | None]]:
        return {target: tuple(each) for target, each in obstacles.find_obstacles(flavour, names).items()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@every_version
def test_without_a_gpu_nothing_of_tensorrt_is_ready(machine: Machine, version: str) -> None:
    machine.has(version=version, device=BackendError(NO_DRIVER), cores=2)
    found = machine.found()
    assert found["gpu"] == (NO_DRIVER, NO_DRIVER)
    assert None not in (*found["dla0"], *found["dla1"])
    assert machine.double.called("Runtime") == []


@every_version
def test_with_a_gpu_it_is(machine: Machine, version: str) -> None:
    machine.has(version=version, device=True)
    assert machine.found()["gpu"] == (None, None)
    assert machine.device.closed
    assert machine.double.refusals == []


@pytest.mark.parametrize("version", ["8.5", "8.6", "10.3", "10.7"])
@pytest.mark.parametrize(("cores", "ready"), [(0, ()), (1, ("dla0",)), (2, ("dla0", "dla1"))])
def test_a_dla_is_ready_where_tensorrt_sees_it(
    machine: Machine, version: str, cores: int, ready: tuple[str, ...]
) -> None:
    machine.has(version=version, device=True, module=AGX, cores=cores)
    found = machine.found()
    assert tuple(target for target in ("dla0", "dla1") if found[target] == (None, None)) == ready
    for target in {"dla0", "dla1"} - set(ready):
        assert f"sees {cores} DLA cores here" in str(found[target][0])
        assert found[target][0] == found[target][1]
    assert machine.double.refusals == []


@pytest.mark.parametrize("board", [AGX, "Jetson-AGX", "reComputer J4012", ""])
@pytest.mark.parametrize("cores", [0, 2])
def test_of_a_board_that_is_not_known_tensorrt_decides(machine: Machine, board: str, cores: int) -> None:
    machine.has(version="10.3", device=True, module=board, cores=cores)
    machine.device.name = "a GPU"
    assert [machine.found()[name][0] is None for name in ("dla0", "dla1")] == [cores == 2] * 2


@pytest.mark.parametrize(
    ("version", "board", "words"),
    [
        ("10.3", NANO, "Orin Nano Developer Kit has no DLA"),
        ("10.13", THOR, "10.7 is the last 10.x with one"),
        ("10.16", AGX, "10.7 is the last 10.x with one"),
        ("11.4", AGX, "TensorRT 11.4.0"),
    ],
)
def test_a_dla_that_is_not_there_is_told_why(machine: Machine, version: str, board: str, words: str) -> None:
    machine.has(version=version, device=True, module=board, cores=2)
    found = machine.found()
    assert found["gpu"] == (None, None)
    assert words in str(found["dla0"][0])
    assert words in str(found["dla0"][1])


def test_without_cuda_from_python_a_gpu_can_be_built_for_and_not_run(machine: Machine) -> None:
    problem = MissingPackageError("running a TensorRT engine needs cuda-python or pycuda. Install it")
    machine.has(device=problem, seen=True)
    assert machine.found()["gpu"] == (None, str(problem))
    machine.has(device=problem, seen=False)
    build, run = machine.found()["gpu"]
    assert build == run
    assert "NVIDIA driver" in str(build)


def test_engines_for_rtx_are_built_without_a_gpu_and_not_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(version="11.4", device=BackendError(NO_DRIVER))
    machine.double.module.__name__, machine.double.module.__version__ = "tensorrt_rtx", "1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", machine.double.module)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert machine.found("tensorrt-rtx", ("rtx",)) == {"rtx": (None, NO_DRIVER)}
    rows = {row["target"]: row for row in targets.list_targets()}
    assert targets.here(rows["rtx"]) == f"can be compiled here, not run: {NO_DRIVER}"
    assert targets.here(rows["gpu"]) == rows["gpu"]["obstacle"]
    assert targets.here(rows["cpu"]) == "ready"


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_is_usable_for_the_flavour_that_is_installed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    machine.has(version="11.4", device=True)
    if flavour == "tensorrt-rtx":
        machine.double.module.__name__, machine.double.module.__version__ = "tensorrt_rtx", "1.7.1.116"
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", machine.double.module)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    usable = {name for name in ("tensorrt", "tensorrt-rtx") if targets.gpu_is_usable(name)}
    assert usable == {flavour}


def test_without_tensorrt_every_target_names_the_command(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for build, run in machine.found().values():
        assert build == run
        assert "pip install 'edgeres[tensorrt]'" in str(build)


def test_on_a_jetson_tensorrt_comes_with_jetpack(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (tmp_path / "nv_tegra_release").touch()
    monkeypatch.setattr(module, "JETSON", tmp_path / "nv_tegra_release")
    said = str(machine.found()["gpu"][0])
    assert "sudo apt install python3-libnvinfer" in said
    assert "--system-site-packages" in said
    assert "pip install" not in said


def test_list_targets_says_what_the_real_library_can_do_here(rtx: Any) -> None:
    """The library of TensorRT for RTX behind TensorRT's bindings, on a machine without a GPU: it loads, and builds."""
    command = "import sys; from edgeres.cli import main; main(sys.argv[1:])"
    rows = {row["target"]: row for row in json.loads(rtx.run(command, "compile", "--list-targets", "--json"))}
    if targets.gpu_is_usable() or rows["rtx"]["run_obstacle"] is None:
        pytest.skip("there is a GPU here")
    assert rows["rtx"]["obstacle"] is None
    assert rows["cpu"]["run_obstacle"] is None
    assert "not TensorRT" in rows["gpu"]["obstacle"]
    table = rtx.run(command, "compile", "--list-targets")
    assert "can be compiled here, not run" in " ".join(table.split())
    assert table.count("ready") == 1
