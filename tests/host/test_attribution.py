"""Where the error comes from: every number against onnxruntime, running the real graphs or one layer of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from edgeres.artifacts import LayerError, QuantizationErrors, TensorRange, from_json, to_json
from edgeres.calibrate import choose, observe
from edgeres.errors import QuantizationError
from edgeres.quantize import plan, shiftable, write_int8
from edgeres.quantize.attribution import attribute_errors
from edgeres.quantize.placement import MOVES
from edgeres.quantize.simulate import Twin, quantizer_of

FORMS = ("symmetric", "shifted")


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, 3, 32, 32)).astype(np.float32)


def decibels(signal: np.ndarray, noisy: np.ndarray) -> float:
    """The definition, in float64."""
    wide = signal.astype(np.float64)
    return float(10 * np.log10((wide**2).sum() / ((noisy.astype(np.float64) - wide) ** 2).sum()))


def exposed(model: onnx.ModelProto, tensors: Iterable[str], x: np.ndarray) -> dict[str, np.ndarray]:
    """Return tensors of a model that onnxruntime runs as it is written, by name."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    names = list(dict.fromkeys(tensors))
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def rounded(x: np.ndarray, chosen: TensorRange) -> np.ndarray:
    """Return what int8 makes of a tensor by the specification: zero point 0, or for a shifted one uint8's 0 … 255."""
    first, last = (0, 255) if chosen.shift else (-128, 127)
    scale = np.float32(chosen.scale)
    return np.asarray(np.clip(np.rint(x / scale), first, last).astype(np.float32) * scale)


def rounded_weights(weights: np.ndarray, axis: int) -> np.ndarray:
    """Return int8 weights, one scale per output channel, by the formula."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = (np.abs(weights).max(axis=others, keepdims=True).astype(np.float64) / 127).astype(np.float32)
    return np.asarray(np.rint(weights / scale).astype(np.float32) * scale)


def one_layer(model: onnx.ModelProto, name: str, inputs: Mapping[int, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return one node's output, computed by onnxruntime from the float network's inputs, some replaced by others."""
    node = next(node for node in model.graph.node if node.name == name)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    floats = exposed(model, [n for n in node.input if n not in constants], x)
    values = [inputs.get(i, {**constants, **floats}[n]) for i, n in enumerate(node.input)]
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.input[:] = [f"x{i}" for i in range(len(values))]
    described = [
        helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for i, value in enumerate(values)
    ]
    graph = helper.make_graph([alone], "alone", described, [onnx.ValueInfoProto(name=node.output[0])])
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {f"x{i}": value for i, value in enumerate(values)})[0])


def with_one_quantized(made: Twin, name: str) -> onnx.ModelProto:
    """Return the float network with one node's input behind Q/DQ (uint8 if it is shifted) and its weights rounded."""
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    node = next(node for node in model.graph.node if node.name == name)
    for point in made.placement.points:
        for _, index in (reader for reader in point.readers if reader[0] == name):
            chosen = made.ranges[point.range_of]
            zero = np.array(0, np.uint8 if chosen.shift else np.int8)
            constants = {"s": np.float32(chosen.scale), "z": zero}
            model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
            place = list(model.graph.node).index(node)
            model.graph.node.insert(place, helper.make_node("QuantizeLinear", [node.input[index], "s", "z"], ["q"]))
            model.graph.node.insert(place + 1, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]))
            node.input[index] = "dq"
    for weight in made.placement.weights:
        if weight.readers[0][0] == name:
            tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight.tensor)
            values = rounded_weights(numpy_helper.to_array(tensor), weight.axis)
            tensor.CopyFrom(numpy_helper.from_array(values, weight.tensor))
    return model


@pytest.fixture(scope="module")
def twin(net: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Twin, onnx.ModelProto]]:
    """Return ``twin(kind, form)``: a net with ranges of either form, and its real Q/DQ graph."""

    def make(kind: str, form: str) -> tuple[Twin, onnx.ModelProto]:
        made = net(kind)
        path = tmp_path_factory.mktemp(kind) / "model.fp32.onnx"
        path.write_bytes(made.exported.content)
        statistics = observe(path, made.placement.tensors, [images()])
        allowed = shiftable(made.fp32, made.placement) if form == "shifted" else frozenset()
        ranges = choose(statistics, "mse", 99.99, allowed)
        assert any(found.shift for found in ranges.values()) == (form == "shifted")
        return Twin(made.fp32, made.placement, ranges, {}), write_int8(made.fp32, made.placement, ranges)

    return make


