"""Reading an ONNX file that anybody may have made, and the files beside it that large weights lie in.

Nothing is read before it is known to be an ordinary file, inside the model's own folder, and small enough.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from edgeres.errors import ExportError, few, first_line

LARGEST = (1 << 31) - 1  # bytes, of all files together: Protocol Buffers write no larger one, so neither could edgeres
HALVES = ("INT4", "UINT4", "FLOAT4E2M1")  # types of which a byte holds two
MOST_NODES = 10_000  # ResNet-152 has 360


def read_model(source: Path) -> onnx.ModelProto:
    """Return the model that an ONNX file holds, its weights included.

    Raises:
        ExportError: as :func:`files_of`.
    """
    model, _ = _opened(source)
    try:
        load_external_data_for_model(model, str(source.parent))
    except Exception as problem:  # a slice that its file does not have; the kinds differ between onnx's releases
        raise _unreadable(source, first_line(problem)) from None
    return model


def files_of(source: Path) -> list[Path]:
    """Return an ONNX file and the files that its weights lie in, sorted, so that a change of any of them is noticed.

    Raises:
        ExportError: the file cannot be read as ONNX, is too large, or names a data file that is not there, or that is
            none beside it.
    """
    return _opened(source)[1]


def _opened(source: Path) -> tuple[onnx.ModelProto, list[Path]]:
    """Return the model as it stands in its file alone, and all files that it is made of."""
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise _unreadable(source, "it is not an ordinary file")
        if status.st_size > LARGEST:
            raise _unreadable(source, f"it has {status.st_size:,} bytes, more than {LARGEST:,}")
        model = onnx.load(source, load_external_data=False)
    except ExportError:
        raise
    except Exception as problem:  # protobuf's and the file system's errors share no base but Exception
        raise _unreadable(source, first_line(problem)) from None
    outside = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    found = [source, *(source.parent / place for place in sorted({_entry(tensor, "location") for tensor in outside}))]
    _check_places(source, found[1:])
    size = max(
        sum(path.stat().st_size for path in found),
        status.st_size + sum(_slice_of(tensor, source) for tensor in outside),
    )
    if size > LARGEST:
        raise _unreadable(source, f"it and its weights have {size:,} bytes, more than {LARGEST:,}")
    nodes = _count(model)
    if nodes > MOST_NODES:
        raise _unreadable(source, f"it has {nodes:,} operators, more than {MOST_NODES:,}")
    return model, found


def _slice_of(tensor: onnx.TensorProto, source: Path) -> int:
    """Return how many bytes onnx would read for a tensor whose data lies in another file, which are those it needs."""
    path = source.parent / _entry(tensor, "location")
    start, length = _entry(tensor, "offset") or "0", _entry(tensor, "length") or "0"
    if not (start.isdecimal() and length.isdecimal() and len(start + length) < 40):
        raise _unreadable(source, f"{tensor.name} lies at {start[:40]} in {path.name}, with {length[:40]} bytes")
    read = int(length) or max(0, path.stat().st_size - int(start))  # onnx reads all that is left where none is said
    needed = _bytes_of(tensor)
    if read != needed:
        shape = "×".join(map(str, tensor.dims))
        raise _unreadable(source, f"{tensor.name}, {shape}, needs {needed:,} bytes and has {read:,} in {path.name}")
    return read


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor's numbers have; −1 where it has no such numbers."""
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type in (0, TensorProto.STRING):
        return -1
    count: int = math.prod(tensor.dims)
    if TensorProto.DataType.Name(tensor.data_type) in HALVES:
        return (count + 1) // 2
    size: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * size


def _check_places(source: Path, places: list[Path]) -> None:
    """Refuse data that is missing, or lies elsewhere: a stranger's model must not read what else a machine holds."""
    folder = os.path.realpath(source.parent)
    elsewhere, missing = [], []
    for path in places:
        try:
            inside = os.path.realpath(path) == os.path.join(folder, os.path.relpath(path, source.parent))
            up = os.pardir in Path(os.path.relpath(path, source.parent)).parts
            if up or not inside:
                elsewhere.append(str(path))
            elif not stat.S_ISREG(os.stat(path).st_mode):
                missing.append(str(path))
        except (OSError, ValueError):  # a ValueError: no path can be such
            missing.append(str(path)[:200])
    if elsewhere:
        raise ExportError(
            f"{source} keeps weights in {few(elsewhere)}: a link, or outside of its folder. Export it again, with its "
            "data beside it."
        )
    if missing:
        raise ExportError(
            f"{source} keeps weights in {few(missing)}, which is no file. Export it again, or copy it beside the model."
        )


def _entry(tensor: onnx.TensorProto, key: str) -> str:
    """Return what a tensor says of its data, as onnx reads it: the last of its entries; empty where it says nothing."""
    value: str | bytes = next((entry.value for entry in reversed(tensor.external_data) if entry.key == key), "")
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value  # no UTF-8 comes as bytes


def _count(model: onnx.ModelProto) -> int:
    """Return how many nodes a model has once its functions are written out, those in branches and loops included."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    called = {key: _called(body) for key, body in bodies.items()}
    known: dict[tuple[str, str], int] = {}
    waiting, begun = list(bodies), set[tuple[str, str]]()
    while waiting:
        key = waiting[-1]
        inner = [name for name in called[key] if name in bodies and name not in known and name not in begun]
        if key in begun or not inner:  # what calls itself, which onnx's checker refuses, counts as one operator
            known[key] = sum(times * (1 + known.get(name, 0)) for name, times in called[key].items())
            waiting.pop()
        else:
            begun.add(key)
            waiting.extend(inner)
    return sum(times * (1 + known.get(name, 0)) for name, times in _called(model.graph).items())


def _called(body: onnx.GraphProto | onnx.FunctionProto) -> Counter[tuple[str, str]]:
    """Return how often each operator stands in a body, those in branches and loops included."""
    found: Counter[tuple[str, str]] = Counter()
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [body]
    while bodies:
        for node in bodies.pop().node:
            found[node.domain, node.op_type] += 1
            bodies.extend(graph for one in node.attribute for graph in (one.g, *one.graphs))
    return found


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers, and those in attributes, of inner graphs and functions too."""
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        if isinstance(body, onnx.GraphProto):
            yield from body.initializer
        for found in (found for node in body.node for found in node.attribute):
            yield from (found.t, *found.tensors)
            bodies.extend((found.g, *found.graphs))


def _unreadable(source: Path, reason: str) -> ExportError:
    return ExportError(f"{source} cannot be read as ONNX: {reason.rstrip('.')}. Export or copy it again.")
