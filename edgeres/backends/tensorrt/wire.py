"""Protocol Buffers, as far as taking an ONNX file apart and putting it together again needs: where it is compiled,
onnx is not installed.

A message is a row of fields, each with a number that its type's definition gives. What is not understood is copied as
it is, so nothing is lost.

Source: Protocol Buffers Documentation, Encoding.
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Tuple, Union

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10

Content = Union[bytes, memoryview]


class Field(NamedTuple):
    """One field: its number, its value (an integer, or the bytes of a text, a message or a packed list), and ``whole``,
    the bytes that it stood in."""

    number: int
    value: Union[int, memoryview]
    whole: memoryview

    @property
    def text(self) -> str:
        return self.content.tobytes().decode("utf-8")

    @property
    def content(self) -> memoryview:
        if isinstance(self.value, int):
            raise ValueError(f"field {self.number} is a number")
        return self.value


def fields(message: Content) -> Iterator[Field]:
    """Yield the fields of a message, in order.

    Raises:
        ValueError: it is no message.
    """
    view = memoryview(message)
    at = 0
    while at < len(view):
        start = at
        tag, at = _varint(view, at)
        value: Union[int, memoryview]
        if tag & 7 == VARINT:
            value, at = _varint(view, at)
        elif tag & 7 in (FIXED64, FIXED32, BYTES):
            size = {FIXED64: 8, FIXED32: 4}.get(tag & 7, 0)
            if tag & 7 == BYTES:
                size, at = _varint(view, at)
            value, at = view[at : at + size], at + size
        else:
            raise ValueError(f"there is no kind of field {tag & 7}")
        if at > len(view) or not tag >> 3:
            raise ValueError("a field ends behind its message, or has no number")
        yield Field(tag >> 3, value, view[start:at])


def field(number: int, value: Union[int, str, Content]) -> bytes:
    """Return a field of a message: an integer that is not negative, a text, or bytes."""
    if isinstance(value, int):
        return _encoded(number << 3 | VARINT) + _encoded(value)
    content = value.encode("utf-8") if isinstance(value, str) else value
    return b"".join((_encoded(number << 3 | BYTES), _encoded(len(content)), content))


def numbers(value: Union[int, memoryview]) -> Tuple[int, ...]:
    """Return the integers of a repeated field's part: one, or a packed list."""
    if isinstance(value, int):
        return (value,)
    found: List[int] = []
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return tuple(found)


def _varint(view: memoryview, at: int) -> Tuple[int, int]:
    """Return the integer that begins at a place, and where it ends."""
    result = 0
    for index in range(LONGEST_VARINT):
        if at + index >= len(view):
            break
        byte = view[at + index]
        result |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return result, at + index + 1
    raise ValueError("an integer does not end")


def _encoded(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))
