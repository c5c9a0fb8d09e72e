"""Equalization finds the same network however its channels were scaled, and less noise than it began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeres.calibrate import Statistics, choose, observe
from edgeres.calibrate.noise import noise_table
from edgeres.noise import NoiseTable
from edgeres.quantize import equalize as equalization
from edgeres.quantize import write_int8
from edgeres.quantize.channels import apply_factors
from edgeres.quantize.equalize import DOUBT, ROUNDING_GAIN, equalize
from edgeres.quantize.graph import attribute
from edgeres.quantize.sensitivity import sensitivities

SIZE = 32
IMAGES = np.random.default_rng(0).standard_normal((32, 3, SIZE, SIZE)).astype(np.float32)
NETS = ("cifar", "basic", "bottleneck")
MANY = 10**6  # images: what equalization is told, for its laws to be seen whatever it gains
FEW = 25  # rounds of search: laws hold at any number, and few are quick


@dataclass(frozen=True)
class Known:
    """A net with all that equalization is told of it."""

    net: Any
    statistics: Statistics
    tables: Mapping[str, NoiseTable]
    sensitivity: Mapping[str, np.ndarray]

    @property
    def free(self) -> np.ndarray:
        free: np.ndarray = self.net.groups.free
        return free

    def factors(self, images: int = MANY) -> np.ndarray:
        return equalize(self.net.model, self.net.placement, self.net.groups, self.tables, self.sensitivity, images)

    def scaled(self, factors: np.ndarray) -> onnx.ModelProto:
        return apply_factors(self.net.model, self.net.groups.factors(factors))


@dataclass(frozen=True)
class Scaled:
    """A net, the same one with its channels scaled by ``factors``, and the factors that equalization finds for each."""

    base: Known
    other: Known
    factors: np.ndarray
    before: np.ndarray
    after: np.ndarray


@pytest.fixture(scope="session")
def know(tmp_path_factory: pytest.TempPathFactory, followed: Callable[..., Any]) -> Callable[[onnx.ModelProto], Known]:
    """Return ``know(model)``: a net observed on random images, with its sensitivities."""

    def tell(model: onnx.ModelProto) -> Known:
        found = followed(model, (SIZE, SIZE))
        path = tmp_path_factory.mktemp("net") / "model.onnx"
        onnx.save(model, path)
        statistics = observe(path, found.placement.tensors, [IMAGES])
        layers = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        return Known(
            found,
            statistics,
            {name: noise_table(statistics.tensors[name]) for name in found.placement.tensors},
            sensitivities(found.follower, IMAGES, [*found.placement.tensors, *layers], batch=8),
        )

    return tell


@pytest.fixture(scope="session")
def known(net: Callable[[str], Any], know: Callable[[onnx.ModelProto], Known]) -> Callable[[str], Known]:
    return cache(lambda name: know(net(name).fp32))


def hostile(known: Known, octaves: np.ndarray) -> tuple[np.ndarray, onnx.ModelProto]:
    """Return factors of 2^octaves where groups are free, and the net whose channels are scaled by them."""
    factors = np.where(known.free, 2.0**octaves, 1.0)
    return factors, known.scaled(factors)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def predicted(known: Known, factors: np.ndarray) -> float:
    """Return the logits' noise power that the sources named in equalize.py's docstring add up to, written out anew.

    Activations: for each tensor, at its best step. Weights: a rounding error is spread evenly over a step, so its power
    is a twelfth of the step's square for each weight, times the variance of what the weight multiplies.
    """
    each = known.net.groups.factors(factors)
    total = 0.0
    for name, table in known.tables.items():
        candidates = np.linspace(-40, 40, 1601)  # octaves
        counted = known.sensitivity[name] * table.alive
        total += min(float(counted @ table.at(step - np.log2(each[name]))) for step in candidates)
    graph = known.scaled(factors)
    values = arrays(graph)
    source = {reader: point.range_of for point in known.net.placement.points for reader in point.readers}
    nodes = {node.name: node for node in graph.graph.node}
    for weight in known.net.placement.weights:
        node = nodes[weight.readers[0][0]]
        matrix = values[weight.tensor].astype(np.float64)
        matrix = matrix if weight.axis == 0 else matrix.T
        taps = int(np.prod(matrix.shape[2:]))
        table = known.tables[source[(node.name, 0)]]
        variance = (table.power - table.mean**2) * each[node.input[0]] ** 2
        inputs = variance.reshape(int(attribute(node, "group", 1)), -1).sum(1)  # type: ignore[call-overload]
        step = np.abs(matrix).reshape(len(matrix), -1).max(1) / 127 / each[node.output[0]]
        power = step**2 / 12 * np.repeat(inputs, len(matrix) // len(inputs)) * taps
        total += ROUNDING_GAIN * float(known.sensitivity[node.output[0]] @ power)
    return total


def decibels(known: Known, model: onnx.ModelProto, folder: Path, exact: Callable[..., np.ndarray]) -> float:
    """Return the SQNR in dB of a net of the same plan, calibrated anew and really quantized.

    Noise that is the same for all images is left out: correcting biases takes it back, and equalization counts on that.
    """
    path = folder / "model.onnx"
    onnx.save(model, path)
    ranges = choose(observe(path, known.net.placement.tensors, [IMAGES]), "mse", 99.99)
    wanted = exact(model, IMAGES).astype(np.float64)
    noise = exact(write_int8(model, known.net.placement, ranges), IMAGES) - wanted
    return float(10 * np.log10(np.square(wanted).sum() / np.square(noise - noise.mean(0)).sum()))


@pytest.fixture(scope="module")
def scaled(known: Callable[[str], Known], know: Callable[..., Known]) -> Scaled:
    """Return a net, equalized, and the same one with all its free channels scaled by 2^-4 to 2^4, equalized."""
    base = known("basic")
    factors, model = hostile(base, np.random.default_rng(2).uniform(-4, 4, len(base.free)))
    other = know(model)
    return Scaled(base, other, factors, base.factors(), other.factors())


@pytest.mark.parametrize("name", ["cifar", "bottleneck"])
def test_factors_of_two_are_taken_back_exactly(
    name: str, known: Callable[[str], Known], know: Callable[..., Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalization, "ROUNDS", FEW)
    base = known(name)
    factors, model = hostile(base, np.random.default_rng(1).integers(-4, 5, len(base.free)))
    other = know(model)
    one, two = arrays(base.scaled(base.factors())), arrays(other.scaled(other.factors()))
    assert factors[base.free].std() > 1
    for tensor, values in one.items():
        np.testing.assert_allclose(two[tensor], values, rtol=1e-4, err_msg=tensor)


def test_other_factors_are_taken_back_nearly(scaled: Scaled) -> None:
    """Histograms have other bins then, so that the tables differ by what a bin is too coarse to tell."""
    free = scaled.base.free
    apart = np.abs(np.log2(scaled.after * scaled.factors) - np.log2(scaled.before))[free]
    assert np.log2(scaled.before)[free].std() > 0.5
    assert apart.max() < 0.3
    assert apart.mean() < 0.05
    assert predicted(scaled.other, scaled.after) == pytest.approx(predicted(scaled.base, scaled.before), rel=0.03)


def test_a_ruined_net_recovers(scaled: Scaled, tmp_path: Path, exact: Callable[..., np.ndarray]) -> None:
    """The promise itself: really quantized, the scaled net is as good as the one that nobody scaled."""
    base, other = scaled.base, scaled.other
    plain = decibels(base, base.net.model, tmp_path, exact)
    ruined = decibels(other, other.net.model, tmp_path, exact)
    recovered = decibels(other, other.scaled(scaled.after), tmp_path, exact)
    assert ruined < plain - 10
    assert recovered > plain


def test_less_noise_is_predicted_than_before(scaled: Scaled) -> None:
    ones = np.ones(len(scaled.factors))
    assert predicted(scaled.base, scaled.before) < 0.9 * predicted(scaled.base, ones)
    assert predicted(scaled.other, scaled.after) < 0.1 * predicted(scaled.other, ones)


@pytest.mark.parametrize("name", ["cifar", "bottleneck"])
def test_a_short_search_does_no_harm_either(
    name: str, known: Callable[[str], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalization, "ROUNDS", FEW)
    found = known(name)
    assert predicted(found, found.factors()) < predicted(found, np.ones(len(found.free)))


@pytest.mark.parametrize("name", NETS)
def test_frozen_groups_keep_their_scale(
    name: str, known: Callable[[str], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalization, "ROUNDS", 3)
    found = known(name)
    factors = found.factors()
    assert (~found.free).any()
    np.testing.assert_array_equal(factors[~found.free], 1.0)
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    np.testing.assert_array_equal(found.factors(), factors)  # it repeats


@pytest.mark.parametrize("groups", [1, 2])
def test_two_layers_in_a_row_meet_in_the_middle(
    groups: int,
    graph: Callable[..., onnx.ModelProto],
    know: Callable[..., Known],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Channels of about the same weight come to fill the grid about alike, whatever each was before."""
    monkeypatch.setattr(equalization, "ROUNDS", FEW)
    monkeypatch.setattr(equalization, "DOUBT", -MANY)  # whatever is found is taken, also where nothing is to be gained
    rng = np.random.default_rng(0)
    skew = np.array([1, 8, 1 / 8, 4], np.float32)
    weights = {
        "w1": rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "w2": rng.uniform(0.9, 1.1, (4, 4 // groups, 1, 1)).astype(np.float32),
        "k": rng.standard_normal((5, 4)).astype(np.float32),
    }
    text = f"""net (float[N,3,{SIZE},{SIZE}] x) => (float[N,5] y) {{
        c1 = Conv (x, w1)
        r1 = Relu (c1)
        c2 = Conv <group = {groups}> (r1, w2)
        r2 = Relu (c2)
        p = GlobalAveragePool (r2)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, k) }}"""
    base = know(graph(text, weights))
    index = base.net.groups.index["r1"]
    factors = np.ones(len(base.free))
    factors[index] = skew
    other = know(base.scaled(factors))
    first, second = base.factors()[index], other.factors()[index]
    np.testing.assert_allclose(np.log2(second * skew / first), 0, atol=1e-6)
    reach = base.statistics.tensors["r1"].channel_amax * first
    assert reach.max() / reach.min() < 2
    assert (reach / first * skew).max() / (reach / first * skew).min() > 16


def test_silent_channels_do_not_spoil_the_rows_that_read_them(
    graph: Callable[..., onnx.ModelProto], know: Callable[..., Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel that never fires has no range, but its weights have: scaled up, they must not set the rows' steps."""
    monkeypatch.setattr(equalization, "ROUNDS", FEW)
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "b1": np.array([0, -100, 0, 0], np.float32),
        "w2": rng.standard_normal((6, 4, 3, 3)).astype(np.float32),
        "k": rng.standard_normal((5, 6)).astype(np.float32),
    }
    text = f"""net (float[N,3,{SIZE},{SIZE}] x) => (float[N,5] y) {{
        c1 = Conv (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv (r1, w2)
        r2 = Relu (c2)
        p = GlobalAveragePool (r2)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, k) }}"""
    base = know(graph(text, weights))
    index = base.net.groups.index["r1"]
    assert base.tables["r1"].alive.tolist() == [True, False, True, True]
    factors = np.ones(len(base.free))
    factors[index[1]] = 1 / 1024
    other = know(base.scaled(factors))
    one, two = arrays(base.scaled(base.factors())), arrays(other.scaled(other.factors()))
    for tensor, values in one.items():
        np.testing.assert_allclose(two[tensor], values, rtol=1e-4, err_msg=tensor)


def test_nothing_quantized_leaves_all_as_it_is(known: Callable[[str], Known]) -> None:
    found = known("basic")
    factors = equalize(found.net.model, found.net.placement, found.net.groups, {}, {}, MANY)
    np.testing.assert_array_equal(factors, np.ones(len(found.free)))


def test_what_few_images_promise_is_doubted(known: Callable[[str], Known]) -> None:
    """The factors are all or none, and the fewer images the more they must promise."""
    found = known("basic")
    gain = predicted(found, np.ones(len(found.free))) / predicted(found, found.factors())
    assert gain > 1.01
    enough = int(DOUBT / (gain - 1))
    np.testing.assert_array_equal(found.factors(enough // 2), np.ones(len(found.free)))
    np.testing.assert_array_equal(found.factors(2 * enough), found.factors())
