"""The CPU engine: ONNX Runtime, set up so that it computes what the ONNX file says.

By default ONNX Runtime fuses Q/DQ into int8 kernels. On x86 processors without VNNI their 8-bit multiply–add saturates
at 16 bits, and everywhere their fused requantization rounds at other places than the file does; either costs accuracy
that no other runtime of the same file loses. So a model is either written for these kernels, with weights that cannot
saturate (``model.int8-cpu.onnx``), or Q/DQ stays in float: the weights are dequantized once, activations are rounded to
their grid where the file says so, and everything else is optimized as usual, but for the last level: its blocked layout
sums in another order, which flips a rounding here and there. Without it the answers are those of the unoptimized graph,
bit for bit.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Dict, FrozenSet, Optional

import numpy as np
import onnxruntime as ort

from edgeres.artifacts import Engine, FileRef
from edgeres.backends.cpu.wire import reads_other_files
from edgeres.cpu_settings import AS_WRITTEN, LEVEL, THREADS, strange
from edgeres.errors import BackendError, few, first_line

GRAPH_LEVELS = {
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
AGAIN = "Somebody changed it after it was built: copy it again from where that was done, or there: edgeres build BUNDLE"
EXACT = {AS_WRITTEN: "1", LEVEL: "extended"}
FAST = {LEVEL: "all"}
"""For models without Q/DQ, whose answers no rounding can flip."""
VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"})


class CpuRunner:
    """An open CPU engine; see :data:`edgeres.backends.Runner`. Any thread may call it, as ONNX Runtime's sessions."""

    largest: Optional[int] = None  # an ONNX file with a free batch takes any
    contexts = 1  # each call uses all cores: two side by side would only be later

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session: Optional[ort.InferenceSession] = session
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[0].name]  # named, so that onnxruntime need not list them at each call

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        session = self._session
        if session is None:
            raise BackendError("this engine is closed. Load the bundle again.")
        try:
            logits: np.ndarray = session.run(self._outputs, {self._input: batch})[0]
        except Exception as problem:  # onnxruntime's exceptions share no base but Exception
            raise BackendError(
                f"onnxruntime failed on a batch of shape {batch.shape}: {first_line(problem)}"
            ) from problem
        return logits

    def close(self) -> None:
        """Free the session; calling it twice is fine."""
        self._session = None


def compile_engine(file: FileRef, precision: str, activation_range: str = "symmetric") -> Engine:
    """Return the CPU engine of a model: the ONNX file itself and the session options that keep its meaning."""
    return Engine(
        target="cpu",
        backend="cpu",
        precision=precision,
        file=file,
        built_for={"onnxruntime": ort.__version__, "machine": platform.machine()},
        options=options_for(precision),
        activation_range=activation_range,
    )


def options_for(precision: str) -> Dict[str, str]:
    """Return the options with which a model of this precision means on the CPU what its file says."""
    return dict(EXACT if precision == "int8" else FAST)


def open_engine(content: bytes, options: Dict[str, str], threads: Optional[int] = None) -> CpuRunner:
    """Return a runner of an ONNX model.

    Args:
        content: the ONNX file's bytes, already verified.
        options: as the Engine holds them: the level of graph optimization, the threads, and whether Q/DQ is computed
            as written. They come from a manifest, so any other is refused.
        threads: for one operator; None leaves it to the options, and these to onnxruntime (one per core).

    Raises:
        BackendError: onnxruntime does not accept the model, it reads other files, or an option is none of edgeres'.
    """
    foreign = strange(options)
    if foreign:
        raise BackendError(
            f"the CPU engine has options that edgeres does not write: {few(foreign)}. onnxruntime would read or write "
            f"files by some of these, so the bundle is not run. {AGAIN}"
        )
    if reads_other_files(content):
        raise BackendError(
            "the engine's model takes weights from other files, which the bundle's hashes do not cover, so it is not "
            f"run. {AGAIN}"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what fails is told by the exception
    try:
        for key, value in options.items():
            if key == LEVEL:
                settings.graph_optimization_level = GRAPH_LEVELS[value]
            elif key == THREADS:
                settings.intra_op_num_threads = int(value)
            else:
                settings.add_session_config_entry(key, value)
        if threads is not None:
            settings.intra_op_num_threads = threads
        return CpuRunner(ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"]))
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        raise BackendError(f"onnxruntime does not accept this model: {first_line(problem)}") from problem


def open_model(path: Path, precision: str, threads: Optional[int] = None) -> CpuRunner:
    """Return a runner of an ONNX file with the options of its precision; for stages that build."""
    return open_engine(path.read_bytes(), options_for(precision), threads)


def cpu_flags() -> FrozenSet[str]:
    """Return the processor's feature flags as the kernel names them; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def describe(precision: str = "int8", integers: bool = False) -> str:
    """Return in words how a model of this precision is run here; ``integers``: in its integer form."""
    if precision == "fp32":
        return "float32"
    if precision == "fp16":
        return "float16 weights, computed in float32 where this CPU has no float16"
    if integers:
        return "int8 in onnxruntime's integer kernels, where no sum can saturate (exact)"
    flags = cpu_flags()
    machine = platform.machine()
    if machine in ("x86_64", "AMD64") and not VNNI & flags:
        return "no VNNI: fused int8 kernels would saturate, so Q/DQ is computed in float (exact)"
    return "Q/DQ is computed in float (exact)"
