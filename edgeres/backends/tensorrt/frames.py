"""An ONNX file that takes normalized input becomes one that takes the pixels themselves: a quarter of the bytes.

What is put in front gives the very numbers of :mod:`edgeres.preprocess`, whatever a compiler makes of arithmetic: each
pixel is looked up in the same table. Where the network reads whole pixels anyway (:mod:`edgeres.quantize.pixels`), what
undoes the normalization goes, and p − 128 is all that is computed; that this is the same is shown for every pixel value
before it is done. TensorRT wants a Cast first behind a uint8 input. The Transpose comes last: in front of the
arithmetic it cost TensorRT for RTX 1.7 a kernel of its own on ResNet-50.

onnx is not needed, for a robot that compiles its engine does not have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from edgeres.artifacts import Preprocessing
from edgeres.backends.tensorrt.records import BuildRequest
from edgeres.backends.tensorrt.wire import Content, Field, field, fields, numbers
from edgeres.errors import BackendError
from edgeres.preprocess import MIDDLE, normalized_pixels

# Field numbers. Source: onnx/onnx.proto, whose numbers never change.
GRAPH = 7  # of a ModelProto
NODE, INITIALIZER, INPUT, OUTPUT = 1, 5, 11, 12  # of a GraphProto
NODE_INPUT, NODE_OUTPUT, NODE_NAME, OPERATOR, ATTRIBUTE = 1, 2, 3, 4, 5
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9
FLOAT, UINT8, INT32 = 1, 2, 6  # of a TensorProto's data types
INFO_NAME = 1  # of a ValueInfoProto
INT, INTS = 2, 7  # of an AttributeProto's types


class Frames(NamedTuple):
    """A model that takes uint8 ``(N, h, w, 3)``, in the network's channel order. ``whole``: behind its input stands a
    QuantizeLinear that keeps each pixel as it is, so it would round any other input to whole pixels."""

    content: bytes
    input: str
    whole: bool


class _Node(NamedTuple):
    """A node of the file: where it stands among the graph's fields, and what it says."""

    at: int
    operator: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]


class _Graph(NamedTuple):
    parts: List[Field]
    nodes: List[_Node]
    tensors: Dict[str, Field]
    """Initializers, by name."""

    def readers(self, tensor: str) -> List[_Node]:
        return [node for node in self.nodes if tensor in node.inputs]

    def is_output(self, tensor: str) -> bool:
        return any(part.number == OUTPUT and _name_in(part.content, INFO_NAME) == tensor for part in self.parts)

    def constant(self, name: str) -> Optional[np.ndarray]:
        """Return an initializer of float32; None where it is none."""
        return _values(self.tensors[name].content) if name in self.tensors else None


def frames_for(request: BuildRequest) -> Optional[Frames]:
    """Return the form of a request's model that takes pixels, where it is to take them; None where it stays as it is.

    Raises:
        BackendError: its file is none of edgeres.
    """
    if request.input == "float32" or request.preprocessing is None or request.target != "gpu":
        return None
    try:
        content = Path(request.onnx).read_bytes()
    except OSError:
        return None  # the parser finds words for it
    found = with_frames(content, request.input_name, request.preprocessing)
    return found if found.whole or request.input == "uint8" else None


def with_frames(model: Content, input_name: str, preprocessing: Preprocessing) -> Frames:
    """Return a model that takes pixels.

    Args:
        model: an ONNX file with one input, float32 ``(N, 3, h, w)``, normalized as ``preprocessing`` says.

    Raises:
        BackendError: it is no such file.
    """
    try:
        outer = list(fields(model))
        (whole,) = (part for part in outer if part.number == GRAPH)
        graph = _read(whole.content)
        (given,) = (part for part in graph.parts if part.number == INPUT)
        if _name_in(given.content, INFO_NAME) != input_name:
            raise ValueError("its input has another name")
        batch = _batch(given.content)
        undone = _undone(graph, input_name, preprocessing)
    except (ValueError, UnicodeDecodeError) as problem:
        raise BackendError(f"this is no ONNX file of one input {input_name} ({problem}). Build it again.") from None
    name = _free(graph, "frames")
    nodes, tensors = _front(name, undone[-1].outputs[0] if undone else input_name, None if undone else preprocessing)
    gone = {constant for node in undone for constant in node.inputs if len(graph.readers(constant)) == 1}
    first, removed = min(node.at for node in graph.nodes), {node.at for node in undone}
    body: List[Content] = []
    for at, part in enumerate(graph.parts):
        if at == first:  # in front of all others, as they are computed
            body.extend(field(NODE, node) for node in nodes)
        if part.number == INPUT:
            body.append(field(INPUT, _value_info(name, batch, preprocessing.size)))
        elif at not in removed and not (part.number == INITIALIZER and _name_in(part.content, TENSOR_NAME) in gone):
            body.append(part.whole)
    body.extend(field(INITIALIZER, tensor) for tensor in tensors)
    pieces = [field(GRAPH, b"".join(body)) if part is whole else part.whole for part in outer]
    return Frames(b"".join(pieces), name, bool(undone))


def _read(graph: Content) -> _Graph:
    parts = list(fields(graph))
    nodes = []
    for at, part in enumerate(parts):
        if part.number == NODE:
            inner = list(fields(part.content))
            inputs, outputs = (
                tuple(found.text for found in inner if found.number == number) for number in (NODE_INPUT, NODE_OUTPUT)
            )
            nodes.append(_Node(at, _name_in(part.content, OPERATOR), inputs, outputs))
    if not nodes:
        raise ValueError("its graph is empty")
    tensors = {_name_in(part.content, TENSOR_NAME): part for part in parts if part.number == INITIALIZER}
    return _Graph(parts, nodes, tensors)


