"""Which layers are given back: the fewest that are enough, worst first, and none that is not needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeres.artifacts import LayerCost
from edgeres.quantize import fewest
from edgeres.quantize.candidates import candidates
from edgeres.quantize.solo import noise_of

POWERS = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=7)


def cost(layer: str, expected: float, nodes: tuple[str, ...] = (), weighted: int | None = None) -> LayerCost:
    nodes = nodes or (layer,)
    return LayerCost(
        layer=layer,
        nodes=nodes,
        weighted=len(nodes) if weighted is None else weighted,
        expected=expected,
        changed=0.0,
        sqnr_db=None,
    )


def adding(powers: dict[str, float]) -> Callable[[Collection[str]], float]:
    """Noise that adds up: what is not given back."""
    return lambda nodes: sum(power for node, power in powers.items() if node not in nodes)


@given(POWERS, st.floats(0, 1))
def test_no_smaller_choice_is_enough(powers: list[float], share: float) -> None:
    """Against every choice there is."""
    noise = {f"layer{i}": power for i, power in enumerate(powers)}
    left, enough = adding(noise), share * sum(powers)
    taken = fewest([cost(name, power) for name, power in noise.items()], left, enough, len(noise))
    chosen = {node for one in taken for node in one.nodes}
    assert left(chosen) <= enough
    for size in range(1, len(chosen)):
        assert not any(left(smaller) <= enough for smaller in itertools.combinations(noise, size))


@given(POWERS, st.integers(0, 7))
def test_where_nothing_is_enough_the_fewest_that_are_nearly_the_best_are_taken(powers: list[float], most: int) -> None:
    noise = {f"layer{i}": power for i, power in enumerate(powers)}
    taken = fewest([cost(name, power) for name, power in noise.items()], adding(noise), -1.0, most)
    worst = sorted(noise, key=lambda name: -noise[name])
    assert len(taken) <= most
    assert {one.expected for one in taken} == {noise[name] for name in worst[: len(taken)]}
    best, left = adding(noise)(worst[:most]), adding(noise)([one.layer for one in taken])
    assert left <= 1.1 * best + 1e-12
    if len(taken) > 1:
        assert adding(noise)(worst[: len(taken) - 1]) > 1.1 * best


def test_layers_that_hardly_help_do_not_go_back_where_nothing_is_enough() -> None:
    noise = {"bad": 1.0, "worse": 2.0, **{f"good{i}": 0.001 for i in range(9)}, "kept": 0.5}
    costs = [cost(name, power) for name, power in noise.items() if name != "kept"]
    assert {one.layer for one in fewest(costs, adding(noise), 0.1, 8)} == {"bad", "worse"}


def test_a_layer_that_turns_out_not_to_be_needed_is_left_out() -> None:
    """Alone ``a`` seems worst, but without ``b`` it does no harm: noise need not add up."""
    costs = [cost("a", 0.5), cost("b", 0.4), cost("c", 0.1)]
    taken = fewest(costs, lambda nodes: 0.0 if "b" in nodes else 1.0, 0.1, 3)
    assert [one.layer for one in taken] == ["b"]


def test_a_block_that_is_worse_than_its_layers_is_taken_whole() -> None:
    nodes = ("conv1", "conv2", "add")
    costs = [
        cost("conv1", 0.1, weighted=1),
        cost("conv2", 0.1, weighted=1),
        cost("other", 0.2, weighted=1),
        cost("block", 0.9, nodes, weighted=2),
    ]
    taken = fewest(costs, lambda given: 0.0 if {"conv1", "conv2"} <= set(given) else 1.0, 0.1, 2)
    assert [one.layer for one in taken] == ["block"]


def test_what_has_no_weights_does_not_count() -> None:
    costs = [cost("skip", 0.9, weighted=0), cost("conv", 0.5)]
    assert [one.layer for one in fewest(costs, lambda given: 1.0, 0.0, 0)] == ["skip"]
    assert fewest([], lambda given: 1.0, 0.0, 1) == ()


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_share_that_noise_changes_is_what_noise_changes(spread: float, classes: int) -> None:
    """Against noise that is really added."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((200, classes))
    noise = spread * random.standard_normal((400, *logits.shape))
    changed = float(np.mean((logits + noise).argmax(2) != logits.argmax(1)))
    own = noise - noise.mean(2, keepdims=True)
    found = noise_of(torch.from_numpy(logits), float((own**2).sum() / len(noise)), 0.0)
    assert found.expected == pytest.approx(changed, rel=0.1)
    both = logits - logits.mean(1, keepdims=True)
    assert found.sqnr_db == pytest.approx(10 * np.log10((both**2).sum() / ((own**2).sum() / len(noise))))


