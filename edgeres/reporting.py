"""``report.html``: what is read of a bundle for it, and how it gets into the bundle."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import msgspec
import numpy as np

from edgeres import files
from edgeres.artifacts import Bundle, CalibrationTable, Manifest, QuantizedModel, Report, from_data, from_json, to_json
from edgeres.bundle import read_listed, read_verified, verify
from edgeres.errors import BundleError, EdgeresError, MissingPackageError, SampleError
from edgeres.files import PAGE, is_url
from edgeres.inspection import layer_errors, repairs
from edgeres.judge import read_reference
from edgeres.measurements import Benchmark
from edgeres.page import Contents, Flip, flips, pairs
from edgeres.recipe import locate
from edgeres.samples import Samples, open_samples, picture
from edgeres.signatures import Keys, key_list
from edgeres.validation import Limits, advice, against_limits, baseline_headline, fallen_words, headline, limit_headline
from edgeres.validation.baseline import unpacked
from edgeres.workspace import Workspace

SHOWN = 24  # samples with their pictures
SIDE = 160  # pixels, the longer side of a picture
SAME_DB = 50.0  # from here on an engine is as sure as its model is, to about a percentage point
BENCH = ".bench.json"  # behind a bundle's name: where a result of `bench` is looked for, beside the bundle

LARGEST_BENCH = 16 << 20  # bytes; a result has tens of kB


def page(
    folder: Path, manifest: Manifest, measured: Optional[Benchmark] = None, limits: Optional[Limits] = None
) -> bytes:
    """Return the page of a bundle, with pictures of the samples where these are at hand; the same bundle and the same
    samples give the same bytes.

    Args:
        folder: where the manifest's files lie.
        measured: how fast the engine is, where that is known.
        limits: on the latency; their verdicts count in the page's.

    Raises:
        MissingPackageError: jinja2 is not installed.
        BundleError: a file is not what the manifest says, or there are limits and nothing was measured.
    """
    try:
        from edgeres.page.render import render
    except ImportError:
        raise MissingPackageError.for_extra("jinja2", PAGE, "report") from None
    # As it is read from the file: a build's own still has tuples where JSON has lists.
    manifest = from_json(to_json(without_page(manifest)), Manifest, files.MANIFEST)
    if limits is not None and limits.asked:
        manifest = _limited(manifest, measured, limits)
    contents = Contents(manifest, model=_model(manifest), errors=layer_errors(folder, manifest), measured=measured)
    content = read_listed(folder, manifest, files.TABLE)
    if content is not None:
        contents = contents._replace(table=from_json(content, CalibrationTable, files.TABLE))
    report = manifest.report
    if report is None:
        return render(contents)
    found, unseen = _changes(folder, manifest, report)
    shown = found[:SHOWN]
    if shown and not unseen:
        shown, unseen = _with_pictures(folder, manifest, shown)
    return render(
        contents._replace(
            headlines=[line for line in (headline(report), baseline_headline(report)) if line],
            limits=[(x.verdict, limit_headline(report, x)) for x in (report.latency.limits if report.latency else ())],
            fallen=fallen_words(report),
            advice=advice(report, *repairs(folder, manifest)),
            flips=shown,
            flipped=len(found),
            unseen=unseen,
            pairs=pairs(found),
        )
    )


def _limited(manifest: Manifest, measured: Optional[Benchmark], limits: Limits) -> Manifest:
    """Return a manifest whose report holds what was measured against limits on the latency."""
    if measured is None or manifest.report is None:
        lacking = "benchmark of it beside the bundle: edgeres bench BUNDLE --out BUNDLE.bench.json"
        if manifest.report is None:
            lacking = "verdict in the bundle: edgeres build BUNDLE"
        raise BundleError(f"a limit on the latency cannot be judged, for there is no {lacking}")
    judged = msgspec.structs.replace(manifest.report, latency=against_limits(measured, limits))
    return msgspec.structs.replace(manifest, report=judged)


def with_page(folder: Path, manifest: Manifest) -> Manifest:
    """Write the page of a bundle into its folder, and return the manifest with it; without it where jinja2 is missing,
    for an earlier page may not hold any more."""
    if importlib.util.find_spec("jinja2") is None:
        return without_page(manifest)
    return _bound(folder, manifest, page(folder, manifest))


def without_page(manifest: Manifest) -> Manifest:
    """Return a manifest that binds no page."""
    return msgspec.structs.replace(manifest, files=tuple(ref for ref in manifest.files if ref.path != PAGE))


def page_loss(before: Manifest, after: Manifest) -> Tuple[str, ...]:
    """Return what to say where a bundle had a page that :func:`with_page` could not make anew."""
    had, has = (any(ref.path == PAGE for ref in manifest.files) for manifest in (before, after))
    if not had or has:
        return ()
    return (
        f"{PAGE} told of the bundle as it was, and is left out. Make it again: edgeres report BUNDLE, with "
        "pip install 'edgeres[report]'",
    )


def report_bundle(
    bundle: Path,
    bench: Optional[Path] = None,
    warn: Callable[[str], None] = lambda text: None,
    trusted_keys: Optional[Keys] = None,
) -> Bundle:
    """Return a bundle whose page is made anew, with the samples' pictures and a benchmark as far as they are at hand.

    The bundle is verified first; where the page is as it was, nothing is written. Limits on the latency are for pages
    elsewhere (:func:`page_of`): a bundle goes to many machines, and one machine's verdict must not go with it.

    Args:
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed the bundle.

    Raises:
        MissingPackageError: jinja2 is not installed.
        BundleError: the bundle is damaged, or cannot be changed, or nobody who is trusted vouches for it.
    """
    trusted_keys = key_list(trusted_keys)
    manifest = verify(bundle, trusted_keys)
    content = page(bundle, manifest, benchmark_of(bundle, manifest, bench))
    if any(ref == files.content_ref(PAGE, content) for ref in manifest.files):
        return Bundle(str(bundle), manifest)
    otherwise = f"Or write the page elsewhere: edgeres report {bundle} --out FILE"
    with Workspace(bundle, otherwise, trusted_keys) as workspace:
        if workspace.unfinished:
            raise BundleError(f"an unfinished build stands beside {bundle}. Finish it first: edgeres build {bundle}")
        manifest = verify(bundle, trusted_keys)  # again, now that no other build can change it
        for ref in without_page(manifest).files:
            workspace.write(ref.path, read_verified(bundle, ref))
        page_content = page(bundle, manifest, benchmark_of(bundle, manifest, bench))
        changed = _bound(workspace.folder, manifest, page_content)
        unsigned = workspace.signature_loss(changed)
        workspace.commit(changed)
    for text in unsigned:
        warn(text)
    return Bundle(str(bundle), changed)


def page_of(
    bundle: Path,
    bench: Optional[Path] = None,
    limits: Optional[Limits] = None,
    trusted_keys: Optional[Keys] = None,
) -> bytes:
    """Return the page of a bundle, which is verified and not changed.

    Args:
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed the bundle.

    Raises:
        MissingPackageError: jinja2 is not installed.
        BundleError: the bundle is damaged; the benchmark is none, or of another engine, or missing where there are
            limits on the latency.
        BackendError: the benchmark does not tell what a limit is on.
    """
    manifest = verify(bundle, trusted_keys)
    return page(bundle, manifest, benchmark_of(bundle, manifest, bench), limits)


def benchmark_of(bundle: Path, manifest: Manifest, chosen: Optional[Path] = None) -> Optional[Benchmark]:
    """Return what ``bench`` measured of a bundle: in the file ``chosen``, or else in ``NAME.bench.json`` beside it,
    where that is of one of its engines. None: there is nothing.

    Raises:
        BundleError: the chosen file cannot be read, or is of another engine.
    """
    place = chosen or bundle.resolve().parent / f"{bundle.resolve().name}{BENCH}"
    try:
        found = from_json(files.read_bounded(place, LARGEST_BENCH), Benchmark, str(place))
    except OSError as problem:
        if chosen is None:
            return None
        raise BundleError(
            f"cannot read {place}: {problem.strerror}. Write it: edgeres bench {bundle} --out FILE"
        ) from None
    if any(found.engine_sha256 == engine.file.sha256 for engine in manifest.engines):
        return found
    if chosen is None:
        return None
    raise BundleError(
        f"{place} was measured of another engine than {bundle} holds. Measure again: edgeres bench {bundle}"
    )


def judged_samples(manifest: Manifest) -> Optional[Samples]:
    """Return the samples that a bundle's verdict is on, unread; None where they are not at hand."""
    if manifest.report is None:
        return None
    section = manifest.recipe.get(manifest.report.samples_source, {})
    source = section.get("samples") if isinstance(section, dict) else None
    if not isinstance(source, str) or is_url(source):  # a bundle does not choose what a page fetches over the network
        return None
    try:
        return open_samples(locate(source), labelled=manifest.report.samples_source == "validation")
    except (EdgeresError, OSError):  # a page is made without pictures too
        return None


