"""Where a bundle comes from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeres import provenance as provenance_module
from edgeres.provenance import git_state, provenance, version, versions


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep git from finding the repository, the settings and the identity of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    (folder / "inner").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "recipe.toml").write_text("")
    git(folder, "add", "recipe.toml")
    git(folder, "commit", "--quiet", "-m", "A recipe.")
    return folder


def test_a_version_is_the_packages_own() -> None:
    assert version("numpy") == np.__version__
    assert version("msgspec") == msgspec.__version__


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version("edgeres-is-not-this") is None
    assert versions(("numpy", "edgeres-is-not-this")) == {"numpy": np.__version__}


def test_provenance_is_plain_data_about_here(tmp_path: Path) -> None:
    facts = provenance(tmp_path)
    assert facts["tools"] == versions()
    assert facts["tools"]["numpy"] == np.__version__
    assert facts["python"] == platform.python_version()
    assert facts["host"]["machine"] == platform.machine()
    assert facts["git"] is None
    assert json.loads(json.dumps(facts)) == facts


def test_outside_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "not there") is None


def test_without_git_there_is_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert git_state(repository) is None


def test_git_that_does_not_answer_is_not_waited_for(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("git", 10)

    monkeypatch.setattr(provenance_module.subprocess, "run", hang)
    assert git_state(repository) is None


def test_a_repository_without_commits_has_none(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "--quiet")
    assert git_state(tmp_path / "new") is None


def test_the_commit_is_what_is_checked_out(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert len(commit) in (40, 64)
    assert git_state(repository) == {"commit": commit, "clean": True}
    assert git_state(repository / "inner") == {"commit": commit, "clean": True}
    assert provenance(repository)["git"] == {"commit": commit, "clean": True}


def test_a_changed_file_makes_the_commit_unclean_and_a_new_one_does_not(repository: Path) -> None:
    (repository / "build").mkdir()
    (repository / "build" / "model.onnx").write_text("made")
    before = git_state(repository)
    assert before is not None
    assert before["clean"]
    (repository / "recipe.toml").write_text("changed = true")
    assert git_state(repository) == {"commit": before["commit"], "clean": False}
