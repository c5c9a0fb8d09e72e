"""The doors through which foreign bytes come into edgeres: what goes in, how it is opened, and how it goes wrong."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
from mutations import ARCHIVED, BINARY, TEXTUAL, Mutation, inside_packed, inside_png, inside_tar

from edgeres import files
from edgeres.artifacts import Manifest, Preprocessing, to_json
from edgeres.backends.tensorrt import timing_cache
from edgeres.backends.tensorrt.frames import with_frames
from edgeres.bundle import verify
from edgeres.ci import Hints
from edgeres.difference import difference
from edgeres.errors import BackendError, EdgeresError, SampleError
from edgeres.inspection import inspect_bundle, inspect_packed, verify_bundle
from edgeres.judge import read_baseline, read_reference
from edgeres.noise import Scaling, scalings_from_bytes, scalings_to_bytes
from edgeres.packing import pack, unpack
from edgeres.recipe import load_recipe, recipe_data
from edgeres.reporting import benchmark_of, page
from edgeres.samples import open_samples
from edgeres.validation import against_baseline, compare
from edgeres.validation.github import commands, summary
from edgeres.validation.junit import junit
from examples import (
    COUNT,
    FRAMES,
    KINDS,
    LABELS,
    LOGITS,
    a_benchmark,
    a_report,
    example,
    png,
    saved,
    tarred,
    write_bundle,
)

NO_HINTS: Hints = ((), "")


@dataclass(frozen=True)
class Door:
    """``suffix`` ends the name of a file, ``seeds`` are valid contents, and ``enter`` opens a file of such content."""

    suffix: str
    seeds: tuple[bytes, ...]
    enter: Callable[[Path], object]
    mutations: Mapping[str, Mutation]


def _within(name: str) -> Callable[[Path], object]:
    """Return the door of a file inside a bundle: all that reads a bundle without running it."""

    def enter(path: Path) -> None:
        folder = path.parent / "bundle"
        write_bundle(folder, {} if name == files.MANIFEST else {name: path.read_bytes()})
        if name == files.MANIFEST:
            path.rename(folder / name)
        manifest = verify(folder)
        inspect_bundle(folder)
        difference(folder, folder)
        with contextlib.suppress(ImportError):
            page(folder, manifest)

    return enter


def _packed(path: Path) -> None:
    """Unpack a file, which leaves a whole bundle or nothing."""
    folder = path.parent / "unpacked"
    try:
        unpack(path, folder)
    except EdgeresError:
        assert not folder.exists(), "something was left of what was refused"
        verified = False
        with contextlib.suppress(EdgeresError):
            verify_bundle(path)
            verified = True
        assert not verified, "what cannot be unpacked was verified"
        raise
    assert inspect_packed(path)[1] == {**inspect_bundle(folder), "bundle": str(path)}


def _recipe(path: Path) -> None:
    recipe = load_recipe(path)
    recipe_data(recipe)


def _baseline(path: Path) -> None:
    report = against_baseline(a_report(), read_baseline(path), LABELS, KINDS)
    junit(report, "bundle", 1.0, NO_HINTS)
    summary(report, "bundle", NO_HINTS)


def _benchmark(path: Path) -> None:
    manifest = example(Manifest)
    measured = benchmark_of(path.parent / "bundle", manifest, path)
    page(write_bundle(path.parent / "bundle"), verify(path.parent / "bundle"), measured)


def _names(path: Path) -> None:
    """Let the lines of a file be names of classes, and hold what is written of them to be text alone."""
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    wrong = np.where(np.arange(COUNT) % 2, LABELS, (LABELS + 1) % KINDS)
    names = tuple((lines * KINDS)[:KINDS])
    found = compare(
        LOGITS,
        np.float32(np.eye(KINDS)[wrong]),
        LABELS,
        max_drop_pp=0.5,
        backend="cpu",
        precision="int8",
        classes=names,
    )
    told = junit(found, lines[0], 1.0, NO_HINTS)
    assert {element.tag for element in ElementTree.fromstring(told).iter()} <= JUNIT
    assert all(line.startswith(ANNOTATIONS) for text in commands(found, lines[0]) for line in text.splitlines())
    folder = path.parent / "bundle"
    manifest = verify(write_bundle(folder))
    content = page(folder, msgspec.structs.replace(manifest, report=found, name=lines[0])).decode("utf-8")
    assert "<script" not in content.lower(), "a name is part of the page's code"
    summary(found, lines[0], NO_HINTS)


def _pictures_of(path: Path) -> None:
    _samples(path.parent)


def _samples(path: Path) -> None:
    samples = open_samples(path)
    problems = samples.check()
    if problems:
        raise SampleError(problems[0])
    samples.frame(0)
    samples.glimpse(0, 4)
    samples.sample_set()


def _tar(path: Path) -> None:
    open_samples(path, labelled=True)
    _samples(path)


def _list(path: Path) -> None:
    (path.parent / "a.png").write_bytes(png(FRAMES[0]))
    (path.parent / "b c.png").write_bytes(png(FRAMES[1]))
    _samples(path)


def _timings(path: Path) -> None:
    found = timing_cache.load(str(path), timing_cache.key_of({}))
    if found.warning:
        raise BackendError(found.warning)  # a build says so, and goes on


def enter_wire(path: Path) -> None:
    with_frames(path.read_bytes(), "x", Preprocessing((8, 8)))


def _pictures() -> Iterator[tuple[str, bytes]]:
    """Yield a picture in each of some formats, by its ending."""
    yield ".png", png(FRAMES[0])
    from PIL import Image

    for ending, format_ in ((".jpg", "JPEG"), (".gif", "GIF"), (".bmp", "BMP")):
        stream = io.BytesIO()
        Image.fromarray(FRAMES[0]).save(stream, format_)
        yield ending, stream.getvalue()


RECIPE = b"""name = "net"
precision = "int8"
[model]
source = "resnet50"
weights = "w.pth"
num_classes = 10
seed = 1
[input]
size = [224, 160]
resize = 256
mean = [0.5, 0.25, 0.125]
color = "bgr"
fit = "crop"
[calibration]
samples = "images"
count = 512
percentile = 99.9
[quantization]
keep_float = ["fc", "layer1.*"]
budget_minutes = 0.5
[validation]
max_drop = 0.5
[engine]
target = "gpu"
batch = [1, 8, 32]
timing_cache = "t.bin"
strict = true
"""
NAMES = b'cat\n"dog"\nhorse\nship\n'
JUNIT = {"testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped", "error", "system-out"}
ANNOTATIONS = ("::error ", "::warning ", "::notice ")
LIST = b"# samples\na.png 0\nb c.png, 1\n\na.png\t2\n"


def base_doors(folder: Path) -> dict[str, Door]:
    """Return the doors of the runtime half, by name; seeds are made in an empty ``folder``."""
    seed = write_bundle(folder / "seed")
    packed = Path(pack(seed, folder / "seed.edgeres").path).read_bytes()
    named = {"images": FRAMES, "labels": LABELS}
    doors = {
        "recipe": Door(".toml", (RECIPE, (seed / files.RECIPE).read_bytes()), _recipe, TEXTUAL),
        "manifest": Door(".json", ((seed / files.MANIFEST).read_bytes(),), _within(files.MANIFEST), TEXTUAL),
        "packed bundle": Door(
            ".edgeres", (packed,), _packed, {**BINARY, "changed inside, checksums right": inside_packed}
        ),
        "calibration table": Door(".json", ((seed / files.TABLE).read_bytes(),), _within(files.TABLE), TEXTUAL),
        "errors of layers": Door(".json", ((seed / files.ERRORS).read_bytes(),), _within(files.ERRORS), TEXTUAL),
        "report, baseline": Door(".json", (to_json(a_report()),), _baseline, TEXTUAL),
        "benchmark": Door(".json", (to_json(a_benchmark()),), _benchmark, TEXTUAL),
        "names in a page, JUnit and GitHub": Door(".txt", (NAMES,), _names, TEXTUAL),
        "list of samples": Door(".txt", (LIST,), _list, TEXTUAL),
        "timing cache": Door(".bin", (_a_timing_cache(folder),), _timings, {**TEXTUAL, **BINARY}),
        "npy": Door(".npy", (saved(np.save, FRAMES),), _samples, {**BINARY, **TEXTUAL}),
        "npz": Door(".npz", (saved(np.savez, **named), saved(np.savez_compressed, **named)), _samples, ARCHIVED),
        "tar": Door(
            ".tar",
            tuple(tarred(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
            _tar,
            {**BINARY, "changed inside, checksums right": inside_tar},
        ),
        "reference logits": Door(
            ".npz",
            ((seed / files.REFERENCE).read_bytes(),),
            lambda path: read_reference(path.read_bytes(), str(path)),
            ARCHIVED,
        ),
        "scalings": Door(
            ".npz",
            (scalings_to_bytes({"a": Scaling(np.ones(3), np.ones(3))}),),
            lambda path: scalings_from_bytes(path.read_bytes(), str(path)),
            ARCHIVED,
        ),
    }
    for ending, content in _pictures():
        more = {"changed inside, checksums right": inside_png} if ending == ".png" else {}
        doors[f"image {ending[1:]}"] = Door(ending, (content,), _pictures_of, {**BINARY, **more})
    return doors


FOLDER = Door("", (), _samples, {})
"""A folder of images, of which only :mod:`hostile` has bad ones."""


def _a_timing_cache(folder: Path) -> bytes:
    timing_cache.save(str(folder / "timings"), timing_cache.key_of({}), b"timings")
    return (folder / "timings").read_bytes()
