"""Programs of this folder that need a Ray of their own, run as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from served import clean_environment

HERE = Path(__file__).parent


def run_program(name: str, model: Path, *, timeout_s: float) -> list[str]:
    """The lines that ``name`` prints, given a model's folder. A failure shows what it said."""
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "unit")))
    done = subprocess.run(
        [sys.executable, str(HERE / name), str(model)],
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
