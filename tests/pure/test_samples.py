"""Samples: folders, list files and arrays; their order, labels, hashes and batches; and everything that is refused."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import os
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np
import pytest

from edgeres.artifacts import Preprocessing, SampleSet, from_json, to_json
from edgeres.errors import MissingPackageError, RecipeError, SampleError
from edgeres.preprocess import prepare
from edgeres.samples import Samples, open_samples, samples_from_arrays
from edgeres.samples import arrays as arrays_file
from edgeres.samples.collection import in_order

Image = pytest.importorskip("PIL.Image")

PREPROCESSING = Preprocessing((8, 8), 10)


def noise(height: int = 12, width: int = 14, seed: int = 0) -> np.ndarray:
    frame: np.ndarray = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return frame


def put(path: Path, frame: Any = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if frame is None else frame).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a folder of three classes with 4, 3 and 2 images."""
    for label, (name, count) in enumerate([("ape", 4), ("bee", 3), ("cat", 2)]):
        for index in range(count):
            put(tmp_path / "data" / name / f"{index}.png", noise(12 + index, 14, 10 * label + index))
    return tmp_path / "data"


# Folders


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ["b.png", "a/z.JPEG", "a/y/1.bmp", "a-b/1.png", "B.PNG", "a.png"]:
        put(tmp_path / name)
    for name in [".hidden.png", ".cache/1.png", "a/._z.png"]:
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    samples = open_samples(tmp_path)
    assert samples.names == ("B.PNG", "a-b/1.png", "a.png", "a/y/1.bmp", "a/z.JPEG", "b.png")
    assert samples.labels is None
    assert samples.classes is None
    assert (len(samples), samples.available, samples.source) == (6, 6, str(tmp_path))


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "bmp", "webp", "ppm", "tif", "TIFF", "gif"])
def test_every_ending(tmp_path: Path, ending: str) -> None:
    put(tmp_path / f"x.{ending}")
    frame = open_samples(str(tmp_path)).frame(0)
    assert frame.shape == (12, 14, 3)
    assert frame.dtype == np.uint8
    if ending in {"png", "bmp", "ppm", "tif", "TIFF"}:
        np.testing.assert_array_equal(frame, noise())


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "real" / "1.png")
    put(tmp_path / "data" / "own.png")
    try:
        os.symlink(tmp_path / "real", tmp_path / "data" / "linked")
        os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    except OSError:
        pytest.skip("this file system or user makes no links")
    assert open_samples(tmp_path / "data").names == ("linked/1.png", "own.png")


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as stream:
            stream.write(put(tmp_path / "x" / "y.png").read_bytes())
    except OSError:
        pytest.skip("this file system wants UTF-8")
    samples = open_samples(tmp_path)
    assert samples.names == ("x/y.png", "\\xff.png")
    assert samples.frame(1).shape == (12, 14, 3)
    assert from_json(to_json(samples.sample_set()), SampleSet, "x") == samples.sample_set()


def test_classes_are_sorted_folders(classes: Path) -> None:
    samples = open_samples(classes, labelled=True)
    assert samples.classes == ("ape", "bee", "cat")
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    assert samples.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert samples.names[4] == "bee/0.png"
    np.testing.assert_array_equal(samples.frame(5), noise(13, 14, 11))
    plain = open_samples(classes)
    assert plain.labels is None
    assert plain.classes is None
    assert plain.names == samples.names


def test_labels_follow_their_images_where_folder_and_path_order_differ(tmp_path: Path) -> None:
    # "a-b/…" sorts before "a/…", but the folder "a" before "a-b".
    put(tmp_path / "a" / "1.png")
    put(tmp_path / "a-b" / "1.png")
    samples = open_samples(tmp_path, labelled=True)
    assert samples.classes == ("a", "a-b")
    assert samples.labels is not None
    assert dict(zip(samples.names, samples.labels.tolist())) == {"a/1.png": 0, "a-b/1.png": 1}


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    samples = open_samples(tmp_path, labelled=True)
    assert samples.labels is None
    assert samples.classes is None