def errors_of(twin: Twin, x: np.ndarray | None = None) -> dict[str, LayerError]:
    found = attribute_errors(twin, {}, [images() if x is None else x])
    return {layer.node: layer for layer in found.layers}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["cifar", "bottleneck"])
def test_own_error_is_that_of_the_layer_alone(twin: Callable, kind: str, form: str) -> None:
    made, _ = twin(kind, form)
    x = images()
    points = {reader: point for point in made.placement.points for reader in point.readers}
    weights = {weight.readers[0][0]: weight for weight in made.placement.weights}
    found = errors_of(made)
    for name, layer in found.items():
        node = next(node for node in made.model.graph.node if node.name == name)
        replaced = {}
        for index in range(len(node.input)):
            if (name, index) in points:
                point = points[name, index]
                tensor = exposed(made.model, [point.tensor], x)[point.tensor] if point.tensor != "input" else x
                replaced[index] = rounded(tensor, made.ranges[point.range_of])
                assert layer.input_sqnr_db == pytest.approx(decibels(tensor, replaced[index]), abs=0.01)
        if name in weights:
            values = next(numpy_helper.to_array(t) for t in made.model.graph.initializer if t.name == node.input[1])
            replaced[1] = rounded_weights(values, weights[name].axis)
            assert layer.weight_sqnr_db == pytest.approx(decibels(values, replaced[1]), abs=0.001)
        else:
            assert layer.weight_sqnr_db is None
        output = exposed(made.model, [node.output[0]], x)[node.output[0]]
        assert layer.own_sqnr_db == pytest.approx(decibels(output, one_layer(made.model, name, replaced, x)), abs=0.02)
    expected = {name for point in made.placement.points for name, _ in point.readers}
    moving = {node.name for node in made.model.graph.node if node.op_type in MOVES}
    assert set(found) == expected - moving


@pytest.mark.parametrize("kind", ["cifar", "basic", "bottleneck"])
def test_accumulated_error_is_that_of_the_real_graph(twin: Callable, kind: str) -> None:
    made, int8 = twin(kind, "symmetric")
    outputs = {node.name: node.output[0] for node in made.model.graph.node}
    found = errors_of(made)
    names = [outputs[name] for name in found]
    exact, running = exposed(made.model, names, images()), exposed(int8, names, images())
    for name, layer in found.items():
        tensor = outputs[name]
        assert layer.accumulated_sqnr_db == pytest.approx(decibels(exact[tensor], running[tensor]), abs=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["cifar", "basic", "bottleneck"])
def test_simulation_agrees_with_onnxruntime(twin: Callable, kind: str, form: str) -> None:
    made, int8 = twin(kind, form)
    output = made.model.graph.output[0].name
    exact, running = exposed(made.model, [output], images())[output], exposed(int8, [output], images())[output]
    found = attribute_errors(made, {}, [images()])
    assert found.logits_sqnr_db == pytest.approx(decibels(exact, running), abs=0.1)
    constants = {name: value for node in made.final().values() for name, value in node.items()}
    quantizer = quantizer_of(made.placement, made.ranges)
    with torch.no_grad():
        simulated, _ = made.follower().run(torch.from_numpy(images()), (), quantizer, constants)
    # What differs is a rounding here and there, where the two sum in another order: most images have none such.
    apart = ((running - simulated.numpy()) ** 2).sum(1)
    assert np.median(apart) < 1e-6 * np.median(((running - exact) ** 2).sum(1))
    assert apart.sum() < 0.1 * ((running - exact) ** 2).sum()


@pytest.mark.parametrize("form", FORMS)
def test_shares_are_those_of_each_layer_quantized_alone(twin: Callable, form: str) -> None:
    """The whole effect, not to first order: onnxruntime runs a network for each layer, which alone is quantized."""
    made, _ = twin("cifar", form)
    x = images(64)
    output = made.model.graph.output[0].name
    exact = exposed(made.model, [output], x)[output].astype(np.float64)
    found = errors_of(made, x)
    noise = {}
    for name in found:
        alone = exposed(with_one_quantized(made, name), [output], x)[output]
        noise[name] = float(((alone - exact) ** 2).sum())
    total = sum(noise.values())
    for name, layer in found.items():
        assert layer.share == pytest.approx(noise[name] / total, rel=0.25, abs=0.002)
    assert sum(layer.share for layer in found.values()) == pytest.approx(1)


def test_errors_that_do_not_correlate_add_up_to_the_measured_one(twin: Callable) -> None:
    made, _ = twin("cifar", "symmetric")
    found = attribute_errors(made, {}, [images(64)])
    assert found.first_order_sqnr_db == pytest.approx(found.logits_sqnr_db, abs=1.0)


