"""What each layer costs alone: one quantized and all others in float, and what a whole net costs without some.

The accuracy budget gives layers back to float, and this says which: the quantized net runs in torch, on calibration
images, with Q/DQ at any choice of layers. What a choice costs is the share of answers that its noise will change. That
is not counted (of a hundred images none may change) but expected from the noise and from how far the float network's
answers lie apart. Noise that all logits share changes no answer, and does not count.

Source: Wu et al., "Integer Quantization for Deep Learning Inference", 2020 (arXiv:2004.09602), on partial quantization:
one layer quantized at a time, and the most sensitive left in float.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from edgeres.artifacts import LayerCost, TensorRange
from edgeres.quantize.candidates import candidates
from edgeres.quantize.compensate import compensate
from edgeres.quantize.follow import Follower, Quantizer
from edgeres.quantize.placement import Placement, plan
from edgeres.quantize.recover import Recovery, follower_of, scaled
from edgeres.quantize.simulate import Twin, quantizer_of

EVERY = 1e10
"""Activations that may be computed for all layers alone, together: so many images are taken, and at least one batch."""

ERRORS = 20  # points of the integral over the error of the largest logit

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Noise:
    """What quantization does to the logits of some images.

    ``changed`` is the share of answers that changed; ``expected`` the share that noise of this power changes;
    ``sqnr_db`` is of the logits, without what all classes share.
    """

    changed: float
    expected: float
    sqnr_db: float | None


@dataclass(frozen=True)
class _Choice:
    """Which inputs are quantized, which constants stand in for the float ones, and the nodes that either is read by."""

    points: dict[tuple[str, int], str]
    constants: dict[str, Tensor]
    nodes: frozenset[str]


class _Alone(Follower):
    """The float network at every step, though its layers read quantized inputs: so each is fitted to its own alone."""

    def step(
        self,
        node: onnx.NodeProto,
        values: Mapping[str, Tensor],
        quantized: dict[str, Tensor],
        quantizer: Quantizer | None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        return super().step(node, values, {}, None)


class Solo:
    """A quantized net whose layers can be given back to float one by one, or be quantized one by one.

    ``placement`` and ``model`` are the plan and the scaled float graph that it goes into; ``constants`` are the values
    that every quantized layer's weights and bias have, by initializer.
    """

    def __init__(
        self,
        fp32: Path,
        modules: Mapping[str, str],
        keep_float: Sequence[str],
        ranges: Mapping[str, TensorRange],
        recovery: Recovery,
        watch: Watch = lambda done, total: None,
    ) -> None:
        """Fit every layer to its own quantized input, at the ranges chosen; images and scalings are ``recovery``'s."""
        self.modules, self.keep_float, self.left_float = modules, keep_float, dict(recovery.left_float)
        self.model, self.placement, ranges = scaled(fp32, modules, keep_float, ranges, recovery)
        self._follower = follower_of(self.model, self.placement)
        self._quantizer = quantizer_of(self.placement, ranges)
        self._images = [torch.from_numpy(batch) for batch in recovery.images]
        additions = {node.name for node in self._follower.nodes if node.op_type == "Add"}
        own = {reader: name for reader, name in self._follower.points.items() if reader[0] not in additions}
        alone = _Alone(self.model, own)  # no convolution is to make up for what a skip beside it lost
        found = compensate(alone, self.placement, self._quantizer, recovery.images, recovery.rounding, watch)
        final = Twin(self.model, self.placement, ranges, found.constants).final()
        self.constants = {name: values for own in final.values() for name, values in own.items()}
        self._logits = [self._run(x, None, {self._follower.input: x})[0] for x in self._images]

    def whole(self, given_back: Collection[str] = ()) -> Noise:
        """Return what the quantized net does with some more nodes given back to float, on all images."""
        choice = self._choice(self._without(given_back))
        return self._measured([choice], len(self._images), False)[0]

    def costs(self, watch: Watch = lambda done, total: None) -> tuple[tuple[LayerCost, ...], int]:
        """Return what each layer and each block costs where it alone is quantized, worst first; on how many images."""
        every = self._choice(self.placement)
        units, choices = candidates(self.model, self.modules, self.placement), []
        for candidate in units:
            rest = self._choice(self._without(candidate.nodes))
            points = {reader: name for reader, name in every.points.items() if reader not in rest.points}
            constants = {name: value for name, value in every.constants.items() if name not in rest.constants}
            choices.append(self._choice_of(points, constants))
        batches = self._batches(len(units))
        found = self._measured(choices, batches, True, watch)
        costs = [
            LayerCost(
                layer=candidate.name,
                nodes=candidate.nodes,
                weighted=candidate.weighted,
                expected=noise.expected,
                changed=noise.changed,
                sqnr_db=noise.sqnr_db,
            )
            for candidate, noise in zip(units, found, strict=True)
        ]
        images = sum(len(x) for x in self._images[:batches])
        return tuple(sorted(costs, key=_worst_first)), images

    def _without(self, nodes: Collection[str]) -> Placement:
        return plan(self.model, self.modules, self.keep_float, {**self.left_float, **dict.fromkeys(nodes, "")})

    def _choice(self, placement: Placement) -> _Choice:
        """Return the choice of a plan: its inputs, its weights, and the biases beside these."""
        weighted = {name for weight in placement.weights for name, _ in weight.readers}
        constants = {
            name: self.constants[name]
            for node in self._follower.nodes
            if node.name in weighted
            for name in node.input[1:]
            if name in self.constants
        }
        return self._choice_of({reader: p.tensor for p in placement.points for reader in p.readers}, constants)

    def _choice_of(self, points: dict[tuple[str, int], str], constants: dict[str, Tensor]) -> _Choice:
        readers = {node.name for node in self._follower.nodes if not constants.keys().isdisjoint(node.input)}
        return _Choice(points, constants, frozenset(readers | {name for name, _ in points}))

    def _batches(self, choices: int) -> int:
        """Return how many batches the layers alone are measured on."""
        _, values = self._run(self._images[0][:1], None, {self._follower.input: self._images[0][:1]})
        elements = sum(value.numel() for value in values.values())
        wanted = EVERY / max(1, elements * choices / 2)  # on the average, half of the network lies behind a layer
        return max(1, min(len(self._images), int(wanted / len(self._images[0]))))

    def _run(
        self, x: Tensor, choice: _Choice | None, known: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the logits of a choice of layers (None: in float), and all tensors.

        What is ``known`` of the float network is not computed again where the choice does not reach it.
        """
        follower = self._follower
        if choice is not None:
            follower = copy.copy(follower)
            follower.points = choice.points
        new: dict[str, Tensor] = {}
        values, quantized = ChainMap(new, dict(known)), dict[str, Tensor]()
        constants = None if choice is None else choice.constants
        with torch.no_grad():
            for node in follower.nodes:
                reached = not new.keys().isdisjoint(node.input) or (choice is not None and node.name in choice.nodes)
                if reached or node.output[0] not in known:
                    quantizer = None if choice is None else self._quantizer
                    new[node.output[0]] = follower.step(node, values, quantized, quantizer, constants)
        return values[follower.output], values

    def _measured(
        self,
        choices: Sequence[_Choice],
        batches: int,
        shared: bool,
        watch: Watch = lambda done, total: None,
    ) -> list[Noise]:
        """Return each choice's noise on the first ``batches``; what is ``shared`` is computed once, in float."""
        sums = np.zeros((len(choices), 2))
        done = 0
        for x, wanted in zip(self._images[:batches], self._logits, strict=False):
            values: Mapping[str, Tensor] = {self._follower.input: x}
            values = self._run(x, None, values)[1] if shared else values
            for i, choice in enumerate(choices):
                logits = self._run(x, choice, values)[0]
                changed = (logits.argmax(1) != wanted.argmax(1)).sum()
                sums[i] += [float(_own((logits - wanted).double()).square().sum()), float(changed)]
                done += 1
                watch(done, batches * len(choices))
        every = torch.cat(self._logits[:batches]).double()
        return [noise_of(every, *row) for row in sums.tolist()]


def noise_of(logits: Tensor, power: float, changed: float) -> Noise:
    """Return what noise of some power does to the answers, if it is normal, and alike and independent in all classes.

    Args:
        logits: float64 ``(N, K)``, without noise.
        power: the sum of the noise's squares, without what all classes share.
        changed: how many answers it changed.
    """
    count, classes = logits.shape
    if not power < sys.float_info.max:
        power = sys.float_info.max  # beyond what can be counted, or not a number
    spread = math.sqrt(power / (count * max(1, classes - 1)))
    expected = 0.0
    if spread > 0 and classes > 1:
        top = logits.argmax(1, keepdim=True)
        behind = (logits.gather(1, top) - logits).scatter(1, top, math.inf) / spread
        errors, weights = np.polynomial.hermite_e.hermegauss(ERRORS)  # of the answer's own logit
        for error, weight in zip(errors, weights / weights.sum(), strict=True):
            overtaken = -torch.expm1(torch.special.log_ndtr(behind + error).sum(1))
            expected += float(weight * overtaken.mean())
    signal = float(_own(logits).square().sum())
    sqnr = 10 * (math.log10(signal) - math.log10(power)) if power > 0 and 0 < signal < math.inf else None
    return Noise(changed / count, expected, sqnr)


def _worst_first(cost: LayerCost) -> tuple[float, float, int]:
    return -cost.expected, math.inf if cost.sqnr_db is None else cost.sqnr_db, cost.weighted


def _own(logits: Tensor) -> Tensor:
    """Return logits without what all classes of an image share."""
    return logits - logits.mean(1, keepdim=True)
