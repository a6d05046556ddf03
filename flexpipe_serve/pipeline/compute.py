"""What a stage computes with: the cores its node's stages share, cores of its own, or a GPU."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.stage_types import StageSetup

_NUM_CORES = len(os.sched_getaffinity(0))
"""Of the node. Counted when this module is imported: afterwards the process may be pinned to some of them."""


def pin_process(cores: Collection[int]) -> None:
    """Keep this process on ``cores``: all its threads, and those that they will start.

    Args:
        cores: numbers as the kernel counts; none: any core will do.

    Raises:
        ConfigError: the process may not run on all of them, or there is no such core.
    """
    if not cores:
        return
    wanted, allowed = set(cores), os.sched_getaffinity(0)
    if not wanted <= allowed:
        missing = ", ".join(map(str, sorted(wanted - allowed)))
        raise ConfigError(
            f"stage_cpus names core {missing}, but this process may run on {_listed(allowed)} only; name some of those."
        )
    # Again until none is left: a thread that was not pinned yet may have started another meanwhile.
    while others := [thread for thread in _threads() if _affinity(thread) not in (wanted, None)]:
        for thread in others:
            try:
                os.sched_setaffinity(thread, wanted)
            except ProcessLookupError:  # it has ended
                continue


def stage_speed(setup: StageSetup) -> float:
    """Speed of what a stage computes with, in units of the whole node's cores (or of the GPU): an estimate, in
    proportion to the number of cores and the emulated share."""
    return setup.cpu_share * (len(setup.cores) / _NUM_CORES if setup.cores else 1.0)


def _threads() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def _affinity(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None


def _listed(cores: Collection[int]) -> str:
    return ", ".join(map(str, sorted(cores)))
