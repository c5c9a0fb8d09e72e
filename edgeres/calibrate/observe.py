"""The calibration pass: run the FP32 model over the samples and count the tensors that will be quantized.

A batch is cut into parts, one for each of a few cores, which run side by side: no core waits for another at every
layer, and what onnxruntime does on one core, reordering what is exposed, goes on on all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from edgeres.calibrate.statistics import Statistics
from edgeres.errors import CalibrationError, first_line
from edgeres.provenance import cores

PARTS = 4  # at most: to count another part costs two or three milliseconds more, whatever its size


def observe(
    model: Path | bytes,
    tensors: Iterable[str],
    batches: Iterable[np.ndarray],
    progress: Callable[[int], None] = lambda done: None,
    earlier: Statistics | None = None,
    keep: Callable[[Statistics], None] = lambda statistics: None,
) -> Statistics:
    """Return the statistics of ``tensors`` over all batches, from one pass, in memory that does not grow with it.

    Args:
        model: the FP32 ONNX, or its path.
        tensors: names of the network's input or of any activation in the graph.
        batches: float32 ``(n, 3, h, w)`` each, normalized.
        progress: called with the number of samples done so far.
        earlier: what an interrupted pass over these tensors had counted; the batches go on behind it.
        keep: called after each batch with all that was counted so far, to be kept for such a case.

    Raises:
        CalibrationError: a tensor does not exist, there were no samples, the model does not run on them, or an
            activation is NaN or infinite.
    """
    names = sorted(set(tensors))
    stream = iter(batches)
    first = list(itertools.islice(stream, 1))
    session, exposed = _exposing_session(model, names, _parts(first[0]) if first else 1)
    stream = itertools.chain(first, stream)
    del first  # or its memory would be held to the end
    statistics = Statistics.empty(names)
    if earlier is not None:
        statistics.merge(earlier)
    for batch in stream:
        _count(session, exposed, batch, statistics)
        keep(statistics)
        progress(statistics.samples)
    if not statistics.samples:
        raise CalibrationError("there are no calibration samples. Name a folder with images: --calibration FOLDER")
    in_order = (session.get_inputs()[0].name, *exposed)
    broken = [name for name in in_order if name in names and statistics.tensors[name].not_finite]
    if broken:
        raise CalibrationError(
            f"{len(broken)} tensors became NaN or infinite during calibration, the first is {broken[0]}. "
            "The model overflows on these samples: check its weights and the mean and std of the recipe."
        )
    return statistics


def _parts(batch: np.ndarray) -> int:
    """Return how many parts of a batch are run side by side: no more than there are cores and samples."""
    return max(1, min(len(batch), cores(), PARTS))


def _count(session: ort.InferenceSession, exposed: list[str], batch: np.ndarray, statistics: Statistics) -> None:
    """Run one batch and count its activations, which are gone when this returns: they are nearly all of the memory."""
    name = session.get_inputs()[0].name

    def run(part: np.ndarray) -> dict[str, np.ndarray]:
        found = session.run(exposed, {name: part}) if exposed else []
        return {name: part, **dict(zip(exposed, found, strict=True))}

    parts = np.array_split(batch, _parts(batch))
    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            done = list(pool.map(run, parts))
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        raise CalibrationError(
            f"the model does not run on samples of shape {batch.shape}: {first_line(problem)}. "
            "Check that the recipe's input size is the model's."
        ) from problem
    for arrays in done:
        statistics.update(arrays, len(arrays[name]))


def _exposing_session(place: Path | bytes, names: list[str], callers: int) -> tuple[ort.InferenceSession, list[str]]:
    """Return a session with the wanted activations among its outputs, and their names in graph order, less the input.

    Cores that no part of a batch would keep busy, ``callers`` being run at a time, help these.
    """
    content, where = (place, "the model") if isinstance(place, bytes) else (place.read_bytes(), place.name)
    model = onnx.load_model_from_string(content)
    inputs = [value.name for value in model.graph.input]
    made = [output for node in model.graph.node for output in node.output if output]
    missing = [name for name in names if name not in (*inputs, *made)]
    if missing:
        raise CalibrationError(f"{where} has no tensor named {missing[0]!r}: the plan belongs to another model")
    exposed = [name for name in made if name in names]
    known = {value.name for value in model.graph.output}
    more = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in exposed if name not in known]
    # Protocol Buffers: of two messages one after the other, the second's repeated fields are added to the first's. To
    # serialize the whole model again would take as long as a few images.
    content += onnx.ModelProto(graph=onnx.GraphProto(output=more)).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is told by the exception
    options.enable_mem_pattern = False  # which takes one block for a whole run: a third more memory, and no faster
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its cores are needed for counting
    if callers > 1 or cores() == 1:  # a single caller gets as many threads as ONNX Runtime thinks best
        options.intra_op_num_threads = cores() - callers + 1
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        reason = first_line(problem)
        raise CalibrationError(f"onnxruntime does not accept {where}: {reason}. Export it again.") from problem
    return session, exposed
