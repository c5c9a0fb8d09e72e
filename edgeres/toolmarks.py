"""Which tool quantized an ONNX file, told by the marks that it leaves; no file says so in words that all agree on."""

from __future__ import annotations

from typing import Collection

ORT = "ONNX Runtime's quantizer (alone, or within modelopt)"  # modelopt's own path for ONNX files runs it
# What a tool's files have in their producer's name, in a key of their metadata, or in the names of their tensors.
PRODUCERS = {"onnx.quantize": ORT, "modelopt": "modelopt", "nncf": "NNCF", "edgeres": "edgeres"}
KEYS = {"onnx.infer": ORT, "nncf.": "NNCF", "edgeres.": "edgeres"}
TENSORS = {"dq_output_": "NNCF", "input_quantizer/": "modelopt"}


def tool_of(producer: str, keys: Collection[str], tensors: Collection[str]) -> str:
    """Return the name of the tool that quantized a file; empty where nothing tells.

    Args:
        producer: the file's own word for what wrote it.
        keys: of its metadata.
        tensors: the names of what its DequantizeLinear nodes put out.
    """
    for marks, found in ((TENSORS, tensors), (KEYS, keys), (PRODUCERS, (producer.lower(),))):
        for mark, tool in marks.items():
            if any(mark in text for text in found):
                return tool
    return ""
