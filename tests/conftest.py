"""What every test shares: the real data beside the checkout, made-up photographs, and how Hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from hypothesis import settings

# pytest-xdist tells its workers how wide the terminal is; what a test prints is as wide as a log.
os.environ.pop("COLUMNS", None)

REPOSITORY = Path(__file__).resolve().parent.parent

# A test's time depends on who else uses the machine, so there is no deadline; in CI a failure must repeat.
settings.register_profile("default", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data: ``$EDGERES_SHARED/data``, or ``../shared/data`` beside the checkout."""
    shared = os.environ.get("EDGERES_SHARED")
    data = (Path(shared) if shared else REPOSITORY.parent / "shared") / "data"
    if not data.is_dir():
        pytest.skip(f"the real data is not at {data}; name the folder that holds it: EDGERES_SHARED=FOLDER")
    return data


Pictures = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """Return ``pictures(count, seed, side)``: made-up photographs, uint8 (count, side, side, 3).

    Noise whose amplitude falls with its frequency, as in photographs (Field 1987), mostly grey, rather red than blue,
    and of varied exposure and contrast.
    """

    def make(count: int, seed: int = 0, side: int = 32) -> np.ndarray:
        random = np.random.default_rng(seed)
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
        frequency[0, 0] = np.inf

        def fields(number: int) -> np.ndarray:
            white = np.fft.fft2(random.standard_normal((number, side, side)))
            field: np.ndarray = np.fft.ifft2(white / frequency).real
            return field / field.std((1, 2), keepdims=True)

        luma = fields(count)[..., None]
        chroma = fields(3 * count).reshape(count, 3, side, side).transpose(0, 2, 3, 1)
        contrast = random.uniform(0.12, 0.25, (count, 1, 1, 1))
        brightness = random.normal(0.45, 0.08, (count, 1, 1, 1))
        warmth = random.normal(0.04, 0.04, (count, 1, 1, 1)) * np.array([1.0, 0.0, -1.0])
        mixed = brightness + warmth + contrast * luma + 0.04 * chroma
        return np.clip(np.rint(255 * mixed), 0, 255).astype(np.uint8)

    return make
