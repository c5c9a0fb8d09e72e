"""The whole gate: a bundle's accuracy, and its latency on this machine where a limit is asked for."""

from __future__ import annotations

import os
import shlex
from typing import Any, Callable, Optional, Union

import msgspec
import numpy as np

from edgeres import judge
from edgeres.artifacts import Engine, Manifest, Report
from edgeres.benchmark import ROUNDS, Pace
from edgeres.bundle import read_manifest
from edgeres.errors import BackendError, BundleError, EdgeresError
from edgeres.measurements import LatencyReport
from edgeres.runtime.loading import choose_engine
from edgeres.signatures import Keys
from edgeres.validation import Limits, against_limits, check_rules, doubts
from edgeres.validation.latency import BATCH, FLOATS
from edgeres.workforce import Watch, hired

PACE = Pace(seconds=20.0, rounds=2 * ROUNDS, fewest=ROUNDS)
"""Longer than a benchmark's, for a load of some seconds has to come and go several times before it is known for one.
So many rounds at least, for of fewer that are independent too many seem not to be."""

Bundle = Union[str, os.PathLike[str]]


def gate(
    bundle: Bundle,
    images: Union[np.ndarray, str, os.PathLike[str], None] = None,
    labels: Optional[np.ndarray] = None,
    *,
    limits: Optional[Limits] = None,
    backend: str = "auto",
    trusted_keys: Optional[Keys] = None,
    watch: Watch = lambda done, total: None,
    cluster: Optional[str] = None,
    warn: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Report:
    """Return the comparison of a bundle's engine with FP32, with its latency where there are limits.

    Args:
        limits: on the latency; it takes some twenty seconds to measure, after the accuracy, on whatever runs this. What
            goes wrong there stands in ``latency_error``, so that the accuracy is not lost with it.
        cluster: who runs the samples, ``local`` or a Dask scheduler's address; None for this machine alone. The latency
            is always this machine's.
        warn: is told what goes on in the cluster, and why the verdict means less than it says.
        options: ``max_drop``, ``policy`` and ``baseline``; as all others, as of :func:`edgeres.judge.validate_bundle`.

    Raises:
        RecipeError: a limit, the budget or the policy is none; said before the work, as what follows.
        BackendError: ``min_speedup`` is asked for, and the bundle has no float twin of the engine.
        EdgeresError: nothing could be judged.
    """
    limits = limits or Limits()
    limits.check()
    check_rules(options.get("max_drop"), options.get("policy"))
    given = {"backend": backend, "trusted_keys": trusted_keys, "watch": watch, **options}

    def judged() -> Report:
        with hired(cluster, warn) as workforce:
            hands = None if cluster is None else workforce
            report = judge.validate_bundle(bundle, images, labels, workforce=hands, **given)
        for text in doubts(report):
            warn(text)
        return report

    if not limits.asked:
        return judged()
    manifest = read_manifest(bundle, trusted_keys)
    engine = choose_engine(bundle, manifest, backend)
    if limits.min_speedup is not None:
        _check_twin(bundle, manifest, engine, limits.min_speedup)
    report = judged()
    try:
        latency = _measured(bundle, engine, limits, trusted_keys, watch)
    except EdgeresError as problem:
        return msgspec.structs.replace(report, latency_error=str(problem))
    return msgspec.structs.replace(report, latency=latency)


def _measured(
    bundle: Bundle, engine: Engine, limits: Limits, trusted_keys: Optional[Keys], watch: Watch
) -> LatencyReport:
    """Return how fast an engine is, against the limits.

    Raises:
        BundleError: the bundle holds another engine by now.
        EdgeresError: it could not be measured.
    """
    from edgeres.twins import Settings, bench_bundle

    settings = Settings(engine.target, (BATCH,), PACE, alone=limits.min_speedup is None, trusted_keys=trusted_keys)
    measured = bench_bundle(bundle, settings, watch)
    if measured.engine_sha256 != engine.file.sha256:
        raise BundleError(
            f"{bundle} was changed meanwhile: accuracy and latency are of two engines. Validate it again."
        )
    return against_limits(measured, limits)


def _check_twin(bundle: Bundle, manifest: Manifest, engine: Engine, least: float) -> None:
    """Refuse a bundle without a float twin that its engine could take turns with; FP32 runs on each CPU."""
    others = (
        ("fp32",) if engine.backend == "cpu" else [x.precision for x in manifest.engines if x.backend == engine.backend]
    )
    if any(other in FLOATS and other != engine.precision for other in others):
        return
    name = shlex.quote(os.fspath(bundle))
    raise BackendError(
        f"{bundle} has no float twin of its {engine.precision} engine for {engine.target}, so this command judges no "
        f"speed-up. Make one, in FP16: edgeres build {name} --precision fp16 --out OTHER; compile it: edgeres compile "
        f"OTHER; measure both: edgeres bench {name} --against OTHER --out BENCH.json; and see the verdict on the page: "
        f"edgeres report {name} --bench BENCH.json --min-speedup {least:g} --out PAGE.html"
    )
