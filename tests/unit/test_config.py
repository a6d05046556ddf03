"""The configuration: the shipped one is valid, wrong ones are refused with the remedy."""

from pathlib import Path

import pytest
import yaml

from flexpipe_serve.config import ServeArgs, UserConfig, parse
from flexpipe_serve.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_shipped_configuration_is_valid():
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (app,) = config["applications"]
    args = parse(ServeArgs, app["args"])
    user = parse(UserConfig, app["deployments"][0]["user_config"])
    assert args.model.source == "demo"
    assert args.memory_budget == 4 << 30
    assert user.layout.stages == 2
    assert (user.refactor.max_bytes_per_s, user.warm_stages) == (40_000_000, 0)


def test_defaults_are_complete():
    assert parse(ServeArgs, None) == ServeArgs()
    assert parse(UserConfig, {}).limits.max_waiting == 256


@pytest.mark.parametrize(
    ("budget", "parsed"),
    [
        (None, None),
        ("4GiB", 4 << 30),
        (1000, 1000),
        ({"stage-0": "1GiB", "stage-1": "600MB"}, {"stage-0": 1 << 30, "stage-1": 600_000_000}),
    ],
)
def test_a_budget_for_all_domains_or_for_each(budget, parsed):
    args = parse(ServeArgs, {"memory_budget": budget, "kv": {"domain": "stage"}})
    assert (args.memory_budget, args.kv.domain) == (parsed, "stage")


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (ServeArgs, {"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        (ServeArgs, {"model": {"scource": "demo"}}, "model: unknown key 'scource'; did you mean 'source'"),
        (ServeArgs, {"zzz": 1}, "known keys: model, device"),
        (ServeArgs, {"memory_budget": "a lot"}, "configuration: memory_budget: could not parse"),
        (ServeArgs, {"memory_budget": 0}, "configuration: memory_budget: .* greater than 0"),
        (ServeArgs, {"memory_budget": ["1GiB"]}, "configuration: memory_budget: could not parse"),
        (ServeArgs, {"memory_budget": {}}, "configuration: memory_budget: .* at least 1 item"),
        (ServeArgs, {"memory_budget": {"stage-0": "x"}}, "configuration: memory_budget.stage-0: could not parse"),
        (ServeArgs, {"kv": {"domain": "rack"}}, "kv.domain: Input should be 'node' or 'stage'"),
        (ServeArgs, {"kv": {"block_size": 0}}, "kv.block_size"),
        (UserConfig, {"layout": {"stages": 2, "boundaries": [3]}}, "either 'stages' or 'boundaries'"),
        (UserConfig, {"layout": {}}, "either 'stages' or 'boundaries'"),
        (UserConfig, {"limits": {"max_wating": 3}}, "did you mean 'max_waiting'"),
        (UserConfig, {"refactor": {"max_bytes_per_s": 0}}, "refactor.max_bytes_per_s"),
        (UserConfig, {"warm_stages": -1}, "warm_stages"),
    ],
)
def test_what_is_wrong_is_named(kind, data, message):
    with pytest.raises(ConfigError, match=message):
        parse(kind, data)


def test_every_field_is_described():
    pending = [ServeArgs, UserConfig]
    for model in pending:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                pending.append(field.annotation)
    assert len(pending) > 5
