"""Valid files of every kind, small, and made anew from the nouns that they hold."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from edgeres import files
from edgeres.artifacts import (
    CalibrationTable,
    Climb,
    Engine,
    ExportedModel,
    Hygiene,
    Manifest,
    Preprocessing,
    QuantizationErrors,
    QuantizedModel,
    Report,
    StageRecord,
    to_data,
    to_json,
)
from edgeres.judge import judge, reference_content
from edgeres.measurements import Benchmark
from edgeres.recipe import load_recipe, recipe_data
from edgeres.samples import samples_from_arrays

COUNT, KINDS = 20, 4
LABELS = np.arange(COUNT) % KINDS
LOGITS = np.float32(np.eye(KINDS)[LABELS])
FRAMES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)

WORDS = {
    **{"precision": "int8", "backend": "cpu", "target": "cpu", "verdict": "pass", "policy": "ci", "method": "mse"},
    **{"severity": "warning", "color": "rgb", "fit": "crop", "input": "float32", "rung": "fast", "kind": "few"},
    **{"activation_range": "symmetric", "source": "images", "interval_method": "Tango 1998"},
}


def example(kind: Any, name: str = "") -> Any:
    """Return a value of a type, every field of a noun filled."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union:
        return example(inner[0], name)
    if origin is tuple:
        return tuple(example(one, name) for one in inner if one is not Ellipsis)
    if origin is dict:
        return {"threads": "1"} if name == "options" else {"a": example(inner[1], name)}  # an engine's own
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field: example(hint, field) for field, hint in get_type_hints(kind).items()})
    plain = {int: 1, float: 0.5, bool: False, str: WORDS.get(name, name), Any: "anything"}
    return plain[kind]


def write_bundle(folder: Path, contents: Mapping[str, bytes] | None = None) -> Path:
    """Write a bundle without a model, with everything in it that a reader looks at; ``contents`` replace its files."""
    folder.mkdir(parents=True)
    made = {
        files.model_file("int8"): b"no model",
        files.RECIPE: b'[model]\nsource = "resnet8_cifar"\n',
        files.REFERENCE: reference_content(LOGITS, samples_from_arrays(FRAMES, LABELS)),
        files.TABLE: to_json(example(CalibrationTable)),
        files.ERRORS: to_json(example(QuantizationErrors)),
        **(contents or {}),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    refs = tuple(files.content_ref(name, content) for name, content in sorted(made.items()))
    ref = next(ref for ref in refs if ref.path == files.model_file("int8"))
    engine = msgspec.structs.replace(example(Engine), file=ref, model_sha256=ref.sha256)
    nouns = {"export": ExportedModel, "quantize": QuantizedModel, "hygiene": Hygiene, "budget": Climb}
    climb = msgspec.structs.replace(example(Climb), taken=0)
    facts = {name: to_data(climb if kind is Climb else example(kind)) for name, kind in nouns.items()}
    manifest = msgspec.structs.replace(
        example(Manifest),
        files=refs,
        recipe=recipe_data(load_recipe()),
        preprocessing=Preprocessing((8, 8)),
        engines=(engine,),
        report=a_report(),
        stages={name: StageRecord("key", (), 0.5, found) for name, found in facts.items()},
        provenance={"edgeres": "0"},
    )
    (folder / files.MANIFEST).write_bytes(to_json(manifest))
    return folder


def a_report() -> Report:
    """Return the report on an engine that answers like the reference."""
    engine = msgspec.structs.replace(example(Engine), file=files.content_ref("x", b""))
    found = judge(reference_content(LOGITS, samples_from_arrays(FRAMES, LABELS)), LOGITS, engine, (0.5, "ci"))
    return msgspec.structs.replace(found, samples_sha256="these")


def a_benchmark() -> Benchmark:
    """Return a result of `bench`, of the engine that :func:`example` makes."""
    found: Benchmark = msgspec.structs.replace(example(Benchmark), engine_sha256=example(Engine).file.sha256)
    return found


def png(frame: np.ndarray) -> bytes:
    """Return a frame, uint8 (H, W, 3), as a PNG file."""
    height, width, _ = frame.shape
    rows = b"".join(b"\0" + row.tobytes() for row in frame)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tar_header(name: str = "a.png", **fields: Any) -> bytes:
    """Return the header of a member of a tar, with whatever fields are asked for."""
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def tarred(kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of labelled images, as WebDataset writes them, with names that need all that a format has."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for number, frame in enumerate(FRAMES):
            for ending, content in (("png", png(frame)), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{'long' * 20}/{'name' * 10}{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def saved(save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    """Return what one of numpy's functions writes."""
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()
