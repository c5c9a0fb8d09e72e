"""What is read of a DLPack capsule, against what torch says of the tensor (on the CPU; the structure is the same)."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
import torch

from edgeres import device_arrays
from edgeres.device_arrays import device_array, lies_on_device
from edgeres.errors import BackendError


class Exporting:
    """A tensor that speaks DLPack and nothing else; torch takes no stream on the CPU."""

    def __init__(self, tensor: torch.Tensor, versions: bool) -> None:
        self.tensor = tensor
        self.versions = versions

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, stream: int, **options: Any) -> Any:
        if options and not self.versions:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.tensor.__dlpack__(**options)


@pytest.fixture(autouse=True)
def _the_cpu_counts_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_arrays, "CUDA_DEVICES", (1,))


WHOLE = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
TENSORS = {
    "whole": WHOLE,
    "rows": WHOLE[1:],
    "one row": WHOLE[1],
    "columns": WHOLE[..., 1:3],
    "transposed": WHOLE.transpose(2, 3),
    "channels last": WHOLE.to(memory_format=torch.channels_last),
    "one channel, channels last": WHOLE[:, :1].contiguous().to(memory_format=torch.channels_last),
    "broadcast": WHOLE[:1].expand(5, 3, 4, 6),
    "an axis of one": WHOLE[:, :, :, None],
    "empty": WHOLE[:0],
    "a number": WHOLE.sum(),
    **{str(dtype): WHOLE.to(dtype) for dtype in (torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool)},
    "bfloat16": WHOLE.bfloat16(),
}


@pytest.mark.parametrize("versions", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_what_torch_says(name: str, versions: bool) -> None:
    tensor = TENSORS[name]
    given = Exporting(tensor, versions)
    if tensor.dtype == torch.bfloat16 or not tensor.is_contiguous() or not tensor.numel():
        with pytest.raises(BackendError, match=r"numbers that NumPy does not have|not C-contiguous|holds nothing"):
            device_array(given)
        return
    found = device_array(given)
    assert (found.address, found.shape) == (tensor.data_ptr(), tuple(tensor.shape))
    assert found.dtype == tensor.numpy().dtype
    assert found.nbytes == tensor.numel() * tensor.element_size()
    assert not found.copied


@pytest.mark.parametrize("versions", [False, True])
def test_a_tensor_is_freed_when_its_last_reader_is_gone(versions: bool) -> None:
    memory = np.zeros((4, 3), np.float32)
    alone = sys.getrefcount(memory)
    found = device_array(Exporting(torch.from_numpy(memory), versions))
    part = found[2:]
    del found
    gc.collect()
    assert sys.getrefcount(memory) > alone
    del part
    gc.collect()
    assert sys.getrefcount(memory) == alone


def test_a_tensor_that_is_refused_is_freed() -> None:
    memory = np.zeros((4, 6), np.float32)
    alone = sys.getrefcount(memory)
    with pytest.raises(BackendError, match="not C-contiguous"):
        device_array(Exporting(torch.from_numpy(memory)[:, ::2], True))
    gc.collect()
    assert sys.getrefcount(memory) == alone


def test_a_tensor_with_a_gradient_is_refused() -> None:
    with pytest.raises(BackendError, match=r"does not give out its numbers: .*grad"):
        device_array(Exporting(torch.zeros(3, requires_grad=True), True))


def test_tensors_on_the_cpu_lie_there() -> None:
    assert not lies_on_device(torch.zeros(3))
    assert not lies_on_device(torch.zeros(3, requires_grad=True))
