"""The examples with a real bundle: labels on the terminal, from folders, arrays and a camera, and the ROS core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ros_double
import scipy.special

import edgeres
from edgeres.recipe import dossier
from edgeres.samples import open_samples
from edgeres_ros.core import OK, Answer, Settings, SettingsError, open_classifier

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = dossier() / "digits/validation"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# A camera whose every frame is one of frames.npy, over and over where `endless` is there; it has to be let go.
CAMERA = """
import os
import numpy as np
frames = np.load("frames.npy")[..., ::-1]
class VideoCapture:
    def __init__(self, index):
        self.index, self.taken = index, 0
    def isOpened(self):
        return self.index == 0
    def read(self):
        if self.taken == len(frames) and not os.path.exists("endless"):
            return False, None
        self.taken += 1
        return True, frames[(self.taken - 1) % len(frames)]
    def release(self):
        open("released", "w").close()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, built as quickly as can be."""
    out = tmp_path_factory.mktemp("robot") / "digits-int8"
    edgeres.build(out=out, recovery="none", calibration_count=32)
    return out


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Forty digits, four of each, uint8 (40, 32, 32, 3)."""
    samples = open_samples(DIGITS, count=40)
    return np.stack([samples.frame(number) for number in range(len(samples))])


def one_by_one(bundle: Path, frames: np.ndarray) -> np.ndarray:
    """Return the probabilities of frames that the engine meets alone; in a batch last digits may differ."""
    with edgeres.load(bundle) as engine:
        logits = np.concatenate([engine(frame[np.newaxis]) for frame in frames])
    probabilities: np.ndarray = scipy.special.softmax(logits.astype(np.float64), 1)
    return probabilities


def start(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "examples/classify.py"), *map(str, arguments)]
    path = os.pathsep.join([str(cwd), str(REPOSITORY)])
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def classify(cwd: Path, *arguments: object, code: int = 0) -> tuple[list[str], str]:
    """Run the example and return its lines and what it said beside them."""
    with start(cwd, *arguments) as process:
        out, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return out.splitlines(), said


def test_a_folder_is_answered_in_its_order(bundle: Path, tmp_path: Path) -> None:
    samples = open_samples(DIGITS / "3")
    lines, said = classify(tmp_path, bundle, DIGITS / "3")
    assert [line.split(":")[0] for line in lines] == list(samples.names)
    wanted = 100 * one_by_one(bundle, np.stack([samples.frame(number) for number in range(len(samples))]))
    for line, row in zip(lines, wanted, strict=True):
        assert f": {row.argmax()} {row.max():.1f} % (" in line
        assert line.endswith(" ms)")
    assert sum(": 3 " in line for line in lines) > 0.9 * len(lines)  # they are threes
    assert f"{len(samples)} frames, latency p50" in said


