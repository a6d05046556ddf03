"""What ``flexpipe serve`` is told: by a file, on the command line, or by neither."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from tiny_models import make_checkpoint

from flexpipe_serve import launch
from flexpipe_serve.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.serve")


def read(*args: str) -> ServeDeploySchema:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return launch._read_config(parser.parse_args(args))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    app = {
        "name": "chat",
        "import_path": "flexpipe_serve.deployments.app:build",
        "args": {"model": {"source": "demo", "name": "mine"}, "device": "cpu"},
        "deployments": [
            {"name": "Router", "user_config": {"layout": {"boundaries": [7]}, "limits": {"max_waiting": 3}}}
        ],
    }
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({"applications": [app], "http_options": {"port": 8123}}))
    return path


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read("--model", "some/model", "--stages", "3")
    (app,) = config.applications
    assert app.args == {"model": {"source": "some/model"}}
    assert [(d.name, d.user_config) for d in app.deployments] == [("Router", {"layout": {"stages": 3}})]
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    assert read().applications[0].args == {}, "nothing of the last call stays"
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        read("missing.yaml")


def test_a_deployment_may_have_no_user_config(file: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=2)
    content = yaml.safe_load(file.read_text())
    del content["applications"][0]["deployments"][0]["user_config"]
    file.write_text(yaml.safe_dump(content))
    assert launch._prepare(read(str(file), "--model", str(tmp_path / "model"))) == "model"


def test_the_usual_file_is_read_where_it_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.rename(file.with_name("serve_config.yaml"))
    monkeypatch.chdir(file.parent)
    assert read().applications[0].name == "chat"


def test_the_command_line_counts_more_than_the_file(file: Path) -> None:
    (app,) = read(str(file), "--model", "other", "--stages", "4").applications
    assert app.args == {"model": {"source": "other"}, "device": "cpu"}, "the name was another model's"
    assert app.deployments[0].user_config == {"layout": {"stages": 4}, "limits": {"max_waiting": 3}}
    (app,) = read(str(file)).applications
    assert app.args["model"] == {"source": "demo", "name": "mine"}


def test_two_applications_are_not_changed_at_once(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    content["applications"].append({**content["applications"][0], "name": "other", "route_prefix": "/other"})
    file.write_text(yaml.safe_dump(content))
    assert len(read(str(file)).applications) == 2
    with pytest.raises(ConfigError, match="of one application"):
        read(str(file), "--stages", "4")
