"""What every test shares: the real data beside the checkout, and how Hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

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
