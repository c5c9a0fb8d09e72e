"""Samples in tars and in object stores: the same ones as in a folder, and nothing unpacked, followed or believed."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeres.errors import EdgeresError, MissingPackageError, SampleError
from edgeres.recipe import load_recipe, place_of
from edgeres.samples import Samples, open_samples
from edgeres.samples.tars import Member, expanded, members

Image = pytest.importorskip("PIL.Image")

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(seed: int) -> bytes:
    frame = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def packed(files: Dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def unpacked(files: Dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def by_class(count: int = 3) -> Dict[str, bytes]:
    return {f"{name}/{i}.png": picture(10 * label + i) for label, name in enumerate("ab") for i in range(count)}


def keyed(count: int = 6) -> Dict[str, bytes]:
    """Return files as WebDataset has them: two of each sample."""
    files: Dict[str, bytes] = {}
    for i in range(count):
        files[f"{i:06}.png"] = picture(i)
        files[f"{i:06}.cls"] = str(i % 3).encode()
    return files


def same(one: Samples, other: Samples) -> bool:
    assert all((one.frame(i) == other.frame(i)).all() for i in range(len(one)))
    assert one.names == other.names
    assert one.classes == other.classes
    return one.sample_set().digest == other.sample_set().digest


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_tar_holds_the_samples_of_the_folder_that_it_was_made_of(tmp_path: Path, kind: str, labelled: bool) -> None:
    files = {**by_class(), "b/" + 120 * "long" + ".png": picture(5), "b/ü.png": picture(6), "b/.hidden.png": b"x"}
    folder = unpacked({name: files[name] for name in files if len(name) < 255}, tmp_path / "folder")
    backwards = {name: files[name] for name in sorted(files, reverse=True) if len(name) < 255}
    (tmp_path / "x.tar").write_bytes(packed(backwards, FORMATS[kind]))
    there = open_samples(tmp_path / "x.tar", labelled=labelled)
    assert same(there, open_samples(folder, labelled=labelled))
    assert there.classes == (("a", "b") if labelled else None)


def test_the_command_tar_makes_such_tars(tmp_path: Path) -> None:
    folder = unpacked(by_class(), tmp_path / "folder")
    assert os.spawnlp(os.P_WAIT, "tar", "tar", "-cf", str(tmp_path / "x.tar"), "-C", str(folder), ".") == 0
    assert same(open_samples(tmp_path / "x.tar", labelled=True), open_samples(folder, labelled=True))


def test_however_samples_are_spread_over_tars(tmp_path: Path) -> None:
    files = by_class(5)
    folder, shards = unpacked(files, tmp_path / "folder"), tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        part = {name: files[name] for name in sorted(files)[number::3]}
        (shards / f"s-{number:02}.tar").write_bytes(packed(part))
    (shards / "readme.txt").write_text("three tars")
    for source in (shards, shards / "s-{00..02}.tar"):
        assert same(open_samples(source, labelled=True), open_samples(folder, labelled=True))
    every, fewer = (open_samples(shards / f"s-{{00..0{last}}}.tar").sample_set().digest for last in (2, 1))
    assert every != fewer


def test_labels_stand_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed(keyed()))
    samples = open_samples(tmp_path / "x.tar", labelled=True)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert samples.names == tuple(f"{i:06}.png" for i in range(6))
    plain = open_samples(tmp_path / "x.tar")
    assert plain.labels is None  # as of a folder, whose .cls files nobody reads
    assert same(plain, open_samples(unpacked(keyed(), tmp_path / "folder")))


BAD_LABELS = {
    "one is missing": ({"000001.cls": None}, "no label"),
    "no number": ({"000001.cls": b"cat"}, "whole number"),
    "negative": ({"000001.cls": b"-1"}, "whole number"),
    "too large": ({"000001.cls": b"99999999999"}, "whole number"),
    "long": ({"000001.cls": b"1" * 4000}, "whole number"),
}


@pytest.mark.parametrize(("change", "words"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_refused(tmp_path: Path, change: Dict[str, Optional[bytes]], words: str) -> None:
    files = {name: content for name, content in {**keyed(), **change}.items() if content is not None}
    (tmp_path / "x.tar").write_bytes(packed(files))
    with pytest.raises(SampleError, match=words):
        open_samples(tmp_path / "x.tar", labelled=True)


TWO_LABELS = {
    "names with dots": [{f"f.{i}.png": picture(i) for i in (0, 1)}, {"f.0.cls": b"3", "f.1.cls": b"7"}],
    "in two tars": [{"f.png": picture(0), "f.cls": b"3"}, {"f.jpg": picture(1), "f.cls": b"7"}],
}


@pytest.mark.parametrize("tars", TWO_LABELS.values(), ids=TWO_LABELS)
def test_a_second_label_of_a_sample_is_refused(tmp_path: Path, tars: List[Dict[str, bytes]]) -> None:
    for number, files in enumerate(tars):
        more = {f"g{number}.png": picture(9), f"g{number}.cls": b"1"}
        (tmp_path / f"{number}.tar").write_bytes(packed({**files, **more, "h.cls": b"2"}))
    with pytest.raises(SampleError, match=r"more than one label \(\.cls\) for f, h\."):
        open_samples(tmp_path, labelled=True)
    assert open_samples(tmp_path).labels is None


NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.dictionaries(st.lists(NAME, min_size=1, max_size=4).map("/".join), st.binary(max_size=1500), max_size=6),
    st.sampled_from(sorted(FORMATS)),
)
def test_members_are_those_that_the_standard_library_finds(files: Dict[str, bytes], kind: str) -> None:
    try:
        content = packed(files, FORMATS[kind])
    except ValueError:  # a name that is too long for the format
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        wanted = [Member(one.name, one.offset_data, one.size) for one in archive]
    assert list(members(io.BytesIO(content), len(content))) == wanted
    for member in wanted:
        assert content[member.offset :][: member.size] == files[member.name]


@given(data=st.data())
def test_a_damaged_tar_is_read_or_refused_and_never_out_of_bounds(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(packed({"a" * 90 + "/" + 60 * "a" + ".png": b"x" * 700, "b.png": b"y"}, FORMATS[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for start in range(0, len(content), 512):  # right checksums, or nearly all would be refused for these
        with_sum = bytes(content[start : start + 148]) + b" " * 8 + bytes(content[start + 156 : start + 512])
        content[start + 148 : start + 156] = b"%06o\0 " % sum(with_sum)
    cut = data.draw(st.integers(0, len(content)))
    try:
        found = list(members(io.BytesIO(bytes(content[:cut])), cut))
    except SampleError:
        return
    assert all(0 <= member.offset <= member.offset + member.size <= cut for member in found)


def with_header(**fields: Any) -> bytes:
    member = tarfile.TarInfo("a.png")
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT)


HOSTILE = {
    "is empty": (b"", "not a tar"),
    "is an image": (picture(0), "not a tar"),
    "ends early": (packed({"a.png": picture(0)})[:600], "ends in the midst"),
    "promises more than there is": (with_header(size=1 << 50), "ends in the midst"),
    "has a negative size": (with_header(size=-512), "tells of -512 bytes"),
    "has a huge extended header": (with_header(type=tarfile.XHDTYPE, size=1 << 40) + bytes(1024), "extended header"),
    "has a huge name": (with_header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 40) + bytes(1024), "extended header"),
    "has two names": (
        2 * (with_header(type=tarfile.GNUTYPE_LONGNAME, size=9) + b"name.png\0".ljust(512, b"\0")),
        "second",
    ),
    "has two extended headers": (
        2 * (with_header(type=tarfile.XHDTYPE, size=9) + b"9 path=a\n".ljust(512, b"\0")),
        "second",
    ),
    "is sparse": (with_header(type=tarfile.GNUTYPE_SPARSE) + bytes(1024), "sparse"),
    "leads out": (packed({"../a.png": picture(0)}), "leads out"),
    "is absolute": (packed({"/etc/a.png": picture(0)}), "leads out"),
    "has a name twice": (packed({"a.png": picture(0)})[:1536] + packed({"a.png": picture(1)}), "twice"),
    "holds no image": (packed({"a.txt": b"x"}), "no image"),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tar_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(SampleError, match=words):
        open_samples(tmp_path / "x.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_records_that_do_not_matter_are_neither_kept_nor_copied() -> None:
    """An extended header for each file, full of records: each is read once, and forgotten."""
    records = b"".join(b"13 %06x=yz\n" % number for number in range((1 << 16) // 13))
    header = with_header(type=tarfile.XHDTYPE, size=len(records)) + records.ljust(1 << 16, b"\0")
    content = 20 * (header + with_header(name="a.png"))
    tracemalloc.start()
    try:
        assert len(list(members(io.BytesIO(content), len(content)))) == 20
        assert tracemalloc.get_traced_memory()[1] < 500_000  # the header itself, two times, and few records
    finally:
        tracemalloc.stop()


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png"), (tarfile.CHRTYPE, "c.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, str(tmp_path / "secret.png"), 5000
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("d.png"))
    (tmp_path / "x.tar").write_bytes(stream.getvalue())
    assert open_samples(tmp_path / "x.tar").names == ("d.png",)


def test_a_packed_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(SampleError, match="Unpack it"):
        open_samples(tmp_path / "x.tar.gz")


def test_a_tar_that_is_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed({"a.png": picture(0)}))
    samples = open_samples(tmp_path / "x.tar")
    os.truncate(tmp_path / "x.tar", 600)
    with pytest.raises(SampleError, match=r"a\.png in .*x\.tar: its file ends"):
        samples.frame(0)


def test_patterns_are_those_of_webdataset() -> None:
    assert expanded("a-{08..11}.tar") == ("a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar")
    assert expanded("{0..1}/{0..1}.tar") == ("0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar")
    assert expanded("plain.tar") == ("plain.tar",)
    with pytest.raises(SampleError, match="more than"):
        expanded("{0..999999999}.tar")
    with pytest.raises(SampleError, match="more than"):
        expanded("{0..999}/{0..999}.tar")
    with pytest.raises(SampleError, match="more than"):  # counted, and never made
        expanded("-".join(20 * ["{0..9999}"]))


# Object stores


@pytest.fixture
def store() -> Any:
    """Return a store in memory, empty."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'edgeres[cluster]'")
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put_all(store: Any, files: Dict[str, bytes], place: str) -> None:
    for name, content in files.items():
        store.pipe(f"{place}/{name}", content)


