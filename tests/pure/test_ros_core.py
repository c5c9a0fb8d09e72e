"""The example node's core, which needs no ROS: images to frames, the newest one answered, and what is told of it."""

from __future__ import annotations

import array
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Optional

import msgspec
import numpy as np
import pytest
import ros_double
import scipy.special

from edgeres.artifacts import Report
from edgeres.errors import BackendError, BundleError, SignatureError
from edgeres_ros.core import ERROR, OK, WARN, Answer, Classifier, Settings, SettingsError, open_classifier
from edgeres_ros.image import ENCODINGS, FrameError, frame_of

PLACES = {"rgb8": "RGB", "bgr8": "BGR", "rgba8": "RGBA", "bgra8": "BGRA", "mono8": "Y"}  # REP 118's names, spelled out


class Message(SimpleNamespace):
    """An image message that a weak reference can watch."""


def image(frame: np.ndarray, encoding: str = "rgb8", padding: int = 0, header: Any = None) -> Message:
    """Return a frame, uint8 (H, W, 3), as the message that a camera would send."""
    height, width, _ = frame.shape
    planes = {"R": frame[..., 0], "G": frame[..., 1], "B": frame[..., 2]}
    planes.update(A=np.full((height, width), 77, np.uint8), Y=frame[..., 0])
    rows = b""
    for y in range(height):
        rows += bytes(int(planes[place][y, x]) for x in range(width) for place in PLACES[encoding]) + b"\xee" * padding
    step = width * len(PLACES[encoding]) + padding
    return Message(
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=step,
        data=array.array("B", rows),
    )


def frame(seed: int = 0, height: int = 4, width: int = 4) -> np.ndarray:
    pixels: np.ndarray = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", PLACES)
def test_every_encoding_gives_its_pixels(encoding: str, padding: int) -> None:
    pixels = frame(1, 3, 5)
    message = image(pixels, encoding, padding)
    wanted = pixels[..., [0, 0, 0]] if encoding == "mono8" else pixels
    found = frame_of(message)
    np.testing.assert_array_equal(found, wanted)
    assert found.flags.c_contiguous
    message.is_bigendian = 1  # says nothing about bytes
    np.testing.assert_array_equal(frame_of(message), wanted)
    message.data = bytes(message.data)
    np.testing.assert_array_equal(frame_of(message), wanted)


@pytest.mark.parametrize("encoding", ["16UC1", "mono16", "yuv422", "bayer_rggb8", "32FC1", "", "RGB8"])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    message = image(frame())
    message.encoding = encoding
    with pytest.raises(FrameError, match=f"images in '{encoding}' are not read, only rgb8, bgr8, .*driver"):
        frame_of(message)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": array.array("B", b"\0" * 47)}, "it has 47 bytes of data, and 4 rows of 12 are 48"),
        ({"data": array.array("B", b"\0" * 49)}, "49 bytes"),
        ({"data": array.array("B")}, "it has 0 bytes"),
        ({"step": 11}, "its rows have 11 bytes, and 4 pixels of rgb8 need 12; it has 48 bytes"),
        ({"step": 0}, "rows have 0 bytes"),
        ({"height": 0}, "it is 4 × 0 pixels; it has 48 bytes of data, and 0 rows"),
        ({"width": 0}, "it is 0 × 4 pixels"),
    ],
)
def test_a_damaged_image_is_refused_with_all_that_is_wrong(change: Any, words: str) -> None:
    message = image(frame())
    vars(message).update(change)
    with pytest.raises(FrameError, match=words):
        frame_of(message)


def test_the_encodings_are_those_of_the_readme() -> None:
    assert set(ENCODINGS) == set(PLACES)


class Bench:
    """A classifier over an engine that sums channels, the answers it gave, and a clock that is set by hand."""

    def __init__(self, engine: Any, runner: Any, settings: Settings, names: Optional[List[str]] = None) -> None:
        self.answers: List[Answer] = []
        self.runner = runner
        self.now = 0.0
        self.deliver: Callable[[Answer], None] = self.answers.append
        self.classifier = Classifier(
            engine, names or ["red", "green", "blue"], settings, lambda answer: self.deliver(answer), lambda: self.now
        )

    def offer(self, *messages: Any) -> None:
        """Offer images one by one, each once the one before is done with."""
        for message in messages:
            self.classifier.offer(message)
            self.settle()

    def settle(self) -> None:
        total = self.classifier._total
        ros_double.wait_until(lambda: total.received == total.answered + total.dropped + total.refused + total.failed)

    def hold(self) -> threading.Event:
        """Let the next call of the engine wait for the event that is returned; return once it is at work."""
        begun, go = threading.Event(), threading.Event()

        def meanwhile(batch: np.ndarray) -> None:
            begun.set()
            assert go.wait(30)

        self.runner.meanwhile = meanwhile
        self.begun = begun
        return go


