"""Arrays' headers: what one promises is known, and counted as NumPy counts, before anything is read."""

import io

import numpy as np
import pytest

from edgeres.archive import Header, header_of


def header(shape: str, kind: str) -> io.BytesIO:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode("ascii")
    return io.BytesIO(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


@pytest.mark.parametrize("kind", ["<U0", "|S0", "|V0"])
@pytest.mark.parametrize("shape", ["(100000000000,)", "(1,)"])
def test_numbers_without_bytes_are_refused(kind: str, shape: str) -> None:
    with pytest.raises(ValueError, match="have no bytes"):
        header_of(header(shape, kind))


@pytest.mark.parametrize("shape", ["(4294967296, 4294967296)", "(0, 4294967296, 4294967296)", "(-1, 2)", "(1 << 60,)"])
def test_more_than_64_bits_count_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=r"promises the shape|damaged"):
        header_of(header(shape, "<f8"))


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.array(["a", "bc"]), np.float32(1), np.zeros((2, 3), np.uint8)])
def test_what_numpy_writes_is_read(values: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, values)
    stream.seek(0)
    assert header_of(stream) == Header(values.shape, values.dtype, len(stream.getvalue()))
