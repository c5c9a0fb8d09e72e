"""Arrays of other libraries on a GPU: what is read of them, what is refused, and who frees them when."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

import msgspec
import numpy as np
import pytest

from edgeres import device_arrays
from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing
from edgeres.device_arrays import DeviceArray, device_array, lies_on_device
from edgeres.errors import BackendError
from edgeres.runtime.engine import LoadedEngine

needs_dlpack = pytest.mark.skipif(not hasattr(np, "from_dlpack"), reason="NumPy speaks DLPack from 1.23 on")
needs_versions = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy's DLPack has versions from 2.1 on"
)


class Interface:
    """A GPU array of another library, which really lies in host memory: the CUDA array interface."""

    def __init__(self, array: np.ndarray, **other: Any) -> None:
        self.array = array
        self.interface: Dict[str, Any] = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "version": 3,
            **other,
        }

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return self.interface


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Capsules:
    """The same through DLPack: NumPy's own capsules, in which this writes that they lie on a GPU."""

    def __init__(self, array: np.ndarray, device: Tuple[int, int] = (2, 0), versions: bool = False) -> None:
        self.array = array
        self.device = device
        self.versions = versions
        self.streams: List[Optional[int]] = []

    def __dlpack_device__(self) -> Tuple[int, int]:
        return self.device

    def __dlpack__(self, stream: Optional[int] = None, **options: Any) -> Any:
        if options and not self.versions:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        capsule = self.array.__dlpack__(**options)
        name = b"dltensor_versioned" if self.versions else b"dltensor"
        # dlpack.h: DLManagedTensorVersioned is version, context, deleter and flags, 8 bytes each, and the tensor, which
        # begins with its data's address; the device follows.
        place = _pointer(capsule, name) + (32 if self.versions else 0) + 8
        Device.from_address(place).type, Device.from_address(place).id = self.device
        return capsule


MAKERS: Dict[str, Callable[[np.ndarray], Any]] = {"interface": Interface, "capsule": Capsules}


