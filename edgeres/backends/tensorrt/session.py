"""A plan that runs: frames in, logits out, from any number of threads, and nothing left behind at the end.

One code path on the interface that TensorRT 8.5 to 11 share. A session holds a fixed number of lanes: an execution
context, a stream and buffers for the largest batch, all made when it opens, so that one that has opened needs no more
memory. Callers wait for an idle lane.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

import numpy as np

from edgeres.backends.tensorrt.compat import lean_version, problems, this_machine
from edgeres.backends.tensorrt.device import Device, open_device
from edgeres.backends.tensorrt.device.interface import advice
from edgeres.backends.tensorrt.graphs import Launcher, Recording
from edgeres.backends.tensorrt.lean import lean_runtimes
from edgeres.backends.tensorrt.logger import Record, make_logger
from edgeres.backends.tensorrt.module import load_module, member, version, words
from edgeres.backends.tensorrt.versions import shares_a_profile
from edgeres.device_arrays import DeviceArray
from edgeres.errors import BackendError

AnyArray = Union[np.ndarray, DeviceArray]


class Tensors(NamedTuple):
    """An engine's input ``(N, *shape)`` and output ``(N, classes)``, and the least and the largest N that it takes;
    ``dtype`` is the input's: float32 for normalized images, uint8 for pixels."""

    input: str
    output: str
    shape: Tuple[int, ...]
    classes: int
    least: int
    largest: int
    dtype: Type[np.generic] = np.float32


def open_session(
    plan: bytes,
    built_for: Mapping[str, str],
    *,
    flavour: str = "tensorrt",
    device: Optional[Device] = None,
    contexts: int = 2,
    place: str = "BUNDLE",
    cuda_graphs: bool = False,
) -> Session:
    """Open a plan on a GPU. Its hash must have been verified: a plan is executable code.

    Args:
        plan: the engine as TensorRT serialized it.
        built_for: what it fits, see :mod:`edgeres.backends.tensorrt.compat`; ``target`` may name a DLA core: ``dla1``.
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        device: the GPU, which stays open when the session closes; by default the first one, which closes with it.
        contexts: how many batches may be computed at a time; each takes memory of its own.
        place: the bundle, for messages.
        cuda_graphs: record the work of a batch size that comes again and again, see
            :mod:`edgeres.backends.tensorrt.graphs`.

    Raises:
        MissingPackageError: TensorRT, or both cuda-python and pycuda, are not installed.
        BackendError: the plan does not fit this machine (TensorRT has then not seen it), TensorRT refuses it, or memory
            does not suffice.
    """
    if contexts < 1:
        raise BackendError(f"a session needs at least one context, not {contexts}. Use 1 or more.")
    trt = load_module(flavour)
    with ExitStack() as last:
        if device is None:
            device = open_device()
            last.callback(device.close)
        lean = lean_runtimes() if built_for.get("version_compatible") else {}
        here = {**this_machine(trt, device), "lean_runtimes": ", ".join(lean)}
        unfit = problems(built_for, here, place)
        if unfit:
            raise BackendError("\n".join(unfit))
        held = ExitStack()
        try:
            with device.current():
                engine = _Engine(trt, place, held)
                engine.use(lean.get(lean_version(built_for, here)))
                engine.deserialize(plan, built_for.get("target", "gpu"))
                tensors = engine.tensors()
                count = contexts if engine.shares_its_profile else 1
                recording = Recording(cuda_graphs)
                lanes = [_Lane(engine, device, tensors, recording, held) for _ in range(count)]
        except BaseException:
            with suppress(BackendError):  # what went wrong first is what must be read
                _free(device, held)
            raise
        return Session(device, lanes, held, last.pop_all())


