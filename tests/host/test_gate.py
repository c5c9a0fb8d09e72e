"""The gate from end to end: a project that `edgeres init` began, and three nets, told by every channel alike."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from PIL import Image

from edgeres import __version__ as VERSION
from edgeres.recipe import dossier
from edgeres.starter import begin

EVENTS = {"push", "pull_request"}
STEP_KEYS = {"id", "name", "if", "uses", "with", "run", "env", "shell", "working-directory", "continue-on-error"}


def run(*command: object, cwd: Path, code: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose `edgeres` and `pytest` are those under test, outside of any CI but what is named."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "CI"))}
    environment.update(variables, PATH=f"{cwd / 'bin'}{os.pathsep}{environment['PATH']}", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def edgeres(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "edgeres", *arguments, **options)


def workflow(place: Path) -> dict[str, Any]:
    """Return a workflow; YAML 1.1 reads the key `on` as a truth value."""
    read: dict[str, Any] = yaml.safe_load(place.read_text(encoding="utf-8"))
    if True in read:
        read["on"] = read.pop(True)
    return read


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a starter for GitHub, whose steps were run; a net calibrated on a grey image; twenty samples."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "bin").mkdir()
    shim = folder / "bin" / "edgeres"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeres "$@"\n')
    shim.chmod(0o755)
    edgeres("init", cwd=folder)
    steps = workflow(folder / ".github/workflows/edgeres.yml")["jobs"]["int8"]["steps"]
    for step in steps:
        if "run" in step and not step["run"].startswith("pip install"):
            run("bash", "-e", "-c", step["run"], cwd=folder, CI="true")
    np.save(folder / "grey.npy", np.full((1, 32, 32, 3), 128, np.uint8))
    recipe = ("calibration/recipe.toml", "--calibration", "grey.npy", "--budget-minutes", "0")
    edgeres("build", *recipe, "--out", "build/grey", cwd=folder, code=1)
    images = [image for n in range(10) for image in sorted((dossier() / "digits/validation" / str(n)).iterdir())[:2]]
    frames = np.stack([np.asarray(Image.open(image).convert("RGB")) for image in images])
    np.savez(folder / "twenty.npz", images=frames, labels=np.arange(20) // 2)
    return folder


def test_a_starter_works_as_it_stands(place: Path) -> None:
    """The fixture ran its commands; what it uploads is there."""
    steps = workflow(place / ".github/workflows/edgeres.yml")["jobs"]["int8"]["steps"]
    (upload,) = (step["with"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact@"))
    for pattern in upload["path"].split():
        assert list(place.glob(pattern)), pattern
    assert ET.parse(place / "build/edgeres.xml").getroot().attrib["failures"] == "0"
    assert json.loads((place / "build/bundle/report.json").read_text())["verdict"] == "pass"


def test_a_github_workflow_is_one() -> None:
    """Facts of GitHub's workflow syntax; the whole published schema has accepted the file as well."""
    read = workflow(dossier() / "starter/github.yml")
    assert set(read) <= {"name", "on", "permissions", "env", "concurrency", "defaults", "jobs"}
    assert set(read["on"]) == EVENTS
    assert read["permissions"] == {"contents": "read"}
    (job,) = read["jobs"].values()
    assert isinstance(job["timeout-minutes"], int)
    known = {step["id"] for step in job["steps"] if "id" in step}
    for step in job["steps"]:
        assert set(step) <= STEP_KEYS
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])  # a commit, no tag
        for expression in str(step.get("if", "")).split():
            assert not expression.startswith("steps.") or expression.split(".")[1] in known


