"""README and the documentation: every block of code is run, what it prints is what the page shows, and the figures are
what scripts draw."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pages
import pytest

import edgeres

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
MATPLOTLIB = "3.11.2"  # that drew the figures; another one writes other numbers of digits
FENCE = "`" * 3


@pytest.fixture(scope="session")
def default_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, built once for all pages, also where several processes test."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "documented"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "digits-int8").is_dir():
            edgeres.build(out=shared / "digits-int8")
    return shared / "digits-int8"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with pages.warm_command() as path:
        yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_block_runs_and_prints_what_is_shown(
    page: Path, server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if page.name in pages.BARE:
        pytest.importorskip("sklearn", reason="scikit-learn, of the extra dev, has the images of this page")
    needed = any(block.runs for block in pages.blocks(page.read_text(encoding="utf-8"))) and page.name not in pages.BARE
    folder = tmp_path / "page"
    folder.mkdir()
    pages.prepare(folder, request.getfixturevalue("default_bundle") if needed else None)
    wrong = pages.untrue(pages.run_page(page, folder, pages.environment_of(tmp_path / "tools", server)))
    assert not wrong, "\n".join(wrong)


def run(text: str, folder: Path) -> list[str]:
    """Run a page and return what is untrue in it."""
    (folder / "page.md").write_text(text.replace("~~~", FENCE), encoding="utf-8")
    (folder / "here").mkdir()
    return pages.untrue(
        pages.run_page(folder / "page.md", folder / "here", pages.environment_of(folder / "tools", "none"))
    )


TRUE = """
~~~python title="greet.py"
print("hello", 1.25)
~~~

Text, and `edgeres validate BUNDLE --policy point`.

~~~sh
pip install 'edgeres[host]'
python greet.py; echo 'took 3.1 s'; echo wrong >&2
~~~

~~~text
hello 1.21
took 0.2 s
...
~~~

~~~sh title="on the Jetson"
edgeres compile BUNDLE --target dla0 && edgeres bench BUNDLE  # neither is run
~~~
"""


def test_a_true_page_is_found_so(tmp_path: Path) -> None:
    assert run(TRUE, tmp_path) == []


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ("hello 1.21", "hello 4.21", "other numbers: 1.25, not 4.21"),
        ("hello 1.21", "goodbye 1.21", "something else"),
        ("...\n", "", "something else"),
    ],
)
def test_another_output_is_found(there: str, instead: str, said: str, tmp_path: Path) -> None:
    (found,) = run(TRUE.replace(there, instead), tmp_path)
    assert said in found


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ("python greet.py", "python greet.py; false", "exit code 1"),
        ("python greet.py", "false | true", "exit code 1"),
        ("--target dla0", "--timeout-minutes soon", "soon"),
        ("compile BUNDLE", "compile BUNDLE --gone", "No such option"),
        ("&& edgeres bench BUNDLE", "| edgeres bench", "Missing argument"),
        ("--policy point", "--policy hope", "hope"),
        ("edgeres validate BUNDLE", "edgeres judge BUNDLE", "no such command"),
        ("edgeres[host]", "edgeres[ghost]", "no extra ghost"),
        ("on the Jetson", "on the moon", "on the moon"),
        ('title="greet.py"', 'title="examples/greet.py"', "the repository is another"),
    ],
)
def test_a_page_that_has_rotted_is_refused(there: str, instead: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(pages.PageError, match=said):
        run(TRUE.replace(there, instead), tmp_path)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("┃ SQNR ┃ 42.2 dB ┃", "┃   SQNR   ┃ 41.9 dB   ┃\n", True),
        ("drop +0.10 pp", "drop +0.14 pp", True),
        ("drop +0.10 pp", "drop +0.90 pp", False),
        ("11 layers, 3.0 s", "11 layers, 12 ms", True),
        ("11 layers", "12 layers", False),
        ("signed by 0d13f6070337ae7f", "signed by ffffffffffffffff", True),
        ("signed by 0d13f6070337ae7f", "signed by nobody", False),
        ("a ... z", "a z", True),
        ("a ... z", "a b\nc z", True),
        ("a ... z", "a b", False),
    ],
)
def test_what_counts_as_the_same_output(shown: str, printed: str, same: bool) -> None:
    assert (pages.difference(shown, printed) == "") is same


def test_on_one_machine_numbers_may_be_others_and_words_may_not() -> None:
    assert pages.difference("fc 21 %, layer2.0 17", "conv1 3 %, fc 1,234", exact=False) == ""
    assert "something else" in pages.difference("fc 21 %", "fc 21 dB", exact=False)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra dev, draws")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield importlib.import_module("draw_docs")


def test_the_figures_are_what_the_script_draws(script: ModuleType, tmp_path: Path) -> None:
    measured = json.loads(script.MEASURED.read_text(encoding="utf-8"))
    script.draw(measured, tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in script.FIGURES.glob("*.svg")}
    assert drawn.keys() == kept.keys()
    if importlib.import_module("matplotlib").__version__ == MATPLOTLIB:
        assert [name for name in drawn if drawn[name] != kept[name]] == []


def test_the_figures_show_what_is_measured(script: ModuleType) -> None:
    kept, found = json.loads(script.MEASURED.read_text(encoding="utf-8")), script.measure()
    assert kept.keys() == found.keys()
    assert kept["ranges"] == pytest.approx(found["ranges"], rel=0.02)
    assert kept["elements"] == found["elements"]
    assert kept["counts"] == pytest.approx(found["counts"], rel=0.05, abs=20)
    for row, other in zip(kept["border"], found["border"], strict=True):
        assert row == pytest.approx(other, rel=0.05, abs=0.05)
