"""Weights from a file into a model: every published dialect of a state dict, and never any code.

Three steps: the file becomes a flat dict of tensors, their names become the model's, and the tensors are compared with
the model's and copied only if all of them fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeres.architectures import ARCHITECTURES, Architecture, layers
from edgeres.errors import CheckpointError
from edgeres.models.containers import LONGEST_NAME, MOST_TENSORS, TooLarge, check

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
"""Keys under which training scripts keep the weights, the likeliest first; averaged ones only if alone."""

NESTING = 4
"""Wrappers inside wrappers that are opened; a file could hold a dict that holds itself."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put in front of every name."""

RENAMES = (("linear.", "fc."), (".shortcut.", ".downsample."))
"""Other authors' words for torchvision's."""

ADVICE = ("eights only", "weights_only", "pickle")
"""Words of torch's advice to unpickle a file after all."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a ``.safetensors`` file or a torch checkpoint into the model, in the model's own dtype.

    Understood: the state dict inside a training script's dict (``state_dict``, ``model`` and the like), names that all
    carry ``module.``, ``model.`` or ``_orig_mod.``, ``linear`` for ``fc`` and ``shortcut`` for ``downsample``. Batch
    norms' ``num_batches_tracked`` does not matter. Half, bfloat16 and double weights are converted.

    Torch files are read as tensors alone; code in them is not run.

    Names and shapes are all that can be compared. They are the same in ``plain20_cifar`` and ``resnet20_cifar``, whose
    shortcuts have no parameters, and in ``resnet50_v1`` and ``resnet50``.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unexpected, of another shape or dtype, NaN or
            infinite; every such tensor is named, and the member of the family that the file does fit, if there is one.
            The model is as it was.
    """
    path = Path(path)
    content = _read(path)
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    flat = _flat(content, path)
    found = _model_names(flat, wanted)
    problems = _misfits(found, wanted)
    if problems:
        rather = "" if _shapes(found) == _shapes(wanted) else _fitting(flat)
        raise CheckpointError(f"{path} does not fit the model{rather}", problems)
    converted = {name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}
    # Not strict: what may be absent is known to be harmless by now.
    model.load_state_dict(converted, strict=False)


def _read(path: Path) -> object:
    """Return what a file holds, tensors on the CPU; refuse a file whose name, size or content says it is no weights."""
    if path.suffix.lower() not in SUFFIXES:
        known = " ".join(SUFFIXES)
        raise CheckpointError(str(path), [f"weights are read from {known} files only; save them as one of these"])
    if not path.exists():
        raise CheckpointError(str(path), ["there is no such file; check the path that --weights or the recipe gives"])
    if path.is_dir():
        raise CheckpointError(str(path), ["this is a folder; name the file of weights in it"])
    if not path.is_file():
        raise CheckpointError(
            str(path), ["this is a pipe or a device, not an ordinary file; save what it gives into one"]
        )
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(str(path), ["the file is empty; copy or download it again"])
        check(path)
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as problem:  # damaged bytes make the readers raise nearly anything
        raise CheckpointError(str(path), [_why_unreadable(problem)]) from None


def _why_unreadable(problem: Exception) -> str:
    text = str(problem)
    if isinstance(problem, TooLarge):
        return f"{text}; save the weights alone: torch.save(model.state_dict(), path)"
    if isinstance(problem, PermissionError):
        return "you are not allowed to read it; change its permissions"
    if isinstance(problem, SafetensorError):
        return f"this is no intact safetensors file ({text}); copy or download it again"
    if "TorchScript" in text:
        return "this is a TorchScript program, not weights; save its state_dict(): torch.save(model.state_dict(), path)"
    named = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global) ([\w.]+)", text)
    if named:
        return (
            f"it holds more than tensors ({named.group(1) or named.group(2)}), which may be code, so nothing of it was "
            "run or read; where you trust it, save the weights alone: torch.save(model.state_dict(), path)"
        )
    # What torch says of a pickle that it does not understand is advice to unpickle it after all: not to be passed on.
    # A message without a word in it (a bare number) says nothing either.
    lines = [] if any(word in text for word in ADVICE) or text.isdigit() else text.strip().splitlines()
    reason = f" ({lines[0][:200]})" if lines else ""
    return (
        f"this is no intact torch checkpoint{reason}; copy or download it again, "
        "or save it anew: torch.save(model.state_dict(), path)"
    )


