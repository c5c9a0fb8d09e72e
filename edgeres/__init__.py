"""edgeres: a PyTorch ResNet becomes a verified INT8 bundle, and the bundle runs on a robot.

::

    bundle = edgeres.build("recipe.toml")            # export, calibrate, quantize, compile, validate (extra [host])
    with edgeres.load("build/digits-int8") as engine:
        logits = engine(frames)                      # uint8 (N, H, W, 3) frames; no torch, no onnx
        for logits in engine.stream(camera): ...     # one frame after the other, the next one read meanwhile
    report = edgeres.validate("build/digits-int8", images, labels)

Rooms are entered when they are needed: importing edgeres loads nothing heavy.
"""

from __future__ import annotations

import os

from edgeres.errors import EdgeresError

# As typing has it, which takes longer to load than all else here: while it loads, a Ctrl-C would end in a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, Dict, Optional, Union

    import numpy as np

    from edgeres.artifacts import Bundle, Report
    from edgeres.matrix import Matrix
    from edgeres.packing import Packed
    from edgeres.progress import Progress
    from edgeres.runtime import LoadedEngine
    from edgeres.signatures import Keys

    Path = Union[str, os.PathLike[str]]

# From 1.29 on onnxruntime tells Microsoft about each model that it opens, and keeps an identifier of the machine in the
# home folder (docs/Privacy.md there). Whoever wants that sets the variable to 0; here, before any room imports it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["EdgeresError", "__version__", "build", "build_matrix", "load", "models", "pack", "unpack", "validate"]

OPTIONS = {
    "model": "model.source",
    "weights": "model.weights",
    "num_classes": "model.num_classes",
    "seed": "model.seed",
    "precision": "precision",
    "name": "name",
    "input_size": "input.size",
    "resize": "input.resize",
    "mean": "input.mean",
    "std": "input.std",
    "fit": "input.fit",
    "pad": "input.pad",
    "calibration": "calibration.samples",
    "calibration_count": "calibration.count",
    "method": "calibration.method",
    "percentile": "calibration.percentile",
    "keep_float": "quantization.keep_float",
    "activation_range": "quantization.activation_range",
    "grouped": "quantization.grouped",
    "weight_range": "quantization.weight_range",
    "recovery": "quantization.recovery",
    "budget_minutes": "quantization.budget_minutes",
    "validation": "validation.samples",
    "max_drop": "validation.max_drop",
    "policy": "validation.policy",
    "backend": "engine.backend",
    "target": "engine.target",
    "batch": "engine.batch",
    "workspace_mib": "engine.workspace_mib",
    "optimization_level": "engine.optimization_level",
    "timing_cache": "engine.timing_cache",
    "gpu_fallback": "engine.gpu_fallback",
    "version_compatible": "engine.version_compatible",
    "hardware_compatible": "engine.hardware_compatible",
    "strict": "engine.strict",
    "engine_input": "engine.input",
    "timeout_minutes": "engine.timeout_minutes",
}
"""The flags of ``edgeres build`` and the recipe's keys that they override."""


def build(
    recipe: Optional[Path] = None,
    *,
    out: Optional[Path] = None,
    progress: Optional[Progress] = None,
    cluster: Optional[str] = None,
    **options: Any,
) -> Bundle:
    """Run the whole pipeline and return the finished bundle.

    Args:
        recipe: a TOML file, or a bundle to build again; None for the embedded default, or for ``options`` alone where
            they name a model.
        out: the bundle's folder; by default that of the bundle to build again, else ``build/<name>-<precision>``.
        progress: is told what happens; silent by default.
        cluster: who runs the samples: ``local``, ``local:4`` or a Dask scheduler's address; None: this machine alone.
            A program that says ``local`` does so under ``if __name__ == "__main__":``, for its workers import it.
        options: the flags of ``edgeres build`` with underscores, such as ``model="resnet50"``, ``max_drop=0.3``. Paths
            are relative to the current folder.

    Raises:
        EdgeresError: with what is wrong and what to do next. An earlier bundle at ``out`` is then untouched.
        TypeError: there is no such option.
    """
    from pathlib import Path as FilePath

    from edgeres.matrix import terms_of
    from edgeres.pipeline import build as run
    from edgeres.recipe import load_recipe

    wanted = load_recipe(None if recipe is None else os.fspath(recipe), _overrides("build", options))
    if out is None and recipe is not None and os.path.isdir(recipe):
        out = recipe  # a bundle is continued where it is
    terms = terms_of(None if recipe is None else os.fspath(recipe), wanted)
    return run(wanted, None if out is None else FilePath(out), progress=progress, cluster=cluster, terms=terms)


