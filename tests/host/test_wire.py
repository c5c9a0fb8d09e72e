"""An engine's model that takes weights from elsewhere is not run, wherever in the file it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeres.backends.cpu import EXACT, FAST, open_engine
from edgeres.backends.cpu.wire import reads_other_files
from edgeres.cpu_settings import LEVEL, THREADS
from edgeres.errors import BackendError


def outside(name: str = "w", **entries: str) -> onnx.TensorProto:
    """Return a tensor whose values lie in a file."""
    tensor = numpy_helper.from_array(np.ones((4, 4), np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (entries or {"location": "weights.bin"}).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def net(*initializers: onnx.TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    made = nodes or (helper.make_node("MatMul", ["x", "w"], ["y"], name="location"),)
    graph = helper.make_graph(made, "location", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inside(name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones((4, 4), np.float32), name)


def branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "branch",
        [],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, [4, 4])],
        [tensor],
    )


def in_a_constant() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=outside())
    return net(nodes=(constant, helper.make_node("MatMul", ["x", "w"], ["y"])))


def in_a_branch() -> onnx.ModelProto:
    either = helper.make_node("If", ["b"], ["w"], then_branch=branch(inside("c")), else_branch=branch(outside("c")))
    model = net(nodes=(either, helper.make_node("MatMul", ["x", "w"], ["y"])))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "b"))
    return model


def in_a_function() -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=outside()), helper.make_node("MatMul", ["a", "w"], ["b"])]
    model = net(nodes=(helper.make_node("F", ["x"], ["y"], domain="own"),))
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def in_a_sparse_tensor() -> onnx.ModelProto:
    model = net(inside())
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("s"))
    return model


PLACES: dict[str, Callable[[], onnx.ModelProto]] = {
    "an initializer": lambda: net(outside()),
    "the root": lambda: net(outside(location="etc/passwd")),
    "value first": lambda: net(outside(offset="0", length="64", location="weights.bin")),
    "a constant": in_a_constant,
    "a branch": in_a_branch,
    "a function": in_a_function,
    "a sparse tensor": in_a_sparse_tensor,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_reads_other_files_is_not_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = PLACES[place]().SerializeToString()
    (tmp_path / "weights.bin").write_bytes(np.full(16, 7, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)  # where onnxruntime looks
    assert reads_other_files(content)
    with pytest.raises(BackendError, match=r"takes weights from other files.*hashes do not cover"):
        open_engine(content, FAST)


def test_a_word_alone_is_no_file() -> None:
    word = numpy_helper.from_array(np.frombuffer(b"location" * 8, np.float32).reshape(4, 4), "location")
    model = net(inside(), word)
    model.metadata_props.add(key="location", value="the third shelf")
    content = model.SerializeToString()
    assert b"location" in content
    assert not reads_other_files(content)
    np.testing.assert_array_equal(open_engine(content, FAST)(np.ones((1, 4), np.float32)), np.full((1, 4), 4))


def test_what_is_written_in_another_way_is_found_too() -> None:
    """protobuf reads numbers with needless bytes, and messages in parts; whoever hides a name may use that."""
    content = net(inside()).SerializeToString()
    entry = b"\x0a\x08location\x12\x0bweights.bin"
    tensor = b"\x8a\x00\x01w" + bytes([13 << 3 | 2, len(entry) | 0x80, 0]) + entry  # its name is field 8 elsewhere
    initializer = bytes([5 << 3 | 2 | 0x80, 0, len(tensor)]) + tensor
    hidden = content + bytes([7 << 3 | 2, len(initializer)]) + initializer  # a second part of the graph
    assert reads_other_files(hidden)


@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), end=st.integers(0, 10**6))
def test_what_onnx_sees_in_damaged_bytes_is_seen(place: int, byte: int, end: int) -> None:
    content = bytearray(net(outside(), inside("v")).SerializeToString())
    content[place % len(content)] = byte
    for damaged in (bytes(content), bytes(content[: end % len(content)])):
        seen = reads_other_files(damaged)  # whatever the bytes are, it answers
        try:
            model = onnx.ModelProto.FromString(damaged)
        except DecodeError:
            continue
        named = [one for tensor in model.graph.initializer for one in tensor.external_data if one.key == "location"]
        assert seen or not named


def test_the_runtimes_own_format_is_not_run() -> None:
    with pytest.raises(BackendError, match="takes weights from other files"):
        open_engine(b"\x18\x00\x00\x00ORTM" + bytes(64), FAST)


@pytest.mark.parametrize(
    "option",
    [
        {"session.collect_node_memory_stats_to_file": "stats.csv"},
        {"session.optimized_model_filepath": "model.onnx"},
        {"session.model_external_initializers_file_folder_path": "/etc"},
        {"session.load_model_format": "ORT"},
        {"session.disable_quant_qdq": "2"},
        {LEVEL: "none"},
        {THREADS: "-1"},
        {THREADS: "99999"},
        {THREADS: "²"},
        {"": ""},
    ],
    ids=str,
)
def test_options_that_edgeres_does_not_write_are_refused(
    option: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = net(inside()).SerializeToString()
    open_engine(content, EXACT)
    open_engine(content, {**FAST, THREADS: "1"})
    with pytest.raises(BackendError, match="options that edgeres does not write"):
        open_engine(content, {**EXACT, **option})
    assert list(tmp_path.iterdir()) == []
