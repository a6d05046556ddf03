"""What the HTTP side accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Read anew for every request, so a change is in force at once."""

    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int | None = None
    """None: whatever fits into the model's context."""
