"""What a test tells the double: the network it parses, the plan it builds, what fails and what is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Crash(BaseException):
    """What would bring the real process down, or is undefined there."""


class Call(NamedTuple):
    """One call (``kind`` "call"), or one property read or set ("get", "set"; ``arguments`` holds its value).

    Of an object only the name of its class is kept, so that recording it does not keep it alive."""

    kind: str
    path: str
    arguments: dict[str, Any]


class Tensor(NamedTuple):
    """An input or output of the scripted network; -1 in the shape is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "FLOAT"


class Layer(NamedTuple):
    """A layer of the scripted network; ``detail`` is its ActivationType, PoolingType or ElementWiseOperation."""

    name: str
    type: str = "CONVOLUTION"
    inputs: tuple[str, ...] = ("input",)
    outputs: tuple[str, ...] = ("logits",)
    detail: str = ""


class ParseError(NamedTuple):
    """One parse error, with the accessors that the release has."""

    desc: str
    code: str = "UNSUPPORTED_NODE"
    node: int = 0
    node_name: str = "conv1"
    node_operator: str = "Conv"
    line: int = 7
    file: str = "importer.cpp"
    func: str = "parse"


def mean_plus_index(inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """Write mean(sample) + k into logit k of each sample."""
    (batch,), (logits,) = inputs.values(), outputs.values()
    logits[:] = batch.reshape(len(batch), -1).mean(axis=1, keepdims=True) + np.arange(logits.shape[1])


@dataclass
class Script:
    """How the double behaves.

    ``returns`` overrides the result of any method: ``{"Builder.create_network": None}``. A callable gets the arguments
    by name; an exception under a class's name lets its constructor fail.

    Logs are (severity, text) pairs; ``phases`` are (name, parent, steps) of the progress monitor. ``profiles`` are the
    (min, opt, max) batches of a deserialized engine, ``contexts`` how many execution contexts it gives. ``lean``
    are the paths of lean runtimes, each with the one plan that it opens; ``level`` is the engine's
    HardwareCompatibilityLevel.
    """

    inputs: Sequence[Tensor] = (Tensor("input", (-1, 3, 8, 8)),)
    outputs: Sequence[Tensor] = (Tensor("logits", (-1, 10)),)
    layers: Sequence[Layer] = (Layer("conv1"), Layer("fc", "MATRIX_MULTIPLY"))
    parse_errors: Sequence[ParseError] = ()
    parse_log: Sequence[tuple[str, str]] = ()
    build_log: Sequence[tuple[str, str]] = ()
    phases: Sequence[tuple[str, str | None, int]] = (("Building Engine", None, 2), ("Tactics", "Building Engine", 3))
    plan: bytes | None = b"ftrt the plan of the double"
    dla_cores: int = 0
    dla_layers: Sequence[str] | None = None
    timing_cache: bytes = b"ptrt a timing cache"
    profiles: Sequence[tuple[int, int, int]] = ((1, 4, 8),)
    contexts: int = 64
    level: str = "NONE"
    engine_log: Sequence[tuple[str, str]] = ()
    lean: Mapping[str, bytes] = field(default_factory=dict)
    layer_information: str = '{"Layers": []}'
    compute: Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None] = mean_plus_index
    returns: dict[str, Any] = field(default_factory=dict)
