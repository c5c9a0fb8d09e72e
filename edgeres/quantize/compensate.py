"""Weights and biases that make up for quantization, layer by layer, in closed form.

Each layer is fitted, in the order of the network, so that from the *quantized* input that it will really read it gives
the *float* network's output as nearly as int8 weights can: first by least squares (which also takes in what the layers
before it, and the skip of its block, did wrong), then by rounding one input at a time, the error of each rounding
passed on to the weights not yet rounded. The bias takes what is left of the mean.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2, for bias correction; Nagel et al., "Up or Down? Adaptive
Rounding for Post-Training Quantization", 2020 (arXiv:2004.10568), section 3.3, for rounding by the layer's output, here
solved as in Frantar et al., "GPTQ", 2023 (arXiv:2210.17323), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeres.affine import QMAX
from edgeres.quantize.follow import Follower, Quantizer, padded
from edgeres.quantize.graph import WEIGHTED, attribute
from edgeres.quantize.placement import Placement, Weight
from edgeres.quantize.saturation import REACH, partners, weight_scale

RIDGE = 1.0  # pulls the least squares to the original weights, in shares of each input's own variance: with less they
# learn the calibration images (CONTRIBUTING, decisions)
DAMPING = 3e-3  # of the mean variance, added to every input's, so that rounding never divides by nearly nothing
ENOUGH = 10  # positions per input of a layer; where there are fewer, ridge and damping grow by as much, for with few
# positions least squares learns the noise of these very images
MULTIPLICATIONS = 4e10  # per layer, for the products of its inputs; positions are thinned out beyond that
BLOCK = 128  # inputs rounded before the rest of the matrix is brought up to date


@dataclass(frozen=True)
class Compensation:
    """What was found: by the name of an initializer, its new values, float32; and the steps of those that are rounded.

    ``scales`` is float32 ``(K,)`` for each rounded weight.
    """

    constants: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


@dataclass
class _Chunk:
    """Some images on their way through the float network and the quantized one."""

    exact: dict[str, Tensor]
    coarse: dict[str, Tensor]
    quantized: dict[str, Tensor]


@dataclass
class _Moments:
    """Means of a layer's inputs and targets and of their products, by group, float64.

    The products are about the means where the layer has a bias to take the means' error, and else as they are.
    """

    inputs: Tensor  # (g, D)
    targets: Tensor  # (g, K / g)
    square: Tensor  # (g, D, D), or empty where nobody needs it
    cross: Tensor  # (g, D, K / g), likewise
    positions: int


def compensate(
    follower: Follower,
    placement: Placement,
    quantizer: Quantizer,
    images: Sequence[np.ndarray],
    rounding: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compensation:
    """Return weights on their int8 grids, and biases, that bring each layer's output back to the float network's.

    Args:
        follower: the float network, with a bias in every layer that is to be corrected.
        quantizer: what quantization makes of each activation.
        images: batches, float32 ``(n, 3, H, W)``, normalized.
        rounding: False leaves the weights' integers as plain rounding has them, and corrects biases only.
    """
    planned = {weight.readers[0][0]: weight for weight in placement.weights if len(weight.readers) == 1}
    found = Compensation({}, {})
    constants: dict[str, Tensor] = {}
    chunks = [_Chunk({follower.input: x}, {follower.input: x}, {}) for x in map(torch.from_numpy, images)]
    order = follower.schedule()
    layers = [node for node in order if _is_layer(follower, node)]
    left = {name: len(readers) for name, readers in follower.readers.items()}
    with torch.no_grad():
        for node in order:
            if _is_layer(follower, node):
                _fit(follower, node, planned.get(node.name), chunks, quantizer, constants, found, rounding)
                progress(layers.index(node) + 1, len(layers))
            for chunk in chunks:
                chunk.exact[node.output[0]] = follower.step(node, chunk.exact, {}, None)
                chunk.coarse[node.output[0]] = follower.step(node, chunk.coarse, chunk.quantized, quantizer, constants)
            for name in node.input:
                left[name] -= 1
                if not left[name]:
                    for chunk in chunks:
                        chunk.exact.pop(name, None)
                        chunk.coarse.pop(name, None)
                        chunk.quantized.pop(name, None)
    return found


def _is_layer(follower: Follower, node: onnx.NodeProto) -> bool:
    """Whether a node is a plain layer with constant weights and bias that nobody else reads."""
    if node.op_type not in WEIGHTED or node.input[0] in follower.constants:
        return False
    if any(name not in follower.constants or len(follower.readers[name]) > 1 for name in node.input[1:] if name):
        return False
    plain = not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0)
    return plain and follower.constants[node.input[1]].ndim == (4 if node.op_type == "Conv" else 2)


def _fit(
    follower: Follower,
    node: onnx.NodeProto,
    planned: Weight | None,
    chunks: list[_Chunk],
    quantizer: Quantizer,
    constants: dict[str, Tensor],
    found: Compensation,
    rounding: bool,
) -> None:
    """Find one layer's weights (``planned`` is what the plan says of them; None leaves them) and bias."""
    weights = follower.constants[node.input[1]].double()
    rows = weights.T if _columns_are_outputs(node) else weights
    groups = attribute(node, "group", 1)
    assert isinstance(groups, int)
    flat = rows.reshape(groups, rows.shape[0] // groups, -1)  # (g, K / g, D)
    moments = _moments(follower, node, chunks, quantizer, constants, rounding and planned is not None)
    fitted = flat
    if planned is not None:
        scale = weight_scale(rows.float().numpy(), 0, planned.paired)
        mates = torch.from_numpy(partners(rows.shape)) if planned.paired else None
        steps = torch.from_numpy(scale.astype(np.float64)).reshape(groups, -1)
        fitted = torch.stack([
            _rounded(flat[i], steps[i], moments, i, mates) if rounding else nearest(flat[i], steps[i], mates)
            for i in range(groups)
        ])  # fmt: skip
        found.scales[node.input[1]] = scale
        new = fitted.reshape(rows.shape)
        constants[node.input[1]] = (new if rows is weights else new.T).float().contiguous()
        found.constants[node.input[1]] = constants[node.input[1]].numpy()
    if _has_bias(node):
        bias = moments.targets - torch.einsum("gkd,gd->gk", fitted, moments.inputs)
        old = follower.constants[node.input[2]]  # that of a Gemm may be (1, K), or one number for all
        constants[node.input[2]] = bias.reshape(old.shape if old.numel() == bias.numel() else -1).float()
        found.constants[node.input[2]] = constants[node.input[2]].numpy()


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _columns_are_outputs(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))


