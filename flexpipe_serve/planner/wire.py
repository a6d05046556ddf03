"""Decisions as JSON: an infinite time, which JSON lacks, stands there as null."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from flexpipe_serve.planner.types import Decision, Prediction

_TIMES = frozenset(Prediction.__struct_fields__)


def to_wire(decision: Decision) -> Any:
    """Plain mappings, lists and numbers, ready for JSON."""
    return _without_infinity(msgspec.to_builtins(decision))


def from_wire(content: Any) -> Decision:
    """The decision that :func:`to_wire` made this of.

    Raises:
        msgspec.ValidationError: it is none.
    """
    return msgspec.convert(_with_infinity(content), Decision)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: math.inf if item is None and key in _TIMES else _with_infinity(item) for key, item in value.items()
        }
    return [_with_infinity(item) for item in value] if isinstance(value, list) else value
