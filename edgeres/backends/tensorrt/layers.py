"""What a built engine really computes in: the builder's own table of layers, read, and held against the plan.

Two sources, one result: the engine inspector (a GPU is needed to load the engine), and the table that a verbose build
log holds where ``profiling_verbosity`` was DETAILED (no GPU is needed). Between 8.5 and 11 they differ in which keys
they have and in how they spell types; here all is spelled as in ``int8``, ``fp16``, ``fp32``.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import msgspec

from edgeres.artifacts import LayerPlan
from edgeres.backends.tensorrt.records import EngineLayer

SPELLINGS: Mapping[str, str] = {
    "int8": "int8",
    "half": "fp16",
    "fp16": "fp16",
    "float": "fp32",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "fp8": "fp8",
    "fp4": "fp4",
    "int4": "int4",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "bool": "bool",
}
"""TensorRT's words for a type, in lower case, also within a format's ("Row major linear FP32") → ours."""
UNKNOWN = "unknown"
FLOATS = ("fp32", "bf16", "fp16", "fp8", "fp4")  # widest first
WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
WEIGHTED_TYPES = re.compile(r"conv|correlation|gemm|matmul|matrix|fullyconnected|fusion", re.IGNORECASE)
NOTHING_TOLD = (
    "nothing tells the types of the engine's layers, so whether it computes in int8 is not known. Compile it where "
    "the engine can be opened, with a GPU and cuda-python or pycuda: edgeres doctor"
)
MOVES = ("Slice", "Pad")  # a builder may turn them into strides; then no layer is left that mentions them
OPAQUE = re.compile(r"\{ForeignNode\[(.+)\]\}", re.DOTALL)


def layers_from_log(messages: Sequence[str]) -> Tuple[EngineLayer, ...]:
    """Return the layers of the last table in a verbose build log; none where there is no table."""
    found: Tuple[EngineLayer, ...] = ()
    for message in messages:
        for block in re.split(r"^Layers:[ \t]*\n?", message, flags=re.MULTILINE)[1:]:
            rows: List[EngineLayer] = []
            for line in block.split("\n"):  # not splitlines(): names may be set apart by control characters
                layer = _row(line)
                if layer is None:
                    break
                rows.append(layer)
            found = tuple(rows) or found
    return found


def _row(line: str) -> Optional[EngineLayer]:
    """Return the layer of one line: ``Name: …, LayerType: …, Inputs: [ {…}, …], Constants: […], Outputs: […], …``.

    Names are free text, with commas and brackets of their own, so only the words between the parts are relied on.
    """
    parts = _parts(line, ("Name: ", ", LayerType: ", ", Inputs: [", ", Constants: [", ", Outputs: [", ", Metadata: "))
    if not line.startswith("Name: ") or ", LayerType: " not in parts:
        return None
    tensors = [_row_types(parts.get(f", {part}: [", "")) for part in ("Inputs", "Constants", "Outputs")]
    return _layer(parts["Name: "], parts[", LayerType: "], tensors, parts.get(", Metadata: ", ""))


def _parts(line: str, marks: Sequence[str]) -> Dict[str, str]:
    """Return what follows each mark, up to the next one; marks that are missing, or out of order, are left out."""
    starts: List[Tuple[str, int]] = []
    place = 0
    for mark in marks:
        found = line.rfind(mark) if mark == ", Metadata: " else line.find(mark, place)
        if found >= place:
            place = found + len(mark)
            starts.append((mark, place))
    ends = [start - len(mark) for mark, start in starts[1:]] + [len(line)]
    return {mark: line[start:end] for (mark, start), end in zip(starts, ends)}


def _row_types(text: str) -> Tuple[str, ...]:
    """Return the types of one list of tensors; each type stands behind the tensor's dimensions."""
    tensors = text.split("{ Name: ")[1:]
    stated = [re.search(r"Datatype: ([^,}]+)", tensor[max(tensor.rfind(", Dimensions: ["), 0) :]) for tensor in tensors]
    return tuple(_spelled(found.group(1)) if found else UNKNOWN for found in stated)


