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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from edgeres.affine import QMAX
from edgeres.noise import OCTAVES, PER_OCTAVE, STEPS, NoiseTable
from edgeres.quantize.channels import ChannelGroups, takes_factors
from edgeres.quantize.graph import Graph, attribute
from edgeres.quantize.placement import Placement

ROUNDS = 300
RATE = 0.05  # octaves per round, at first
DOUBT = 64.0  # images; with n of them the noise must fall to less than 1 / (1 + DOUBT / n)
ROUNDING_GAIN = 0.5  # adaptive rounding and bias correction leave about this much of the weights' noise power


@dataclass(frozen=True)
class _Activation:
    """One quantized tensor: its table, the sensitivity of its channels, and the groups that these belong to."""

    log_step: Tensor
    log_error: Tensor
    sensitivity: Tensor
    groups: Tensor

    def noise(self, log_factor: Tensor, log_step: Tensor) -> Tensor:
        """Return the logits' noise power that this tensor causes, at step 2^``log_step`` and the groups' factors."""
        own = log_step - log_factor[self.groups]
        place = torch.clamp((own - self.log_step - OCTAVES[0]) * PER_OCTAVE, 0, STEPS - 1 - 1e-9)
        left = place.detach().long()
        rows = torch.arange(len(self.log_error))
        share = place - left
        logs = self.log_error[rows, left] * (1 - share) + self.log_error[rows, left + 1] * share
        return (self.sensitivity * torch.exp(logs)).sum()


@dataclass(frozen=True)
class _Weights:
    """One quantized layer: its largest |w| by output and input channel, and the variance of what these multiply.

    ``groups`` is int64 ``(g, C / g)``, the groups of its inputs' channels; ``outputs`` is int64 ``(K,)``.
    """

    largest: Tensor
    power: Tensor
    sensitivity: Tensor
    groups: Tensor
    outputs: Tensor
    taps: int

    def noise(self, log_factor: Tensor) -> Tensor:
        """Return the logits' noise power that rounding these weights causes, at the groups' factors."""
        factor = torch.exp2(log_factor[self.groups])  # (rows of groups, inputs of a group)
        step = (self.largest / self._by_row(factor)).amax(1) / QMAX
        reach = self._by_row((factor.square() * self.power).sum(1)) * self.taps
        return ROUNDING_GAIN * (self.sensitivity * step.square() / 12 * reach).sum()

    def spread(self) -> Tensor:
        """Return about how far each output deviates from its mean, float64 ``(K,)``, in its own units."""
        return (self.largest.square() * self._by_row(self.power)).sum(1).mul(self.taps).sqrt()

    def _by_row(self, grouped: Tensor) -> Tensor:
        return grouped.repeat_interleave(len(self.largest) // len(grouped), 0)


def equalize(
    model: onnx.ModelProto,
    placement: Placement,
    groups: ChannelGroups,
    tables: Mapping[str, NoiseTable],
    sensitivity: Mapping[str, np.ndarray],
    images: int,
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
    """
    names = [name for name in placement.tensors if name in tables and name in groups.index]
    if not names:
        return np.ones(len(groups))
    activations = [
        _Activation(
            torch.from_numpy(tables[name].log_step),
            torch.from_numpy(tables[name].log_error),
            torch.from_numpy(sensitivity[name] * tables[name].alive),
            torch.from_numpy(groups.index[name]),
        )
        for name in names
    ]
    weights = _weights(model, placement, groups, tables, sensitivity)
    free = torch.from_numpy(groups.free)
    plain = torch.zeros(len(groups), dtype=torch.float64)
    before = _noise(activations, weights, plain, [_best_step(tensor, plain) for tensor in activations])
    log_factor = torch.from_numpy(_even(groups, names, tables, weights))
    log_steps = torch.stack([_best_step(tensor, log_factor) for tensor in activations])
    log_factor.requires_grad_(True)
    log_steps.requires_grad_(True)
    optimizer = torch.optim.Adam([log_factor, log_steps], lr=RATE)
    for i in range(ROUNDS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - i / ROUNDS)
        noise = _noise(activations, weights, log_factor, log_steps)
        optimizer.zero_grad()
        torch.log(noise + 1e-300).backward()  # type: ignore[no-untyped-call]
        assert log_factor.grad is not None
        log_factor.grad[~free] = 0
        optimizer.step()
    with torch.no_grad():
        after = _noise(activations, weights, log_factor, log_steps)
    if float(after) * (1 + DOUBT / images) > float(before):
        return np.ones(len(groups))
    return np.asarray(2.0 ** log_factor.detach().numpy())


def _noise(
    activations: Sequence[_Activation], weights: Sequence[_Weights], log_factor: Tensor, log_steps: Iterable[Tensor]
) -> Tensor:
    """Return the power of the logits' noise."""
    return sum((tensor.noise(log_factor, step) for tensor, step in zip(activations, log_steps, strict=True)),
               sum((layer.noise(log_factor) for layer in weights), torch.zeros(())))  # fmt: skip


def _weights(
    model: onnx.ModelProto,
    placement: Placement,
    groups: ChannelGroups,
    tables: Mapping[str, NoiseTable],
    sensitivity: Mapping[str, np.ndarray],
) -> list[_Weights]:
    graph = Graph(model)
    nodes = {node.name: node for node in graph.nodes}
    source = {reader: point.range_of for point in placement.points for reader in point.readers}
    found = []
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
        found.append(
            _Weights(
                torch.from_numpy(values.reshape(*values.shape[:2], -1).max(axis=2)),
                torch.from_numpy(spread.reshape(count, -1)),
                torch.from_numpy(sensitivity[node.output[0]]),
                torch.from_numpy(groups.index[node.input[0]].reshape(count, -1)),
                torch.from_numpy(groups.index[node.output[0]]),
                int(np.prod(values.shape[2:])),
            )
        )
    return found


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
        spread, index = layer.spread().numpy(), layer.outputs.numpy()
        made = silent[index] & (spread > 0)
        np.add.at(total, index[made], np.log2(spread[made] / QMAX))
        np.add.at(number, index[made], 1)
    return np.where(groups.free & (number > 0), -total / np.maximum(number, 1), 0.0)


def _best_step(tensor: _Activation, log_factor: Tensor) -> Tensor:
    """Return the log2 step with the least noise at fixed factors, by trying eight octaves below the largest."""
    top = (tensor.log_step + log_factor[tensor.groups])[tensor.sensitivity > 0]
    start = top.max() if len(top) else torch.zeros((), dtype=torch.float64)
    candidates = start + torch.arange(-8, 1.01, 0.125, dtype=torch.float64)
    return candidates[int(torch.stack([tensor.noise(log_factor, step) for step in candidates]).argmin())]