def test_an_array_is_answered_with_names(bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", frames)
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    lines, _ = classify(tmp_path, bundle, "frames.npy", "--labels", "names.txt", "--top", 2)
    order = np.argsort(-one_by_one(bundle, frames), axis=1)[:, :2]
    for line, (first, second) in zip(lines, order, strict=True):
        label, runner_up = line.split(": ")[1].split(", ")
        assert label.startswith(f"{NAMES[first]} ")
        assert runner_up.startswith(f"{NAMES[second]} ")


def test_a_camera_is_read_all_the_time_and_let_go(bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text(CAMERA)
    np.save(tmp_path / "frames.npy", frames)
    lines, _ = classify(tmp_path, bundle, 0)
    wanted = one_by_one(bundle, frames).argmax(1)
    numbers = [int(line.split(":")[0].split()[1]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 39, "the newest frame is answered, whatever was left out"
    assert [int(line.split(": ")[1].split()[0]) for line in lines] == [wanted[number] for number in numbers]
    assert (tmp_path / "released").exists()


def test_ctrl_c_ends_a_camera(bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text(CAMERA)
    (tmp_path / "endless").touch()
    np.save(tmp_path / "frames.npy", frames)
    with start(tmp_path, bundle, 0) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("frame ")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "latency p50" in said
    assert (tmp_path / "released").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "7"], "nowhere"),
        (["BUNDLE", "nowhere.npy"], "nowhere.npy"),
        (["BUNDLE", "1"], "camera 1 cannot be opened"),
        (["BUNDLE", str(DIGITS / "3"), "--labels", "few.txt"], "few.txt has 2 lines for 10 classes"),
        (["BUNDLE", str(DIGITS / "3"), "--labels", "none.txt"], "none.txt"),
        (["BUNDLE", str(DIGITS / "3"), "--labels", "latin.txt"], "latin.txt is not text in UTF-8"),
        (["BUNDLE", str(DIGITS / "3"), "--backend", "tensorrt"], "edgeres compile"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(
    bundle: Path, frames: np.ndarray, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "cv2.py").write_text(CAMERA)
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1") * 10)
    np.save(tmp_path / "frames.npy", frames)
    lines, said = classify(tmp_path, *(bundle if one == "BUNDLE" else one for one in arguments), code=1)
    assert lines == []
    assert said.startswith("error: ")
    assert words in said


def test_names_give_no_orders_to_the_terminal(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source = next((DIGITS / "3").iterdir())
    (tmp_path / f"images/a\x1b]0;owned\x07\nb{source.suffix}").write_bytes(source.read_bytes())
    (tmp_path / "names.txt").write_text("\n".join(f"\x1b[31m{number}" for number in range(10)))
    lines, _ = classify(tmp_path, bundle, "images", "--labels", "names.txt")
    assert len(lines) == 1
    assert lines[0].startswith("a\\x1b]0;owned\\x07\\nb")
    assert ": \\x1b[31m3 " in lines[0]
    _, said = classify(tmp_path, bundle, "no\x1b[31m.npy", code=1)
    assert "\x1b" not in said


def test_a_camera_without_opencv_is_a_sentence(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('no such package')\n")
    assert "pip install opencv-python" in classify(tmp_path, bundle, 0, code=1)[1]


def message(frame: np.ndarray, header: object) -> SimpleNamespace:
    """Return a frame as a camera of ROS sends it, blue first and in rows of a multiple of 64 bytes."""
    height, width, _ = frame.shape
    rows = np.zeros((height, -(-3 * width // 64) * 64), np.uint8)
    rows[:, : 3 * width] = frame[..., ::-1].reshape(height, -1)
    return SimpleNamespace(
        header=header,
        height=height,
        width=width,
        encoding="bgr8",
        is_bigendian=0,
        step=rows.shape[1],
        data=rows.tobytes(),
    )


def test_the_ros_core_answers_a_recorded_folder(bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    answers: list[Answer] = []
    classifier = open_classifier(Settings(str(bundle), labels=str(tmp_path / "names.txt"), top_k=0), answers.append)
    for number, frame in enumerate(frames):
        classifier.offer(message(frame, number))
        ros_double.wait_until(lambda wanted=number: len(answers) > wanted)  # type: ignore[misc]
    wanted = one_by_one(bundle, frames)
    assert [answer.header for answer in answers] == list(range(40))
    for answer, row in zip(answers, wanted, strict=True):
        np.testing.assert_allclose([dict(answer.classes)[name] for name in NAMES], row, rtol=1e-9, atol=1e-12)
    for number, frame in enumerate(frames):  # and as fast as they can be sent
        classifier.offer(message(frame, 100 + number))
    ros_double.wait_until(lambda: answers[-1].header == 139)
    classifier.close()
    health = classifier.health()
    assert health.level == OK
    assert int(health.values["answered"]) + int(health.values["dropped"]) == 80
    assert health.values["target"] == "cpu"
    assert health.values["verdict"] in ("pass", "inconclusive")


def test_labels_of_another_network_are_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(SettingsError, match=r"names\.txt names 2 classes, and the bundle knows 10"):
        open_classifier(Settings(str(bundle), labels=str(tmp_path / "names.txt")), print)
