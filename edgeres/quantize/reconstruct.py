"""Network-wise reconstruction: biases and the rounding of weights, of all layers together, by the answer itself.

What the closed-form rungs leave is how errors of different layers add up. Here the quantized network runs with all its
roundings, and the biases and the weights (in units of their steps, which stay) follow the gradient of the logits'
error, straight through the roundings. Images are moved by a few pixels and mixed in pairs, so
that what is learned is not these very images; learning rates are small, for the network is nearly right.

Source: Li et al., "BRECQ", 2021 (arXiv:2102.05426), section 3.2, for reconstruction over more than one layer, here over
all of them; Bengio et al. 2013 (arXiv:1308.3432) for straight-through rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeres.affine import QMAX, QMIN, SHIFTED, SYMMETRIC
from edgeres.artifacts import TensorRange
from edgeres.quantize.compensate import Compensation
from edgeres.quantize.follow import Follower, Quantizer
from edgeres.quantize.insert import shift_of
from edgeres.quantize.placement import Placement

ROUNDS, FEWEST = 400, 60
BATCH = 32
RATES = {"weights": 0.02, "biases": 1e-3}
"""Per round at first: in steps of a weight, and in shares of a layer's mean |bias|."""
MOVED = 8  # images move by up to 1/8 of their size
Watch = Callable[[int, int], None]


def straight_through(x: Tensor) -> Tensor:
    """Return ``x`` rounded half to even, with the gradient of doing nothing."""
    return x + (torch.round(x) - x).detach()


def reconstruct(
    follower: Follower,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    found: Compensation,
    images: np.ndarray,
    seconds: float,
    watch: Watch = lambda done, total: None,
) -> Compensation | None:
    """Return weights and biases with less error of the logits; None where the time is too short for it.

    Args:
        follower: the float network.
        found: where to start: weights on their grids, and biases.
        images: float32 ``(N, 3, H, W)``, normalized.
        seconds: the time there is.
    """
    start, weight_scales = found.constants, found.scales
    axes = {weight.tensor: weight.axis for weight in placement.weights}
    steps = {name: _spread(scale, start[name].ndim, axes[name]) for name, scale in weight_scales.items()}
    weights = {n: (torch.from_numpy(start[n]) / s).requires_grad_(True) for n, s in steps.items()}
    biases = {n: torch.from_numpy(v.copy()).requires_grad_(True) for n, v in start.items() if n not in steps}
    quantizer = _quantizer(placement, ranges)

    def constants() -> dict[str, Tensor]:
        rounded = {n: torch.clamp(straight_through(w), -QMAX, QMAX) * steps[n] for n, w in weights.items()}
        return {**rounded, **biases}

    optimizer = torch.optim.Adam(
        [
            {"params": list(weights.values()), "lr": RATES["weights"]},
            *({"params": [b], "lr": RATES["biases"] * float(b.detach().abs().mean() + 1e-8)} for b in biases.values()),
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    every = torch.from_numpy(images)
    began, done, share = time.monotonic(), 0, 0.0
    while share < 1:  # of the rounds or of the time, whichever ends first
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        x = _varied(every[torch.randint(len(every), (BATCH,), generator=generator)], generator)
        with torch.no_grad():
            wanted, _ = follower.run(x)
        got, _ = follower.run(x, (), quantizer, constants())
        optimizer.zero_grad()
        ((got - wanted).square().sum() / wanted.square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done += 1
        passed = time.monotonic() - began
        if done == 3 and passed / done * FEWEST > seconds:  # the first rounds are slower: memory is found
            return None
        share = max(done / ROUNDS, passed / seconds)
        watch(done, ROUNDS)
    if done < FEWEST:
        return None
    with torch.no_grad():
        values = {name: value.detach().numpy() for name, value in constants().items()}
    return Compensation(values, found.scales)


def _quantizer(placement: Placement, ranges: Mapping[str, TensorRange]) -> Quantizer:
    """Return what Q/DQ makes of a tensor, as torch's fused kernel has it, whose gradient goes straight through."""
    source = {point.tensor: point.range_of for point in placement.points}

    def quantizer(name: str, x: Tensor) -> Tensor:
        found = ranges[source[name]]
        if found.shifts:
            shift = torch.from_numpy(shift_of(found)).to(x.dtype)
            return torch.clamp(torch.round(x - shift), QMIN, QMAX) + shift  # the input: nothing to learn in front
        first, last = SHIFTED if found.shift else SYMMETRIC
        quantized: Tensor = torch.fake_quantize_per_tensor_affine(x, found.scale, 0, first, last)
        return quantized

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
