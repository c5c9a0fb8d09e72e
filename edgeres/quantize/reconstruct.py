"""Network-wise reconstruction: biases, the rounding of weights and the steps of activations, by the answer itself.

What the closed-form rungs leave is how errors of different layers add up. Here the quantized network runs with all its
roundings, and the biases, the weights (in units of their steps, which stay) and the steps of the activations follow the
gradient of the logits' error, straight through the roundings. Images are moved by a few pixels and mixed in pairs, so
that what is learned is not these very images; learning rates are small, for the network is nearly right. How many
rounds there are follows from the network's size, never from a clock: the same build makes the same model on any day.

Source: Li et al., "BRECQ", 2021 (arXiv:2102.05426), section 3.2, for reconstruction over more than one layer, here over
all of them; Bengio et al. 2013 (arXiv:1308.3432) for straight-through rounding; Esser et al., "Learned Step Size
Quantization", 2020 (arXiv:1902.08153), section 2.1, equation 3, for the gradient of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeres.affine import QMAX, QMIN, SHIFTED, SYMMETRIC, scale_from_amax, shift_from_scale
from edgeres.artifacts import LEARNED, TensorRange
from edgeres.quantize.compensate import Compensation, kept_in_reach
from edgeres.quantize.follow import Follower, Quantizer
from edgeres.quantize.graph import WEIGHTED, Graph
from edgeres.quantize.insert import shift_of
from edgeres.quantize.offset import Shape, shapes_of
from edgeres.quantize.placement import Placement
from edgeres.quantize.saturation import partners

ROUNDS, FEWEST = 400, 60
WORK, SECONDS = 3.2e10, 120.0
"""Rounds times what one image costs, at most: about so many seconds on two slow cores (ResNet-32: all rounds)."""
ELEMENT = 10  # multiplications that take as long as an activation does to be read, rounded and written
BATCH = 32
RATES = {"weights": 0.02, "biases": 1e-3, "ranges": 0.01}
"""Per round at first: in steps of a weight, in shares of a layer's mean |bias|, and of a range (its logarithm)."""
MOVED = 8  # images move by up to 1/8 of their size
Watch = Callable[[int, int], None]


def straight_through(x: Tensor) -> Tensor:
    """Return ``x`` rounded half to even, with the gradient of doing nothing."""
    return x + (torch.round(x) - x).detach()


def rounds_for(fp32: Path) -> tuple[int, float]:
    """Return how many rounds a model gets, and about how many seconds they take; 0 where too few would be left."""
    cost = _cost(onnx.load(fp32))
    rounds = min(ROUNDS, int(WORK / max(cost, 1.0)))
    return (rounds, rounds * cost * SECONDS / WORK) if rounds >= FEWEST else (0, 0.0)


def _cost(model: onnx.ModelProto) -> float:
    """Return what one image costs, in multiplications; infinite where the size of anything is open."""
    graph, shapes, cost = Graph(model), shapes_of(model), 0.0
    for node in graph.nodes:
        elements = _elements(shapes.get(node.output[0]))
        cost += ELEMENT * elements
        if node.op_type in WEIGHTED:
            weights = graph.constant(node.input[1])
            outputs = shapes.get(node.output[0], (None, None))[1]
            cost += elements * weights.size / outputs if weights is not None and outputs else math.inf
    return cost


def _elements(shape: Shape | None) -> float:
    """Return how many elements a tensor has for each image."""
    if shape is None or None in shape[1:]:
        return math.inf
    return float(np.prod([size or 1 for size in shape[1:]]))


def reconstruct(
    follower: Follower,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    found: Compensation,
    images: np.ndarray,
    rounds: int,
    watch: Watch = lambda done, total: None,
) -> tuple[Compensation, dict[str, TensorRange]] | None:
    """Return weights, biases and ranges with less error of the logits; None where there is no signal, or none is found.

    Of ``ranges`` those that were learned have another ``amax``, ``scale`` and ``shift``, and ``learned`` as their
    method; what else is said of them is as it was.

    Args:
        follower: the float network.
        found: where to start: weights on their grids, and biases.
        images: float32 ``(N, 3, H, W)``, normalized.
        rounds: steps of the gradient, see :func:`rounds_for`.
    """
    start, weight_scales = found.constants, found.scales
    axes = {weight.tensor: weight.axis for weight in placement.weights}
    paired = {weight.tensor for weight in placement.weights if weight.paired}
    steps = {name: _spread(scale, start[name].ndim, axes[name]) for name, scale in weight_scales.items()}
    weights = {n: (torch.from_numpy(start[n]) / s).requires_grad_(True) for n, s in steps.items()}
    biases = {n: torch.from_numpy(v.copy()).requires_grad_(True) for n, v in start.items() if n not in steps}
    factors = _factors(placement, ranges)
    quantizer = _quantizer(placement, ranges, factors)

    def constants() -> dict[str, Tensor]:
        rounded = {n: torch.clamp(straight_through(w), -QMAX, QMAX) for n, w in weights.items()}
        rounded = {n: (in_reach(w, axes[n]) if n in paired else w) * steps[n] for n, w in rounded.items()}
        return {**rounded, **biases}

    optimizer = torch.optim.Adam(
        [
            {"params": list(weights.values()), "lr": RATES["weights"]},
            *({"params": [b], "lr": RATES["biases"] * float(b.detach().abs().mean() + 1e-8)} for b in biases.values()),
            {"params": list(factors.values()), "lr": RATES["ranges"]},
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    every = torch.from_numpy(images)
    for done in range(rounds):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done / rounds)) / 2
        x = _varied(every[torch.randint(len(every), (BATCH,), generator=generator)], generator)
        with torch.no_grad():
            wanted, _ = follower.run(x)
            signal = wanted.square().sum()
        if not signal > 0:
            return None
        got, _ = follower.run(x, (), quantizer, constants())
        optimizer.zero_grad()
        ((got - wanted).square().sum() / signal).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        watch(done + 1, rounds)
    with torch.no_grad():
        values = {name: value.detach().numpy() for name, value in constants().items()}
    learned = {name: math.exp(factor.item()) for name, factor in factors.items()}
    if not all(np.isfinite(value).all() for value in (*values.values(), np.array(list(learned.values())))):
        return None
    changed = {name: widened(ranges[name], factor) for name, factor in learned.items()}
    return Compensation(values, found.scales), {**ranges, **changed}


