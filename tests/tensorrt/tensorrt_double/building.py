"""What building does: networks, profiles, configurations, parsers and the build."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx

from tensorrt_double.acts import ACTS, acts, alive, dims
from tensorrt_double.script import Crash, Layer, ParseError, Tensor
from tensorrt_double.shapes import host_memory, is_buffer

if TYPE_CHECKING:
    from tensorrt_double.strict import Double


@acts("Builder.create_network")
def _create_network(double: Double, this: Any, flags: int = 0) -> Any:
    bits = double.surface["enums"]["NetworkDefinitionCreationFlag"]
    known = {name for name, bit in bits.items() if flags >> bit & 1}
    if sum(1 << bits[name] for name in known) != int(flags):
        double.refuse(ValueError, f"create_network({flags}): {double.version} has no such flag")
    return double.make("INetworkDefinition", flags=known, inputs=(), outputs=(), layers=(), builder=this, parser=None)


@acts("Builder.create_builder_config")
def _create_config(double: Double, this: Any) -> Any:
    return double.make("IBuilderConfig", flag_set=set(), pools={}, profiles=[], cache=None)


@acts("Builder.create_optimization_profile")
def _create_profile(double: Double, this: Any) -> Any:
    return double.make("IOptimizationProfile", shapes={})


@acts("IOptimizationProfile.set_shape")
def _set_shape(double: Double, this: Any, input: str, min: Any, opt: Any, max: Any) -> None:
    this._state["shapes"][input] = [tuple(int(size) for size in shape) for shape in (min, opt, max)]


@acts("IOptimizationProfile.get_shape")
def _get_shape(double: Double, this: Any, input: str) -> Any:
    return [dims(double, shape) for shape in this._state["shapes"].get(input, [])]


@acts("IOptimizationProfile.__bool__")
def _profile_valid(double: Double, this: Any) -> bool:
    shapes = this._state["shapes"].values()
    return all(low <= best <= high for shape in shapes for low, best, high in zip(*shape, strict=False))


@acts("IBuilderConfig.add_optimization_profile")
def _add_profile(double: Double, this: Any, profile: Any) -> int:
    if not _profile_valid(double, profile):
        return -1
    keeps = double.release >= (10, 16)
    this._state["profiles"].append((lambda: profile) if keeps else weakref.ref(profile))
    return len(this._state["profiles"]) - 1


@acts("IBuilderConfig.set_flag")
def _set_flag(double: Double, this: Any, flag: Any) -> None:
    this._state["flag_set"].add(flag.name)


@acts("IBuilderConfig.clear_flag")
def _clear_flag(double: Double, this: Any, flag: Any) -> None:
    this._state["flag_set"].discard(flag.name)


@acts("IBuilderConfig.get_flag")
def _get_flag(double: Double, this: Any, flag: Any) -> bool:
    return flag.name in this._state["flag_set"]


@acts("IBuilderConfig.set_memory_pool_limit")
def _set_pool(double: Double, this: Any, pool: Any, pool_size: int) -> None:
    this._state["pools"][pool.name] = int(pool_size)


@acts("IBuilderConfig.get_memory_pool_limit")
def _get_pool(double: Double, this: Any, pool: Any) -> int:
    return this._state["pools"].get(pool.name, 1 << 33)


@acts("IBuilderConfig.create_timing_cache")
def _create_cache(double: Double, this: Any, serialized_timing_cache: Any) -> Any:
    return double.make("ITimingCache", content=bytes(serialized_timing_cache))


@acts("IBuilderConfig.set_timing_cache")
def _set_cache(double: Double, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
    this._state["cache"] = weakref.ref(cache)
    return True


@acts("IBuilderConfig.get_timing_cache")
def _get_cache(double: Double, this: Any) -> Any:
    return this._state["cache"] and alive(this._state["cache"], "the timing cache")


@acts("ITimingCache.serialize")
def _serialize_cache(double: Double, this: Any) -> Any:
    return host_memory(double, double.script.timing_cache)


@acts("ITimingCache.combine", "ITimingCache.reset")
def _cache_done(double: Double, this: Any, **given: Any) -> bool:
    return True


@acts("IBuilderConfig.can_run_on_DLA")
def _can_run_on_dla(double: Double, this: Any, layer: Any) -> bool:
    return double.script.dla_layers is None or layer._state["name"] in double.script.dla_layers


@acts("INetworkDefinition.get_flag")
def _network_flag(double: Double, this: Any, flag: Any) -> bool:
    return flag.name in this._state["flags"]


def _network_part(part: str) -> Callable[..., Any]:
    def get(double: Double, this: Any, index: int) -> Any:
        parts = this._state[part]
        return parts[index] if 0 <= index < len(parts) else None

    return get


ACTS["INetworkDefinition.get_input"] = _network_part("inputs")
ACTS["INetworkDefinition.get_output"] = _network_part("outputs")
ACTS["INetworkDefinition.get_layer"] = _network_part("layers")


@acts("OnnxParser.__init__")
def _open_parser(double: Double, this: Any, network: Any, logger: Any) -> None:
    this._state.update(network=weakref.ref(network), errors=[])
    network._state["parser"] = weakref.ref(this)


@acts("OnnxParser.parse", "OnnxParser.parse_from_file")
def _parse(double: Double, this: Any, model: Any, path: str | None = None) -> bool:
    script, logger = double.script, this._state["logger"]
    network = alive(this._state["network"], "the parser's network")
    errors = list(script.parse_errors)
    if double.release < (10,) and "EXPLICIT_BATCH" not in network._state["flags"]:
        errors = [ParseError("this version of the ONNX parser only supports networks with an explicit batch dimension")]
    elif network._state["inputs"]:
        errors = [ParseError("Parse was called with a non-empty network definition")]
    for severity, text in script.parse_log:
        double.log(logger, severity, text)
    for error in errors:
        double.log(logger, "ERROR", f"[{error.file}:{error.line}] {error.desc}")
    this._state["errors"] = errors
    if is_buffer(model) and bytes(model[:1]) == b"\x08":  # the file itself; it begins with its version
        script.inputs = _inputs(model)
    if not errors:
        network._state["inputs"] = tuple(_tensor(double, tensor, True) for tensor in script.inputs)
        network._state["outputs"] = tuple(_tensor(double, tensor, False) for tensor in script.outputs)
        network._state["layers"] = tuple(_layer(double, layer) for layer in script.layers)
    return not errors


def _inputs(model: Any) -> tuple[Tensor, ...]:
    """Return the inputs of an ONNX file's bytes; a uint8 one is read by Casts alone, as TensorRT wants it."""
    graph = onnx.load_from_string(bytes(model)).graph
    found = []
    for given in graph.input:
        tensor = given.type.tensor_type
        kind = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.UINT8: "UINT8"}[tensor.elem_type]
        if kind == "UINT8" and {node.op_type for node in graph.node if given.name in node.input} != {"Cast"}:
            raise Crash(f"{given.name} is uint8, and something else than a Cast reads it")
        found.append(Tensor(given.name, tuple(dim.dim_value or -1 for dim in tensor.shape.dim), kind))
    return tuple(found)


