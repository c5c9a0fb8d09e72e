"""ONNX files and checkpoints made to fill the memory, to never end, or to have something run."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from host_doors import NET
from hostile import BOMB, CODE, ENDLESS, NO_FILE, Commands, holding, sparse
from onnx import TensorProto, helper
from onnx_mutations import graph

from edgeres import models
from edgeres.backends.tensorrt.wire import field
from examples import saved

Write = Callable[[Path], object]
TAIL = "r = Relu (c) p = GlobalAveragePool (r) q = Flatten (p) y = MatMul (q, f) }"
HEAD = '<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,4] y) '


def net(body: str, constants: str = "", images: str = "float[N,3,8,8] x") -> Write:
    """Return a writer of the net with another beginning; ``constants`` stand beside its weights."""
    head = HEAD.replace("float[N,3,8,8] x", images)
    return holding(graph(f"{head}<float[4,3,3,3] w, float[4] b, float[4,4] f {constants}> {{ {body} {TAIL}"))


def added(maker: str, constants: str) -> Write:
    """Return a writer of the net with the largest number of a constant ``k`` added."""
    return net(f"{maker} m = ReduceMax <keepdims = 1> (k) c0 = Conv (x, w, b) c = Add (c0, m)", constants)


def edited(edit: Callable[[onnx.ModelProto], object]) -> Write:
    model = onnx.load_model_from_string(graph(NET))
    edit(model)
    return holding(model.SerializeToString())


def weights_in(place: str, **more: object) -> Write:
    """Return a writer of a model that keeps its first weights elsewhere."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": place, **more}.items():
            tensor.external_data.add(key=key, value=str(value))

    return edited(edit)


def shared(path: Path) -> None:
    """Write a model with twelve numbers that each are said to be a whole file of 200 MB."""
    model = onnx.load_model_from_string(graph(NET))
    for number in range(12):
        tensor = model.graph.initializer.add(name=f"more{number}", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="shared.bin")
    path.write_bytes(model.SerializeToString())
    path.with_name("shared.bin").touch()
    os.truncate(path.with_name("shared.bin"), 200_000_000)


def no_utf8(path: Path) -> None:
    """Write a model that keeps weights in a file whose name is no text."""
    weights_in("place-of-weights")(path)
    path.write_bytes(path.read_bytes().replace(b"place-of-weights", b"\xff" * 16))


def beside(name: str, make: Callable[[Path], object], place: str) -> Write:
    """Return a writer that makes something beside the model, which keeps weights at ``place``."""

    def write(path: Path) -> None:
        make(path.parent / name)
        weights_in(place)(path)

    return write


def dims(*extents: int) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = extents

    return edited(edit)


def nested(depth: int) -> bytes:
    """Return a model of that many branches in one another, deeper than Protocol Buffers read."""
    inner = b""
    for _ in range(depth):
        attribute = field(1, "then_branch") + field(20, 5) + field(6, inner)
        inner = field(1, field(2, "z") + field(4, "If") + field(5, attribute))
    return field(1, 8) + field(7, inner) + field(8, field(2, 17))


def functions(count: int) -> bytes:
    """Return a model whose functions, each of which calls the one before twice, are 2^count operators."""
    imports = 'opset_import: ["" : 17, "own" : 1]'
    text = f"<ir_version: 8, {imports}> net (float[N,3,8,8] x) => (float[N,4] y) {{ c = own.f{count} (x) {TAIL}\n"
    text += '<opset_import: ["" : 17], domain: "own"> f0 (x) => (y) { y = Relu (x) }\n'
    for number in range(1, count + 1):
        calls = f"a = own.f{number - 1} (x) y = own.f{number - 1} (a)"
        text += f'<{imports}, domain: "own"> f{number} (x) => (y) {{ {calls} }}\n'
    content: bytes = onnx.parser.parse_model(text).SerializeToString()
    return content


def library(model: onnx.ModelProto) -> None:
    """Name an operator of somebody's library, and where that lies."""
    node = model.graph.node[1]
    node.domain, node.op_type = "com.example", "Load"
    node.attribute.append(helper.make_attribute("library", "./owned.so"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))


