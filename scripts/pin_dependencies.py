"""The exact versions that this environment has of all that edgeres needs: constraints for pip, for `.ci/run`.

    python scripts/pin_dependencies.py > .ci/constraints-3.11.txt

Run it in an environment that the tests passed in (`scripts/setup DIR host,test,dev,docs`). Packages of other platforms
are left out, and the local part of a version (`+cpu`), which other indexes do not have.
"""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = frozenset({"host", "test", "dev", "docs"})


def pinned(package: str, extras: frozenset[str], found: dict[str, str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add the versions of what a package needs with some extras, and of what that needs in turn."""
    if (package, extras) in seen:
        return
    seen.add((package, extras))
    for text in metadata.requires(package) or ():
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            name = canonicalize_name(need.name)
            found[name] = metadata.version(name).partition("+")[0]
            pinned(name, frozenset(need.extras), found, seen)


def main() -> None:
    found: dict[str, str] = {}
    pinned("edgeres", EXTRAS, found, set())
    found.pop("edgeres", None)  # its extras need each other
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"# Python {python}; made by scripts/pin_dependencies.py")
    for name, version in sorted(found.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
