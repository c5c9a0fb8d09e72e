"""Ways in which a valid file becomes a bad one: each takes its bytes and a random source, and returns others."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

LITERAL = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\btrue\b|\bfalse\b|\bnull\b')
LIMITS = (0, 1, -1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63) - 1)
NUMBERS = (*(str(number) for number in LIMITS), "9" * 400, "9" * 5000, "1e308", "1e400", "-1e-400", "0.1", "1e15")
OTHERS = ("null", "true", "[]", "{}", '""', '"x"', "[[1]]", '{"a": 1}', "1", "0.5", '["a", 1]', "1979-05-27")
TEXTS = (
    *("\\u0000", "\\u001b]0;owned\\u0007", "../../../etc/passwd", "/dev/zero", "a" * 100_000, "\\ud800", "é" * 300),
    *("<script>document.title='owned'</script>", "]]>", "::error::owned", "##[error]owned", "{{ 7 * 7 }}", "%s%n"),
    *("$(touch owned)", "`touch owned`", "; touch owned", "__import__('os')", "!!python/object/apply:os.mkdir [owned]"),
)
INVALID = (b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x00", b"\xef\xbb\xbf")
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf", '"NaN"')


def _replaced(content: bytes, random: Random, words: tuple[str, ...]) -> bytes:
    """Put another literal in the place of one."""
    found = list(LITERAL.finditer(content))
    if not found:
        return content + random.choice(words).encode()
    chosen = random.choice(found)
    return content[: chosen.start()] + random.choice(words).encode() + content[chosen.end() :]


def other_types(content: bytes, random: Random) -> bytes:
    return _replaced(content, random, OTHERS)


def large_numbers(content: bytes, random: Random) -> bytes:
    return _replaced(content, random, NUMBERS)


def no_numbers(content: bytes, random: Random) -> bytes:
    return _replaced(content, random, NOT_NUMBERS)


def odd_texts(content: bytes, random: Random) -> bytes:
    return _replaced(content, random, tuple(f'"{text}"' for text in TEXTS))


def nested(content: bytes, random: Random) -> bytes:
    depth = random.choice((5, 100, 5_000, 200_000))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}"), ("{a=", "}")))
    return _replaced(content, random, (opening * depth + "1" + closing * depth,))


def no_text(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + random.choice(INVALID) + content[at:]


def without_lines(content: bytes, random: Random) -> bytes:
    """Delete a field: of JSON a member somewhere in the tree, else a line."""
    try:
        tree = json.loads(content)
    except ValueError:
        lines = content.split(b"\n")
        at = random.randrange(len(lines))
        return b"\n".join(lines[:at] + lines[at + random.randint(1, 3) :])
    holders = [holder for holder in _holders(tree) if holder]
    if holders:
        chosen = random.choice(holders)
        del chosen[random.choice(list(chosen) if isinstance(chosen, dict) else range(len(chosen)))]
    return json.dumps(tree).encode()


def _holders(tree: Any) -> list[Any]:
    """Return all objects and arrays of JSON data."""
    found = [tree] if isinstance(tree, (dict, list)) else []
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        found.extend(_holders(inner))
    return found


def doubled_lines(content: bytes, random: Random) -> bytes:
    """Write a line twice: a key of TOML or JSON, a sample of a list."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    return b"\n".join([*lines[:at], lines[at], *lines[at:]])


def flipped_bits(content: bytes, random: Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncated(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def moved_bytes(content: bytes, random: Random) -> bytes:
    """Take a piece out, put a copy of one elsewhere, or fill one with zeros."""
    first, last = sorted((random.randrange(len(content) + 1), random.randrange(len(content) + 1)))
    last = min(last, first + random.choice((1, 4, 64, 4096)))
    piece, at = content[first:last], random.randrange(len(content) + 1)
    return random.choice(
        (
            content[:first] + content[last:],
            content[:at] + piece + content[at:],
            content[:first] + bytes(len(piece)) + content[last:],
            content[:first] + random.randbytes(len(piece)) + content[last:],
        )
    )


def large_integers(content: bytes, random: Random) -> bytes:
    """Write a number at the limit of its type over some bytes, in either order."""
    width, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
    number = random.choice(LIMITS) % (1 << 8 * width)
    at = random.randrange(max(1, len(content) - width))
    return content[:at] + number.to_bytes(width, order) + content[at + width :]


def inside_zip(content: bytes, random: Random) -> bytes:
    """Change one member of an archive, or its name, and put it together again with the right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    at = random.randrange(len(members))
    name, inner = members[at]
    change = random.choice((*BINARY.values(), *TEXTUAL.values()))
    members[at] = random.choice(
        ((name, change(inner, random)), (name, change(inner, random)), (name[::-1], inner), (f"../../{name}", inner))
    )
    if random.random() < 0.1:
        members.append(members[at])
    stream, way = io.BytesIO(), random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", way) as archive:
        for name, inner in members:
            if name not in archive.namelist():  # of which zipfile would warn
                archive.writestr(name, inner)
    return stream.getvalue()


def inside_tar(content: bytes, random: Random) -> bytes:
    """Change one header, and give it the right checksum."""
    at = 512 * random.randrange(max(1, len(content) // 512))
    block = random.choice(list(BINARY.values()))(content[at : at + 512], random)[:512].ljust(512, b"\0")
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    return content[:at] + block[:148] + b"%06o\0 " % total + block[156:] + content[at + 512 :]


def inside_safetensors(content: bytes, random: Random) -> bytes:
    """Change the header, and say its right length."""
    length = int.from_bytes(content[:8], "little")
    header = random.choice(list(TEXTUAL.values()))(content[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def inside_png(content: bytes, random: Random) -> bytes:
    """Change one chunk, and give it the right checksum."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    chosen = random.randrange(len(chunks))
    kind, data = chunks[chosen]
    chunks[chosen] = (kind, random.choice(list(BINARY.values()))(data, random))
    if random.random() < 0.2:
        chunks.insert(chosen, random.choice(chunks))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def inside_packed(content: bytes, random: Random) -> bytes:
    """Change a member of a packed bundle, its kind or its name, and put it together again with the right checksums."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        members = [(one, stream.read()) for one in archive if (stream := archive.extractfile(one)) is not None]
    at = random.randrange(len(members))
    one, inner = members[at]
    change = random.choice((*BINARY.values(), *TEXTUAL.values()))
    if random.random() < 0.7:
        inner = change(inner, random)
    elif random.random() < 0.5:
        one.name = random.choice(
            (f"../{one.name}", f"/tmp/{one.name}", one.name.upper(), one.name[::-1], "manifest.sig")
        )
    else:
        one.type, one.linkname = (
            random.choice(b"12346LKxg").to_bytes(1, "big"),
            random.choice(("/etc", "manifest.json")),
        )
    members[at] = (one, inner)
    if random.random() < 0.2:
        members.insert(random.randrange(len(members)), random.choice(members))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for one, inner in members:
            one.size = len(inner)
            archive.addfile(one, io.BytesIO(inner))
        end = archive.offset
    return stream.getvalue()[: end + 1024]


BINARY: dict[str, Mutation] = {
    "bits flipped": flipped_bits,
    "cut off": truncated,
    "bytes moved, doubled or zeroed": moved_bytes,
    "integers at their limits": large_integers,
}
TEXTUAL: dict[str, Mutation] = {
    "types exchanged": other_types,
    "numbers at their limits": large_numbers,
    "NaN and infinity": no_numbers,
    "fields deleted": without_lines,
    "keys doubled": doubled_lines,
    "nested deeply": nested,
    "no UTF-8": no_text,
    "texts that give orders": odd_texts,
    "bits flipped": flipped_bits,
    "cut off": truncated,
}
ARCHIVED: dict[str, Mutation] = {**BINARY, "changed inside, checksums right": inside_zip}
