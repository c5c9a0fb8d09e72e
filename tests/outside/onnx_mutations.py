"""Ways in which an ONNX file goes wrong field by field, so that it is still one to a parser."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from mutations import LIMITS, TEXTS, Mutation
from onnx import helper, numpy_helper

WORDS = (*TEXTS, "", "x", "c", "w", "/etc/passwd", "Conv", "Loop", "If", "Constant", "com.microsoft", "ai.onnx.ml")


def graph(text: str) -> bytes:
    """Return a model of ONNX text; initializers that it only declares get small numbers."""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    known = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.value_info if value.name not in known]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        values = (3 * random.standard_normal(shape)).astype(kind)
        model.graph.initializer.append(numpy_helper.from_array(values, value.name))
    content: bytes = model.SerializeToString()
    return content


def _messages(message: Message) -> Iterator[Message]:
    """Yield a message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _parsed(content: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.ParseFromString(content)
    return model


def other_values(content: bytes, random: Random) -> bytes:
    """Give some fields other values of their type."""
    model = _parsed(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        chosen = random.choice(list(_messages(model)))
        fields = [field for field in chosen.DESCRIPTOR.fields if field.type != field.TYPE_MESSAGE]
        if not fields:
            continue
        field = random.choice(fields)
        value = _value(field, random)
        try:
            if field.is_repeated:
                values = getattr(chosen, field.name)
                at = random.randrange(len(values) + 1)
                values[at : at + random.randint(0, 1)] = [value] * random.choice((1, 1, 3))
            else:
                setattr(chosen, field.name, value)
        except (ValueError, TypeError):  # beyond its type
            continue
    return bytes(model.SerializeToString())


def _value(field: object, random: Random) -> object:
    kind = field.type  # type: ignore[attr-defined]
    if kind in (field.TYPE_FLOAT, field.TYPE_DOUBLE):  # type: ignore[attr-defined]
        return random.choice((0.0, -1.0, 1e38, float("nan"), float("inf"), 0.5))
    if kind == field.TYPE_STRING:  # type: ignore[attr-defined]
        return random.choice(WORDS)
    if kind == field.TYPE_BYTES:  # type: ignore[attr-defined]
        return random.choice((b"", b"\0" * 7, random.randbytes(16), b"SAME_UPPER"))
    return random.choice((*range(30), *LIMITS))


def moved_fields(content: bytes, random: Random) -> bytes:
    """Take messages away, write them twice, or put one in the place of another of its kind."""
    model = _parsed(content)
    lists = [
        getattr(message, field.name)
        for message in _messages(model)
        for field, _ in message.ListFields()
        if field.type == field.TYPE_MESSAGE and field.is_repeated
    ]
    values = random.choice([found for found in lists if found])
    at, other = random.randrange(len(values)), random.randrange(len(values))
    way = random.choice(("take", "double", "copy"))
    if way == "take":
        del values[at]
    elif way == "double":
        values.add().CopyFrom(values[at])
    else:
        values[at].CopyFrom(values[other])
    return bytes(model.SerializeToString())


def outside_data(content: bytes, random: Random) -> bytes:
    """Say that some weights lie in a file elsewhere."""
    model = _parsed(content)
    tensors = [found for found in _messages(model) if isinstance(found, onnx.TensorProto)]
    tensor = random.choice(tensors)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = random.choice(("/etc/passwd", "../up.bin", "/dev/zero", ".", "", "a" * 5000, "no\0name", "missing.bin"))
    entries = {"location": place, "offset": str(random.choice(LIMITS)), "length": str(random.choice(LIMITS))}
    for key in random.sample(list(entries), random.randint(1, 3)):
        tensor.external_data.add(key=key, value=entries[key])
    return bytes(model.SerializeToString())


def nested_graphs(content: bytes, random: Random) -> bytes:
    """Put a graph into itself, some times over."""
    model = _parsed(content)
    try:
        for _ in range(random.choice((1, 3, 12, 30))):
            node = model.graph.node[random.randrange(len(model.graph.node))]
            inner = onnx.GraphProto.FromString(model.graph.SerializeToString())
            del inner.input[:]
            node.attribute.add(name=random.choice(("then_branch", "body")), type=onnx.AttributeProto.GRAPH, g=inner)
            if model.ByteSize() > 1 << 20:
                break
    except DecodeError:  # as deep as protobuf goes
        pass
    return bytes(model.SerializeToString())


FIELDS: dict[str, Mutation] = {
    "fields of other values": other_values,
    "fields deleted, doubled, moved": moved_fields,
    "weights that lie elsewhere": outside_data,
    "graphs within graphs": nested_graphs,
}
