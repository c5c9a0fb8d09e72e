"""Models: the ResNet family by name, anybody's model by ``package.module:callable``, their size, and their weights."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.errors import EdgeresError, ModelError
from edgeres.models.checkpoints import load_weights
from edgeres.models.resnet import ResNet

__all__ = ["count", "create", "from_callable", "load_weights"]


def create(name: str | Architecture, num_classes: int | None = None, seed: int | None = None) -> nn.Module:
    """Return a member of the ResNet family in eval mode, with fresh random weights.

    Args:
        name: as ``edgeres models`` lists it; or the description of a net that has no name.
        num_classes: outputs of the classifier; None means the architecture's own (1000 or 10).
        seed: the same seed gives the same weights, and torch's global random state stays as it was; None draws the
            weights from that global state.

    Raises:
        ModelError: no such name, or fewer classes than one.
    """
    architecture = _named(name) if isinstance(name, str) else name
    _check_classes(num_classes)
    classes = architecture.num_classes if num_classes is None else num_classes
    # No CUDA device is forked, and only the CPU's generator is seeded: nothing else draws the weights.
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return ResNet(architecture, classes).eval()


def _named(name: str) -> Architecture:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=3)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ModelError(f"there is no model named {name!r}.{meant} `edgeres models` lists them all.")


def from_callable(spec: str, num_classes: int | None = None, seed: int | None = None) -> nn.Module:
    """Return the model that ``package.module:callable`` makes, in eval mode.

    The current directory is searched first, as by ``python -m``. The callable gets ``num_classes`` if that is given
    and its signature takes it, and nothing else. With a ``seed``, what it draws from torch's CPU generator is the same
    each time, and the generator's state stays as it was.

    Raises:
        ModelError: there is no such module or callable, it raises, or what it returns is no ``nn.Module``.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise ModelError(f"{spec!r} is not of the form package.module:callable, such as mynets.resnet:build.")
    _check_classes(num_classes)
    with _current_directory_importable():
        make = _resolve(spec, module_name, attribute)
        arguments = {} if num_classes is None or not _takes_num_classes(make) else {"num_classes": num_classes}
        try:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                model = make(**arguments)
        except EdgeresError:
            raise  # it says all there is to say: an Architecture whose parts do not fit together
        except (Exception, SystemExit) as problem:
            called = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise ModelError(
                f"{spec} raised {_in_words(problem)} when called as {attribute}({called}); "
                "make it callable so, for instance with defaults for its parameters."
            ) from problem
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned an object of type {type(model).__name__}; let it return a torch.nn.Module.")
    return model.eval()


def count(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Return how many parameters a model has, and how many multiply-accumulates one image costs it.

    Convolutions and matrix products count, and no additions, normalizations or activations. Nothing is computed: shapes
    alone go through the model, on torch's meta device, and the model stays as it is.

    Args:
        size: height and width of the image, in pixels.

    Raises:
        ModelError: the model does not take one RGB image of that size.

    Source: He et al. 2015, Table 1 ("FLOPs" there are multiply-adds).
    """
    height, width = size
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, (torch.empty(1, 3, height, width, device="meta"),))
    except Exception as problem:
        raise ModelError(
            f"the model cannot be counted with an input of shape (1, 3, {height}, {width}): it raised "
            f"{_in_words(problem)}; choose the input size that it takes."
        ) from problem
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops() // 2


def _check_classes(num_classes: int | None) -> None:
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"a classifier needs at least one class, not {num_classes}; choose num_classes >= 1.")


def _resolve(spec: str, module_name: str, attribute: str) -> Callable[..., object]:
    # SystemExit counts as a failure: a module that runs like a script must not end edgeres, least of all with code 0.
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        missing = problem.name
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise ModelError(
                f"there is no module {missing} to import {spec} from; "
                f"install it, or run from the folder that holds it (this is {os.getcwd()})."
            ) from problem
        raise ModelError(f"{module_name} cannot be imported ({problem}); install what it needs.") from problem
    except (Exception, SystemExit) as problem:
        raise ModelError(f"importing {module_name} raised {_in_words(problem)}; mend that module first.") from problem
    make: object = module
    try:
        for name in attribute.split("."):
            make = getattr(make, name)
    except AttributeError:
        close = difflib.get_close_matches(attribute, dir(module), n=3)
        meant = f"did you mean {' or '.join(close)}?" if close else "name a function or class that is defined there."
        raise ModelError(f"the module {module_name} has no {attribute}; {meant}") from None
    if not callable(make):
        raise ModelError(f"{spec} is a {type(make).__name__}, not a callable; name a function that returns the model.")
    return make


def _takes_num_classes(make: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    # torchvision's builders take num_classes among their keyword arguments, without naming it.
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    named = parameters.get("num_classes")
    return takes_any or (named is not None and named.kind is not inspect.Parameter.POSITIONAL_ONLY)


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    # A module written a moment ago may be missing from the import system's listing of its folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _in_words(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
