"""The rules of the house (CONTRIBUTING.md), read from the sources, and what a fresh interpreter really loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "edgeres"

# Which third-party package may be imported where: folders end in a slash, and the empty string is everywhere.
ALLOWED: Dict[str, Tuple[str, ...]] = {
    "numpy": ("",),
    "msgspec": ("",),
    "click": (
        *("cli.py", "answers.py", "building.py", "completion.py", "exits.py", "guide.py"),
        *("judging.py", "manual.py", "options.py", "shipping.py", "tables.py"),
    ),
    "rich": ("terminal.py",),
    "tomli": ("recipe.py",),
    "tomli_w": ("recipe.py", "recipe_file.py"),
    "PIL": ("samples/images.py",),
    "torch": ("models/", "export/", "quantize/"),  # quantize: accuracy recovery needs gradients
    "safetensors": ("models/",),
    "jinja2": ("page/render.py",),
    "cryptography": ("keys.py",),
    "markupsafe": ("page/render.py",),  # jinja2's own: text that is HTML already
    "distributed": ("cluster.py", "connection.py"),  # Dask: the passes over the samples on many machines
    "dask": ("connection.py",),  # its configuration
    "fsspec": ("samples/remote.py",),  # samples in object stores
    "google": ("export/",),  # protobuf, for the error of a damaged ONNX file
    "onnx": ("export/", "calibrate/", "quantize/"),
    "onnxruntime": ("calibrate/", "export/", "backends/cpu/", "backends/cpu.py"),
    "numba": ("calibrate/",),  # compiled loops: NumPy alone would double the time of a calibration pass
    "tensorrt": ("backends/tensorrt/",),
    "tensorrt_rtx": ("backends/tensorrt/",),
    "pycuda": ("backends/tensorrt/",),
    "cuda": ("backends/tensorrt/",),
    "pytest": ("pytest_plugin.py",),  # which nothing but pytest loads
    "pynvml": ("board.py",),  # clocks and power of NVIDIA GPUs, where it is installed
}
# The order of the work, and what its stages depend on, are written in the language alone.
NO_THIRD_PARTY = (
    *("pipeline.py", "stages.py", "exporting.py", "calibration.py"),
    *("quantization.py", "engines.py", "comparison.py"),
)
ROOMS = {"models", "export", "calibrate", "quantize", "backends", "runtime", "validation", "samples", "page"}
ENGINES = {"cpu", "tensorrt"}
# The rooms that never run on a robot; the rest is the runtime half, for Python 3.8.
HOST_ROOMS = {"models", "export", "calibrate", "quantize"}
# A room may enter these other rooms; any other pair of rooms exchanges nouns and arrays only.
MAY_ENTER = {"runtime": {"backends"}}
# Those who call the rooms; a room never calls back.
CALLERS = {"cli", "building", "judging", "pipeline", "tables", "terminal"}
# The command line: the only files that print and exit.
SPEAKERS = ("cli.py", "exits.py", "terminal.py", "__main__.py")
SPEECH = {"print", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig"}
# Part of Python, but younger than some Pythons that run this test.
STANDARD = frozenset(getattr(sys, "stdlib_module_names", ())) | {"__future__", "tomllib"}

HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "pycuda",
    "cuda",
    "PIL",
    "scipy",
    "sklearn",
    "safetensors",
    "numba",
    "pydantic",
    "cv2",
    "cryptography",
    "distributed",
    "dask",
    "fsspec",
}


class Import(NamedTuple):
    """One imported module's full name, where it stands, and whether it waits inside a function."""

    module: str
    line: int
    late: bool


def imports(tree: ast.AST) -> Iterator[Import]:
    """Yield every import under ``tree``, those spelled ``import_module("name")`` and ``__import__("name")`` too."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            # `from edgeres import models` enters a room just as `import edgeres.models` does.
            ours = parent.split(".")[0] == "edgeres"
            for name in dict.fromkeys(f"{parent}.{alias.name}" if ours else parent for alias in node.names):
                yield Import(name, node.lineno, late)
        elif isinstance(node, ast.Call) and called(node) in {"importlib.import_module", "import_module", "__import__"}:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, node.lineno, late)
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return visit(tree, False)


def dotted(node: Optional[ast.AST]) -> str:
    """Return ``a.b.c`` of such an expression, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def called(node: ast.AST) -> str:
    """Return the dotted name of what a call calls, or an empty string."""
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def catches_import_error(kind: Optional[ast.AST]) -> bool:
    """Tell whether ``except kind`` answers to a failed import; a bare ``except`` does."""
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    names = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
    return any(one is None or dotted(one) in names for one in kinds)


