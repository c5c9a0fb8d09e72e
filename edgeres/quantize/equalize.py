"""Cross-layer equalization, over whole residual streams: per-channel ranges for the price of per-tensor ones.

int8 gives a tensor one scale, so a channel that is a tenth as large as the largest gets a tenth of the levels. Scaling
channels up, and the weights that read them down, changes nothing in float and lets every channel fill the grid. The
factors are not set by a rule of ranges but found by minimizing the noise that reaches the logits: that of every
activation (from the calibration pass's tables) and of every weight (whose rows get less even by it), each with the
sensitivity of the answer to it.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1, for equalization between two layers; Meller et al., "Same,
Same But Different", 2019 (arXiv:1902.01917), for factors chosen by the resulting noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.optim.adam import adam

from edgeres.affine import QMAX
from edgeres.noise import OCTAVES, PER_OCTAVE, STEPS, NoiseTable
from edgeres.quantize.channels import ChannelGroups, takes_factors
from edgeres.quantize.graph import Graph, attribute
from edgeres.quantize.placement import Placement

ROUNDS = 300
RATE = 0.05  # octaves per round, at first
ADAM: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
DOUBT = 64.0  # images; with n of them the noise must fall to less than 1 / (1 + DOUBT / n)
ROUNDING_GAIN = 0.5  # adaptive rounding and bias correction leave about this much of the weights' noise power


@dataclass(frozen=True)
class _Activations:
    """All quantized tensors, one after the other: T of them, with C channels in all.

    ``log_step``, ``sensitivity`` and ``groups`` are ``(C,)``, ``log_error`` is ``(C, STEPS)``; ``owner`` is int64
    ``(C,)``: the tensor that a channel belongs to.
    """

    log_step: Tensor
    log_error: Tensor
    sensitivity: Tensor
    groups: Tensor
    owner: Tensor
    count: int

    def noise(self, log_factor: Tensor, log_steps: Tensor) -> Tensor:
        """Return the logits' noise power that each tensor causes, ``(T,)``, at steps 2^``log_steps``, ``(T,)``, and the
        groups' factors."""
        own = log_steps[self.owner] - log_factor[self.groups]
        place = torch.clamp((own - self.log_step - OCTAVES[0]) * PER_OCTAVE, 0, STEPS - 1 - 1e-9)
        left = place.detach().long()
        near, far = (self.log_error.gather(1, index.unsqueeze(1)).squeeze(1) for index in (left, left + 1))
        noise = self.sensitivity * torch.exp(torch.lerp(near, far, place - left))
        return torch.zeros(self.count, dtype=noise.dtype).index_add(0, self.owner, noise)

    def best_steps(self, log_factor: Tensor) -> Tensor:
        """Return the log2 steps, ``(T,)``, with the least noise at fixed factors, of eight octaves below the top."""
        top = torch.where(self.sensitivity > 0, self.log_step + log_factor[self.groups], -torch.inf)
        start = torch.full((self.count,), -torch.inf, dtype=top.dtype).scatter_reduce(0, self.owner, top, "amax")
        start[start.isinf()] = 0  # no channel of it matters
        offsets = torch.arange(-8, 1.01, 0.125, dtype=top.dtype)
        noise = torch.stack([self.noise(log_factor, start + offset) for offset in offsets])
        return start + offsets[noise.argmin(0)]


@dataclass(frozen=True)
class _Weights:
    """Quantized layers of one shape, L of them: their largest |w| by output and input channel, and the variance of what
    these multiply.

    ``largest`` is ``(L, g, K / g, C / g)``, ``power`` is ``(L, g, C / g)``, ``sensitivity`` and ``outputs``, the groups
    of the outputs' channels, are ``(L, g, K / g)``; ``groups``, those of the inputs', int64 ``(L, g, C / g)``.
    """

    largest: Tensor
    power: Tensor
    sensitivity: Tensor
    groups: Tensor
    outputs: Tensor
    taps: int

    def noise(self, log_factor: Tensor) -> Tensor:
        """Return the logits' noise power that rounding these weights causes, at the groups' factors."""
        factor = torch.exp2(log_factor[self.groups])
        step = (self.largest / factor.unsqueeze(2)).amax(3) / QMAX
        reach = (factor.square() * self.power).sum(2, keepdim=True) * self.taps
        return ROUNDING_GAIN * (self.sensitivity * step.square() / 12 * reach).sum()

    def spread(self) -> Tensor:
        """Return about how far each output deviates from its mean, float64 ``(L, g, K / g)``, in its own units."""
        return (self.largest.square() * self.power.unsqueeze(2)).sum(3).mul(self.taps).sqrt()