def test_unclear_classes_are_refused(classes: Path, tmp_path: Path) -> None:
    put(classes / "loose.png")
    with pytest.raises(SampleError, match=r"loose\.png.*which classes"):
        open_samples(classes, labelled=True)
    (classes / "loose.png").unlink()
    (classes / "beta").mkdir()
    with pytest.raises(SampleError, match="beta holds no image"):
        open_samples(classes, labelled=True)
    with pytest.raises(SampleError, match=r"data/ape/0\.png lies deeper"):
        open_samples(tmp_path, labelled=True)
    assert len(open_samples(tmp_path)) == 9


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="does not exist"):
        open_samples(tmp_path / "nowhere")
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(SampleError, match="holds no image"):
        open_samples(tmp_path)
    with pytest.raises(SampleError, match="none of the sources"):
        open_samples(tmp_path / "readme.md")
    with pytest.raises(SampleError, match="single image"):
        open_samples(put(tmp_path / "1.png"))


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "1.png")
    scandir = os.scandir

    def refuse(path: Path) -> Any:  # as the kernel would; root, who runs some CI jobs, may read everything
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SampleError, match=r"cannot read .*Permission denied"):
        open_samples(tmp_path)


# Counts


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9])
def test_a_count_is_spread_evenly(classes: Path, count: int) -> None:
    every = open_samples(classes, labelled=True)
    samples = open_samples(classes, count=count, labelled=True)
    wanted = [index * 9 // count for index in range(count)]
    assert samples.names == tuple(every.names[index] for index in wanted)
    assert samples.labels is not None
    assert every.labels is not None
    assert samples.labels.tolist() == every.labels[wanted].tolist()
    assert samples.sha256() == tuple(every.sha256()[index] for index in wanted)
    assert (len(samples), samples.available) == (count, 9)
    np.testing.assert_array_equal(samples.frame(count - 1), every.frame(wanted[-1]))
    if count == 3:
        assert samples.labels.tolist() == [0, 0, 1]


def test_a_count_beyond_the_samples_takes_all(classes: Path) -> None:
    samples = open_samples(classes, count=100)
    assert (len(samples), samples.available) == (9, 9)


def test_a_subset_of_a_subset(classes: Path) -> None:
    samples = open_samples(classes, count=4)
    assert samples.subset(2).names == (samples.names[0], samples.names[2])
    with pytest.raises(SampleError, match="at least 1"):
        samples.subset(0)
    with pytest.raises(SampleError, match="at least 1"):
        open_samples(classes, count=-3)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 9])
def test_the_samples_after_some_are_the_rest(classes: Path, count: int) -> None:
    samples = open_samples(classes, labelled=True)
    rest = samples.after(count)
    assert rest.names == samples.names[count:]
    assert rest.sha256() == samples.sha256()[count:]
    assert rest.labels is not None
    assert samples.labels is not None
    np.testing.assert_array_equal(rest.labels, samples.labels[count:])
    batches = list(rest.batches(Preprocessing((8, 8)), 4))
    assert sum(map(len, batches)) == len(rest)


# List files


def listed(folder: Path, text: str, name: str = "list.txt") -> Samples:
    (folder / name).write_text(text, encoding="utf-8")
    return open_samples(folder / name)


def test_a_list_file_without_labels(tmp_path: Path) -> None:
    for name in ["b.png", "sub/a b.jpg", "7"]:
        put(tmp_path / name, format="PNG")
    samples = listed(tmp_path, "\ufeff# chosen by hand\nsub/a b.jpg\n\n  b.png  \r\n7\n", "list.LST")
    assert samples.names == ("sub/a b.jpg", "b.png", "7")
    assert samples.labels is None
    assert samples.frame(2).shape == (12, 14, 3)


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "  ,\t"])
def test_a_list_file_with_labels(tmp_path: Path, separator: str) -> None:
    for name in ["a 1.png", "b,2.JPEG", "c"]:
        put(tmp_path / name, format="PNG")
    samples = listed(tmp_path, "".join(f"{n}{separator}{label}\n" for n, label in [("b,2.JPEG", 65), ("a 1.png", 0)]))
    assert samples.names == ("b,2.JPEG", "a 1.png")
    assert samples.labels is not None
    assert samples.labels.tolist() == [65, 0]
    assert samples.labels.dtype == np.int64
    assert samples.classes is None
    assert listed(tmp_path, f"c{separator}3\n").names == ("c",)


