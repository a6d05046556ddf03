"""The fuzzer of ``http_fuzz.py`` and schemathesis against the application over the fake engine."""

import collections

import pytest
import schemathesis
from fake_engine import FakeEngine
from http_fuzz import fuzz
from http_server import serve
from hypothesis import HealthCheck, given, settings

from flexpipe_serve.deployments.api import create_app


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def base_url(engine):
    with serve(create_app(lambda: engine)) as url:
        yield url


def test_never_a_5xx_and_never_a_lost_neighbour(engine, base_url):
    report = fuzz(base_url, max_examples=200)
    # It was no idle run: both kinds of answers came, and neighbours ran all the time.
    assert report.statuses[200] >= 20
    assert report.statuses[400] >= 20
    assert report.num_neighbours >= 5
    # Every request that was begun was finished or aborted, once.
    ends = collections.Counter(engine.finished + engine.aborted)
    assert ends == collections.Counter(engine.started)


def test_the_fuzzer_can_fail():
    engine = FakeEngine(crash_after=2)
    with serve(create_app(lambda: engine)) as url, pytest.raises((AssertionError, ExceptionGroup)):
        fuzz(url, max_examples=50)


def test_the_published_schema_is_true(base_url):
    """schemathesis: what the schema allows and forbids, with checks of statuses and bodies against it."""
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    num_cases = 0
    for operation in schema.get_all_operations():
        operation = operation.ok()
        modes = schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                nonlocal num_cases
                num_cases += 1
                case.call_and_validate(
                    checks=[
                        schemathesis.checks.not_a_server_error,
                        schemathesis.checks.status_code_conformance,
                        schemathesis.checks.content_type_conformance,
                        schemathesis.checks.response_schema_conformance,
                    ]
                )

            check()
    assert num_cases > 200