def _rounded(weights: Tensor, steps: Tensor, moments: _Moments, group: int, mates: Tensor | None) -> Tensor:
    """Return a group's weights, float64 ``(K, D)``, fitted and then rounded to multiples of ``steps``, ``(K,)``.

    A row that this does not bring nearer to its target than plain rounding would is rounded plainly.
    """
    square, cross = moments.square[group], moments.cross[group]
    if not (torch.isfinite(square).all() and torch.isfinite(cross).all()):  # values near float32's largest
        return nearest(weights, steps, mates)
    scarcity = max(1.0, ENOUGH * weights.shape[1] / moments.positions)
    ridge = torch.diag(RIDGE * scarcity * torch.diagonal(square) + 1e-12)
    fitted = weights + torch.linalg.solve(square + ridge, cross - square @ weights.T).T
    turned = round_in_turn(fitted, steps, square, DAMPING * scarcity, mates)
    plain = nearest(weights, steps, mates)

    def distance(rows: Tensor) -> Tensor:  # from the target, squared, but for a constant
        return ((rows @ square - 2 * cross.T) * rows).sum(1)

    return torch.where((distance(turned) > distance(plain))[:, None], plain, turned)


def nearest(weights: Tensor, steps: Tensor, mates: Tensor | None = None) -> Tensor:
    """Return ``weights``, float64 ``(K, D)``, rounded to the nearest int8 multiples of ``steps``, float64 ``(K,)``;
    with ``mates``, each input's neighbour, no pair reaches too far."""
    integers = torch.clamp(torch.round(weights / steps[:, None]), -QMAX, QMAX)
    return (integers if mates is None else kept_in_reach(integers, mates)) * steps[:, None]


