"""What running does: runtimes, engines, inspectors and execution contexts that really compute."""

from __future__ import annotations

import ctypes
import re
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrt_double.acts import acts, alive, dims
from tensorrt_double.script import Crash, Tensor

if TYPE_CHECKING:
    from tensorrt_double.strict import Double

TYPE_IN_JSON = re.compile(r'"(Format/Datatype|Datatype|Format)": "[^"]*"')
"""What an inspector leaves open of an engine with a free batch until a context knows its shapes; not the weights'."""

NUMPY_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "UINT8": np.uint8}


@acts("module.nptype")
def _nptype(double: Double, this: Any, trt_type: Any) -> Any:
    """Return the numpy type; up to 8.5 the real one asks for ``numpy.bool``, which numpy 1.24 removed."""
    if double.release < (8, 6):
        raise AttributeError("module 'numpy' has no attribute 'bool'")
    return NUMPY_TYPES[trt_type.name]


@acts("Runtime.deserialize_cuda_engine")
def _deserialize(double: Double, this: Any, serialized_engine: Any) -> Any:
    script, logger = double.script, this._state["logger"]
    lean = this._state.get("lean")
    if lean is not None:
        alive(this._state["newer"], "the runtime that loaded a lean runtime")
    for severity, text in script.engine_log:
        double.log(logger, severity, text)
    wanted = script.plan if lean is None else script.lean[lean]
    if wanted is None or bytes(serialized_engine) != wanted:
        double.log(logger, "ERROR", "IRuntime::deserializeCudaEngine: header.magicTag == kEXPECTED_MAGIC_TAG failed")
        return None
    return double.make("ICudaEngine", runtime=this, contexts=[])


@acts("Runtime.load_runtime")
def _load_runtime(double: Double, this: Any, path: str) -> Any:
    if path not in double.script.lean:
        double.log(this._state["logger"], "ERROR", f"Unable to load library: {path}")
        return None
    return double.make("Runtime", logger=this._state["logger"], lean=path, newer=weakref.ref(this))


def _tensor(double: Double, name: str) -> Tensor | None:
    tensors = (*double.script.inputs, *double.script.outputs)
    return next((tensor for tensor in tensors if tensor.name == name), None)


def _is_input(double: Double, name: str) -> bool:
    return any(tensor.name == name for tensor in double.script.inputs)


@acts("ICudaEngine.get_tensor_name")
def _tensor_name(double: Double, this: Any, index: int) -> Any:
    tensors = (*double.script.inputs, *double.script.outputs)
    return tensors[index].name if 0 <= index < len(tensors) else None


@acts("ICudaEngine.get_tensor_mode")
def _tensor_mode(double: Double, this: Any, name: str) -> Any:
    mode = "NONE" if _tensor(double, name) is None else "INPUT" if _is_input(double, name) else "OUTPUT"
    return double.member(f"TensorIOMode.{mode}")


@acts("ICudaEngine.get_tensor_dtype")
def _tensor_dtype(double: Double, this: Any, name: str) -> Any:
    tensor = _tensor(double, name)
    return double.member(f"DataType.{tensor.dtype if tensor else 'FLOAT'}")


@acts("ICudaEngine.get_tensor_shape")
def _engine_shape(double: Double, this: Any, name: str) -> Any:
    tensor = _tensor(double, name)
    return dims(double, tensor.shape if tensor else ())


@acts("ICudaEngine.get_tensor_location")
def _tensor_location(double: Double, this: Any, name: str) -> Any:
    return double.member("TensorLocation.DEVICE")


@acts("ICudaEngine.get_tensor_format")
def _tensor_format(double: Double, this: Any, name: str) -> Any:
    return double.member("TensorFormat.LINEAR")


@acts("ICudaEngine.get_tensor_profile_shape")
def _profile_shape(double: Double, this: Any, name: str, profile_index: int) -> Any:
    tensor, batches = _tensor(double, name), double.script.profiles[profile_index]
    if tensor is None or not _is_input(double, name):
        return []
    return [dims(double, [batch if size == -1 else size for size in tensor.shape]) for batch in batches]


def _contexts(engine: Any) -> list[Any]:
    """Return the execution contexts that are still alive."""
    return [context() for context in engine._state["contexts"] if context() is not None]


@acts("ICudaEngine.create_execution_context")
def _create_context(double: Double, this: Any, **given: Any) -> Any:
    if len(_contexts(this)) >= double.script.contexts:
        double.log(
            this._state["runtime"]._state["logger"], "ERROR", "Requested amount of GPU memory could not be allocated"
        )
        return None
    first = double.release >= (10,) or not _contexts(this)
    profile = 0 if first else -1  # up to 9 a profile serves one context, and the first takes the first
    context = double.make(
        "IExecutionContext", engine=this, shapes={}, addresses={}, busy=threading.Lock(), profile=profile
    )
    this._state["contexts"].append(weakref.ref(context))
    return context


@acts("ICudaEngine.create_engine_inspector")
def _create_inspector(double: Double, this: Any) -> Any:
    keeps = double.release >= (8, 6)
    return double.make("EngineInspector", engine=(lambda: this) if keeps else weakref.ref(this))


