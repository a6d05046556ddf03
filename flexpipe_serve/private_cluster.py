"""A Ray cluster of our own for one command: free ports and a folder of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket

from flexpipe_serve.local_clusters import note_address

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


def prepare_environment(folder: str) -> None:
    """Set what Ray and Serve read when they are imported.

    Not Ray's default folder: another Ray on this machine would no more be found by the links in it, and the
    proxy's control socket would be open to every user.

    Args:
        folder: for the cluster's files.
    """
    ours = _FAST_PROXY | _QUIET
    ours |= {name: str(port) for name, port in zip(_PROXY_PORTS, _free_ports(len(_PROXY_PORTS)), strict=True)}
    ours |= {name: os.path.join(folder, file) for name, file in _PROXY_FILES.items()}
    for name, value in ours.items():
        os.environ.setdefault(name, value)


def start_cluster(folder: str) -> str:
    """Ray on this machine, with its files in ``folder``, until its processes are ended. Returns the dashboard's URL."""
    import ray
    from ray import serve  # noqa: F401 - configures its logger

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    context = ray.init(
        address="local",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level="error",
        _temp_dir=folder,
    )
    note_address(folder, context.address_info["gcs_address"])
    return f"http://{context.dashboard_url}"


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
