"""The session against a strict double of every TensorRT release: what it calls, answers, refuses and frees."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgeres.backends.tensorrt import logger
from edgeres.backends.tensorrt import session as session_module
from edgeres.backends.tensorrt.compat import this_machine
from edgeres.backends.tensorrt.session import open_session
from edgeres.errors import BackendError


def _load():
    """Return the double's package, which lies beside this file and in no installed place."""
    place = Path(__file__).with_name("tensorrt_double")
    if "tensorrt_double" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_double", place / "__init__.py")
        sys.modules["tensorrt_double"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tensorrt_double"])
    return sys.modules["tensorrt_double"]


DOUBLE = _load()
Script, Tensor = DOUBLE.Script, DOUBLE.Tensor

ONE_CONTEXT = ("8.5", "8.6")
"""Releases on which an optimization profile serves a single execution context."""

COMMON = {
    "ICudaEngine.create_execution_context",
    "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_mode",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.get_tensor_shape",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "ILogger",
    "Runtime",
    "Runtime.deserialize_cuda_engine",
}
"""What a session may call or set: the interface that 8.5 to 11 share, and nothing by index of binding."""

NEXT_STEP = re.compile(r"\b(Close|Compile|Load|Prepare|See|Start|Use|doctor)\b")


class Room:
    """A double in place of ``tensorrt``, a device in host memory, and sessions on both."""

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch = monkeypatch
        self.double = self.device = None

    def install(self, version: str, **script) -> None:
        self.double = DOUBLE.Double(version, Script(**script))
        self.device = DOUBLE.HostDevice(self.double)
        self._monkeypatch.setitem(sys.modules, "tensorrt", self.double.module)

    def open(self, contexts: int = 2, plan: bytes | None = None, **facts):
        built_for = {**this_machine(self.double.module, self.device), **facts}
        content = self.double.script.plan if plan is None else plan
        return open_session(content, built_for, device=self.device, contexts=contexts, place="build/net")

    def refused(self, opening=None) -> str:
        """Return the words of what must fail; whatever was taken until then must have been given back."""
        with pytest.raises(BackendError) as caught:
            (opening or self.open)()
        assert self.device.live() == 0
        assert NEXT_STEP.search(str(caught.value)), f"no next step in: {caught.value}"
        return str(caught.value)


@pytest.fixture
def room(monkeypatch):
    """Return a room; a call that the double refused, or memory that was not freed, fails the test."""
    monkeypatch.setattr(logger, "_LOGGERS", {})  # one logger per package and process would keep every double alive
    room = Room(monkeypatch)
    yield room
    assert room.double.refusals == []
    assert room.device.live() == 0


every_version = pytest.mark.parametrize("version", DOUBLE.VERSIONS)


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def expected(batch: np.ndarray) -> np.ndarray:
    return batch.mean(axis=(1, 2, 3))[:, None] + np.arange(10, dtype=np.float32)


# What it calls and computes


@every_version
@pytest.mark.parametrize("count", [0, 1, 4, 8, 9, 20])
def test_a_batch_of_any_size_is_computed(room, version, count):
    room.install(version)
    session = room.open()
    np.testing.assert_allclose(session(frames(count)), expected(frames(count)), rtol=1e-5, atol=1e-6)
    assert session(frames(count)).dtype == np.float32
    session.close()


@every_version
@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_an_engine_of_pixels_takes_them_in_any_strides(room, version, count):
    room.install(version, inputs=(Tensor("frames", (-1, 8, 6, 3), "UINT8"),))
    session = room.open()
    assert (session.tensors.shape, session.tensors.dtype) == ((8, 6, 3), np.uint8)
    whole = np.random.default_rng(count).integers(0, 256, (count, 8, 9, 3), np.uint8)
    for batch in (np.ascontiguousarray(whole[:, :, :6]), whole[:, :, 2:8], whole[:, :, 3:, ::-1]):
        np.testing.assert_allclose(session(batch), expected(batch), rtol=1e-5)
    with pytest.raises(BackendError, match=r"this engine takes uint8 \(N, 8, 6, 3\), not float32"):
        session(np.zeros((1, 8, 6, 3), np.float32))
    session.close()
    assert room.device.live() == 0


@every_version
def test_only_the_common_interface_is_used(room, version):
    room.install(version)
    session = room.open()
    for count in (1, 8, 3, 17):
        session(frames(count))
    session.close()
    assert room.double.touched("call", "set") == COMMON


@every_version
def test_host_code_in_a_plan_stays_forbidden(room, version):
    room.install(version)
    room.open().close()
    assert room.double.was_set("Runtime.engine_host_code_allowed") == []


@every_version
def test_memory_is_taken_once_for_the_largest_batch(room, version):
    room.install(version)
    session = room.open(contexts=1)
    taken = dict(room.device.taken)
    for count in (1, 8, 5, 30):
        session(frames(count))
    assert {name: room.device.taken[name] for name in ("allocate", "pinned", "create_stream")} == {
        "allocate": taken["allocate"], "pinned": taken["pinned"], "create_stream": taken["create_stream"],
    }  # fmt: skip
    assert [given["name"] for given in room.double.called("IExecutionContext.set_tensor_address")] == [
        "input",
        "logits",
    ]
    session.close()


@every_version
def test_the_shape_is_set_only_when_it_changes(room, version):
    room.install(version)
    session = room.open(contexts=1)
    before = len(room.double.called("IExecutionContext.set_input_shape"))
    for count in (8, 8, 3, 3, 8):
        session(frames(count))
    shapes = [given["shape"][0] for given in room.double.called("IExecutionContext.set_input_shape")[before:]]
    assert shapes == [3, 8]
    session.close()


@every_version
def test_each_context_has_a_stream_of_its_own(room, version):
    room.install(version)
    session = room.open(contexts=3)
    wanted = 1 if version in ONE_CONTEXT else 3
    assert session.contexts == wanted
    assert room.device.taken["create_stream"] == wanted
    session(frames(2))
    streams = [given["stream_handle"] for given in room.double.called("IExecutionContext.execute_async_v3")]
    assert all(stream > 0 for stream in streams)
    session.close()


@every_version
def test_a_batch_below_the_profiles_least_is_padded(room, version):
    room.install(version, profiles=((4, 4, 6),))
    session = room.open(contexts=1)
    np.testing.assert_allclose(session(frames(1)), expected(frames(1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(session(frames(7)), expected(frames(7)), rtol=1e-5, atol=1e-6)
    session.close()


@every_version
def test_an_engine_of_one_fixed_batch_runs_any(room, version):
    fixed = {"inputs": (Tensor("input", (4, 3, 8, 8)),), "outputs": (Tensor("logits", (4, 10)),)}
    room.install(version, **fixed)
    session = room.open()
    np.testing.assert_allclose(session(frames(7)), expected(frames(7)), rtol=1e-5, atol=1e-6)
    session.close()


@every_version
def test_threads_share_the_contexts_and_never_one(room, version):
    room.install(version)
    session = room.open(contexts=3)
    wrong: list[BaseException | str] = []

    def work(seed: int) -> None:
        batch = frames(seed % 9 + 1, seed)
        try:
            for _ in range(10):
                if not np.allclose(session(batch), expected(batch), rtol=1e-5, atol=1e-6):
                    wrong.append("other numbers")
        except BaseException as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert wrong == []


@every_version
def test_a_dla_core_is_chosen_before_the_plan_is_opened(room, version):
    room.install(version, dla_cores=2)
    room.open(target="dla1").close()
    order = [call.path for call in room.double.calls if call.path.startswith("Runtime.") and call.kind != "get"]
    assert order == ["Runtime.DLA_core", "Runtime.deserialize_cuda_engine"]
    assert room.double.was_set("Runtime.DLA_core") == [1]


@every_version
def test_a_dla_core_that_is_not_there_is_refused(room, version):
    room.install(version, dla_cores=1)
    assert "DLA core 1" in room.refused(lambda: room.open(target="dla1"))


# Plans of an older version

OLDER = {"8.6": "8.6.0", "10.3": "8.6.1", "10.7": "10.3.0", "10.13": "10.3.0", "10.16": "8.6.1", "11.0": "10.16.1",
         "11.4": "11.0.0"}  # fmt: skip
"""By release, an older one whose version-compatible plans it runs."""


@pytest.mark.parametrize(("version", "older"), OLDER.items())
def test_a_version_compatible_plan_runs_on_a_newer_release_by_its_own_lean_runtime(room, monkeypatch, version, older):
    path = f"/opt/libnvinfer_lean.so.{older}"
    room.install(version, lean={path: b"ftrt an older plan"})
    monkeypatch.setattr(session_module, "lean_runtimes", lambda: {older: path, "9.9.9": "/opt/other"})
    session = room.open(plan=b"ftrt an older plan", tensorrt=f"{older}.6", version_compatible="yes")
    np.testing.assert_allclose(session(frames(3)), expected(frames(3)), rtol=1e-5, atol=1e-6)
    session.close()
    assert room.double.called("Runtime.load_runtime") == [{"path": path}]
    assert room.double.was_set("Runtime.engine_host_code_allowed") == []
    assert room.double.touched("call", "set") == COMMON | {"Runtime.load_runtime"}


@pytest.mark.parametrize(("version", "older"), OLDER.items())
def test_without_its_lean_runtime_such_a_plan_never_reaches_tensorrt(room, monkeypatch, version, older):
    room.install(version)
    monkeypatch.setattr(session_module, "lean_runtimes", dict)
    message = room.refused(lambda: room.open(tensorrt=older, version_compatible="yes"))
    assert f"no libnvinfer_lean.so.{older}" in message
    assert "edgeres compile build/net" in message
    assert room.double.calls == []


@pytest.mark.parametrize(("version", "older"), OLDER.items())
def test_a_lean_runtime_that_does_not_load_is_told(room, monkeypatch, version, older):
    room.install(version)
    monkeypatch.setattr(session_module, "lean_runtimes", lambda: {older: "/opt/broken.so"})
    message = room.refused(lambda: room.open(tensorrt=older, version_compatible="yes"))
    assert "failed at loading /opt/broken.so: Unable to load library" in message
    assert room.double.called("Runtime.deserialize_cuda_engine") == []


@every_version
def test_a_version_compatible_plan_needs_no_lean_runtime_where_it_was_built(room, monkeypatch, version):
    room.install(version)
    monkeypatch.setattr(session_module, "lean_runtimes", dict)
    room.open(version_compatible="yes").close()
    assert room.double.called("Runtime.load_runtime") == []


# What fails


@every_version
@pytest.mark.parametrize(
    "facts",
    [
        {"tensorrt": "9.9.9"},
        {"compute_capability": "7.2"},
        {"flavour": "tensorrt-rtx"},
        {"platform": "Windows AMD64"},
        {"cuda": "13.0"},
        {"tensorrt": ""},
    ],
)
def test_a_plan_for_another_machine_never_reaches_tensorrt(room, version, facts):
    room.install(version)
    assert "edgeres compile build/net" in room.refused(lambda: room.open(**facts))
    assert room.double.calls == []
    assert room.device.taken == {}


@every_version
@pytest.mark.parametrize("plan", [b"", b"ftrt cut", b"hello"])
def test_a_plan_that_tensorrt_does_not_open_is_told_in_its_words(room, version, plan):
    room.install(version)
    message = room.refused(lambda: room.open(plan=plan))
    assert "kEXPECTED_MAGIC_TAG" in message
    assert "edgeres compile build/net" in message


@every_version
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("Runtime.deserialize_cuda_engine", None),
        ("ICudaEngine.create_execution_context", None),
        ("IExecutionContext.set_optimization_profile_async", False),
        ("IExecutionContext.set_input_shape", False),
        ("IExecutionContext.set_tensor_address", False),
    ],
)
def test_every_none_and_false_while_opening_is_an_error(room, version, method, answer):
    said = [("ERROR", "Error Code 7: the reason stands here")]
    room.install(version, engine_log=said, returns={method: answer})
    if method.startswith("Runtime"):
        room.double.script.returns[method] = lambda serialized_engine: None
    assert "TensorRT" in room.refused()


@every_version
def test_a_runtime_that_is_not_made_is_an_error(room, version):
    room.install(version, returns={"Runtime": TypeError("pybind11::init(): factory function returned nullptr")})
    assert "nullptr" in room.refused()


@every_version
def test_memory_that_does_not_suffice_for_another_context_is_an_error(room, version):
    room.install(version, contexts=0)
    assert "Requested amount of GPU memory could not be allocated" in room.refused()


@every_version
@pytest.mark.parametrize("method", ["execute_async_v3", "set_input_shape"])
def test_a_run_that_fails_is_told_and_the_next_one_goes(room, version, method):
    room.install(version)
    session = room.open(contexts=1)
    room.double.script.returns[f"IExecutionContext.{method}"] = False
    with pytest.raises(BackendError, match="failed at") as caught:
        session(frames(3))
    assert NEXT_STEP.search(str(caught.value))
    room.double.script.returns.clear()
    np.testing.assert_allclose(session(frames(3)), expected(frames(3)), rtol=1e-5, atol=1e-6)
    session.close()


@every_version
def test_a_shape_that_was_refused_is_set_anew(room, version):
    """What a context keeps after it refused a shape is not known."""
    room.install(version)
    session = room.open(contexts=1)
    session(frames(8))
    room.double.script.returns["IExecutionContext.set_input_shape"] = False
    with pytest.raises(BackendError, match="taking a batch of 3"):
        session(frames(3))
    room.double.script.returns.clear()
    session(frames(8))
    shapes = [given["shape"][0] for given in room.double.called("IExecutionContext.set_input_shape")]
    assert shapes[-2:] == [3, 8]
    session.close()


@every_version
@pytest.mark.parametrize("method", ["upload", "download", "synchronize", "current"])
def test_a_device_that_refuses_is_told_and_the_next_run_goes(room, version, method):
    room.install(version)
    session = room.open(contexts=1)
    room.device.refuse[method] = BackendError("CUDA failed. See: edgeres doctor")
    with pytest.raises(BackendError, match="CUDA failed"):
        session(frames(3))
    room.device.refuse.clear()
    np.testing.assert_allclose(session(frames(3)), expected(frames(3)), rtol=1e-5, atol=1e-6)
    session.close()


@every_version
@pytest.mark.parametrize("method", ["create_stream", "pinned", "allocate", "synchronize"])
def test_a_device_that_refuses_while_opening_leaves_nothing_behind(room, version, method):
    room.install(version)
    room.device.refuse[method] = BackendError("CUDA failed. See: edgeres doctor")
    assert "CUDA failed" in room.refused()


@every_version
@pytest.mark.parametrize(
    "tensors",
    [
        {"inputs": (Tensor("input", (-1, 3, 8, 8)), Tensor("mask", (-1, 3, 8, 8)))},
        {"outputs": (Tensor("logits", (-1, 10)), Tensor("more", (-1, 4)))},
        {"inputs": (Tensor("input", (-1, 3, 8, 8), "HALF"),)},
        {"outputs": (Tensor("logits", (-1, 10), "INT32"),)},
        {"outputs": (Tensor("logits", (-1, 10), "UINT8"),)},
        {"inputs": (Tensor("input", (-1, 3, 8)),)},
        {"outputs": (Tensor("logits", (-1, 10, 1)),)},
    ],
)
def test_an_engine_of_another_kind_is_refused(room, version, tensors):
    room.install(version, **tensors)
    assert "edgeres did not build it" in room.refused()


@every_version
@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((2, 3, 8, 8), np.float64),
        np.zeros((2, 3, 8, 9), np.float32),
        np.zeros((3, 8, 8), np.float32),
        [[0.0]],
    ],
)
def test_an_array_that_does_not_fit_is_refused(room, version, batch):
    room.install(version)
    session = room.open()
    with pytest.raises(BackendError, match="this engine takes float32"):
        session(batch)
    session.close()


@every_version
def test_a_closed_session_is_closed(room, version):
    room.install(version)
    session = room.open()
    session.close()
    session.close()
    assert room.device.live() == 0
    assert not room.device.closed  # it is the caller's
    with pytest.raises(BackendError, match="closed"):
        session(frames(1))