@acts("EngineInspector.get_engine_information")
def _engine_information(double: Double, this: Any, format: Any) -> str:
    alive(this._state["engine"], "the inspector's engine")
    context = this._state.get("execution_context")
    free = {tensor.name for tensor in double.script.inputs if -1 in tensor.shape}
    if free <= (set() if context is None else set(context._state["shapes"])):
        return double.script.layer_information
    return re.sub(TYPE_IN_JSON, r'"\1": "N/A due to dynamic shapes"', double.script.layer_information)


def _exclusive(function: Callable[..., Any]) -> Callable[..., Any]:
    """Crash where two threads are in one context."""

    def guarded(double: Double, this: Any, **given: Any) -> Any:
        if not this._state["busy"].acquire(blocking=False):
            raise Crash("two threads are in one execution context")
        try:
            return function(double, this, **given)
        finally:
            this._state["busy"].release()

    return guarded


def _complain(double: Double, this: Any, text: str) -> bool:
    double.log(this._state["engine"]._state["runtime"]._state["logger"], "ERROR", text)
    return False


@acts("IExecutionContext.set_optimization_profile_async")
@_exclusive
def _set_profile(double: Double, this: Any, profile_index: int, stream_handle: int) -> bool:
    if not 0 <= profile_index < len(double.script.profiles):
        return _complain(double, this, f"there is no optimization profile {profile_index}")
    others = [context for context in _contexts(this._state["engine"]) if context is not this]
    if double.release < (10,) and any(context._state["profile"] == profile_index for context in others):
        return _complain(double, this, f"Profile {profile_index} has been chosen for another IExecutionContext")
    this._state["profile"] = profile_index
    return True


@acts("IExecutionContext.set_input_shape")
@_exclusive
def _set_input_shape(double: Double, this: Any, name: str, shape: Any) -> bool:
    tensor, shape = _tensor(double, name), tuple(int(size) for size in shape)
    if this._state["profile"] < 0:
        return _complain(double, this, "setInputShape: no optimization profile has been chosen")
    low, _, high = double.script.profiles[this._state["profile"]]
    pairs = list(zip(shape, tensor.shape if tensor else (), strict=False))
    fits = (
        tensor is not None
        and _is_input(double, name)
        and len(shape) == len(tensor.shape)
        and all(low <= got <= high if size == -1 else got == size for got, size in pairs)
    )
    if not fits:
        return _complain(double, this, f"setInputShape: {name} {shape} does not satisfy the optimization profile")
    this._state["shapes"][name] = shape
    return True


@acts("IExecutionContext.get_tensor_shape")
@_exclusive
def _context_shape(double: Double, this: Any, name: str) -> Any:
    return dims(double, _resolved(double, this, name))


def _resolved(double: Double, context: Any, name: str) -> tuple[int, ...]:
    tensor, shapes = _tensor(double, name), context._state["shapes"]
    if tensor is None or name in shapes or not shapes:
        return shapes.get(name, tensor.shape if tensor else ())
    batch = next(iter(shapes.values()))[0]
    return tuple(batch if size == -1 else size for size in tensor.shape)


@acts("IExecutionContext.set_tensor_address")
@_exclusive
def _set_address(double: Double, this: Any, name: str, memory: int) -> bool:
    if _tensor(double, name) is None:
        return _complain(double, this, f"setTensorAddress: there is no tensor {name}")
    this._state["addresses"][name] = int(memory)
    return True


@acts("IExecutionContext.get_tensor_address")
def _get_address(double: Double, this: Any, name: str) -> int:
    return this._state["addresses"].get(name, 0)


@acts("IExecutionContext.infer_shapes")
@_exclusive
def _infer_shapes(double: Double, this: Any) -> list[str]:
    return [tensor.name for tensor in double.script.inputs if tensor.name not in this._state["shapes"]]


@acts("IExecutionContext.execute_async_v3")
@_exclusive
def _execute(double: Double, this: Any, stream_handle: int) -> bool:
    tensors = (*double.script.inputs, *double.script.outputs)
    shapes = {tensor.name: _resolved(double, this, tensor.name) for tensor in tensors}
    addresses = dict(this._state["addresses"])
    for tensor in tensors:
        if -1 in shapes[tensor.name]:
            return _complain(double, this, f"enqueueV3: the shape of {tensor.name} is not set")
        if not addresses.get(tensor.name):
            return _complain(double, this, f"enqueueV3: the address of {tensor.name} is not set")

    def work() -> None:
        views = {tensor.name: _view(addresses[tensor.name], shapes[tensor.name], tensor.dtype) for tensor in tensors}
        inputs = {tensor.name: views[tensor.name] for tensor in double.script.inputs}
        double.script.compute(inputs, {tensor.name: views[tensor.name] for tensor in double.script.outputs})

    double.submit(int(stream_handle), work)
    return True


def _view(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return the array at an address; a device double on host memory gives addresses that are really there."""
    kind = np.dtype(NUMPY_TYPES[dtype])
    if address % kind.itemsize:
        raise Crash(f"address {address:#x} is misaligned for {dtype}")
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=kind).reshape(shape)