@pytest.fixture
def bench(summing: Callable[..., Any]) -> Iterator[Callable[..., Bench]]:
    made: List[Bench] = []

    def make(**settings: Any) -> Bench:
        made.append(Bench(*summing(), Settings("bundle", **settings)))
        return made[-1]

    yield make
    for one in made:
        one.classifier.close()


def test_answers_are_probabilities_best_first_under_the_images_own_header(bench: Callable[..., Bench]) -> None:
    one, pixels, header = bench(), frame(2) // 100, object()
    one.offer(image(pixels, "bgr8", header=header))
    (answer,) = one.answers
    assert answer.header is header
    wanted = scipy.special.softmax(pixels.astype(np.float64).sum((0, 1)))
    order = np.argsort(-wanted)
    assert [name for name, _ in answer.classes] == [["red", "green", "blue"][i] for i in order]
    np.testing.assert_allclose([score for _, score in answer.classes], wanted[order], rtol=1e-12)
    assert all(type(score) is float for _, score in answer.classes)


def test_large_logits_do_not_overflow(bench: Callable[..., Bench]) -> None:
    one = bench(top_k=0)
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 1] = 255
    one.offer(image(pixels))
    assert one.answers[0].classes == [("green", 1.0), ("red", 0.0), ("blue", 0.0)]


@pytest.mark.parametrize(
    ("settings", "count"), [({"top_k": 1}, 1), ({"top_k": 2}, 2), ({"threshold": 0.9}, 1), ({"threshold": 1.0}, 0)]
)
def test_few_classes_may_be_wanted(bench: Callable[..., Bench], settings: Any, count: int) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0] = 1, 5, 2  # 0.94 for green
    one = bench(**settings)
    one.offer(image(pixels))
    assert [name for name, _ in one.answers[0].classes] == ["green", "blue"][:count]


def test_a_slow_engine_answers_the_first_and_the_newest_and_holds_nothing_else(bench: Callable[..., Bench]) -> None:
    one = bench()
    go = one.hold()
    one.classifier.offer(image(frame(0), header=0))
    assert one.begun.wait(30)
    messages = [image(frame(number), header=number) for number in range(1, 100)]
    alive = [weakref.ref(message) for message in messages]
    while messages:
        one.classifier.offer(messages.pop(0))  # returns at once: the engine cannot go on before the last line
    assert [reference() is not None for reference in alive] == [False] * 98 + [True]
    stuck = one.classifier.health()
    assert stuck.level == WARN
    assert stuck.message.startswith("100 images came in ")
    assert stuck.message.endswith(" 0 answered, 98 left out: the engine has been at one image all the time")
    go.set()
    one.settle()
    assert [answer.header for answer in one.answers] == [0, 99]
    health = one.classifier.health()
    assert [health.values[name] for name in ("received", "answered", "dropped")] == ["100", "2", "98"]
    ros_double.wait_until(lambda: alive[-1]() is None)


def test_a_damaged_image_is_told_and_the_next_one_answered(bench: Callable[..., Bench]) -> None:
    one = bench()
    damaged = image(frame())
    damaged.data = damaged.data[:-1]
    one.offer(image(frame(), header="a"), damaged, image(frame(), header="b"))
    assert [answer.header for answer in one.answers] == ["a", "b"]
    health = one.classifier.health()
    assert health.level == WARN
    assert "3 images came in 0.0 s, 2 answered, 0 left out, 1 not answered: a damaged" in health.message
    assert "a damaged image: it has 47 bytes" in health.message
    assert health.values["refused or failed"] == "1"
    one.offer(image(frame()))
    assert one.classifier.health().level == OK
    assert "47 bytes" in one.classifier.health().values["last problem"]


def test_where_nothing_but_damage_comes_it_is_an_error(bench: Callable[..., Bench]) -> None:
    one = bench()
    small = image(frame(0, 2, 2))  # does not cover the crop of 4 × 4
    one.offer(small, small)
    assert one.classifier.health().level == ERROR
    assert one.answers == []


def test_an_engine_or_a_subscriber_that_fails_once_is_an_error_and_no_end(bench: Callable[..., Bench]) -> None:
    one = bench()

    def fail(batch: np.ndarray) -> None:
        raise BackendError("the device is lost.\nsecond line")

    one.runner.meanwhile = fail
    one.offer(image(frame()))
    health = one.classifier.health()
    assert health.level == ERROR
    assert health.message.endswith("BackendError: the device is lost.")
    one.runner.meanwhile = lambda batch: None
    one.deliver = lambda answer: 1 // 0  # type: ignore[assignment]
    one.offer(image(frame()))
    assert "ZeroDivisionError" in one.classifier.health().message
    one.deliver = one.answers.append
    one.offer(image(frame(), header="again"))
    assert one.answers[-1].header == "again"
    assert one.classifier.health().level == OK


