"""Files made to fill the memory, to never end, or to have something run: whatever is known to have been tried."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeres.artifacts import FileRef, Manifest, Preprocessing, to_json
from examples import FRAMES, LABELS, png, saved, tar_header

HUGE = 10 << 30  # bytes, of which no disk has any


class Hostile(NamedTuple):
    """``write`` makes a file at a path that ends as its ``door`` wants it; ``kind`` is its row in a table."""

    kind: str
    door: str
    write: Callable[[Path], object]


LARGE, BOMB, NO_FILE, CODE, ENDLESS = (
    "larger than any (10 GB)",
    "small, and unpacks to gigabytes",
    "pipes, devices, folders, links",
    "code and commands",
    "small, and takes hours",
)


def sparse(head: bytes = b"") -> Callable[[Path], object]:
    """Return a writer of a file of 10 GB that begins with ``head``."""

    def write(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, HUGE)

    return write


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def npy_header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode("ascii")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(*members: tuple[str, bytes], way: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", way) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def doubled() -> bytes:
    """Return an archive with ``images`` in it twice, which zipfile would warn of: the second name is changed later."""
    content = zipped(("images.npy", saved(np.save, FRAMES)), ("imagex.npy", saved(np.save, FRAMES[:1])))
    return content.replace(b"imagex.npy", b"images.npy")


def claiming(size: int = 3 << 30) -> bytes:
    """Return an archive that claims to unpack to 3 GB of frames, as a good one of 3 MB of zeros does."""
    header = npy_header(f"({size // 1200}, 20, 20, 3)")
    content = zipped(("images.npy", header))
    at = content.index(b"PK\x01\x02") + 24  # where the central directory says the size
    return content[:at] + struct.pack("<I", len(header) + size // 1200 * 1200) + content[at + 4 :]


def absurd_png(width: int, height: int) -> bytes:
    content = png(FRAMES[0])
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(owned) (w) file closefile showpage\n"


class Commands:
    """Whoever unpickles it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def class_folders(path: Path) -> None:
    """Make folders whose links into one another are 2^20 paths."""
    path.mkdir()
    for number in range(20):
        (path / f"d{number}").mkdir()
        for name in "ab":
            (path / f"d{number}" / name).symlink_to(path / f"d{number + 1}")
    (path / "d20").mkdir()
    (path / "d20/a.png").write_bytes(png(FRAMES[0]))


def deep_folders(path: Path) -> None:
    for _ in range(600):
        path.mkdir()
        path /= "d"


