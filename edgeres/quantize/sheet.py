"""A graph that is being written: nodes, constants, and names that nothing has yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.files import sha256_bytes
from edgeres.quantize.graph import unused

MICROSOFT = "com.microsoft"
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""The axes of an image in the order that puts its channels last, and first again."""


@dataclass
class Sheet:
    """Nodes and constants while they are written; ``used`` has every name that is taken."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def emit(self, op_type: str, inputs: Sequence[str], stem: str, domain: str = "", **attributes: Any) -> str:
        """Write a node of one output, and return that one's name."""
        output = self.name(stem)
        name = self.name(f"{output}_{op_type}")
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str]) -> str:
        """Write a node of one output with other inputs, and return that output's name, a new one."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.input[:] = inputs
        output = self.name(node.output[0])
        made.output[:] = [output]
        self.nodes.append(made)
        return output

    def constant(self, stem: str, values: np.ndarray | np.generic) -> str:
        """Return the name of an initializer with these values; equal ones are kept once."""
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        key = f"{array.dtype} {array.shape} {sha256_bytes(array.tobytes())}"
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, self.name(stem))
        return self.constants[key].name

    def name(self, stem: str) -> str:
        """Return a name that nothing has yet."""
        name = unused(stem, self.used)
        self.used.add(name)
        return name


def channels_last(values: np.ndarray) -> np.ndarray:
    """Return a constant that meets an image ``(N, C, H, W)`` as one that meets ``(N, H, W, C)``."""
    return np.asarray(values.reshape((1,) * (4 - values.ndim) + values.shape).transpose(LAST))