def _tensor(double: Double, tensor: Tensor, entering: bool) -> Any:
    return double.make(
        "ITensor",
        name=tensor.name,
        shape=dims(double, tensor.shape),
        dtype=double.member(f"DataType.{tensor.dtype}"),
        is_network_input=entering,
        is_network_output=not entering,
    )


DETAILS = {
    "ACTIVATION": ("IActivationLayer.type", "ActivationType"),
    "POOLING": ("IPoolingLayer.type", "PoolingType"),
    "ELEMENTWISE": ("IElementWiseLayer.op", "ElementWiseOperation"),
}
"""By type of layer, the property that its own class adds and the enum that it holds."""


def _layer(double: Double, layer: Layer) -> Any:
    """Return a plain ILayer; assigning its own class to ``__class__`` reveals more, as in the real bindings."""
    made = double.make(
        "ILayer",
        name=layer.name,
        type=double.member(f"LayerType.{layer.type}"),
        num_inputs=len(layer.inputs),
        num_outputs=len(layer.outputs),
        inputs=layer.inputs,
        outputs=layer.outputs,
        metadata=f"[ONNX Layer: {layer.name}]",
    )
    if layer.detail:
        path, enum = DETAILS[layer.type]
        made._state[path] = double.member(f"{enum}.{layer.detail}")
    return made