def test_logits_that_are_no_numbers_are_never_published(bench: Callable[..., Bench]) -> None:
    one = bench()

    def spoil(batch: np.ndarray) -> None:
        batch.fill(np.nan)

    one.runner.meanwhile = spoil
    one.offer(image(frame()))
    assert one.answers == []
    assert "not finite" in one.classifier.health().message


def test_rates_and_latencies_are_those_of_the_clock(bench: Callable[..., Bench]) -> None:
    one = bench()
    latencies = np.arange(1, 31) / 1000

    def take(seconds: float) -> Callable[[np.ndarray], None]:
        def meanwhile(batch: np.ndarray) -> None:
            one.now += seconds

        return meanwhile

    for seconds in latencies:
        one.runner.meanwhile = take(seconds)
        one.offer(image(frame()))
    one.now = 2.0
    values = one.classifier.health().values
    assert values["frame rate (Hz)"] == values["answers (Hz)"] == "15.0"
    p50, p99 = np.percentile(1000 * latencies, (50, 99))
    assert (values["latency p50 (ms)"], values["latency p99 (ms)"]) == (f"{p50:.1f}", f"{p99:.1f}")
    one.now = 5.0
    silent = one.classifier.health()
    assert (silent.level, silent.message) == (WARN, "no image came in 3.0 s")
    assert silent.values["frame rate (Hz)"] == "0.0"
    assert silent.values["received"] == "30"


def test_health_tells_the_engine_and_warns_of_a_verdict_on_it(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.offer(image(frame()))
    values = one.classifier.health().values
    assert (values["bundle"], values["network"], values["backend"], values["precision"]) == (
        "bundle", "sums", "cpu", "fp32",
    )  # fmt: skip
    assert values["verdict"] == "none on this engine"
    assert values["signature"] == "not asked"
    engine = one.classifier.engine
    report = Report(100, 0.5, 3.0, 0.5, "fail", "cpu", "fp32", target="cpu")
    engine.manifest = msgspec.structs.replace(engine.manifest, report=report)
    one.offer(image(frame()))
    health = one.classifier.health()
    assert (health.level, health.values["verdict"]) == (WARN, "fail")
    assert "loses more accuracy than its budget" in health.message
    engine.manifest = msgspec.structs.replace(engine.manifest, report=msgspec.structs.replace(report, target="dla0"))
    one.offer(image(frame()))
    assert one.classifier.health().level == OK


def test_closing_finishes_the_image_at_work_and_forgets_the_one_that_waits(bench: Callable[..., Bench]) -> None:
    one = bench()
    go = one.hold()
    one.classifier.offer(image(frame(), header="at work"))
    assert one.begun.wait(30)
    one.classifier.offer(image(frame(), header="waits"))
    closing = threading.Thread(target=one.classifier.close)
    closing.start()
    assert not one.runner.closed
    go.set()
    closing.join(30)
    assert one.runner.closed
    assert [answer.header for answer in one.answers] == ["at work"]
    one.classifier.offer(image(frame()))  # a camera that has not been told
    one.classifier.close()
    assert len(one.answers) == 1


def test_every_parameter_that_makes_no_sense_is_told_at_once(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "names.txt")
    with pytest.raises(SettingsError) as caught:
        open_classifier(Settings("", "auto", -1, -2, 1.5, nowhere, 0.0), print)
    said = str(caught.value)
    assert "6 problems" in said
    for words in ("bundle is empty", "threads is -1", "top_k is -2", "threshold is 1.5", "names.txt", "period is 0.0"):
        assert words in said
    with pytest.raises(SettingsError, match="threshold is nan"):
        open_classifier(Settings("bundle", threshold=float("nan")), print)


def test_a_missing_bundle_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        open_classifier(Settings(str(tmp_path / "nowhere")), print)


def test_health_tells_that_a_signature_was_asked_for(summing: Callable[..., Any]) -> None:
    engine, runner = summing()
    one = Bench(engine, runner, Settings("bundle", trusted_keys="a.pub"))
    try:
        assert one.classifier.health().values["signature"] == "by a trusted key"
    finally:
        one.classifier.close()


@pytest.mark.parametrize(("told", "keys"), [("", None), ("a.pub", ["a.pub"]), ("a.pub:b.pub", ["a.pub", "b.pub"])])
def test_who_has_to_have_signed_the_bundle_is_asked(
    monkeypatch: pytest.MonkeyPatch, told: str, keys: Optional[List[str]]
) -> None:
    asked: List[Any] = []

    def load(bundle: str, trusted_keys: Any, **options: Any) -> None:
        asked.append(trusted_keys)
        raise SignatureError("nobody")

    monkeypatch.setattr("edgeres.load", load)
    with pytest.raises(SignatureError):
        open_classifier(Settings("bundle", trusted_keys=told), print)
    assert asked == [keys]
