"""A real TensorRT builder without a GPU, and real quantized networks to build.

NVIDIA's TensorRT-for-RTX library builds engines ahead of time on any machine. One wheel carries it; laid under the
names that TensorRT's own Python bindings look for, it answers their calls. Both run in a process of their own: the
library wants to be found when a process starts, and this one has torch in it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import onnx
import pytest

import edgeres
from edgeres import errors, models, targets
from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.artifacts import Preprocessing, TensorRange
from edgeres.backends.tensorrt import BuildRequest, BuildResult
from edgeres.calibrate import choose, observe
from edgeres.export import export_module
from edgeres.export.exported import Exported
from edgeres.quantize import Placement, plan, shiftable, write_int8
from edgeres.quantize.pixels import exact_pixels, pixel_range
from edgeres.quantize.recover import with_biases

WHEELS = "tensorrt-cu13-bindings==11.4.0.106 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"
BINDINGS = "tensorrt_bindings"
LIBRARY = "onnxruntime_ep_nv_tensorrt_rtx"
PLUGIN = "#include <stdbool.h>\nbool initLibNvInferPlugins(void *logger, const char *space) { return true; }\n"
PATIENCE = 300

BUILD = """
import sys
import msgspec
from edgeres.backends.tensorrt import BuildRequest, build_in_child
from edgeres.backends.tensorrt.builder import build_plan
from edgeres.errors import EdgeresError

request = msgspec.json.decode(sys.argv[1], type=BuildRequest)
try:
    if sys.argv[2] == "child":
        result = build_in_child(request, lambda *step: None)
    else:
        result = build_plan(request, lambda *step: None, lambda: False)
except EdgeresError as problem:
    said = [type(problem).__name__, str(problem)]
else:
    said = msgspec.to_builtins(result)
sys.stdout.write("\\n" + msgspec.json.encode(said).decode())
"""


@dataclass(frozen=True)
class Rtx:
    """Runs Python where ``import tensorrt`` gives TensorRT's bindings over the RTX library."""

    environment: dict[str, str]

    def start(self, code: str, *arguments: str, **settings: object) -> subprocess.Popen[str]:
        """Start a program; whoever calls must wait for it."""
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **settings,  # type: ignore[call-overload]
        )

    def run(self, code: str, *arguments: str) -> str:
        """Return what a program prints; it must end well."""
        process = self.start(code, *arguments)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == 0, f"exit status {process.returncode}\n{err}"
        return out

    def build(self, request: BuildRequest, how: str = "here") -> BuildResult:
        """Return what is built, ``here`` in one process or in a ``child`` of it; raise the error that it ended with."""
        said = self.run(BUILD, msgspec.json.encode(request).decode(), how).splitlines()[-1]
        answer = msgspec.json.decode(said)
        if isinstance(answer, list):
            raise getattr(errors, answer[0])(answer[1])
        return msgspec.convert(answer, BuildResult)


@dataclass(frozen=True)
class Quantized:
    """A network of the catalogue with random weights, exported and quantized on random samples."""

    path: Path
    size: int
    exported: Exported
    fp32: onnx.ModelProto
    placement: Placement
    ranges: dict[str, TensorRange]

    @property
    def weighted(self) -> list[str]:
        """The names of its convolutions and of its classifier."""
        return [node.name for node in self.fp32.graph.node if node.op_type in ("Conv", "Gemm")]

    def of_whole_pixels(self, folder: Path) -> tuple[Path, Preprocessing]:
        """Return the int8 network whose first layer reads exact pixels, and how frames become its input."""
        preprocessing = Preprocessing((self.size, self.size), self.size)
        model, pixels = exact_pixels(with_biases(self.fp32), preprocessing)
        placement = plan(model, self.exported.modules)
        ranges = {**self.ranges, pixels: pixel_range(preprocessing, 1)}
        path = folder / "model.pixels.onnx"
        onnx.save(write_int8(model, placement, {name: ranges[name] for name in placement.tensors}), path)
        return path, preprocessing

    def request(self, plan: Path, **options: object) -> BuildRequest:
        """Return the request for its engine."""
        asked = {
            "onnx": str(self.path),
            "plan": str(plan),
            "input_name": "input",
            "shape": (3, self.size, self.size),
            "flavour": "tensorrt-rtx",
            "batch": (1, 4, 8),
            **options,
        }
        return BuildRequest(**asked)  # type: ignore[arg-type]


