"""How large the tensors of a model get, as far as onnx can tell without computing them."""

from __future__ import annotations

import math

import onnx

from edgeres.errors import ExportError
from edgeres.export.shapes import shapes_of

LARGEST = 1 << 30  # numbers at a time, 4 GiB in float32: ResNet-50 holds 1.2 GiB for a frame of 2160 × 3840 pixels
BATCH = 1  # of images, where it is open
# onnxruntime writes these over an input that nothing else reads, or joins them to the convolution in front.
IN_PLACE = (
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish", "BatchNormalization", "Add", "Sub"),
    *("Mul", "Div", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
)


def check_sizes(model: onnx.ModelProto, size: tuple[int, int] | None, where: str) -> None:
    """Refuse a model whose tensors would fill the memory when it is run.

    Args:
        size: (height, width) in pixels, for a file that leaves them open.

    Raises:
        ExportError: with the largest tensor; ``where`` names the model.
    """
    shapes = shapes_of(_closed(model, size))
    sizes = {name: _numbers(shape) for name, shape in shapes.items()}
    sizes.update((tensor.name, 0) for tensor in model.graph.initializer)  # which are in the file already
    live, largest = _most_alive(model.graph, sizes)
    if live > LARGEST:
        raise ExportError(
            f"{where} would hold {live:,} numbers at a time, more than {LARGEST:,}; the largest tensor is {largest}, "
            f"{'×'.join(map(str, shapes[largest]))}. Export it for smaller images, or a smaller batch."
        )


def _closed(model: onnx.ModelProto, size: tuple[int, int] | None) -> onnx.ModelProto:
    """Return a copy whose images have a batch and, where it is known, a size."""
    closed = onnx.ModelProto()
    closed.CopyFrom(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in (value for value in closed.graph.input if value.name not in constants):
        dims = value.type.tensor_type.shape.dim
        last = len(dims) == 4 and dims[3].dim_value == 3
        wanted = (BATCH, *size, 3) if size and last else (BATCH, 3, *size) if size else (BATCH,)
        for dim, extent in zip(dims, wanted, strict=False):
            if dim.dim_value <= 0:
                dim.dim_value = extent
    return closed


def _numbers(shape: list[int | str | None]) -> int:
    """Return how many numbers a tensor has; 0 where that is not known."""
    return math.prod(abs(extent) if isinstance(extent, int) else 0 for extent in shape)


def _most_alive(graph: onnx.GraphProto, sizes: dict[str, int]) -> tuple[int, str]:
    """Return the most numbers that are still to be read at a time, and the largest tensor."""
    last = {name: at for at, node in enumerate(graph.node) for name in node.input}
    last.update((value.name, len(graph.node)) for value in graph.output)
    ends: dict[int, int] = {}
    alive = most = sum(sizes.get(value.name, 0) for value in graph.input)
    for at, node in enumerate(graph.node):
        over = _written_over(node, sizes, {name for name in node.input if last[name] == at})
        for name in node.output:
            alive += sizes.get(name, 0)
            ends[last.get(name, at)] = ends.get(last.get(name, at), 0) + sizes.get(name, 0)
        most = max(most, alive - over)
        alive -= ends.pop(at, 0)
    return most, max(sizes, key=lambda name: sizes[name], default="")


def _written_over(node: onnx.NodeProto, sizes: dict[str, int], dying: set[str]) -> int:
    """Return how many numbers of a node's output need no room beside its inputs."""
    made = sizes.get(node.output[0], 0) if node.output else 0
    return made if node.op_type in IN_PLACE and any(sizes.get(name, 0) == made for name in dying) else 0
