"""From a bundle's folder to an open engine: which one, verified, on what can run it here."""

from __future__ import annotations

import importlib.util
import os
from typing import Dict, Optional, Tuple

from edgeres.artifacts import Engine, Manifest
from edgeres.bundle import Folder, check_files, read_manifest, undisturbed
from edgeres.errors import BackendError, BundleError, MissingPackageError, numbered
from edgeres.preprocess import COLORS, problems
from edgeres.runtime.engine import LoadedEngine, OpenEngine
from edgeres.signatures import Keys, key_list


def load_with(
    bundle: Folder, backend: str, threads: Optional[int], also: Tuple[str, ...], trusted_keys: Optional[Keys] = None
) -> Tuple[LoadedEngine, Dict[str, bytes]]:
    """Return a bundle's engine as :func:`load` does, and the bytes of those files of ``also`` that the bundle has, all
    from one reading: a bundle that is exchanged meanwhile cannot mix with its successor."""
    manifest, record, contents = read_engine(bundle, backend, also, trusted_keys)
    runner = open_record(contents[record.file.path], record, threads, os.fspath(bundle))
    return LoadedEngine(runner, manifest, record), contents


def read_engine(
    bundle: Folder, backend: str, also: Tuple[str, ...] = (), trusted_keys: Optional[Keys] = None
) -> Tuple[Manifest, Engine, Dict[str, bytes]]:
    """Return a bundle's manifest, the record of the engine that is wanted, and the bytes of its file and of those of
    ``also`` that the bundle has; everything is verified, nothing is opened.

    Raises: as :func:`load`.
    """
    keys = key_list(trusted_keys)

    def read() -> Tuple[Manifest, Engine, Dict[str, bytes]]:
        manifest = read_manifest(bundle, keys)
        record = choose_engine(bundle, manifest, backend)
        return manifest, record, check_files(bundle, manifest, (record.file.path, *also))

    manifest, record, contents = undisturbed(bundle, read)
    check_preprocessing(bundle, manifest)
    return manifest, record, contents


def open_record(
    content: bytes, record: Engine, threads: Optional[int] = None, place: str = "BUNDLE", cuda_graphs: bool = False
) -> OpenEngine:
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

        return open_session(content, record.built_for, flavour=record.backend, place=place, cuda_graphs=cuda_graphs)
    if record.backend != "cpu":
        raise BackendError(f"there is no backend {record.backend!r}. Compile the bundle again: edgeres compile BUNDLE")
    if cuda_graphs:
        raise BackendError("an engine on the CPU has no CUDA graphs. Leave them out, or load an engine of a GPU")
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


def load(
    bundle: Folder,
    backend: str = "auto",
    threads: Optional[int] = None,
    cuda_graphs: bool = False,
    frames: str = "rgb",
    trusted_keys: Optional[Keys] = None,
) -> LoadedEngine:
    """Return a bundle's engine, after every file of the bundle has been checked against its manifest, and that against
    its signatures, if ``trusted_keys`` are given.

    Args:
        bundle: its folder.
        backend: ``auto`` (the bundle's own first engine), or the backend or the target of one (``tensorrt``, ``dla0``);
            there is never a silent change to another.
        threads: for one operator; None leaves it to the backend.
        frames: the channel order of your camera's frames: ``rgb``, or ``bgr`` as OpenCV has them. The network's own is
            in its recipe, and they need not be the same.
        cuda_graphs: on a GPU, record the work of a batch size that comes again and again, and launch it in one piece;
            nets of many small layers gain by it. Where it cannot be recorded (``LoadedEngine.cuda_graphs`` says why)
            calls run as without. While it is being recorded, no other thread of the process may wait for the whole
            GPU, as ``torch.cuda.synchronize`` does.
        trusted_keys: public keys, one of which has to have signed the bundle: the paths of PEM files, or their content,
            or the 32 bytes of a key. None: whoever could write the bundle is believed.

    Raises:
        SignatureError: none of the trusted keys vouches for the bundle; nothing of it was parsed.
        SigningKeyError: what is to be trusted is no public key, or nothing at all.
        MissingPackageError: a package is missing: the backend's, or cryptography for ``trusted_keys``.
        BundleError: there is no bundle, or it has no engine of that backend.
        IntegrityError: a file is not the one that the manifest binds; nothing was opened.
        BackendError: the engine cannot be opened, or there is no such channel order.
    """
    if frames not in COLORS:
        raise BackendError(f"frames is {frames!r}: choose one of {', '.join(COLORS)}")
    manifest, record, contents = read_engine(bundle, backend, (), trusted_keys)
    runner = open_record(contents[record.file.path], record, threads, os.fspath(bundle), cuda_graphs)
    return LoadedEngine(runner, manifest, record, frames)


def choose_engine(bundle: Folder, manifest: Manifest, backend: str) -> Engine:
    """Return the record of a bundle's engine by its backend or its target; ``auto`` is the first one.

    Raises:
        BundleError: there is none.
    """
    for engine in manifest.engines:
        if backend in ("auto", engine.backend, engine.target):
            return engine
    names = (name for engine in manifest.engines for name in (engine.backend, engine.target))
    there = ", ".join(dict.fromkeys(names)) or "none"
    wanted = "an engine" if backend == "auto" else f"an engine for {backend}"
    option = "--backend" if backend in ("cpu", "tensorrt", "tensorrt-rtx") else "--target"
    how = "" if backend == "auto" else f" {option} {backend}"
    raise BundleError(f"{bundle} does not have {wanted} (it has: {there}). Compile one: edgeres compile {bundle}{how}")
