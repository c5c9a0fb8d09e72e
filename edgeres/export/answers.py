"""What an ONNX file answers in onnxruntime, in the type and layout of images that it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgeres.errors import ExportError, first_line


def open_session(content: bytes | str, optimized: bool = True) -> ort.InferenceSession:
    """Return a session on the CPU; ``optimized`` lets onnxruntime fuse and use int8 kernels of its own."""
    options = ort.SessionOptions()
    if not optimized:  # ONNX Runtime's own int8 kernels saturate on some processors
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what fails here is told by the exception
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def batch_of(session: ort.InferenceSession) -> int:
    """Return how many images a file takes at once; 1 where it leaves that open."""
    batch = session.get_inputs()[0].shape[0]
    return batch if isinstance(batch, int) and batch > 0 else 1


def is_turned(shape: list[object]) -> bool:
    """Whether an input's shape is that of images with their channels last."""
    return len(shape) == 4 and shape[3] == 3 and shape[1] != 3


def feed(session: ort.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return images, float32 ``(n, 3, H, W)``, as a session takes them."""
    entry = session.get_inputs()[0]
    x = images.astype(np.float16) if "float16" in entry.type else images
    return {entry.name: x.transpose(0, 2, 3, 1) if is_turned(entry.shape) else x}


def one_by_one(session: ort.InferenceSession, images: np.ndarray, copies: int) -> np.ndarray:
    """Return the first output for images, float32 ``(n, 3, H, W)``, each in a batch of so many copies of itself."""
    return np.concatenate([session.run(None, feed(session, np.repeat(one[None], copies, 0)))[0][:1] for one in images])


def answers_of(source: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits of a user's own file as it is, float32 ``(n, classes)``, nothing fused or optimized.

    Args:
        images: float32 ``(n, 3, H, W)``, normalized; they are fed in batches of the size that the file fixes, or one by
            one, in the type and layout that it takes.

    Raises:
        ExportError: it does not run.
    """
    try:
        session = open_session(str(source), optimized=False)
        batch, found = batch_of(session), []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            full = np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)])
            found.append(session.run(None, feed(session, full))[0][: len(part)])
        return np.concatenate(found).astype(np.float32)
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        raise ExportError(f"{source} does not run in onnxruntime: {first_line(problem)}. Export it again.") from None


def sqnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    """Return how far answers stand above their difference, in dB; −infinity where shapes or numbers do not compare."""
    if got.shape != wanted.shape or not (np.isfinite(got).all() and np.isfinite(wanted).all()):
        return float("-inf")
    signal, noise = (float(np.square(x.astype(np.float64)).sum()) for x in (wanted, got - wanted))
    if not noise:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal else float("-inf")
