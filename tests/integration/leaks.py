"""What an engine over stages in threads must look like when it is idle: nothing of earlier layouts is left."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

from engines import generate_all

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.pipeline.local_host import LocalStageHost

_END_S = 10.0


def settle(engine: Engine) -> None:
    """Returns when the refactoring that runs, if any, and what follows from it are over."""
    while engine._refactorings.is_running:
        thread = engine._refactorings._thread
        assert thread is not None
        thread.join()
    engine._control.submit(lambda: None).result()


def check_scheduler(engine: Engine) -> None:
    """Nothing runs, and every block is free or cached."""
    loop = engine._loop
    generate_all(engine, [[5]], SamplingParams(max_tokens=1))  # steps of before are over when this one is
    loop.call(loop.scheduler.check_integrity).result()
    stats = loop.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def check_pipeline(engine: Engine, *, num_warm: int = 0) -> None:
    """The Router knows one route, and the stages of one layout (and the warm ones)."""
    pipeline, loop = engine._pipeline, engine._loop
    assert pipeline.layout is not None
    spare = set(pipeline.stages) - set(pipeline.layout.stages)
    assert pipeline.is_complete
    assert len(spare) == num_warm
    assert list(pipeline._routes) == [pipeline.epoch]
    assert (loop._calls.num_waiting, len(loop._in_flight), loop._patching_epoch, loop._hold) == (0, 0, None, None)
    known = [(stage.name, stage.layers) for stage in engine.status().stages]
    assert known == [(part.stage, (part.start, part.stop)) for part in pipeline.layout.slices]
    files = sorted(path.name for path in pipeline._folder.path.iterdir())
    sockets = [f"{name}.sock" for name in (*pipeline.stages, "router")]
    assert [name for name in files if name.endswith(".sock")] == sorted(sockets)
    segments = [
        pipeline._folder.segment_path(layer, stage=part.stage if pipeline._setup.private_kv else None).name
        for part in pipeline.layout.slices
        for layer in part.layers
    ]
    assert [name for name in files if name.endswith(".kv")] == sorted(segments)


def check_stages(engine: Engine, host: LocalStageHost) -> None:
    """Every stage holds its slice of the layout in force, with as much KV as the scheduler uses, and nothing else."""
    layout = engine._pipeline.layout
    assert layout is not None
    layers = {part.stage: tuple(part.layers) for part in layout.slices}
    for name in engine._pipeline.stages:
        core = host._alive[name].core
        held = layers.get(name, ())
        epochs = [engine._pipeline.epoch] if held else []
        assert core.computer.model.layers == held, name
        assert tuple(sorted(core._kv)) == held, name
        assert list(core._assignments) == epochs, name
        assert list(core._loop._routes) == epochs, name
        assert (core._copies._giving, list(core._copies._taking)) == ({}, epochs), name
        if held:
            assert core._kv.num_blocks == engine._loop.scheduler.stats().num_blocks, name
    for thread in threading.enumerate():
        if thread.name.endswith("-control") or thread.name.startswith("flexpipe-refactor"):
            thread.join(_END_S)  # it has given its answer
            assert not thread.is_alive(), thread
    # The Router asks the stages how they are at any time: a call of now is none that has stayed.
    alive = {thread.name for thread in threading.enumerate() if re.fullmatch(r"stage-\d+(-copies)?", thread.name)}
    assert alive == {name + suffix for name in engine._pipeline.stages for suffix in ("", "-copies")}
    assert {name for name, stage in host._alive.items() if not stage.is_over} == set(engine._pipeline.stages)


def check_idle(engine: Engine, host: LocalStageHost, *, num_warm: int = 0) -> None:
    """All of it, once the running refactoring is over."""
    settle(engine)
    check_scheduler(engine)
    check_pipeline(engine, num_warm=num_warm)
    check_stages(engine, host)


def shared_files(engine: Engine) -> list[str]:
    """What this process has open in the application's folder, also of what was removed from it. Not the host cache's
    files: stages that still fill it open them for moments, and the folder itself while they rest."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            target = os.readlink(link)
            if target.startswith(f"{engine._pipeline._folder.path}/") and not re.search(
                r"\.weights|host-cache", target
            ):
                found.append(target)
    return sorted(found)