def lacking(reason: str) -> NoReturn:
    """Skip a test for want of something; where a merge depends on it, that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"what a merge depends on skips nothing: {reason}")
    pytest.skip(reason)


def folder_of(package: str) -> Path:
    """Return where a package lies, without importing it; skip the test where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        lacking(f"{package} is not installed: pip install --no-deps {WHEELS}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(autouse=True)
def nothing_is_known_of_gpus() -> None:
    """Forget what was found out about GPUs: machines change between tests."""
    targets.gpu_obstacle.cache_clear()


@pytest.fixture(scope="session")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Rtx:
    """The RTX library behind TensorRT's bindings: nothing is copied, only linked."""
    bindings, library = folder_of(BINDINGS), folder_of(LIBRARY)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        lacking("no C compiler is installed; the stand-in for TensorRT's plugin library needs one")
    root = tmp_path_factory.mktemp("rtx")
    libraries, packages = root / "lib", root / "site"
    libraries.mkdir()
    packages.mkdir()
    builder = next(library.glob("libtensorrt_rtx.so.*"))
    parser = next(library.glob("libtensorrt_onnxparser_rtx.so.*"))
    for name, target in (
        ("libnvinfer.so.11", builder),
        ("libtensorrt_rtx.so.1", builder),
        ("libnvonnxparser.so.11", parser),
    ):
        (libraries / name).symlink_to(target)
    (packages / "tensorrt").symlink_to(bindings)
    name = "libnvinfer_plugin.so.11"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(libraries / name)]
    subprocess.run(command, input=PLUGIN, text=True, check=True)
    paths = {
        "LD_LIBRARY_PATH": [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")],
        "PYTHONPATH": [str(packages), str(Path(edgeres.__file__).parents[1]), os.environ.get("PYTHONPATH", "")],
    }
    joined = {name: os.pathsep.join(filter(None, places)) for name, places in paths.items()}
    return Rtx({**os.environ, **joined})


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Quantized]:
    """Return ``quantized(net, activations, size)``: a network by its name in the catalogue, or by its description, made
    once per session.

    ``activations`` are ``symmetric``, or ``shifted`` to the full int8 range, or ``free``: shifted where that comes for
    nothing, as recovery has it in symmetric models. ``size`` is the image's, in pixels, by default the network's own.
    """

    @cache
    def make(net: Architecture, activations: str, size: int) -> Quantized:
        exported = export_module(models.create(net, seed=1).eval(), (size, size))
        folder = tmp_path_factory.mktemp(net.name)
        source = folder / "model.fp32.onnx"
        source.write_bytes(exported.content)
        fp32 = onnx.load(source)
        placement = plan(fp32, exported.modules)
        batch = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
        allowed = () if activations == "symmetric" else shiftable(fp32, placement, activations == "free")
        ranges = choose(observe(source, placement.tensors, [batch]), "minmax", 99.99, allowed)
        path = folder / "model.int8.onnx"
        onnx.save(write_int8(fp32, placement, ranges), path)
        return Quantized(path, size, exported, fp32, placement, ranges)

    def quantize(net: str | Architecture, activations: str = "symmetric", size: int = 0) -> Quantized:
        described = ARCHITECTURES[net] if isinstance(net, str) else net
        return make(described, activations, size or described.size)

    return quantize


@pytest.fixture(scope="session")
def small(quantized: Callable[..., Quantized]) -> Quantized:
    """The smallest network, for tests that are not about the network."""
    return quantized("resnet8_cifar")