DOUBLING = (
    " ".join(f"a{n + 1} = Concat <axis = 0> (a{n}, a{n})" for n in range(44)) + " k = Concat <axis = 0> (a44, a44)"
)
RELUS = "a0 = Conv (x, w, b) " + " ".join(f"a{n + 1} = Relu (a{n})" for n in range(20_000)) + " c = Relu (a20000)"
GRAPHS: tuple[tuple[str, Write], ...] = (
    (BOMB, dims(1 << 62, 1 << 62, 3, 3)),
    (BOMB, dims(-4, -3, 3, 3)),
    (BOMB, dims(1 << 62, 0, 3, 3)),
    (BOMB, net("c = Conv <pads = [99999, 99999, 99999, 99999]> (x, w, b)")),
    (BOMB, net("c = Conv <pads = [4611686018427387904, 1, 1, 1]> (x, w, b)")),
    (BOMB, net("e = Resize (x, , s) c = Conv (e, w, b)", ", float[4] s = {1, 1, 99999, 99999}")),
    (BOMB, net("c = Conv (x, w, b)", images="float[4,3,8192,8192] x")),
    (BOMB, net("c = Conv (x, w, b)", images="float[100000,3,224,224] x")),
    (BOMB, net("c = Conv (x, w, b)", images="float[9223372036854775807,3,8,8] x")),
    (BOMB, added("k = Expand (o, s)", ", float[1] o = {1}, int64[2] s = {100000000, 1000}")),
    (BOMB, added("k = ConstantOfShape (s)", ", int64[2] s = {5000000, 1000}")),
    (
        BOMB,
        added("i = Range (a, z, d) k = Cast <to = 1> (i)", ", int64 a = {0}, int64 z = {99999999999}, int64 d = {1}"),
    ),
    (BOMB, added("k = Tile (o, s)", ", float[1] o = {1}, int64[1] s = {99999999999}")),
    (BOMB, added("k = Pad (o, s)", ", float[1] o = {1}, int64[2] s = {0, 99999999999}")),
    (BOMB, added(DOUBLING, ", float[1] a0 = {1}")),
    (BOMB, beside("large.bin", sparse(), "large.bin")),
    (BOMB, shared),
    (ENDLESS, net(RELUS)),
    (ENDLESS, holding(functions(40))),
    (ENDLESS, holding(nested(5000))),
    (NO_FILE, weights_in("/etc/passwd", offset=0, length=432)),
    (NO_FILE, beside("../up.bin", holding(bytes(432)), "../up.bin")),
    (NO_FILE, beside("link.bin", lambda path: path.symlink_to("/etc/passwd"), "link.bin")),
    (NO_FILE, beside("zero.bin", lambda path: path.symlink_to("/dev/zero"), "zero.bin")),
    (NO_FILE, beside("pipe.bin", os.mkfifo, "pipe.bin")),
    (NO_FILE, beside("data.bin", holding(bytes(99)), "data.bin")),
    (NO_FILE, weights_in("missing.bin")),
    (NO_FILE, weights_in("")),
    (NO_FILE, weights_in("a" * 9999)),
    (NO_FILE, weights_in("no\0name")),
    (NO_FILE, no_utf8),
    (CODE, edited(library)),
    (CODE, weights_in("$(touch owned)")),
)


def zip_of(content: object, *changes: tuple[str, bytes]) -> Write:
    """Return a writer of a checkpoint in which members of these endings are others, and all are packed."""
    source = zipfile.ZipFile(io.BytesIO(saved(lambda stream: torch.save(content, stream))))
    members = {name: source.read(name) for name in source.namelist()}
    for ending, replacement in changes:
        members.update({name: replacement for name in members if name.endswith(ending)})
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, inner in members.items():
            archive.writestr(name, inner)
    return holding(stream.getvalue())


def torch_file(content: object, zipped: bool = True) -> Write:
    return holding(saved(lambda stream: torch.save(content, stream, _use_new_zipfile_serialization=zipped)))


def safetensors(header: object, length: int | None = None, data: bytes = b"") -> Write:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return holding(struct.pack("<Q", len(text) if length is None else length) + text + data)


def one(shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


STATE = models.create("resnet8_cifar", seed=0).state_dict()
CHECKPOINTS: tuple[tuple[str, str, Write], ...] = (
    (BOMB, "safetensors", safetensors({}, 1 << 60)),
    (BOMB, "safetensors", safetensors({"a": one([1 << 62, 1 << 62], 0, 0)})),
    (BOMB, "safetensors", safetensors({f"a{n}": one([2], 0, 8) for n in range(100)}, data=bytes(8))),
    (BOMB, "safetensors", safetensors({"a": one([2], 8, 0)}, data=bytes(8))),
    (ENDLESS, "safetensors", safetensors({f"a{n}": one([0], 0, 0) for n in range(200_000)})),
    (ENDLESS, "safetensors", safetensors(b'{"a":' + b"[" * 100_000)),
    (BOMB, "checkpoint (zip)", zip_of({"a": torch.zeros(4)}, ("/data/0", bytes(1 << 28)))),
    (BOMB, "checkpoint (zip)", torch_file({"a": torch.zeros(1).expand(1 << 40)})),
    (BOMB, "checkpoint (zip)", torch_file({**STATE, "fc.weight": torch.zeros(1).expand(1 << 20, 1 << 20)})),
    (
        BOMB,
        "checkpoint (zip)",
        torch_file({**STATE, "fc.weight": torch.zeros(10, 64, device="meta")}),
    ),
    (ENDLESS, "checkpoint (zip)", torch_file(dict.fromkeys([f"layer.{n}" for n in range(200_000)], torch.zeros(1)))),
    (ENDLESS, "checkpoint (zip)", torch_file({"module." * 500 + str(n): torch.zeros(1) for n in range(200)})),
    (ENDLESS, "checkpoint (pickle)", holding(b"\x80\x02" + b"]" * 3_000_000 + b".")),
    (BOMB, "checkpoint (pickle)", holding(b"\x80\x02\x8b" + struct.pack("<i", 2_000_000_000) + b"\x01" * 99)),
    (CODE, "checkpoint (zip)", torch_file({**STATE, "more": Commands()})),
    (CODE, "checkpoint (pickle)", torch_file({**STATE, "more": Commands()}, zipped=False)),
)
