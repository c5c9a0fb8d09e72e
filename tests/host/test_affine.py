"""int8 as ONNX means it: onnxruntime's QuantizeLinear and DequantizeLinear are the oracle."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeres.affine import QMAX, QMIN, SHIFTED, channel_amax, dequantize, quantize, scale_from_amax, shift_from_scale
from edgeres.errors import CalibrationError

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
# Steps from the smallest normal float32 to one whose last grid point is still finite.
EXPONENTS = st.integers(-126, 119)
MANTISSAS = st.floats(1.0, 1.984375, width=32)


@st.composite
def steps(draw: st.DrawFn, count: int | None = None) -> np.ndarray:
    """A scale, or ``count`` of them."""
    one = st.builds(lambda mantissa, exponent: np.float32(mantissa * 2.0**exponent), MANTISSAS, EXPONENTS)
    return np.array(draw(one if count is None else st.lists(one, min_size=count, max_size=count)), np.float32)


@cache
def oracle(opset: int, axis: int | None) -> ort.InferenceSession:
    attributes = "" if axis is None else f"<axis = {axis}>"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        oracle (float x, float scale, int8 zero) => (int8 q, float y) {{
            q = QuantizeLinear {attributes} (x, scale, zero)
            y = DequantizeLinear {attributes} (q, scale, zero)
        }}""")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_as_onnx(x: np.ndarray, scale: np.ndarray, axis: int | None) -> None:
    q = quantize(x, scale, axis)
    y = dequantize(q, scale, axis)
    assert q.dtype == np.int8
    assert y.dtype == np.float32
    assert q.shape == y.shape == x.shape
    for opset in (13, 17):
        feeds = {"x": x, "scale": np.asarray(scale), "zero": np.zeros_like(scale, dtype=np.int8)}
        wanted_q, wanted_y = oracle(opset, axis).run(None, feeds)
        np.testing.assert_array_equal(q, wanted_q)
        np.testing.assert_array_equal(y, wanted_y)


@given(st.data())
def test_per_tensor_is_what_onnx_computes(data: st.DataObject) -> None:
    scale = data.draw(steps())
    shape = data.draw(arrays.array_shapes(max_dims=4, max_side=5))
    grid = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-200, 200, width=32)))
    assert_as_onnx(grid * scale, scale, None)


@given(st.data(), st.sampled_from([0, 1]))
def test_per_channel_is_what_onnx_computes(data: st.DataObject, axis: int) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=4, max_side=5))
    scale = data.draw(steps(shape[axis]))
    grid = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-200, 200, width=32)))
    spread = scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    assert_as_onnx(grid * spread, scale, axis)


@given(arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-LARGEST, LARGEST, width=32)), steps())
def test_numbers_far_off_the_grid_saturate_as_in_onnx(x: np.ndarray, scale: np.ndarray) -> None:
    assert_as_onnx(x, scale, None)


@pytest.mark.parametrize("exponent", [-120, -7, 0, 5, 100])
def test_ties_go_to_the_even_neighbour(exponent: int) -> None:
    scale = np.float32(2.0**exponent)
    halves = np.arange(QMIN - 5, QMAX + 5, dtype=np.float32) + np.float32(0.5)
    wanted = [min(max(round(float(half)), QMIN), QMAX) for half in halves]  # Python's round is half to even, too
    assert quantize(halves * scale, scale).tolist() == wanted
    assert_as_onnx(halves * scale, scale, None)


def test_saturation_keeps_the_whole_int8_range() -> None:
    x = np.array([-1e30, -129, -128, -127.4, 126.6, 127, 128, 1e30, -0.0], np.float32)
    assert quantize(x, np.float32(1)).tolist() == [-128, -128, -128, -127, 127, 127, 127, 127, 0]


def test_every_integer_survives_a_round_trip() -> None:
    q = np.arange(QMIN, QMAX + 1, dtype=np.int8)
    for amax in (1e-30, 0.3, 1.0, 127.0, 6.02e23):
        scale = scale_from_amax(np.float64(amax))
        np.testing.assert_array_equal(quantize(dequantize(q, scale), scale), q)


