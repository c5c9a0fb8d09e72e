"""What no TensorRT reads of standard ONNX, refused by name before any work is spent on it.

Source: onnx-tensorrt, docs/operators.md, from TensorRT 8.5 on: the operators that no release has an importer for.
"""

from __future__ import annotations

import onnx

from edgeres.errors import ExportError, few

INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
UNREAD = (
    *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
    *("SequenceMap", "ConcatFromSequence", "SplitToSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *("StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder"),
    *("BitShift", "Compress", "Det", "DFT", "STFT", "MelWeightMatrix", "MaxRoiPool", "MaxUnpool", "Shrink", "Unique"),
)
ANSWERS = ("ArgMax", "ArgMin", "TopK")
SHOWN = 5


def check_operators(model: onnx.ModelProto, where: str) -> None:
    """Refuse operators that TensorRT has no form of, and classifiers that end in the choice of a class.

    Raises:
        ExportError: names every one, with its node; ``where`` names the model.
    """
    outputs = {value.name for value in model.graph.output}
    read, live = set(outputs), []
    for node in reversed(model.graph.node):  # what no output depends on is dropped later
        if read.intersection(node.output):
            read.update(name for name in node.input if name)
            live.append(node)
    nodes = [node for node in reversed(live) if node.domain in ("", "ai.onnx")]
    found = [node for node in nodes if node.op_type in UNREAD]
    if found:
        raise ExportError(
            f"{where} has operators that no TensorRT reads: {named(found)}. Export it without them: lists of tensors, "
            "text and results whose size depends on the values have no place in an engine."
        )
    indices = [node for node in nodes if node.op_type == "MaxPool" and read.intersection(node.output[1:])]
    if indices:
        raise ExportError(
            f"{where} reads the indices of a pooling, which no TensorRT gives: {named(indices)}. Export it without."
        )
    choices = [node for node in nodes if node.op_type in ANSWERS and outputs.intersection(node.output)]
    if choices:
        raise ExportError(
            f"{where} answers with its choice of a class and not with logits: {named(choices)}. "
            "Export a module that returns what stands in front of that."
        )


def check_integers(model: onnx.ModelProto, where: str) -> None:
    """Refuse files whose layers compute with integers, where standard Q/DQ would stand around float layers.

    Raises:
        ExportError: names the nodes; ``where`` names the model.
    """
    found = [node for node in model.graph.node if node.op_type in INTEGER or _is_integer_form(node)]
    if not found:
        return
    if any(node.op_type in ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger") for node in found):
        raise ExportError(
            f"{where} is quantized dynamically, with ranges found anew for each image, which TensorRT does not read: "
            f"{named(found)}. Start from the FP32 model; edgeres calibrates it."
        )
    raise ExportError(
        f"{where} is quantized in operators that compute with integers, which TensorRT does not read: {named(found)}. "
        "Start from the FP32 model, or quantize it to Q/DQ pairs (ONNX Runtime: quant_format=QuantFormat.QDQ)."
    )


def _is_integer_form(node: onnx.NodeProto) -> bool:
    return node.domain == "com.microsoft" and node.op_type.startswith(
        ("QLinear", "QGemm", "DynamicQuantize", "QAttention")
    )


def named(nodes: list[onnx.NodeProto]) -> str:
    """Return operators with the names of their nodes, the first few of each."""
    by_type: dict[str, list[str]] = {}
    for node in nodes:
        by_type.setdefault(node.op_type, []).append(node.name or node.output[0])
    words = []
    for op_type, names in by_type.items():
        words.append(f"{op_type} ({few(names, SHOWN)})")
    return ", ".join(words)
