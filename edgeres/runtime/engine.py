"""A loaded engine: camera frames in, logits out."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import (
    Any,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Tuple,
    Type,
    overload,
    runtime_checkable,
)

import numpy as np

from edgeres.artifacts import Engine, Manifest
from edgeres.device_arrays import DeviceArray, device_array, lies_on_device
from edgeres.errors import BackendError
from edgeres.preprocess import output_shape
from edgeres.runtime.frames import (
    AnyArray,
    as_array,
    check_device_room,
    check_frames,
    engine_input,
    is_finite,
    room_for,
)
from edgeres.runtime.profile import Profile, WarmUp, latency
from edgeres.runtime.stream import Stages, answers


class OpenEngine(Protocol):
    """What every backend's ``open_engine`` returns."""

    @property
    def largest(self) -> Optional[int]:
        """The most samples that it computes at a time; None where it has no limit of its own."""

    @property
    def contexts(self) -> int:
        """How many calls it computes side by side to advantage; more are answered too, and gain nothing."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return logits float32 ``(N, K)`` of what its record says that it takes: float32 ``(N, 3, h, w)``, or uint8
        ``(N, h, w, 3)``, of any strides."""

    def close(self) -> None:
        """Free the engine."""


@runtime_checkable
class GpuEngine(OpenEngine, Protocol):
    """An open engine that also reads and fills arrays in its GPU's memory."""

    @property
    def classes(self) -> int:
        """How many logits a sample has."""

    @property
    def cuda_graphs(self) -> str:
        """``off``, ``on``, ``not yet``, or why its work cannot be recorded."""

    def fill(self, batch: AnyArray, out: AnyArray) -> None:
        """Write the logits of a batch of any size, which is as the engine takes it, into float32 ``(N, K)``."""


class _Prepared(NamedTuple):
    """An item of a stream, as the engine takes it, and what its answer is to look like."""

    batch: AnyArray
    single: bool
    paired: bool
    tag: Any


