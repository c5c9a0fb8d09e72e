"""The rungs in their order, on whole graphs: what is written is legal, and stays near the float net."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeres.artifacts import Preprocessing
from edgeres.quantize import lint
from edgeres.quantize.recover import Recovery, recovered_content


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
@pytest.mark.parametrize("form", ["symmetric", "shifted"])
def test_exact_pixels(
    name: str,
    form: str,
    net: Callable[[str], Any],
    shifted: Callable[[str], Any],
    exact: Callable[[onnx.ModelProto, np.ndarray], np.ndarray],
    tmp_path: Path,
) -> None:
    """Also in front of a pool, which passes on what the layer before it has in its bias, and no map."""
    found = (shifted if form == "shifted" else net)(name)
    path = tmp_path / "model.fp32.onnx"
    onnx.save(found.fp32, path)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32)).astype(np.float32)
    preprocessing = Preprocessing((32, 32), 32, mean=(0.5, 0.4, 0.6), std=(0.3, 0.25, 0.3))
    spread = [np.array(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.mean, preprocessing.std)]
    x = (pixels / np.float32(255) - spread[0]) / spread[1]
    content, layers, _ = recovered_content(
        path, found.exported.modules, [], found.ranges, Recovery({}, preprocessing, [x])
    )
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []
    assert sum(layer.precision == "int8" for layer in layers) >= len(found.placement.weights)
    wanted, got = exact(found.fp32, x), exact(model, x)
    assert 10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()) > 25
