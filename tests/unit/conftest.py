"""The application over the fake engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from http_client import client_of


@pytest.fixture
def engine() -> FakeEngine:
    """Replies at once."""
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to an application over ``engine``."""
    async with client_of(engine) as client:
        yield client


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose LM head is its embedding."""
    from tiny_models import make_checkpoint  # only now: transformers takes its time to import

    folder = tmp_path_factory.mktemp("tied-model")
    make_checkpoint(folder, "llama-tied")
    return folder
