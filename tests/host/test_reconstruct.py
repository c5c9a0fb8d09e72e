"""Reconstruction by gradient: less error, the same model each time, and left out where it would take too long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgeres
from edgeres.affine import SHIFTED, SYMMETRIC
from edgeres.artifacts import TensorRange, from_data
from edgeres.inspection import inspect_bundle, range_words
from edgeres.pipeline import Build
from edgeres.progress import Progress
from edgeres.quantize import reconstruct as module
from edgeres.quantize.compensate import Compensation, compensate
from edgeres.quantize.reconstruct import FEWEST, ROUNDS, reconstruct, rounds_for
from edgeres.quantize.recover import follower_of, with_biases
from edgeres.quantize.simulate import quantizer_of
from edgeres.recipe import load_recipe
from edgeres.workspace import Workspace

Start = tuple[Any, Any, Any, Compensation, np.ndarray]


@pytest.fixture(scope="module")
def start(trained: Any) -> Start:
    """What reconstruction begins with: the net, its plan and ranges, and what the closed form found."""
    found, x = trained
    follower = follower_of(with_biases(found.fp32), found.placement)
    quantizer = quantizer_of(found.placement, found.ranges)
    return follower, found.placement, found.ranges, compensate(follower, found.placement, quantizer, [x]), x


def error(start: Start, found: Compensation, learned: Any = None) -> float:
    """The logits' squared error, with the ranges to begin with or those that were learned."""
    import torch

    follower, placement, ranges, _, x = start
    ranges = learned or ranges
    constants = {name: torch.from_numpy(values) for name, values in found.constants.items()}
    with torch.no_grad():
        images = torch.from_numpy(x)
        got, _ = follower.run(images, (), quantizer_of(placement, ranges), constants)
        return float((got - follower.run(images)[0]).square().sum())


def test_there_is_less_error_and_weights_stay_on_their_grids(start: Start) -> None:
    follower, placement, ranges, best, x = start
    away = {n: v + 0.015 * np.abs(v).mean() if n not in best.scales else v for n, v in best.constants.items()}
    worse = Compensation({name: values.astype(np.float32) for name, values in away.items()}, best.scales)
    result = reconstruct(follower, placement, ranges, worse, x, rounds=30)
    assert result is not None
    found, learned = result
    assert error(start, found, learned) < 0.9 * error(start, worse)
    for name, scale in found.scales.items():
        values = found.constants[name]
        steps = values / scale.reshape(-1, *[1] * (values.ndim - 1))
        assert np.abs(steps - np.round(steps)).max() < 1e-3
        assert np.abs(steps).max() < 127.01


def test_it_comes_out_the_same_each_time(start: Start) -> None:
    done: list[tuple[int, int]] = []
    one = reconstruct(*start, rounds=5)
    other = reconstruct(*start, rounds=5, watch=lambda now, total: done.append((now, total)))
    assert one is not None
    assert other is not None
    assert all((one[0].constants[name] == values).all() for name, values in other[0].constants.items())
    assert one[1] == other[1]
    assert done == [(i + 1, 5) for i in range(5)]


def test_without_a_signal_there_is_nothing_to_learn(start: Start) -> None:
    import copy

    import torch

    follower = copy.copy(start[0])
    last = follower.nodes[-1].input
    follower.constants = {
        **follower.constants,
        **{name: torch.zeros_like(follower.constants[name]) for name in last[1:]},
    }
    assert reconstruct(follower, *start[1:], rounds=3) is None


def test_what_is_not_finite_is_not_returned(start: Start) -> None:
    follower, placement, ranges, found, x = start
    broken = {name: np.full_like(v, np.inf) if name not in found.scales else v for name, v in found.constants.items()}
    assert reconstruct(follower, placement, ranges, Compensation(broken, found.scales), x, rounds=2) is None


