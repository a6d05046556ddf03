"""The demo model, fetched and converted once."""

from pathlib import Path

import pytest

from flexpipe_serve.model.demo import ensure_demo


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the demo model."""
    return ensure_demo(progress=False)
