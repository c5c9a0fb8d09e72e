"""Signatures: who vouches for a bundle is asked before anything of it is parsed, and everybody else is refused."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("cryptography", reason="signatures need it: pip install 'edgeres[sign]'")

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

import edgeres
from edgeres import bundle as bundle_module
from edgeres import compilation, reporting
from edgeres import keys as keys_module
from edgeres import signatures as signatures_module
from edgeres.artifacts import Engine, Manifest, Preprocessing, to_json
from edgeres.bundle import unlisted, verify
from edgeres.cli import cli
from edgeres.compilation import compile_bundle
from edgeres.difference import difference
from edgeres.errors import BundleError, EdgeresError, MissingPackageError, SignatureError, SigningKeyError
from edgeres.files import MANIFEST, SIGNATURES, file_ref
from edgeres.inspection import inspect_bundle, verify_bundle
from edgeres.keys import private_key, public_key
from edgeres.recipe import EngineSection
from edgeres.reporting import page_of, report_bundle
from edgeres.runtime import loading
from edgeres.signatures import CONTEXT, read_signatures
from edgeres.signing import make_pair, sign_bundle
from edgeres.workspace import Workspace

FLIPS = 64  # bits of each file
PEM = serialization.Encoding.PEM

# RFC 8032, section 7.1: secret key, public key, message, signature.
RFC_8032 = {
    "test 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    "test 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00",
    ),
}


class Opened:
    """Stands for a backend: keeps the bytes that it was given to open."""

    def __init__(self) -> None:
        self.contents: List[bytes] = []
        self.largest = self.contexts = 1

    def __call__(self, content: bytes, *told: Any) -> Opened:
        self.contents.append(content)
        return self

    def close(self) -> None:
        pass


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Let ``edgeres.load`` open engines that nobody can run, and tell which."""
    made = Opened()
    monkeypatch.setattr(loading, "open_record", made)
    return made


def make(folder: Path) -> Path:
    """Write a bundle of a few files of all kinds, with an engine."""
    rng = np.random.default_rng(0)
    (folder / "engines").mkdir(parents=True)
    (folder / "recipe.toml").write_text('precision = "int8"\n')
    (folder / "model.int8.onnx").write_bytes(rng.bytes(3000))
    (folder / "engines" / "gpu.engine").write_bytes(rng.bytes(5000))
    (folder / "reference.npz").write_bytes(rng.bytes(1))
    paths = ["engines/gpu.engine", "model.int8.onnx", "recipe.toml", "reference.npz"]
    refs = tuple(file_ref(folder, path) for path in paths)
    engine = Engine("gpu", "tensorrt", "int8", refs[0], {}, {})
    (folder / MANIFEST).write_bytes(
        to_json(Manifest("net", "int8", {"name": "net"}, Preprocessing((4, 4)), refs, {}, {}, (engine,)))
    )
    return folder


def pair(folder: Path, name: str) -> Tuple[Path, Path, str]:
    """Return the places of a new private and a new public key, and the id of both."""
    public, key = make_pair(folder / name)
    return folder / name, public, key


@pytest.fixture
def mine(tmp_path: Path) -> Tuple[Path, Path, str]:
    return pair(tmp_path, "mine.key")


@pytest.fixture
def yours(tmp_path: Path) -> Tuple[Path, Path, str]:
    return pair(tmp_path, "yours.key")


@pytest.fixture
def bundle(tmp_path: Path, mine: Tuple[Path, Path, str]) -> Path:
    """Return a bundle that I signed."""
    folder = make(tmp_path / "bundle")
    sign_bundle(folder, mine[0])
    return folder


def command(*arguments: object, **environment: str) -> Tuple[int, str, str]:
    """Run edgeres and return its exit code, and what it says on stdout and on stderr."""
    line = [sys.executable, "-m", "edgeres", *map(str, arguments)]
    told = {**os.environ, **environment}
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=told, stdin=subprocess.DEVNULL)
    assert "bug in edgeres" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("secret", "public", "text", "signature"), RFC_8032.values(), ids=RFC_8032)
def test_keys_and_signatures_are_those_of_the_standard(secret: str, public: str, text: str, signature: str) -> None:
    raw = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    pem = raw.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = public_key(bytes.fromhex(public), "it")
    made = private_key(pem, "it", lambda: None).sign(bytes.fromhex(text))
    assert made.hex() == signature
    assert key.made(made, bytes.fromhex(text))
    assert not key.made(made, bytes.fromhex(text) + b"\0")


def test_what_is_signed_is_the_manifest_and_nothing_that_looks_like_it(bundle: Path, mine: Any) -> None:
    (one,) = read_signatures(bundle)
    key = serialization.load_pem_public_key(mine[1].read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(one.value, b"edgeres manifest v1\0" + (bundle / MANIFEST).read_bytes())
    assert one.key == mine[2]
    assert CONTEXT.endswith(b"\0")


def as_path(public: Path) -> Path:
    return public


def as_pem(public: Path) -> bytes:
    return public.read_bytes()


def as_pem_text(public: Path) -> str:
    return public.read_text()


def as_raw(public: Path) -> bytes:
    key = serialization.load_pem_public_key(public.read_bytes())
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@pytest.mark.parametrize("form", [as_path, str, as_pem, as_pem_text, as_raw])
def test_a_key_is_told_in_any_form_alone_or_among_others(
    bundle: Path, mine: Any, yours: Any, opened: Opened, form: Callable[[Path], Union[str, bytes, Path]]
) -> None:
    for trusted in (form(mine[1]), [form(mine[1])], [form(yours[1]), form(mine[1])]):
        with edgeres.load(bundle, trusted_keys=trusted):
            pass
    assert opened.contents == [(bundle / "engines/gpu.engine").read_bytes()] * 3
    with pytest.raises(SignatureError, match=f"signed by {mine[2]}, and you trust {yours[2]}"):
        edgeres.load(bundle, trusted_keys=[form(yours[1])])


def unsigned(folder: Path) -> None:
    (folder / SIGNATURES).unlink()


def another_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b"\n")


def relabelled(folder: Path) -> None:
    """The line says that it is of the changed manifest, as a forger would write it."""
    another_manifest(folder)
    (one,) = read_signatures(folder)
    lie = one._replace(manifest=signatures_module.sha256_bytes((folder / MANIFEST).read_bytes()))
    (folder / SIGNATURES).write_bytes(signatures_module.signatures_content([lie]))


def no_bytes(folder: Path) -> None:
    (folder / SIGNATURES).write_bytes(b"")


def no_line(folder: Path) -> None:
    (folder / SIGNATURES).write_bytes(b"edgeres signatures 1\n")


def cut_short(folder: Path) -> None:
    (folder / SIGNATURES).write_bytes((folder / SIGNATURES).read_bytes()[:-1])


def twice(folder: Path) -> None:
    header, line, _ = (folder / SIGNATURES).read_bytes().split(b"\n")
    (folder / SIGNATURES).write_bytes(b"\n".join([header, line, line, b""]))


def endless(folder: Path) -> None:
    """A terabyte, of which nobody has to read more than a few kilobytes."""
    os.truncate(folder / SIGNATURES, 1 << 40)


def a_link(folder: Path) -> None:
    (folder / SIGNATURES).rename(folder.parent / "elsewhere")
    (folder / SIGNATURES).symlink_to(folder.parent / "elsewhere")


def a_pipe(folder: Path) -> None:
    (folder / SIGNATURES).unlink()
    os.mkfifo(folder / SIGNATURES)


UNTRUSTED = {
    "unsigned": (unsigned, "is not signed"),
    "another manifest": (another_manifest, "for another manifest"),
    "relabelled": (relabelled, "forged or damaged"),
    "no bytes": (no_bytes, "does not hold signatures"),
    "no line": (no_line, "does not hold signatures"),
    "cut short": (cut_short, "does not hold signatures"),
    "twice": (twice, "does not hold signatures"),
    "endless": (endless, "does not hold signatures"),
    "a link": (a_link, "is a link"),
    "a pipe": (a_pipe, "not an ordinary file"),
}


def compiled(folder: Path, trusted_keys: Any) -> object:
    return compile_bundle(folder, EngineSection(backend="cpu"), lambda name, done, total: None, trusted_keys)


def differing(folder: Path, trusted_keys: Any) -> object:
    return difference(folder, folder, trusted_keys)


def worked_on(folder: Path, trusted_keys: Any) -> None:
    with Workspace(folder, trusted_keys=trusted_keys):
        pass


def reported(folder: Path, trusted_keys: Any) -> object:
    return report_bundle(folder, trusted_keys=trusted_keys)


DOORS = (
    edgeres.load,
    edgeres.validate,
    verify,
    verify_bundle,
    inspect_bundle,
    page_of,
    reported,
    differing,
    compiled,
    worked_on,
)


@pytest.mark.parametrize(("change", "words"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_nothing_untrusted_reaches_a_parser(
    bundle: Path, mine: Any, opened: Opened, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], words: str
) -> None:
    change(bundle)
    parsed: List[object] = []
    monkeypatch.setattr(bundle_module, "from_json", lambda *told: parsed.append(told))
    for door in DOORS:
        with pytest.raises(SignatureError, match=words) as caught:
            door(bundle, trusted_keys=[mine[1]])
        assert "edgeres sign" in str(caught.value)
    assert not parsed
    assert not opened.contents


@pytest.mark.parametrize(
    ("module", "door"), [(compilation, compiled), (reporting, reported)], ids=["compile", "report"]
)
def test_what_comes_between_two_checks_reaches_no_parser_either(
    bundle: Path, mine: Any, monkeypatch: pytest.MonkeyPatch, module: Any, door: Callable[[Path, Any], object]
) -> None:
    """Behind the first check somebody writes a manifest of his own; the lock beside it is free again afterwards."""

    def then_exchange(*told: Any) -> Manifest:
        manifest = verify(*told)
        another_manifest(bundle)
        monkeypatch.setattr(bundle_module, "from_json", lambda *told: parsed.append(told))
        return manifest

    parsed: List[object] = []
    monkeypatch.setattr(module, "verify", then_exchange)
    monkeypatch.setattr(reporting, "page", lambda *told: b"another page")
    with pytest.raises(SignatureError, match="for another manifest"):
        door(bundle, [mine[1]])
    assert not parsed
    monkeypatch.undo()
    with Workspace(bundle):
        pass


def test_trusted_keys_may_be_told_one_after_the_other(bundle: Path, mine: Any, opened: Opened) -> None:
    """A generator is empty at its second reading."""
    opened.contents = []
    with edgeres.load(bundle, trusted_keys=(key for key in [mine[1]])):
        pass
    told = refused(lambda: compiled(bundle, (key for key in [mine[1]])))
    assert "no model that edgeres exported" in told


def exchanged(folder: Path, key: Path) -> None:
    """Put another signed bundle in the place of this one, as a build and a signature do it."""
    another_manifest(folder)
    sign_bundle(folder, key)


def test_an_exchange_between_manifest_and_signatures_is_no_forgery(
    bundle: Path, mine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = bundle_module.check

    def changed_first(*told: Any) -> Tuple[str, ...]:
        monkeypatch.undo()
        exchanged(bundle, mine[0])
        return check(*told)

    monkeypatch.setattr(bundle_module, "check", changed_first)
    verify(bundle, [mine[1]])  # the newer one, read anew


def test_what_vanishes_while_it_is_read_is_refused(
    bundle: Path, mine: Any, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_files = loading.check_files

    def gone_first(*told: Any) -> Dict[str, bytes]:
        (bundle / MANIFEST).unlink()
        (bundle / "model.int8.onnx").unlink()
        return check_files(*told)

    monkeypatch.setattr(loading, "check_files", gone_first)
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        edgeres.load(bundle, trusted_keys=[mine[1]])
    assert not opened.contents


def test_whoever_wants_no_signature_needs_none(bundle: Path, opened: Opened) -> None:
    edgeres.load(bundle)
    unsigned(bundle)
    edgeres.load(bundle)
    assert len(opened.contents) == 2


def test_an_empty_list_trusts_nobody_and_is_a_mistake(bundle: Path) -> None:
    with pytest.raises(SigningKeyError, match="empty"):
        edgeres.load(bundle, trusted_keys=[])


def test_a_bundle_that_is_exchanged_meanwhile_is_read_again(
    bundle: Path, mine: Any, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `edgeres compile` does it, beside a program that starts."""
    check_files = loading.check_files

    def then_exchange(folder: Path, manifest: Manifest, wanted: Tuple[str, ...]) -> Dict[str, bytes]:
        (bundle / "engines/gpu.engine").write_bytes(b"a newer one")
        refs = (file_ref(bundle, "engines/gpu.engine"), *manifest.files[1:])
        engine = Engine("gpu", "tensorrt", "int8", refs[0], {}, {})
        newer = Manifest(**{**manifest_fields(manifest), "files": refs, "engines": (engine,)})
        (bundle / MANIFEST).write_bytes(to_json(newer))
        sign_bundle(bundle, mine[0])
        return check_files(folder, manifest, wanted)

    monkeypatch.setattr(loading, "check_files", then_exchange)
    edgeres.load(bundle, trusted_keys=mine[1])
    assert opened.contents == [b"a newer one"]


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(EdgeresError) as caught:
        load()
    return str(caught.value)


BOUND = ["engines/gpu.engine", "model.int8.onnx", "recipe.toml", "reference.npz"]


@pytest.mark.parametrize(
    ("path", "key"), [*((path, key) for path in BOUND for key in (True, False)), (MANIFEST, True), (SIGNATURES, True)]
)
def test_any_flipped_bit_is_found(bundle: Path, mine: Any, opened: Opened, path: str, key: bool) -> None:
    """By hashes alone too, but for the manifest's own: that vouches for itself, as SECURITY.md says."""
    whole, trusted = (bundle / path).read_bytes(), [mine[1]] if key else None
    bits = np.random.default_rng(len(path)).integers(0, 8 * len(whole), FLIPS)
    for bit in bits.tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (bundle / path).write_bytes(bytes(flipped))
        for door in (edgeres.load, verify):
            told = refused(partial(door, bundle, trusted_keys=trusted))
            assert path not in BOUND or f"{path} has changed since it was built" in told
    assert not opened.contents
    (bundle / path).write_bytes(whole)
    verify(bundle, trusted)


def test_several_keys_sign_one_bundle_and_each_is_replaced_by_itself(bundle: Path, mine: Any, yours: Any) -> None:
    before = read_signatures(bundle)
    sign_bundle(bundle, yours[0])
    assert sorted(one.key for one in read_signatures(bundle)) == sorted([mine[2], yours[2]])
    for key in (mine, yours):
        verify(bundle, [key[1]])
    assert sign_bundle(bundle, mine[0]).warnings == ()
    assert set(before) < set(read_signatures(bundle))  # Ed25519 is deterministic
    assert len(read_signatures(bundle)) == 2


def test_signing_again_after_a_change_leaves_only_what_is_true(bundle: Path, mine: Any, yours: Any) -> None:
    another_manifest(bundle)
    done = sign_bundle(bundle, yours[0])
    assert [one.key for one in read_signatures(bundle)] == [yours[2]]
    assert mine[2] in done.warnings[0]


def test_no_more_are_written_than_are_read(bundle: Path, yours: Any) -> None:
    (one,) = read_signatures(bundle)
    many = [one._replace(key=f"{number:064x}") for number in range(signatures_module.MOST)]
    (bundle / SIGNATURES).write_bytes(signatures_module.signatures_content(many))
    assert len(read_signatures(bundle)) == signatures_module.MOST
    with pytest.raises(SignatureError, match="32 signatures already"):
        sign_bundle(bundle, yours[0])


def test_only_whole_bundles_are_signed(tmp_path: Path, mine: Any) -> None:
    folder = make(tmp_path / "harmed")
    (folder / "model.int8.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"model\.int8\.onnx"):
        sign_bundle(folder, mine[0])
    assert not (folder / SIGNATURES).exists()


def test_the_signatures_are_part_of_a_bundle(bundle: Path) -> None:
    assert unlisted(bundle, verify(bundle)) == []


@pytest.mark.parametrize("same", [True, False], ids=["the same manifest", "another manifest"])
def test_a_rebuilt_bundle_keeps_only_signatures_that_hold(bundle: Path, mine: Any, same: bool) -> None:
    manifest = verify(bundle)
    content = {ref.path: (bundle / ref.path).read_bytes() for ref in manifest.files}
    changed = manifest if same else Manifest(**{**manifest_fields(manifest), "name": "other"})
    with Workspace(bundle) as workspace:
        for path, text in content.items():
            workspace.write(path, text)
        loss = workspace.signature_loss(changed)
        workspace.commit(changed)
    assert (bundle / SIGNATURES).exists() == same
    if same:
        assert loss == ()
        verify(bundle, [mine[1]])
    else:
        assert "edgeres sign" in loss[0]
        assert "is not signed" in refused(lambda: verify(bundle, [mine[1]]))


def outside(folder: Path) -> None:
    """What the user alone may read, behind a link."""
    (folder / SIGNATURES).unlink()
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / SIGNATURES).symlink_to(folder.parent / "secret")


def with_more(folder: Path) -> None:
    with open(folder / SIGNATURES, "ab") as stream:
        stream.write(b"a hidden word")


@pytest.mark.parametrize("change", [outside, with_more, a_pipe])
def test_only_signatures_are_taken_over_as_signatures(bundle: Path, change: Callable[[Path], None]) -> None:
    manifest = verify(bundle)
    change(bundle)
    with Workspace(bundle) as workspace:
        for ref in manifest.files:
            workspace.write(ref.path, (bundle / ref.path).read_bytes())
        loss = workspace.signature_loss(manifest)
        workspace.commit(manifest)
    assert not os.path.lexists(bundle / SIGNATURES)
    assert "edgeres sign" in loss[0]
    verify(bundle)


def manifest_fields(manifest: Manifest) -> Dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}


def test_keys_are_for_their_owner_alone_and_never_overwritten(tmp_path: Path, mine: Any) -> None:
    private, public, _ = mine
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(SigningKeyError, match="is there already"):
        make_pair(private)
    private.rename(tmp_path / "moved")
    with pytest.raises(SigningKeyError, match=r"mine\.key\.pub is there already"):
        make_pair(private)
    assert not private.exists()  # half of a pair is none
    assert ((tmp_path / "moved").read_bytes(), public.read_bytes()) == before


def test_no_private_key_goes_into_a_bundle(bundle: Path) -> None:
    (bundle.parent / "link").symlink_to(bundle / "engines")
    for place in (bundle / "key", bundle / "engines" / "key", bundle.parent / "link" / "key"):
        with pytest.raises(SigningKeyError, match="lies in a bundle"):
            make_pair(place)


@pytest.mark.parametrize("name", ["", "/", "a\0b", "a\0/b"])
def test_what_names_no_file_is_no_place_for_a_key(name: str) -> None:
    with pytest.raises(SigningKeyError, match="no name of a file"):
        make_pair(Path(name))


# The group of Edwards25519, as RFC 8032 writes it in section 6: the points that eight times are the neutral one.
P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
Point = Tuple[int, int]


def added(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + product, P - 2, P) % P
    return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, P - 2, P) % P


def times(number: int, point: Point) -> Point:
    found = (0, 1)
    while number:
        found = added(found, point) if number & 1 else found
        point, number = added(point, point), number >> 1
    return found


def points() -> Iterator[Point]:
    """Points of the curve, by trying y in turn (section 5.1.3)."""
    for y in range(2, 200):
        square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
        x = pow(square, (P + 3) // 8, P)
        x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
        if x * x % P == square:
            yield x, y


def small() -> List[bytes]:
    """Every encoding of a point of order 1, 2, 4 or 8, also those with y beyond the field and of -0."""
    generator = next(times(L, one) for one in points() if len({times(n, times(L, one)) for n in range(8)}) == 8)
    ys = {times(number, generator)[1] for number in range(8)}
    written = [y + more for y in ys for more in (0, P) if y + more < 1 << 255]
    return [(y | sign << 255).to_bytes(32, "little") for y in written for sign in (0, 1)]


def pem_of(raw: bytes) -> bytes:
    """RFC 8410, section 4: what stands in front of the 32 bytes is always the same."""
    text = base64.b64encode(bytes.fromhex("302a300506032b6570032100") + raw)
    return b"-----BEGIN PUBLIC KEY-----\n" + text + b"\n-----END PUBLIC KEY-----\n"


def test_points_that_anybody_signs_for_are_nobodys_keys() -> None:
    """S = 0 and R = -hA, one of eight points, is a "signature" of every message by such a key."""
    bad = small()
    assert len(set(bad)) == 14
    named = ["00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f"]
    assert set(map(bytes.fromhex, named)) < set(bad)
    for raw in bad:
        for form in (raw, pem_of(raw)):
            with pytest.raises(SigningKeyError, match="small order"):
                public_key(form, "it")
    for _, public, _, _ in RFC_8032.values():
        assert public_key(pem_of(bytes.fromhex(public)), "it").id == public_key(bytes.fromhex(public), "it").id


def test_any_file_of_32_bytes_is_no_key(bundle: Path, mine: Any, tmp_path: Path) -> None:
    verify(bundle, as_raw(mine[1]))
    (tmp_path / "raw").write_bytes(as_raw(mine[1]))
    assert "it holds no PEM" in refused(lambda: verify(bundle, tmp_path / "raw"))


def test_a_file_with_two_keys_is_not_read_as_one_of_them(bundle: Path, mine: Any, yours: Any, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.write_bytes(yours[1].read_bytes() + mine[1].read_bytes())
    for form in (both, both.read_bytes(), both.read_text()):
        assert "more than one PEM block" in refused(partial(verify, bundle, form))
    both.write_bytes(yours[0].read_bytes() + mine[0].read_bytes())
    assert "more than one PEM block" in refused(lambda: sign_bundle(bundle, both))


def test_an_openssl_without_ed25519_is_named(
    bundle: Path, mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*told: Any) -> None:
        raise UnsupportedAlgorithm("ed25519 is not supported by this version of OpenSSL.")

    raw = as_raw(mine[1])
    monkeypatch.setattr(keys_module.Ed25519PrivateKey, "generate", lacking)
    monkeypatch.setattr(keys_module.Ed25519PublicKey, "from_public_bytes", lacking)
    without = SimpleNamespace(load_pem_public_key=lacking, load_pem_private_key=lacking)
    monkeypatch.setattr(keys_module, "serialization", without)
    for door in (
        lambda: make_pair(tmp_path / "new"),
        lambda: verify(bundle, [raw]),
        lambda: verify(bundle, [mine[1]]),
        lambda: sign_bundle(bundle, mine[0]),
    ):
        with pytest.raises(SigningKeyError, match="FIPS"):
            door()


def encoded(private: Any, public: bool) -> bytes:
    if public:
        return private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


WRONG_PUBLIC = {
    "private": (encoded(ed25519.Ed25519PrivateKey.generate(), False), "is a private key"),
    "elliptic": (encoded(ec.generate_private_key(ec.SECP256R1()), True), "of another kind than Ed25519"),
    "for exchange": (encoded(x25519.X25519PrivateKey.generate(), True), "of another kind than Ed25519"),
    "31 bytes": (bytes(31), "is not a public key"),
    "nothing": (b"", "is not a public key"),
    "half": (encoded(ed25519.Ed25519PrivateKey.generate(), True)[:60], "is not a public key"),
    "text": (b"-----BEGIN PUBLIC KEY-----\n????\n-----END PUBLIC KEY-----\n", "is not a public key"),
}


@pytest.mark.parametrize(("content", "words"), WRONG_PUBLIC.values(), ids=WRONG_PUBLIC)
def test_what_is_no_public_key_is_refused_and_not_shown(
    bundle: Path, mine: Any, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "wrong").write_bytes(content)
    for wrong in (content, tmp_path / "wrong"):
        told = refused(partial(verify, bundle, [mine[1], wrong]))
        assert words in told
        assert not any(line and line in told for line in content.decode("latin-1").splitlines()[1:-1])


def test_all_wrong_keys_are_named_at_once(bundle: Path, tmp_path: Path) -> None:
    told = refused(lambda: verify(bundle, [b"", tmp_path / "missing", tmp_path, "\0"]))
    assert "4 problems" in told
    assert "missing cannot be read: No such file" in told


WRONG_PRIVATE = {
    "public": (encoded(ed25519.Ed25519PrivateKey.generate(), True), "is not a private key"),
    "elliptic": (encoded(ec.generate_private_key(ec.SECP256R1()), False), "of another kind than Ed25519"),
    "half": (encoded(ed25519.Ed25519PrivateKey.generate(), False)[:70], "is damaged"),
    "nothing": (b"", "is not a private key"),
}


@pytest.mark.parametrize(("content", "words"), WRONG_PRIVATE.values(), ids=WRONG_PRIVATE)
def test_what_is_no_private_key_signs_nothing(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "wrong").write_bytes(content)
    folder = make(tmp_path / "bundle")
    told = refused(lambda: sign_bundle(folder, tmp_path / "wrong"))
    assert words in told
    assert not any(line and line in told for line in content.decode().splitlines()[1:-1])
    assert not (folder / SIGNATURES).exists()


def test_a_locked_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    folder, private = make(tmp_path / "bundle"), tmp_path / "locked"
    public, _ = make_pair(private, b"correct horse")
    assert b"ENCRYPTED" in private.read_bytes()
    said: List[Optional[bytes]] = [None, b"", b"battery staple"]
    while said:
        assert "does not open with this passphrase" in refused(lambda: sign_bundle(folder, private, said.pop))
    sign_bundle(folder, private, lambda: b"correct horse")
    verify(folder, [public])


def test_a_passphrase_that_openssl_does_not_take_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "longest", b"x" * 1023)
    with pytest.raises(SigningKeyError, match="1023 bytes"):
        make_pair(tmp_path / "longer", b"x" * 1024)
    assert not (tmp_path / "longer").exists()


def test_a_passphrase_is_bytes_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environb, b"EDGERES_PASSPHRASE", b"caf\xe9")
    runner, folder = CliRunner(), make(tmp_path / "bundle")
    assert runner.invoke(cli, ["keygen", str(tmp_path / "key"), "--passphrase"]).exit_code == 0
    sign_bundle(folder, tmp_path / "key", lambda: b"caf\xe9")
    monkeypatch.delitem(os.environb, b"EDGERES_PASSPHRASE")
    for line, words in (
        (["keygen", str(tmp_path / "other"), "--passphrase"], "a new passphrase is to be set"),
        (["sign", str(folder), "--key", str(tmp_path / "key")], "the private key is locked"),
    ):
        assert words in str(runner.invoke(cli, line).exception)


def test_a_key_that_others_may_read_is_told_of(bundle: Path, mine: Any) -> None:
    mine[0].chmod(0o644)
    assert "chmod 600" in sign_bundle(bundle, mine[0]).warnings[0]


def test_without_cryptography_nobody_is_trusted_by_mistake(
    bundle: Path, mine: Any, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "edgeres.keys", None)
    for action in (
        lambda: edgeres.load(bundle, trusted_keys=[mine[1]]),
        lambda: sign_bundle(bundle, mine[0]),
        lambda: make_pair(bundle.parent / "new"),
    ):
        with pytest.raises(MissingPackageError, match=r"pip install 'edgeres\[sign\]'"):
            action()
    assert not opened.contents
    edgeres.load(bundle)
    assert read_signatures(bundle)  # who says to have signed it is told without


def test_from_a_key_to_a_verified_bundle_by_commands(tmp_path: Path) -> None:
    folder, key = make(tmp_path / "bundle"), tmp_path / "robot.key"
    code, said, _ = command("keygen", key, "--passphrase", EDGERES_PASSPHRASE="secret")
    assert code == 0
    identity = said.split()[-1]
    code, _, told = command("sign", folder, "--key", key)
    assert code == 1
    assert "EDGERES_PASSPHRASE" in told
    assert command("verify", folder)[1].splitlines()[1] == "not signed"
    assert command("sign", folder, "--key", key, EDGERES_PASSPHRASE="secret")[0] == 0
    assert f"says to be signed by {identity}, not checked against a key" in command("verify", folder)[1]
    assert f"signed by {identity}, which you trust" in command("verify", folder, "--key", f"{key}.pub")[1]
    facts = json.loads(command("verify", folder, "--key", f"{key}.pub", "--json")[1])
    assert facts["trusted"] is True
    assert facts["signatures"] == [{"key": identity, "current": True, "trusted": True}]
    another_manifest(folder)
    assert f"says to be signed by {identity} for another manifest, not checked" in command("verify", folder)[1]


COMMANDS = (
    ("verify",),
    ("validate",),
    ("bench",),
    ("compile",),
    ("inspect",),
    ("inspect", "--sbom"),
    ("report",),
    ("report", "--out", "page.html"),
    ("diff",),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_reads_bundles_refuses_what_was_changed(bundle: Path, mine: Any, words: Tuple[str, ...]) -> None:
    another_manifest(bundle)
    bundles = [str(bundle)] * (2 if words == ("diff",) else 1)
    done = CliRunner().invoke(cli, [*words, *bundles, "--key", str(mine[1])])
    assert isinstance(done.exception, SignatureError)
    assert "for another manifest" in str(done.exception)


def test_a_limit_of_one_machine_is_not_bound_into_a_bundle(bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["report", str(bundle), "--max-latency-ms", "5"])
    assert done.exit_code == 2
    assert "--out" in done.output
