"""Reading what anybody may have made: an ONNX file, and the weights and functions that it says it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from edgeres.errors import EdgeresError, ExportError
from edgeres.export import adopt_onnx, external, files_of

Graph = Callable[..., onnx.ModelProto]
RELU = "net (float[N,3,8,8] x) => (float[N,192] y) { r = Relu (x) y = Flatten (r) }"
IMPORTS = 'opset_import: ["" : 17, "own" : 1]'


def outside(graph: Graph, path: Path, *slices: dict[str, int]) -> None:
    """Write a model with a float32 of shape [1] in ``data.bin`` for each of the slices."""
    model = graph(RELU)
    for number, entries in enumerate(slices):
        tensor = model.graph.initializer.add(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "data.bin", **entries}.items():
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("entries", [{}, {"length": 0}, {"length": 8}, {"offset": 8}, {"offset": -1}, {"offset": "x"}])
def test_a_slice_that_is_not_its_tensor_is_refused_unread(
    entries: dict[str, int], tmp_path: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(external, "load_external_data_for_model")
    outside(graph, tmp_path / "m.onnx", *[entries] * 12)
    sparse(tmp_path / "data.bin", 200_000_000)
    for read in (files_of, external.read_model):
        with pytest.raises(ExportError, match=r"w0.*data\.bin"):
            read(tmp_path / "m.onnx")


def test_slices_of_one_file_are_summed(tmp_path: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "LARGEST", 10_000)
    sparse(tmp_path / "data.bin", 4)
    outside(graph, tmp_path / "few.onnx", {})
    assert files_of(tmp_path / "few.onnx") == [tmp_path / "few.onnx", tmp_path / "data.bin"]
    model = onnx.load(tmp_path / "few.onnx", load_external_data=False)
    first = model.graph.initializer[0]
    first.dims[:] = [1000]
    first.external_data.add(key="length", value="4000")
    for number in range(2):
        model.graph.initializer.add().CopyFrom(first)
        model.graph.initializer[-1].name = f"again{number}"
    (tmp_path / "many.onnx").write_bytes(model.SerializeToString())
    sparse(tmp_path / "data.bin", 4000)
    with pytest.raises(ExportError, match=r"it and its weights have 12,\d+ bytes"):
        files_of(tmp_path / "many.onnx")


def test_numbers_of_any_width_are_read_from_beside(tmp_path: Path, graph: Graph) -> None:
    model = graph(RELU)
    kinds = [getattr(np, name) for name in ("float16", "float32", "float64", "int8", "int64", "bool")]
    wanted = {kind.__name__: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in wanted.items())
    model.graph.initializer.append(onnx.helper.make_tensor("half", TensorProto.INT4, [3], [1, -2, 3]))
    half = model.graph.initializer[-1]
    half.raw_data = numpy_helper.from_array(numpy_helper.to_array(half)).raw_data
    half.ClearField("int32_data")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    read = external.read_model(tmp_path / "m.onnx").graph.initializer
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in read}
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    assert found["half"].astype(int).tolist() == [1, -2, 3]


def chain(count: int) -> str:
    """Return a model with functions that each call the next."""
    net = RELU.replace("Relu", "own.f0")
    text = f"<ir_version: 8, {IMPORTS}> {net}\n"
    for number in range(count):
        inner = f"own.f{number + 1} (x)" if number + 1 < count else "Relu (x)"
        text += f'<{IMPORTS}, domain: "own"> f{number} (x) => (y) {{ y = {inner} }}\n'
    return text


@pytest.mark.parametrize("count", [3000, 20_000])
def test_a_long_chain_of_functions_is_counted(count: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(chain(count)).SerializeToString())
    if count > external.MOST_NODES:
        with pytest.raises(ExportError, match=f"has {count + 2:,} operators"):
            files_of(path)
    else:
        assert files_of(path) == [path]
        with contextlib.suppress(EdgeresError):
            adopt_onnx(path, None)
