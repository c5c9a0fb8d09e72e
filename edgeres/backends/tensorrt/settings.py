"""A build's options, set and read back: TensorRT leaves what it cannot do, and says so in its log at most."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import msgspec

from edgeres.backends.tensorrt.dla import calibration_cache, completed, make_calibrator, refusal
from edgeres.backends.tensorrt.logger import Record
from edgeres.backends.tensorrt.module import dotted, flavour_of, library_version, member, version, words
from edgeres.backends.tensorrt.records import BuildRequest
from edgeres.backends.tensorrt.versions import dla_of, graph_for, typing_of
from edgeres.errors import BackendError, BundleError

TARGETS = ("gpu", "dla0", "dla1")
LEVELS = range(6)
LARGEST_BATCH = (1 << 31) - 1
LARGEST_WORKSPACE = (1 << 63) - 1
HARDWARE_LEVEL = "AMPERE_PLUS"


def choose_form(trt: Any, request: BuildRequest) -> BuildRequest:
    """Return a request for the form of the model that this version reads, with a calibration cache where it needs one.

    Raises:
        BackendError: a cache is wanted, and the ranges are none of the FP32 model's.
        BundleError: the bundle does not have that form.
        CalibrationError: a range is negative or not finite.
    """
    if not request.forms:
        return request
    wanted = graph_for(version(trt), request.precision, request.target)
    if wanted not in request.forms:
        raise BundleError(
            f"this bundle has no form of its {request.precision} model for {words(trt)}, which takes precisions from "
            "the graph (10.12 and newer, and RTX). Quantize it again with this edgeres, and read its warnings: edgeres "
            "quantize BUNDLE"
        )
    cache: Optional[str] = None
    half: Tuple[str, ...] = ()
    if wanted == "fp32" and request.precision == "int8":  # a DLA that takes its ranges beside the graph
        if not request.ranges:
            raise BackendError(
                f"a DLA of {words(trt)} takes its ranges beside the FP32 model, and this bundle's are those of a model "
                "that was equalized. Where the bundle was built: edgeres quantize BUNDLE --recovery none"
            )
        cache, half = calibration_cache(library_version(trt), request.ranges), request.half
    return msgspec.structs.replace(
        request, onnx=request.forms[wanted], forms={}, ranges={}, calibration_cache=cache, half=half
    )


def check_request(trt: Any, request: BuildRequest) -> None:
    """Refuse what this version or this flavour cannot be asked for, all reasons at once, before anything is parsed.

    Raises:
        BackendError: an option is wrong or not to be had here.
    """
    problems: List[str] = []
    low, best, high = request.batch
    if not 1 <= low <= best <= high:
        problems.append(f"batch sizes must be 1 ≤ min ≤ opt ≤ max, not {low}/{best}/{high}")
    if request.precision not in typing_of(version(trt)).builder_flags:
        problems.append(f"there is no precision {request.precision!r}; choose fp32, fp16 or int8")
    if request.optimization_level is not None and request.optimization_level not in LEVELS:
        problems.append(f"the optimization level is 0 to 5, not {request.optimization_level}")
    if high > LARGEST_BATCH:
        problems.append(f"a batch of {high} is more than it can count")
    if request.workspace is not None and request.workspace > LARGEST_WORKSPACE:
        problems.append(f"a workspace of {request.workspace} bytes is more than it can count")
    if request.workspace is not None and request.workspace <= 0:
        problems.append(f"a workspace of {request.workspace} bytes holds nothing")
    if request.target not in TARGETS:
        problems.append(f"there is no target {request.target!r}; choose one of {', '.join(TARGETS)}")
    elif request.target != "gpu":
        problems.extend(_dla_problems(trt, request))
    elif request.calibration_cache is not None or request.half:
        problems.append("a calibration cache is for a DLA only; on the GPU the ranges stand in the graph as Q/DQ")
    if request.version_compatible and flavour_of(trt) == "tensorrt-rtx":
        problems.append("no other version of it is known to run its engines, whatever they were built for")
    if problems:
        raise BackendError(f"{words(trt)} cannot build this: {'; '.join(problems)}. Change the recipe or the options.")


def _dla_problems(trt: Any, request: BuildRequest) -> List[str]:
    """Return what a build for a DLA cannot be asked for; a version without any is refused at once."""
    if flavour_of(trt) == "tensorrt-rtx":
        return ["it runs on GPUs only, and no RTX card has a DLA"]
    reason = refusal(version(trt), "", request.target)
    if reason:
        raise BackendError(reason)
    kind = dla_of(version(trt))
    problems = []
    if len(set(request.batch)) != 1:
        problems.append("an engine for a DLA has one batch size: give min, opt and max alike")
    if request.precision == "fp32":
        problems.append("a DLA computes in int8 or fp16, not in fp32")
    if request.hardware_compatible:
        problems.append("an engine for a DLA fits no other hardware")
    if kind == "implicit" and request.precision == "int8" and request.calibration_cache is None:
        problems.append(f"up to {dotted((10, 7))} a DLA takes its ranges from a calibration cache, and there is none")
    if kind == "explicit" and (request.calibration_cache is not None or request.half):
        problems.append("it takes the ranges of a DLA from Q/DQ in the graph, not from a calibration cache")
    return problems


def configure(trt: Any, config: Any, request: BuildRequest) -> None:
    """Set everything that does not depend on the network, and read it back.

    Raises:
        BackendError: this version has no such option, or left it as it was.
    """
    config.profiling_verbosity = member(trt.ProfilingVerbosity, "DETAILED")
    for name in typing_of(version(trt)).builder_flags[request.precision]:
        set_flag(trt, config, name)
    if request.workspace is not None:
        config.set_memory_pool_limit(member(trt.MemoryPoolType, "WORKSPACE"), request.workspace)
    if request.optimization_level is not None:
        set_option(trt, config, "builder_optimization_level", request.optimization_level)
    if request.version_compatible:
        # Alone the first needs the lean runtime's library, to embed it in the plan; the runtime has its own.
        set_flag(trt, config, "VERSION_COMPATIBLE")
        set_flag(trt, config, "EXCLUDE_LEAN_RUNTIME")
    if request.hardware_compatible:
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        if levels is None:
            raise BackendError(f"{words(trt)} has no hardware-compatible engines; 8.6 has. Leave the option out.")
        set_option(trt, config, "hardware_compatibility_level", member(levels, HARDWARE_LEVEL))


def check_level(trt: Any, engine: Any) -> None:
    """See that an engine itself says that it runs on other hardware.

    Raises:
        BackendError: it does not.
    """
    found, wanted = engine.hardware_compatibility_level, member(trt.HardwareCompatibilityLevel, HARDWARE_LEVEL)
    if found != wanted:
        raise BackendError(f"{words(trt)} built an engine for {found}, {wanted} was asked for. Leave the option out.")


def choose_device(trt: Any, builder: Any, config: Any, request: BuildRequest, device: str) -> None:
    """Direct the build to a DLA core where one is asked for; ``device`` is this machine's name, if it is known.

    Raises:
        BackendError: this device has no such core, or TensorRT stays on the GPU.
    """
    if request.target == "gpu":
        return
    reason = refusal(version(trt), device, request.target)
    if reason:
        raise BackendError(reason)
    core = int(request.target[len("dla") :])
    if builder.num_DLA_cores <= core:
        raise BackendError(
            f"there is no DLA core {core} here: TensorRT sees {builder.num_DLA_cores}. Orin Nano, Thor and cards have "
            "none; compile for the GPU: --target gpu"
        )
    set_option(trt, config, "default_device_type", member(trt.DeviceType, "DLA"))
    set_option(trt, config, "DLA_core", core)
    if request.gpu_fallback:
        set_flag(trt, config, "GPU_FALLBACK")


def set_calibration(trt: Any, config: Any, network: Any, profile: Any, request: BuildRequest, record: Record) -> Any:
    """Hand the ranges of a calibration cache to the builder; return the calibrator, which must outlive the build.

    The network is there to complete the cache: TensorRT wants a scale for tensors of its own as well.

    Raises:
        BackendError: TensorRT refuses the profile that the cache belongs to.
    """
    if request.calibration_cache is None:
        return None
    calibrator = make_calibrator(trt, completed(trt, network, request.calibration_cache))
    config.int8_calibrator = calibrator
    if profile is not None and not config.set_calibration_profile(profile):
        raise BackendError(f"TensorRT refuses the calibration profile: {record.last_words()}. Compile for the GPU.")
    return calibrator


def pin_half(trt: Any, config: Any, network: Any, request: BuildRequest) -> List[str]:
    """Keep the nodes of ``request.half`` in fp16; return what to warn of.

    With implicit quantization a layer may run in int8 as soon as its tensors have scales, and those of a layer that the
    recipe keeps in float have them for its neighbours' sake. NVIDIA's own translator pins such layers in the same way.

    Raises:
        BackendError: with ``strict``, a node has no layer of its name.
    """
    if not request.half:
        return []
    set_flag(trt, config, "OBEY_PRECISION_CONSTRAINTS" if request.strict else "PREFER_PRECISION_CONSTRAINTS")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    named = {layer.name: layer for layer in layers}
    missing = [name for name in request.half if name not in named]
    for name in request.half:
        if name in named:
            set_option(trt, named[name], "precision", member(trt.DataType, "HALF"))
    if not missing:
        return []
    told = f"{', '.join(missing)}: kept in float by the recipe, but {words(trt)} has no layer of that name to keep so"
    if request.strict:
        raise BackendError(f"{told}. Build without --strict, or keep nothing in float.")
    return [told]


def set_flag(trt: Any, config: Any, name: str) -> None:
    """Set a builder flag by name, and see that it holds.

    Raises:
        BackendError: this version has no such flag, or ignores it.
    """
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise BackendError(f"{words(trt)} has no builder flag {name}. Leave the option out, or use another version.")
    config.set_flag(flag)
    if not config.get_flag(flag):
        raise BackendError(f"{words(trt)} ignores the builder flag {name}. Leave the option out.")


def set_option(trt: Any, config: Any, name: str, value: Any) -> None:
    """Set a property of the builder's configuration, or of a layer, and see that it holds.

    Raises:
        BackendError: this version has no such property, or leaves it as it was.
    """
    if not hasattr(config, name):
        raise BackendError(f"{words(trt)} has no {name}. Leave the option out, or use another version.")
    setattr(config, name, value)
    found = getattr(config, name)
    if found != value:
        raise BackendError(f"{words(trt)} leaves {name} at {found}, {value} was asked for. Leave the option out.")
