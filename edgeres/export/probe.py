"""A quantized file run once as it is, on images that lie in its own input grid: the oracle of what is made of it.

What is made of a file is the float network that edgeres believes to stand within it. Two facts of one run judge that
belief: where a Q cuts off much of what reaches it, and so does more than round; and what the file answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from edgeres.artifacts import FileGrid
from edgeres.errors import ExportError, first_line
from edgeres.export.answers import batch_of, feed, is_turned, one_by_one, open_session, sqnr_db
from edgeres.export.scheme import DOMAINS, Q, scheme_of
from edgeres.export.unquantize import UNBOUNDED

SHARE = 0.1
"""Of the values of every image, so many beyond a grid's ends are an activation's cut: calibration cuts off a hundredth
at most on images like its own, activations such as hardtanh a third."""
KINDS = ((1.0, 0.0), (0.25, 0.0), (0.25, 0.375), (0.25, 0.75))
"""Contrast and darkest value of the images, in parts of the input grid: nothing tells which of them real ones are like,
and a net that was calibrated on dark ones with much the same value cuts off much of bright noise."""
FAR_DB = 10.0
"""Below this, a warning; below 0 dB, where the difference is larger than the answers, it is another network."""


@dataclass(frozen=True)
class Probed:
    """What one run of a file found.

    ``images`` are float32 ``(n, 3, H, W)``, ``answers`` float32 ``(n, classes)``, both empty where the file does not
    run, and then ``problem`` says why; ``saturated`` are the tensors in front of Qs that cut off much of them.
    """

    images: np.ndarray
    answers: np.ndarray
    saturated: frozenset[str] = frozenset()
    problem: str = ""


def probe(model: onnx.ModelProto, size: tuple[int, int] | None, seed: int) -> Probed:
    """Run a model, its Q/DQ as they are, in float32.

    Args:
        size: (height, width) in pixels, for a file that leaves them open.
        seed: of the images.
    """
    grids, constants = {}, {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        scheme = scheme_of(node, constants) if node.op_type == Q and node.domain in DOMAINS else ""
        if not isinstance(scheme, str) and scheme.grid is not None:
            grids[node.input[0]] = scheme.grid
    wanted = [name for name in grids if makers.get(name) in UNBOUNDED]
    try:
        session = open_session(_with_outputs(model, wanted), optimized=False)
        entry = session.get_inputs()[0]
        images = _images(_plane(entry.shape, size), grids.get(entry.name), seed)
        answers, shares = _run(session, images, {name: grids[name] for name in wanted})
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        nothing = np.zeros((0, 0), np.float32)
        return Probed(nothing, nothing, problem=first_line(problem).rstrip("."))
    return Probed(images, answers, frozenset(name for name, share in shares.items() if share > SHARE))


def judged(probed: Probed, content: bytes, where: str) -> str:
    """Return in words how the float network made of a file answers its probe, on the image that suits it best.

    Ranges cut off much of images unlike those that they were found on, so of a right network some are far and some are
    near (25 dB and more); of one that lacks an activation, all are far.

    Raises:
        ExportError: it is another network.
    """
    if probed.problem or not np.isfinite(probed.answers).all() or not probed.answers.any():
        reason = probed.problem or "its answers there are all zero, or not finite"
        return f"NOT COMPARED: the float network within it and the file itself ({reason})"
    ours = one_by_one(open_session(content), probed.images, 1).astype(np.float32)
    pairs = zip(probed.answers, ours, strict=True)
    found = max(sqnr_db(theirs, own) for theirs, own in pairs if theirs.any())
    how = f"SQNR {found:.1f} dB on the one of {len(ours)} random images in its input grid that suits it best"
    far = f"the float network that edgeres finds in {where} does not answer like the file itself ({how})"
    if found < 0:
        raise ExportError(
            f"{far}: a Q of the file does more than round, such as to stand for an activation that it no longer has. "
            "Start from the FP32 model; edgeres calibrates it."
        )
    if found < FAR_DB:
        return f"FAR FROM THE FILE: {far}; compare the accuracy of both before you use it"
    return f"the float network within it answers like the file ({how})"


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> bytes:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    given = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    return bytes(copy.SerializeToString())


def _plane(shape: list[object], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width) of a file's images."""
    if len(shape) != 4:
        raise ExportError("its input is no batch of images")
    plane = shape[1:3] if is_turned(shape) else shape[2:]
    given = [found if isinstance(found, int) and found > 0 else None for found in plane]
    height, width = (known or said for known, said in zip(given, size or (None, None), strict=True))
    if not height or not width:
        raise ExportError("its input size is open")
    return height, width


def _images(plane: tuple[int, int], grid: FileGrid | None, seed: int) -> np.ndarray:
    """Return images in the input grid, float32 ``(8, 3, H, W)``: of each kind one of noise and a smooth one."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 1, (2 * len(KINDS), 3, *plane))
    rows, columns = (np.arange(side) * min(side, 4) // side for side in plane)
    noise[1::2] = noise[1::2].take(rows, 2).take(columns, 3)
    contrast, darkest = (np.repeat(each, 2).reshape(-1, 1, 1, 1) for each in zip(*KINDS, strict=True))
    low, high = (grid.low * grid.scale, grid.high * grid.scale) if grid is not None else (-2.0, 2.0)
    return np.asarray(low + (high - low) * (darkest + contrast * noise), np.float32)


def _run(
    session: ort.InferenceSession, images: np.ndarray, grids: dict[str, FileGrid]
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the answers, and for each tensor the share of values beyond its grid, of the image that has fewest."""
    answers, copies, head = [], batch_of(session), session.get_outputs()[0].name
    shares = dict.fromkeys(grids, 1.0)
    names = list(grids)
    group = max(1, 64 // copies)  # a file with a large batch gives its tensors by groups: all at once fill the memory
    for one in images:
        fed = feed(session, np.repeat(one[None], copies, 0))
        answers.append(session.run([head], fed)[0][:1])
        for start in range(0, len(names), group):
            part = names[start : start + group]
            for name, values in zip(part, session.run(part, fed), strict=True):
                shares[name] = min(shares[name], _beyond(values, grids[name]))
    return np.concatenate(answers).astype(np.float32), shares


def _beyond(values: np.ndarray, grid: FileGrid) -> float:
    """Return the share of values beyond a grid's ends; where it begins at zero, beyond the upper one alone."""
    out = values > (grid.high + 0.5) * grid.scale
    if grid.low != 0:
        out |= values < (grid.low - 0.5) * grid.scale
    return float(out.mean()) if out.size else 0.0
