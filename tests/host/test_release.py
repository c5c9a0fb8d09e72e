"""What a release is held to: one version everywhere, archives with what git has, workflows that run known commits."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    place = REPOSITORY / "scripts/release_contents.py"
    spec = importlib.util.spec_from_file_location("release_contents", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version_is_stated_everywhere(script: ModuleType) -> None:
    assert len(set(script.stated_versions().values())) == 1
    assert set(script.stated_versions().values()) != {"none"}


def test_a_tag_is_of_its_version_and_the_changelog_is_dated(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.3.0] - unreleased\n\n## [1.2.3] - 2027-01-31\n")
    assert script.version_problems("1.2.3", "v1.2.3") == []
    assert script.version_problems("1.2.3", "v1.2.4") == [
        "the tag is v1.2.4, and the version 1.2.3: the tag has to be v1.2.3"
    ]
    assert "give the day" in script.version_problems("1.3.0", "v1.3.0")[0]
    assert "no section [2.0.0]" in script.version_problems("2.0.0", "v2.0.0")[0]


def test_what_is_missing_or_too_much_in_an_archive_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("edgeres/a.py", "edgeres/b.py", "calibration/x.png", "README.md")
    have = {**dict.fromkeys(names, b"text"), "edgeres/d.py": b"as it was committed"}
    monkeypatch.setattr(script, "committed", lambda: have)
    for name in (
        "edgeres/a.py",
        "edgeres/dossier/x.png",
        "edgeres/c.pyc",
        "edgeres/d.py",
        "edgeres-1.dist-info/METADATA",
    ):
        with zipfile.ZipFile(tmp_path / "edgeres-1-py3-none-any.whl", "a") as wheel:
            wheel.writestr(name, "text")
    (tmp_path / "file").write_text("text")
    with tarfile.open(tmp_path / "edgeres-1.tar.gz", "w:gz") as sdist:
        for name in (
            "PKG-INFO",
            "edgeres/a.py",
            "edgeres/b.py",
            "edgeres/d.py",
            "calibration/x.png",
            "README.md",
            "secret",
        ):
            sdist.add(tmp_path / "file", f"edgeres-1/{name}")
        link = tarfile.TarInfo("edgeres-1/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        sdist.addfile(link)
    assert script.check_contents(tmp_path) == [
        "the wheel lacks edgeres/b.py",
        "the wheel holds edgeres/c.pyc, which git does not have",
        "the wheel holds edgeres/d.py with other bytes than the commit's",
        "the sdist holds secret, which git does not have",
        "the sdist holds edgeres/d.py with other bytes than the commit's",
        "the sdist holds edgeres-1/link, which is no file",
    ]
    assert "edgeres/dossier: 1 files, 4 bytes" in capsys.readouterr().out


def workflows() -> list[Path]:
    """Return all workflows, those that edgeres writes for its users too."""
    return [
        *(REPOSITORY / ".github/workflows").glob("*.yml"),
        *(REPOSITORY / "calibration/starter").glob("github*.yml"),
    ]


@pytest.mark.parametrize("path", workflows(), ids=lambda path: path.name)
def test_a_workflow_runs_actions_of_known_commits(path: Path) -> None:
    used = re.findall(r"uses: *(\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{action} is a name that others can move"
        assert re.search(r"# v\d+\.\d+\.\d+", comment), f"{action} does not say its version"
    jobs = yaml.safe_load(path.read_text())
    assert jobs["permissions"] == {"contents": "read"} or all("permissions" in job for job in jobs["jobs"].values())


def test_tools_that_make_a_release_are_of_known_versions() -> None:
    text = (REPOSITORY / ".github/workflows/release.yml").read_text()
    wanted = [word for line in re.findall(r"pip install (.*)", text) for word in line.split()]
    assert wanted
    assert [word for word in wanted if not re.fullmatch(r"[\w-]+==[\d.]+", word)] == []


TOOLS = """#!/usr/bin/env bash
case "$*" in
    *contents.py\\ version*) echo 1 ;;
    "-m build --outdir "*) mkdir "$4" && echo 1 >"$4/edgeres-1-py3-none-any.whl" && echo 2 >"$4/edgeres-1.tar.gz" ;;
    "-m twine "*) {twine} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/edgeres" ;;
esac
"""


@pytest.mark.parametrize(
    ("twine", "good"),
    [(":", True), ("echo more >>dist/edgeres-1.tar.gz", False), ("echo other >dist/other-1-py3-none-any.whl", False)],
)
def test_what_a_tool_does_to_the_archives_is_not_released(twine: str, good: bool, tmp_path: Path) -> None:
    for folder in ("scripts", "tests", "examples", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPOSITORY / "scripts/release", tmp_path / "scripts/release")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "bin/python").write_text(TOOLS.replace("{twine}", twine))
    (tmp_path / "bin/git").write_text("#!/bin/sh\necho 1\n")
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin/python"),
    }
    done = subprocess.run([tmp_path / "scripts/release"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is good, done.stderr
    assert (tmp_path / "dist/SHA256SUMS").exists() is good
    assert good or "Release none of it" in done.stderr


def test_forms_and_citation_are_valid_yaml() -> None:
    for path in (REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= form.keys()
            assert all(part["type"] == "markdown" or part["attributes"]["label"] for part in form["body"])
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_what_git_has_is_what_a_checkout_has(script: ModuleType) -> None:
    done = subprocess.run(
        ["git", "rev-parse", "--is-inside-work-tree"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no git checkout: this is an sdist")
    assert {"pyproject.toml", "edgeres/__init__.py"} <= script.committed().keys()
