#!/usr/bin/env python3
"""Whether a release says one version everywhere, and holds what it should and nothing else.

    python scripts/release_contents.py version [--tag v1.2.3]
    python scripts/release_contents.py contents dist

`version` prints it. `contents` lists both archives in short, and compares them with what git has: an sdist is the
checkout, a wheel is edgeres/ with calibration/ as edgeres/dossier/.
"""

from __future__ import annotations

import argparse
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


def tracked() -> set[str]:
    """Return the names of all files that git has."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    return {name for name in listed.decode().split("\0") if name}


def in_wheel(name: str) -> str | None:
    """Return where a file of the checkout stands in a wheel; None where it does not."""
    if name.startswith("calibration/"):
        return "edgeres/dossier/" + name.partition("/")[2]
    return name if name.startswith("edgeres/") else None


def difference(what: str, wanted: set[str], found: set[str]) -> list[str]:
    """Return what is missing and what should not be there, in words."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    problems = [f"{what} lacks {name}" for name in missing]
    return problems + [f"{what} holds {name}, which git does not have" for name in extra]


def summary(path: Path, sizes: dict[str, int]) -> str:
    """Return an archive's contents in short: files and bytes by folder."""
    files, held = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        folder = "/".join(name.split("/")[:-1][:2]) or "."
        files[folder] += 1
        held[folder] += size
    rows = [f"  {folder}: {files[folder]} files, {held[folder]:,} bytes" for folder in sorted(files)]
    return "\n".join([f"{path.name}: {path.stat().st_size:,} bytes, {len(sizes)} files", *rows])


def check_contents(folder: Path) -> list[str]:
    """List both archives, and return what is wrong with them."""
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        inside = {item.filename: item.file_size for item in archive.infolist() if not item.is_dir()}
    with tarfile.open(sdist) as tar:
        members = tar.getmembers()
    unusual = [item.name for item in members if not item.isreg()]
    packed = {item.name.partition("/")[2]: item.size for item in members if item.isreg()}
    print(summary(wheel, inside))
    print(summary(sdist, packed))
    have = tracked()
    code = {name for name in inside if ".dist-info/" not in name}
    problems = difference("the wheel", {place for name in have if (place := in_wheel(name))}, code)
    problems += difference("the sdist", have - OF_GIT, set(packed) - OF_GIT - OF_THE_BUILD)
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
