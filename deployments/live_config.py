"""The ``user_config`` of a running application, as the routes see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flexpipe_serve.config import UserConfig

ROUTER = "Router"
"""The deployment that has it."""
_ALTERNATIVES = ("layout",)
"""Sections whose keys exclude each other: given anew, nothing of the former stays."""


class LiveConfig(Protocol):
    """What the routes need of it."""

    @property
    def in_force(self) -> UserConfig:
        """As it is now."""
        ...

    async def change(self, changes: Mapping[str, Any]) -> UserConfig:
        """Change some of it; see :func:`merge`. Returns what is in force then.

        Raises:
            ConfigError: it is wrong; nothing was changed.
            EngineUnavailableError: it is not in force after a while.
        """
        ...


def merge(former: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A ``user_config`` with some of its keys changed; neither is checked.

    Args:
        former: the one before.
        changes: sections with the keys that change, the others stay; None: the default. A layout is given as a whole.
    """
    merged = dict(former)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in _ALTERNATIVES:
            value = merge(merged[key], value)
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged
