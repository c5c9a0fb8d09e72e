#!/usr/bin/env python3
"""Show what a bundle sees: a camera, a folder of images, or an array of frames, as labels with their latency.

    python examples/classify.py BUNDLE 0                       # camera 0 (pip install opencv-python)
    python examples/classify.py BUNDLE images/ --labels names.txt
    python examples/classify.py BUNDLE frames.npy              # uint8 (N, H, W, 3), RGB

A camera is read all the time, and what is outdated by a newer frame is left out; of files every frame is answered. The
latency is from a frame's arrival to its answer, waiting included. Ctrl-C ends a camera.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Iterator, List, Tuple

import numpy as np

import edgeres
from edgeres.samples import open_samples

Item = Tuple[np.ndarray, Tuple[str, float]]  # a frame, and beside it its name and when it came


def camera(index: int) -> Iterator[Item]:
    """Yield a camera's frames, uint8 (H, W, 3), RGB, until it ends."""
    try:
        import cv2
    except ImportError:
        raise edgeres.EdgeresError("a camera is read by OpenCV. Install it: pip install opencv-python") from None
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        raise edgeres.EdgeresError(f"camera {index} cannot be opened: is it plugged in, and not in use?")
    try:
        number = 0
        while True:
            good, image = capture.read()
            if not good:
                return
            yield np.ascontiguousarray(image[..., ::-1]), (f"frame {number}", time.perf_counter())  # OpenCV's are BGR
            number += 1
    finally:
        capture.release()


def files(source: str) -> Iterator[Item]:
    """Yield the frames of a folder of images, a list file or an array, in order."""
    samples = open_samples(source)
    for number, name in enumerate(samples.names):
        yield samples.frame(number), (name, time.perf_counter())


def best(logits: np.ndarray, labels: List[str], count: int) -> str:
    """Return the most probable classes in words: ``seven 98.1 %, one 1.2 %``."""
    powers = np.exp(logits - logits.max())
    probabilities = 100 * powers / powers.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return ", ".join(f"{labels[i] if labels else i} {probabilities[i]:.1f} %" for i in order)


def read_labels(path: str) -> List[str]:
    """Return the lines of a text file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise edgeres.EdgeresError(f"{path} is not text in UTF-8. Save it so, one class per line") from None


def shown(text: str) -> str:
    """Return a name in one line; a terminal obeys what a file's name may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def run(arguments: argparse.Namespace) -> None:
    labels = read_labels(arguments.labels) if arguments.labels else []
    live = arguments.source.isdecimal()
    source = camera(int(arguments.source)) if live else files(arguments.source)
    latencies = []
    with edgeres.load(arguments.bundle, backend=arguments.backend, trusted_keys=arguments.key) as engine:
        engine.warmup()
        try:
            for logits, (name, came) in engine.stream(source, depth=1 if live else 2, drop=live):
                if labels and len(labels) != len(logits):
                    raise edgeres.EdgeresError(f"{arguments.labels} has {len(labels)} lines for {len(logits)} classes")
                latencies.append(1000 * (time.perf_counter() - came))
                said = best(logits, labels, arguments.top)
                print(shown(f"{name}: {said} ({latencies[-1]:.1f} ms)"), flush=True)
        except KeyboardInterrupt:
            pass
    if latencies:
        p50, p99 = np.percentile(latencies, (50, 99))
        print(f"{len(latencies)} frames, latency p50 {p50:.1f} ms, p99 {p99:.1f} ms", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the folder that `edgeres build` made")
    parser.add_argument("source", help="a camera's index, a folder of images, a list file, .npy or .npz")
    parser.add_argument("--labels", help="a text file, the name of one class per line (default: numbers)")
    parser.add_argument("--backend", default="auto", help="an engine of the bundle (default: its first)")
    parser.add_argument("--key", action="append", help="a public key that has to have signed the bundle; repeatable")
    parser.add_argument("--top", type=int, default=1, help="how many classes are shown (1)")
    try:
        run(parser.parse_args())
    except (edgeres.EdgeresError, OSError) as problem:
        print("\n".join(map(shown, f"error: {problem}".split("\n"))), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