def test_no_noise_changes_nothing_and_little_noise_almost_nothing() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert noise_of(logits, 0.0, 0.0).expected == 0.0
    assert noise_of(logits, 0.0, 0.0).sqnr_db is None
    assert 0 < noise_of(logits, 1e-1, 0.0).expected < 1e-10
    assert noise_of(torch.ones(3, 1, dtype=torch.float64), 1.0, 0.0).expected == 0.0


@pytest.mark.parametrize("power", [np.inf, np.nan, 1e300])
def test_noise_without_end_leaves_a_guess(power: float) -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
    found = noise_of(logits, power, 1.0)
    assert found.expected == pytest.approx(3 / 4, abs=0.01)
    assert found.sqnr_db is not None
    assert -4000 < found.sqnr_db < -2900


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
def test_candidates_are_the_layers_and_the_blocks(name: str, net: Callable[[str], object]) -> None:
    found = net(name)
    modules = found.exported.modules  # type: ignore[attr-defined]
    units = {one.name: one for one in candidates(found.fp32, modules, found.placement)}  # type: ignore[attr-defined]
    weighted = {modules[node] for weight in found.placement.weights for node, _ in weight.readers}  # type: ignore[attr-defined]
    assert weighted < units.keys()
    additions = [node for node in found.fp32.graph.node if node.op_type == "Add"]  # type: ignore[attr-defined]
    for addition in additions:
        block = modules[addition.name]
        inside = {node for one in units.values() for node in one.nodes if f"{modules[node]}.".startswith(f"{block}.")}
        assert set(units[block].nodes) == inside
        assert units[block].weighted == sum(name.startswith(f"{block}.") for name in weighted) > 1
        assert f"{block} (skip)" in units
    assert set(units) - weighted - {f"{modules[n.name]}{end}" for n in additions for end in ("", " (skip)")} == {
        "avgpool (pool)"
    }


def test_a_layer_without_a_module_goes_by_its_own_name(graph: Callable[..., onnx.ModelProto]) -> None:
    from edgeres.quantize import plan

    weights = np.ones((3, 3, 1, 1), np.float32)
    model = graph("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { a = Conv (x, w) y = Conv (a, v) }",
                  {"w": weights, "v": weights})  # fmt: skip
    units = candidates(model, {}, plan(model, {}))
    assert [one.nodes for one in units] == [(node.name,) for node in model.graph.node]
    assert [one.name for one in units] == [node.name for node in model.graph.node]


def test_no_two_candidates_have_a_name(graph: Callable[..., onnx.ModelProto]) -> None:
    """Two blocks of one module, which has a layer of its own too."""
    from edgeres.quantize import plan

    weights = np.ones((3, 3, 1, 1), np.float32)
    model = graph(
        """net (float[N,3,8,8] x) => (float[N,3,8,8] y) {
            a = Conv (x, s) r = Relu (a) b = Conv (r, t) c = Conv (b, u) d = Add (c, r)
            e = Conv (d, v) f = Conv (e, w) y = Add (f, d) }""",
        dict.fromkeys("stuvw", weights),
    )
    modules = {node.name: "body" for node in model.graph.node if node.op_type == "Add" or node.input[-1] == "s"}
    names = [one.name for one in candidates(model, modules, plan(model, modules))]
    assert len(set(names)) == len(names)
    assert {"body", "body (block)", "body (block2)"} < set(names)