def layers_from_inspector(text: str) -> Tuple[EngineLayer, ...]:
    """Return the layers that the engine inspector lists as JSON; none where the text is no such list.

    An engine that was built with less than DETAILED verbosity gives names only: those layers are of type "", and their
    precision is ``unknown``. It is "" for layers without tensors, such as those that wait for another stream.
    """
    try:
        content = json.loads(text, strict=False)  # some versions leave control characters between the ONNX layers
    except ValueError:
        return ()
    entries = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return ()
    return tuple(_entry(entry) for entry in entries if isinstance(entry, (str, dict)))


def _entry(entry: Any) -> EngineLayer:
    if isinstance(entry, str):
        return _layer(entry, "", [(), (), ()], "")
    constants = [*_entry_types(entry.get("Constants"))]
    for part in ("Weights", "Bias"):  # ConvWeights and ConvBias where a convolution is fused with a pooling
        for key, value in entry.items():
            if key.endswith(part) and isinstance(value, dict) and value.get("Count") != 0 and "Type" in value:
                constants.append(_spelled(str(value["Type"])))
    tensors = [_entry_types(entry.get("Inputs")), tuple(constants), _entry_types(entry.get("Outputs"))]
    return _layer(
        str(entry.get("Name", "")), str(entry.get("LayerType", "")), tensors, str(entry.get("Metadata") or "")
    )


def _entry_types(tensors: Any) -> Tuple[str, ...]:
    if not isinstance(tensors, list):
        return ()
    found = []
    for tensor in (one for one in tensors if isinstance(one, dict)):
        stated = (tensor.get(key) for key in ("Datatype", "Format/Datatype", "Format"))
        found.append(next((_spelled(str(value)) for value in stated if value), UNKNOWN))
    return tuple(found)


def _layer(name: str, kind: str, tensors: Sequence[Tuple[str, ...]], metadata: str) -> EngineLayer:
    inputs, constants, outputs = tensors
    pieces = metadata.split("[ONNX Layer: ")[1:]
    nodes = tuple(dict.fromkeys(piece[: piece.rfind("]")] for piece in pieces if "]" in piece))
    precision = UNKNOWN if _is_opaque(name, kind) else _precision(kind, inputs, constants, outputs)
    return EngineLayer(name, kind, precision, inputs, constants, outputs, nodes)


def _is_opaque(name: str, kind: str) -> bool:
    """Whether a layer stands for many that another compiler made, of which only what goes in and out is told."""
    return _on_dla(kind) or bool(OPAQUE.search(name))


def _on_dla(kind: str) -> bool:
    return "dla" in kind.lower()


def _spelled(stated: str) -> str:
    """Return our word for the type that TensorRT states, alone or within the words of a format."""
    words = (SPELLINGS.get(word) for word in re.findall(r"[a-z]+[0-9]*", stated.lower()))
    return next((word for word in words if word), UNKNOWN)


def _precision(kind: str, inputs: Sequence[str], constants: Sequence[str], outputs: Sequence[str]) -> str:
    """Return what a layer computes in: int8 where its weights are int8 too, else what it reads, else what it writes."""
    weights_are_told = bool(constants) or not WEIGHTED_TYPES.search(kind)
    if WEIGHTED_TYPES.search(kind) and constants and not {*inputs, *outputs} - {UNKNOWN}:
        return "int8" if "int8" in constants else constants[0]  # formats are not told; weights meet their own type
    if "int8" in inputs and ("int8" in constants or not weights_are_told):
        return "int8"
    if {*inputs, *outputs} == {"int8"}:
        return "int8"
    for types in (inputs, outputs):
        wide = [one for one in FLOATS if one in types]
        if wide:
            return wide[0]
    return next(iter((*inputs, *outputs)), "" if kind else UNKNOWN)


