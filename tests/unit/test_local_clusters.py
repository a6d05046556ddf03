"""Scripts find the clusters that ``flexpipe serve`` runs."""

import os
import tempfile

import pytest

from flexpipe_serve import transport
from flexpipe_serve.errors import ConfigError, EngineUnavailableError
from flexpipe_serve.local_clusters import FOLDER_PREFIX, note_address, running_addresses


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")


@pytest.fixture
def joined(monkeypatch):
    """Addresses that Ray was told to join, and how to authenticate there."""
    import ray

    seen = []
    monkeypatch.setattr(ray, "init", lambda address, **_: seen.append((address, os.environ["RAY_AUTH_MODE"])))
    return seen


def start_cluster(address):
    note_address(tempfile.mkdtemp(prefix=FOLDER_PREFIX), address)


def test_running_ones(tmp_path):
    assert running_addresses() == []
    start_cluster("10.0.0.1:2")
    start_cluster("10.0.0.1:1")
    assert running_addresses() == ["10.0.0.1:1", "10.0.0.1:2"]


def test_one_that_ended_without_cleaning_up(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # above what Linux gives out
    start_cluster("10.0.0.1:1")
    assert running_addresses() == []


def test_a_folder_of_somebody_elses(monkeypatch):
    start_cluster("10.0.0.1:1")
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert running_addresses() == []


def test_the_only_one_is_joined_as_it_wants(joined):
    start_cluster("10.0.0.1:1")
    transport._join_cluster(None)
    transport._join_cluster("10.0.0.2:2")
    assert joined[0] == ("10.0.0.1:1", "disabled")


def test_another_cluster_keeps_its_authentication(joined):
    start_cluster("10.0.0.1:1")
    transport._join_cluster("10.0.0.2:2")
    assert joined == [("10.0.0.2:2", "token")]


def test_several_must_be_told_apart(joined):
    start_cluster("10.0.0.1:1")
    start_cluster("10.0.0.1:2")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:1, 10\.0\.0\.1:2"):
        transport._join_cluster(None)
    transport._join_cluster("10.0.0.1:2")
    assert joined == [("10.0.0.1:2", "disabled")]


def test_none(monkeypatch):
    import ray

    def init(address, **_):
        assert address == "auto"
        raise ConnectionError("Could not find any.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(EngineUnavailableError, match="no Ray cluster to connect to: Could not find any"):
        transport._join_cluster(None)