def _layer_tensor(part: str) -> Callable[..., Any]:
    def get(double: Double, this: Any, index: int) -> Any:
        names = this._state[part]
        return double.make("ITensor", name=names[index]) if 0 <= index < len(names) else None

    return get


ACTS["ILayer.get_input"] = _layer_tensor("inputs")
ACTS["ILayer.get_output"] = _layer_tensor("outputs")


@acts("OnnxParser.get_error")
def _get_error(double: Double, this: Any, index: int) -> Any:
    errors = this._state["errors"]
    return double.make("ParserError", error=errors[index]) if 0 <= index < len(errors) else None


@acts("OnnxParser.clear_errors")
def _clear_errors(double: Double, this: Any) -> None:
    this._state["errors"] = []


ACTS["ParserError.code"] = lambda double, this: double.member(f"ErrorCode.{this._state['error'].code}")
ACTS["ParserError.local_function_stack"] = lambda double, this: []
for _part in ("desc", "node", "node_name", "node_operator", "line", "file", "func"):
    ACTS[f"ParserError.{_part}"] = lambda double, this, part=_part: getattr(this._state["error"], part)


@acts("Builder.build_serialized_network")
def _build(double: Double, this: Any, network: Any, config: Any) -> Any:
    script, logger, state = double.script, this._state["logger"], config._state
    profiles = [alive(profile, "an optimization profile") for profile in state["profiles"]]
    if network._state["parser"] is not None:
        alive(network._state["parser"], "the parser, which owns the network's weights,")
    if state["cache"] is not None:
        alive(state["cache"], "the timing cache")
    for severity, text in script.build_log:
        double.log(logger, severity, text)
    if state["flag_set"] & {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}:
        layers = (layer._state for layer in network._state["layers"])
        double.pinned = {layer["name"]: layer["precision"].name for layer in layers if "precision" in layer}
    calibrator = state.get("int8_calibrator")
    if calibrator is not None:
        _calibrate(double, calibrator)
    strong = "STRONGLY_TYPED" in network._state["flags"] or double.release >= (11,)
    refusal = None
    if strong and state["flag_set"] & {"INT8", "FP16", "BF16", "FP8"}:
        refusal = "precision flags are not allowed in a strongly typed network"
    elif calibrator is not None and strong:
        refusal = "a calibrator is not allowed in a strongly typed network"
    elif any(-1 in tuple(tensor._state["shape"]) for tensor in network._state["inputs"]) and not profiles:
        refusal = "Network has dynamic or shape inputs, but no optimization profile has been defined"
    elif not _progress(double, state.get("progress_monitor")):
        refusal = "Build canceled by user"
    if refusal is not None:
        double.log(logger, "ERROR", refusal)
    if refusal is not None or script.plan is None:
        return None
    return host_memory(double, script.plan)


def _calibrate(double: Double, calibrator: Any) -> None:
    """Ask a calibrator as the real builder does: for its cache first, and for batches where it has none."""
    try:
        size, cache = calibrator.get_batch_size(), calibrator.read_calibration_cache()
        if not isinstance(size, int) or not (cache is None or is_buffer(cache)):
            raise Crash(f"the calibrator returned {size!r} and {cache!r}")
        if cache is None:
            calibrator.get_batch([tensor.name for tensor in double.script.inputs])
        else:
            double.calibration = bytes(cache)
    except Exception as problem:
        raise Crash(f"the calibrator raised {problem!r}") from problem


@acts("IBuilderConfig.set_calibration_profile")
def _set_calibration_profile(double: Double, this: Any, profile: Any) -> bool:
    this._state["calibration_profile"] = profile
    return True


def _progress(double: Double, monitor: Any) -> bool:
    """Tell a monitor of the scripted phases; False when it wants the build to stop."""
    if monitor is None:
        return True
    try:
        for phase, parent, steps in double.script.phases:
            monitor.phase_start(phase, parent, steps)
        for phase, _, steps in reversed(double.script.phases):
            for step in range(steps):
                going = monitor.step_complete(phase, step)
                if not isinstance(going, bool):
                    raise Crash(f"step_complete returned {going!r}, not a bool")
                if not going:
                    return False
            monitor.phase_finish(phase)
    except Exception as problem:
        raise Crash(f"the progress monitor raised {problem!r}") from problem
    return True
