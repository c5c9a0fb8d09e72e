"""Which files an ONNX model is made of: large weights may lie in files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from edgeres.errors import ExportError, first_line


def files_of(source: Path) -> list[Path]:
    """Return an ONNX file and the files that its weights lie in, sorted, so that a change of any of them is noticed.

    Raises:
        ExportError: the file cannot be read as ONNX, or names a data file that is not there.
    """
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as problem:  # protobuf's and the file system's errors share no base but Exception
        raise ExportError(f"{source} cannot be read as ONNX: {first_line(problem)}. Export it again.") from None
    places = {
        entry.value
        for tensor in _tensors(model.graph)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    data = [source.parent / place for place in sorted(places)]
    missing = [str(path) for path in data if not path.is_file()]
    if missing:
        raise ExportError(
            f"{source} keeps weights in {', '.join(missing)}, which is not there. Copy it beside the model."
        )
    return [source, *data]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph: initializers, and those in attributes, of inner graphs too."""
    yield from graph.initializer
    for node in graph.node:
        for found in node.attribute:
            if found.type == onnx.AttributeProto.TENSOR:
                yield found.t
            elif found.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(found.g)