def attribute(
    layers: Sequence[EngineLayer], plan: Sequence[LayerPlan], target: str = "gpu"
) -> Tuple[Tuple[EngineLayer, ...], Tuple[str, ...]]:
    """Return the layers with the torch modules they came from, and what does not run as the plan means it to.

    A warning names each layer that was planned in int8 and is not, each residual skip that is not loaded as int8, each
    of them that the engine does not mention, and what was to run on a DLA and does not. Layers inside a DLA are
    reported as one, so nothing else is said of them. An engine of which nothing is known is one warning; of what is
    known in part, :func:`untold` tells.

    Args:
        layers: as the builder reported them; where ``nodes`` is empty (TensorRT 8.5) they are read from the name.
        plan: what was decided for each ONNX node.
        target: ``gpu``, ``dla0`` or ``dla1``.
    """
    order = {one.node: index for index, one in enumerate(plan)}
    named = [msgspec.structs.replace(one, nodes=one.nodes or _nodes_of_name(one.name, order)) for one in layers]
    result = tuple(msgspec.structs.replace(one, module=_module(one, plan, order)) for one in named)
    meant = [one for one in plan if one.precision.startswith("int8")]
    mentions = _mentions(result)
    warnings = _beside_the_dla(plan, mentions) if target.startswith("dla") and result else []
    if not meant:
        return result, tuple(warnings)
    if not any({*one.inputs, *one.outputs, *one.constants} - {UNKNOWN} for one in result):
        return result, (*warnings, NOTHING_TOLD)
    planned = {one.node: one for one in plan}
    warnings += [_complaint(one, mentions.get(one.node, []), planned) for one in meant]
    return result, tuple(dict.fromkeys(warning for warning in warnings if warning))


def untold(layers: Sequence[EngineLayer], plan: Sequence[LayerPlan]) -> Tuple[str, ...]:
    """Return a sentence that names what was planned in int8 and whose types the engine does not tell; none where there
    is nothing of the kind, or where nothing is told at all: :func:`attribute` says that.

    Args:
        layers: from :func:`attribute`.
        plan: what was decided for each ONNX node.
    """
    mentions = _mentions(layers)
    silent = [
        one.module or one.node
        for one in plan
        if one.precision.startswith("int8") and _silent(one, mentions.get(one.node, []))
    ]
    if not silent or len(silent) == sum(one.precision.startswith("int8") for one in plan):
        return ()
    return (f"the engine does not tell what these layers, planned in int8, run in: {', '.join(dict.fromkeys(silent))}",)


