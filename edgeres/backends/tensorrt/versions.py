"""Where TensorRT's versions differ, as rows: how layers get their types, where a DLA can be reached, what runs where.

Source: NVIDIA's headers and release notes from 8.5.2 to 11.4.1. Strong typing exists from 10.0, but NVIDIA calls it
fully available from 10.12; weak typing and its precision flags are gone in 11. Explicit quantization never reached the
DLA compiler of 10.x, whose last release with one is 10.7; it is back, strongly typed, in 11.4.1.
"""

from __future__ import annotations

from typing import Dict, Mapping, NamedTuple, Optional, Tuple

from edgeres.errors import BackendError

WEAK: Dict[str, Tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}
STRONG: Dict[str, Tuple[str, ...]] = {"fp32": (), "fp16": (), "int8": ()}


class Typing(NamedTuple):
    """How a version decides what each layer computes in.

    ``network_flags`` are members of NetworkDefinitionCreationFlag that must be given, ``flags_if_known`` those to give
    where the version has them; ``builder_flags`` members of BuilderFlag by precision. With ``strong`` typing layers
    compute in the types that the ONNX spells out, so FP16 has to stand in the graph.
    """

    network_flags: Tuple[str, ...]
    flags_if_known: Tuple[str, ...]
    builder_flags: Mapping[str, Tuple[str, ...]]
    strong: bool


TYPING: Tuple[Tuple[Tuple[int, ...], Typing], ...] = (
    ((1, 0), Typing((), ("STRONGLY_TYPED",), STRONG, True)),  # TensorRT for RTX counts from 1
    ((8, 5), Typing(("EXPLICIT_BATCH",), (), WEAK, False)),
    ((10, 0), Typing((), (), WEAK, False)),
    ((10, 12), Typing(("STRONGLY_TYPED",), (), STRONG, True)),
    ((11, 0), Typing((), (), STRONG, True)),
)
"""By the first version of the bindings that a row holds for."""

DLA: Tuple[Tuple[Tuple[int, ...], Optional[str]], ...] = (
    ((1, 0), None),
    ((8, 5), "implicit"),
    ((10, 8), None),
    ((11, 4, 1), "explicit"),
)
"""By first version: ``implicit`` takes its ranges from a calibration cache, ``explicit`` from Q/DQ, None has no DLA."""


UNROUNDED_SINCE = 8600
"""From this version on, as a calibration cache spells it (JetPack 6, DLA 3.14), a scale of 1.0 before an addition tells
a DLA not to round."""

SHARED_PROFILE: Tuple[Tuple[Tuple[int, ...], bool], ...] = (((1, 0), True), ((8, 5), False), ((10, 0), True))
"""By first version: may several execution contexts use the one optimization profile at a time?"""

FORWARD = {(8, 8), (8, 10), (10, 10), (10, 11), (11, 11)}
"""From which major version a version-compatible plan runs on which; never on an older one."""


def typing_of(release: Tuple[int, ...]) -> Typing:
    """Return the typing policy of a version of the bindings.

    Raises:
        BackendError: the version is older than every row.
    """
    rows = [row for since, row in TYPING if since <= release]
    if not rows:
        raise BackendError(f"TensorRT {'.'.join(map(str, release))} is not known to edgeres. Use 8.5 or newer.")
    return rows[-1]


def dla_of(release: Tuple[int, ...]) -> Optional[str]:
    """Return how a version quantizes for a DLA: ``implicit``, ``explicit``, or None where it has no DLA."""
    rows = [row for since, row in DLA if since <= release]
    return rows[-1] if rows else None


def shares_a_profile(release: Tuple[int, ...]) -> bool:
    """Whether several execution contexts may use one optimization profile at a time."""
    return [shared for since, shared in SHARED_PROFILE if since <= release][-1]


def graph_for(release: Tuple[int, ...], precision: str, target: str = "gpu") -> str:
    """Return which graph to hand to the builder.

    Returns:
        ``fp32`` or ``fp16``; for int8 ``qdq`` (FP32 with Q/DQ: the FP16 flag does the rest), ``qdq-fp16`` (what is not
        quantized is FP16 in the graph, for strong typing), or ``fp32`` for a DLA whose ranges come from a cache.
    """
    if precision != "int8":
        return precision
    if target != "gpu" and dla_of(release) == "implicit":
        return "fp32"
    return "qdq-fp16" if typing_of(release).strong else "qdq"