def packed(*members: tuple[str, bytes, bytes], more: int = 0, mode: str = "w") -> bytes:
    """Return a tar of members, each with its name, its kind and its content; a link's content is where it leads."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, content in members:
            one = tarfile.TarInfo(name)
            one.type = kind
            if kind == tarfile.REGTYPE:
                one.size = len(content)
            else:
                one.linkname = content.decode()
            archive.addfile(one, io.BytesIO(content))
        end = archive.offset
    return stream.getvalue() if mode != "w" else stream.getvalue()[: end + 1024] + bytes(more)


def listing(*paths: str, size: int = 4) -> bytes:
    """Return a manifest of files that hold "more", or say to be larger."""
    refs = tuple(FileRef(path, hashlib.sha256(b"more").hexdigest(), size) for path in paths)
    return to_json(Manifest("net", "int8", {}, Preprocessing((8, 8)), refs, {}, {}))


def front(manifest: bytes) -> tuple[str, bytes, bytes]:
    return "manifest.json", tarfile.REGTYPE, manifest


def file_of(path: str) -> tuple[str, bytes, bytes]:
    return path, tarfile.REGTYPE, b"more"


LINK, HARD_LINK, FOLDER, PIPE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
OUT, NULL = "../owned", "/dev/null"
PACKED = (
    *((NO_FILE, packed(front(listing("a")), ("a", kind, b"/etc/passwd"))) for kind in (LINK, HARD_LINK, FOLDER, PIPE)),
    (NO_FILE, packed(front(listing("a/owned")), ("a", LINK, b".."), file_of("a/owned"))),
    *((CODE, packed(front(listing(path)), file_of(path))) for path in (OUT, "/tmp/owned", ".owned", "owned/", "NUL")),
    (CODE, packed(front(listing("a")), file_of(OUT))),
    (CODE, packed(front(listing("a")), file_of("a"), file_of(OUT))),
    (CODE, packed(front(listing("a", "A")), file_of("a"), file_of("A"))),
    (CODE, packed(front(listing("a", "a")), file_of("a"), file_of("a"))),
    (CODE, packed(front(listing("manifest.json")), file_of("manifest.json"))),
    (BOMB, packed(front(listing("a", size=8**11 - 1)), file_of("a"))),
    (BOMB, packed(front(listing("a", size=1 << 62)), file_of("a"))),
    (BOMB, packed(front(listing("a", size=-1)), file_of("a"))),
    (BOMB, packed(front(listing("a")), file_of("a"), more=1 << 24)),
    (BOMB, packed(front(bytes(1 << 28)), file_of("a"), mode="w:gz")),
    (ENDLESS, packed(front(b"[" * 8_000_000), file_of("a"))),
    (ENDLESS, packed(front(listing(*(f"a{number}" for number in range(100_000)))), file_of("a"))),
)

ABSURD_BMP = b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 60_000, 60_000, 1, 8, 1) + bytes(999)
LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 24) + b" " * (1 << 24)
ORDERS = (
    b"<script>owned</script>\n]]>\n::error::owned\n{{ 7 * 7 }}\n",
    b"%0A::error::owned\n\x1b]0;owned\x07\n'\"><svg onload=a>\n&lt;\n",
)
TEXTS = ("recipe", "report, baseline", "benchmark", "list of samples", "timing cache")
ARRAYS = ("npy", "npz", "packed bundle")

BASE = (
    *(Hostile(kind, "packed bundle", holding(content)) for kind, content in PACKED),
    Hostile(LARGE, "packed bundle", sparse(packed(front(listing("a")), file_of("a")))),
    Hostile(LARGE, "packed bundle", sparse(packed(front(b" " * 16_000_000)))),
    *(Hostile(LARGE, door, sparse()) for door in (*TEXTS, *ARRAYS, "manifest")),
    Hostile(LARGE, "image png", sparse(png(FRAMES[0]))),
    Hostile(LARGE, "image gif", sparse(b"GIF89a" + bytes(20))),
    Hostile(LARGE, "npz", sparse(zipped(("images.npy", saved(np.save, FRAMES))))),
    Hostile(BOMB, "image png", holding(absurd_png(50_000, 50_000))),
    Hostile(BOMB, "image png", holding(absurd_png(9_000, 9_000))),
    Hostile(BOMB, "image gif", holding(b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20))),
    Hostile(BOMB, "image bmp", holding(ABSURD_BMP)),
    Hostile(BOMB, "npz", holding(claiming())),
    Hostile(BOMB, "npz", holding(zipped(("images.npy", npy_header("(9999999, 999, 999, 3)"))))),
    Hostile(BOMB, "npz", holding(zipped(("images.npy", LONG_HEADER)))),
    Hostile(BOMB, "npz", holding(doubled())),
    Hostile(BOMB, "npz", holding(zipped(("images.npy", saved(np.save, FRAMES)), way=zipfile.ZIP_LZMA))),
    Hostile(BOMB, "npz", holding(zipped(*((f"a{number}", b"") for number in range(5_000))))),
    Hostile(BOMB, "npy", holding(npy_header("(1099511627776, 1024, 1024, 3)"))),
    Hostile(BOMB, "npy", holding(npy_header("(4611686018427387904, 4611686018427387904, 4, 3)"))),
    Hostile(BOMB, "npy", holding(npy_header("(100000000000,)", "<U0"))),
    Hostile(BOMB, "npz", holding(zipped(("images.npy", npy_header("(100000000000,)", "<U0"))))),
    Hostile(BOMB, "scalings", holding(zipped(("names.npy", npy_header("(100000000000,)", "<U0"))))),
    Hostile(BOMB, "npy", holding(npy_header("(-1, 2, 2, 3)") + bytes(99))),
    Hostile(BOMB, "npy", holding(b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + b"{" * 9999)),
    Hostile(BOMB, "npy", lambda path: sparse(npy_header("(1000000000, 1, 1, 3)"))(path)),
    Hostile(BOMB, "reference logits", holding(zipped(("logits.npy", npy_header("(99999, 99999)", "<f4"))))),
    Hostile(BOMB, "scalings", holding(zipped(("names.npy", npy_header("(99999, 99999)", "<f4"))))),
    Hostile(ENDLESS, "npy", holding(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)),
    Hostile(ENDLESS, "recipe", holding(b"a" + b".a" * 300_000 + b" = 1\n")),
    Hostile(ENDLESS, "recipe", holding(b"a" + b".a" * 30_000 + b" = 1\n")),
    Hostile(ENDLESS, "recipe", holding(b"[model]\nseed = " + b"9" * 60_000)),
    Hostile(ENDLESS, "list of samples", holding(b"a.png 0\n" * 3_000_000)),
    Hostile(ENDLESS, "list of samples", holding(b"a" + b" ,b" * 1_000_000)),
    Hostile(ENDLESS, "timing cache", holding(b"edgeres timing cache 1\n" + b"[" * 200_000)),
    Hostile(ENDLESS, "folder", class_folders),
    Hostile(ENDLESS, "folder", deep_folders),
    Hostile(LARGE, "tar", sparse(tar_header(size=HUGE - 512))),
    Hostile(LARGE, "tar", sparse(tar_header(type=tarfile.XHDTYPE, size=HUGE - 512))),
    Hostile(LARGE, "tar", sparse(tar_header(type=tarfile.GNUTYPE_LONGNAME, size=HUGE - 512))),
    Hostile(BOMB, "tar", holding(tar_header(size=1 << 62))),
    Hostile(BOMB, "tar", holding(tar_header(size=-512))),
    Hostile(BOMB, "tar", holding(tar_header(type=tarfile.GNUTYPE_SPARSE) + bytes(512))),
    Hostile(BOMB, "tar", holding(tar_header("../owned.png") + bytes(1024))),
    Hostile(NO_FILE, "tar", holding(tar_header(type=tarfile.SYMTYPE, linkname="/dev/zero") + bytes(1024))),
    *(Hostile(NO_FILE, door, os.mkfifo) for door in (*TEXTS, *ARRAYS, "tar", "manifest", "image png")),
    *(Hostile(NO_FILE, door, linked("/dev/zero")) for door in (*TEXTS, *ARRAYS, "tar", "manifest", "image png")),
    *(Hostile(NO_FILE, door, Path.mkdir) for door in (*TEXTS[1:], *ARRAYS)),
    Hostile(CODE, "npy", holding(saved(np.save, np.array([Commands()], object)))),
    Hostile(CODE, "npz", holding(saved(np.savez, images=np.array([Commands()], object), labels=LABELS))),
    Hostile(CODE, "npz", holding(saved(np.savez, images=FRAMES, labels=np.array([Commands()], object)))),
    Hostile(CODE, "npz", holding(pickle.dumps(Commands()))),
    Hostile(CODE, "reference logits", holding(saved(np.savez, logits=np.array([Commands()], object)))),
    Hostile(CODE, "scalings", holding(saved(np.savez, names=np.array([Commands()], object)))),
    Hostile(CODE, "recipe", holding(b'[model]\nsource = "!!python/object/apply:os.mkdir [owned]"\n')),
    Hostile(CODE, "recipe", holding(b'[model]\nsource = "$(touch owned)"\nweights = "`touch owned`"\n')),
    Hostile(CODE, "image png", holding(POSTSCRIPT)),
    Hostile(CODE, "list of samples", holding(b"$(touch owned).png 0\n|touch owned 1\n")),
    *(Hostile(CODE, "names in a page, JUnit and GitHub", holding(text)) for text in ORDERS),
)


def host() -> tuple[Hostile, ...]:
    """Return those for the doors of the building host."""
    from hostile_models import CHECKPOINTS, GRAPHS

    shared: dict[str, tuple[str, ...]] = {"all": ("onnx", "checkpoint (zip)", "safetensors")}
    return (
        *(Hostile(LARGE, door, sparse()) for door in shared["all"]),
        *(Hostile(NO_FILE, door, os.mkfifo) for door in shared["all"]),
        *(Hostile(NO_FILE, door, Path.mkdir) for door in shared["all"]),
        *(Hostile(NO_FILE, door, linked("/dev/zero")) for door in shared["all"]),
        *(Hostile(kind, "onnx", write) for kind, write in GRAPHS),
        *(Hostile(kind, door, write) for kind, door, write in CHECKPOINTS),
        Hostile(CODE, "checkpoint (pickle)", holding(pickle.dumps(Commands()))),
        Hostile(CODE, "checkpoint (zip)", tar_outside),
    )


def tar_outside(path: Path) -> None:
    """Write torch's oldest format, whose files are unpacked by name."""
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("../owned"), io.BytesIO())