def kept_in_reach(integers: Tensor, mates: Tensor) -> Tensor:
    """Return integers ``(K, D)`` of which the larger of each pair is brought back where both reach too far."""
    other = integers[:, mates]
    excess = torch.clamp((integers + other).abs() - REACH, min=0) * (integers * other > 0) * (mates != _places(mates))
    larger = (integers.abs() > other.abs()) | ((integers.abs() == other.abs()) & (_places(mates) < mates))
    return integers - torch.sign(integers) * excess * larger


def _places(mates: Tensor) -> Tensor:
    return torch.arange(len(mates))


def round_in_turn(
    weights: Tensor, steps: Tensor, square: Tensor, damping: float = DAMPING, mates: Tensor | None = None
) -> Tensor:
    """Return ``weights`` rounded to int8 multiples of ``steps``, each input's error passed on to those after it.

    Passing errors on is greedy. A row that loses by it is rounded to the nearest instead, so that none does.

    Args:
        weights: float64 ``(K, D)``.
        steps: float64 ``(K,)``.
        square: float64 ``(D, D)``, the covariance of the inputs.
        damping: in shares of the mean variance, what is added to every input's.
        mates: int64 ``(D,)``, each input's neighbour, if no pair may reach too far.

    Source: Frantar et al. 2023 (arXiv:2210.17323), section 3, step 3 (Cholesky) and algorithm 1, with inputs taken in
    the order of falling variance.
    """
    size = weights.shape[1]
    variance = torch.diagonal(square).clone()
    order = torch.argsort(variance, descending=True)
    inverse = _inverse_factor(square[order][:, order], float(damping * variance.mean().clamp(min=0)) + 1e-12)
    rest, rounded = weights[:, order].clone(), torch.zeros_like(weights)
    place = torch.arange(size) if mates is None else torch.argsort(order)[mates[order]]  # of each one's neighbour
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        part, own = rest[:, start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            column = part[:, j]
            least, most = _room(rounded, place, start + j, steps)
            rounded[:, start + j] = torch.clamp(torch.round(column / steps), least, most) * steps
            errors[:, j] = (column - rounded[:, start + j]) / own[j, j]
            part[:, j:] -= errors[:, j : j + 1] * own[j, j:]
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    turned, plain = rounded[:, torch.argsort(order)], nearest(weights, steps, mates)
    worse, before = (((rows - weights) @ square * (rows - weights)).sum(1) for rows in (turned, plain))
    return torch.where((worse > before)[:, None], plain, turned)


def _room(rounded: Tensor, place: Tensor, column: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest integer of each row that a column may take beside its neighbour's, which is 0
    where it comes later."""
    mate = torch.round(rounded[:, place[column]] / steps)
    return torch.clamp(-REACH - mate.clamp(max=0), min=-QMAX), torch.clamp(REACH - mate.clamp(min=0), max=QMAX)


def _inverse_factor(square: Tensor, floor: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of ``square`` plus ``floor``, or more, on its diagonal.

    Inputs that hardly vary (a calibration set of one colour) have a covariance that is rounding noise.
    """
    identity = torch.eye(len(square), dtype=square.dtype)
    while True:
        factor, failed = torch.linalg.cholesky_ex(square + floor * identity)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        floor *= 10


def _moments(
    follower: Follower,
    node: onnx.NodeProto,
    chunks: list[_Chunk],
    quantizer: Quantizer,
    constants: Mapping[str, Tensor],
    products: bool,
) -> _Moments:
    """Return a layer's moments; without ``products``, which cost nearly all the time, the means alone."""
    groups = attribute(node, "group", 1)
    assert isinstance(groups, int)
    generator = torch.Generator().manual_seed(0)
    sums: list[Tensor] = []
    count, thin = 0, 0
    for chunk in chunks:
        read = follower.read(node, 0, chunk.coarse, chunk.quantized, quantizer, constants)
        target = follower.step(node, chunk.exact, {}, None)
        lost = _skip_error(follower, node, chunk, quantizer)
        if np.broadcast_shapes(target.shape, lost.shape) == target.shape:
            target = target + lost
        x, y = _rows(node, read, groups, follower), _targets(node, target, groups)
        if not thin and products:
            work = x.shape[0] * x.shape[1] * x.shape[2] * (x.shape[2] + y.shape[2]) * len(chunks)
            thin = max(1, int(np.ceil(work / MULTIPLICATIONS)))
        if thin > 1:
            chosen = torch.randperm(x.shape[1], generator=generator)[: max(1, x.shape[1] // thin)]
            x, y = x[:, chosen], y[:, chosen]
        if not sums:
            origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - origin[0], y - origin[1]  # float32 sums of squares would lose a small variance beside a large mean
        count += x.shape[1]
        parts = [x.sum(1), y.sum(1), *((x.transpose(1, 2) @ x, x.transpose(1, 2) @ y) if products else ())]
        sums = [a + b.double() for a, b in zip(sums, parts, strict=True)] if sums else [p.double() for p in parts]
    shifts = [total / count for total in sums[:2]]
    inputs, targets = (mean[:, 0] + shift for mean, shift in zip(origin, shifts, strict=True))
    if not products:
        return _Moments(inputs, targets, torch.empty(0), torch.empty(0), count)
    square = sums[2] / count - shifts[0][:, :, None] * shifts[0][:, None]
    cross = sums[3] / count - shifts[0][:, :, None] * shifts[1][:, None]
    if not _has_bias(node):
        square = square + inputs[:, :, None] * inputs[:, None]
        cross = cross + inputs[:, :, None] * targets[:, None]
    return _Moments(inputs, targets, square, cross, count)


def _skip_error(follower: Follower, node: onnx.NodeProto, chunk: _Chunk, quantizer: Quantizer) -> Tensor:
    """Return what the skip of a residual addition lost, where this layer is the addition's branch: it can make up for
    the part of it that its own input tells."""
    readers = follower.readers.get(node.output[0], [])
    if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] != follower.output:
        add = readers[0]
        index = 1 if add.input[0] == node.output[0] else 0
        skip = add.input[index]
        if skip in chunk.exact and skip in chunk.coarse and skip != node.output[0]:
            lost: Tensor = chunk.exact[skip] - follower.read(add, index, chunk.coarse, chunk.quantized, quantizer)
            return lost
    return torch.zeros(())


def _rows(node: onnx.NodeProto, x: Tensor, groups: int, follower: Follower) -> Tensor:
    """Return what each output position reads, float32 ``(g, positions, D)``."""
    if node.op_type != "Conv":
        return x.reshape(1, -1, x.shape[-1])
    kernel = follower.constants[node.input[1]].shape[2:]
    pads, strides, dilations = (attribute(node, name, default) for name, default in (
        ("pads", [0, 0, 0, 0]), ("strides", [1, 1]), ("dilations", [1, 1])))  # fmt: skip
    assert isinstance(pads, list)
    assert isinstance(strides, list)
    assert isinstance(dilations, list)
    columns = F.unfold(padded(x, pads), tuple(kernel), dilation=tuple(dilations), stride=tuple(strides))
    n, _, positions = columns.shape
    rows: Tensor = columns.reshape(n, groups, -1, positions).permute(1, 0, 3, 2).reshape(groups, n * positions, -1)
    return rows


def _targets(node: onnx.NodeProto, y: Tensor, groups: int) -> Tensor:
    """Return a layer's outputs in the order of :func:`_rows`, float32 ``(g, positions, K / g)``."""
    if node.op_type != "Conv":
        return y.reshape(1, -1, y.shape[-1])
    n, outputs = y.shape[:2]
    rows: Tensor = y.reshape(n, groups, outputs // groups, -1).permute(1, 0, 3, 2)
    return rows.reshape(groups, -1, outputs // groups)
