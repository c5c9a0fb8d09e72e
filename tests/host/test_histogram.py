"""Streaming statistics: nothing depends on order or batches, and a file holds exactly what was counted."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeres.calibrate import Statistics, TensorStatistics, counting
from edgeres.errors import CalibrationError

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
SAMPLES = arrays.arrays(np.float32, SHAPES, elements=FINITE)
NAMES = ("input", "relu", "never seen")


def counted(batches: Sequence[np.ndarray]) -> Statistics:
    statistics = Statistics.empty(NAMES)
    for batch in batches:
        statistics.update({"input": batch, "relu": np.maximum(batch, 0), "never seen": batch[:, :0]}, len(batch))
    return statistics


@given(SAMPLES, st.randoms(use_true_random=False))
def test_order_and_batch_size_change_nothing(x: np.ndarray, source: random.Random) -> None:
    order = list(range(len(x)))
    source.shuffle(order)
    cut = source.randrange(len(x) + 1)
    whole = counted([x]).to_bytes()
    assert counted([x[i : i + 1] for i in range(len(x))]).to_bytes() == whole
    assert counted([x[order][:cut], x[order][cut:]]).to_bytes() == whole


@given(SAMPLES, st.data())
def test_merged_parts_are_exactly_the_whole(x: np.ndarray, data: st.DataObject) -> None:
    y = data.draw(arrays.arrays(np.float32, (data.draw(st.integers(1, 4)), *x.shape[1:]), elements=FINITE))
    merged = Statistics.empty(NAMES)
    for part in (x, y):
        merged.merge(counted([part]))
    assert merged.to_bytes() == counted([x, y]).to_bytes()
    assert merged.samples == len(x) + len(y)


@given(SAMPLES)
def test_each_channel_is_counted_by_its_upper_twelve_bits(x: np.ndarray) -> None:
    statistics = counted([x[:1], x[1:]]).tensors["input"]
    wanted = np.zeros((x.shape[1], 4096), np.int64)
    for channel in range(x.shape[1]):
        for value in x[:, channel].reshape(-1):
            wanted[channel, int.from_bytes(struct.pack(">f", value)[:2], "big") >> 4] += 1
    np.testing.assert_array_equal(statistics.channels, wanted)
    np.testing.assert_array_equal(statistics.channel_bins, np.flatnonzero(wanted.any(axis=0)))
    np.testing.assert_array_equal(statistics.channel_counts, wanted[:, statistics.channel_bins])
    others = (0, *range(2, x.ndim))
    np.testing.assert_array_equal(statistics.channel_minimum, x.min(axis=others))
    np.testing.assert_array_equal(statistics.channel_maximum, x.max(axis=others))
    np.testing.assert_array_equal(statistics.channel_amax, np.abs(x).max(axis=others))


def test_channels_that_come_and_go_are_refused_in_words() -> None:
    one, other = TensorStatistics(), TensorStatistics()
    one.update(np.ones((2, 3, 4), np.float32))
    other.update(np.ones((2, 5, 4), np.float32))
    with pytest.raises(CalibrationError, match="3 channels, and now has 5"):
        one.update(np.ones((2, 5, 4), np.float32))
    with pytest.raises(CalibrationError, match="3 channels, and now has 5"):
        one.merge(other)


def test_statistics_of_other_tensors_are_not_merged() -> None:
    with pytest.raises(CalibrationError, match="different"):
        Statistics.empty(["a"]).merge(Statistics.empty(["a", "b"]))


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=FINITE))
def test_extremes_are_exact_and_counts_are_complete(x: np.ndarray) -> None:
    statistics = TensorStatistics()
    statistics.update(x)
    assert statistics.minimum == x.min()
    assert statistics.maximum == x.max()
    assert statistics.amax == np.abs(x).max()
    assert statistics.elements == x.size
    assert statistics.not_finite == 0
    assert statistics.zeros == int((np.abs(x) < 2.0**-133).sum())


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=FINITE))
def test_each_bin_counts_the_numbers_that_share_its_upper_half(x: np.ndarray) -> None:
    statistics = TensorStatistics()
    statistics.update(x)
    wanted = np.zeros(1 << 16, np.int64)
    for value in x:
        wanted[int.from_bytes(struct.pack(">f", value)[:2], "big")] += 1
    np.testing.assert_array_equal(statistics.counts, wanted)


def test_layout_in_memory_does_not_matter() -> None:
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    one, other = TensorStatistics(), TensorStatistics()
    one.update(x)
    other.update(x.transpose(2, 0, 1)[::-1])
    np.testing.assert_array_equal(one.counts, other.counts)


def test_both_zeros_and_the_smallest_denormals_are_zeros() -> None:
    statistics = TensorStatistics()
    statistics.update(np.array([0.0, -0.0, 1e-45, -1e-45, 2.0**-133, -(2.0**-133), 1e-38, 1.0], np.float32))
    assert statistics.zeros == 4
    assert statistics.elements == 8
    assert statistics.amax == 1.0


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_noticed(bad: float) -> None:
    statistics = TensorStatistics()
    statistics.update(np.array([1.0, bad, -2.0, np.finfo(np.float32).max], np.float32))
    assert statistics.not_finite == 1
    assert not np.isnan([statistics.minimum, statistics.maximum]).any()


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.floats(width=32)),
    st.integers(0, 6),
)
def test_extremes_pass_over_nan_in_whatever_order_it_comes(x: np.ndarray, cut: int) -> None:
    parts, wanted = TensorStatistics(), np.fmin.reduce(x, axis=0)
    for part in (x[:cut], x[cut:]):
        parts.update(part)
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(parts.channel_minimum[known], wanted[known])
    np.testing.assert_array_equal(parts.channel_maximum[known], np.fmax.reduce(x, axis=0)[known])
    assert not np.isnan(parts.extremes).any()


def test_the_sign_of_zero_does_not_depend_on_the_order() -> None:
    for values in ([0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]):
        statistics = TensorStatistics()
        for value in values:
            statistics.update(np.array([[value]], np.float32))
        assert not np.signbit(statistics.extremes).any()


def test_bins_that_appear_later_are_counted_in_every_channel() -> None:
    statistics = TensorStatistics()
    batches = [np.array([[1.0, 2.0]]), np.array([[1e-30, 1.0]]), np.array([[-3e38, 1e-44]]), np.array([[5.0, -1e9]])]
    for batch in batches:
        statistics.update(batch.astype(np.float32))
    together = TensorStatistics()
    together.update(np.concatenate(batches).astype(np.float32))
    np.testing.assert_array_equal(statistics.channels, together.channels)
    assert statistics.channels.sum(axis=1).tolist() == [4, 4]


def test_the_loop_is_compiled_also_where_nothing_can_be_kept() -> None:
    source = Path(counting.__file__).read_text(encoding="utf-8")
    space: dict[str, Any] = {"__name__": "counting"}
    exec(compile(source, "<no file>", "exec"), space)  # a source without a file has no place to keep compiled code
    x = np.random.default_rng(2).standard_normal((2, 3, 4)).astype(np.float32).view(np.uint32)
    results = []
    for count in (counting.count, space["count"]):
        parts = (np.zeros(1 << 16, np.int64), np.zeros(1 << 12, np.uint16), np.zeros((3, 1), np.int64))
        extremes = np.zeros((3, 2), np.int32)
        count(x, *parts, extremes)
        results.append((*parts, extremes))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_counted_is_no_range() -> None:
    statistics = TensorStatistics()
    statistics.update(np.empty((0, 3), np.float32))
    assert (statistics.elements, statistics.amax, statistics.zeros) == (0, 0.0, 0)


@given(SAMPLES)
def test_a_file_gives_back_exactly_what_was_counted(x: np.ndarray) -> None:
    statistics = counted([x])
    content = statistics.to_bytes()
    read = Statistics.from_bytes(content, "file")
    assert read.to_bytes() == content
    assert read.samples == statistics.samples
    assert list(read.tensors) == sorted(NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(read.tensors[name].counts, statistics.tensors[name].counts)
        np.testing.assert_array_equal(read.tensors[name].channels, statistics.tensors[name].channels)
        np.testing.assert_array_equal(read.tensors[name].channel_minimum, statistics.tensors[name].channel_minimum)
        np.testing.assert_array_equal(read.tensors[name].channel_maximum, statistics.tensors[name].channel_maximum)


def test_no_tensors_at_all_survive_a_file() -> None:
    assert Statistics.from_bytes(Statistics.empty([]).to_bytes(), "file").tensors == {}


def test_damaged_files_are_refused_in_words() -> None:
    content = counted([np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)]).to_bytes()
    damaged = [content[:length] for length in range(0, len(content), 23)]
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        damaged.append(bytes(flipped))
    refused = 0  # any other exception fails the test
    for bad in damaged:
        try:
            read = Statistics.from_bytes(bad, "statistics.npz")
        except CalibrationError:
            refused += 1
        else:
            assert read.to_bytes() == content  # a byte of the archive that nothing depends on
    assert refused > len(damaged) * 0.7


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x05\x06" + b"\0" * 18, npy()], ids=["empty", "text", "zip", "npy"]
)
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(CalibrationError, match="not a statistics file"):
        Statistics.from_bytes(content, "file")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("counts", np.array([-5, 1, 1, 1, 1, 1])),
        ("counts", np.ones(3, np.int64)),
        ("counts", np.full(6, 0.5)),
        ("counts", np.ones(60, np.int64)),
        ("starts", np.array([0, 3, 99, 6])),
        ("starts", np.array([0, 5, 3, 6])),
        ("starts", np.array([-6, 3, 3, 6])),
        ("starts", np.array([0, 3])),
        ("starts", np.array([0.0, 3.0, 3.0, 6.0])),
        ("extremes", np.zeros((2, 2))),
        ("extremes", np.zeros((6, 3))),
        ("extremes", np.full((6, 2), np.nan)),
        ("extremes", np.array([[1.0, 0.0]] * 6)),
        ("channels", np.array([3, 0, 2])),
        ("channels", np.array([3, 3, 0])),
        ("channels", np.array([3.0, 0.0, 3.0])),
        ("channel_counts", np.zeros(18, np.uint8)),
        ("channel_counts", np.ones(18, np.uint8)),
        ("channel_counts", np.array([1, 0, 0, 0, 1, 0, 0, 0] * 2, np.uint8)),
        ("channel_counts", np.array([1, 0, 0, 0, 1, 1, 0, 0, 0] * 2, np.uint8)),
        ("channel_counts", np.array([1, 0, 0, 0, 1, 0, 0, 0, 1] * 2, np.int64)),
        ("bins", np.array([1, 1, 1, 2, 3, 4], np.uint16)),
        ("bins", np.array([70000, 1, 2, 3, 4, 5])),
        ("samples", np.int64(-3)),
        ("samples", np.array([1, 2])),
        ("names", np.array(["a", "a", "b"])),
        ("names", np.array([1, 2, 3])),
    ],
)
def test_files_that_contradict_themselves_are_refused(entry: str, value: np.ndarray) -> None:
    content = counted([np.array([[1.0, 2.0, 3.0]], np.float32)]).to_bytes()
    with np.load(io.BytesIO(content)) as data:
        good = {name: data[name] for name in data.files}
    stream = io.BytesIO()
    np.savez(stream, **{**good, entry: value})
    with pytest.raises(CalibrationError, match="not a statistics file"):
        Statistics.from_bytes(stream.getvalue(), "file")


def test_a_pickle_in_the_archive_is_never_opened() -> None:
    content = counted([np.ones((1, 3), np.float32)]).to_bytes()
    with np.load(io.BytesIO(content)) as data:
        good = {name: data[name] for name in data.files}
    stream = io.BytesIO()
    np.savez(stream, **{**good, "names": np.array([{"an": "object"}], dtype=object)})
    with pytest.raises(CalibrationError, match="not a statistics file"):
        Statistics.from_bytes(stream.getvalue(), "file")


def test_equal_statistics_are_equal_files_whenever_they_are_written() -> None:
    content = counted([np.ones((1, 3), np.float32)]).to_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