def test_a_list_file_may_name_absolute_paths_and_one_image_twice(tmp_path: Path) -> None:
    path = put(tmp_path / "elsewhere" / "1.png")
    samples = listed(tmp_path, f"{path}\n{path}\n")
    assert len(samples) == 2
    assert samples.sha256()[0] == samples.sha256()[1] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png\nmissing.png\n", "line 2: there is no file missing.png"),
        ("a.png cat\n", "line 1: label cat is not a whole number"),
        ("a.png 1.5\n", "label 1.5 is not a whole number"),
        ("a.png -1\n", "label -1 is not a whole number from 0"),
        ("a.png 2147483648\n", "larger than"),
        (f"a.png {'9' * 5000}\n", "larger than"),
        ("a.png 1\nb.png\n", "labels to 1 of 2"),
        ("# nothing\n\n", "names no image"),
        ("a\0b.png\n", "there is no file"),
    ],
)
def test_list_files_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    with pytest.raises(SampleError) as caught:
        listed(tmp_path, text)
    assert said in str(caught.value)
    assert "list.txt" in str(caught.value)


def test_every_wrong_line_is_told_up_to_a_point(tmp_path: Path) -> None:
    with pytest.raises(SampleError) as caught:
        listed(tmp_path, "".join(f"{index}.png\n" for index in range(25)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert "and 15 more" in lines[-1]


def test_a_list_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SampleError, match="not UTF-8"):
        open_samples(tmp_path / "list.txt")


# Arrays


def test_npy(tmp_path: Path) -> None:
    images = np.stack([noise(seed=seed) for seed in range(5)])
    np.save(tmp_path / "x.npy", images)
    samples = open_samples(tmp_path / "x.npy")
    assert samples.names == tuple(f"x.npy[{index}]" for index in range(5))
    assert samples.labels is None
    np.testing.assert_array_equal(samples.frame(3), images[3])
    assert isinstance(samples._content._images, np.memmap)  # type: ignore[attr-defined]
    assert samples.check() == []


def test_npz(tmp_path: Path) -> None:
    images = np.stack([noise(seed=seed) for seed in range(5)])
    labels = np.array([3, 0, 2, 2, 1], np.uint8)
    for name, save in (("a.npz", np.savez), ("b.NPZ", np.savez_compressed)):
        with open(tmp_path / name, "wb") as stream:
            save(stream, images=images, labels=labels)
        samples = open_samples(tmp_path / name, count=2)
        assert samples.labels is not None
        assert samples.labels.tolist() == [3, 2]
        assert samples.labels.dtype == np.int64
        np.testing.assert_array_equal(samples.frame(1), images[2])
    np.savez(tmp_path / "c.npz", images=images)
    assert open_samples(tmp_path / "c.npz", labelled=True).labels is None


def test_arrays_in_memory_are_the_samples_that_their_files_are(tmp_path: Path) -> None:
    images = np.stack([noise(seed=seed) for seed in range(3)])
    np.savez(tmp_path / "x.npz", images=images)
    samples = samples_from_arrays(images, np.array([2, 1, 0]))
    assert samples.sha256() == open_samples(tmp_path / "x.npz").sha256()
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 1, 0]
    assert samples_from_arrays(images[:, ::-1]).sha256() != samples.sha256()
    # The same bytes in another shape are another sample.
    assert samples_from_arrays(images.reshape(3, 14, 12, 3)).sha256() != samples.sha256()
    np.testing.assert_array_equal(samples_from_arrays(images[::-1]).sha256(), samples.sha256()[::-1])


FRAMES = np.zeros((4, 5, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": FRAMES.astype(np.float32)}, "float32"),
        ({"images": FRAMES[0]}, r"\(5, 6, 3\)"),
        ({"images": FRAMES[..., 0]}, r"\(4, 5, 6\)"),
        ({"images": FRAMES.transpose(0, 3, 1, 2)}, r"\(4, 3, 5, 6\)"),
        ({"images": FRAMES[:0]}, "at least one"),
        ({"x": FRAMES, "y": FRAMES}, "holds x, y"),
        ({"images": FRAMES, "labels": np.arange(3)}, r"shape \(3,\) for 4"),
        ({"images": FRAMES, "labels": np.arange(4)[:, None]}, r"shape \(4, 1\)"),
        ({"images": FRAMES, "labels": np.arange(4.0)}, "float64"),
        ({"images": FRAMES, "labels": np.array([True] * 4)}, "bool"),
        ({"images": FRAMES, "labels": np.array([0, 1, -1, 2])}, r"labels\[2\] is -1"),
        ({"images": FRAMES, "labels": np.array([0, 1, 2**64 - 1, 2], np.uint64)}, r"labels\[2\]"),
        ({"images": np.array([object()] * 4)}, "object arrays"),
        ({"images": FRAMES, "labels": np.array(["a", None, 1, 2], object)}, "object arrays"),
    ],
)
def test_arrays_that_are_no_samples(tmp_path: Path, arrays: Any, said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SampleError, match=said) as caught:
        open_samples(tmp_path / "x.npz")
    assert "x.npz" in str(caught.value)


