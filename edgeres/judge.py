"""Run samples through engines, and compare with the FP32 reference: what ``build`` ends with and ``validate`` is."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shlex
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

import msgspec
import numpy as np

from edgeres import files
from edgeres.archive import read_npz
from edgeres.artifacts import Engine, Manifest, Report, from_data, from_json, summaries
from edgeres.backends import Runner
from edgeres.bundle import read_listed
from edgeres.errors import BundleError, SampleError, first_line, numbered
from edgeres.recipe import ValidationSection, place_of
from edgeres.runtime.loading import load_with
from edgeres.samples import Samples, open_samples, samples_from_arrays
from edgeres.signatures import Keys
from edgeres.validation import against_baseline, attribute_drop, compare
from edgeres.workforce import Alone, Watch, Workforce

LARGEST_REFERENCE = 8 << 30  # bytes, unpacked; the logits of 2 million samples in 1000 classes
LARGEST_REPORT = 64 << 20  # bytes; the answers to 50,000 samples take 100 kB


def reference_content(logits: np.ndarray, samples: Samples) -> bytes:
    """Return ``reference.npz``: FP32 logits, labels where there are any, and which samples they belong to.

    Arrays: ``logits`` float32 ``(N, K)``; ``labels`` int64 ``(N,)``; ``names`` and ``sha256`` text ``(N,)``.
    """
    chosen = samples.sample_set()
    arrays: Dict[str, np.ndarray] = {
        "logits": np.asarray(logits, np.float32),
        "names": np.array(chosen.names, dtype=np.str_),
        "sha256": np.array(chosen.sha256, dtype=np.str_),
    }
    if samples.labels is not None:
        arrays["labels"] = np.asarray(samples.labels, np.int64)
    if samples.classes is not None:
        arrays["classes"] = np.array(samples.classes, dtype=np.str_)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def read_reference(content: bytes, where: str) -> Dict[str, np.ndarray]:
    """Return the arrays that :func:`reference_content` wrote.

    Raises:
        BundleError: the content is something else.
    """
    try:
        arrays = read_npz(content, tuple(KINDS), LARGEST_REFERENCE)
    except (OSError, ValueError, MemoryError) as problem:
        raise BundleError(f"{where} is not a reference file ({first_line(problem)}). Build the bundle again.") from None
    if not {"logits", "names", "sha256"} <= arrays.keys():
        raise BundleError(f"{where} lacks logits, names or sha256. Build the bundle again.")
    problems = [
        problem for name, array in arrays.items() for problem in _misshapen(name, array, arrays["logits"].shape[:1])
    ]
    if problems:
        raise BundleError(numbered(where, problems) + "\nBuild the bundle again.")
    return arrays


KINDS = {"logits": ("f", 2), "labels": ("iu", 1), "names": ("U", 1), "sha256": ("U", 1), "classes": ("U", 1)}
"""The arrays of a reference file: NumPy's kinds of type, and the number of dimensions."""


def _misshapen(name: str, array: np.ndarray, rows: Tuple[int, ...]) -> List[str]:
    """Return what is wrong with the type or the shape of a reference's array; ``rows`` are those of the logits."""
    kinds, dimensions = KINDS[name]
    if array.dtype.kind not in kinds or array.ndim != dimensions or not array.size:
        return [f"{name} are {array.dtype} of shape {array.shape}, which they never are"]
    if name != "classes" and array.shape[:1] != rows:
        return [f"{name} has {len(array)} entries for {sum(rows)} rows of logits"]
    if name == "sha256" and not all(map(str.isascii, array.tolist())):
        return ["sha256 holds what is no hash"]
    return []


def judge(
    content: bytes,
    logits: np.ndarray,
    engine: Engine,
    budget: Tuple[float, str],
    source: str = "validation",
    meaning: Optional[np.ndarray] = None,
) -> Report:
    """Return the comparison of an engine's logits with a stored reference of the same samples.

    Args:
        content: ``reference.npz``.
        logits: the engine's, float32 ``(N, K)``.
        budget: percentage points that may be lost, and the policy (``ci`` or ``point``).
        source: what the samples are: ``validation`` or ``calibration``.
        meaning: what the quantized model means, float32 ``(N, K)``, to tell the engine's part of a drop from
            quantization's.
    """
    reference = read_reference(content, files.REFERENCE)
    classes = [str(name) for name in reference.get("classes", ())]
    report = compare(
        reference["logits"],
        logits,
        reference.get("labels"),
        max_drop_pp=budget[0],
        policy=budget[1],
        backend=engine.backend,
        precision=engine.precision,
        samples_source=source,
        classes=classes,
        sha256=reference["sha256"].tolist(),
    )
    digest = _digest(reference["sha256"], reference.get("labels"), classes)
    report = msgspec.structs.replace(report, samples_sha256=digest)
    return attributed(_told(report, engine), reference["logits"], meaning, logits, reference.get("labels"))