def test_a_store_holds_the_samples_of_the_folder_that_was_copied(store: Any, tmp_path: Path) -> None:
    files = {**by_class(), "b/.hidden.png": b"x", "readme.md": b"x"}
    put_all(store, files, "/bucket/data")
    folder = unpacked(files, tmp_path / "data")
    for labelled in (False, True):
        there = open_samples("memory://bucket/data/", labelled=labelled)
        assert same(there, open_samples(folder, labelled=labelled))
        assert there.check() == []
        assert there.sample_set() == open_samples(folder, labelled=labelled).sample_set()  # its name as well


def test_a_store_holds_tars(store: Any, tmp_path: Path) -> None:
    files = by_class(4)
    for number in range(2):
        put_all(store, {f"s-{number}.tar": packed({n: files[n] for n in sorted(files)[number::2]})}, "/bucket/tars")
    wanted = open_samples(unpacked(files, tmp_path / "folder"), labelled=True)
    for url in ("memory://bucket/tars", "memory://bucket/tars/s-{0..1}.tar"):
        assert same(open_samples(url, labelled=True), wanted)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    folder = unpacked(by_class(), tmp_path / "fol der")
    assert same(open_samples(f"file://{folder}", labelled=True), open_samples(folder, labelled=True))


REFUSED: List[Any] = [
    ("memory://bucket/none", "does not exist"),
    ("memory://bucket/none.tar", "does not exist"),
    ("simplecache::memory://bucket", "alone"),
    ("reference://bucket", "alone"),
    ("ssh://host/data", "alone"),
    ("s3://key:secret@bucket/data", "written into the bundle"),
    ("ssh://key:secret@host/data", "written into the bundle"),
    ("s3://bucket/x::ftp://key:secret@host/y", "written into the bundle"),
    ("https://host/x.tar?sig=secret", "written into the bundle"),
    ("https://host/x.tar#secret", "written into the bundle"),
    ("https://host/x.tar::ssh://host/y.tar", "none within another"),
    ("https://host/images", r"\.tar files alone"),
]