def test_npy_files_that_are_damaged_or_pickles(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}], object))
    with pytest.raises(SampleError, match=r"x\.npy"):
        open_samples(path)
    np.save(path, FRAMES)
    for content in (path.read_bytes()[:-1], path.read_bytes()[:30], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(SampleError, match=r"cannot read .*x\.npy"):
            open_samples(path)
    with open(path, "wb") as stream:
        np.savez(stream, images=FRAMES)
    with pytest.raises(SampleError, match=r"end in \.npz"):
        open_samples(path)


def test_npz_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with open(path, "wb") as stream:
        np.savez_compressed(stream, images=np.stack([noise(40, 40, seed) for seed in range(4)]))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[:-30], bytes(flipped), b"PK", b""):
        path.write_bytes(content)
        with pytest.raises(SampleError, match=r"x\.npz"):
            open_samples(path)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_npz_that_asks_for_more_memory_than_it_holds(tmp_path: Path) -> None:
    lying = npy(FRAMES).replace(b"(4, 5, 6, 3)", b"(9999999,9,9,3)").replace(b"   \n", b"\n", 1)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", lying)
    with pytest.raises(SampleError, match="header promises"):
        open_samples(tmp_path / "x.npz")


def test_a_zip_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy(FRAMES))
    content = path.read_bytes()
    # In the central directory the uncompressed size stands 24 bytes behind the entry's signature.
    at = content.index(b"PK\x01\x02") + 24
    path.write_bytes(content[:at] + struct.pack("<I", 0xFFFFFFF0) + content[at + 4 :])
    limit, arrays_file.LARGEST_BYTES = arrays_file.LARGEST_BYTES, 2**32 - 100
    try:
        with pytest.raises(SampleError, match="claims to unpack"):
            open_samples(path)
    finally:
        arrays_file.LARGEST_BYTES = limit
    assert limit == 64 * 2**30


# Images of every mode


def frame_of(tmp_path: Path, image: Any, name: str = "x.png", **options: Any) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return open_samples(tmp_path).frame(0)


def test_greyscale_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    colour = noise()
    grey = colour[..., 0]
    np.testing.assert_array_equal(frame_of(tmp_path, Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    transparent = np.concatenate([colour, grey[..., None]], axis=2)
    np.testing.assert_array_equal(frame_of(tmp_path, Image.fromarray(transparent)), colour)
    palette = Image.fromarray(colour).quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(frame_of(tmp_path, palette), wanted)
    np.testing.assert_array_equal(frame_of(tmp_path, palette, transparency=bytes(range(16))), wanted)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(frame_of(tmp_path, bits))) <= {0, 255}
    assert frame_of(tmp_path, Image.fromarray(colour).convert("CMYK"), "w.jpg").shape == (12, 14, 3)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = frame_of(tmp_path, Image.fromarray(values), name)
    np.testing.assert_array_equal(got, np.rint(values / 257.0).astype(np.uint8)[..., None].repeat(3, 2))
    assert (got[0, 0, 0], got[-1, -1, 0]) == (0, 255)


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    samples = open_samples(tmp_path)
    with pytest.raises(SampleError, match=r"x\.tif: its pixels are floating-point"):
        samples.frame(0)
    assert len(samples.check()) == 1
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(SampleError, match="beyond 16 bits"):
        open_samples(tmp_path).frame(0)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "x.jpg", exif=exif)
    assert open_samples(tmp_path).frame(0).shape == (12, 14, 3)


