"""What each layer costs alone: the same numbers whether a network is computed whole or only where int8 reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeres.quantize import Solo, plan, solo
from edgeres.quantize.recover import Recovery, recovered_content

NETS = ["cifar", "bottleneck"]


@pytest.fixture(scope="module")
def measured(
    net: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path, Recovery, Solo]]:
    """Return ``measured(name)``: a net, its file, what recovery works with, and its layers alone."""
    made: dict[str, tuple[Any, Path, Recovery, Solo]] = {}

    def make(name: str) -> tuple[Any, Path, Recovery, Solo]:
        if name not in made:
            found = net(name)
            path = tmp_path_factory.mktemp("solo") / "model.fp32.onnx"
            onnx.save(found.fp32, path)
            images = [np.random.default_rng(i).standard_normal((8, 3, 32, 32)).astype(np.float32) for i in range(2)]
            recovery = Recovery({}, None, images)
            made[name] = found, path, recovery, Solo(path, found.exported.modules, [], found.ranges, recovery)
        return made[name]

    return make


@pytest.mark.parametrize("name", NETS)
def test_alone_is_the_whole_with_all_others_given_back(name: str, measured: Callable[[str], Any]) -> None:
    """The one way computes behind the layer only, the other everything."""
    found, _, _, layers = measured(name)
    modules = found.exported.modules
    int8 = {layer.node for layer in layers.placement.layers if layer.precision.startswith("int8")}
    costs, images = layers.costs()
    assert images == 16
    assert [cost.expected for cost in costs] == sorted((cost.expected for cost in costs), reverse=True)
    for cost in costs:
        rest = plan(layers.model, modules, [], dict.fromkeys(cost.nodes, ""))
        own = int8 - {layer.node for layer in rest.layers if layer.precision.startswith("int8")}
        assert own >= set(cost.nodes)
        alone = layers.whole(int8 - own)
        assert alone.sqnr_db == pytest.approx(cost.sqnr_db, abs=0.01)
        assert alone.changed == cost.changed
        assert alone.expected == pytest.approx(cost.expected, rel=0.01)


@pytest.mark.parametrize("name", NETS)
def test_without_any_layer_in_int8_there_is_no_noise(name: str, measured: Callable[[str], Any]) -> None:
    layers = measured(name)[3]
    every = [layer.node for layer in layers.placement.layers]
    assert layers.whole(every) == solo.Noise(0.0, 0.0, None)


@pytest.mark.parametrize("name", NETS)
def test_all_layers_together_are_the_net_that_is_written(
    name: str, measured: Callable[[str], Any], exact: Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
) -> None:
    """Against onnxruntime on the file. There, each layer is fitted to what those before it really give: a bit better."""
    found, path, recovery, layers = measured(name)
    content, _, _ = recovered_content(path, found.exported.modules, [], found.ranges, recovery)
    x = np.concatenate(recovery.images)
    wanted, got = exact(found.fp32, x), exact(onnx.load_from_string(content), x)
    wanted, error = (y - y.mean(1, keepdims=True) for y in (wanted, got - wanted))
    written = 10 * np.log10((wanted**2).sum() / (error**2).sum())
    assert layers.whole().sqnr_db == pytest.approx(written, abs=4.0)


@pytest.mark.parametrize("name", NETS)
def test_noise_adds_up(name: str, measured: Callable[[str], Any]) -> None:
    """That of layers alone is about that of all together; so it says which to give back."""
    layers = measured(name)[3]
    costs, _ = layers.costs()
    singles = [cost for cost in costs if cost.weighted == 1 and cost.sqnr_db is not None]
    total = 10 * np.log10(sum(10 ** (-cost.sqnr_db / 10) for cost in singles))
    assert layers.whole().sqnr_db == pytest.approx(-total, abs=4.0)


def test_a_moved_skip_whose_convolution_is_given_back_keeps_its_range(measured: Callable[[str], Any]) -> None:
    layers = measured("cifar")[3]
    (node,) = next(cost.nodes for cost in layers.costs()[0] if cost.layer == "layer2.0.conv1")
    assert layers.whole([node]).sqnr_db > layers.whole().sqnr_db - 0.5


def test_large_nets_are_measured_on_fewer_images(
    measured: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = measured("cifar")[3]
    monkeypatch.setattr(solo, "EVERY", 1.0)
    assert layers.costs()[1] == 8


def test_what_is_given_back_already_is_not_looked_at(measured: Callable[[str], Any]) -> None:
    found, path, recovery, layers = measured("cifar")
    given = {cost.layer: cost.nodes for cost in layers.costs()[0]}["fc"]
    fewer = Solo(path, found.exported.modules, ["layer1.0.conv1"], found.ranges,
                 Recovery({}, None, recovery.images, given_back=dict.fromkeys(given, "why")))  # fmt: skip
    names = {cost.layer for cost in fewer.costs()[0]}
    assert {"fc", "avgpool (pool)", "layer1.0.conv1"}.isdisjoint(names)
    assert {"conv1", "layer2.0", "layer3.0.conv1"} < names
    assert fewer.whole().sqnr_db > layers.whole().sqnr_db
