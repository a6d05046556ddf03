"""A Ray cluster of our own for one command: free ports, a folder of its own, nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator

import psutil

from flexpipe_serve.kv.domain import sweep_stale
from flexpipe_serve.local_clusters import FOLDER_PREFIX, note_address

_FAST_PROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # the line before would keep errors back until 1,000 have come
    # Else a replica that stops waits 30 s for proxies on other machines to notice; there are none.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
_QUIET = {
    "RAY_AUTH_MODE": "disabled",  # a private cluster whose dashboard listens on the loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_PROXY_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
_PORT_RANGE = range(20000, 30000)
"""Neither the kernel nor Ray hands these out by itself, so a port that is free now still is when the proxy binds it."""
_PROXY_FILES = {
    # A socket's path may have 97 characters, and Ray puts 57 of its own before the name.
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "a",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "m",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}
_EXIT_S = 3.0
_POLL_S = 0.05
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def cluster_folder() -> Iterator[str]:
    """A folder for the cluster's files, and the environment that Ray and Serve read when they are imported.

    Not Ray's default folder: another Ray on this machine would no more be found by the links in it, and the
    proxy's control socket would be open to every user.
    """
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
    try:
        ours = _FAST_PROXY | _QUIET
        ours |= {name: str(port) for name, port in zip(_PROXY_PORTS, _free_ports(len(_PROXY_PORTS)), strict=True)}
        ours |= {name: os.path.join(folder, file) for name, file in _PROXY_FILES.items()}
        for name, value in ours.items():
            os.environ.setdefault(name, value)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_cluster(folder: str) -> Iterator[str]:
    """Ray on this machine; gone afterwards, with Serve and its applications. Gives the dashboard's URL."""
    import ray
    from ray import serve  # noqa: F401 - configures its logger

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        note_address(folder, context.address_info["gcs_address"])
        _interrupt_on_signals()  # again: Ray took the signals for itself
        yield f"http://{context.dashboard_url}"
    finally:
        with _no_interrupts():
            # Listed while their parents live. Nothing is asked of the cluster: parts of it may be dead already.
            processes = psutil.Process().children(recursive=True)
            ray.shutdown()
            _end(processes)
            sweep_stale()


def _end(processes: list[psutil.Process]) -> None:
    """Wait a moment for processes to end, then kill those that have not."""
    deadline = time.monotonic() + _EXIT_S
    while (alive := [p for p in processes if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        # Orphans are reaped by whatever is process 1, which may take its time.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The signals that end a program raise KeyboardInterrupt meanwhile."""
    former = [(number, signal.getsignal(number)) for number in _INTERRUPTS]
    _interrupt_on_signals()
    try:
        yield
    finally:
        for number, handler in former:
            signal.signal(number, handler)


def _interrupt_on_signals() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in _INTERRUPTS:
        signal.signal(number, interrupt)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    former = [(number, signal.signal(number, signal.SIG_IGN)) for number in _INTERRUPTS]
    try:
        yield
    finally:
        for number, handler in former:
            signal.signal(number, handler)


def _free_ports(num_ports: int) -> list[int]:
    """Different ports that nobody listens on."""
    ports: list[int] = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        if len(ports) == num_ports:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
    return ports