def _undone(graph: _Graph, tensor: str, preprocessing: Preprocessing) -> Tuple[_Node, ...]:
    """Return the nodes that undo the normalization in front of a QuantizeLinear, where this then rounds to p − 128 for
    every pixel p in every channel; none where it does not."""
    values = normalized_pixels(preprocessing).reshape(1, 3, 256, 1)
    chain: List[_Node] = []
    while True:
        readers = graph.readers(tensor)
        if len(readers) != 1 or graph.is_output(tensor):
            return ()
        constants = [graph.constant(name) for name in readers[0].inputs if name != tensor]
        if readers[0].operator == "QuantizeLinear":
            scale = constants[0] if constants else None
            wanted = np.broadcast_to(np.arange(256).reshape(256, 1) - MIDDLE, values.shape)
            exact = scale is not None and np.array_equal(scale, 1.0) and np.array_equal(np.rint(values), wanted)
            return tuple(chain) if exact else ()
        operator = {"Mul": np.multiply, "Add": np.add}.get(readers[0].operator)
        if operator is None or len(constants) != 1 or constants[0] is None:
            return ()
        if constants[0].shape not in ((), (1,), (1, 3, 1, 1)):
            return ()
        values = operator(values, constants[0])
        tensor = readers[0].outputs[0]
        chain.append(readers[0])


def _front(name: str, target: str, preprocessing: Optional[Preprocessing]) -> Tuple[List[bytes], List[bytes]]:
    """Return nodes that make ``target`` of the pixels ``name``, and their constants: p − 128, or normalized as a
    preprocessing says."""
    real, index, row, values = (f"{name}_{part}" for part in ("float", "index", "row", "values"))
    nodes = [_node("Cast", (name,), real, _attribute("to", INT, field(3, FLOAT)))]
    if preprocessing is None:
        nodes.append(_node("Sub", (real, f"{name}_middle"), values))
        tensors = [_tensor(f"{name}_middle", np.full((1, 1, 1, 1), MIDDLE, np.float32))]
    else:  # a row of 256 numbers for each channel
        nodes += [
            _node("Cast", (real,), index, _attribute("to", INT, field(3, INT32))),
            _node("Add", (index, f"{name}_rows"), row),
            _node("Gather", (f"{name}_table", row), values),
        ]
        rows = np.arange(0, 3 * 256, 256, dtype=np.int32).reshape(1, 1, 1, 3)
        tensors = [_tensor(f"{name}_rows", rows), _tensor(f"{name}_table", normalized_pixels(preprocessing).ravel())]
    nodes.append(_node("Transpose", (values,), target, _attribute("perm", INTS, _ints(8, (0, 3, 1, 2)))))
    return nodes, tensors


def _node(operator: str, inputs: Tuple[str, ...], output: str, attribute: bytes = b"") -> bytes:
    parts = [field(NODE_INPUT, name) for name in inputs]
    parts += [field(NODE_OUTPUT, output), field(NODE_NAME, f"{inputs[0]}_{operator}"), field(OPERATOR, operator)]
    return b"".join([*parts, field(ATTRIBUTE, attribute) if attribute else b""])


def _attribute(name: str, kind: int, value: bytes) -> bytes:
    return field(1, name) + value + field(20, kind)


def _ints(number: int, values: Tuple[int, ...]) -> bytes:
    return b"".join(field(number, value) for value in values)


def _tensor(name: str, values: np.ndarray) -> bytes:
    """Return a TensorProto of float32 or int32."""
    kind, stored = (FLOAT, "<f4") if values.dtype == np.float32 else (INT32, "<i4")
    head = _ints(DIMS, values.shape) + field(DATA_TYPE, kind) + field(TENSOR_NAME, name)
    return head + field(RAW_DATA, values.astype(stored).tobytes())


def _values(tensor: Content) -> Optional[np.ndarray]:
    """Return what a TensorProto of float32 holds; None of other types."""
    found = list(fields(tensor))
    kinds = [part.value for part in found if part.number == DATA_TYPE]
    data = [part.content for part in found if part.number == RAW_DATA]
    shape = [side for part in found if part.number == DIMS for side in numbers(part.value)]
    return np.frombuffer(data[0], "<f4").reshape(shape) if kinds == [FLOAT] and len(data) == 1 else None


def _value_info(name: str, batch: bytes, size: Tuple[int, int]) -> bytes:
    """Return the ValueInfoProto of uint8 ``(batch, h, w, 3)``; ``batch`` is a dimension of the file's own."""
    dims = field(1, batch) + b"".join(field(1, field(1, side)) for side in (*size, 3))
    return field(INFO_NAME, name) + field(2, field(1, field(1, UINT8) + field(2, dims)))


def _batch(info: Content) -> bytes:
    """Return the first dimension of a ValueInfoProto, as the file has it: a number, or a name."""
    (kind,) = (part for part in fields(info) if part.number == 2)
    (tensor,) = (part for part in fields(kind.content) if part.number == 1)
    (shape,) = (part for part in fields(tensor.content) if part.number == 2)
    dims = [part for part in fields(shape.content) if part.number == 1]
    if len(dims) != 4:
        raise ValueError(f"its input has {len(dims)} dimensions")
    return dims[0].content.tobytes()


def _name_in(message: Content, number: int) -> str:
    """Return a message's text of that field number; empty where it has none."""
    return next((part.text for part in fields(message) if part.number == number), "")


def _free(graph: _Graph, name: str) -> str:
    """Return a name with which no tensor begins."""
    used = {tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    while any(tensor.startswith(name) for tensor in used):
        name = f"{name}_"
    return name
