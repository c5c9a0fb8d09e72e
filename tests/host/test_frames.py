"""One preprocessing, three ways: as calibration prepares samples, as an engine is fed, and within the graph that takes
pixels, which is what a TensorRT builder reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing, TensorRange
from edgeres.backends.tensorrt import BuildRequest
from edgeres.backends.tensorrt.frames import frames_for, with_frames
from edgeres.errors import BackendError
from edgeres.quantize import plan, write_int8
from edgeres.quantize.pixels import exact_pixels, pixel_range
from edgeres.runtime.engine import LoadedEngine
from edgeres.samples import samples_from_arrays

THROUGH = """
<ir_version: 8, opset_import: ["" : 17]>
through (float[batch, 3, {h}, {w}] input) => (float[batch, 3, {h}, {w}] seen) {{ seen = Identity (input) }}
"""
"""A network that answers with its input."""

CONV = """
<ir_version: 8, opset_import: ["" : 17]>
conv (float[batch, 3, {h}, {w}] input) => (float[batch, 4] logits)
<float[4, 3, 1, 1] weight = {{0.5, -0.25, 1, -1, 0.5, 0.25, 0.125, 1, -0.5, 0.75, -0.75, 0.375}},
 float[4] bias = {{0, 1, -1, 0.5}}>
{{
    [conv1] features = Conv <kernel_shape = [1, 1]> (input, weight, bias)
    [pool] pooled = GlobalAveragePool (features)
    [flat] logits = Flatten (pooled)
}}
"""

SUM = """
<ir_version: 8, opset_import: ["" : 17]>
sum (float[2, 3, 9, 7] input, float[2, 3, 9, 7] more) => (float[2, 3, 9, 7] seen) { seen = Add (input, more) }
"""

IMAGENET = Preprocessing((9, 7))

PREPROCESSINGS = st.builds(
    lambda size, mean, std, color, pad: Preprocessing(
        size, max(size) + 3 if pad is None else None, mean, std, color, "crop" if pad is None else "letterbox", pad
    ),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    mean=st.tuples(*[st.floats(-1, 1, width=32)] * 3),
    std=st.tuples(*[st.floats(0.0078125, 2, width=32)] * 3),
    color=st.sampled_from(["rgb", "bgr"]),
    pad=st.one_of(st.none(), st.tuples(*[st.integers(0, 255)] * 3)),
)


def source(text: str, size: tuple[int, int]) -> bytes:
    content: bytes = parser.parse_model(text.format(h=size[0], w=size[1])).SerializeToString()
    return content


class Onnx:
    """What a file computes where nothing optimizes it: onnxruntime, as a runner."""

    contexts, largest = 1, None

    def __init__(self, content: bytes) -> None:
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        (self.input,) = self.session.get_inputs()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        answer: np.ndarray = self.session.run(None, {self.input.name: batch})[0]
        return answer

    def close(self) -> None:
        """Nothing is held."""


def engine(content: bytes, preprocessing: Preprocessing, takes: str, order: str, whole: bool = False) -> LoadedEngine:
    record = Engine("gpu", "tensorrt", "int8", FileRef("x", "", 0), {}, {}, input=takes, whole_pixels=whole)
    return LoadedEngine(Onnx(content), Manifest("n", "int8", {}, preprocessing, (), {}, {}), record, order)


def exact(preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return an int8 network whose first layer reads exact pixels, as a build writes it."""
    size = preprocessing.size
    model, pixels = exact_pixels(parser.parse_model(CONV.format(h=size[0], w=size[1])), preprocessing)
    placement = plan(model, {})
    ranges = {name: TensorRange(20.0, 20 / 127, "minmax", -20.0, 20.0, 1, 0.0, 0.0, None) for name in placement.tensors}
    return write_int8(model, placement, {**ranges, pixels: pixel_range(preprocessing, 1)})