class Session:
    """An open engine; made by :func:`open_session`. Any number of threads may call it.

    ``tensors`` says what it takes and gives; ``contexts`` how many batches are computed at a time: as many as asked
    for, but one on TensorRT 8, where an optimization profile serves a single context.
    """

    def __init__(self, device: Device, lanes: List[_Lane], held: ExitStack, last: ExitStack) -> None:
        self.tensors = lanes[0].tensors
        self._recording = lanes[0].recording
        self.contexts = len(lanes)
        self._device = device
        self._lanes = lanes
        self._busy: Dict[_Lane, object] = {}
        self._held = held
        self._last = last
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._state = "open"

    @property
    def largest(self) -> int:
        """The most samples that the engine computes at a time."""
        return self.tensors.largest

    @property
    def classes(self) -> int:
        """How many logits a sample has."""
        return self.tensors.classes

    @property
    def cuda_graphs(self) -> str:
        """``off``, ``on``, ``not yet``, or why TensorRT's work cannot be recorded."""
        return self._recording.state

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return the logits of a batch of any size, computed in pieces that the engine takes.

        Args:
            batch: float32 ``(N, 3, h, w)``, normalized; or what ``tensors`` says: uint8 ``(N, h, w, 3)``, any strides.

        Returns:
            float32 ``(N, K)``.

        Raises:
            BackendError: the array does not fit, the session is closed, or TensorRT or CUDA fails.
        """
        self._check(batch)
        logits = np.empty((len(batch), self.tensors.classes), np.float32)
        self._run(batch, logits)
        return logits

    def fill(self, batch: AnyArray, out: AnyArray) -> None:
        """Write the logits of a batch into an array; each of the two may lie on this GPU.

        Where one does, all work of the GPU is waited for first: the batch's producer may still be writing, or a reader
        of ``out`` still reading, on any stream. That waits for batches on other lanes, too.

        Args:
            batch: as for a call; on the GPU it is not looked through.
            out: float32 ``(N, K)``, C-contiguous and writable.

        Raises:
            BackendError: an array does not fit, the session is closed, or TensorRT or CUDA fails.
        """
        self._check(batch)
        shape = (len(batch), self.tensors.classes)
        if out.shape != shape or out.dtype != np.float32:
            raise BackendError(f"out must be a float32 array {shape}, not {out.dtype} {out.shape}")
        for array in (batch, out):
            if isinstance(array, DeviceArray) and array.gpu not in (None, self._device.index):
                raise BackendError(
                    f"an array lies on GPU {array.gpu}, the engine on GPU {self._device.index}. Copy it there first."
                )
        self._run(batch, out)

    def _run(self, batch: AnyArray, out: AnyArray) -> None:
        call = object()
        try:
            try:
                lane = self._take(call)
                with self._device.current():
                    lane.run(batch, out)
            finally:
                self._give(call)
        finally:  # an interrupt may have divided the first
            self._give(call)

    def close(self) -> None:
        """Let running calls end, then free everything; calls that wait are refused. Calling it twice is fine.

        Raises:
            BackendError: CUDA refused to free something; all else is freed, and the session is closed.
        """
        with self._lock:
            while self._state == "closing":
                self._changed.wait()
            if self._state == "closed":
                return
            self._state = "closing"
            self._changed.notify_all()
            try:
                while self._busy:
                    self._changed.wait()
            except BaseException:  # interrupted: it stays open, and may be closed again
                self._settle("open")
                raise
            self._lanes = []
        try:
            with self._last:
                _free(self._device, self._held)
        finally:
            with self._lock:
                self._settle("closed")

    def _settle(self, state: str) -> None:
        self._state = state
        self._changed.notify_all()

    def _check(self, batch: AnyArray) -> None:
        shape, kind = self.tensors.shape, self.tensors.dtype
        known = isinstance(batch, (np.ndarray, DeviceArray))
        if known and batch.dtype == kind and batch.ndim == 4 and batch.shape[1:] == shape:
            return
        found = f"{batch.dtype} {batch.shape}" if known else type(batch).__name__
        wanted = ", ".join(str(size) for size in shape)
        advice = "Prepare frames as its recipe says."
        if isinstance(batch, DeviceArray):
            advice = "On a GPU edgeres neither resizes nor normalizes: do it there, or give the frames on the CPU."
        raise BackendError(f"this engine takes {kind.__name__} (N, {wanted}), not {found}. {advice}")

    def _take(self, call: object) -> _Lane:
        """Return a lane that is now the call's own; wait for one."""
        with self._lock:
            while self._state == "open" and len(self._busy) == len(self._lanes):
                self._changed.wait()
            if self._state != "open":
                raise BackendError("this engine is closed. Load the bundle again.")
            lane = next(lane for lane in self._lanes if lane not in self._busy)
            self._busy[lane] = call  # in one step: an interrupt finds the lane idle, or the call its owner
            return lane

    def _give(self, call: object) -> None:
        """Let others have the lane of a call, if it has one."""
        with self._lock:
            for lane in [lane for lane, owner in self._busy.items() if owner is call]:
                del self._busy[lane]
            self._changed.notify_all()