def package_findings(place: str, found: Import) -> Iterator[str]:
    """Yield what rules 1 and 2 have against one import of something from outside edgeres."""
    package = found.module.split(".")[0]
    if not package:
        yield f"{place}:{found.line}: a relative import; name the room: from edgeres.room import thing"
    elif package in ALLOWED:
        allowed = ALLOWED[package]
        if place in NO_THIRD_PARTY or not any(place.startswith(start) for start in allowed):
            yield f"{place}:{found.line}: imports {package}, which only {', '.join(allowed) or 'other files'} may"
        elif found.late and package in HEAVY:
            yield f"{place}:{found.line}: imports {package} late; import at the top, and enter the room late"
    elif package not in STANDARD and len(STANDARD) > 2:
        yield f"{place}:{found.line}: imports {package}, which no room may; add it to the table with a reason"


def room_findings(place: str, found: Import) -> Iterator[str]:
    """Yield what rule 3 has against one import of something in edgeres."""
    room, entered = place.split("/")[0], found.module.split(".")[1]
    if room != place and entered in CALLERS:
        yield f"{place}:{found.line}: imports edgeres.{entered}; a room does not call its callers"
    elif room != entered and entered not in MAY_ENTER.get(room, set()) and room in ROOMS and entered in ROOMS:
        yield f"{place}:{found.line}: imports edgeres.{entered}; rooms exchange nouns and arrays, nothing else"
    elif room == entered == "backends" and {engine_of(place)} < {engine_of(place), engine_of(found.module)} <= ENGINES:
        yield f"{place}:{found.line}: enters edgeres.backends.{engine_of(found.module)}; engines do not know each other"


def engine_of(where: str) -> str:
    """Return ``cpu`` of ``backends/cpu/session.py``, ``backends/cpu.py`` and ``edgeres.backends.cpu.session``."""
    parts = where[: -len(".py")].split("/") if where.endswith(".py") else where.split(".")[1:]
    return parts[1] if len(parts) > 1 else ""


def disguise_findings(place: str, tree: ast.AST) -> Iterator[str]:
    """Yield imports that hide their failure, and lazy-module objects (rule 1)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(imports(ast.Module(node.body, []))):
            for handler in node.handlers:
                constants = [
                    statement
                    for statement in handler.body
                    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Constant)
                ]
                if constants and catches_import_error(handler.type):
                    yield f"{place}:{constants[0].lineno}: a failed import becomes a constant; raise our own error"
        elif isinstance(node, ast.With) and any(imports(ast.Module(node.body, []))):
            if any(called(item.context_expr).split(".")[-1] == "suppress" for item in node.items):
                yield f"{place}:{node.lineno}: a failed import is suppressed; raise our own error"
        elif isinstance(node, ast.Attribute) and node.attr == "LazyLoader":
            yield f"{place}:{node.lineno}: a lazy module; import at the top, and enter the room late"


def speech_findings(place: str, tree: ast.AST) -> Iterator[str]:
    """Yield where the library prints, configures logging or exits (rule 4)."""
    if place in SPEAKERS:
        return
    for node in ast.walk(tree):
        if called(node) in SPEECH:
            yield f"{place}:{node.lineno}: calls {called(node)}; only the command line speaks and exits"
        elif isinstance(node, ast.Raise) and "SystemExit" in {dotted(node.exc), called(node.exc or node)}:
            yield f"{place}:{node.lineno}: raises SystemExit; raise an EdgeresError"


def field_findings(place: str, tree: ast.AST) -> Iterator[str]:
    """Yield fields of the runtime half's classes that are spelled ``X | Y``: msgspec evaluates them on Python 3.8."""
    if place.split("/")[0] in HOST_ROOMS:
        return
    for owner in ast.walk(tree):
        for field in owner.body if isinstance(owner, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and any(isinstance(n, ast.BitOr) for n in ast.walk(field.annotation)):
                yield f"{place}:{field.lineno}: a field spelled with |, unknown to Python 3.8; use Optional or Union"


def findings(place: str, source: str) -> List[str]:
    """Return everything that the rules have against a file; ``place`` is its path in the package, with slashes."""
    tree = ast.parse(source)
    found = [f"{place}:1: no docstring says what this file is for"] if ast.get_docstring(tree) is None else []
    for one in imports(tree):
        if one.module.split(".")[0] == "edgeres":
            if "." in one.module:
                found += room_findings(place, one)
        else:
            found += package_findings(place, one)
    found += [*disguise_findings(place, tree), *speech_findings(place, tree), *field_findings(place, tree)]
    return list(dict.fromkeys(found))


SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_the_sources_are_found() -> None:
    assert {"errors.py", "artifacts.py", "affine.py"} <= set(SOURCES)


@pytest.mark.parametrize("place", SOURCES)
def test_rules_hold(place: str) -> None:
    assert findings(place, (PACKAGE / place).read_text(encoding="utf-8")) == []


def test_every_room_is_known() -> None:
    """A new folder must be entered in the table, or rule 3 would not see it."""
    assert {place.split("/")[0] for place in SOURCES if "/" in place} <= ROOMS


BREACHES = {
    "torch in the core": ("affine.py", "import torch"),
    "torch in the runtime": ("runtime/__init__.py", "from torch import nn"),
    "a submodule": ("calibrate/observe.py", "import torch.nn as nn"),
    "torch for types only": (
        "runtime/__init__.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    "by name": ("runtime/__init__.py", "import importlib\nonnx = importlib.import_module('onnx.helper')"),
    "by the builtin": ("pipeline.py", "onnx = __import__('onnx')"),
    "onnx in the runtime, late": ("runtime/__init__.py", "def load():\n    import onnx"),
    "onnx in a backend": ("backends/cpu/__init__.py", "import onnx"),
    "onnxruntime in validate": ("validation/__init__.py", "import onnxruntime"),
    "tensorrt outside its room": ("backends/cpu/__init__.py", "import tensorrt"),
    "tensorrt in the file of another name": ("backends/tensorrt_cache.py", "import tensorrt"),
    "cuda in the runtime": ("runtime/stream.py", "from cuda import cudart"),
    "pytest elsewhere": ("cli.py", "import pytest"),
    "click elsewhere": ("terminal.py", "import click"),
    "rich elsewhere": ("cli.py", "from rich.table import Table"),
    "dask elsewhere": ("shards.py", "from distributed import Client"),
    "pillow elsewhere": ("samples/__init__.py", "from PIL import Image"),
    "numpy in the pipeline": ("pipeline.py", "import numpy"),
    "late, in the right room": ("export/__init__.py", "def export():\n    import torch"),
    "late, in a lambda": ("models/__init__.py", "load = lambda: __import__('torch')"),
    "relative": ("export/__init__.py", "from . import graph"),
    "a sibling": ("quantize/__init__.py", "from edgeres.calibrate import statistics"),
    "a sibling, as a name": ("quantize/__init__.py", "from edgeres import calibrate"),
    "a sibling, late": ("export/__init__.py", "def export():\n    import edgeres.models"),
    "the other way round": ("backends/__init__.py", "from edgeres.runtime import load"),
    "one engine in another": ("backends/cpu/__init__.py", "from edgeres.backends.tensorrt import build"),
    "one engine in another, files": ("backends/cpu.py", "from edgeres.backends.tensorrt import build"),
    "the caller": ("export/__init__.py", "from edgeres import pipeline"),
    "none for a missing package": ("affine.py", "try:\n    import tomllib\nexcept ImportError:\n    tomllib = None"),
    "false for a missing package": (
        "affine.py",
        "try:\n    import tomllib\n    HAS = True\nexcept (OSError, ModuleNotFoundError):\n    HAS: bool = False",
    ),
    "bare except": ("affine.py", "try:\n    import tomllib\nexcept:\n    tomllib = None"),
    "suppressed": ("affine.py", "from contextlib import suppress\nwith suppress(ImportError):\n    import tomllib"),
    "a lazy module": ("affine.py", "import importlib.util\nloader = importlib.util.LazyLoader"),
    "one engine, by its name": ("backends/cpu/session.py", "from edgeres.backends import tensorrt"),
    "several names of one sibling": ("validation/__init__.py", "from edgeres.samples import images, lists"),
    "a noun for Python 3.10": ("artifacts.py", "class Noun:\n    size: int | None = None"),
    "print": ("quantize/__init__.py", "print('done')"),
    "logging": ("affine.py", "import logging\nlogging.basicConfig()"),
    "exit": ("pipeline.py", "import sys\nsys.exit(1)"),
    "SystemExit": ("pipeline.py", "raise SystemExit(1)"),
    "SystemExit, bare": ("pipeline.py", "raise SystemExit"),
}


@pytest.mark.parametrize(("place", "source"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_found_once(place: str, source: str) -> None:
    assert len(findings(place, f'"""Why."""\n{source}\n')) == 1


KEPT = {
    "rooms' own packages": (
        "export/__init__.py",
        "import onnx\nimport onnxruntime\nimport torch\nfrom torch import nn",
    ),
    "numpy everywhere": ("runtime/__init__.py", "import numpy as np\nimport msgspec"),
    "an engine's package": ("backends/tensorrt/build.py", "import pycuda.driver as cuda\nimport tensorrt as trt"),
    "the runtime opens a backend": ("runtime/__init__.py", "from edgeres.backends import cpu"),
    "a backend chooses an engine": (
        "backends/__init__.py",
        "def engines():\n    from edgeres.backends import cpu, tensorrt",
    ),
    "inside a room": (
        "calibrate/table.py",
        "from edgeres.calibrate.ranges import METHODS\nfrom edgeres.affine import QMAX",
    ),
    "the pipeline enters rooms late": (
        "pipeline.py",
        "def build():\n    from edgeres import export\n    import edgeres.models",
    ),
    "our own error for a missing package": (
        "backends/cpu/__init__.py",
        "try:\n    import onnxruntime\nexcept ImportError:\n    raise MissingPackageError('x') from None",
    ),
    "a room named by the user": (
        "models/__init__.py",
        "import importlib\ndef find(n):\n    return importlib.import_module(n)",
    ),
    "files of one engine": ("backends/cpu/__init__.py", "from edgeres.backends.cpu import session"),
    "a host room's record": ("export/__init__.py", "class Noun:\n    size: int | None = None"),
    "the command line speaks": ("cli.py", "import sys\nimport click\nprint('done')\nsys.exit(0)"),
}


@pytest.mark.parametrize(("place", "source"), KEPT.values(), ids=KEPT)
def test_what_keeps_the_rules_is_not_found(place: str, source: str) -> None:
    assert findings(place, f'"""Why."""\n{source}\n') == []


def test_a_missing_docstring_is_found() -> None:
    assert findings("affine.py", "import math\n") == ["affine.py:1: no docstring says what this file is for"]


@pytest.mark.skipif(len(STANDARD) <= 2, reason="Python lists its own modules from 3.10 on")
def test_an_unlisted_package_is_found() -> None:
    assert len(findings("calibrate/__init__.py", '"""Why."""\nimport pandas\n')) == 1


def loaded(code: str) -> List[str]:
    """Return the top-level packages that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport json, sys\nsys.stderr.write(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=str(REPOSITORY), check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def require(place: str) -> None:
    if not (PACKAGE / place).exists():
        pytest.skip(f"edgeres has no {place}")


@pytest.mark.parametrize(
    ("module", "place"),
    [("edgeres", "errors.py"), ("edgeres.artifacts", "artifacts.py"), ("edgeres.runtime", "runtime/__init__.py")],
)
def test_importing_loads_nothing_heavy(module: str, place: str) -> None:
    require(place)
    assert (HEAVY | {"rich", "click"}).isdisjoint(loaded(f"import {module}"))


def test_help_loads_nothing_heavy() -> None:
    require("cli.py")
    after = loaded(
        "import sys\n"
        "from edgeres.cli import main\n"
        "sys.argv = ['edgeres', '--help']\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "assert not code, code\n"
    )
    assert "click" in after
    assert HEAVY.isdisjoint(after)


def test_a_heavy_import_would_be_seen() -> None:
    """The fresh interpreter reports what it loads; a module of the standard library stands for a heavy one."""
    assert "xmlrpc" in loaded("import xmlrpc.client")
    assert "xmlrpc" not in loaded("import edgeres.errors")
