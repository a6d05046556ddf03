"""The Serve application: one Router deployment, HTTP ingress and engine in the same replica."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_get, _internal_kv_put

from flexpipe_serve.config import ServeArgs, UserConfig, parse
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.deployments.asgi_call import call
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.live_config import ROUTER
from flexpipe_serve.deployments.served_config import ServedConfig
from flexpipe_serve.engine.assemble import layout_of, make_engine_maker, model_name
from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.errors import ConfigError, EngineUnavailableError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.source import ModelSpec
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.ray_host import RayStageHost
from flexpipe_serve.transport import Head

logger = logging.getLogger(__name__)
_SWITCH_INTERVAL_S = 0.0005
"""Of Python's threads: the engine thread must not wait 5 ms (the default) for the event loop to let go."""


@serve.deployment(
    name=ROUTER,
    num_replicas=1,
    max_ongoing_requests=10_000,  # the scheduler's own queue is the bound: it answers 429
    graceful_shutdown_timeout_s=15,
    graceful_shutdown_wait_loop_s=1,
    health_check_period_s=2,
    user_config={},
)
@serve.ingress()
class Router:
    """Takes HTTP requests, schedules, and drives the stages.

    Args:
        args: the application's ``args``, a ServeArgs as a mapping.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        self._fleet: Fleet | None = None  # first: __del__ needs it, whatever fails below
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._args = parse(ServeArgs, args)
        self._api_keys = _resolve_keys(self._args.api_keys)
        self._spec: ModelSpec | None = None
        self._config = ServedConfig(serve.get_replica_context().app_name, check=self._check)
        # Whoever reaches the replica through Ray may do anything, so no keys are asked for.
        self._app_for_handles = create_app(self._get_fleet, get_limits=self._get_limits, config=self._config)
        self._layout_change: Future[None] | None = None
        self._is_layout_refused = False

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._get_fleet, get_limits=self._get_limits, config=self._config, api_keys=self._api_keys)

    async def request(self, method: str, path: str, body: bytes) -> AsyncGenerator[Head | bytes]:
        """What the HTTP API answers, for handles: its status and headers, then its body in pieces."""
        async with aclosing(call(self._app_for_handles, method, path, body)) as pieces:
            async for piece in pieces:
                yield piece

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a ``user_config``: at the start it brings the pipeline up, later it changes what differs.

        A later one that is wrong is refused in the log and in ``/flexpipe/status``; the replica goes on as it was.
        """
        if self._fleet is None:
            config = parse(UserConfig, user_config)
            await asyncio.to_thread(self._start, config)
            self._config.in_force = config
            return
        try:
            self._change(parse(UserConfig, user_config))
        except ConfigError as error:
            self._refuse(error)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises; a lost stage is no reason, the engine replaces that itself."""
        if self._fleet is not None:
            self._fleet.check_alive()

    def __del__(self) -> None:
        if self._fleet is not None:
            self._fleet.stop()

    def _start(self, config: UserConfig) -> None:
        context = serve.get_replica_context()
        device = self._args.device
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
        maker = make_engine_maker(
            self._args,
            host=RayStageHost(context.app_name),
            domain_key=f"{ray.get_runtime_context().gcs_address}/{context.app_name}",
            device=device,
            num_cores=len(os.sched_getaffinity(0)),
            limits=config.limits,
            keys=_curve_keys(context.app_name),
        )
        fleet = Fleet(
            maker,
            make_metrics=lambda number: EngineMetrics(
                app=context.app_name, model=model_name(self._args), pipeline=number
            ),
        )
        _set_limits(fleet, config)
        layout = layout_of(config.layout, num_layers=maker.num_layers)
        fleet.start(layout, num_pipelines=config.pipelines)
        self._fleet, self._spec = fleet, maker.spec

    def _change(self, config: UserConfig) -> None:
        assert self._fleet is not None
        layout = self._check(config)
        self._fleet.config_error = None
        former, self._config.in_force = self._config.in_force, config
        _set_limits(self._fleet, config)
        is_same = (config.layout, config.pipelines) == (former.layout, former.pipelines)
        is_handed_back = former.planner.mode == "on" != config.planner.mode
        if is_same and not is_handed_back and not self._is_layout_refused:
            return  # a refactoring asked for, or the planner, may have left that long ago
        self._is_layout_refused = False
        # Not awaited: while layers move, the next user_config must be able to come through.
        self._layout_change = self._fleet.set_layout(layout, num_pipelines=config.pipelines)
        self._layout_change.add_done_callback(self._on_layout_changed)

    def _on_layout_changed(self, change: Future[None]) -> None:
        if change is not self._layout_change or change.cancelled():
            return  # a later one took its place, and the status is about that
        error = change.exception()
        if error is not None:
            self._is_layout_refused = True
            self._refuse(error)

    def _check(self, config: UserConfig) -> Layout:
        """The layout asked for. Raises ConfigError where the model cannot be cut like that."""
        if self._spec is None:
            raise EngineUnavailableError("The model is still being loaded.")
        return layout_of(config.layout, num_layers=self._spec.num_layers)

    def _refuse(self, error: BaseException) -> None:
        assert self._fleet is not None
        logger.error("user_config refused, what was in force stays: %s", error)
        self._fleet.config_error = str(error)

    def _get_fleet(self) -> Fleet:
        if self._fleet is None:
            raise EngineUnavailableError("The model is still being loaded.")
        return self._fleet

    def _get_limits(self) -> HttpLimits:
        limits = self._config.in_force.limits
        return HttpLimits(max_body_bytes=limits.max_body, max_prompt_tokens=limits.max_prompt_tokens)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of ``import_path: flexpipe_serve.deployments.app:build``.

    Raises:
        ConfigError: ``args`` are wrong; nothing is started.
    """
    parse(ServeArgs, args)
    return Router.bind(args)  # type: ignore[attr-defined]


def _set_limits(fleet: Fleet, config: UserConfig) -> None:
    fleet.set_planner(config.planner)
    fleet.set_max_waiting(config.limits.max_waiting)
    fleet.set_refactor_limits(
        max_bytes_per_s=float(config.refactor.max_bytes_per_s), num_warm_stages=config.warm_stages
    )


def _resolve_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """API keys, with ``env:NAME`` replaced by the environment's value."""
    resolved = []
    for key in keys:
        if key.startswith("env:"):
            value = os.environ.get(key[4:], "")
            if not value:
                raise ConfigError(f"api_keys names {key!r}, but the environment variable {key[4:]!r} is not set.")
            key = value
        resolved.append(key)
    return tuple(resolved)


def _curve_keys(app: str) -> CurveKeys | None:
    """The application's keys for tcp, kept in the cluster so that a new Router can reach the stages of the former.

    None on a single node: nothing listens on the network there.
    """
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return None
    name = f"flexpipe:{app}:curve".encode()
    if not _internal_kv_exists(name):
        keys = CurveKeys.generate()
        _internal_kv_put(name, f"{keys.public} {keys.secret}".encode(), overwrite=False)
    public, secret = _internal_kv_get(name).decode().split()
    return CurveKeys(public, secret)
