"""The host side of CUDA: the real packages, pycuda and cuda-python, over a double of the driver on host memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeres.backends.tensorrt.device import open_device
from edgeres.errors import BackendError, MissingPackageError

PLACE = Path(__file__).with_name("libcuda")
REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 300

INSTALL = {"pycuda": "scripts/install_pycuda.sh", "cuda": "pip install cuda-bindings"}
CLOSED = "this engine is closed. Load the bundle again."

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a compiled libcuda.so.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: apt-get install gcc")
    folder = tmp_path_factory.mktemp("libcuda")
    target = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{target.name}"]
    subprocess.run([*command, "-o", target, PLACE / "libcuda.c", "-ldl", "-lpthread"], check=True, timeout=PATIENCE)
    return folder


@pytest.fixture(params=INSTALL)
def package(request: pytest.FixtureRequest) -> str:
    """Return the name of each package in turn, if it is installed."""
    name = str(request.param)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {INSTALL[name]}")
    return name


@pytest.fixture
def run(library: Path, package: str) -> Run:
    """Return a function that plays a scenario in a process of its own and returns what it reports."""

    def play(scenario: str, noise: bool = False, **environment: str) -> Any:
        paths = {
            "LD_LIBRARY_PATH": os.pathsep.join([str(library), os.environ.get("LD_LIBRARY_PATH", "")]).strip(os.pathsep),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        }
        done = subprocess.run(
            [sys.executable, "-W", "error", str(PLACE / "scenarios.py"), package, scenario],
            env={**os.environ, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert noise or not done.stderr, done.stderr
        return json.loads(done.stdout)

    return play


def test_every_function_of_a_device(run: Run) -> None:
    report = run("calls")
    assert report["facts"] == ["Orin", [8, 7], [12, 6]]
    assert report["before"] == [[0, 0, 0], [0, 0, 0]], "a copy was not asynchronous"
    assert report["unread"] == [[1, 2, 3], [4, 5, 6]]
    assert report["copied"] == [[4, 5, 6], [4, 5, 6]]
    assert report["index"] == 0
    assert report["total"] == 1 << 30
    assert report["free"] == (1 << 30) - 24
    assert report["elapsed"] >= 0
    assert "closed" in report["closed"]
    assert report["left"] == {}


def test_pixels_are_a_quarter_of_the_bytes(run: Run) -> None:
    frames = 4 * 3 * 4 * 5
    assert run("pixels") == {"copied": [frames, 4 * frames], "right": [True, True], "left": {}}


def test_eight_threads_answer_as_one(run: Run, package: str) -> None:
    report = run("threads")
    assert report["wrong"] == []
    assert report["exact"]
    assert report["made"] == {"device_blocks": 6, "pinned_blocks": 6, "streams": 3}, "buffers are made once per context"
    assert report["left"] == {}
    # pycuda cannot release a primary context before the process ends.
    assert report["retained"] == (1 if package == "pycuda" else 0)


def test_a_failure_anywhere_is_our_error_and_leaves_nothing(run: Run, package: str) -> None:
    report = run("faults", noise=package == "pycuda")
    unfreed = ["cuMemFree"] * 4 + ["cuMemFreeHost"] * 4 + ["cuStreamDestroy"] * 2
    if package == "pycuda":
        # What pycuda fails to free it gives up, with a warning of its own: that one object stays, and nothing else.
        assert sorted(report["silent"]) == unfreed
        assert len(report["bad"]) == len(unfreed)
        assert all("1 are left, and []" in text for text in report["bad"])
        assert (report["device_blocks"], report["pinned_blocks"], report["streams"]) == (4, 4, 2)
    else:
        assert report["bad"] == []
        assert "silent" not in report
    assert report["tried"] > 50
    assert report["sins"] == {}
    assert {"cuCtxPushCurrent", "cuMemAlloc", "cuMemHostAlloc", "cuStreamSynchronize"} <= set(report["functions"])


NO_GRAPHS = "pycuda has no CUDA graphs. Install cuda-python: edgeres doctor"
OF_GRAPHS = {"cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"}


def test_a_failure_among_arrays_and_graphs_leaves_nothing(run: Run, package: str) -> None:
    """Where a graph cannot be made or launched, calls run as without one, and nobody is bothered."""
    report = run("gpu_faults", noise=package == "pycuda")
    assert {"cuCtxSynchronize", "cuMemcpyDtoDAsync"} <= set(report["functions"])
    if package == "pycuda":
        assert set(report["silent"]) == {"cuMemFree", "cuMemFreeHost", "cuStreamDestroy"}  # as above
        assert all("1 are left, and []" in text for text in report["bad"])
    else:
        assert report["bad"] == []
        captures = report["silent"].count("cuStreamBeginCapture")
        within = {"cuLaunchHostFunc": captures}  # the engine's own work, as it is being captured
        within["cuGraphLaunch"] = report["silent"].count("cuGraphLaunch")
        assert within["cuGraphLaunch"] >= captures > 0
        assert Counter(report["silent"]) == {**within, **dict.fromkeys(OF_GRAPHS, captures)}
        assert OF_GRAPHS | {"cuGraphLaunch", "cuGraphExecDestroy"} <= set(report["functions"])
        assert {name: report[name] for name in ("graphs", "recordings", "capturing", "streams", "device_blocks")} == {
            "graphs": 0, "recordings": 0, "capturing": 0, "streams": 0, "device_blocks": 0
        }  # fmt: skip
        report["sins"].pop("orphaned_graphs")  # what CUDA did not destroy at first is destroyed with the device
    assert report["sins"] == {}


def test_another_librarys_arrays_are_read_after_they_are_written(run: Run) -> None:
    assert run("gpu_arrays") == {"wrong": [], "left": {}}


def test_threads_record_and_wait_for_the_whole_gpu(run: Run, package: str) -> None:
    report = run("recorded")
    assert report["wrong"] == []
    assert report["executed"] == 8 * 200
    captures, launches, ends = report["calls"]
    if package == "pycuda":
        assert (report["state"], captures) == (NO_GRAPHS, 0)
    else:
        assert report["state"] == "on"
        assert captures >= 3
        assert launches > 500
        assert ends == captures, "a graph was not destroyed"
    assert report["left"] == {}


def test_an_engine_that_cannot_be_captured_runs_without(run: Run, package: str) -> None:
    report = run("unrecordable")
    assert report.pop("left") == {}
    assert set(report) == {"in silence", "and says so", "allocates"}
    for right, said in report.values():
        assert right
        assert said == NO_GRAPHS if package == "pycuda" else " failed at running a batch of 3: " in said


def test_a_lost_device_is_said_and_the_session_closes(run: Run, package: str) -> None:
    report = run("lost", noise=package == "pycuda")
    first, second, closing, after = report["said"]
    assert "unspecified launch failure" in first
    assert "Start the program again" in first
    assert second == first
    assert closing == "" if package == "pycuda" else "launch failure" in closing  # pycuda keeps it to itself
    assert after == CLOSED
    assert report["depth"] == 0


def test_closing_lets_running_calls_end_and_refuses_waiting_ones(run: Run) -> None:
    assert run("closing") == {"ends": ["good", "good", *[CLOSED] * 4], "left": {}}


def test_too_little_memory_frees_what_was_there(run: Run) -> None:
    report = run("memory")
    assert "out of memory" in report["said"]
    assert "fewer contexts" in report["said"]
    assert report["after"] == {}
    assert report["right"]
    assert report["left"] == {}


def test_the_callers_own_context_is_current_again(run: Run) -> None:
    assert run("among_others") == {"right": True, "kept": True, "depth": 1, "strangers": 0, "streams": 0}


def test_a_session_opens_and_closes_a_device_of_its_own(run: Run) -> None:
    report = run("own_device")
    assert report["right"]
    assert report["left"] == {}
    expected = "CudaPythonDevice" if importlib.util.find_spec("cuda") else "PycudaDevice"
    assert report["kind"] == expected


def test_a_gpu_that_is_not_there(run: Run) -> None:
    assert run("refusals", DOUBLE_DEVICES="2") == [
        "there is no GPU 3: this machine has 2. Choose one of 0 to 1.",
        "there is no GPU -1: this machine has 2. Choose one of 0 to 1.",
    ]
    assert "no CUDA-capable device" in run("none", DOUBLE_DEVICES="0")


def test_a_gpu_is_seen_without_any_package(run: Run) -> None:
    assert run("seen") == [True, {}]
    assert run("seen", DOUBLE_DEVICES="0") == [False, {}]


def test_a_process_may_end_with_a_session_open(run: Run, package: str) -> None:
    """Nothing but the scenario's own line is printed; pycuda would complain of a context that it fails to release."""
    assert run("unclosed") == "ended"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the two packages be imported anew, as if nobody had."""
    for name in ("with_pycuda", "with_cuda_python"):
        monkeypatch.delitem(sys.modules, f"edgeres.backends.tensorrt.device.{name}", raising=False)
    return monkeypatch


def test_neither_package(fresh: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "pycuda", "pycuda.driver"):
        fresh.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"pip install cuda-bindings.*pip install pycuda"):
        open_device()


def test_cuda_python_of_cuda_11_is_found_under_its_older_name(fresh: pytest.MonkeyPatch) -> None:
    """There is no cuda.bindings in it; the real 11.8.2 ran all scenarios on Python 3.8, for which it is the last."""
    old = types.ModuleType("cuda.cuda")
    good = object()
    old.CUresult = SimpleNamespace(CUDA_SUCCESS=good)  # type: ignore[attr-defined]
    old.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)  # type: ignore[attr-defined]
    old.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)  # type: ignore[attr-defined]
    names = ("MAJOR", "MINOR")
    attributes = {f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}": name for name in names}
    old.CUdevice_attribute = SimpleNamespace(**attributes)  # type: ignore[attr-defined]
    answers = {
        "cuInit": (good,),
        "cuDeviceGetCount": (good, 1),
        "cuDeviceGet": (good, 0),
        "cuDeviceGetName": (good, b"Xavier\0\0"),
        "cuDriverGetVersion": (good, 11040),
        "cuDevicePrimaryCtxRetain": (good, "context"),
    }
    for name, answer in answers.items():
        setattr(old, name, lambda *given, answer=answer: answer)
    old.cuDeviceGetAttribute = lambda name, device: (good, 7 if name == "MAJOR" else 2)  # type: ignore[attr-defined]
    package = types.ModuleType("cuda")
    package.__path__ = []
    package.cuda = old  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("cuda.")]:
        fresh.delitem(sys.modules, name)
    fresh.setitem(sys.modules, "cuda", package)
    fresh.setitem(sys.modules, "cuda.cuda", old)
    device = open_device()
    assert (device.name, device.compute_capability, device.driver) == ("Xavier", (7, 2), (11, 4))


def test_a_package_that_does_not_load(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pycuda for another CUDA is not a missing pycuda."""
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    (tmp_path / "pycuda/driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    fresh.syspath_prepend(str(tmp_path))
    for name in ("cuda", "cuda.bindings"):
        fresh.setitem(sys.modules, name, None)
    for name in ("pycuda", "pycuda.driver"):
        fresh.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendError, match=r"pycuda does not load: libcuda.so.1.*edgeres doctor"):
        open_device()
