"""What an ONNX file would read besides itself, found in its bytes: where a model runs there is no onnx package.

A tensor may name another file that holds its values. ONNX Runtime looks for it from the folder that the process happens
to be in, or wherever the name leads; no hash in a bundle covers it. So a model that names one is not run.

Source: "Encoding", Protocol Buffers documentation, for the wire format; onnx.proto for the numbers of fields.
"""

from __future__ import annotations

from typing import Dict, Iterator, Optional, Tuple, Union

Message = Dict[int, str]

FIELDS: Dict[str, Message] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
"""The messages in which there may be tensors, by the number of the field that holds each."""
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # of a tensor
KEY = b"location"  # nothing is read from a file whose name does not stand behind this word
DEEPEST = 100  # messages within messages, as protobuf itself allows
IDENTIFIER = slice(4, 8), b"ORTM"  # of ONNX Runtime's own format, which has such names in another encoding


def reads_other_files(content: bytes) -> bool:
    """Tell whether a model may get tensors from other files; also where it is not ONNX as protobuf writes it."""
    where, wanted = IDENTIFIER
    if content[where] == wanted:
        return True
    if KEY not in content:
        return False
    try:
        return _names_files(memoryview(content), "Model", 0)
    except (ValueError, IndexError):
        return True  # whoever reads it may see in it what we do not


def _names_files(message: memoryview, kind: str, depth: int) -> bool:
    if depth > DEEPEST:
        raise ValueError("too deep")
    for number, value in _fields(message):
        if kind == "Tensor":
            found = number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0)
        else:
            inner = FIELDS[kind].get(number)
            found = inner is not None and isinstance(value, memoryview) and _names_files(value, inner, depth + 1)
        if found:
            return True
    return False


def _fields(message: memoryview) -> Iterator[Tuple[int, Union[int, memoryview, None]]]:
    """Yield the number and the value of each field: a number, bytes, or None for what has a fixed width."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        value: Optional[Union[int, memoryview]] = None
        if wire == 0:
            value, place = _varint(message, place)
        elif wire == 2:
            size, place = _varint(message, place)
            value, place = message[place : place + size], place + size
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        else:
            raise ValueError("groups, which ONNX has not")
        if place > len(message):
            raise ValueError("ends within a field")
        yield number, value


def _varint(message: memoryview, place: int) -> Tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
