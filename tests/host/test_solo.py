"""What each layer costs alone: the same numbers whether a network is computed whole or only where int8 reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeres.affine import channel_amax, scale_from_amax
from edgeres.quantize import Solo, plan, solo, write_int8
from edgeres.quantize.graph import Graph
from edgeres.quantize.recover import Recovery

NETS = ["digits", "bottleneck"]
SHAPE = (16, 3, 32, 32)


@pytest.fixture(scope="module")
def measured(
    net: Callable[[str], Any], trained: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path, Recovery, Solo]]:
    """Return ``measured(name)``: a net, its file, what recovery works with, and its layers alone."""
    made: dict[str, tuple[Any, Path, Recovery, Solo]] = {}

    def make(name: str) -> tuple[Any, Path, Recovery, Solo]:
        if name not in made:
            found, x = trained if name == "digits" else (net(name), np.random.default_rng(0).standard_normal(SHAPE))
            path = tmp_path_factory.mktemp("solo") / "model.fp32.onnx"
            onnx.save(found.fp32, path)
            recovery = Recovery({}, None, np.split(x.astype(np.float32), 2))
            made[name] = found, path, recovery, Solo(path, found.exported.modules, [], found.ranges, recovery)
        return made[name]

    return make


@pytest.mark.parametrize("name", NETS)
def test_alone_is_the_whole_with_all_others_given_back(name: str, measured: Callable[[str], Any]) -> None:
    """The one way computes behind the layer only, the other everything."""
    found, _, recovery, layers = measured(name)
    x = np.concatenate(recovery.images)
    modules = found.exported.modules
    int8 = {layer.node for layer in layers.placement.layers if layer.precision.startswith("int8")}
    costs, images = layers.costs()
    assert images == len(x)
    assert [cost.expected for cost in costs] == sorted((cost.expected for cost in costs), reverse=True)
    compared = 0
    for cost in costs:
        rest = plan(layers.model, modules, [], dict.fromkeys(cost.nodes, ""))
        own = int8 - {layer.node for layer in rest.layers if layer.precision.startswith("int8")}
        assert own >= set(cost.nodes)
        left = plan(layers.model, modules, [], dict.fromkeys(int8 - own, ""))
        if own != {layer.node for layer in left.layers if layer.precision.startswith("int8")}:
            continue  # a skip is int8 only behind an int8 convolution: no plan leaves it alone
        compared += 1
        alone = layers.whole(int8 - own)
        assert alone.sqnr_db == pytest.approx(cost.sqnr_db, abs=0.01)
        assert alone.changed == cost.changed
        assert alone.expected == pytest.approx(cost.expected, rel=0.01)
    assert compared > len(costs) / 3


@pytest.mark.parametrize("name", NETS)
def test_without_any_layer_in_int8_there_is_no_noise(name: str, measured: Callable[[str], Any]) -> None:
    layers = measured(name)[3]
    every = [layer.node for layer in layers.placement.layers]
    assert layers.whole(every) == solo.Noise(0.0, 0.0, None)


@pytest.mark.parametrize("name", NETS)
def test_all_layers_together_are_what_onnxruntime_computes(
    name: str, measured: Callable[[str], Any], exact: Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
) -> None:
    found, _, recovery, layers = measured(name)
    model = onnx.ModelProto()
    model.CopyFrom(layers.model)
    graph = Graph(model)
    scales = {w.tensor: scale_from_amax(channel_amax(graph.values(w.tensor), w.axis)) for w in layers.placement.weights}
    for tensor, values in layers.constants.items():
        graph.set_values(tensor, values.numpy())
    x = np.concatenate(recovery.images)
    wanted, got = exact(found.fp32, x), exact(write_int8(model, layers.placement, found.ranges, scales), x)
    wanted, error = (y - y.mean(1, keepdims=True) for y in (wanted, got - wanted))
    written = 10 * np.log10((wanted**2).sum() / (error**2).sum())
    assert layers.whole().sqnr_db == pytest.approx(written, abs=0.2)


@pytest.mark.parametrize("name", NETS)
def test_noise_adds_up(name: str, measured: Callable[[str], Any]) -> None:
    """That of layers alone is about that of all together; so it says which to give back."""
    layers = measured(name)[3]
    costs, _ = layers.costs()
    singles = [cost for cost in costs if cost.weighted == 1 and cost.sqnr_db is not None]
    total = 10 * np.log10(sum(10 ** (-cost.sqnr_db / 10) for cost in singles))
    assert layers.whole().sqnr_db == pytest.approx(-total, abs=4.0)


def test_a_moved_skip_whose_convolution_is_given_back_keeps_its_range(measured: Callable[[str], Any]) -> None:
    layers = measured("digits")[3]
    (node,) = next(cost.nodes for cost in layers.costs()[0] if cost.layer == "layer2.0.conv1")
    assert layers.whole([node]).sqnr_db > layers.whole().sqnr_db - 0.5


def test_large_nets_are_measured_on_fewer_images(
    measured: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = measured("digits")[3]
    monkeypatch.setattr(solo, "EVERY", 1.0)
    assert layers.costs()[1] == 32


def test_what_is_given_back_already_is_not_looked_at(measured: Callable[[str], Any]) -> None:
    found, path, recovery, layers = measured("digits")
    given = {cost.layer: cost.nodes for cost in layers.costs()[0]}["fc"]
    fewer = Solo(path, found.exported.modules, ["layer1.0.conv1"], found.ranges,
                 Recovery({}, None, recovery.images, left_float=dict.fromkeys(given, "why")))  # fmt: skip
    names = {cost.layer for cost in fewer.costs()[0]}
    assert {"fc", "avgpool (pool)", "layer1.0.conv1"}.isdisjoint(names)
    assert {"conv1", "layer2.0", "layer3.0.conv1"} < names
    assert fewer.whole().sqnr_db > layers.whole().sqnr_db