def build_matrix(
    recipe: Path,
    *,
    out: Optional[Path] = None,
    progress: Optional[Progress] = None,
    cluster: Optional[str] = None,
    **options: Any,
) -> Matrix:
    """Build the bundles of a recipe with ``[[targets]]``, and return what became of each row, in the recipe's order.

    A row that fails is told of in its ``message``, and stops no other: look at ``good``, of a row and of all.

    Args:
        recipe: a TOML file; one without ``[[targets]]`` is a matrix of one row.
        out: the folder that the bundles go to, each in one of its own; by default ``build``.
        progress, cluster, options: as of :func:`build`; what rows say themselves cannot be an option.

    Raises:
        RecipeError: with everything that is wrong with the recipe; nothing is built.
        BundleError: ``out`` is a bundle itself.
        TypeError: there is no such option.
    """
    from pathlib import Path as FilePath

    from edgeres.matrix import build_rows
    from edgeres.recipe import load_recipe
    from edgeres.rows import Planned, load_rows

    overrides = _overrides("build_matrix", options)
    rows = load_rows(os.fspath(recipe), overrides)
    if rows is None:
        wanted = load_recipe(os.fspath(recipe), overrides)
        rows = (Planned(wanted.precision, wanted),)
    return build_rows(rows, None if out is None else FilePath(out), progress, cluster)


def load(
    bundle: Path,
    *,
    backend: str = "auto",
    threads: Optional[int] = None,
    cuda_graphs: bool = False,
    frames: str = "rgb",
    trusted_keys: Optional[Keys] = None,
) -> LoadedEngine:
    """Return a bundle's engine, verified; see :func:`edgeres.runtime.load`."""
    from edgeres.runtime import load as open_bundle

    return open_bundle(bundle, backend, threads, cuda_graphs, frames, trusted_keys)


def validate(
    bundle: Path,
    images: Union[np.ndarray, Path, None] = None,
    labels: Optional[np.ndarray] = None,
    *,
    backend: str = "auto",
    max_drop: Optional[float] = None,
    policy: Optional[str] = None,
    baseline: Optional[Report] = None,
    max_latency_ms: Optional[float] = None,
    min_speedup: Optional[float] = None,
    trusted_keys: Optional[Keys] = None,
    cluster: Optional[str] = None,
) -> Report:
    """Return the comparison of a bundle's engine with FP32; see :func:`edgeres.judge.validate_bundle`.

    Args:
        max_latency_ms: a call's p50 with one frame, at most, on this machine: the engine alone, its input prepared.
        min_speedup: times as fast as the float twin, at least. The verdicts stand in ``latency`` (or ``latency_error``,
            where it could not be measured), and count in ``outcome()``.
        cluster: who runs the samples, as of :func:`build`.
    """
    from edgeres.gate import gate
    from edgeres.signatures import key_list
    from edgeres.validation import Limits

    limits = Limits(max_latency_ms, min_speedup)
    return gate(
        bundle,
        images,
        labels,
        limits=limits,
        backend=backend,
        max_drop=max_drop,
        policy=policy,
        baseline=baseline,
        trusted_keys=key_list(trusted_keys),
        cluster=cluster,
    )


def pack(bundle: Path, file: Optional[Path] = None, *, trusted_keys: Optional[Keys] = None) -> Packed:
    """Write a bundle into one file to ship, and return what was packed; see :func:`edgeres.packing.pack`."""
    from edgeres.packing import pack as run
    from edgeres.signatures import key_list

    return run(bundle, file, key_list(trusted_keys))


def unpack(file: Path, out: Optional[Path] = None, *, trusted_keys: Optional[Keys] = None) -> Bundle:
    """Return the bundle of a packed one, checked and put in place whole; see :func:`edgeres.packing.unpack`."""
    from edgeres.packing import unpack as run
    from edgeres.signatures import key_list

    return run(file, out, key_list(trusted_keys))[0]


def _overrides(function: str, options: Dict[str, Any]) -> Dict[str, Any]:
    """Return a function's options as keys of the recipe.

    Raises:
        TypeError: there is no such option.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"{function}() has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    return {OPTIONS[name]: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    """Turn paths into text and lists into what TOML would have held."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def __getattr__(name: str) -> ModuleType:
    """Enter the models' room (torch) when ``edgeres.models`` is first used."""
    if name == "models":
        import importlib

        return importlib.import_module("edgeres.models")
    raise AttributeError(f"module 'edgeres' has no attribute {name!r}")
