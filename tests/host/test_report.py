"""The page about a bundle: what it says, that it is valid, safe, and always the same; and that the bundle binds it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import msgspec
import numpy as np
import pytest
from PIL import Image

from command_line import edgeres
from edgeres import files
from edgeres.artifacts import BaselineChange, Change, ClassChange, Discordant, Manifest, Preprocessing, Report, to_json
from edgeres.bundle import verify
from edgeres.errors import BundleError, MissingPackageError
from edgeres.page import Contents, plots
from edgeres.page.render import render
from edgeres.reporting import page_loss, page_of, report_bundle, with_page
from edgeres.validation import Limits, fallen_words
from hostile_bundle import CLASSES, HOSTILE, SHOWN, benchmark, made, photos


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pictures: Callable[..., np.ndarray]) -> Path:
    """A bundle with everything a page can show, at ``bundle``, and its benchmark beside it."""
    folder = tmp_path_factory.mktemp("report")
    bundle = made(folder / "bundle", photos(folder / "images", pictures), name=HOSTILE)
    engine = verify(bundle).engines[0]
    (folder / "bundle.bench.json").write_bytes(to_json(benchmark(engine.file.sha256)))
    return bundle


@pytest.fixture(scope="module")
def page(place: Path) -> bytes:
    return page_of(place)


def parsed(content: bytes) -> Element:
    """Parse a page by the HTML standard; anything that the standard calls an error is raised."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(content)


def problems(content: bytes) -> list[str]:
    """Return what a page must not have: markup that runs or loads something, broken anchors, pictures without words."""
    tree = parsed(content)
    found = []
    ids = [element.get("id") for element in tree.iter() if element.get("id") is not None]
    found += [f"two elements are called {name}" for name in set(ids) if ids.count(name) > 1]
    for element in tree.iter():
        tag = str(element.tag).rpartition("}")[2]
        if tag in ("script", "iframe", "object", "embed", "link", "form", "base", "foreignObject", "animate", "use"):
            found.append(f"there is a {tag}")
        if (tag == "img" and not element.get("alt")) or (
            tag == "svg" and not (element.get("role") == "img" and element.get("aria-label"))
        ):
            found.append(f"a {tag} has no words")
        for name, value in element.attrib.items():
            if str(name).startswith("on") or str(name) in ("style", "srcdoc", "srcset"):
                found.append(f"a {tag} has {name}")
            if str(name).rpartition("}")[2] in ("href", "src"):
                allowed = value.startswith("data:image/") if tag == "img" else value[1:] in ids and value[0] == "#"
                if not allowed:
                    found.append(f"a {tag} refers to {value}")
            if name == "aria-labelledby" and value not in ids:
                found.append(f"a {tag} is called by {value}, which there is not")
    style = "".join(element.text or "" for element in tree.iter("style"))
    found += [f"the style has {word}" for word in ("url(", "@import", "expression", "<") if word in style]
    return found


def words_of(content: bytes) -> str:
    return " ".join(" ".join(parsed(content).itertext()).split())


def test_the_page_is_valid_and_loads_nothing_whatever_it_is_given(page: bytes) -> None:
    assert problems(page) == []
    assert b"\x1b" not in page
    assert "\u202e" not in page.decode("utf-8")


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (b"<main><script>1</script>", "there is a script"),
        (b"<main><p id=accuracy></p>", "two elements are called accuracy"),
        (b"<main><a href='#nowhere'>x</a>", "a a refers to #nowhere"),
        (b"<main><img src='https://example.com/x.png' alt=x>", "a img refers to https://example.com/x.png"),
        (b"<main><img src='data:image/png;base64,' alt=''>", "a img has no words"),
        (b"<main><p onclick='1'>x</p>", "a p has onclick"),
    ],
)
def test_the_checker_sees_what_is_wrong(page: bytes, harm: bytes, found: str) -> None:
    assert problems(page.replace(b"<main>", harm, 1)) == [found]


def test_the_checker_refuses_what_is_not_html(page: bytes) -> None:
    with pytest.raises(html5lib.html5parser.ParseError):
        parsed(page.replace(b"</section>", b"", 1))


def test_hostile_names_are_shown_as_they_are(page: bytes) -> None:
    words = words_of(page)
    assert words.count(SHOWN) > 15 + 14  # each layer, each range, and more
    for name in CLASSES[:2]:
        assert name in words
    assert "\"><img src=x onerror='1' " in words


def test_the_browser_is_told_to_run_and_fetch_nothing(page: bytes) -> None:
    tree = parsed(page)
    (policy,) = (x.get("content") for x in tree.iter("meta") if x.get("http-equiv") == "Content-Security-Policy")
    style = next(tree.iter("style")).text or ""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}';")
    assert len(list(tree.iter("style"))) == 1