@pytest.mark.parametrize(("url", "words"), REFUSED)
def test_other_urls_are_refused(store: Any, url: str, words: str) -> None:
    with pytest.raises(SampleError, match=words) as told:
        open_samples(url)
    assert "secret" not in str(told.value)


def test_a_large_store_is_not_listed_to_its_end(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_all(store, {f"{folder:02}/{name}.png": b"x" for folder in range(20) for name in "ab"}, "/bucket/data")
    monkeypatch.setattr("edgeres.samples.remote.MOST_ENTRIES", 24)
    listed: List[str] = []
    ls = type(store).ls
    monkeypatch.setattr(type(store), "ls", lambda self, path, **more: listed.append(path) or ls(self, path, **more))
    with pytest.raises(SampleError, match="more than 24"):
        open_samples("memory://bucket/data")
    assert len(listed) == 4  # of 21


def test_names_that_a_store_tells_are_names_alone(store: Any) -> None:
    put_all(store, {"x::memory:/bucket/b.png": picture(0)}, "/bucket/data")
    with pytest.raises(SampleError, match="Rename it"):
        open_samples("memory://bucket/data").frame(0)


def test_a_store_that_tells_no_sizes_is_refused(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_all(store, by_class(), "/bucket/data")
    ls = type(store).ls
    without = lambda self, path, **more: [{**entry, "size": None} for entry in ls(self, path, **more)]  # noqa: E731
    monkeypatch.setattr(type(store), "ls", without)
    with pytest.raises(SampleError, match="does not tell how large"):
        open_samples("memory://bucket/data")


def test_a_store_whose_package_is_missing_is_named(store: Any) -> None:
    with pytest.raises(MissingPackageError, match="s3fs"):
        open_samples("s3://bucket/data")


def test_what_vanishes_from_a_store_is_told(store: Any) -> None:
    put_all(store, by_class(), "/bucket/data")
    samples = open_samples("memory://bucket/data")
    store.rm("/bucket/data/a/1.png")
    assert [problem for problem in samples.check() if "a/1.png" in problem] == samples.check()
    assert len(samples.check()) == 1
    with pytest.raises(EdgeresError, match=r"a/1\.png does not exist"):
        samples.frame(1)


def test_a_recipe_keeps_urls_as_they_are(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"calibration.samples": "s3://bucket/data", "model.source": "resnet8_cifar"})
    assert recipe.calibration.samples == "s3://bucket/data"
    assert place_of("s3://bucket/data") == "s3://bucket/data"
    assert place_of(str(tmp_path)) == tmp_path
