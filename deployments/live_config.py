"""The ``user_config`` of a running application, as the routes see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flexpipe_serve.config import UserConfig

ROUTER = "Router"
"""The deployment that has it."""


class LiveConfig(Protocol):
    """What the routes need of it."""

    @property
    def in_force(self) -> UserConfig:
        """As it is now."""
        ...

    async def change(self, changes: Mapping[str, Any]) -> UserConfig:
        """Change some of it; see config.merge. Returns what is in force then.

        Raises:
            ConfigError: it is wrong; nothing was changed.
            EngineUnavailableError: it is not in force after a while.
        """
        ...