def widened(chosen: TensorRange, factor: float) -> TensorRange:
    """Return a range with another reach, as it is once learned."""
    grid = SHIFTED if chosen.shift else SYMMETRIC
    amax = chosen.amax * factor
    scale = scale_from_amax(np.float64(amax), grid)
    shift = float(shift_from_scale(scale)) if chosen.shift else 0.0
    return msgspec.structs.replace(chosen, amax=amax, scale=float(scale), shift=shift, method=LEARNED)


def in_reach(integers: Tensor, axis: int) -> Tensor:
    """Return a weight's integers with no pair that reaches too far."""
    rows = integers.movedim(axis, 0)
    mates = torch.from_numpy(partners(rows.shape))
    return kept_in_reach(rows.reshape(len(rows), -1), mates).reshape(rows.shape).movedim(0, axis)


class _Rounded(torch.autograd.Function):
    """A tensor on its grid, by torch's fused kernel; the gradient goes straight through, and to the step's logarithm.

    Per element, the step's share is ``rounded − x`` where ``x`` is within the grid, and the value of the grid's end
    beyond it: Esser et al., equation 3, times the step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, scale: float, grid: tuple[int, int]) -> Tensor:
        step = scale * math.exp(factor.item())
        rounded: Tensor = torch.fake_quantize_per_tensor_affine(x, step, 0, *grid)
        ctx.save_for_backward(x, rounded)
        ctx.ends = (grid[0] * step, grid[1] * step)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, rounded = ctx.saved_tensors
        first, last = ctx.ends
        inside = ((x >= first) & (x <= last)).to(x.dtype)
        step = (gradient * (rounded - x * inside)).sum()
        return gradient * inside, step, None, None


def _factors(placement: Placement, ranges: Mapping[str, TensorRange]) -> dict[str, Tensor]:
    """Return, for every range that can be learned, the logarithm of its factor: 0, with a gradient.

    Not the exact input's, whose steps are its pixels'; nor one of a tensor that was always zero.
    """
    names = dict.fromkeys(point.range_of for point in placement.points)
    learnable = (name for name in names if not ranges[name].shifts and ranges[name].amax > 0)
    return {name: torch.zeros((), requires_grad=True) for name in learnable}


def _quantizer(placement: Placement, ranges: Mapping[str, TensorRange], factors: Mapping[str, Tensor]) -> Quantizer:
    """Return what Q/DQ makes of a tensor, with the gradient of doing nothing within the grid."""
    source = {point.tensor: point.range_of for point in placement.points}

    def quantizer(name: str, x: Tensor) -> Tensor:
        found = ranges[source[name]]
        if found.shifts:
            shift = torch.from_numpy(shift_of(found)).to(x.dtype)
            return torch.clamp(torch.round(x - shift), QMIN, QMAX) + shift  # the input: nothing to learn in front
        grid = SHIFTED if found.shift else SYMMETRIC
        if source[name] not in factors:
            quantized: Tensor = torch.fake_quantize_per_tensor_affine(x, found.scale, 0, *grid)
            return quantized
        rounded: Tensor = _Rounded.apply(x, factors[source[name]], found.scale, grid)  # type: ignore[no-untyped-call]
        return rounded

    return quantizer


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images moved by a few pixels, edges repeated, and mixed in pairs."""
    height, width = x.shape[2:]
    reach = (max(1, height // MOVED), max(1, width // MOVED))
    down, right = (int(torch.randint(0, 2 * r + 1, (), generator=generator)) for r in reach)
    moved = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    moved = moved[:, :, down : down + height, right : right + width]
    share = torch.rand(len(x), 1, 1, 1, generator=generator) * 0.5
    share[: len(x) // 2] = 0
    other = moved[torch.randperm(len(x), generator=generator)]
    return moved * (1 - share) + other * share


def _spread(scale: np.ndarray, ndim: int, axis: int) -> Tensor:
    return torch.from_numpy(scale).reshape([-1 if i == axis else 1 for i in range(ndim)])
