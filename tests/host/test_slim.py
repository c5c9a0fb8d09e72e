"""A robot stays as it was: what running, judging and timing a bundle reads, writes and loads, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import edgeres

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "onnx", "scipy", "PIL", "pydantic", "numba", "safetensors", "sklearn", "cv2", "tensorrt"}

# Runs sys.argv[1] and prints what Python opened and changed on the way, and what it has loaded then. Python's own files
# (modules) are opened by the importer, and told apart by their places.
WATCH = """
import json, os, sys
read, changed = set(), set()
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "shutil.copyfile", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp"}
OUTSIDE = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}

def place(path):
    path = os.fsdecode(path)
    if not os.path.lexists(path):  # it may be below a folder that is open, and the event does not tell which
        folders = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        path = next((os.path.join(one, path) for one in folders if os.path.lexists(os.path.join(one, path))), path)
    return os.path.realpath(path)

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        (changed if writes else read).add(place(path))
    elif event in CHANGES:
        changed.update(place(path) for path in arguments if isinstance(path, (str, bytes)))
    elif event in OUTSIDE:
        changed.add(f"{event}: {arguments}")

sys.addaudithook(watch)
exec(sys.argv[1])
modules = sorted({name.split(".")[0] for name, module in sys.modules.items() if module is not None})
sys.stderr.write(json.dumps({"read": sorted(read), "changed": sorted(changed), "modules": modules}))
"""

RUN = """
import numpy as np
import edgeres
frames = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)
with edgeres.load("BUNDLE") as engine:
    engine(frames)
    engine.warmup()
    engine.profile(runs=5)
    list(engine.stream(frames))
"""
JUDGE = """
import numpy as np
import edgeres
from edgeres.recipe import dossier
frames = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
with edgeres.load("BUNDLE") as engine:
    labels = engine(frames).argmax(1)
edgeres.validate("BUNDLE", frames, labels)
"""
BENCH = """
from edgeres.cli import main
try:
    main(["bench", "BUNDLE", "--runs", "6", "--warmup", "0", "--batch", "1", "--frames", "40x48"])
except SystemExit as stop:
    assert not stop.code
"""


@dataclass(frozen=True)
class Trace:
    """What one run read, changed and loaded, by Python; and the files that lie in its folders afterwards."""

    read: set[str]
    changed: set[str]
    modules: set[str]
    left: list[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, built as quickly as can be."""
    out = tmp_path_factory.mktemp("robot") / "digits-int8"
    edgeres.build(out=out, recovery="none", calibration_count=32)
    return out


def traced(code: str, bundle: Path, folder: Path) -> Trace:
    """Run code in an empty folder, with an empty home and an empty folder for temporary files."""
    places = {name: folder / name.lower() for name in ("HOME", "TMPDIR", "HERE")}
    for place in places.values():
        place.mkdir()
    # onnxruntime tells nobody anything on machines that look like a CI, and would hide what it does elsewhere.
    hidden = ("CI", "GITHUB_ACTIONS", "ORT_", "XDG_", "EDGERES_", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment.update(
        HOME=str(places["HOME"]),
        TMPDIR=str(places["TMPDIR"]),
        PYTHONPATH=str(REPOSITORY),
        PYTHONDONTWRITEBYTECODE="1",  # modules compiled beside their sources are the interpreter's doing
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCH, code.replace("BUNDLE", str(bundle))],
        cwd=places["HERE"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {name: set(values) for name, values in json.loads(done.stderr.splitlines()[-1]).items()}
    left = [str(path) for place in places.values() for path in place.rglob("*")]
    return Trace(**found, left=left)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", [RUN, JUDGE, BENCH], ids=["load and run", "validate", "bench"])
def test_nothing_is_written_and_nothing_heavy_loaded(code: str, bundle: Path, tmp_path: Path) -> None:
    before = contents(bundle)
    trace = traced(code, bundle, tmp_path)
    assert trace.changed == set()
    assert trace.left == []
    assert contents(bundle) == before
    assert trace.modules & HEAVY == set()
    assert "onnxruntime" in trace.modules
    installed = {sys.prefix, sys.base_prefix, str(REPOSITORY / "edgeres"), *sysconfig.get_paths().values()}
    machine = {"/proc", "/sys", "/dev", "/etc", "/etc/os-release"}  # processors, clocks, sensors, the system's name
    known = tuple(os.path.realpath(place) for place in (*installed, *machine, bundle))
    assert [path for path in trace.read if not path.startswith(known)] == []
    assert any(path.startswith(str(bundle)) for path in trace.read)


@pytest.mark.parametrize(
    "code",
    [
        "open('file', 'w').close()",
        "import pathlib; pathlib.Path.home().joinpath('cache').mkdir()",
        "import tempfile; tempfile.mkstemp()",
        "import os; os.close(os.open('file', os.O_CREAT | os.O_WRONLY))",
        "import os; os.symlink('BUNDLE', 'link')",
    ],
)
def test_what_writes_would_be_seen(code: str, bundle: Path, tmp_path: Path) -> None:
    trace = traced(code, bundle, tmp_path)
    assert trace.changed
    assert trace.left


def test_what_libraries_write_by_themselves_would_be_seen(bundle: Path, tmp_path: Path) -> None:
    code = "import ctypes; libc = ctypes.CDLL(None); libc.close(libc.creat(b'file', 0o600))"
    trace = traced(code, bundle, tmp_path)
    assert trace.left == [str(tmp_path / "here/file")]


def test_whoever_wants_onnxruntimes_telemetry_can_have_it() -> None:
    code = "import os, edgeres; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for given, wanted in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted
