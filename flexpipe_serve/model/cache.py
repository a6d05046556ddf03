"""Where this project keeps what it fetched or measured once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """``$FLEXPIPE_HOME``, or ``~/.cache/flexpipe-serve``. Not created here."""
    home = os.environ.get("FLEXPIPE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "flexpipe-serve"
