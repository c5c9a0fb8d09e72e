#!/usr/bin/env python3
"""Whether a release says one version everywhere, and holds what it should and nothing else.

    python scripts/release_contents.py version [--tag v1.2.3]
    python scripts/release_contents.py contents dist

`version` prints it. `contents` lists both archives in short, and compares them with what git has, byte for byte: an
sdist is the commit that is checked out, a wheel is its edgeres/ with calibration/ as edgeres/dossier/.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST = 3_000_000  # bytes of a wheel
OF_THE_BUILD = {"PKG-INFO"}
OF_GIT = {".gitignore"}  # the build reads it, and some versions of it pack it


def stated_versions() -> dict[str, str]:
    """Return the version that each file states."""
    places = {
        "pyproject.toml": r'(?m)^version = "(.+)"$',
        "edgeres/__init__.py": r'(?m)^__version__ = "(.+)"$',
        "CITATION.cff": r"(?m)^version: (.+)$",
    }
    found = {}
    for name, pattern in places.items():
        match = re.search(pattern, (REPOSITORY / name).read_text(encoding="utf-8"))
        found[name] = match[1] if match else "none"
    return found


def version_problems(version: str, tag: str) -> list[str]:
    """Return why a tag cannot become the release of a version."""
    problems = []
    if tag != f"v{version}":
        problems.append(f"the tag is {tag}, and the version {version}: the tag has to be v{version}")
    heading = re.search(rf"(?m)^## \[{re.escape(version)}\] - (.+)$", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"))
    if heading is None:
        problems.append(f"CHANGELOG.md has no section [{version}]")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", heading[1]):
        problems.append(f"CHANGELOG.md says [{version}] - {heading[1]}: give the day of the release")
    return problems


def committed() -> dict[str, bytes]:
    """Return all files of the commit that is checked out, by name."""
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return files_of(tar)


def files_of(tar: tarfile.TarFile) -> dict[str, bytes]:
    """Return the ordinary files of a tar, by name."""
    found = {}
    for item in tar.getmembers():
        stream = tar.extractfile(item) if item.isreg() else None
        if stream is not None:
            found[item.name] = stream.read()
    return found


def in_wheel(name: str) -> str | None:
    """Return where a file of the checkout stands in a wheel; None where it does not."""
    if name.startswith("calibration/"):
        return "edgeres/dossier/" + name.partition("/")[2]
    return name if name.startswith("edgeres/") else None


def difference(what: str, wanted: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Return what is missing, what should not be there, and what has other bytes, in words."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problems = [f"{what} lacks {name}" for name in missing]
    problems += [f"{what} holds {name}, which git does not have" for name in extra]
    changed = (name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name])
    return problems + [f"{what} holds {name} with other bytes than the commit's" for name in changed]


def summary(path: Path, sizes: dict[str, int]) -> str:
    """Return an archive's contents in short: files and bytes by folder."""
    files, held = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        folder = "/".join(name.split("/")[:-1][:2]) or "."
        files[folder] += 1
        held[folder] += size
    rows = [f"  {folder}: {files[folder]} files, {held[folder]:,} bytes" for folder in sorted(files)]
    return "\n".join([f"{path.name}: {path.stat().st_size:,} bytes, {len(sizes)} files", *rows])


def without(files: dict[str, bytes], names: set[str]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def check_contents(folder: Path) -> list[str]:
    """List both archives, and return what is wrong with them."""
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        inside = {item.filename: archive.read(item) for item in archive.infolist() if not item.is_dir()}
    with tarfile.open(sdist) as tar:
        unusual = [item.name for item in tar.getmembers() if not item.isreg()]
        packed = {name.partition("/")[2]: content for name, content in files_of(tar).items()}
    print(summary(wheel, {name: len(content) for name, content in inside.items()}))
    print(summary(sdist, {name: len(content) for name, content in packed.items()}))
    have = committed()
    code = {name: content for name, content in inside.items() if ".dist-info/" not in name}
    problems = difference("the wheel", {place: have[name] for name in have if (place := in_wheel(name))}, code)
    problems += difference("the sdist", without(have, OF_GIT), without(packed, OF_GIT | OF_THE_BUILD))
    problems += [f"the sdist holds {name}, which is no file" for name in unusual]
    if wheel.stat().st_size >= LARGEST:
        problems.append(f"the wheel has {wheel.stat().st_size:,} bytes: it has to stay under {LARGEST:,}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("version").add_argument("--tag")
    commands.add_parser("contents").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "contents":
        problems = check_contents(arguments.folder)
    else:
        stated = stated_versions()
        version = stated["pyproject.toml"]
        problems = [f"{name} says version {found}, not {version}" for name, found in stated.items() if found != version]
        problems += version_problems(version, arguments.tag) if arguments.tag else []
        if not problems:
            print(version)
    for problem in problems:
        print(f"scripts/release: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