def _bound(folder: Path, manifest: Manifest, content: bytes) -> Manifest:
    """Write a page, and return the manifest that binds it."""
    files.write_atomic(folder / PAGE, content)
    refs = [*without_page(manifest).files, files.content_ref(PAGE, content)]
    return msgspec.structs.replace(manifest, files=tuple(sorted(refs, key=lambda ref: ref.path)))


def _model(manifest: Manifest) -> Optional[QuantizedModel]:
    record = manifest.stages.get("quantize")
    return None if record is None else from_data(record.facts, QuantizedModel, "stage quantize")


def _reference(folder: Path, manifest: Manifest, path: str = files.REFERENCE) -> Optional[Dict[str, np.ndarray]]:
    content = read_listed(folder, manifest, path)
    return None if content is None else read_reference(content, path)


def _changes(folder: Path, manifest: Manifest, report: Report) -> Tuple[List[Flip], str]:
    """Return the samples whose answer changed, and why they cannot be told, where they cannot."""
    reference = _reference(folder, manifest)
    if reference is None or not report.answers or len(reference["logits"]) != report.samples:
        return [], "The answers to each sample are not in this bundle."
    logits, parts = None, report.attribution
    # The bundle holds what the model means, and not what the engine answered, which may be the same.
    if parts is not None and (parts.engine.sqnr_db is None or parts.engine.sqnr_db >= SAME_DB):
        meaning = _reference(folder, manifest, files.MEANING)
        same = meaning is not None and meaning["logits"].shape == reference["logits"].shape
        logits = meaning["logits"] if meaning is not None and same else None
    return flips(reference, unpacked(report.answers, report.samples), logits), ""


def _with_pictures(folder: Path, manifest: Manifest, shown: List[Flip]) -> Tuple[List[Flip], str]:
    """Return samples with their pictures, and why there are none, where there are none. A picture is shown only of the
    very sample that was judged, by its hash."""
    samples, reference = judged_samples(manifest), _reference(folder, manifest)
    if samples is None or reference is None:
        return shown, "The samples are not at hand, so there are no pictures."
    places = {name: position for position, name in enumerate(samples.names)}
    pictured, missing = [], ""
    for flip in shown:
        try:
            chosen = samples.at([places[flip.name]])
            if chosen.sha256()[0] != str(reference["sha256"][flip.position]):
                raise SampleError("changed")
            content, kind, size = picture(chosen, 0, SIDE)
        except MissingPackageError:
            return shown, "There are no pictures without Pillow."
        except (SampleError, KeyError):
            missing = "Some samples have changed or are gone, so there is no picture of them."
            pictured.append(flip)
            continue
        text = base64.b64encode(content).decode("ascii")
        pictured.append(flip._replace(picture=f"data:{kind};base64,{text}", size=size))
    return pictured, missing