def test_broken_images_are_named(tmp_path: Path) -> None:
    good = put(tmp_path / "a.png", noise(64, 64))
    whole, jpeg = good.read_bytes(), put(tmp_path / "b.jpg", noise(64, 64)).read_bytes()
    broken = {
        "c.png": whole[:-200],
        "d.jpg": jpeg[: len(jpeg) // 2],
        "e.png": b"nonsense",
        "f.gif": b"",
        "g.png": whole[:40],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    samples = open_samples(tmp_path)
    assert samples.names[:2] == ("a.png", "b.jpg")
    for index, name in enumerate(samples.names):
        if name in broken:
            with pytest.raises(SampleError, match=f"cannot read .*{name}: .*Repair or remove it"):
                samples.frame(index)
    found = samples.check(threads=2)
    assert [name for name in broken if any(name in problem for problem in found)] == list(broken)
    assert len(found) == len(broken)
    with pytest.raises(SampleError, match=r"c\.png"):
        list(samples.batches(PREPROCESSING, 2, threads=2))


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png")
    samples = open_samples(tmp_path)
    path.unlink()
    for read in (lambda: samples.frame(0), samples.sha256, samples.sample_set):
        with pytest.raises(SampleError, match=r"a\.png: No such file"):
            read()
    (problem,) = samples.check()
    assert "a.png" in problem


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [20, 100])
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # Beyond twice its limit Pillow refuses by itself, between the two it warns.
    put(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    samples = open_samples(tmp_path)
    with pytest.raises(SampleError, match=rf"a\.png: .*limit of {limit}\b"):
        samples.frame(0)
    assert "limit" in samples.check()[0]


@pytest.mark.parametrize("tall", [False, True])
def test_thin_images_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tall: bool
) -> None:
    """65 million rows of one pixel are fewer pixels than the limit, and took Pillow 2 GB."""
    put(tmp_path / "a.png")
    header = struct.pack(">II", *((1, 65_000_000) if tall else (65_000_000, 1))) + bytes((8, 2, 0, 0, 0))
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "a.png").write_bytes(content + data)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("it was decoded"))
    samples = open_samples(tmp_path)
    with pytest.raises(SampleError, match=r"a\.png: .* are too thin: a side has 524,288 at most"):
        samples.frame(0)
    assert "too thin" in samples.check()[0]


