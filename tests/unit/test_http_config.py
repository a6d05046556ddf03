"""``/flexpipe/config``, over HTTP, from Python and on the command line; Serve's part is a fake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import yaml
from fake_engine import FakeEngine
from http_client import client_of, error_of, json_of
from http_server import serve
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.cli import main
from flexpipe_serve.config import PlannerConfig, UserConfig, merge, parse
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.errors import ConfigError, InvalidRequestError
from flexpipe_serve.handle import connect


class FakeConfig:
    """A LiveConfig whose changes are in force at once."""

    def __init__(self, user_config: Mapping[str, Any]) -> None:
        self.user_config = dict(user_config)

    @property
    def in_force(self) -> UserConfig:
        return parse(UserConfig, self.user_config)

    async def change(self, changes: Mapping[str, Any]) -> UserConfig:
        merged = merge(self.user_config, changes)
        parse(UserConfig, merged)
        self.user_config = merged
        return self.in_force


@pytest.fixture
def config() -> FakeConfig:
    return FakeConfig({"layout": {"stages": 2}, "planner": {"mode": "off", "margin": 0.2}})


@pytest.fixture
def http(config: FakeConfig) -> httpx.AsyncClient:
    return client_of(FakeEngine(), config=config)


@pytest.fixture
def url(config: FakeConfig) -> Iterator[str]:
    with serve(create_app(FakeEngine, config=config)) as url:
        yield url


async def test_all_that_is_in_force_is_shown(http: httpx.AsyncClient, config: FakeConfig) -> None:
    shown = json_of(await http.get("/flexpipe/config"))
    assert parse(UserConfig, shown) == config.in_force
    assert shown["limits"]["max_waiting"] == UserConfig().limits.max_waiting


async def test_some_keys_change_and_the_others_stay(http: httpx.AsyncClient, config: FakeConfig) -> None:
    shown = json_of(await http.patch("/flexpipe/config", json={"planner": {"mode": "on"}, "pipelines": 2}))
    assert (shown["planner"]["mode"], shown["planner"]["margin"], shown["pipelines"]) == ("on", 0.2, 2)
    assert config.user_config["layout"] == {"stages": 2}


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (b'{"planner": {"mood": "on"}}', "invalid_config", "did you mean 'mode'"),
        (b'{"planner": {"margin": -1}}', "invalid_config", "planner.margin"),
        (b"[]", "invalid_json", "object"),
        (b"{", "invalid_json", "JSON"),
        (b"[" * 100_000, "invalid_json", "JSON"),
    ],
)
async def test_a_wrong_change_changes_nothing(
    http: httpx.AsyncClient, config: FakeConfig, body: bytes, code: str, named: str
) -> None:
    before = config.in_force
    error = error_of(await http.patch("/flexpipe/config", content=body), 400)
    assert error["code"] == code
    assert named in error["message"]
    assert config.in_force == before


async def test_a_server_without_one_says_so() -> None:
    error = error_of(await client_of(FakeEngine()).get("/flexpipe/config"), 404)
    assert error["code"] == "no_config"


def test_from_python(url: str) -> None:
    with connect(url) as handle:
        changed = handle.configure(planner={"mode": "observe"}, warm_stages=1)
        assert (changed.planner.mode, changed.warm_stages) == ("observe", 1)
        assert handle.config() == changed
        with pytest.raises(InvalidRequestError, match="did you mean 'planner'"):
            handle.configure(planer={})


def test_on_the_command_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--url", url, "planner.mode=on", "layout.boundaries=[10,20]", "limits.max_body=1MiB"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["planner"]["mode"], shown["layout"]["boundaries"]) == ("on", [10, 20])
    assert shown["limits"]["max_body"] == 1 << 20
    assert main(["config", "--url", url]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == shown
    assert main(["config", "--url", url, "planner=null", "planner.mode=on"]) == 1
    assert "is given a value itself" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["config", "--url", url, "planner.mode"])


_SECTIONS = st.dictionaries(
    st.sampled_from(["planner", "limits", "layout", "pipelines"]),
    st.integers() | st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3),
)


@given(former=_SECTIONS, changes=_SECTIONS)
def test_a_merge_has_what_was_given_and_keeps_the_rest(former: dict[str, Any], changes: dict[str, Any]) -> None:
    merged = merge(former, changes)
    assert merge(merged, changes) == merged
    assert merge(former, {}) == former
    assert merged.keys() == former.keys() | changes.keys()
    for key, value in changes.items():
        if key == "layout" or not isinstance(value, dict) or not isinstance(former.get(key), dict):
            assert merged[key] == value
        else:
            assert merged[key] == {**former[key], **value}
    assert merge(former, dict.fromkeys(former)) == {}


@pytest.mark.parametrize(("word", "mode"), [(True, "on"), (False, "off"), ("observe", "observe")])
def test_a_mode_that_yaml_takes_for_a_boolean(word: object, mode: str) -> None:
    assert PlannerConfig.model_validate({"mode": word}).mode == mode
    with pytest.raises(ConfigError, match=r"planner\.mode"):
        parse(UserConfig, {"planner": {"mode": 1}})