def equalize(
    model: onnx.ModelProto,
    placement: Placement,
    groups: ChannelGroups,
    tables: Mapping[str, NoiseTable],
    sensitivity: Mapping[str, np.ndarray],
    images: int,
    before: Mapping[str, NoiseTable] | None = None,
) -> np.ndarray:
    """Return the factor of every group, float64 ``(groups,)``; 1 where a group is not free, and for all of them where
    it is doubtful that they gain anything.

    Factors stretch each channel to what these images showed of it, and of few images they learn just these. So they
    must promise more the fewer there are: see ``DOUBT``.

    The result depends on what the network computes, not on how its channels happen to be scaled: the search starts from
    factors that make the groups' ranges equal.

    Args:
        model: the float graph.
        tables: for every quantized tensor that is to be considered.
        sensitivity: of these and of every quantized layer's output, float64 ``(C,)`` each.
        images: that ``tables`` were counted on.
        before: tables of what the factors' gain is measured against, where that is not ``tables``.
    """
    names = [name for name in placement.tensors if name in tables and name in groups.index]
    if not names:
        return np.ones(len(groups))
    activations = _activations(names, groups, tables, sensitivity)
    weights = _weights(model, placement, groups, tables, sensitivity)
    free = torch.from_numpy(groups.free)
    plain = torch.zeros(len(groups), dtype=torch.float64)
    compared = activations if before is None else _activations(names, groups, before, sensitivity)
    noise_before = _noise(compared, weights, plain, compared.best_steps(plain))
    log_factor = torch.from_numpy(_even(groups, names, tables, weights))
    log_steps = activations.best_steps(log_factor)
    searched = [log_factor.requires_grad_(True), log_steps.requires_grad_(True)]
    means, squares = ([torch.zeros_like(tensor) for tensor in searched] for _ in range(2))
    counts = [torch.zeros(()) for _ in searched]
    for i in range(ROUNDS):
        noise = _noise(activations, weights, log_factor, log_steps)
        gradients = list(torch.autograd.grad(torch.log(noise + 1e-300), searched))
        gradients[0][~free] = 0
        # The function, not the class torch.optim.Adam, which loads torch's compiler: longer than the search.
        with torch.no_grad():
            rate = RATE * (1 - i / ROUNDS)
            adam(searched, gradients, means, squares, [], counts, lr=rate, maximize=False, **ADAM)
    with torch.no_grad():
        after = _noise(activations, weights, log_factor, log_steps)
    if float(after) * (1 + DOUBT / images) > float(noise_before):
        return np.ones(len(groups))
    return np.asarray(2.0 ** log_factor.detach().numpy())


def _noise(activations: _Activations, weights: Sequence[_Weights], log_factor: Tensor, log_steps: Tensor) -> Tensor:
    """Return the power of the logits' noise."""
    return sum((layers.noise(log_factor) for layers in weights), activations.noise(log_factor, log_steps).sum())


def _activations(
    names: Sequence[str],
    groups: ChannelGroups,
    tables: Mapping[str, NoiseTable],
    sensitivity: Mapping[str, np.ndarray],
) -> _Activations:
    sizes = [len(tables[name].log_step) for name in names]
    return _Activations(
        torch.from_numpy(np.concatenate([tables[name].log_step for name in names])),
        torch.from_numpy(np.concatenate([tables[name].log_error for name in names])),
        torch.from_numpy(np.concatenate([sensitivity[name] * tables[name].alive for name in names])),
        torch.from_numpy(np.concatenate([groups.index[name] for name in names])),
        torch.from_numpy(np.repeat(np.arange(len(names)), sizes)),
        len(names),
    )


def _weights(
    model: onnx.ModelProto,
    placement: Placement,
    groups: ChannelGroups,
    tables: Mapping[str, NoiseTable],
    sensitivity: Mapping[str, np.ndarray],
) -> list[_Weights]:
    """Return the layers whose inputs' factors count, those of one shape together."""
    graph = Graph(model)
    nodes = {node.name: node for node in graph.nodes}
    source = {reader: point.range_of for point in placement.points for reader in point.readers}
    found: dict[tuple[int, ...], list[tuple[np.ndarray, ...]]] = {}
    for weight in placement.weights:
        node = nodes[weight.readers[0][0]]
        name = source[(node.name, 0)]
        if not takes_factors(graph, node) or name not in tables or node.output[0] not in sensitivity:
            continue
        values = np.abs(graph.values(weight.tensor).astype(np.float64))
        values = values if weight.axis == 0 else values.T
        count = attribute(node, "group", 1)
        assert isinstance(count, int)
        table = tables[name]
        spread = np.maximum(table.power - table.mean**2, 0)  # the mean's error is a bias, and corrected
        largest = values.reshape(*values.shape[:2], -1).max(axis=2)
        taps = int(np.prod(values.shape[2:]))
        layer = (
            largest.reshape(count, -1, largest.shape[1]),
            spread.reshape(count, -1),
            sensitivity[node.output[0]].reshape(count, -1),
            groups.index[node.input[0]].reshape(count, -1),
            groups.index[node.output[0]].reshape(count, -1),
        )
        found.setdefault((*layer[0].shape, taps), []).append(layer)
    alike = []
    for (*_, taps), layers in found.items():
        stacked = [torch.from_numpy(np.stack(parts)) for parts in zip(*layers, strict=True)]
        largest, power, felt, inputs, outputs = stacked
        alike.append(_Weights(largest, power, felt, inputs, outputs, taps))
    return alike


def _even(
    groups: ChannelGroups, names: list[str], tables: Mapping[str, NoiseTable], weights: list[_Weights]
) -> np.ndarray:
    """Return log2 factors that even out the groups' ranges, geometric means over each group's tensors.

    A group that never fired has no range; what its layers make of their inputs stands for it, lest weights that happen
    to be large because its channels happen to be small spoil the rows that they are in.
    """
    total, number = np.zeros(len(groups)), np.zeros(len(groups))
    for name in names:
        alive, index = tables[name].alive, groups.index[name]
        np.add.at(total, index[alive], tables[name].log_step[alive])
        np.add.at(number, index[alive], 1)
    silent = number == 0
    for layer in weights:
        spread, index = layer.spread().numpy().ravel(), layer.outputs.numpy().ravel()
        made = silent[index] & (spread > 0)
        np.add.at(total, index[made], np.log2(spread[made] / QMAX))
        np.add.at(number, index[made], 1)
    return np.where(groups.free & (number > 0), -total / np.maximum(number, 1), 0.0)