def test_every_section_of_a_full_page_is_there(page: bytes) -> None:
    tree = parsed(page)
    headings = [element.get("id") for element in tree.iter("h2")]
    assert headings == [
        "next", "accuracy", "changes", "classes", "confidence", "noise", "ranges", "precisions", "budget", "latency",
        "warnings", "provenance",
    ]  # fmt: skip
    assert [element.get("href") for element in tree.iter("a")] == [f"#{name}" for name in headings]


def test_the_verdict_and_its_numbers_come_first(place: Path, page: bytes) -> None:
    report = verify(place).report
    assert report is not None
    assert report.drop_ci95_pp is not None
    words = words_of(page[: page.index(b"<style>")] + page[page.index(b"</style>") + 8 :])
    low, high = report.drop_ci95_pp
    assert words.index(f" {report.verdict} INT8 loses") < words.index("What to do next")
    assert words.index(f"95 % interval of the loss {low:.2f} to {high:.2f}") < words.index("Accuracy")
    assert f"{100 * report.top1_engine:.2f} %" in words  # type: ignore[operator]


def test_the_samples_whose_answer_changed_are_told_and_shown(place: Path, page: bytes) -> None:
    """The oracle is the logits themselves, and the images by Pillow."""
    with np.load(place / files.REFERENCE) as reference, np.load(place / files.MEANING) as meaning:
        before, after, labels = (
            x.tolist() for x in (reference["logits"].argmax(1), meaning["logits"].argmax(1), reference["labels"])
        )
        names = reference["names"].tolist()
    changed = [index for index in range(len(before)) if before[index] != after[index]]
    assert 1 < len(changed) <= 24
    pictures = list(parsed(page).iter("img"))
    assert len(pictures) == len(changed)
    for index in changed:
        (found,) = (x for x in pictures if (x.get("alt") or "").startswith(f"{names[index]}: "))
        said = found.get("alt") or ""
        assert f"label {CLASSES_SORTED[labels[index]]}, FP32 answers {CLASSES_SORTED[before[index]]} (" in said
        assert f"the engine {CLASSES_SORTED[after[index]]} (" in said
        drawn = decoded(found.get("src") or "")
        with Image.open(place.parent / "images" / names[index]) as image:
            original = np.asarray(image.convert("RGB"))
        assert drawn.shape == original.shape  # 96 pixels: not scaled
        assert np.abs(drawn.astype(int) - original).mean() < 12  # JPEG
    losses = [index for index in changed if before[index] == labels[index]]
    firsts = [(x.get("alt") or "").startswith(tuple(f"{names[index]}: " for index in losses)) for x in pictures]
    assert firsts == sorted(firsts, reverse=True)


CLASSES_SORTED = sorted(CLASSES)


def decoded(source: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def test_a_picture_is_of_the_very_sample_that_was_judged(tmp_path: Path, pictures: Callable[..., np.ndarray]) -> None:
    """A file that was replaced is not shown, nor is one that is gone; the page is made all the same."""
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, side=40))
    shown = [x.get("alt") or "" for x in parsed(page_of(bundle)).iter("img")]
    assert len(shown) >= 2
    first, second = (tmp_path / "images" / text.partition(": label")[0] for text in shown[:2])
    Image.new("RGB", (40, 40)).save(first)
    second.unlink()
    content = page_of(bundle)
    assert [x.get("alt") for x in parsed(content).iter("img")] == shown[2:]
    assert "Some samples have changed or are gone" in words_of(content)
    assert problems(content) == []


def test_how_sure_an_engine_is_is_told_where_the_bundle_knows(
    tmp_path: Path, pictures: Callable[..., np.ndarray]
) -> None:
    """The bundle holds the model's logits; an engine whose answers differ from these has its own confidence."""
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, side=24))
    said = [x.get("alt") or "" for x in parsed(page_of(bundle)).iter("img")]
    assert all(text.count("% sure)") == 2 for text in said)
    manifest = verify(bundle)
    assert manifest.report is not None
    assert manifest.report.attribution is not None
    other = msgspec.structs.replace(manifest.report.attribution, engine=Change(1.0, 40.0, 0.0))
    report = msgspec.structs.replace(manifest.report, attribution=other)
    (bundle / files.MANIFEST).write_bytes(to_json(msgspec.structs.replace(manifest, report=report)))
    said = [x.get("alt") or "" for x in parsed(page_of(bundle)).iter("img")]
    assert all(text.count("% sure)") == 1 for text in said)


def test_at_most_24_are_shown_and_all_are_counted(tmp_path: Path, pictures: Callable[..., np.ndarray]) -> None:
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, side=20), noise=6.0)
    report = verify(bundle).report
    assert report is not None
    changed = round((1 - report.agreement) * report.samples)
    assert changed > 24
    content = page_of(bundle)
    assert len(list(parsed(content).iter("img"))) == 24
    assert f"{changed} of {report.samples} samples are answered otherwise" in words_of(content)
    assert problems(content) == []


def test_equal_bundles_have_equal_pages(place: Path, page: bytes) -> None:
    """Also in another process, whose hashes of strings are others."""
    code = "import sys; from pathlib import Path; from edgeres.reporting import page_of; "
    code += "sys.stdout.buffer.write(page_of(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, check=True)
    assert done.stdout == page


def bare_manifest(report: Report | None) -> Manifest:
    return Manifest("net", "int8", {}, Preprocessing((32, 32)), (), {}, {}, report=report)


def plain_report(**changes: object) -> Report:
    report = Report(
        1000, 0.99, 30.0, 0.5, "pass", "cpu", "int8", top1_reference=0.9, top1_engine=0.899, drop_pp=0.1,
        drop_ci95_pp=(-0.1, 0.3),
    )  # fmt: skip
    return msgspec.structs.replace(report, **changes)


def test_what_is_not_known_is_left_out() -> None:
    content = render(Contents(bare_manifest(None)))
    assert problems(content) == []
    assert "not judged" in words_of(content)
    assert [x.get("id") for x in parsed(content).iter("h2")] == ["provenance"]
    unlabelled = plain_report(
        top1_reference=None, top1_engine=None, drop_pp=None, drop_ci95_pp=None, verdict="unlabelled"
    )
    content = render(Contents(bare_manifest(unlabelled)))
    assert problems(content) == []
    assert not list(parsed(content).iter("{http://www.w3.org/2000/svg}svg"))


def test_of_many_classes_that_fell_three_are_told_at_once_and_all_in_their_section() -> None:
    fallen = tuple(ClassChange(i, f"kind {i}", 100, 30 + i, 0, 30.0 + i, 1e-6, True) for i in range(7))
    report = plain_report(classes=fallen)
    content = render(Contents(bare_manifest(report), fallen=fallen_words(report)))
    assert problems(content) == []
    words = words_of(content)
    assert words.count("corrected for the number of classes).") == 3
    assert "4 more fell: see Classes" in words
    at = [words.index(f"kind {i} fell +3{i}") for i in range(7)]
    assert at == sorted(at, reverse=True)  # the largest drop first


@pytest.mark.parametrize("value", [1e300, -1e300, 1e-300, 0.0])
def test_numbers_that_no_build_would_write_are_drawn_within_bounds(value: float) -> None:
    report = plain_report(max_drop_pp=value, drop_pp=value, drop_ci95_pp=(value, value), verdict='"><script>')
    content = render(Contents(bare_manifest(report)))
    assert problems(content) == []
    for found in re.findall(rb' (?:x|x1|x2|cx|width)="([^"%]+)"', content):
        assert found.isalnum() or abs(float(found)) <= 360


def test_the_interval_stands_where_the_numbers_say() -> None:
    plot = plots.budget(plain_report())
    (row,) = plot.intervals
    assert row.low < plot.zero < row.point < row.high < plot.limit  # −0.1 < 0 < 0.1 < 0.3 < 0.5
    per_pp = (plot.limit - plot.zero) / 0.5
    assert row.high - row.low == pytest.approx(0.4 * per_pp)
    assert "0.10 percentage points, its 95 % interval -0.10 to 0.30; the budget is 0.50" in plot.words
    baseline = BaselineChange(0.9, 0.2, (0.1, 0.7), Discordant(3, 1), 0.98, 0.5, "inconclusive")
    first, second = plots.budget(plain_report(baseline=baseline)).intervals
    assert (first.name, second.name) == ("against FP32", "against the baseline")
    assert first.low < second.low < first.high < second.high


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 11.7), (0, 1e-4), (5, 5), (1e8, 2e8)])
def test_ticks_are_where_they_say(low: float, high: float) -> None:
    axis = plots.axis(low, high)
    assert 2 <= len(axis.ticks) <= 7
    for place, text in axis.ticks:
        assert place == pytest.approx(axis.place(float(text)), abs=0.5)
        assert plots.LEFT <= place <= plots.RIGHT


