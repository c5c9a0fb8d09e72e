"""The documentation site: built without a warning, every link leads somewhere, nothing comes from elsewhere, and it can
be read on a phone."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeres import OPTIONS, cli

REPOSITORY = Path(__file__).resolve().parents[2]
PHONE, DESK = (360, 740), (1280, 900)

OVERFLOWING = """() => [...document.querySelectorAll("article *")].filter(element => {
  if (element.getBoundingClientRect().right <= innerWidth + 0.5) return false;
  for (let around = element; around; around = around.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(around).overflowX)) return false;
  return true;
}).map(element => `${element.tagName} ${element.textContent.slice(0, 40)}`)"""
"""What of the text reaches beyond the right edge, and does not scroll by itself."""


def build(checkout: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [checkout / "scripts/docs", folder]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs, of the extra docs, builds the site")
    folder = tmp_path_factory.mktemp("documentation") / "site"
    ended = build(REPOSITORY, folder)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return folder


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        ("stray.md", "# Stray", "not included in the"),
        ("index.md", "[gone](gone.md)", "gone.md"),
        ("index.md", "[gone](tutorial.md#gone)", "does not contain an anchor"),
    ],
)
def test_a_warning_is_an_error(page: str, text: str, said: str, site: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    for name in ("mkdocs.yml", "SECURITY.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "edgeres").symlink_to(REPOSITORY / "edgeres")
    with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    ended = build(tmp_path, tmp_path / "site")
    assert ended.returncode != 0
    assert said in ended.stderr + ended.stdout


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8"))


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text = text_of(site / "reference/cli.html")
    for name, command in cli.cli.commands.items():
        assert f"edgeres {name}" in text
        missing = [option for one in command.params for option in one.opts if option[:2] == "--" and option not in text]
        assert not missing


def test_every_key_of_a_recipe_is_in_the_reference(site: Path) -> None:
    text = text_of(site / "reference/recipe.html")
    assert [key for key in OPTIONS.values() if key.rpartition(".")[2] not in text] == []


def test_docstrings_are_shown_without_the_marks_of_sphinx(site: Path) -> None:
    text = text_of(site / "reference/api.html")
    assert "edgeres.build" in text
    assert "Run the whole pipeline and return the finished bundle" in text
    assert re.findall(r":(?:func|class|meth|mod):", text) == []


@pytest.fixture(scope="module")
def check() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield importlib.import_module("check_site").problems


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="gone.html">', "gone.html is not there"),
        ('<a href="other.html#gone">', "no place of that name"),
        ('<a href="#gone">', "no place of that name"),
        ('<a href="/gone/">', "/gone/ is not there"),
        ('<link rel="stylesheet" href="https://fonts.example/css">', "loads https://fonts.example/css"),
        ('<script src="//cdn.example/x.js">', "loads //cdn.example/x.js"),
        ('<a href="../SECURITY.md">', "../SECURITY.md leads out of the site"),
        ('<a href="/../SECURITY.md">', "leads out of the site"),
        ('<p style="background: url(https://cdn.example/x.png)">', "loads https://cdn.example/x.png"),
        ('<style>@import "https://fonts.example/css";</style>', "loads https://fonts.example/css"),
        ("<style>p { background: url( https://cdn.example/y.png ) }</style>", "loads https://cdn.example/y.png"),
        ('<img srcset="https://cdn.example/x.png 2x">', "loads https://cdn.example/x.png"),
    ],
)
def test_what_is_wrong_with_a_site_is_found(html: str, said: str, check: Any, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "SECURITY.md").write_text("is there, and not in the site", encoding="utf-8")
    (tmp_path / "site/other.html").write_text('<p id="here">', encoding="utf-8")
    good = '<a href="other.html#here"><a href="https://example.org/"><link rel="canonical" href="https://example.org/">'
    site = tmp_path / "site"
    (site / "index.html").write_text(good, encoding="utf-8")
    assert list(check(site)) == []
    (site / "index.html").write_text(good + html, encoding="utf-8")
    (found,) = check(site)
    assert said in found


def test_a_style_that_loads_from_elsewhere_is_found(check: Any, tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text('@import "https://fonts.example/x"; p { background: url(x.png) }', encoding="utf-8")
    (found,) = check(tmp_path)
    assert "a.css: loads https://fonts.example/x" in found


def test_it_can_be_read_on_a_phone_and_asks_nobody(browser: Any, site: Path) -> None:
    asked: list[str] = []
    for width, height in (PHONE, DESK):
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.rglob("*.html")):
            if path.name == "404.html":  # whose addresses begin at a server's root
                continue
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (path, width)
            assert page.evaluate(OVERFLOWING) == [], (path, width)
        context.close()
    assert [url for url in asked if not url.startswith("file:")] == []
