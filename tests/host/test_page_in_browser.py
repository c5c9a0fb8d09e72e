"""The page in Chromium, from a file and without a network: phone, desk and paper, light and dark, with scripts off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgeres.artifacts import to_json
from edgeres.bundle import verify
from edgeres.reporting import page_of
from edgeres.validation import Limits
from hostile_bundle import HOSTILE, benchmark, made, photos

PHONE, DESK = (360, 740), (1200, 900)
PAPER = (680, 960)  # A4 without its margins of 15 mm: 180 mm at 96 pixels per inch
READABLE = 4.5  # Web Content Accessibility Guidelines 2.2, criterion 1.4.3, for text of any size

OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(element => {
  const within = element.parentElement.closest(".wide");
  const scrolls = within && getComputedStyle(within).overflowX === "auto";
  return !scrolls && !element.closest("svg *") && element.getBoundingClientRect().right > innerWidth + 0.5;
}).map(element => `${element.tagName} ${element.textContent.slice(0, 40)}`)"""
"""What reaches beyond the right edge, tables that scroll by themselves aside."""

TEXTS = """() => [...document.querySelectorAll("body *")].filter(element =>
  [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) && element.getClientRects().length
).map(element => {
  let ground = element;
  while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const style = getComputedStyle(element);
  return [element.textContent.trim().slice(0, 40), element.closest("svg") ? style.fill : style.color,
          ground ? getComputedStyle(ground).backgroundColor : "rgb(255, 255, 255)"];
})"""
"""Each element with text of its own that is shown: the text, its colour and that of what is behind it."""


PLACE = """element => [
  element.getBoundingClientRect().top, innerHeight, scrollY + innerHeight + 1 > document.documentElement.scrollHeight
]"""
"""How far below the window's edge an element begins, how high the window is, and whether it shows the page's end."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pictures: Callable[..., np.ndarray]) -> str:
    """The address of a page with everything that one can show, whose texts are hostile."""
    folder = tmp_path_factory.mktemp("browser")
    bundle = made(folder / "bundle", photos(folder / "images", pictures), name=HOSTILE)
    (folder / "bundle.bench.json").write_bytes(to_json(benchmark(verify(bundle).engines[0].file.sha256)))
    (folder / "page.html").write_bytes(page_of(bundle, limits=Limits(0.5, 1.2)))
    return (folder / "page.html").as_uri()


@pytest.fixture
def shown(browser: Any, place: str) -> Iterator[Callable[..., Any]]:
    """Return ``shown(size, scheme, scripts)``: the page, opened; at the end it has asked for nothing and complained of
    nothing."""
    contexts, asked, said = [], [], []

    def open_page(size: tuple[int, int], scheme: str = "light", scripts: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            java_script_enabled=scripts,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(place)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:image/")} == {place}


def luminance(colour: str) -> float:
    """Return the relative luminance of ``rgb(r, g, b)``, by the formula of the guidelines."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_is_that_of_the_guidelines() -> None:
    """Known pairs: black on white is 21, and #767676 the lightest grey that is readable on it."""
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(255, 255, 255)", "rgb(118, 118, 118)") == pytest.approx(4.54, abs=0.005)


def test_nothing_hostile_ran_and_the_page_names_itself(shown: Callable[..., Any]) -> None:
    page = shown(DESK)
    assert page.evaluate("document.scripts.length + document.querySelectorAll('[onerror]').length") == 0
    assert page.title().endswith("int8: fail")  # its latency is beyond the limit
    assert page.locator(".verdict strong").inner_text() == "FAIL"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("img").count() > 1


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_every_anchor_leads_to_its_section(shown: Callable[..., Any], scripts: bool) -> None:
    page = shown(PHONE, scripts=scripts)
    links = page.locator("a[href^='#']").all()
    assert len(links) == page.locator("h2").count() > 10
    for link in links:
        name = (link.get_attribute("href") or "").removeprefix("#")
        link.click()
        top, height, at_the_end = page.locator(f"[id='{name}']").evaluate(PLACE)
        assert -1 <= top <= (height if at_the_end else 1), name
        assert page.url.endswith(f"#{name}")


def test_what_is_folded_opens_without_scripts(shown: Callable[..., Any]) -> None:
    page = shown(DESK, scripts=False)
    folded = page.locator("details").all()
    assert len(folded) >= 3
    for details in folded:
        rows = details.locator("tr").first
        assert not rows.is_visible()
        details.locator("summary").click()
        assert rows.is_visible()


@pytest.mark.parametrize("size", [PHONE, DESK, (320, 568)], ids=["phone", "desk", "small phone"])
def test_nothing_reaches_beyond_the_edge(shown: Callable[..., Any], size: tuple[int, int]) -> None:
    page = shown(size)
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]


def test_the_checks_see_what_is_wrong(shown: Callable[..., Any]) -> None:
    page = shown(PHONE)
    page.evaluate("document.querySelector('h1').style.width = '400px'")
    assert [found.split(" ")[0] for found in page.evaluate(OVERFLOWING)] == ["H1"]
    page.evaluate("document.querySelector('h2').style.color = '#999999'")
    assert [text for text, ink, ground in page.evaluate(TEXTS) if contrast(ink, ground) < READABLE] == [
        "What to do next"
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(shown: Callable[..., Any], scheme: str) -> None:
    page = shown(DESK, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.9, luminance(ground) < 0.02) == (scheme == "light", scheme == "dark")
    texts = page.evaluate(TEXTS)
    assert len(texts) > 200
    assert [text for text in texts if contrast(text[1], text[2]) < READABLE] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints(shown: Callable[..., Any], scheme: str) -> None:
    """On white paper, also from a dark screen, with every column, and unfolded: paper cannot be."""
    page = shown(PAPER, scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(OVERFLOWING) == []
    assert not page.locator("nav").is_visible()
    assert all(rows.is_visible() for rows in page.locator("details tr").all())
    assert all(column.is_visible() for column in page.locator("main > section > div th.rare").all())
    assert [text for text in page.evaluate(TEXTS) if contrast(text[1], text[2]) < READABLE] == []
    paper = page.pdf(format="A4", prefer_css_page_size=True)
    assert paper.startswith(b"%PDF-")
    assert paper.count(b"/Type /Page\n") > 2
