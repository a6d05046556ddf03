"""The application over the fake engine."""

from collections.abc import AsyncIterator

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
