"""Data is never run: no source of edgeres unpickles, evaluates, or loads arrays and tensors in a way that could."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("edgeres", "examples", "scripts") for path in (REPOSITORY / room).rglob("*.py"))

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
EVALUATORS = {"eval", "exec", "compile", "os.system", "os.popen"}
LOADERS: Dict[str, Tuple[str, object]] = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
DOORS = {
    "edgeres/models/__init__.py": "a callable that the user names",
    "edgeres/backends/tensorrt/module.py": "TensorRT's own packages",
    "scripts/arena.py": "edgeres' own modules",
    "scripts/bench_accuracy.py": "the quantizers of its own table",
}
"""Where a module is imported by a name that is no constant, and whose name that is."""


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` of such an expression, or an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def said(call: ast.Call, name: str, value: object) -> bool:
    """Whether a call says ``name=value`` in so many words."""
    return any(
        one.arg == name and isinstance(one.value, ast.Constant) and one.value.value is value for one in call.keywords
    )


def call_findings(call: ast.Call, place: str) -> List[str]:
    """Return what is wrong with one call."""
    name = dotted(call.func)
    found = []
    if name in EVALUATORS:
        found.append(f"calls {name}")
    if name in LOADERS and not said(call, *LOADERS[name]):
        found.append("calls {} without {}={}".format(name, *LOADERS[name]))
    if any(one.arg == "shell" for one in call.keywords) and not said(call, "shell", False):
        found.append("lets a shell read a command")
    constant = bool(call.args) and isinstance(call.args[0], ast.Constant)
    if name.split(".")[-1] in ("import_module", "__import__") and place not in DOORS and not constant:
        found.append(f"calls {name} with a name from elsewhere")
    return found


def findings(source: str, place: str = "") -> List[str]:
    """Return where a source could run data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {problem}" for problem in call_findings(node, place)]
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in UNPICKLERS]  # type: ignore[attr-defined]
    return found


def test_there_are_sources() -> None:
    assert len(SOURCES) > 150
    assert all((REPOSITORY / place).is_file() for place in DOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_source_runs_data(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).as_posix()) == []


BREACHES = [
    "import pickle",
    "from joblib import load",
    "import yaml.loader",
    "eval(text)",
    "exec(text)",
    "np.load(path)",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "numpy.load(path, mmap_mode='r')",
    "torch.load(path)",
    "torch.load(path, weights_only=0)",
    "subprocess.run(line, shell=True)",
    "os.system(line)",
    "importlib.import_module(name)",
    "__import__(name)",
]


@pytest.mark.parametrize("source", BREACHES)
def test_a_source_that_could_is_found(source: str) -> None:
    assert len(findings(source)) == 1


KEPT = [
    "np.load(stream, allow_pickle=False)",
    "torch.load(stream, map_location='cpu', weights_only=True)",
    "model.eval()",
    "re.compile(text)",
    "importlib.import_module('edgeres.models')",
    "subprocess.run(['git', 'status'])",
]


@pytest.mark.parametrize("source", KEPT)
def test_what_cannot_is_not_found(source: str) -> None:
    assert findings(source) == []
