"""The doors of the building host: ONNX files, checkpoints, and what calibration keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from doors import FOLDER, Door, base_doors, enter_wire
from mutations import ARCHIVED, BINARY, inside_safetensors
from onnx_mutations import FIELDS, graph
from safetensors.torch import save

from edgeres import models
from edgeres.calibrate import Statistics
from edgeres.export import adopt_onnx
from edgeres.inspection import inspect_file
from examples import COUNT, FRAMES, LOGITS, saved

NET = """<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,4] y) <float[4,3,3,3] w, float[4] b, float[4,4] f> {
  c = Conv <pads = [1, 1, 1, 1]> (x, w, b) r = Relu (c) p = GlobalAveragePool (r) q = Flatten (p) y = MatMul (q, f)
}"""
CONTROLLED = """<ir_version: 8, opset_import: ["" : 13]>
net (float[1,3,8,8] x) => (float[1,4] y) <float[4,3,1,1] w, bool yes = {1}, float[4,4] f> {
  c = Conv (x, w)
  r = If (yes) <then_branch = a () => (z) { z = Relu (c) }, else_branch = b () => (z) { z = Identity (c) }>
  s = Shape (r) n = Constant <value_ints = [0]> () m = Gather (s, n) o = Constant <value_ints = [-1]> ()
  t = Concat <axis = 0> (m, o) p = GlobalAveragePool (r) q = Reshape (p, t) y = MatMul (q, f)
}"""
QUANTIZED = """<ir_version: 8, opset_import: ["" : 13]>
net (float[N,3,8,8] x) => (float[N,4] y)
<float s = {0.05}, int8 z = {0}, int8[4,3,3,3] w, float v = {0.01}, float[4,4] f> {
  xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) wd = DequantizeLinear (w, v, z)
  c = Conv <pads = [1, 1, 1, 1]> (xd, wd) r = Relu (c) p = GlobalAveragePool (r) q = Flatten (p) y = MatMul (q, f)
}"""


def host_doors(folder: Path) -> dict[str, Door]:
    """Return the doors of the building host, by name; seeds are made in an empty ``folder``."""

    module = models.create("resnet8_cifar", seed=0)

    def weights(path: Path) -> None:
        models.load_weights(models.create("resnet8_cifar", seed=0), path)

    def torch_file(zipped: bool) -> bytes:
        return saved(
            lambda stream: torch.save(
                {"state_dict": module.state_dict()}, stream, _use_new_zipfile_serialization=zipped
            )
        )

    def onnx_file(path: Path) -> None:
        inspect_file(path)
        adopt_onnx(path, None)

    statistics = Statistics.empty(["a", "b"])
    statistics.update({"a": LOGITS, "b": FRAMES.astype(np.float32)}, COUNT)
    graphs = tuple(graph(text) for text in (NET, CONTROLLED, QUANTIZED))
    header = {"changed inside, lengths right": inside_safetensors}
    return {
        "onnx": Door(".onnx", graphs, onnx_file, {**BINARY, **FIELDS}),
        "onnx on a robot": Door(".onnx", (graph(NET),), enter_wire, {**BINARY, **FIELDS}),
        "checkpoint (zip)": Door(".pt", (torch_file(True),), weights, ARCHIVED),
        "checkpoint (pickle)": Door(".pth", (torch_file(False),), weights, BINARY),
        "safetensors": Door(".safetensors", (save(module.state_dict()),), weights, {**BINARY, **header}),
        "statistics": Door(
            ".npz",
            (statistics.to_bytes(),),
            lambda path: Statistics.from_bytes(path.read_bytes(), str(path)),
            ARCHIVED,
        ),
    }


def all_doors(folder: Path, names: Sequence[str] = ()) -> dict[str, Door]:
    """Return all doors, or those of some names."""
    (folder / "base").mkdir()
    doors = {**base_doors(folder / "base"), **host_doors(folder), "folder": FOLDER}
    return {name: door for name, door in doors.items() if not names or name in names}