@settings(max_examples=60, deadline=None)
@given(
    preprocessing=PREPROCESSINGS,
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    order=st.sampled_from(["rgb", "bgr"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_preprocessing_three_ways(
    preprocessing: Preprocessing, shape: tuple[int, int], order: str, seed: int
) -> None:
    """Bit for bit, from frames of any size: what calibration sees, what the network of an engine that takes normalized
    input sees, and what the network behind the pixels sees."""
    frames = np.random.default_rng(seed).integers(0, 256, (2, *shape, 3), np.uint8)
    (calibration,) = samples_from_arrays(frames).batches(preprocessing, 2)
    camera = frames if order == "rgb" else np.ascontiguousarray(frames[..., ::-1])
    content = source(THROUGH, preprocessing.size)
    pixels = with_frames(content, "input", preprocessing)
    served = engine(content, preprocessing, "float32", order)(camera)
    within = engine(pixels.content, preprocessing, "uint8", order)(camera)
    assert served.tobytes() == calibration.tobytes()
    assert within.tobytes() == calibration.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    mean=st.tuples(*[st.floats(-1, 1, width=32)] * 3),
    std=st.tuples(*[st.floats(0.0078125, 2, width=32)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_network_of_whole_pixels_reads_them_with_nothing_in_between(
    mean: tuple[float, float, float], std: tuple[float, float, float], seed: int
) -> None:
    """Its answers stay, bit for bit: to frames, and to normalized input of any numbers, which it rounds."""
    preprocessing = Preprocessing((9, 7), None, mean, std)
    model = exact(preprocessing)
    content = model.SerializeToString()
    found = with_frames(content, "input", preprocessing)
    assert found.whole
    operators = [node.op_type for node in onnx.load_from_string(found.content).graph.node]
    assert (operators.count("Mul"), operators.count("Gather"), operators.count("Sub")) == (0, 0, 1)
    was, now = (
        engine(content, preprocessing, "float32", "rgb"),
        engine(found.content, preprocessing, "uint8", "rgb", True),
    )
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (3, 9, 7, 3), np.uint8)
    assert now(frames).tobytes() == was(frames).tobytes()
    floats = (random.standard_normal((3, 3, 9, 7)) / np.reshape(std, (3, 1, 1))).astype(np.float32)
    assert now(floats).tobytes() == was(floats).tobytes()


def test_every_pixel_reaches_the_first_int8_layer_as_it_is() -> None:
    preprocessing = Preprocessing((16, 16))
    model = exact(preprocessing)
    (quantize,) = (node for node in model.graph.node if node.name == "input_pixels_QuantizeLinear")
    model.graph.output.append(onnx.helper.make_tensor_value_info(quantize.output[0], onnx.TensorProto.INT8, None))
    run = Onnx(with_frames(model.SerializeToString(), "input", preprocessing).content)
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    seen = run.session.run([quantize.output[0]], {run.input.name: frame})[0]
    np.testing.assert_array_equal(seen.astype(int) + 128, frame.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("change", ["scale", "shift", "output", "reader"])
def test_what_is_no_whole_pixel_is_looked_up(change: str) -> None:
    """A constant that is a little off, or somebody else who reads what lies between."""
    model = exact(IMAGENET)
    for tensor in model.graph.initializer:
        if tensor.name == {"scale": "input_pixels_per_unit", "shift": "input_pixels_shift"}.get(change):
            values = onnx.numpy_helper.to_array(tensor) + np.float32(1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    if change == "reader":
        model.graph.node.append(onnx.helper.make_node("Identity", ["input"], ["more"]))
    if change == "output":
        model.graph.output.append(onnx.helper.make_tensor_value_info("input_pixels", onnx.TensorProto.FLOAT, None))
    content = model.SerializeToString()
    found = with_frames(content, "input", IMAGENET)
    assert not found.whole
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    was, now = engine(content, IMAGENET, "float32", "rgb"), engine(found.content, IMAGENET, "uint8", "rgb")
    assert now(frames).tobytes() == was(frames).tobytes()


def test_all_else_in_the_file_stays() -> None:
    model = parser.parse_model(THROUGH.format(h=9, w=7))
    model.graph.node[0].input[0] = "frames"
    model.graph.input[0].name = "frames"  # the name that ours would have
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(3, dtype=np.int64), "rest"))
    onnx.helper.set_model_props(model, {"edgeres.shifts": "{}"})
    model.producer_name, model.doc_string = "someone", "ä" * 300
    found = with_frames(model.SerializeToString(), "frames", IMAGENET)
    got = onnx.load_from_string(found.content)
    onnx.checker.check_model(got, full_check=True)
    (given,) = got.graph.input
    assert given.name == found.input != "frames"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 9, 7, 3]
    assert [node.op_type for node in got.graph.node if given.name in node.input] == ["Cast"]  # TensorRT takes no other
    for part in (got.graph.input, got.graph.node, got.graph.initializer):
        del part[:]
    for part in (model.graph.input, model.graph.node, model.graph.initializer):
        del part[:]
    assert got == model
    fixed = parser.parse_model(THROUGH.format(h=9, w=7).replace("batch", "2"))
    shape = onnx.load_from_string(with_frames(fixed.SerializeToString(), "input", IMAGENET).content).graph.input[0]
    assert shape.type.tensor_type.shape.dim[0].dim_value == 2


@pytest.mark.parametrize("damage", ["empty", "text", "half", "other name", "no graph", "two inputs"])
def test_another_file_is_refused(damage: str) -> None:
    content = source(THROUGH, (9, 7))
    given = {
        "empty": b"",
        "text": b"hello, this is text",
        "half": content[: len(content) // 2],
        "no graph": content[:2],
        "two inputs": parser.parse_model(SUM).SerializeToString(),
    }
    name = "images" if damage == "other name" else "input"
    with pytest.raises(BackendError, match="Build it again"):
        with_frames(given.get(damage, content), name, IMAGENET)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("wanted", ["auto", "uint8", "float32"])
@pytest.mark.parametrize("target", ["gpu", "dla0"])
def test_who_gets_pixels(whole: bool, wanted: str, target: str, tmp_path: Path) -> None:
    """Left open: networks that round to whole pixels, for nothing is lost. A DLA never."""
    path = tmp_path / "model.onnx"
    path.write_bytes(exact(IMAGENET).SerializeToString() if whole else source(CONV, IMAGENET.size))
    request = BuildRequest(str(path), "", "input", (3, 9, 7), target=target, input=wanted, preprocessing=IMAGENET)
    found = frames_for(request)
    assert (found is not None) == (target == "gpu" and (wanted == "uint8" or (wanted == "auto" and whole)))
    assert found is None or found.whole == whole


def test_an_engine_of_pixels_takes_normalized_ones_and_nothing_else() -> None:
    """Where the network would not round: made of pixels by torchvision or by albumentations is near enough."""
    content = source(CONV, (9, 7))
    run = engine(with_frames(content, "input", IMAGENET).content, IMAGENET, "uint8", "rgb")
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    mean, std = (np.reshape(given, (3, 1, 1)) for given in (IMAGENET.mean, IMAGENET.std))
    planes = frames.transpose(0, 3, 1, 2).astype(np.float64)
    for normalized in ((planes / 255 - mean) / std, (planes - 255 * mean) * (1 / (255 * std))):
        assert run(normalized.astype(np.float32)).tobytes() == run(frames).tobytes()
    resized = ((planes + 0.3) / 255 - mean) / std
    with pytest.raises(BackendError, match=r"up to 0\.3 steps .*--engine-input float32"):
        run(resized.astype(np.float32))