class _Engine:
    """A deserialized plan. It is forgotten backwards: TensorRT wants the runtime to outlive it, and it its contexts."""

    def __init__(self, trt: Any, place: str, held: ExitStack) -> None:
        self._trt = trt
        self._place = place
        self._record = Record()
        self._logger: Any = make_logger(trt, self._record)
        held.callback(self._forget)
        try:
            self._runtime: Any = trt.Runtime(self._logger)
        except (TypeError, RuntimeError) as problem:  # what the bindings make of a null pointer
            raise self.failed(f"opening its runtime ({problem})") from problem
        self._newer: Any = None
        self._engine: Any = None
        self.shares_its_profile = shares_a_profile(version(trt))

    def use(self, lean: Optional[str]) -> None:
        """Open the plan with an older version's lean runtime, at that path; None leaves it to this version's own."""
        if lean is None:
            return
        older = self._runtime.load_runtime(lean)
        if older is None:
            raise self.failed(f"loading {lean}")
        self._newer, self._runtime = self._runtime, older

    def deserialize(self, plan: bytes, target: str) -> None:
        """Give the plan to TensorRT. ``engine_host_code_allowed`` stays as it is, off."""
        if target not in ("", "gpu", "dla0", "dla1"):
            raise BackendError(f"the engine was built for {target!r}, which is no device. Compile the bundle again.")
        if target.startswith("dla"):
            core = int(target[len("dla") :])
            if core >= self._runtime.num_DLA_cores:
                raise BackendError(
                    f"engine was built for DLA core {core}; this machine has {self._runtime.num_DLA_cores} that "
                    f"{words(self._trt)} can use. Compile it for the GPU: edgeres compile {self._place} --target gpu"
                )
            self._runtime.DLA_core = core
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            cause = "".join(self._record.errors[:1])  # what follows it may have another reason: there is no GPU, too
            mend = advice(cause, f"Compile it again: edgeres compile {self._place}")
            said = self._said()
            raise BackendError(f"{words(self._trt)} failed at opening this plan: {said}. {mend}")

    def tensors(self) -> Tensors:
        """Return what goes in and out, if it is one batch of images, float32 or uint8, and one of float32 logits."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        entering = member(trt.TensorIOMode, "INPUT")
        inputs = [name for name in names if engine.get_tensor_mode(name) == entering]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise self._foreign(f"inputs {inputs} and outputs {outputs} instead of one of each")
        types = [engine.get_tensor_dtype(name) for name in (*inputs, *outputs)]
        floats, pixels = member(trt.DataType, "FLOAT"), member(trt.DataType, "UINT8")
        if types[0] not in (floats, pixels) or types[1] != floats:
            raise self._foreign(f"types {types[0]} and {types[1]} instead of float32 (or uint8) and float32")
        dtype: Type[np.generic] = np.uint8 if types[0] == pixels else np.float32
        least = largest = frames = tuple(engine.get_tensor_shape(inputs[0]))
        if -1 in frames:
            least, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(inputs[0], 0))
        logits = tuple(engine.get_tensor_shape(outputs[0]))
        if len(frames) != 4 or least[1:] != largest[1:] or not 1 <= least[0] <= largest[0]:
            raise self._foreign(f"an input of {least} to {largest} instead of (N, 3, h, w) or (N, h, w, 3)")
        if len(logits) != 2 or logits[1] < 1:
            raise self._foreign(f"an output of {logits} instead of (N, K)")
        return Tensors(inputs[0], outputs[0], largest[1:], logits[1], least[0], largest[0], dtype)

    def create_context(self) -> Any:
        """Return an execution context; its activations take memory on the GPU."""
        context = self._engine.create_execution_context()
        if context is None:
            raise self.failed("creating an execution context")
        return context

    def failed(self, doing: str) -> BackendError:
        """Return the error for a call that answered None or False."""
        said = self._said()
        return BackendError(f"{words(self._trt)} failed at {doing}: {said}. {advice(said)}")

    def _said(self) -> str:
        """Return what TensorRT said since it was last asked."""
        said = self._record.last_words()
        self._record.take(0)
        return said

    def _foreign(self, what: str) -> BackendError:
        return BackendError(f"this engine has {what}; edgeres did not build it. Compile: edgeres compile {self._place}")

    def _forget(self) -> None:
        self._engine = None
        self._runtime = None
        self._newer = None  # it made the one before, and translates its calls
        self._logger = None


class _Lane:
    """One execution context with its stream and buffers; one thread at a time. All of it is freed by ``held``."""

    def __init__(
        self, engine: _Engine, device: Device, tensors: Tensors, recording: Recording, held: ExitStack
    ) -> None:
        self._engine = engine
        self._device = device
        self.tensors = tensors
        self.recording = recording
        self._stream = device.create_stream()
        held.callback(device.destroy_stream, self._stream)
        buffers: List[Tuple[np.ndarray, int]] = []
        for shape, dtype in ((tensors.shape, tensors.dtype), ((tensors.classes,), np.float32)):
            host = device.pinned((tensors.largest, *shape), dtype)
            held.callback(device.free_pinned, host)
            address = device.allocate(host.nbytes)
            held.callback(device.free, address)
            buffers.append((host, address))
        (self._frames, self._frames_address), (self._logits, self._logits_address) = buffers
        self._context: Any = engine.create_context()
        held.callback(self._forget)
        self._launcher = Launcher(device, self._stream, recording)
        held.callback(self._launcher.forget)
        self._rows = 0
        self._bind()

    def _bind(self) -> None:
        """Tell the context its profile and its buffers, and hear from it that they fit."""
        context, tensors = self._context, self.tensors
        if not context.set_optimization_profile_async(0, self._stream):
            raise self._engine.failed("choosing the optimization profile")
        self._reshape(tensors.largest)
        for name, address in ((tensors.input, self._frames_address), (tensors.output, self._logits_address)):
            if not context.set_tensor_address(name, address):
                raise self._engine.failed(f"binding the buffer of {name}")
        logits = tuple(context.get_tensor_shape(tensors.output))
        if logits != self._logits.shape:
            raise BackendError(
                f"the engine answers {self._frames.shape} with {logits} instead of {self._logits.shape}; "
                "edgeres did not build it. Compile it again."
            )
        self._device.synchronize(self._stream)

    def run(self, batch: AnyArray, logits: AnyArray) -> None:
        """Write the logits of a batch of any size; the device's context is current."""
        step = self.tensors.largest
        try:
            if isinstance(batch, DeviceArray) or isinstance(logits, DeviceArray):
                self._device.synchronize_all()
            for start in range(0, len(batch), step):
                self._run_piece(batch[start : start + step], logits[start : start + step])
        except BaseException:
            self._rows = 0
            with suppress(BackendError):  # the next caller must not find copies still under way
                self._device.synchronize(self._stream)
            raise

    def _run_piece(self, batch: AnyArray, logits: AnyArray) -> None:
        count = len(batch)
        rows = max(count, self.tensors.least)
        if rows != self._rows:
            self._reshape(rows)
        self._bring(batch, rows)
        self._launcher.run(self._enqueue)
        if isinstance(logits, DeviceArray):
            self._device.copy(logits.address, self._logits_address, logits.nbytes, self._stream)
            self._device.synchronize(self._stream)
        else:
            self._device.download(self._logits[:rows], self._logits_address, self._stream)
            self._device.synchronize(self._stream)
            logits[:] = self._logits[:count]

    def _bring(self, batch: AnyArray, rows: int) -> None:
        """Begin to fill the input: with a batch, and with zeros behind it up to ``rows``."""
        count, first = len(batch), 0
        if isinstance(batch, DeviceArray):
            self._device.copy(self._frames_address, batch.address, batch.nbytes, self._stream)
            first = count
        else:
            _copy(batch, self._frames[:count])
        self._frames[count:rows] = 0
        if first < rows:
            address = self._frames_address + self._frames[:first].nbytes
            self._device.upload(address, self._frames[first:rows], self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._engine.failed(f"running a batch of {self._rows}")

    def _reshape(self, rows: int) -> None:
        self._launcher.forget()
        if not self._context.set_input_shape(self.tensors.input, (rows, *self.tensors.shape)):
            raise self._engine.failed(f"taking a batch of {rows}")
        self._rows = rows

    def _forget(self) -> None:
        self._context = None


def _copy(batch: np.ndarray, target: np.ndarray) -> None:
    """Copy a batch; reversed channels one by one, for which NumPy needs a fifth of the time."""
    if batch.strides[-1] >= 0:
        target[:] = batch
        return
    for channel in range(batch.shape[-1]):
        target[..., channel] = batch[..., channel]


def _free(device: Device, held: ExitStack) -> None:
    """Free all that is held, in the device's context if it can still be entered; the last refusal is raised."""
    with held, device.current():  # freed within; `held` frees what is left where the context could not be entered
        held.close()