def test_a_gitlab_pipeline_runs_what_githubs_does(place: Path) -> None:
    edgeres("init", "lab", "--ci", "gitlab", cwd=place)
    read = yaml.safe_load((place / "lab/.gitlab-ci.yml").read_text(encoding="utf-8"))
    (job,) = read.values()
    assert set(job) == {"image", "script", "artifacts"}
    gate = job["script"][-1]
    reports = {"junit": "build/edgeres.xml", "codequality": "build/codequality.json"}
    assert (job["artifacts"]["when"], job["artifacts"]["reports"]) == ("always", reports)
    assert gate.endswith(" --junit build/edgeres.xml --code-quality build/codequality.json")
    assert all(list(place.glob(pattern)) for pattern in job["artifacts"]["paths"])
    install, build, gate = job["script"]
    gate = gate.replace(" --code-quality build/codequality.json", "")  # GitHub has no reader for it
    steps = workflow(place / ".github/workflows/edgeres.yml")["jobs"]["int8"]["steps"]
    assert [install, build.split(" ||")[0], gate] == [step["run"] for step in steps if "run" in step]
    # what the build answers 1 to goes on to the gate, and nothing else does
    for code, after in ((1, "judged\n"), (70, ""), (2, "")):
        script = build.replace("edgeres build", f"sh -c 'exit {code}'") + "\necho judged"
        assert run("bash", "-e", "-c", script, cwd=place, code=None).stdout == after


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml"])
def test_a_starter_says_where_edgeres_is_to_come_from(name: str, tmp_path: Path) -> None:
    """Each line offered in place of the index is a requirement that packaging reads, or names this version's wheel."""
    begin(tmp_path, name.partition(".")[0])
    (written,) = tmp_path.rglob("*.yml")
    lines = [line.strip() for line in written.read_text(encoding="utf-8").splitlines()]
    at = next(index for index, line in enumerate(lines) if "pip install" in line and not line.startswith("#"))
    assert "Until edgeres is published, nobody owns its name" in lines[at - 3]
    git, wheel = (line.removeprefix("# pip install ").strip("'") for line in lines[at - 2 : at])
    required = Requirement(git)
    assert (required.name, required.extras) == ("edgeres", {"host"})
    assert (required.url or "").startswith("git+https://")
    file, _, extra = wheel.partition("[")
    assert (parse_wheel_filename(Path(file).name)[:2], extra) == (("edgeres", Version(VERSION)), "host]")


def test_init_overwrites_nothing(place: Path) -> None:
    before = (place / "calibration/recipe.toml").read_bytes()
    (place / "mine").mkdir()
    (place / "mine" / ".gitlab-ci.yml").symlink_to("nowhere")
    done = edgeres("init", "mine", "--ci", "gitlab", cwd=place, code=1)
    assert ".gitlab-ci.yml exists already" in done.stderr
    assert [path.name for path in (place / "mine").iterdir()] == [".gitlab-ci.yml"]
    said = edgeres("init", cwd=place, code=1).stderr
    assert [said.count(name) for name in ("recipe.toml", "README.md", "edgeres.yml")] == [1, 1, 1]
    assert (place / "calibration/recipe.toml").read_bytes() == before
    written = json.loads(edgeres("init", "other", "--ci", "none", "--json", cwd=place).stdout)
    assert written == ["other/calibration/recipe.toml", "other/calibration/README.md"]
    assert "cannot write" in edgeres("init", "grey.npy", cwd=place, code=1).stderr


GATES = {
    "a good net passes": ("build/bundle", (), 0, "pass", "system-out", "notice"),
    "a net calibrated on one grey image fails": ("build/grey", (), 1, "fail", "failure", "error"),
    "twenty samples decide nothing": ("build/bundle", ("twenty.npz",), 3, "inconclusive", "failure", "warning"),
}


@pytest.mark.parametrize(("bundle", "data", "code", "verdict", "element", "level"), GATES.values(), ids=GATES)
def test_every_channel_says_the_same(
    place: Path, bundle: str, data: tuple[str, ...], code: int, verdict: str, element: str, level: str
) -> None:
    validation = [word for name in data for word in ("--validation", name)]
    summary = place / f"{verdict}.md"
    done = edgeres(
        *("validate", bundle, *validation, "--json", "--junit", f"{verdict}.xml"),
        *("--code-quality", f"{verdict}.json"),
        cwd=place,
        code=code,
        GITHUB_ACTIONS="true",
        GITHUB_STEP_SUMMARY=str(summary),
    )
    report = json.loads(done.stdout)  # nothing but the object, also on GitHub
    assert report["verdict"] == verdict
    case = next(iter(ET.parse(place / f"{verdict}.xml").getroot().iter("testcase")))
    assert case[0].tag == element
    assert case[0].attrib.get("type", verdict) == verdict
    assert done.stderr.startswith(f"::{level} title={bundle}%3A accuracy against FP32%3A {verdict}::INT8 ")
    assert summary.read_text(encoding="utf-8").splitlines()[0].endswith(f": {verdict}")
    noticed = json.loads((place / f"{verdict}.json").read_text(encoding="utf-8"))
    severity = {"pass": [], "fail": ["critical"], "inconclusive": ["major"]}
    assert [one["severity"] for one in noticed if one["check_name"] == "edgeres-gate"] == severity[verdict]
    for one in noticed:
        lines = (place / one["location"]["path"]).read_text(encoding="utf-8").splitlines()
        assert lines[one["location"]["lines"]["begin"] - 1].startswith("max_drop = 1.0")

    plugin = [] if installed() else ["-p", "edgeres.pytest_plugin"]
    samples = [word for name in data for word in ("--edgeres-data", name)]
    tested = run(
        *(sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "--edgeres-bundle", bundle, *samples),
        cwd=place,
        code=min(code, 1),
    )
    assert ("1 passed" in tested.stdout) == (code == 0)
    headline = (case[0].text or "").splitlines()[0]
    assert headline.startswith(f"{verdict.upper()}: INT8 ")
    assert (headline in tested.stdout.splitlines()) == (code != 0)


