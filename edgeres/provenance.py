"""Where a bundle comes from: tool versions, the host, the git commit of what was built."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

PACKAGES = ("edgeres", "numpy", "torch", "onnx", "onnxruntime", "safetensors", "pillow", "tensorrt")


def version(package: str) -> Optional[str]:
    """Return an installed package's version, or None; the package itself is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Tuple[str, ...] = PACKAGES) -> Dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {package: version(package) for package in packages}
    return {package: number for package, number in found.items() if number is not None}


_share: Optional[int] = None


def cores() -> int:
    """Return on how many cores this process may run, which a container or taskset may make fewer than there are."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return found if _share is None else min(found, _share)


def share_cores(count: int) -> None:
    """Let this process take no more cores than that: a worker of a cluster has a share of its machine."""
    global _share
    _share = max(1, count)


def provenance(recipe_folder: Path) -> Dict[str, Any]:
    """Return what made a bundle: tools, Python, host, and the git commit that ``recipe_folder`` is at."""
    return {
        "tools": versions(),
        "python": platform.python_version(),
        "host": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "cores": cores(),
        },
        "git": git_state(recipe_folder),
    }


def git_state(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the commit checked out in ``folder`` and whether files differ from it; None outside a repository."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": head.strip(), "clean": not changed.strip()}


def commit_words(git: object) -> str:
    """Return in words what :func:`git_state` found, as a manifest tells it, which may hold anything; else an empty
    text."""
    if not isinstance(git, dict) or "commit" not in git:
        return ""
    return f"{git['commit']}{'' if git.get('clean') else ', with changes'}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