@needs_dlpack
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i4", "f2", "c8"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 3, 1, 4), (2, 3, 4, 5)])
def test_what_is_read(maker: str, dtype: str, shape: Tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    found = device_array(MAKERS[maker](array))
    assert (found.address, found.shape, found.dtype) == (array.ctypes.data, shape, array.dtype)
    assert (found.ndim, found.nbytes, len(found)) == (array.ndim, array.nbytes, len(array))
    assert not found.read_only
    assert not found.copied
    assert found.gpu == (0 if maker == "capsule" else None)


def test_rows_are_those_of_numpy() -> None:
    array = np.zeros((7, 3, 2), np.float32)
    whole = device_array(Interface(array))
    for start, stop in ((0, 7), (2, 5), (6, 10), (7, 9)):
        rows, wanted = whole[start:stop], array[start:stop]
        assert (rows.shape, rows.nbytes) == (wanted.shape, wanted.nbytes)
        if wanted.size:
            assert rows.address == wanted.ctypes.data
    assert whole[1:2].as_batch().shape == (1, 1, 3, 2)


@needs_dlpack
@pytest.mark.parametrize("versions", [False, pytest.param(True, marks=needs_versions)])
def test_a_capsule_is_freed_once_and_not_before_its_last_reader(versions: bool) -> None:
    array = np.zeros((4, 3), np.float32)
    before = sys.getrefcount(array)
    found = device_array(Capsules(array, versions=versions))
    part = found[1:3]
    del found
    gc.collect()
    assert sys.getrefcount(array) == before + 1
    del part
    gc.collect()
    assert sys.getrefcount(array) == before


@needs_dlpack
def test_a_refused_capsule_is_freed_too() -> None:
    array = np.zeros((4, 6), np.float32)[:, ::2]
    before = sys.getrefcount(array)
    for given in (Capsules(array), Capsules(array, (13, 2))):
        with pytest.raises(BackendError, match="not C-contiguous"):
            device_array(given)
        del given
    gc.collect()
    assert sys.getrefcount(array) == before


def test_an_interfaces_owner_lives_as_long_as_its_array() -> None:
    owner = Interface(np.zeros(3, np.float32))
    gone = weakref.ref(owner)
    found = device_array(owner)
    del owner
    gc.collect()
    assert gone() is not None
    del found
    gc.collect()
    assert gone() is None


@needs_dlpack
def test_a_producer_orders_its_work_into_the_default_stream() -> None:
    given = Capsules(np.zeros(3, np.float32))
    device_array(given)
    assert given.streams == [1]  # the array API standard: 1 is CUDA's legacy default stream


@needs_dlpack
def test_who_has_both_is_read_by_the_interface() -> None:
    class Both(Interface, Capsules):
        def __dlpack_device__(self) -> Tuple[int, int]:
            return (2, 3)

        def __dlpack__(self, stream: Optional[int] = None, **options: Any) -> Any:
            raise AssertionError("a capsule was asked for")

    assert device_array(Both(np.zeros(3, np.float32))).gpu == 3


@needs_versions
def test_a_capsule_says_that_it_is_read_only() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert device_array(Capsules(array, versions=True)).read_only


def test_an_interface_says_that_it_is_read_only() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert device_array(Interface(array)).read_only


class Raising:
    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        raise self._problem


X = np.zeros((4, 3), np.float32)
REFUSED: Dict[str, Tuple[Any, str]] = {
    "strided": (Interface(X, shape=(2, 3), strides=(24, 4)), r"not C-contiguous: give a contiguous copy"),
    "Fortran": (Interface(X, strides=(4, 16)), "not C-contiguous"),
    "backwards": (Interface(X, strides=(-12, 4)), "not C-contiguous"),
    "broadcast": (Interface(X, strides=(0, 4)), "not C-contiguous"),
    "masked": (Interface(X, mask=Interface(X)), "masked"),
    "version 1": (Interface(X, version=1), "version 1 of the CUDA array interface; edgeres reads 2 and 3"),
    "version 4": (Interface(X, version=4), "version 4"),
    "no address": (Interface(X, data=(0, False)), "at address 0"),
    "nothing": (Interface(np.zeros((0, 3), np.float32)), r"holds nothing: its shape is \(0, 3\)"),
    "a gradient": (Raising(RuntimeError("a gradient,\nand more")), "does not give out its numbers: a gradient,$"),
    "OpenCL": (Capsules(X, (4, 0)), "lies in memory of OpenCL.* Copy it there"),
    "Metal": (Capsules(X, (8, 0)), "of Metal"),
    "ROCm": (Capsules(X, (10, 0)), "of ROCm"),
    "unheard of": (Capsules(X, (77, 0)), "of device of DLPack's type 77"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_in_one_line(what: str) -> None:
    given, told = REFUSED[what]
    with pytest.raises(BackendError, match=told) as caught:
        device_array(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strides", [(12, 12, 4), (12, 999, 4), (12, -1, 4)])
def test_an_axis_of_one_may_have_any_stride(strides: Tuple[int, ...]) -> None:
    assert device_array(Interface(X, shape=(4, 1, 3), strides=strides)).shape == (4, 1, 3)


class Written:
    """A capsule of our own making, field by field, with a deleter that counts."""

    NEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )

    def __init__(self, name: bytes = b"dltensor", code: int = 2, bits: int = 32, lanes: int = 1, **other: Any) -> None:
        self.name = name
        self.deleted: List[int] = []
        self._shape = (ctypes.c_int64 * 2)(4, 3)
        content = device_arrays.CAPSULES[name][1] if name in device_arrays.CAPSULES else device_arrays._Managed
        self.content = content()
        self._deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.deleted.append)
        self.content.deleter = ctypes.cast(self._deleter, ctypes.c_void_p).value if other.get("deleter", True) else None
        if hasattr(self.content, "major"):
            self.content.major = other.get("major", 1)
            self.content.flags = other.get("flags", 0)
        tensor = self.content.tensor
        tensor.data, tensor.byte_offset = X.ctypes.data, other.get("byte_offset", 0)
        tensor.device.type, tensor.device.id = other.get("device", 2), 1
        tensor.ndim, tensor.shape = 2, ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64))
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = code, bits, lanes
        self.capsule = self.NEW(ctypes.addressof(self.content), self.name, None)

    def __dlpack_device__(self) -> Tuple[int, int]:
        return (2, 1)

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule


@pytest.mark.parametrize("name", list(device_arrays.CAPSULES))
def test_a_capsule_without_strides_is_contiguous_and_may_have_an_offset(name: bytes) -> None:
    given = Written(name, byte_offset=12)
    found = device_array(given)
    assert (found.address, found.shape, found.gpu) == (X.ctypes.data + 12, (4, 3), 1)
    with pytest.raises(BackendError, match="somebody took it before"):
        device_array(given)
    assert given.deleted == []
    del found
    gc.collect()
    assert given.deleted == [ctypes.addressof(given.content)]


def test_a_capsule_without_a_deleter() -> None:
    assert device_array(Written(deleter=False)).shape == (4, 3)


WRITTEN: Dict[str, Tuple[Dict[str, Any], str]] = {
    "bfloat16": ({"code": 4, "bits": 16}, "DLPack's type 4, 16 bits, 1 lanes.*Convert it"),
    "int4": ({"code": 0, "bits": 4}, "4 bits"),
    "vectors": ({"lanes": 4}, "4 lanes"),
    "another device than said": ({"device": 10}, "of ROCm"),
    "version 2": ({"name": b"dltensor_versioned", "major": 2}, "DLPack 2.0; edgeres reads 1.x"),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_capsule_that_is_refused_is_freed_once(what: str) -> None:
    fields, told = WRITTEN[what]
    given = Written(**fields)
    with pytest.raises(BackendError, match=told):
        device_array(given)
    gc.collect()
    assert len(given.deleted) == 1


def test_what_is_no_capsule_of_dlpack_is_left_alone() -> None:
    given = Written(b"something else")
    with pytest.raises(BackendError, match="no DLPack capsule"):
        device_array(given)
    gc.collect()
    assert given.deleted == []


def test_where_something_lies() -> None:
    assert not lies_on_device(X)
    assert not lies_on_device([1.0])
    assert not lies_on_device(Capsules(X, (1, 0)))
    assert not lies_on_device(Capsules(X, (3, 0)))  # pinned memory, which the processor reads
    assert lies_on_device(Capsules(X))
    assert lies_on_device(Interface(X))
    with pytest.raises(BackendError, match="does not give out"):
        lies_on_device(Raising(RuntimeError("a gradient")))


class GpuSumming:
    """An engine on a GPU that lies in host memory: it answers each image with the sums of its channels."""

    classes, contexts, cuda_graphs = 3, 1, "not yet"

    def __init__(self, largest: Optional[int]) -> None:
        self.largest = largest
        self.batches: List[Any] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        logits = np.empty((len(batch), 3), np.float32)
        self.fill(batch, logits)
        return logits

    def fill(self, batch: Any, out: Any) -> None:
        if batch.ndim != 4:
            raise BackendError(f"not {batch.shape}")
        self.batches.append(batch)
        at_hand(out)[:] = np.rint(at_hand(batch)).sum((2, 3))

    def close(self) -> None:
        """There is nothing to free."""


def at_hand(array: Any) -> np.ndarray:
    """Return the numbers of an array, wherever it lies."""
    if isinstance(array, np.ndarray):
        return array
    assert isinstance(array, DeviceArray)
    numbers = (ctypes.c_float * (array.nbytes // 4)).from_address(array.address)
    return np.ctypeslib.as_array(numbers).reshape(array.shape)


def opened(largest: Optional[int] = 4) -> Tuple[LoadedEngine, GpuSumming]:
    raw = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    runner = GpuSumming(largest)
    record = Engine("gpu", "tensorrt", "fp32", FileRef("x", "0", 0), {}, {})
    return LoadedEngine(runner, Manifest("sums", "fp32", {}, raw, (), {}, {}), record), runner


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4)).astype(np.float32)


@needs_dlpack
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_frames_and_logits_on_the_gpu(maker: str, count: int) -> None:
    engine, runner = opened()
    x, wanted = images(count), images(count).sum((2, 3))
    frames = np.ascontiguousarray(x.astype(np.uint8).transpose(0, 2, 3, 1))
    there = MAKERS[maker](x)
    answer = engine(there)
    assert isinstance(answer, np.ndarray)
    np.testing.assert_array_equal(answer, wanted)
    assert runner.batches[-1].address == x.ctypes.data  # not a copy
    for given in (there, x, frames):
        room = np.zeros((count, 3), np.float32)
        out = MAKERS[maker](room)
        assert engine(given, out=out) is out
        np.testing.assert_array_equal(room, wanted)
    room = np.zeros((count, 3), np.float32)
    assert engine(there, out=room) is room
    np.testing.assert_array_equal(room, wanted)
    assert all(len(batch) <= 4 for batch in runner.batches if isinstance(batch, np.ndarray))


@needs_dlpack
@pytest.mark.parametrize("maker", MAKERS)
def test_streams_warmups_and_profiles_take_them(maker: str) -> None:
    engine, runner = opened()
    x = images(3)
    there = MAKERS[maker]
    answers = list(engine.stream([there(x), (there(x[0]), "one"), x[1]], depth=2))
    np.testing.assert_array_equal(answers[0], x.sum((2, 3)))
    np.testing.assert_array_equal(answers[1][0], x[0].sum((1, 2)))
    assert answers[1][1] == "one"
    np.testing.assert_array_equal(answers[2], x[1].sum((1, 2)))
    with pytest.raises(BackendError, match=r"item 0 of the stream: not \(4, 4\)"):
        next(engine.stream([there(x[0, 0])]))
    runner.batches.clear()
    assert engine.profile(there(x), runs=2).shape == (3, 3, 4, 4)
    assert engine.warmup(2, there(x)).last > 0
    assert {batch.address for batch in runner.batches} == {x.ctypes.data}
    assert engine.profile(runs=1).cuda_graphs == engine.cuda_graphs == "not yet"


@needs_dlpack
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("camera", ["rgb", "bgr"])
def test_pixels_on_the_gpu_have_to_be_in_the_networks_order(maker: str, color: str, camera: str) -> None:
    """Nobody turns them there; in that order they reach the engine as they lie."""
    engine, _ = opened()
    given: List[Any] = []

    class Taking(GpuSumming):
        def fill(self, batch: Any, out: Any) -> None:
            given.append(batch)

    frame = msgspec.structs.replace(engine.manifest.preprocessing, color=color)
    manifest = msgspec.structs.replace(engine.manifest, preprocessing=frame)
    record = msgspec.structs.replace(engine.record, input="uint8")
    pixels = LoadedEngine(Taking(4), manifest, record, camera)
    x = np.zeros((2, 4, 4, 3), np.uint8)
    if color != camera:
        with pytest.raises(BackendError, match=f"the network's channel order, {color}"):
            pixels(MAKERS[maker](x))
    else:
        pixels(MAKERS[maker](x))
        assert [batch.address for batch in given] == [x.ctypes.data]


OUTS: Dict[str, Tuple[Callable[[], Any], str]] = {
    "read-only": (lambda: Interface(np.broadcast_to(np.zeros((2, 3), np.float32), (2, 3))), "it is read-only"),
    "narrow": (lambda: Interface(np.zeros((2, 2), np.float32)), r"its shape is \(2, 2\)"),
    "double": (lambda: Interface(np.zeros((2, 3))), "it is float64"),
    "big-endian": (lambda: Interface(np.zeros((2, 3), ">f4")), "it is >f4"),
    "strided": (lambda: Interface(np.zeros((2, 3), np.float32), strides=(24, 4)), "not C-contiguous"),
    "a copy": (lambda: Written(b"dltensor_versioned", flags=2), "gives out a copy of itself"),
    "elsewhere": (lambda: Capsules(np.zeros((2, 3), np.float32), (10, 0)), "of ROCm"),
    "a list": (lambda: [[0.0] * 3] * 2, r"out is a list: give a float32 array \(2, 3\)"),
    "NumPy's": (lambda: np.zeros((2, 3)), "it is float64"),
}


@pytest.mark.parametrize("what", OUTS)
def test_an_out_that_does_not_fit(what: str) -> None:
    engine, runner = opened()
    make, told = OUTS[what]
    with pytest.raises(BackendError, match=told):
        engine(Interface(images(2)), out=make())
    assert runner.batches == []
    with pytest.raises(BackendError, match=told):
        engine(images(2), out=make())


def test_an_engine_on_the_cpu_refuses_them(summing: Callable[..., Any]) -> None:
    engine, _ = summing()
    with pytest.raises(BackendError, match="Interface lies on a GPU; an engine takes arrays on the CPU"):
        engine(Interface(images(1)))
    with pytest.raises(BackendError, match="out is a Interface"):
        engine(images(1), out=Interface(np.zeros((1, 3), np.float32)))
    assert engine.cuda_graphs == "off"