def test_an_engine_that_is_too_slow_fails_by_every_channel(place: Path) -> None:
    """No machine answers in a tenth of a microsecond, nor a thousand times as slowly as in float."""
    limits = ("--max-latency-ms", "1e-4", "--min-speedup", "1e-3")
    files = ("--junit", "slow.xml", "--code-quality", "slow.json")
    done = edgeres(*("validate", "build/bundle", *limits, *files, "--json"), cwd=place, code=1, GITHUB_ACTIONS="true")
    report = json.loads(done.stdout)
    assert (report["verdict"], report["outcome"]) == ("pass", "fail")
    assert report["latency"]["device"].startswith("cpu (")
    told = [(one["name"], one["limit"], one["verdict"]) for one in report["latency"]["limits"]]
    assert told == [("round_p50_ms", 1e-4, "fail"), ("speedup", 1e-3, "pass")]
    known = [one for one in report["latency"]["limits"] if one["ci95"]]  # a busy machine's load may last
    assert all(one["ci95"][0] <= one["measured"] <= one["ci95"][1] for one in known)
    cases = [(case.attrib["name"], case[0].tag) for case in ET.parse(place / "slow.xml").getroot().iter("testcase")]
    assert cases == [
        ("accuracy against FP32", "system-out"), ("latency", "failure"), ("latency against FP32", "system-out"),
    ]  # fmt: skip
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == ["::notice", "::error", "::notice"]
    (found,) = json.loads((place / "slow.json").read_text(encoding="utf-8"))
    assert found["description"].startswith("latency: INT8 takes ")
    plugin = [] if installed() else ["-p", "edgeres.pytest_plugin"]
    asked = ("--edgeres-bundle", "build/bundle", "--edgeres-max-latency-ms", "1e-4")
    tested = run(sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", *asked, cwd=place, code=1)
    assert any(line.startswith("FAIL: INT8 takes ") for line in tested.stdout.splitlines())


def installed() -> bool:
    from importlib.metadata import entry_points

    return any(one.name == "edgeres" for one in entry_points(group="pytest11"))


def test_annotations_stand_on_stdout_beside_the_table(place: Path) -> None:
    lines = edgeres("validate", "build/grey", cwd=place, code=1, GITHUB_ACTIONS="true").stdout.splitlines()
    assert [line.split(" ")[0] for line in lines if line.startswith("::")] == ["::error", "::error"]
    assert any("FAIL: INT8 loses" in line for line in lines)
    (broken,) = (
        line
        for line in edgeres("validate", "none", cwd=place, code=1, GITHUB_ACTIONS="true").stdout.splitlines()
        if line.startswith("::")
    )
    assert broken.startswith("::error title=none%3A not judged::")


def test_a_junit_file_is_never_an_earlier_runs(place: Path) -> None:
    (place / "old.xml").write_text("<testsuites/>")
    edgeres("validate", "none", "--junit", "old.xml", cwd=place, code=1)
    assert ET.parse(place / "old.xml").getroot().attrib["errors"] == "1"
    for wrong, code in (("build/bundle/junit.xml", 2), ("build", 2), ("grey.npy/junit.xml", 1)):
        done = edgeres("validate", "build/bundle", "--junit", wrong, cwd=place, code=code)
        assert "junit" in done.stderr
        assert done.stdout == ""
    flags = ("--baseline", "build/bundle/../bundle/report.json", "--junit", "build/bundle/report.json")
    edgeres("validate", "build/bundle", *flags, cwd=place, code=2)
    run(sys.executable, "-m", "edgeres", "verify", "build/bundle", cwd=place)
