#!/usr/bin/env python3
"""Run a bundle without edgeres, by onnxruntime, NumPy and Pillow alone: plain_onnxruntime.py BUNDLE LABELLED

LABELLED is a folder with a subfolder of images for each class.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
from PIL import Image


def prepared(path, wanted):
    """Return an image as the network takes it, float32 (3, h, w): resized, cropped in the centre, normalized."""
    image = Image.open(path).convert("RGB")
    height, width = wanted["size"]
    scale = wanted["resize"] / min(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    if wanted["color"] == "bgr":
        pixels = pixels[..., ::-1]
    return ((pixels - np.float32(wanted["mean"])) / np.float32(wanted["std"])).transpose(2, 0, 1)


bundle, labelled = map(Path, sys.argv[1:])
wanted = json.loads((bundle / "manifest.json").read_bytes())["preprocessing"]
assert wanted["fit"] == "crop", "this example knows no letterbox"
session = onnxruntime.InferenceSession(bundle / "model.int8-cpu.onnx", providers=["CPUExecutionProvider"])
classes = sorted(path for path in labelled.iterdir() if path.is_dir())
right = total = 0
for label, folder in enumerate(classes):
    batch = np.stack([prepared(path, wanted) for path in sorted(folder.iterdir())])
    (logits,) = session.run(["logits"], {"input": batch})
    right += int(np.sum(logits.argmax(axis=1) == label))
    total += len(batch)
print(f"{right} of {total} images are right")