def _digest(sha256: Iterable[str], labels: Optional[np.ndarray], classes: Sequence[str]) -> str:
    """Return one digest of samples in their order, of their labels and of the names of the classes."""
    told = [list(map(str, sha256)), None if labels is None else labels.tolist(), list(map(str, classes))]
    return hashlib.sha256(json.dumps(told).encode("ascii")).hexdigest()


def _told(report: Report, engine: Engine) -> Report:
    """Return a report that says which engine it is on, and what that one's layers compute in."""
    return msgspec.structs.replace(
        report, target=engine.target, activation_range=engine.activation_range, layers=summaries([engine])
    )


def attributed(
    report: Report,
    reference: np.ndarray,
    meaning: Optional[np.ndarray],
    logits: np.ndarray,
    labels: Optional[np.ndarray],
) -> Report:
    """Return a report with the steps that lead from FP32 to the engine; without ``meaning`` it stays as it is."""
    if meaning is None:
        return report
    return msgspec.structs.replace(report, attribution=attribute_drop(reference, meaning, logits, labels))


def stored_logits(content: Optional[bytes], samples: Samples) -> Optional[np.ndarray]:
    """Return the logits that a bundle's file holds of exactly these samples, in order; None where it holds others."""
    if content is None:
        return None
    reference = read_reference(content, files.REFERENCE)
    same = list(reference["sha256"]) == list(samples.sha256())
    return reference["logits"] if same else None


def open_file(path: Path, precision: str) -> Runner:
    """Return a runner of an ONNX file, on the CPU and exact."""
    from edgeres.backends import cpu

    return cpu.open_model(path, precision)


def validate_bundle(
    bundle: Union[str, os.PathLike[str]],
    images: Union[np.ndarray, str, os.PathLike[str], None] = None,
    labels: Optional[np.ndarray] = None,
    *,
    backend: str = "auto",
    max_drop: Optional[float] = None,
    policy: Optional[str] = None,
    baseline: Optional[Report] = None,
    trusted_keys: Optional[Keys] = None,
    watch: Watch = lambda done, total: None,
    workforce: Optional[Workforce] = None,
) -> Report:
    """Return the comparison of a bundle's engine with FP32 on some samples. The bundle is verified and not changed.

    The FP32 logits that the bundle holds are used where the samples are the very same; otherwise its FP32 model is run.

    Args:
        images: uint8 frames ``(N, H, W, 3)``; or a folder, list or array file; None for the samples that the bundle was
            built with, where they still are.
        labels: int64 ``(N,)``, with an array of images; a folder's are its subfolders.
        backend: which of the bundle's engines, by its backend or its target; ``auto`` is its first.
        max_drop: the accuracy budget in percentage points; None for the bundle's own.
        policy: ``ci`` or ``point``; None for the bundle's own.
        baseline: an earlier report on the same samples, to compare with as well.
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed the bundle.
        workforce: who runs the samples; None for this machine alone. The report is the same.

    Raises:
        BundleError: the bundle is damaged or has no engine, or nobody who is trusted vouches for it.
        SampleError: the samples cannot be read, or labels do not fit them.
    """
    wanted, force = (files.REFERENCE, files.FP32_MODEL, files.MEANING), workforce or Alone()
    engine, contents = load_with(bundle, backend, None, wanted, trusted_keys)
    with engine:
        manifest = engine.manifest
        samples = _samples(manifest, images, labels)
        if workforce is not None:  # all that cannot be read is told at once, and what can is hashed there
            broken = workforce.look(samples)
            if broken:
                raise SampleError(numbered(samples.source, broken))
        reference = stored_logits(contents.pop(files.REFERENCE, None), samples)  # many samples are many bytes
        if reference is None:
            record = fp32_record(manifest)
            content = contents[record.file.path]
            reference = force.answer(content, record, samples, manifest.preprocessing, watch)
        if samples.classes is not None and len(samples.classes) != reference.shape[1]:
            raise SampleError(
                f"{samples.source} has {len(samples.classes)} class folders and the model answers {reference.shape[1]} "
                "classes: each class needs its folder, or the labels are others. For some classes only, give an .npz"
            )
        content = contents[engine.record.file.path]
        logits = force.answer(content, engine.record, samples, manifest.preprocessing, watch, engine)
        meaning = known_meaning(engine.record, reference, logits)
        if meaning is None:
            meaning = stored_logits(contents.pop(files.MEANING, None), samples)
        if meaning is None:
            meaning = computed_meaning(bundle, manifest, samples, watch, force)
        judged = from_data(manifest.recipe.get("validation", {}), ValidationSection, "recipe.validation")
        report = compare(
            reference,
            logits,
            samples.labels,
            max_drop_pp=judged.max_drop if max_drop is None else max_drop,
            policy=judged.policy if policy is None else policy,
            backend=engine.record.backend,
            precision=engine.record.precision,
            classes=samples.classes or (),
            sha256=samples.sha256(),
        )
        report = msgspec.structs.replace(
            report, samples_sha256=_digest(samples.sha256(), samples.labels, samples.classes or ())
        )
        if baseline is not None:
            report = against_baseline(report, baseline, samples.labels, reference.shape[1], samples.sha256())
        return attributed(_told(report, engine.record), reference, meaning, logits, samples.labels)


