"""Where a quantized network's error comes from: every layer compared with its float twin, the worst first.

One pass over a few images computes, layer by layer and side by side, the float network, what each layer would answer if
it alone were quantized, and the network that is quantized throughout. How much of a layer's own error reaches the
answer is its projection on the answer's gradient: exact to first order, whatever the errors' correlations within the
layer. Only sums are kept.

Source: the answer's noise to first order as in :mod:`edgeres.quantize.sensitivity`; the projection is the derivative of
the answer by a factor in front of the error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from edgeres.affine import QMAX, QMIN
from edgeres.artifacts import LayerError, QuantizationErrors
from edgeres.quantize.offset import shapes_of
from edgeres.quantize.placement import MOVES
from edgeres.quantize.sensitivity import DRAWS
from edgeres.quantize.simulate import Grid, Twin, grids_of

IMAGES = (8, 64)  # at least, and at most
ELEMENTS = 1.5e8  # activations of all these images; fewer images where that is more than the most
HELD = 6e7  # activations that a batch may have: all stay in memory until the answer's gradient is known


def images_for(fp32: Path) -> tuple[int, int]:
    """Return how many images tell where a model's error comes from, and how many of them to take at a time."""
    shapes = shapes_of(onnx.load(fp32))
    elements = sum(float(np.prod([size or 1 for size in shape])) for shape in shapes.values() if len(shape) > 1)
    least, most = IMAGES
    return max(least, min(most, int(ELEMENTS / max(elements, 1)))), max(1, min(most, int(HELD / max(elements, 1))))


@dataclass
class _Sums:
    """Of one layer: powers of its output, of its own error and of the accumulated one, and of what its own error does
    to the answer."""

    node: onnx.NodeProto
    tensor: str
    weight: str = ""
    signal: float = 0.0
    own: float = 0.0
    accumulated: float = 0.0
    caused: float = 0.0


@dataclass
class _Rounding:
    """Of one quantized tensor: powers of its exact values and of the error of rounding them; how many elements its grid
    does not reach where the whole network is quantized."""

    grid: Grid
    signal: float = 0.0
    noise: float = 0.0
    elements: int = 0
    beyond: int = 0

    def exact(self, x: Tensor) -> Tensor:
        """Return the float network's values, rounded."""
        y = self.grid.values(self.grid.steps(x))
        self.signal += _power(x)
        self.noise += _power(y - x)
        return y

    def running(self, x: Tensor) -> Tensor:
        """Return the quantized network's values, rounded."""
        steps = self.grid.steps(x)
        self.elements += steps.numel()
        self.beyond += int(((steps < QMIN) | (steps > QMAX)).sum())
        return self.grid.values(steps)


def attribute_errors(
    twin: Twin,
    modules: Mapping[str, str],
    batches: Iterable[np.ndarray],
    seconds: float = math.inf,
    watch: Callable[[int], None] = lambda done: None,
) -> QuantizationErrors:
    """Return what each quantized layer's error is, and what share of the answer's noise it causes.

    Args:
        modules: node name → torch module.
        batches: float32 ``(n, 3, H, W)`` each, normalized; one is held at a time.
        seconds: no further batch is begun after so much time.
        watch: is told how many images are done.

    Raises:
        QuantizationError: the network has an operator that cannot be followed.
    """
    start, account = time.monotonic(), _Account(twin)
    for batch in batches:
        account.add(torch.from_numpy(np.asarray(batch, np.float32)))
        watch(account.samples)
        if time.monotonic() - start > seconds:
            break
    return account.result(modules)