def test_without_pillow_arrays_are_read_and_images_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.png")
    np.save(tmp_path / "x.npy", FRAMES)
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError("No module named 'PIL'")
        return original(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "edgeres.samples.images", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert len(open_samples(tmp_path / "x.npy")) == 4
    with pytest.raises(MissingPackageError, match=r"Pillow.*edgeres\[images\]"):
        open_samples(tmp_path)


# Hashes and the digest


def test_hashes_are_of_the_files(classes: Path) -> None:
    samples = open_samples(classes)
    wanted = tuple(hashlib.sha256((classes / name).read_bytes()).hexdigest() for name in samples.names)
    assert samples.sha256() == wanted
    assert samples.sha256() == wanted
    chosen = samples.sample_set()
    assert (chosen.names, chosen.sha256, chosen.source, chosen.count) == (samples.names, wanted, classes.name, 9)
    assert len(chosen.digest) == 64


def test_the_digest_covers_names_content_labels_and_order(classes: Path) -> None:
    digests = {
        "plain": open_samples(classes).sample_set().digest,
        "labels": open_samples(classes, labelled=True).sample_set().digest,
        "fewer": open_samples(classes, count=8).sample_set().digest,
    }
    lines = [f"ape/{index}.png" for index in range(4)]
    for name, order in (("order", lines), ("other order", lines[::-1])):
        (classes / "list.txt").write_text("\n".join(order))
        digests[name] = open_samples(classes / "list.txt").sample_set().digest
    for name, label in (("label 1", 1), ("label 2", 2)):
        (classes / "list.txt").write_text("\n".join(f"{line} {label}" for line in lines))
        digests[name] = open_samples(classes / "list.txt").sample_set().digest
    (classes / "list.txt").unlink()
    put(classes / "ape" / "0.png", noise(seed=99))
    digests["content"] = open_samples(classes).sample_set().digest
    (classes / "ape" / "0.png").rename(classes / "ape" / "00.png")
    digests["name"] = open_samples(classes).sample_set().digest
    assert len(set(digests.values())) == len(digests)


def test_the_digest_does_not_depend_on_where_the_folder_lies(classes: Path, tmp_path: Path) -> None:
    before = open_samples(classes).sample_set()
    moved = classes.rename(tmp_path / "moved")
    assert open_samples(moved).sample_set().digest == before.digest


# Batches


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_prepared_frames_in_order(classes: Path, batch_size: int, threads: int) -> None:
    samples = open_samples(classes)
    batches = list(samples.batches(PREPROCESSING, batch_size, threads))
    assert [len(batch) for batch in batches] == [min(batch_size, 9 - at) for at in range(0, 9, batch_size)]
    wanted = np.stack([prepare(samples.frame(index), PREPROCESSING) for index in range(9)])
    np.testing.assert_array_equal(np.concatenate(batches), wanted)
    assert all(batch.dtype == np.float32 and batch.flags.c_contiguous for batch in batches)


def test_batches_can_be_taken_again_and_do_not_share_memory(classes: Path) -> None:
    samples = open_samples(classes)
    first = list(samples.batches(PREPROCESSING, 4))
    for batch in first:
        batch[:] = 0
    assert all(batch.any() for batch in samples.batches(PREPROCESSING, 4))


def test_mistakes_are_told_before_the_first_batch(classes: Path) -> None:
    samples = open_samples(classes)
    with pytest.raises(SampleError, match="at least 1"):
        samples.batches(PREPROCESSING, 0)
    with pytest.raises(RecipeError, match="resize"):
        samples.batches(Preprocessing((8, 8), 4), 2)


def test_a_frame_that_does_not_cover_the_crop_is_named(tmp_path: Path) -> None:
    put(tmp_path / "big.png", noise(20, 20))
    put(tmp_path / "small.png", noise(7, 20))
    with pytest.raises(SampleError, match=r"small\.png: .*does not cover"):
        list(open_samples(tmp_path).batches(Preprocessing((8, 8)), 2))


class Counting:
    """A source that notes which frames were asked for, and which thread asked."""

    labels: Optional[np.ndarray] = None
    classes: Optional[Tuple[str, ...]] = None

    weight = 0
    in_memory = False

    def __init__(self, count: int) -> None:
        self.names = tuple(str(index) for index in range(count))
        self.asked: List[int] = []

    def frame(self, index: int) -> np.ndarray:
        self.asked.append(index)
        return np.full((8, 8, 3), index % 256, np.uint8)

    def sha256(self, index: int) -> str:
        return f"{index:064x}"

    def problem(self, index: int) -> None:
        return None


def workers() -> List[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("edgeres-samples")]


def test_decoding_runs_a_bounded_way_ahead_and_stops_when_closed() -> None:
    source = Counting(1000)
    batches = Samples("x", source).batches(Preprocessing((8, 8)), 10, threads=2)
    assert source.asked == []
    next(batches)
    time.sleep(0.2)
    # One batch given out, and one ahead.
    assert len(source.asked) <= 20
    next(batches)
    assert workers()
    batches.close()
    asked = len(source.asked)
    assert asked <= 30
    assert workers() == []
    time.sleep(0.05)
    assert len(source.asked) == asked


def test_workers_stop_when_a_sample_fails() -> None:
    class Failing(Counting):
        def frame(self, index: int) -> np.ndarray:
            if index == 25:
                raise SampleError("cannot read 25: no.")
            return super().frame(index)

    batches = Samples("x", Failing(1000)).batches(Preprocessing((8, 8)), 10, threads=2)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(SampleError, match="cannot read 25"):
        next(batches)
    assert workers() == []


def test_bugs_come_out_as_they_are() -> None:
    def fail(item: int) -> int:
        raise ZeroDivisionError(item)

    with pytest.raises(ZeroDivisionError):
        list(in_order(fail, range(5), 2))


def test_work_is_shared_among_threads() -> None:
    both = threading.Barrier(2, timeout=20)
    # Each call waits for another one, so a single thread would not get through.
    assert list(in_order(lambda item: both.wait() * 0 + item, range(6), threads=2)) == list(range(6))


def test_frames_are_decoded_only_when_asked_for(classes: Path) -> None:
    for path in classes.glob("*/*.png"):
        path.write_bytes(b"nonsense")
    samples = open_samples(classes, labelled=True)
    assert len(samples) == 9
    assert len(samples.sha256()) == 9
    with pytest.raises(SampleError):
        samples.frame(0)