def test_latencies_lie_in_order_of_their_percentiles(page: bytes) -> None:
    measured = benchmark("0")
    for batch in plots.batches(measured):
        for spread in batch.spreads:
            assert spread.p50 < spread.p90 < spread.p99 <= plots.RIGHT
            assert len(spread.rounds) == 8
        int8, fp32 = batch.spreads
        assert (fp32.p50 - plots.LEFT) / (int8.p50 - plots.LEFT) == pytest.approx(
            fp32.latency.p50_ms / int8.latency.p50_ms
        )
    assert "Batch 8. int8: p50 8." in page.decode()


def test_a_page_is_bound_and_made_once(tmp_path: Path, pictures: Callable[..., np.ndarray]) -> None:
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, side=24))
    found = report_bundle(bundle)
    assert verify(bundle) == found.manifest
    assert files.PAGE in [ref.path for ref in found.manifest.files]
    before = (bundle / files.MANIFEST).stat().st_mtime_ns
    assert (bundle / files.PAGE).read_bytes() == page_of(bundle)  # it tells of itself nothing
    report_bundle(bundle)
    assert (bundle / files.MANIFEST).stat().st_mtime_ns == before
    (tmp_path / "bundle.bench.json").write_bytes(to_json(benchmark(found.manifest.engines[0].file.sha256)))
    report_bundle(bundle)
    assert b'<h2 id="latency">' in (bundle / files.PAGE).read_bytes()
    verify(bundle)
    assert not list(tmp_path.glob(".bundle.work"))


def test_a_benchmark_of_another_engine_is_not_shown(tmp_path: Path, pictures: Callable[..., np.ndarray]) -> None:
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, each=4, side=24))
    other = tmp_path / "bundle.bench.json"
    other.write_bytes(to_json(benchmark("0" * 64)))
    assert b'<h2 id="latency">' not in page_of(bundle)
    with pytest.raises(BundleError, match="another engine"):
        page_of(bundle, other)
    with pytest.raises(BundleError, match="cannot read"):
        page_of(bundle, tmp_path / "none.json")


def test_limits_on_the_latency_count_in_the_pages_verdict(tmp_path: Path, pictures: Callable[..., np.ndarray]) -> None:
    """The benchmark's int8 takes 0.9 to 1.2 ms, fp32 twice as long; eight rounds decide only what is far off."""
    bundle = made(tmp_path / "bundle", photos(tmp_path / "images", pictures, side=24), noise=0.0)
    with pytest.raises(BundleError, match="no benchmark of it beside the bundle"):
        page_of(bundle, limits=Limits(2.0))
    (tmp_path / "bundle.bench.json").write_bytes(to_json(benchmark(verify(bundle).engines[0].file.sha256)))
    report = verify(bundle).report
    assert report is not None
    accuracy = report.verdict
    assert accuracy != "fail"
    for limits, verdicts, outcome in (
        (Limits(4.0, 0.5), ["pass", "pass"], accuracy),
        (Limits(0.25, 0.5), ["fail", "pass"], "fail"),
    ):
        content = page_of(bundle, limits=limits)
        assert problems(content) == []
        words = words_of(content)
        assert f"a net, INT8 {outcome} INT8 keeps top-1" in words
        rows = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in parsed(content).iter("tr")]
        told = {row[0]: (row[1], row[-1]) for row in rows if row[0].endswith("at least") or row[0].endswith("at most")}
        assert told == {
            "p50 (of a round), ms, at most": (f"{limits.max_latency_ms:g}", verdicts[0]),
            f"times as fast as fp32 {SHOWN}, at least": ("0.5", verdicts[1]),
        }
        assert words.index("INT8 takes 1.") < words.index("What to do next")


def test_without_jinja2_no_page_is_left_that_may_not_hold(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = verify(place)
    bound = msgspec.structs.replace(manifest, files=(*manifest.files, files.content_ref(files.PAGE, b"old")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert with_page(tmp_path, bound) == manifest
    assert "edgeres[report]" in page_loss(bound, manifest)[0]
    assert page_loss(manifest, manifest) == page_loss(bound, bound) == ()
    monkeypatch.setitem(sys.modules, "edgeres.page.render", None)
    with pytest.raises(MissingPackageError, match=r"edgeres\[report\]"):
        page_of(place)


def test_the_command_writes_where_it_is_told(place: Path, page: bytes, tmp_path: Path) -> None:
    before = (place / files.MANIFEST).read_bytes()
    out = tmp_path / "page.html"
    assert edgeres("report", place, "--out", out).stdout.strip() == str(out)
    assert out.read_bytes() == page
    assert (place / files.MANIFEST).read_bytes() == before
    assert "lies in the bundle" in edgeres("report", place, "--out", place / "x.html", code=2).stderr
    assert "there is no bundle" in edgeres("report", tmp_path / "none", code=1).stderr