def _mentions(layers: Sequence[EngineLayer]) -> Dict[str, List[EngineLayer]]:
    found: Dict[str, List[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            found.setdefault(node, []).append(layer)
    return found


def _beside_the_dla(plan: Sequence[LayerPlan], mentions: Mapping[str, Sequence[EngineLayer]]) -> List[str]:
    """Return a warning of what computes on the GPU although the engine was built for a DLA."""
    computing = [one for one in plan if one.op in WEIGHTED_OPS or one.precision.startswith("int8")]
    beside = [
        one.module or one.node
        for one in computing
        if one.node in mentions and not any(_on_dla(layer.type) for layer in mentions[one.node])
    ]
    names = ", ".join(dict.fromkeys(beside))
    return [f"the engine is for a DLA, and these layers run on the GPU: {names}"] if beside else []


def _nodes_of_name(name: str, order: Mapping[str, int]) -> Tuple[str, ...]:
    """Return the ONNX nodes in a layer's name: ``weight + Q + Conv + PWN(Relu)``, or ``{ForeignNode[a...b]}``."""
    opaque = OPAQUE.search(name)
    if opaque:
        first, _, last = opaque.group(1).partition("...")
        if first in order and last in order:
            return tuple(node for node, index in order.items() if order[first] <= index <= order[last])
        return tuple(node for node in (first, last) if node in order)
    found: List[str] = []
    for token in re.split(r" \+ | \|\| ", name):
        inner = [token]
        if token.startswith("PWN("):
            inner = [re.sub(r"^(PWN\()+", "", one).rstrip(")") for one in token.split(", ")]
        found.extend(one.strip() for one in inner)
    return tuple(dict.fromkeys(one for one in found if one in order))


def _module(layer: EngineLayer, plan: Sequence[LayerPlan], order: Mapping[str, int]) -> str:
    indices = sorted(order[node] for node in layer.nodes if node in order)
    return " + ".join(dict.fromkeys(plan[index].module for index in indices if plan[index].module))


def _complaint(wanted: LayerPlan, found: Sequence[EngineLayer], planned: Mapping[str, LayerPlan]) -> str:
    """Return what is wrong with the way a node runs that was planned in int8; an empty string where nothing is."""
    who = f"{wanted.module or wanted.node} ({wanted.op})"
    if any(_on_dla(layer.type) for layer in found) or _silent(wanted, found):
        return ""
    if not found:
        return "" if wanted.op in MOVES else f"{who} was planned in int8, but no layer of the engine mentions it"
    if any(OPAQUE.search(layer.name) for layer in found):
        return f"{found[0].name}: the engine does not tell what runs in int8 inside this layer"
    if wanted.op in WEIGHTED_OPS:
        doing = [layer for layer in found if WEIGHTED_TYPES.search(layer.type)] or list(found)
        if any(_computes_in_int8(layer) for layer in doing):
            return ""
        return f"{who} was planned in int8 and runs in {doing[0].precision}"
    if wanted.precision == "int8 skip":
        if any(_has_int8_skip(layer, planned) for layer in found):
            return ""
        return f"the skip input of {who} was planned in int8 and is loaded as {_widest(found[0].inputs)}"
    if any("int8" in (*layer.inputs, *layer.outputs) for layer in found):
        return ""
    return f"{who} was planned in int8 and runs in {found[0].precision}"


def _computes_in_int8(layer: EngineLayer) -> bool:
    """Whether a weighted layer multiplies int8 by int8, by what is told of it: its weights where its input is not."""
    if not {*layer.inputs} - {UNKNOWN}:
        return "int8" in layer.constants
    return "int8" in layer.inputs and ("int8" in layer.constants or not layer.constants)


def _silent(wanted: LayerPlan, found: Sequence[EngineLayer]) -> bool:
    """Whether the layers of a node leave open what it runs in: formats that are not told, and no int8 weights."""
    doing = list(found)
    if wanted.op in WEIGHTED_OPS:
        doing = [layer for layer in found if WEIGHTED_TYPES.search(layer.type)] or doing
        if any({*layer.constants} - {UNKNOWN} for layer in doing):
            return False
    return bool(doing) and all(
        UNKNOWN in layer.inputs and not {*layer.inputs, *layer.outputs} - {UNKNOWN} for layer in doing
    )


def _has_int8_skip(layer: EngineLayer, planned: Mapping[str, LayerPlan]) -> bool:
    """Whether an addition's layer gets its skip as int8: loads it, or rounds it itself and never stores it wider.

    In the second case, the skip's Q and DQ are both in the layer; so are those in front of a pool, and of the values
    that are moved for the next skip, where these are fused behind the addition.
    """
    if WEIGHTED_TYPES.search(layer.type):  # the convolution's own input is int8 as well
        return layer.inputs.count("int8") >= min(2, max(len(layer.inputs), 1))
    if "int8" in layer.inputs:
        return True
    weights = {f"{one.module}.weight" for one in planned.values()}
    made = {node[: -len("_QuantizeLinear")] for node in layer.nodes if node.endswith("_QuantizeLinear")}
    pairs = [tensor for tensor in made - weights if f"{tensor}_DequantizeLinear" in layer.nodes]
    int8 = [planned[node].op for node in layer.nodes if node in planned and planned[node].precision == "int8"]
    behind = sum(op not in (*WEIGHTED_OPS, *MOVES) for op in int8) + any(op in MOVES for op in int8)
    return len(pairs) > behind


def _widest(types: Sequence[str]) -> str:
    return next((one for one in FLOATS if one in types), UNKNOWN)