def _flat(content: object, path: Path) -> dict[str, Tensor]:
    """Return the dict of named tensors inside a file's content, out of whatever dicts it is wrapped in."""
    for _ in range(NESTING):
        if not isinstance(content, Mapping):
            break
        inner = _wrapped(content)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(_is_named_tensor(*item) for item in content.items()):
        keys = f" with the keys {list(content)[:8]}" if isinstance(content, Mapping) else ""
        held = f"{type(content).__name__}{keys}"
        raise CheckpointError(
            str(path), [f"it holds a {held} and no named tensors; save them: torch.save(model.state_dict(), path)"]
        )
    flat = {name: value for name, value in content.items() if _is_named_tensor(name, value)}
    if len(flat) > MOST_TENSORS or any(len(name) > LONGEST_NAME for name in flat):
        most = f"more than {MOST_TENSORS:,} tensors, or a name of more than {LONGEST_NAME:,} characters"
        raise CheckpointError(
            str(path), [f"it holds {most}; save the weights alone: torch.save(model.state_dict(), path)"]
        )
    return flat


def _wrapped(content: Mapping[object, object]) -> object | None:
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return content[key]
    if any(_is_named_tensor(*item) for item in content.items()):
        return None
    # An unknown wrapper is as clear as a known one, as long as only one of the entries could be meant.
    state_dicts = [
        value
        for value in content.values()
        if isinstance(value, Mapping) and value and all(_is_named_tensor(*item) for item in value.items())
    ]
    return state_dicts[0] if len(state_dicts) == 1 else None


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _model_names(found: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors under the model's names for them; a tensor that the model has no name for keeps its own."""
    found = {name: tensor for name, tensor in found.items() if not _is_step_count(name)}
    while prefix := _prefix(found, wanted):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        other = name
        for theirs, ours in RENAMES:
            # A dot in front anchors the first component of a name as well.
            other = f".{other}".replace(f".{theirs.lstrip('.')}", f".{ours.lstrip('.')}")[1:]
        is_theirs = name not in wanted and other in wanted and other not in found
        renamed[other if is_theirs else name] = tensor
    return renamed


def _prefix(found: Collection[str], wanted: Collection[str]) -> str | None:
    """Return the prefix that all names in the file carry and those of the model do not."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found) and not all(name.startswith(prefix) for name in wanted):
            return prefix
    return None


def _is_step_count(name: str) -> bool:
    # Counts training steps; older torch did not save it, and inference never reads it.
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"


def _misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each tensor that is missing, unexpected, or not what the model wants."""
    problems = [
        f"{name}: missing in the file; the model wants {_shape(tensor)} (was it trained as another --model?)"
        for name, tensor in wanted.items()
        if name not in found and not _is_step_count(name)
    ]
    for name, tensor in found.items():
        if name not in wanted:
            problems.append(f"{name}: unexpected in the file, {_shape(tensor)} (was it trained as another --model?)")
        elif defect := _defect(tensor, wanted[name]):
            problems.append(f"{name}: {defect}")
    return problems


def _defect(tensor: Tensor, target: Tensor) -> str | None:
    """Return what keeps a tensor from being copied into the model's tensor of that name, or None."""
    if tensor.shape != target.shape:
        advice = "choose the --model, and the --num-classes, that it was trained with"
        return f"the model wants {_shape(target)}, the file has {_shape(tensor)}; {advice}"
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "sparse, or without values; save it as a dense tensor"
    if target.dtype in FLOATS and tensor.dtype not in FLOATS:
        return f"the file has {_dtype(tensor)}, the model wants floats; save the weights before they are quantized"
    if target.dtype not in FLOATS and tensor.dtype is not target.dtype:
        return f"the file has {_dtype(tensor)}, the model wants {_dtype(target)}; save it as that"
    # A double may overflow on its way to float32, so the values are judged as the model will hold them.
    bad = int((~torch.isfinite(tensor.to(target.dtype))).sum())
    if bad:
        return f"{bad} of {tensor.numel()} values are NaN or infinite; take a checkpoint from before that happened"
    return None


def _fitting(flat: Mapping[str, Tensor]) -> str:
    """Return, in words, the members of the family that have the names and shapes of a file; nothing where none has."""
    fitting, classes = [], 0
    for name, architecture in ARCHITECTURES.items():
        wanted = _published(architecture)
        shapes = _shapes(_model_names(flat, wanted))
        if shapes.keys() == wanted.keys() and shapes["fc.bias"]:
            classes = shapes["fc.bias"][0]
            if shapes == {**wanted, "fc.weight": (classes, wanted["fc.weight"][1]), "fc.bias": (classes,)}:
                fitting.append(name)
    if not fitting:
        return ""
    usual = classes == ARCHITECTURES[fitting[0]].num_classes
    return f"; it fits --model {' or '.join(fitting)}{'' if usual else f' --num-classes {classes}'}"


def _published(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a member's state dict, without its step counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers(architecture):
        shapes[f"{layer.name}.weight"] = layer.shape
        if layer.norm:
            norm = ("weight", "bias", "running_mean", "running_var")
            shapes.update({f"{layer.norm}.{part}": layer.shape[:1] for part in norm})
        else:
            shapes[f"{layer.name}.bias"] = layer.shape[:1]
    return shapes


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not _is_step_count(name)}


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