def test_a_layer_made_noisy_ranks_first(twin: Callable) -> None:
    """Each weighted layer in its turn gets weights of two bits."""
    made, _ = twin("cifar", "shifted")
    for weight in made.placement.weights:
        values = next(numpy_helper.to_array(t) for t in made.model.graph.initializer if t.name == weight.tensor)
        step = np.abs(values).max() / 2
        noisy = replace(made, constants={weight.tensor: (np.rint(values / step) * step).astype(np.float32)})
        found = attribute_errors(noisy, {weight.readers[0][0]: "the noisy one"}, [images(8)])
        assert found.layers[0].module == "the noisy one"
        assert found.layers[0].share > 0.5
        assert found.layers[0].weight_sqnr_db == pytest.approx(
            decibels(values, noisy.constants[weight.tensor]), abs=0.01
        )


def test_a_tensor_with_a_range_too_narrow_ranks_first_and_saturates(twin: Callable) -> None:
    made, _ = twin("cifar", "symmetric")
    point = next(point for point in made.placement.points if point.readers[0][0] == "/layer2/layer2.0/conv2/Conv")
    chosen = made.ranges[point.range_of]
    narrow = msgspec.structs.replace(chosen, amax=chosen.amax / 8, scale=chosen.scale / 8)
    ranges = {**made.ranges, point.range_of: narrow}
    layer = attribute_errors(replace(made, ranges=ranges), {}, [images()]).layers[0]
    assert (layer.node, layer.tensor) == (point.readers[0][0], point.tensor)
    assert (layer.amax, layer.scale, layer.minimum, layer.maximum) == (
        narrow.amax,
        narrow.scale,
        chosen.minimum,
        chosen.maximum,
    )
    assert (layer.lowest, layer.highest) == pytest.approx((-128 * narrow.scale, 127 * narrow.scale))
    int8 = write_int8(made.model, made.placement, ranges)
    running = exposed(int8, [point.tensor], images())[point.tensor]  # what Q reads in the graph that is int8 throughout
    assert layer.saturated == pytest.approx(float((running > 127.5 * narrow.scale).mean()), rel=0.02)
    assert layer.saturated > 0.02


def test_a_shifted_grid_reaches_from_zero_and_zero_is_not_saturated(twin: Callable) -> None:
    made, _ = twin("cifar", "shifted")
    source = {point.tensor: point.range_of for point in made.placement.points}
    shifted = [layer for layer in errors_of(made).values() if made.ranges[source[layer.tensor]].shift]
    assert shifted
    for layer in shifted:
        assert (layer.lowest, layer.highest) == pytest.approx((0, 255 * layer.scale), abs=1e-6)
        assert layer.saturated < 0.01  # half of what a ReLU gives is zero, the first step of its grid


def test_batches_are_taken_one_by_one_and_make_no_difference(twin: Callable) -> None:
    made, _ = twin("basic", "symmetric")
    begun = []

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, 16, size):
            begun.append(start)
            yield images()[start : start + size]

    one = attribute_errors(made, {}, batches(16))
    told: list[int] = []
    many = attribute_errors(made, {}, batches(5), watch=told.append)
    assert told == [5, 10, 15, 16]
    assert one.samples == many.samples == 16
    for layer in one.layers:
        other = next(found for found in many.layers if found.node == layer.node)
        assert other.own_sqnr_db == pytest.approx(layer.own_sqnr_db, abs=0.05)
        assert other.accumulated_sqnr_db == pytest.approx(layer.accumulated_sqnr_db, abs=0.1)
    begun.clear()
    assert attribute_errors(made, {}, batches(5), seconds=0).samples == 5
    assert begun == [0]


def test_what_is_not_quantized_causes_nothing(net: Callable) -> None:
    made = net("basic")
    placement = plan(made.fp32, made.exported.modules, ["*"])
    found = attribute_errors(Twin(made.fp32, placement, {}, {}), {}, [images(2)])
    assert found == QuantizationErrors(2, None, None, ())
    assert from_json(to_json(found), QuantizationErrors, "errors.json") == found


def test_an_operator_that_cannot_be_followed_is_named(graph: Callable) -> None:
    model = graph(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { a = Softplus(x)\n y = Conv<kernel_shape=[1,1]>(a, w) }",
        {"w": np.ones((4, 3, 1, 1), np.float32)},
    )
    with pytest.raises(QuantizationError, match="Softplus"):
        attribute_errors(Twin(model, plan(model, {}), {}, {}), {}, [])