@given(
    st.floats(128 * TINY, LARGEST / 2, width=32),  # at the very end 127 rounded-up steps are infinite
    arrays.arrays(np.float32, 20, elements=st.floats(-1, 1, width=32)),
)
def test_inside_the_range_nothing_moves_by_more_than_half_a_step(amax: float, shares: np.ndarray) -> None:
    x = (shares * np.float64(amax)).astype(np.float32)
    scale = scale_from_amax(np.float64(amax))
    error = np.abs(dequantize(quantize(x, scale), scale).astype(np.float64) - x)
    assert error.max() <= float(scale) * (0.5 + 127 * 2.0**-23)  # the division rounds in float32


@given(st.floats(0, LARGEST), st.floats(0, LARGEST))
def test_a_larger_range_never_has_a_smaller_step(one: float, other: float) -> None:
    low, high = sorted([one, other])
    scales = scale_from_amax(np.array([low, high]))
    assert scales.dtype == np.float32
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    if low >= 128 * TINY:
        assert scales[0] <= scales[1]
        np.testing.assert_allclose(scales.astype(np.float64) * 127, [low, high], rtol=1e-6)


@pytest.mark.parametrize("amax", [0.0, -0.0, 1e-45, 1e-40, 127 * TINY * 0.99])
def test_what_never_fired_quantizes_to_zeros(amax: float) -> None:
    scale = scale_from_amax(np.float64(amax))
    assert scale == 1.0
    assert quantize(np.array([amax, -amax], np.float32), scale).tolist() == [0, 0]


def test_scales_keep_their_shape() -> None:
    assert np.shape(scale_from_amax(np.float32(127))) == ()
    scales = scale_from_amax(np.array([127.0, 0.0, 254.0], np.float32))
    assert scales.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("bad", [-1.0, -1e-30, float("nan"), float("inf"), float("-inf"), 1e300, 5e40])
def test_a_range_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="range"):
        scale_from_amax(np.float64(bad))
    with pytest.raises(CalibrationError, match="range") as caught:
        scale_from_amax(np.array([1.0, bad, 2.0]))
    assert f"{np.float64(bad)}" in str(caught.value)  # the culprit is named, not its neighbours
    assert "2.0" not in str(caught.value)


@given(
    arrays.arrays(
        np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=st.floats(-9, 9, width=32)
    )
)
def test_channel_ranges_are_those_of_each_channel_alone(weights: np.ndarray) -> None:
    for axis in (0, 1):
        wanted = [np.abs(np.take(weights, i, axis)).max() for i in range(weights.shape[axis])]
        np.testing.assert_array_equal(channel_amax(weights, axis), np.array(wanted, np.float32))


def test_a_channel_without_weights_has_range_zero() -> None:
    assert channel_amax(np.empty((3, 0), np.float32), 0).tolist() == [0.0, 0.0, 0.0]


def unsigned() -> ort.InferenceSession:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        oracle (float[N] x, float scale, uint8 zero) => (uint8[N] q, float[N] y) {
            q = QuantizeLinear (x, scale, zero)
            y = DequantizeLinear (q, scale, zero)
        }""")
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("amax", [255.0, 1.0, 0.037, 6.0, 1e-30, 1e30])
def test_what_is_shifted_is_uint8_with_zero_point_0(amax: float) -> None:
    scale = scale_from_amax(np.float64(amax), SHIFTED)
    assert scale == np.float32(amax / 255)
    shift = np.float32(shift_from_scale(scale))
    assert float(shift) == float(shift_from_scale(scale)) == 128 * float(scale)  # no digit is lost
    # every step, its borders' neighbours on both sides, below zero and beyond the last step
    steps = np.concatenate([np.arange(-3, 260) + near for near in (0, -0.4999, 0.4999, 0.25)])
    x = (steps * np.float64(scale)).astype(np.float32)
    wanted_q, wanted = unsigned().run(None, {"x": x, "scale": np.asarray(scale), "zero": np.zeros((), np.uint8)})
    q = quantize(x - shift, scale)
    np.testing.assert_array_equal(q.astype(np.int16) + 128, wanted_q)
    np.testing.assert_allclose(dequantize(q, scale) + shift, wanted, rtol=0, atol=1e-5 * float(scale) * 128)
