"""What an engine runs in, read from real tables of TensorRT for RTX 1.7 (``logs/``) and from inspectors of each age."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeres.artifacts import LayerPlan
from edgeres.backends.tensorrt.layers import attribute, layers_from_inspector, layers_from_log, untold
from edgeres.backends.tensorrt.records import EngineLayer

LOGS = Path(__file__).parent / "logs"
NAMES = ("identity", "projection", "mixed", "broken")
OURS = {"Int8": "int8", "Half": "fp16", "Float": "fp32"}


def log(name: str) -> str:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8")


def plan(*, shortcut: bool = False, kept: Sequence[str] = ()) -> list[LayerPlan]:
    """Return the plan of the small net that the tables are of; its modules are named after its nodes."""
    rows = [
        ("stem", "Conv", "int8"),
        ("relu0", "Relu", "follows"),
        ("conv1", "Conv", "int8"),
        ("relu1", "Relu", "follows"),
        ("conv2", "Conv", "int8"),
        *([("shortcut", "Conv", "int8")] if shortcut else []),
        ("add", "Add", "int8 skip"),
        ("relu2", "Relu", "follows"),
        ("pool", "GlobalAveragePool", "int8"),
        ("flat", "Flatten", "follows"),
        ("fc", "Gemm", "int8"),
    ]
    return [
        LayerPlan(node, op, f"net.{node}", "float" if node in kept else precision, "") for node, op, precision in rows
    ]


def weighted(layers: Sequence[EngineLayer]) -> dict[str, str]:
    """Return what each convolution and the classifier compute in, by the torch module."""
    kinds = ("correlation", "gemm", "runtime_fusion")
    return {layer.module.split(" + ")[0]: layer.precision for layer in layers if layer.type in kinds}


# The table of a build log


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_table_is_read(name: str) -> None:
    """Counted and read in another way: by what stands in the file, not by its structure."""
    text = log(name)
    layers = layers_from_log([text])
    rows = [line for line in text.splitlines() if line.startswith("Name: __my") or ", LayerType: " in line]
    assert len(layers) == len(rows) > 8
    for layer, row in zip(layers, rows, strict=True):
        assert row.startswith(f"Name: {layer.name}, LayerType: {layer.type}, ")
        stated = [OURS[word] for word in re.findall(r"Datatype: (\w+)", row)]
        assert stated == [*layer.inputs, *layer.constants, *layer.outputs]
        assert list(layer.nodes) == re.findall(r"\[ONNX Layer: ([^]]+)\]", row)
        assert layer.module == ""


def test_int8_layers_have_int8_on_both_sides() -> None:
    layers, warnings = attribute(layers_from_log([log("identity")]), plan())
    assert warnings == ()
    assert weighted(layers) == dict.fromkeys(("net.stem", "net.conv1", "net.conv2", "net.fc"), "int8")
    (addition,) = [layer for layer in layers if "add" in layer.nodes]
    assert addition.inputs == ("int8", "fp32")
    assert addition.module == "net.conv2 + net.add + net.relu2 + net.pool"
    assert [layer.precision for layer in layers if layer.type == "shape_call"] == [""]


def test_a_skip_that_is_rounded_where_it_is_added_is_as_planned() -> None:
    layers, warnings = attribute(layers_from_log([log("projection")]), plan(shortcut=True))
    assert warnings == ()
    assert weighted(layers)["net.shortcut"] == "int8"


def test_a_skip_in_float_is_told_apart_from_the_pool_behind_it() -> None:
    text = re.sub(r"\[ONNX Layer: s_(De|Q)[a-zA-Z]+\]", "", log("projection"))
    assert len(text) < len(log("projection"))
    assert text.count("r2_QuantizeLinear") == text.count("r2_DequantizeLinear") == 1
    warnings = attribute(layers_from_log([text]), plan(shortcut=True))[1]
    assert warnings == ("the skip input of net.add (Add) was planned in int8 and is loaded as fp32",)


def test_what_runs_in_float_against_the_plan_is_named() -> None:
    """The real engine of a graph with weights per channel on axis 1, weights quantized alone, and a float skip."""
    layers, warnings = attribute(layers_from_log([log("broken")]), plan())
    assert warnings == (
        "net.conv1 (Conv) was planned in int8 and runs in fp32",
        "net.conv2 (Conv) was planned in int8 and runs in fp32",
        "the skip input of net.add (Add) was planned in int8 and is loaded as fp32",
    )
    assert weighted(layers) == {"net.stem": "int8", "net.conv1": "fp32", "net.conv2": "fp32", "net.fc": "int8"}


def test_float_layers_are_told_in_their_own_type() -> None:
    layers = layers_from_log([log("mixed")])
    found, warnings = attribute(layers, plan(kept=("stem", "fc", "pool")))
    assert warnings == ()
    assert weighted(found) == {"net.stem": "fp16", "net.conv1": "int8", "net.conv2": "int8", "net.fc": "fp16"}
    assert attribute(layers, plan(kept=("pool",)))[1] == (
        "net.stem (Conv) was planned in int8 and runs in fp16",
        "net.fc (Gemm) was planned in int8 and runs in fp16",
    )


@pytest.mark.parametrize("name", ["conv1", "add", "pool", "fc"])
def test_a_layer_that_is_not_mentioned_is_named(name: str) -> None:
    text = log("identity").replace(f"[ONNX Layer: {name}]", "")
    op = {one.node: one.op for one in plan()}[name]
    warnings = attribute(layers_from_log([text]), plan())[1]
    assert warnings == (f"net.{name} ({op}) was planned in int8, but no layer of the engine mentions it",)


def test_the_last_table_counts_and_other_messages_do_not() -> None:
    messages = ["Layers: 3 were fused", log("broken"), "Name: nothing", log("identity"), "Layers:\n\nI/O Tensors:\n"]
    assert layers_from_log(messages) == layers_from_log([log("identity")])
    assert layers_from_log([]) == layers_from_log(["Layers:\n", "Total: Layers:\nName: a, LayerType: b"]) == ()


def row(name: str, kind: str, tensors: str, metadata: str) -> str:
    tables = f"Inputs: [ {tensors}], Constants: [ {tensors}], Outputs: []"
    return f"Name: {name}, LayerType: {kind}, {tables}, Metadata: {metadata}"


def test_names_may_hold_what_the_table_is_made_of() -> None:
    strange = "a[0], {b}: (c), LayerTypes: [d]"
    tensor = "{ Name: t[1], Datatype: Half, x, Dimensions: [1,2], Datatype: Int8, Format: (NHWC) Channel major format }"
    two = f"{tensor}, {tensor}"
    line = row(strange, "kgen", two, f"[ONNX Layer: {strange}]\x1e[ONNX Layer: (Unnamed Layer* 3) [Shuffle]]")
    (layer,) = layers_from_log([f"Layers:\n{line}\n\nI/O Tensors:\n Name: x, LayerType: y"])
    assert layer.name == strange
    assert layer.inputs == layer.constants == ("int8", "int8")
    assert layer.nodes == (strange, "(Unnamed Layer* 3) [Shuffle]")
    assert layer.outputs == ()


def test_the_spelling_of_10_is_read_too() -> None:
    line = (
        "Name: /fc_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,40], Format/Datatype: Int8 }], "
        "Outputs: [ { Name: y, Dimensions: [1,4], Format/Datatype: Half }], TacticName: t, Metadata: [ONNX Layer: fc]"
    )
    (layer,) = layers_from_log([f"Layers:\n{line}\n"])
    assert (layer.inputs, layer.outputs, layer.precision) == (("int8",), ("fp16",), "int8")


# The inspector's JSON


def tensor(name: str, kind: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [8, 64, 56, 56], key: kind}


WIDE = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"
LINEAR = "Row major linear FP32"


def convolution(name: str, inputs: Sequence[str], weights: str, output: str, **more: Any) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor(f"x{i}", kind) for i, kind in enumerate(inputs)],
        "Outputs": [tensor("y", output)],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "Weights": {"Type": weights, "Count": 36864},
        "Bias": {"Type": "Float", "Count": 64},
        **more,
    }


OLD = [
    {
        "Name": "input_QuantizeLinear",
        "LayerType": "Reformat",
        "Inputs": [tensor("input", LINEAR)],
        "Outputs": [tensor("q", "Row major Int8 format")],
        "Origin": "QDQ",
    },
    {
        **convolution("w0 + w0_QuantizeLinear + stem + PWN(relu0)", [WIDE], "", WIDE),
        "LayerType": "ConvActPool",
        "Weights": {},
        "Bias": {"Type": "Float", "Count": 0},
        "ConvWeights": {"Type": "Int8", "Count": 9408},
        "ConvBias": {"Type": "Float", "Count": 64},
    },
    convolution("w1 + w1_QuantizeLinear + conv1 + relu1", [WIDE], "Int8", WIDE),
    convolution("w2 + w2_QuantizeLinear + conv2 + add + relu2", [WIDE, WIDE], "Int8", WIDE),
    {"Name": "pool", "LayerType": "CudaPooling", "Inputs": [tensor("p", WIDE)], "Outputs": [tensor("f", WIDE)]},
    convolution("k + k_QuantizeLinear + fc + kb + (Unnamed Layer* 36) [ElementWise]", [WIDE], "Int8", LINEAR),
    {"Name": "copied_squeeze", "LayerType": "NoOp", "Inputs": [tensor("y", LINEAR)], "Outputs": [tensor("z", LINEAR)]},
]


def inspected(layers: Sequence[Any]) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["input", "logits"]})


def test_nodes_are_read_from_names_where_an_old_inspector_has_no_metadata() -> None:
    layers, warnings = attribute(layers_from_inspector(inspected(OLD)), plan())
    assert warnings == ()
    assert [layer.module for layer in layers] == [
        "",
        "net.stem + net.relu0",
        "net.conv1 + net.relu1",
        "net.conv2 + net.add + net.relu2",
        "net.pool",
        "net.fc",
        "",
    ]
    assert [layer.precision for layer in layers] == ["fp32", "int8", "int8", "int8", "int8", "int8", "fp32"]
    assert layers[1].constants == ("int8", "fp32")


def test_an_old_inspector_tells_float_layers_and_skips() -> None:
    changed = [*OLD]
    changed[2] = convolution("w1 + conv1 + relu1", [HALF], "Half", WIDE)
    changed[3] = convolution("w2 + w2_QuantizeLinear + conv2 + add + relu2", [WIDE, HALF], "Int8", WIDE)
    changed[4] = {**OLD[4], "Inputs": [tensor("p", HALF)], "Outputs": [tensor("f", HALF)]}
    assert attribute(layers_from_inspector(inspected(changed)), plan())[1] == (
        "net.conv1 (Conv) was planned in int8 and runs in fp16",
        "the skip input of net.add (Add) was planned in int8 and is loaded as fp16",
        "net.pool (GlobalAveragePool) was planned in int8 and runs in fp16",
    )


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        (WIDE, "int8"),
        ("Channel major INT8 format where channel % 16 == 0", "int8"),
        (HALF, "fp16"),
        ("Half", "fp16"),
        (f"{LINEAR}.", "fp32"),
        ("Channel major FP32 format where channel % 4 == 0", "fp32"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Row major linear FP8 format", "fp8"),
        ("Row major linear Int32", "int32"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major linear BOOL", "bool"),
        ("Unknown format", "unknown"),
    ],
)
def test_formats_of_all_ages_become_one_word(stated: str, wanted: str) -> None:
    for key in ("Format/Datatype", "Datatype", "Format"):
        entry = {"Name": "n", "LayerType": "Reformat", "Inputs": [tensor("x", stated, key)], "Outputs": []}
        (layer,) = layers_from_inspector(inspected([entry]))
        assert layer.inputs == (wanted,)


def test_a_data_type_of_its_own_goes_before_the_format() -> None:
    both = {"Name": "x", "Datatype": "Half", "Format": "Channel major FP32 format"}
    (layer,) = layers_from_inspector(inspected([{"Name": "n", "LayerType": "kgen", "Inputs": [both]}]))
    assert layer.inputs == ("fp16",)


def test_metadata_is_read_control_characters_and_all() -> None:
    text = inspected([convolution("fused", [WIDE], "Int8", WIDE, Metadata="@@")])
    raw = text.replace("@@", "[ONNX Layer: w1_QuantizeLinear]\x1e[ONNX Layer: conv1]\x1f[ONNX Layer: relu1]")
    (layer,) = layers_from_inspector(raw)
    assert layer.nodes == ("w1_QuantizeLinear", "conv1", "relu1")


def test_constants_of_a_new_inspector_are_read() -> None:
    entry = {
        "Name": "c_myl0_1",
        "LayerType": "correlation",
        "Inputs": [tensor("x", "Int8", "Datatype")],
        "Constants": [tensor("w", "Int8", "Datatype"), tensor("s", "Float", "Datatype")],
        "Outputs": [tensor("y", "Float", "Datatype")],
        "Metadata": "[ONNX Layer: conv1]",
    }
    (layer,) = layers_from_inspector(inspected([entry]))
    assert (layer.constants, layer.precision) == (("int8", "fp32"), "int8")


def test_names_alone_are_one_warning() -> None:
    names = ["w1 + conv1 + relu1", "pool", "fc"]
    layers, warnings = attribute(layers_from_inspector(inspected(names)), plan())
    assert [layer.name for layer in layers] == names
    assert {layer.precision for layer in layers} == {"unknown"}
    assert [layer.module for layer in layers] == ["net.conv1 + net.relu1", "net.pool", "net.fc"]
    assert len(warnings) == 1
    assert "whether it computes in int8 is not known" in warnings[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"Layers": 3}', '{"Layers": []}', '{"Bindings": []}', "\x00"])
def test_what_is_no_list_of_layers_gives_none(text: str) -> None:
    assert layers_from_inspector(text) == ()
    (complaint,) = attribute((), plan())[1]
    assert "whether it computes in int8 is not known" in complaint
    assert attribute((), plan(kept=[one.node for one in plan()]))[1] == ()


def test_entries_that_lack_anything_are_read_as_far_as_they_go() -> None:
    layers = layers_from_inspector(
        inspected([{}, {"Name": "a", "Inputs": None, "Weights": 3}, 7, {"Inputs": ["x", {}]}])
    )
    assert [layer.name for layer in layers] == ["", "a", ""]
    assert layers[2].inputs == ("unknown",)


def test_inside_a_dla_nothing_is_known_and_nothing_is_claimed() -> None:
    whole = {
        "Name": "{ForeignNode[stem...fc]}",
        "LayerType": "DLA",
        "Inputs": [tensor("x", "Four wide channel vectorized row major Int8 format")],
        "Outputs": [tensor("y", "Sixteen wide channel vectorized row major FP16 format")],
    }
    (layer,), warnings = attribute(layers_from_inspector(inspected([whole])), plan(), "dla0")
    assert layer.nodes == tuple(one.node for one in plan())
    assert (layer.precision, warnings, untold((layer,), plan())) == ("unknown", (), ())
    part = {**whole, "Name": "{ForeignNode[stem...pool]}"}
    rest = convolution("k + fc", [HALF], "Half", LINEAR)
    assert attribute(layers_from_inspector(inspected([part, rest])), plan())[1] == (
        "net.fc (Gemm) was planned in int8 and runs in fp16",
    )


def test_what_runs_beside_the_dla_is_named() -> None:
    """TensorRT falls back to the GPU without an error, and such an engine is int8 all the same."""
    layers = layers_from_inspector(inspected(OLD))
    assert attribute(layers, plan(), "gpu")[1] == ()
    everything = ", ".join(f"net.{name}" for name in ("stem", "conv1", "conv2", "add", "pool", "fc"))
    assert attribute(layers, plan(), "dla0")[1] == (
        f"the engine is for a DLA, and these layers run on the GPU: {everything}",
    )
    inside = {
        "Name": "{ForeignNode[stem...pool]}",
        "LayerType": "DLA",
        "Inputs": [tensor("x", "Four wide channel vectorized row major Int8 format")],
        "Outputs": [tensor("y", WIDE)],
    }
    layers = layers_from_inspector(inspected([inside, OLD[-2]]))
    for kept in ((), ("fc",)):  # what is planned in float is to run there too
        assert attribute(layers, plan(kept=kept), "dla1")[1] == (
            "the engine is for a DLA, and these layers run on the GPU: net.fc",
        )


DYNAMIC = "N/A due to dynamic shapes"


def test_formats_that_are_not_told_are_no_complaint_where_weights_are_int8() -> None:
    """As TensorRT lists an engine with a free batch; the types of the weights stand there all the same."""
    text = re.sub(r'"Format/Datatype": "[^"]*"', f'"Format/Datatype": "{DYNAMIC}"', inspected(OLD))
    assert text.count(DYNAMIC) > 10
    layers, warnings = attribute(layers_from_inspector(text), plan())
    assert warnings == ()
    assert {layer.precision for layer in layers if layer.constants} == {"int8"}
    assert untold(layers, plan()) == (
        "the engine does not tell what these layers, planned in int8, run in: net.add, net.pool",
    )
    assert untold(attribute(layers_from_inspector(inspected(OLD)), plan())[0], plan()) == ()


def test_float_weights_are_a_complaint_whether_formats_are_told_or_not() -> None:
    changed = [*OLD]
    changed[2] = convolution("w1 + conv1 + relu1", [DYNAMIC], "Half", DYNAMIC)
    warnings = attribute(layers_from_inspector(inspected(changed)), plan())[1]
    assert warnings == ("net.conv1 (Conv) was planned in int8 and runs in fp16",)


def test_what_another_engine_hides_is_one_warning() -> None:
    hidden = {
        "Name": "{ForeignNode[stem...fc]}",
        "LayerType": "Myelin",
        "Inputs": [tensor("x", LINEAR)],
        "Outputs": [tensor("y", LINEAR)],
    }
    (warning,) = attribute(layers_from_inspector(inspected([hidden])), plan())[1]
    assert "does not tell" in warning


def test_moves_may_vanish_into_strides() -> None:
    moves = [LayerPlan("slice", "Slice", "net.down", "int8", ""), LayerPlan("pad", "Pad", "net.down", "int8", "")]
    assert attribute(layers_from_log([log("identity")]), [*plan(), *moves])[1] == ()
