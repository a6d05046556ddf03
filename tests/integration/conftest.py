"""The demo model, fetched and converted once; and one ``flexpipe serve`` for all tests that need a cluster."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from served import Served
from tiny_models import make_checkpoint

from flexpipe_serve.model.demo import ensure_demo
from flexpipe_serve.pipeline import background


@pytest.fixture(scope="module", autouse=True)
def _no_rests() -> Iterator[None]:
    """Refactorings of engines in this process load and copy as fast as they can: other tests keep the machine busy, and
    beside a busy machine's own work they would rest most of the time, which is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "_SHARE", 1.0)
        patch.setattr(background, "_PATIENCE_S", 0.02)
        yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the demo model."""
    return ensure_demo(progress=False)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A random model with the demo's vocabulary and tokenizer: all of the text path, hardly any arithmetic."""
    return _make_small(tmp_path_factory.mktemp("small"), demo_model, num_layers=4)


@pytest.fixture(scope="session")
def longer_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """The small model with eight layers."""
    return _make_small(tmp_path_factory.mktemp("longer"), demo_model, num_layers=8)


def _make_small(folder: Path, demo_model: Path, *, num_layers: int) -> Path:
    make_checkpoint(folder, "llama", num_hidden_layers=num_layers, vocab_size=49152, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A random model of six layers and 131 tokens, whose steps take about a millisecond."""
    folder = tmp_path_factory.mktemp("six-layers")
    make_checkpoint(folder, "llama", num_hidden_layers=6, max_position_embeddings=1024)
    # Any tokenizer does: its ids beyond the tiny vocabulary are never sampled.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def other_ray() -> Iterator[Any]:
    """Another Ray on the machine, older than ours: that of this process."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def _launches(small_model: Path, tmp_path_factory: pytest.TempPathFactory, other_ray: Any) -> Iterator[list[Served]]:
    launches: list[Served] = []
    yield launches
    for served in launches:
        served.kill()


@pytest.fixture(scope="session")
def serve_config(small_model: Path) -> dict[str, Any]:
    """The small model through two stages."""
    return {
        "proxy_location": "HeadOnly",
        "applications": [
            {
                "name": "flexpipe",
                "route_prefix": "/",
                "import_path": "flexpipe_serve.deployments.app:build",
                "args": {
                    "model": {"source": str(small_model), "name": "small"},
                    "device": "cpu",
                    "memory_budget": "4GiB",
                    "kv": {"max_tokens": 8192},
                },
                "deployments": [{"name": "Router", "user_config": {"layout": {"stages": 2}}}],
            }
        ],
    }


@pytest.fixture
def any_served(
    _launches: list[Served], serve_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """A running ``flexpipe serve``: the one of the test before, with the configuration it left, if it still runs."""
    if not _launches or _launches[-1].process.poll() is not None:
        _launches.append(Served(copy.deepcopy(serve_config), folder=tmp_path_factory.mktemp("serve")))
    return _launches[-1]


@pytest.fixture
def served(any_served: Served, serve_config: dict[str, Any]) -> Served:
    """A running ``flexpipe serve`` with ``serve_config``."""
    any_served.reset(serve_config)
    return any_served
