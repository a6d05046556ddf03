"""The ``user_config`` of a running application, changed where Serve keeps it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from flexpipe_serve.config import UserConfig, merge, parse
from flexpipe_serve.deployments.live_config import ROUTER
from flexpipe_serve.errors import ConfigError, EngineUnavailableError

_TAKEN_S = 30.0
_POLL_S = 0.05


class ServedConfig:
    """A LiveConfig. Serve knows which configuration the application shall have, so a change goes to Serve, which hands
    it to the replica as after ``serve deploy``: the next replica has it too, and the next ``serve deploy`` sets what
    its file says.

    Args:
        app: the application's name.
        check: raises ConfigError where the model cannot be served like that.
    """

    def __init__(self, app: str, *, check: Callable[[UserConfig], object]) -> None:
        self._app = app
        self._check = check
        self.in_force = UserConfig()
        self._changing = asyncio.Lock()

    async def change(self, changes: Mapping[str, Any]) -> UserConfig:
        """See LiveConfig.change."""
        async with self._changing:  # one after the other, or one would take back what the other does
            wanted = await asyncio.to_thread(self._hand_to_serve, changes)
            deadline = time.monotonic() + _TAKEN_S
            while self.in_force != wanted:
                if time.monotonic() > deadline:
                    raise EngineUnavailableError(
                        f"Serve has taken the change, but it is not in force after {_TAKEN_S:.0f} s; GET"
                        " /flexpipe/config tells when it is."
                    )
                await asyncio.sleep(_POLL_S)
            return wanted

    def _hand_to_serve(self, changes: Mapping[str, Any]) -> UserConfig:
        client = _get_global_client()
        assert client is not None, "a replica's process has one"
        details = client.get_serve_details()
        deployed = {
            name: ServeApplicationSchema.model_validate(app["deployed_app_config"])
            for name, app in details["applications"].items()
            if app.get("deployed_app_config")
        }
        if self._app not in deployed:
            raise ConfigError(
                "the application was not deployed from a configuration, so Serve has none to change; start it with"
                " `serve deploy` or `flexpipe serve`."
            )
        router = deployment_of(deployed[self._app], ROUTER)
        merged = merge(user_config_of(router), changes)
        wanted = parse(UserConfig, merged)
        self._check(wanted)
        router.user_config = merged
        # All applications: Serve ends those that are missing.
        client.deploy_apps(
            ServeDeploySchema(applications=list(deployed.values()), target_capacity=details.get("target_capacity"))
        )
        return wanted


def deployment_of(app: ServeApplicationSchema, name: str) -> DeploymentSchema:
    """What a configuration says of a deployment; nothing as yet, if it does not name it."""
    for deployment in app.deployments:
        if deployment.name == name:
            return deployment
    app.deployments = [*app.deployments, DeploymentSchema(name=name)]
    return app.deployments[-1]


def user_config_of(deployment: DeploymentSchema) -> dict[str, Any]:
    """The ``user_config`` that a configuration gives a deployment; without one Serve has a value of its own there."""
    return deployment.user_config if isinstance(deployment.user_config, dict) else {}