class _Account:
    """The sums over all images so far."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.follower = twin.follower()
        self.final = twin.final()
        self.roundings = {name: _Rounding(grid) for name, grid in grids_of(twin.placement, twin.ranges).items()}
        self.layers = self._layers()
        self.last = {name: i for i, node in enumerate(self.follower.nodes) for name in node.input}
        self.generator = torch.Generator().manual_seed(0)
        self.samples = 0
        self.signal = self.noise = self.first_order = 0.0

    def _layers(self) -> dict[str, _Sums]:
        """Return an entry for each node that computes with something quantized; what only moves values adds nothing."""
        weights = {reader[0]: weight.tensor for weight in self.twin.placement.weights for reader in weight.readers}
        found: dict[str, _Sums] = {}
        for node in self.follower.nodes:
            read = [
                self.follower.points[key]
                for i in range(len(node.input))
                if (key := (node.name, i)) in self.follower.points
            ]
            if read and node.op_type not in MOVES:
                found[node.name] = _Sums(node, read[0], weights.get(node.name, ""))
        return found

    def add(self, x: Tensor) -> None:
        """Take in one batch."""
        source = self.follower.input
        exact, coarse = {source: x}, {source: x}
        alone: dict[str, Tensor] = {}
        running: dict[str, Tensor] = {}
        nudges: list[Tensor] = []
        for i, node in enumerate(self.follower.nodes):
            output, final, layer = node.output[0], self.final[node.name], self.layers.get(node.name)
            exact[output] = self.follower.step(node, exact, {}, None)
            with torch.no_grad():
                coarse[output] = self.follower.step(
                    node, coarse, running, lambda name, y: self.roundings[name].running(y), final
                )
                error = None
                if layer is not None:
                    own = self.follower.step(node, exact, alone, lambda name, y: self.roundings[name].exact(y), final)
                    error = own - exact[output]
                    layer.signal += _power(exact[output])
                    layer.own += _power(error)
                    layer.accumulated += _power(coarse[output] - exact[output])
            if error is not None:
                nudges.append(torch.zeros(len(x), *[1] * (error.ndim - 1), requires_grad=True))
                exact[output] = exact[output] + nudges[-1] * error
            for name in node.input:
                if self.last[name] == i and name != self.follower.output:
                    for values in (exact, coarse, alone, running):
                        values.pop(name, None)
        self._compare(exact[self.follower.output], coarse[self.follower.output], nudges)
        self.samples += len(x)

    def _compare(self, logits: Tensor, quantized: Tensor, nudges: list[Tensor]) -> None:
        """Take in the answers, and how each layer's own error moves them: by factors of 0 in front of the errors."""
        with torch.no_grad():
            self.signal += _power(logits)
            self.noise += _power(quantized - logits)
        for draw in range(DRAWS if nudges else 0):
            signs = torch.randint(0, 2, logits.shape, generator=self.generator).to(logits.dtype) * 2 - 1
            slopes = torch.autograd.grad(
                (logits * signs).sum(), nudges, retain_graph=draw + 1 < DRAWS, allow_unused=True
            )
            moved = torch.stack([torch.zeros(len(logits)) if slope is None else slope.flatten() for slope in slopes])
            self.first_order += _power(moved.sum(0)) / DRAWS
            for layer, row in zip(self.layers.values(), moved, strict=True):
                layer.caused += _power(row) / DRAWS

    def result(self, modules: Mapping[str, str]) -> QuantizationErrors:
        """Return the sums as ratios and shares, the layer that causes most first."""
        total = sum(layer.caused for layer in self.layers.values())
        ranked = sorted(self.layers.values(), key=lambda layer: -layer.caused)
        return QuantizationErrors(
            samples=self.samples,
            logits_sqnr_db=_decibels(self.signal, self.noise),
            first_order_sqnr_db=_decibels(self.signal, self.first_order),
            layers=tuple(self._layer(layer, total, modules) for layer in ranked),
        )

    def _layer(self, layer: _Sums, total: float, modules: Mapping[str, str]) -> LayerError:
        rounding = self.roundings[layer.tensor]
        points = {point.tensor: point.range_of for point in self.twin.placement.points}
        chosen = self.twin.ranges[points[layer.tensor]]
        weight_sqnr = None
        if layer.weight:
            values = self.follower.constants[layer.weight]
            weight_sqnr = _decibels(_power(values), _power(self.final[layer.node.name][layer.weight] - values))
        return LayerError(
            node=layer.node.name,
            op=layer.node.op_type,
            module=modules.get(layer.node.name, ""),
            tensor=layer.tensor,
            share=layer.caused / total if total else 0.0,
            own_sqnr_db=_decibels(layer.signal, layer.own),
            accumulated_sqnr_db=_decibels(layer.signal, layer.accumulated),
            input_sqnr_db=_decibels(rounding.signal, rounding.noise),
            weight_sqnr_db=weight_sqnr,
            amax=chosen.amax,
            scale=chosen.scale,
            lowest=float(rounding.grid.values(torch.tensor(float(QMIN))).min()),
            highest=float(rounding.grid.values(torch.tensor(float(QMAX))).max()),
            minimum=chosen.minimum,
            maximum=chosen.maximum,
            clipped=chosen.clipped,
            saturated=rounding.beyond / rounding.elements if rounding.elements else 0.0,
        )


def _power(x: Tensor) -> float:
    """Return the sum of squares; in float64, where those of float32's largest values still fit."""
    return float(x.detach().double().square().sum())


def _decibels(signal: float, noise: float) -> float | None:
    """Return the ratio in decibels; None where there is no noise, or no signal."""
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise > 0.0 else None