class LoadedEngine:
    """An open engine of a verified bundle; made by :func:`load`. Any number of threads may call it.

    ``manifest`` is the bundle's, ``record`` says which engine runs and what it was built for.
    """

    def __init__(self, runner: OpenEngine, manifest: Manifest, record: Engine, frames: str = "rgb") -> None:
        self._runner = runner
        self._flipped = frames == "bgr"
        self._gpu = runner if isinstance(runner, GpuEngine) else None
        self.manifest = manifest
        self.record = record
        self._shape = output_shape(manifest.preprocessing)
        self._normalized = record.input != "uint8"
        self._step = runner.largest or manifest.preprocessing.batch_size

    @property
    def input_shape(self) -> Tuple[int, int, int]:
        """The shape of one normalized input: (3, height, width)."""
        return self._shape

    @property
    def largest(self) -> Optional[int]:
        """The most frames that the engine computes at a time; None where it has no limit of its own."""
        return self._runner.largest

    @property
    def cuda_graphs(self) -> str:
        """Whether calls launch recorded work: ``off``, ``on``, ``not yet`` (a batch size is recorded once it has come
        five times in a row), or why they cannot; see :func:`load`."""
        return "off" if self._gpu is None else self._gpu.cuda_graphs

    @overload
    def __call__(self, frames: Any, out: Optional[np.ndarray] = None) -> np.ndarray: ...

    @overload
    def __call__(self, frames: Any, out: Any) -> Any: ...

    def __call__(self, frames: Any, out: Any = None) -> Any:
        """Return the logits of some frames.

        Args:
            frames: uint8 ``(N, H, W, 3)``, camera frames of any size, RGB (or as :func:`load` was told), which are
                resized, cropped and normalized as at calibration; or float32 ``(N, 3, h, w)``, normalized already, in
                the network's channel order. A NumPy array, or what shares one with NumPy, such as another library's
                tensor on the CPU (DLPack). An engine that takes pixels (``record.input``) gets back those that
                normalized input was made of: what it would have rounded it to, or nothing else than pixels. An engine
                on a GPU also takes what lies in that GPU's memory (``__cuda_array_interface__``, DLPack): C-contiguous,
                and as the engine takes it (its type too), for it is neither resized nor normalized, nor searched for
                NaN; pixels in the network's channel order.
            out: float32 ``(N, K)``, contiguous: the logits are written into it. After an error it may hold some. It is
                NumPy's, or, where the engine runs on a GPU, lies in that GPU's memory.

        Where one of the two lies on the GPU, all work that was begun there is waited for first, so that no producer
        is overtaken; a context other than the device's primary one has to be waited for by the caller. When the call
        returns, the logits are there for any stream, and the frames are no longer read.

        Returns:
            a NumPy array float32 ``(N, K)``; ``out`` where that is given.

        Raises:
            BackendError: the frames are neither, ``out`` is no such array, or the engine is closed; or it takes
                pixels, does not round to them itself, and normalized input was made of something else.
            SampleError: frames of that size do not cover the crop.
        """
        taken = frames
        ready = type(frames) is np.ndarray and (out is None or self._gpu is None) and self._as_it_is(frames)
        if not ready:
            array = self._read(frames)
            if isinstance(array, np.ndarray):
                check_frames(array, self._shape)
            if isinstance(array, DeviceArray) or (self._gpu is not None and out is not None and lies_on_device(out)):
                return self._filled(array, out)
            count, step = len(array), self._step
            if count > step:
                return self._joined((self._taken(array[i : i + step]) for i in range(0, count, step)), count, out)
            taken = self._taken(array)
        logits = self._runner(taken)
        if out is None:
            return logits
        room_for(out, logits.shape)[:] = logits
        return out

    def _as_it_is(self, frames: np.ndarray) -> bool:
        """Whether the engine can take an array with no more ado. A robot's usual call is one of these, and each line of
        Python between it and the engine costs microseconds, for the network has put it out of the caches."""
        return (
            self._normalized
            and frames.dtype == np.float32
            and frames.shape[1:] == self._shape
            and 0 < len(frames) <= self._step
            and frames.flags.c_contiguous
            and is_finite(frames)
        )

    def _taken(self, frames: np.ndarray) -> np.ndarray:
        """Return what the engine takes."""
        if self._flipped and frames.dtype == np.uint8:
            frames = frames[..., ::-1]
        return engine_input(frames, self.manifest.preprocessing, self.record)

    def _read(self, frames: Any) -> AnyArray:
        """Return frames as an array that shares their memory, on the CPU or on the engine's GPU."""
        if self._gpu is None or not lies_on_device(frames):
            return as_array(frames)
        array = device_array(frames)
        if self._flipped != (self.manifest.preprocessing.color == "bgr") and array.dtype == np.uint8:
            raise BackendError(
                f"frames on a GPU have to be in the network's channel order, {self.manifest.preprocessing.color}, for "
                "edgeres does not turn them there. Turn them yourself, or give them on the CPU."
            )
        return array

    def _ready(self, frames: AnyArray) -> AnyArray:
        """Return frames as the engine takes them; what lies on the GPU has to be so, and the engine sees to it."""
        if isinstance(frames, DeviceArray):
            return frames
        check_frames(frames, self._shape)
        return self._taken(frames)

    def _filled(self, frames: AnyArray, out: Any = None) -> Any:
        """Return the logits of frames that lie on the GPU, or are to be written to where ``out`` lies."""
        gpu = self._gpu
        assert gpu is not None
        room: AnyArray
        shape = (len(frames), gpu.classes)
        if out is not None and lies_on_device(out):
            room = device_array(out)
            check_device_room(room, shape)
        else:
            room = room_for(out, shape)
        if isinstance(frames, DeviceArray):
            gpu.fill(frames, room)
        else:
            for start in range(0, len(frames), self._step):
                rows = slice(start, start + self._step)
                gpu.fill(self._taken(frames[rows]), room[rows])
        return room if out is None else out

    def _joined(self, batches: Iterator[np.ndarray], count: int, out: Optional[np.ndarray] = None) -> np.ndarray:
        """Return the logits of ``count`` frames, which come in batches that the engine takes."""
        logits = self._runner(next(batches))
        result, done = room_for(out, (count, *logits.shape[1:])), len(logits)
        result[:done] = logits
        for batch in batches:
            result[done : done + len(batch)] = self._runner(batch)
            done += len(batch)
        return result

    def stream(self, frames: Iterable[Any], depth: int = 2, drop: bool = False) -> Generator[Any, None, None]:
        """Yield an answer for each item of a source, in order; the next items are read and computed meanwhile.

        A frame, uint8 ``(H, W, 3)`` or normalized float32 ``(3, h, w)``, is answered by float32 ``(K,)``, a batch of
        them, as the engine itself takes it, by ``(N, K)``. An item may also be a pair ``(frame, anything)``, and is
        then answered by ``(logits, anything)``: a time stamp, a header, the frame itself.

        The source is read in a thread of its own. Do not write into an array that it has given: it may still be read.
        The stream ends with the source, or when it is closed, broken out of, or forgotten; it then waits for what is
        being computed, and up to a second for a source that blocks. An error, the source's or the engine's, comes in
        its place, after the answers before it, and ends the stream. Use the stream from one thread; the engine may be
        called from others meanwhile.

        Args:
            frames: any iterable, also one without an end.
            depth: so many items are under way at most, each from the moment that the source is asked for it until you
                ask for the answer after its own. 1 overlaps nothing; 2 reads and prepares while the engine computes, or
                computes while you use an answer; 3 does all of that at once.
            drop: for a source that is faster than the engine: it is read all the time, and a frame that has not been
                begun when a newer one comes is left out. With ``depth=1`` each answer is to the newest frame there was
                when you asked.

        Raises:
            BackendError: at once, where ``depth`` is no positive whole number or ``frames`` cannot be iterated; in the
                stream, where a call would raise it, with the item's number (from 0).
            SampleError: in the stream: a frame does not cover the crop.
        """
        if not isinstance(depth, int) or depth < 1:
            raise BackendError(f"depth is {depth!r}: give a whole number, 1 or more")
        try:
            source = iter(frames)
        except TypeError:
            raise BackendError(
                f"a stream takes frames that can be iterated, not one {type(frames).__name__}. Give a list, a generator"
            ) from None
        stages = Stages(self._prepared, self._answered, self._runner.contexts)
        return answers(source, stages, depth, drop)

    def _prepared(self, item: Any) -> _Prepared:
        paired = isinstance(item, tuple)
        if paired and len(item) != 2:
            raise BackendError(f"a stream takes frames and pairs (frame, anything), not a tuple of {len(item)}")
        frame, tag = item if paired else (item, None)
        array = self._read(frame)
        single = array.ndim == 3
        if single:
            array = array.as_batch() if isinstance(array, DeviceArray) else array[np.newaxis]
        return _Prepared(self._ready(array), single, paired, tag)

    def _answered(self, prepared: _Prepared) -> Any:
        logits = self._computed(prepared.batch)
        answer = logits[0] if prepared.single else logits
        return (answer, prepared.tag) if prepared.paired else answer

    def _computed(self, batch: AnyArray) -> np.ndarray:
        if isinstance(batch, DeviceArray):
            logits: np.ndarray = self._filled(batch)
            return logits
        count, step = len(batch), self._step
        if count <= step:
            return self._runner(batch)
        return self._joined((batch[i : i + step] for i in range(0, count, step)), count)

    def warmup(self, runs: int = 10, frames: Any = None) -> WarmUp:
        """Run the engine so that later calls find it ready; return the seconds of a cold and of a warm call.

        Args:
            runs: how often.
            frames: what the engine will be called with: the first call on frames of a new size also prepares their
                resizing. None: one black frame of the input's size.

        Raises:
            BackendError: as a call does; or ``runs`` is not positive.
        """
        seconds = [sum(times) for times in self._timed(frames, runs)]
        return WarmUp(seconds[0], seconds[-1])

    def profile(self, frames: Any = None, runs: int = 200) -> Profile:
        """Return how long calls take, after ten that do not count.

        Args:
            frames: what the engine will be called with; None: one black frame of the input's size.
            runs: how many calls are timed; a 99th percentile wants hundreds.

        Raises:
            BackendError: as a call does; or ``runs`` is not positive.
        """
        self.warmup(10, frames)
        preprocess, inference = zip(*self._timed(frames, runs))
        total = [first + second for first, second in zip(preprocess, inference)]
        shape = self._some(frames).shape
        return Profile(shape, runs, latency(preprocess), latency(inference), latency(total), self.cuda_graphs)

    def _some(self, frames: Any) -> AnyArray:
        return np.zeros((1, *self._shape[1:], 3), np.uint8) if frames is None else self._read(frames)

    def _timed(self, frames: Any, runs: int) -> List[Tuple[float, float]]:
        """Return the seconds that preprocessing and inference took in each of some calls."""
        if runs < 1:
            raise BackendError(f"runs is {runs}: give 1 or more")
        given = self._some(frames) if frames is None else frames
        times = []
        for _ in range(runs):
            start = perf_counter()
            batch = self._ready(self._read(given))
            between = perf_counter()
            self._computed(batch)
            times.append((between - start, perf_counter() - between))
        return times

    def close(self) -> None:
        """Free the engine; calling it twice is fine, running it afterwards is refused."""
        self._runner.close()

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()
