"""Graphs and small networks that the tests of export, calibration, quantization and the CPU engine share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgeres import models
from edgeres.architectures import Architecture
from edgeres.artifacts import Preprocessing, TensorRange
from edgeres.calibrate import Statistics, choose, observe
from edgeres.export import export_module
from edgeres.export.exported import Exported
from edgeres.export.fold import name_nodes
from edgeres.models.resnet import ResNet
from edgeres.quantize import Placement, plan, shiftable, write_int8
from edgeres.quantize.channels import ChannelGroups, channel_groups
from edgeres.quantize.follow import Follower
from edgeres.recipe import dossier
from edgeres.samples import open_samples

SIZE = 32


@dataclass(frozen=True)
class Net:
    """A small residual net and everything that was made of it."""

    module: nn.Module
    exported: Exported
    fp32: onnx.ModelProto
    placement: Placement
    statistics: Statistics
    ranges: Mapping[str, TensorRange]
    int8: onnx.ModelProto


@dataclass(frozen=True)
class Followed:
    """A float graph as accuracy recovery sees it: int8's places, the graph in torch, its channels and their groups."""

    model: onnx.ModelProto
    placement: Placement
    follower: Follower
    channels: Mapping[str, int]
    groups: ChannelGroups


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright: one for all, for it refuses a second beside it in one thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine to draw the page with")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def graph() -> Callable[..., onnx.ModelProto]:
    """Return ``graph(text, weights, opset)``: a model from ONNX text, initializers added, all nodes named, checked."""

    def parse(
        text: str, weights: Mapping[str, np.ndarray] | None = None, opset: int = 17, valid: bool = True
    ) -> onnx.ModelProto:
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
        for name, values in (weights or {}).items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        name_nodes(model)
        if valid:
            onnx.checker.check_model(model, full_check=True)
        return model

    return parse


@pytest.fixture(scope="session")
def exact() -> Callable[[onnx.ModelProto, np.ndarray], np.ndarray]:
    """Return ``exact(model, x)``: the first output as the ONNX file has it, nothing fused or optimized."""

    def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])

    return run


def enliven(module: nn.Module, seed: int) -> nn.Module:
    """Give every batch norm statistics and weights of its own, as training would, for folding to get right."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.weight, 0.5, 1.5),
                (part.bias, -0.5, 0.5),
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.data = low + (high - low) * torch.rand(tensor.shape, generator=generator)
    return module.eval()


def build(name: str) -> nn.Module:
    """Return a net by the name of its kind; the same name always gives the same weights."""
    if name == "cifar":
        return enliven(models.create("resnet8_cifar", seed=1), seed=2)
    block = {"basic": "basic", "bottleneck": "bottleneck"}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tiny = Architecture(f"tiny_{name}", block, (2, 1), (8, 16), "imagenet", "B", 10, SIZE, SIZE, "")
        return enliven(ResNet(tiny, 10), seed=4)


def quantized(
    module: nn.Module,
    folder: Path,
    keep_float: Sequence[str] = (),
    shift: bool = False,
    images: Sequence[np.ndarray] | None = None,
) -> Net:
    """Return a module exported, calibrated and quantized; ``shift``: over the full int8 range.

    ``images`` are batches, float32 (n, 3, H, W); by default two of 8 random images.
    """
    exported = export_module(module, (SIZE, SIZE))
    path = folder / "model.fp32.onnx"
    path.write_bytes(exported.content)
    fp32 = onnx.load(path)
    placement = plan(fp32, exported.modules, keep_float)
    batches = images or [
        np.random.default_rng(i).standard_normal((8, 3, SIZE, SIZE)).astype(np.float32) for i in range(2)
    ]
    allowed = shiftable(fp32, placement) if shift else ()
    statistics = observe(path, placement.tensors, batches)
    ranges = choose(statistics, "minmax", 99.99, allowed)
    return Net(module, exported, fp32, placement, statistics, ranges, write_int8(fp32, placement, ranges))


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Net]:
    """Return ``net(name)``: ``cifar`` (option A), ``basic`` or ``bottleneck`` (max pool stem, option B), quantized."""

    @cache
    def make(name: str) -> Net:
        return quantized(build(name), tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, np.ndarray]:
    """The embedded net, which is trained, quantized; and 64 of its calibration images, float32 (64, 3, 32, 32)."""
    folder = dossier() / "digits"
    module = models.create("resnet8_cifar")
    models.load_weights(module, folder / "weights.safetensors")
    half = (0.5, 0.5, 0.5)
    samples = open_samples(folder / "calibration", count=64)
    (x,) = samples.batches(Preprocessing((SIZE, SIZE), SIZE, mean=half, std=half), 64)
    return quantized(module.eval(), tmp_path_factory.mktemp("digits"), images=[x]), x


@pytest.fixture(scope="session")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Net]:
    """Return ``shifted(name)``: the nets of ``net``, with the full int8 range after each ReLU."""

    @cache
    def make(name: str) -> Net:
        return quantized(build(name), tmp_path_factory.mktemp(name), shift=True)

    return make


@pytest.fixture(scope="session")
def followed() -> Callable[..., Followed]:
    """Return ``followed(model, size)``: what accuracy recovery knows of a float graph, for frames of that size."""

    def follow(model: onnx.ModelProto, size: tuple[int, int] = (SIZE, SIZE)) -> Followed:
        placement = plan(model, {})
        points = {reader: point.tensor for point in placement.points for reader in point.readers}
        follower = Follower(model, points)
        channels = follower.channels(size)
        return Followed(model, placement, follower, channels, channel_groups(model, channels))

    return follow


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[..., Net]:
    """Return ``quantize(module, keep_float, shift)``: any module for 32×32 images, calibrated on random ones and
    quantized; with a seed its batch norms come alive first."""

    def make(module: nn.Module, keep_float: Sequence[str] = (), shift: bool = False, seed: int | None = None) -> Net:
        return quantized(module if seed is None else enliven(module, seed), tmp_path, keep_float, shift)

    return make
