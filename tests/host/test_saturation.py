"""Weights that no 8-bit multiply–add can saturate: the rule, what the kernels make of it, and who keeps it."""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeres.affine import quantize
from edgeres.backends.cpu import VNNI, cpu_flags
from edgeres.quantize.compensate import nearest, round_in_turn
from edgeres.quantize.reconstruct import in_reach
from edgeres.quantize.saturation import cannot_saturate, in_reading_order, pair_reach, partners, weight_scale

SATURATES = platform.machine() in ("x86_64", "AMD64") and "avx2" in cpu_flags() and not VNNI & cpu_flags()


def answer(op_type: str, inputs: list[np.ndarray | None], **attributes: object) -> np.ndarray:
    """Return what one of onnxruntime's own operators makes of its inputs; the first one is not constant."""
    names = ["" if values is None else f"i{index}" for index, values in enumerate(inputs)]
    node = helper.make_node(op_type, names, ["y"], domain="com.microsoft", **attributes)
    first, *rest = inputs
    assert first is not None
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("i0", TensorProto.UINT8, first.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(values, f"i{i + 1}") for i, values in enumerate(rest) if values is not None],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"i0": first})[0])


def multiplied(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the product of bytes ``(N, D)`` and int8 ``(K, D)`` by onnxruntime's kernel, float32 ``(N, K)``."""
    return answer("MatMulIntegerToFloat", [x, w.T.copy(), np.float32(1), np.ones(len(w), np.float32)])


def convolved(x: np.ndarray, w: np.ndarray, groups: int, unit: int) -> np.ndarray:
    """Return the convolution of bytes ``(N, H, W, C)`` and int8 ``(K, C / groups, kh, kw)``, divided and rounded."""
    steps = np.full(len(w), 1 / unit, np.float32)
    zeros, biases = np.zeros(len(w), np.int8), np.zeros(len(w), np.int32)
    one, zero = np.float32(1), np.uint8(128)
    return answer(
        "QLinearConv",
        [x, one, np.uint8(0), w, steps, zeros, one, zero, biases],
        channels_last=1, group=groups, kernel_shape=w.shape[2:],
    )  # fmt: skip


def random_pairs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return int8 weights ``(K, C, kh, kw)`` or ``(K, D)`` whose pairs reach just as far as they may."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    first = rng.integers(1, 128, (shape[0], (size + 1) // 2))
    read = np.stack([first, 128 - first], -1).reshape(shape[0], -1)[:, :size]
    read = np.where(np.arange(size) == size - 1, 127, read) if size % 2 else read
    read = read * rng.choice([-1, 1], (shape[0], (size + 1) // 2)).repeat(2, axis=1)[:, :size]
    if len(shape) == 2:
        return read.astype(np.int8)
    return np.ascontiguousarray(read.reshape(shape[0], *shape[2:], shape[1]).transpose(0, 3, 1, 2)).astype(np.int8)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 515])
def test_products_of_what_cannot_saturate_are_exact(rows: int, size: int) -> None:
    w = random_pairs((24, size), size)
    x = np.full((rows, size), 255, np.uint8)
    assert cannot_saturate(w)
    np.testing.assert_array_equal(multiplied(x, w), x.astype(np.int64) @ w.T.astype(np.int64))


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "groups"),
    [(16, 16, 3, 1), (3, 8, 3, 1), (5, 24, 3, 1), (64, 64, 1, 1), (32, 8, 3, 2), (32, 32, 3, 32), (7, 7, 5, 7)],
)  # fmt: skip
def test_convolutions_of_what_cannot_saturate_are_exact(channels: int, outputs: int, kernel: int, groups: int) -> None:
    w = random_pairs((outputs, channels // groups, kernel, kernel), channels)
    assert cannot_saturate(w)
    x = np.full((1, kernel + 1, kernel + 1, channels), 255, np.uint8)
    sums = 255 * w.reshape(outputs, -1).sum(1, dtype=np.int64)
    unit = 2 ** int(np.ceil(np.log2(np.abs(sums).max() / 100 + 1)))
    wanted = np.broadcast_to(np.rint(sums / unit) + 128, (1, 2, 2, outputs))
    np.testing.assert_array_equal(convolved(x, w, groups, unit), wanted)


@pytest.mark.skipif(not SATURATES, reason="this processor's multiply–add does not saturate")
def test_just_the_pairs_of_the_rule_saturate_here() -> None:
    x, size = np.full((1, 9), 255, np.uint8), 9
    chosen = [(i, j) for i in range(size) for j in range(i + 1, size)]
    w = np.zeros((len(chosen), size), np.int8)
    for row, pair in enumerate(chosen):
        w[row, list(pair)] = 127
    wrong = {pair for pair, got in zip(chosen, multiplied(x, w)[0], strict=True) if got != 2 * 255 * 127}
    assert wrong == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert wrong == {pair for row, pair in enumerate(chosen) if not cannot_saturate(w[row : row + 1])}


def test_the_rule_counts_what_two_neighbours_of_one_sign_reach() -> None:
    rows = np.array([[100, 28, 0, 0, 5], [100, 29, 0, 0, 5], [127, -127, 0, 127, 127], [-100, -50, 1, 1, 0]])
    np.testing.assert_array_equal(pair_reach(rows), [128, 129, 127, 150])
    assert [cannot_saturate(row[np.newaxis]) for row in rows] == [True, False, True, False]
    assert cannot_saturate(rows, top=127)  # a symmetric grid of what is never negative


def test_a_neighbour_is_found_in_the_order_of_reading() -> None:
    w = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    found, flat = partners(w.shape), w[0].reshape(-1)
    read = in_reading_order(w)[0]
    for place, mate in enumerate(found):
        assert np.flatnonzero(read == flat[place])[0] // 2 == np.flatnonzero(read == flat[mate])[0] // 2
        assert place != mate
    assert list(partners((1, 3))) == [1, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_rounding_with_paired_steps_keeps_the_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((16, 6, 3, 3)) ** 3 * 10.0 ** rng.uniform(-20, 3, (16, 1, 1, 1))).astype(np.float32)
    scale = weight_scale(weights, 0, paired=True)
    assert cannot_saturate(quantize(weights, scale, 0))
    plain = weight_scale(weights, 0, paired=False)
    assert (scale >= plain).all()
    assert (scale <= 2 * plain).all()  # a whole bit at most
    columns = np.ascontiguousarray(weights.reshape(16, -1).T)  # a Gemm that does not transpose
    assert cannot_saturate(quantize(columns, weight_scale(columns, 1, paired=True), 1).T)


def test_halves_that_would_both_round_up_keep_the_rule() -> None:
    halves = np.array([[64.5, 63.5, 0, 0], [65.5, 62.5, 1, 1], [127.5, 0.5, 0, 0]], np.float32)
    assert cannot_saturate(quantize(halves, weight_scale(halves, 0, paired=True), 0))


def test_a_channel_of_zeros_has_a_step() -> None:
    assert (weight_scale(np.zeros((2, 4), np.float32), 0, paired=True) == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_compensated_rounding_keeps_the_rule(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(12, 27, generator=generator, dtype=torch.float64)
    inputs = torch.randn(27, 27, generator=generator, dtype=torch.float64)
    steps = weights.abs().amax(1) / 127  # too small for pairs
    mates = torch.from_numpy(partners((12, 3, 3, 3)))
    for rounded in (nearest(weights, steps, mates), round_in_turn(weights, steps, inputs @ inputs.T, mates=mates)):
        integers = torch.round(rounded / steps[:, None]).numpy().astype(np.int64).reshape(12, 3, 3, 3)
        assert cannot_saturate(integers)
        assert np.abs(integers).max() > 100
    free = torch.round(nearest(weights, steps) / steps[:, None]).numpy().reshape(12, 3, 3, 3)
    assert not cannot_saturate(free)
    kept = in_reach(torch.from_numpy(free), 0).numpy()
    assert cannot_saturate(kept)
    assert (np.abs(kept) <= np.abs(free)).all()


def test_rounding_without_neighbours_is_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    steps = weights.abs().amax(1) / 127
    alone = torch.arange(9)
    square = torch.eye(9, dtype=torch.float64)
    assert torch.equal(nearest(weights, steps), nearest(weights, steps, alone))
    assert torch.equal(round_in_turn(weights, steps, square), round_in_turn(weights, steps, square, mates=alone))
