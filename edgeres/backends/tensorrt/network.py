"""From an ONNX file to TensorRT's network, with everything checked that TensorRT takes without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional, Tuple

from edgeres.backends.tensorrt.logger import Record
from edgeres.backends.tensorrt.module import member, version
from edgeres.backends.tensorrt.records import BuildRequest
from edgeres.backends.tensorrt.versions import typing_of
from edgeres.errors import BackendError

SHOWN = 5


def create_network(trt: Any, builder: Any, record: Record) -> Any:
    """Return an empty network, with the creation flags that this version's typing wants.

    Raises:
        BackendError: the builder makes none.
    """
    policy = typing_of(version(trt))
    members = [member(trt.NetworkDefinitionCreationFlag, name) for name in policy.network_flags]
    known = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in policy.flags_if_known]
    members.extend(flag for flag in known if flag is not None)
    flags = 0
    for flag in members:
        flags |= 1 << int(flag)
    network = builder.create_network(flags)
    if network is None:
        raise BackendError(f"TensorRT made no network: {record.last_words()}. See what is missing: edgeres doctor")
    return network


def parse(trt: Any, network: Any, logger: Any, path: str, record: Record, content: Optional[bytes] = None) -> Any:
    """Read an ONNX file into ``network``; return the parser, which must live as long as the network.

    Args:
        content: another form of the file, which is read in its place.

    Raises:
        BackendError: the file cannot be read, is no ONNX model, or holds what TensorRT refuses; every refusal is named.
    """
    try:
        with open(path, "rb") as stream:
            empty = not stream.read(1)
    except OSError as problem:
        raise BackendError(f"cannot read {path}: {problem.strerror}. Build the bundle again.") from None
    if empty:
        raise BackendError(f"{path} is empty. Build the bundle again.")
    parser = trt.OnnxParser(network, logger)
    accepted = parser.parse_from_file(path) if content is None else parser.parse(content)
    problems = [_error(parser.get_error(index)) for index in range(parser.num_errors)]
    if not accepted or problems:
        listed = list(dict.fromkeys(problems)) or [record.last_words()]
        more = [f"and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
        text = "\n".join(f"  - {line}" for line in [*listed[:SHOWN], *more])
        name = Path(path).name
        raise BackendError(
            f"TensorRT does not accept {name}:\n{text}\nIf edgeres wrote this file, build the bundle again; a model of "
            "your own must be made of what TensorRT supports."
        )
    return parser


def check_network(network: Any, request: BuildRequest) -> None:
    """Refuse a parsed network that is not the one that was asked for: TensorRT parses a text file without complaint.

    Raises:
        BackendError: inputs or outputs are missing or others, listed all at once.
    """
    name = Path(request.onnx).name
    if not network.num_inputs or not network.num_outputs or not network.num_layers:
        raise BackendError(
            f"{name} holds no network: {network.num_inputs} inputs, {network.num_outputs} outputs, "
            f"{network.num_layers} layers. It is damaged, or no ONNX file. Build the bundle again."
        )
    problems: List[str] = []
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if [tensor.name for tensor in inputs] != [request.input_name]:
        problems.append(f"its inputs are {', '.join(tensor.name for tensor in inputs)}, not {request.input_name} alone")
    if network.num_outputs != 1:
        problems.append(f"it has {network.num_outputs} outputs; one, the logits, is what can be run")
    shape = tuple(inputs[0].shape)
    if shape[1:] != tuple(request.shape):
        problems.append(f"a sample of its input is {_dims(shape[1:])}, the recipe's is {_dims(request.shape)}")
    elif shape[0] != -1 and set(request.batch) != {shape[0]}:
        problems.append(
            f"its batch is fixed to {shape[0]}, but {_dims(request.batch, '/')} was asked for (min/opt/max)"
        )
    if problems:
        raise BackendError(
            f"{name} is not the model that was asked for: {'; '.join(problems)}. Build the bundle again."
        )


def add_profile(builder: Any, config: Any, network: Any, request: BuildRequest, record: Record) -> Any:
    """Give a network with a free batch its optimization profile; return it, or None where the batch is fixed.

    Raises:
        BackendError: TensorRT refuses the profile.
    """
    tensor = network.get_input(0)
    if tensor.shape[0] != -1:
        return None
    profile = builder.create_optimization_profile()
    if profile is None:
        raise BackendError(f"TensorRT made no optimization profile: {record.last_words()}. Try another version.")
    low, best, high = ((batch, *request.shape) for batch in request.batch)
    profile.set_shape(request.input_name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"TensorRT refuses the batch sizes {_dims(request.batch, '/')} (min/opt/max) for {request.input_name}: "
            f"{record.last_words()}. Choose others in the recipe."
        )
    return profile


def _dims(numbers: Tuple[int, ...], between: str = "×") -> str:
    return between.join(str(number) for number in numbers)


def _error(error: Any) -> str:
    """Return one refusal of the parser in a line; from TensorRT 10 on it names the node."""
    operator = getattr(error, "node_operator", None)
    name = getattr(error, "node_name", None)
    place = f"node {error.node()}" if error.node() >= 0 else "the file"
    if operator is not None and name is not None and (operator() or name()):
        place = f"{operator() or 'node'} {name() or error.node()}"
    return f"{place}: {' '.join(str(error.desc()).split())}"
