"""What methods do and properties hold: tables by path, filled by :mod:`building` and :mod:`running`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensorrt_double.script import Crash

if TYPE_CHECKING:
    from tensorrt_double.strict import Double

ACTS: dict[str, Callable[..., Any]] = {}

PROPERTY_TYPES = {
    "EngineInspector.execution_context": "IExecutionContext",
    "IBuilderConfig.DLA_core": "int",
    "IBuilderConfig.builder_optimization_level": "int",
    "IBuilderConfig.default_device_type": "DeviceType",
    "IBuilderConfig.engine_capability": "EngineCapability",
    "IBuilderConfig.hardware_compatibility_level": "HardwareCompatibilityLevel",
    "IBuilderConfig.int8_calibrator": "IInt8Calibrator?",
    "IBuilderConfig.max_aux_streams": "int",
    "IBuilderConfig.profiling_verbosity": "ProfilingVerbosity",
    "IBuilderConfig.progress_monitor": "IProgressMonitor?",
    "ILayer.precision": "DataType",
    "Runtime.DLA_core": "int",
    "Runtime.engine_host_code_allowed": "bool",
}

PROPERTIES: dict[str, Callable[[Double, Any], Any]] = {
    "Builder.num_DLA_cores": lambda double, this: double.script.dla_cores,
    "Builder.max_DLA_batch_size": lambda double, this: 4096,
    "Builder.platform_has_fast_int8": lambda double, this: True,
    "Builder.platform_has_fast_fp16": lambda double, this: True,
    "Runtime.num_DLA_cores": lambda double, this: double.script.dla_cores,
    "Runtime.engine_host_code_allowed": lambda double, this: False,
    "IBuilderConfig.num_optimization_profiles": lambda double, this: len(this._state["profiles"]),
    "IBuilderConfig.DLA_core": lambda double, this: -1,
    "IBuilderConfig.default_device_type": lambda double, this: double.member("DeviceType.GPU"),
    "IBuilderConfig.engine_capability": lambda double, this: double.member("EngineCapability.STANDARD"),
    "IBuilderConfig.builder_optimization_level": lambda double, this: 3,
    "IBuilderConfig.hardware_compatibility_level": lambda d, this: d.member("HardwareCompatibilityLevel.NONE"),
    "IBuilderConfig.profiling_verbosity": lambda d, this: d.member("ProfilingVerbosity.LAYER_NAMES_ONLY"),
    "IBuilderConfig.int8_calibrator": lambda double, this: None,
    "IBuilderConfig.progress_monitor": lambda double, this: None,
    "ILayer.precision": lambda double, this: double.member("DataType.FLOAT"),
    "INetworkDefinition.name": lambda double, this: "",
    "INetworkDefinition.num_inputs": lambda double, this: len(this._state["inputs"]),
    "INetworkDefinition.num_outputs": lambda double, this: len(this._state["outputs"]),
    "INetworkDefinition.num_layers": lambda double, this: len(this._state["layers"]),
    "OnnxParser.num_errors": lambda double, this: len(this._state["errors"]),
    "ICudaEngine.num_io_tensors": lambda d, this: len(d.script.inputs) + len(d.script.outputs),
    "ICudaEngine.num_optimization_profiles": lambda double, this: len(double.script.profiles),
    "ICudaEngine.num_layers": lambda double, this: len(double.script.layers),
    "ICudaEngine.name": lambda double, this: "",
    "ICudaEngine.hardware_compatibility_level": lambda d, this: d.member(
        f"HardwareCompatibilityLevel.{d.script.level}"
    ),
    "ICudaEngine.refittable": lambda double, this: False,
    "ICudaEngine.device_memory_size": lambda double, this: 4096,
    "ICudaEngine.device_memory_size_v2": lambda double, this: 4096,
    "Logger.min_severity": lambda double, this: double.member("ILogger.Severity.WARNING"),
}


def acts(*paths: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what a method does; it gets the double, the instance and the arguments by name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for path in paths:
            ACTS[path] = function
        return function

    return register


@acts("Dims.__len__")
def _dims_length(double: Double, this: Any) -> int:
    return len(this._state["sizes"])


@acts("Dims.__getitem__")
def _dims_item(double: Double, this: Any, arg0: int) -> int:
    return int(this._state["sizes"][arg0])


@acts("ILogger.log", "Logger.log", "module.init_libnvinfer_plugins")
def _accept(double: Double, this: Any, **given: Any) -> bool:
    return True


def dims(double: Double, sizes: Sequence[int]) -> Any:
    return double.make("Dims", sizes=[int(size) for size in sizes])


def alive(reference: Any, what: str) -> Any:
    """Return what a weak reference points to; the real library keeps only a raw pointer there."""
    if reference() is None:
        raise Crash(f"{what} was freed while the library still pointed to it")
    return reference()