def read_baseline(path: Path) -> Report:
    """Return an accepted report, to compare with.

    Raises:
        SampleError: it cannot be read.
        BundleError: it is no report.
    """
    try:
        content = files.read_bounded(path, LARGEST_REPORT)
    except OSError as problem:
        name = shlex.quote(str(path))
        raise SampleError(
            f"cannot read the baseline {path}: {problem.strerror}. Write it, by hand: edgeres validate BUNDLE "
            f"--baseline {name} --update-baseline"
        ) from None
    try:
        told = msgspec.json.decode(content, type=Dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        told = {}
    if told.pop("outcome", None) is not None:  # what ``validate --json`` prints besides
        content = msgspec.json.encode(told)
    return from_json(content, Report, str(path))


def known_meaning(engine: Engine, reference: np.ndarray, logits: np.ndarray) -> Optional[np.ndarray]:
    """Return what an engine's model answers where that is known already: an FP32 model is the reference, and the CPU
    computes just what the model's own file says. None elsewhere."""
    if engine.precision == "fp32":
        return reference
    own = engine.file.path == files.model_file(engine.precision)
    return logits if engine.backend == "cpu" and own else None


def computed_meaning(
    bundle: Union[str, os.PathLike[str]], manifest: Manifest, samples: Samples, watch: Watch, workforce: Workforce
) -> Optional[np.ndarray]:
    """Return what a bundle's model answers where it is computed exactly, on the CPU, float32 ``(N, K)``.

    None where there is no onnxruntime, as on many a robot, or the bundle has no such model.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    path = files.model_file(manifest.precision)
    content = read_listed(bundle, manifest, path)
    if content is None:
        return None
    from edgeres.backends import cpu

    record = cpu.compile_engine(files.content_ref(path, content), manifest.precision)
    return workforce.answer(content, record, samples, manifest.preprocessing, watch)


def fp32_record(manifest: Manifest) -> Engine:
    """Return the CPU engine of a bundle's FP32 model, which every bundle has.

    Raises:
        BundleError: this one has not.
    """
    for ref in manifest.files:
        if ref.path == files.FP32_MODEL:
            return Engine(target="cpu", backend="cpu", precision="fp32", file=ref, built_for={}, options={})
    raise BundleError(f"the bundle has no {files.FP32_MODEL} to compare with. Build it again.")


def _samples(
    manifest: Manifest, images: Union[np.ndarray, str, os.PathLike[str], None], labels: Optional[np.ndarray]
) -> Samples:
    """Return the samples to judge on, from whatever the caller has."""
    if isinstance(images, np.ndarray):
        return samples_from_arrays(images, labels)
    if labels is not None:
        raise SampleError("labels go with an array of images; a folder's labels are the names of its subfolders")
    source = os.fspath(images) if images is not None else manifest.recipe.get("validation", {}).get("samples")
    if source is None:
        raise SampleError("this bundle was built without validation samples. Name some: --validation FOLDER")
    return open_samples(place_of(source), labelled=True)