def test_larger_nets_have_fewer_rounds_and_the_largest_none(
    graph: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    def rounds(size: str, channels: int) -> int:
        weights = {"w": np.ones((channels, 3, 3, 3), np.float32)}
        text = f"net (float[N,3,{size},{size}] x) => (float[N,{channels},P,Q] y) {{ y = Conv <pads=[1,1,1,1]> (x, w) }}"
        onnx.save(graph(text, weights), tmp_path / "model.onnx")
        found, seconds = rounds_for(tmp_path / "model.onnx")
        assert 0 <= seconds <= module.SECONDS
        assert (seconds > 0) == (found > 0)
        return found

    assert rounds("32", 8) == ROUNDS
    # multiplications and activations: 128 × 128 × 200 outputs of 27, and what is read beside them
    assert rounds("128", 200) == int(module.WORK / (128 * 128 * 200 * (27 + module.ELEMENT)))
    assert FEWEST <= rounds("128", 800) < rounds("128", 400)
    assert rounds("256", 800) == 0
    assert rounds("H", 8) == 0  # of any size


def test_what_was_left_out_is_told_and_its_model_is_that_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made(level: str) -> tuple[str, int, list[str]]:
        recipe = load_recipe(None, {"quantization.recovery": level, "calibration.count": 32})
        with Workspace(tmp_path / "bundle") as workspace:
            job = Build(recipe, workspace, "quantize", Progress())
            job.open_samples()
            job.quantize(job.export())
            record = workspace.records["quantize"]
            return record.key, record.files[0].bytes, [text for text in job.warnings if "reconstruction" in text]

    monkeypatch.setattr(module, "WORK", 1.0)
    large = made("full")
    assert len(large[2]) == 1
    assert made("fast") == (*large[:2], [])
    monkeypatch.setattr(module, "WORK", 3.2e10)
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module, "FEWEST", 1)
    three = made("full")
    assert three[2] == []
    monkeypatch.setattr(module, "ROUNDS", 2)
    assert len({large[0], three[0], made("full")[0]}) == 3


def test_a_step_has_the_gradient_of_the_paper() -> None:
    """Esser et al. 2020, equation 3, as autograd has it of the plain formula; by the step's logarithm, so times it."""
    import torch

    x = torch.linspace(-3.0, 3.0, 601) + 0.001
    for grid in (SYMMETRIC, SHIFTED):
        one, other = (torch.tensor(0.25, requires_grad=True) for _ in range(2))
        left, right = (x.clone().requires_grad_(True) for _ in range(2))
        rounded = module._Rounded.apply(left, one, 0.01, grid)
        step = 0.01 * torch.exp(other)
        steps = torch.clamp(right / step, *grid)
        plain = (steps + (torch.round(steps) - steps).detach()) * step
        weights = torch.linspace(-1.0, 2.0, 601)
        (rounded * weights).sum().backward()
        (plain * weights).sum().backward()
        assert torch.allclose(rounded, plain, atol=1e-6)
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.item() == pytest.approx(other.grad.item(), rel=1e-2)
        assert left.grad is not None
        assert right.grad is not None
        assert (left.grad - right.grad).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_range_that_is_wrong_is_learned_back(start: Start, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setitem(module.RATES, "ranges", 0.1)
    follower, placement, ranges, best, x = start
    name = placement.points[-1].range_of
    wrong = {**ranges, name: module.widened(ranges[name], factor)}
    result = reconstruct(follower, placement, wrong, best, x, rounds=12)
    assert result is not None
    learned = result[1][name]
    assert abs(np.log(learned.amax / ranges[name].amax)) < 0.9 * abs(np.log(factor))
    assert learned.scale == np.float32(learned.amax / (255 if learned.shift else 127))
    assert learned.shift == (128 * learned.scale if ranges[name].shift else 0)
    assert learned.method == "learned"


def test_a_bundle_tells_the_ranges_that_its_model_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module, "FEWEST", 1)
    built = edgeres.build(recovery="full", calibration_count=32, out=tmp_path / "bundle")
    told = inspect_bundle(tmp_path / "bundle")["ranges"]
    table = json.loads((tmp_path / "bundle/calibration.json").read_text())["tensors"]
    assert built.manifest.stages["quantize"].facts["learned"].keys() == {
        name for name, found in told.items() if found["method"] == "learned"
    }
    moved = [name for name, found in told.items() if found["scale"] != table[name]["scale"]]
    assert moved
    assert all(table[name]["method"] == "auto" for name in told)
    graph = onnx.load(tmp_path / "bundle/model.int8.onnx").graph
    scales = {
        float(numpy_helper.to_array(tensor))
        for tensor in graph.initializer
        if not tensor.dims and tensor.data_type == 1
    }
    assert {told[name]["scale"] for name in moved} <= scales
    assert all(0 <= told[name]["clipped"] < 0.1 for name in moved)
    assert "as learned" in range_words(from_data(told[moved[0]], TensorRange, "range"))
