"""What an engine takes and gives: arrays of others without a copy, and what is wrong with the rest, in words."""

from __future__ import annotations

import math
from typing import Any, Optional, Tuple, Union

import numpy as np

from edgeres.artifacts import Engine, Preprocessing
from edgeres.device_arrays import HOST_DEVICES, DeviceArray
from edgeres.errors import BackendError, first_line
from edgeres.preprocess import fit_batch, pixels_of, prepare_batch

AnyArray = Union[np.ndarray, DeviceArray]

NEAR = 0.01
"""How far from a pixel, in steps, normalized input may lie that stands for it: less than float16 can tell."""
SMALL = 10_000  # numbers; OpenBLAS spreads longer products over threads, which would disturb the engine's


def as_array(frames: Any) -> np.ndarray:
    """Return frames as a NumPy array that shares their memory.

    Args:
        frames: an array; or what gives one out, by DLPack (tensors of torch, JAX and others, on the CPU), ``__array__``
            or ``__array_interface__``.

    Raises:
        BackendError: it is nothing of the kind, it lies on a GPU, or its owner does not give it out.
    """
    if isinstance(frames, np.ndarray):
        return frames
    kind = type(frames).__name__
    try:
        if hasattr(frames, "__dlpack__") and hasattr(np, "from_dlpack"):  # NumPy 1.23
            if int(frames.__dlpack_device__()[0]) in HOST_DEVICES:
                shared: np.ndarray = np.from_dlpack(frames)
                return shared
        elif hasattr(frames, "__array__") or hasattr(frames, "__array_interface__"):
            return np.asarray(frames)
        elif not hasattr(frames, "__cuda_array_interface__"):
            raise BackendError(f"an engine takes an array, not a {kind}. Make one: numpy.asarray(…)")
    except BackendError:
        raise
    except Exception as problem:  # whatever its owner raises: a tensor with gradients, a type that NumPy does not know
        raise BackendError(f"this {kind} does not give out its numbers: {first_line(problem)}") from problem
    raise BackendError(f"this {kind} lies on a GPU; an engine takes arrays on the CPU. Copy it there first.")


def check_frames(frames: np.ndarray, shape: Tuple[int, int, int]) -> None:
    """Refuse what is neither uint8 ``(N, H, W, 3)`` nor finite float32 ``(N, *shape)``.

    Raises:
        BackendError: with what an engine takes, and what this is.
    """
    if frames.ndim == 4 and len(frames):
        if frames.dtype == np.uint8 and frames.shape[3] == 3:
            return
        if frames.dtype == np.float32 and frames.shape[1:] == shape:
            if not is_finite(frames):  # int8 would turn a NaN into a plausible answer
                raise BackendError(
                    "the input holds NaN or infinite numbers. Mend what makes it: a sensor, a mean, a std"
                )
            return
    _, height, width = shape
    raise BackendError(
        f"an engine takes uint8 frames (N, H, W, 3) or normalized float32 (N, 3, {height}, {width}), not "
        f"{frames.dtype} {frames.shape}"
    )


def is_finite(frames: np.ndarray) -> bool:
    """Whether an array has neither a NaN nor an infinity."""
    # A sum of squares is finite only where all numbers are, and found by one call: with the caches as a run of the net
    # leaves them, in half of the time of isfinite and all, which decide where squares overflow. vdot never warns.
    if frames.size <= SMALL and math.isfinite(np.vdot(frames, frames)):
        return True
    return bool(np.isfinite(frames).all())


def engine_input(frames: np.ndarray, preprocessing: Preprocessing, record: Engine) -> np.ndarray:
    """Return what the engine of a record takes, of RGB frames or of normalized input that have been checked.

    Normalized input for an engine that takes pixels becomes these pixels: exactly what the network would have rounded
    it to, where it rounds; elsewhere only if it was made of pixels, to a hundredth of a step.

    Args:
        frames: uint8 ``(N, H, W, 3)`` or float32 ``(N, 3, h, w)``.

    Returns:
        float32 ``(N, 3, h, w)`` or uint8 ``(N, h, w, 3)``, as the record says.

    Raises:
        BackendError: the engine takes pixels, and the input was made of something else.
        SampleError: frames of that size do not cover the crop.
    """
    if frames.dtype == np.uint8:
        return (fit_batch if record.input == "uint8" else prepare_batch)(frames, preprocessing)
    if record.input != "uint8":
        return np.ascontiguousarray(frames)
    pixels, distance = pixels_of(frames, preprocessing)
    if distance > NEAR and not record.whole_pixels:
        raise BackendError(
            f"this engine takes pixels, and the input is up to {distance:.3g} steps from any. Give it uint8 frames, or "
            "compile one that takes normalized input: edgeres compile BUNDLE --engine-input float32"
        )
    return pixels


class Fed:
    """A runner for normalized input, whatever the engine of a record takes; see :func:`engine_input`."""

    def __init__(self, runner: Any, record: Engine, preprocessing: Preprocessing) -> None:
        self.largest: Optional[int] = getattr(runner, "largest", None)
        self._runner, self._record, self._preprocessing = runner, record, preprocessing

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._runner(engine_input(batch, self._preprocessing, self._record))
        return logits

    def close(self) -> None:
        self._runner.close()


def room_for(out: Optional[np.ndarray], shape: Tuple[int, ...]) -> np.ndarray:
    """Return ``out`` if logits float32 of that shape can be written into it; a new array where it is None.

    Raises:
        BackendError: with everything that is wrong with it.
    """
    if out is None:
        return np.empty(shape, np.float32)
    if not isinstance(out, np.ndarray):
        raise BackendError(f"out is a {type(out).__name__}: give a float32 array {shape}")
    _check_room(out, shape, out.flags.c_contiguous, out.flags.writeable)
    return out


def check_device_room(out: DeviceArray, shape: Tuple[int, ...]) -> None:
    """Refuse an array on a GPU into which logits float32 of that shape cannot be written.

    Raises:
        BackendError: with everything that is wrong with it.
    """
    if out.copied:
        raise BackendError("out gives out a copy of itself, so nothing would arrive in it. Give an array that shares")
    _check_room(out, shape, True, not out.read_only)


def _check_room(out: AnyArray, shape: Tuple[int, ...], contiguous: bool, writeable: bool) -> None:
    wrong = []
    if out.shape != shape:
        wrong.append(f"its shape is {out.shape}")
    if out.dtype != np.float32:
        wrong.append(f"it is {out.dtype}")
    if not contiguous:
        wrong.append("it is not C-contiguous")
    if not writeable:
        wrong.append("it is read-only")
    if wrong:
        raise BackendError(f"out must be a writable, contiguous float32 array {shape}; {', '.join(wrong)}")
