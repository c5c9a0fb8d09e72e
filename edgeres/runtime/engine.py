"""A loaded engine: camera frames in, logits out."""

from __future__ import annotations

import importlib.util
import os
from types import TracebackType
from typing import Dict, Optional, Protocol, Tuple, Type

import numpy as np

from edgeres.artifacts import Engine, Manifest
from edgeres.bundle import Folder, read_manifest, verify_and_read
from edgeres.errors import BackendError, BundleError, MissingPackageError, numbered
from edgeres.preprocess import prepare_batch, problems


class OpenEngine(Protocol):
    """What every backend's ``open_engine`` returns."""

    @property
    def largest(self) -> Optional[int]:
        """The most samples that it computes at a time; None where it has no limit of its own."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return logits float32 ``(N, K)`` of float32 ``(N, 3, h, w)``."""

    def close(self) -> None:
        """Free the engine."""


class LoadedEngine:
    """An open engine of a verified bundle; made by :func:`load`. Any number of threads may call it.

    ``manifest`` is the bundle's, ``record`` says which engine runs and what it was built for.
    """

    def __init__(self, runner: OpenEngine, manifest: Manifest, record: Engine) -> None:
        self._runner = runner
        self.manifest = manifest
        self.record = record

    @property
    def input_shape(self) -> Tuple[int, int, int]:
        """The shape of one normalized input: (3, height, width)."""
        return (3, *self.manifest.preprocessing.size)

    @property
    def largest(self) -> Optional[int]:
        """The most frames that the engine computes at a time; None where it has no limit of its own."""
        return self._runner.largest

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the logits of some frames.

        Args:
            frames: uint8 ``(N, H, W, 3)``, RGB camera frames of any size, which are resized, cropped and normalized as
                at calibration; or float32 ``(N, 3, h, w)``, normalized already.

        Returns:
            float32 ``(N, K)``.

        Raises:
            BackendError: the array is neither, or the engine is closed.
        """
        self._check(frames)
        step = self.largest or self.manifest.preprocessing.batch_size
        parts = [self._runner(self._normalized(frames[i : i + step])) for i in range(0, len(frames), step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _normalized(self, frames: np.ndarray) -> np.ndarray:
        if frames.dtype == np.uint8:
            return prepare_batch(frames, self.manifest.preprocessing)
        return np.ascontiguousarray(frames)

    def _check(self, frames: np.ndarray) -> None:
        if isinstance(frames, np.ndarray) and frames.ndim == 4 and len(frames):
            if frames.dtype == np.uint8 and frames.shape[3] == 3:
                return
            if frames.dtype == np.float32 and frames.shape[1:] == self.input_shape:
                if not np.isfinite(frames).all():  # int8 would turn a NaN into a plausible answer
                    raise BackendError(
                        "the input holds NaN or infinite numbers. Mend what makes it: a sensor, a mean, a std"
                    )
                return
        found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        _, height, width = self.input_shape
        raise BackendError(
            f"an engine takes uint8 frames (N, H, W, 3) or normalized float32 (N, 3, {height}, {width}), not {found}"
        )

    def close(self) -> None:
        """Free the engine; calling it twice is fine, running it afterwards is refused."""
        self._runner.close()

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def load_with(
    bundle: Folder, backend: str, threads: Optional[int], also: Tuple[str, ...]
) -> Tuple[LoadedEngine, Dict[str, bytes]]:
    """Return a bundle's engine as :func:`load` does, and the bytes of those files of ``also`` that the bundle has, all
    from one reading: a bundle that is exchanged meanwhile cannot mix with its successor."""
    record = _choose(bundle, read_manifest(bundle), backend)
    manifest, contents = verify_and_read(bundle, (record.file.path, *also))
    if record != _choose(bundle, manifest, backend) or record.file.path not in contents:
        raise BundleError(f"{bundle} changed while it was being read. Load it again.")
    check_preprocessing(bundle, manifest)
    runner = open_record(contents[record.file.path], record, threads, os.fspath(bundle))
    return LoadedEngine(runner, manifest, record), contents


def open_record(content: bytes, record: Engine, threads: Optional[int] = None, place: str = "BUNDLE") -> OpenEngine:
    """Return the open engine of a record; its backend's library is loaded only now.

    Args:
        content: the engine file's bytes, already verified.
        place: the bundle, for the command that messages advise.

    Raises:
        BackendError: the engine does not fit this machine, or cannot be opened.
        MissingPackageError: the backend's packages are not installed.
    """
    if record.backend in ("tensorrt", "tensorrt-rtx"):
        from edgeres.backends.tensorrt.session import open_session

        return open_session(content, record.built_for, flavour=record.backend, place=place)
    if record.backend != "cpu":
        raise BackendError(f"there is no backend {record.backend!r}. Compile the bundle again: edgeres compile BUNDLE")
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingPackageError.for_extra("onnxruntime", "running an engine on the CPU", "cpu")
    from edgeres.backends import cpu

    return cpu.open_engine(content, record.options, threads)


def check_preprocessing(bundle: Folder, manifest: Manifest) -> None:
    """Refuse a manifest whose preprocessing no frame can go through.

    Raises:
        BundleError: with every mistake in it.
    """
    wrong = problems(manifest.preprocessing)
    if wrong:
        raise BundleError(numbered(f"{bundle}: preprocessing", wrong) + "\nBuild it again.")


def load(bundle: Folder, backend: str = "auto", threads: Optional[int] = None) -> LoadedEngine:
    """Return a bundle's engine, after every file of the bundle has been checked against its manifest.

    Args:
        bundle: its folder.
        backend: ``auto`` (the bundle's own first engine), or the backend or the target of one (``tensorrt``, ``dla0``);
            there is never a silent change to another.
        threads: for one operator; None leaves it to the backend.

    Raises:
        BundleError: there is no bundle, or it has no engine of that backend.
        IntegrityError: a file is not the one that the manifest binds; nothing was opened.
        BackendError: the engine cannot be opened.
    """
    return load_with(bundle, backend, threads, ())[0]


def _choose(bundle: Folder, manifest: Manifest, backend: str) -> Engine:
    for engine in manifest.engines:
        if backend in ("auto", engine.backend, engine.target):
            return engine
    names = (name for engine in manifest.engines for name in (engine.backend, engine.target))
    there = ", ".join(dict.fromkeys(names)) or "none"
    wanted = "an engine" if backend == "auto" else f"an engine for {backend}"
    option = "--backend" if backend in ("cpu", "tensorrt", "tensorrt-rtx") else "--target"
    how = "" if backend == "auto" else f" {option} {backend}"
    raise BundleError(f"{bundle} does not have {wanted} (it has: {there}). Compile one: edgeres compile {bundle}{how}")
