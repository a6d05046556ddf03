"""What a message between processes costs: two stages as plain processes on the channel of serving."""

from __future__ import annotations

import statistics
import time
import uuid
from dataclasses import replace

import numpy as np

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.model.profile_steps import decodes, make_step, num_blocks_of
from flexpipe_serve.pipeline.channel import Outlet
from flexpipe_serve.pipeline.inbox import Inbox, connect
from flexpipe_serve.pipeline.messages import FailureHeader, HiddenHeader, decode_header
from flexpipe_serve.pipeline.process_host import ProcessStageHost
from flexpipe_serve.pipeline.stage_types import Assignment, StageSetup, folder_key

_NUM_SEQS = 8
_CONTEXT = 64
_NUM_WARM_UP, _NUM_STEPS = 5, 60
_START_S = 300.0
_STEP_S = 60.0
_NUM_HOPS = 3
"""Router to first stage, first to second, second to Router."""


def measure_hop(setup: StageSetup, *, num_layers: int, vocab_size: int, num_threads: int) -> float:
    """Seconds of a step that no stage computes, by hop: message, wake-up, decoding. Median of decode steps.

    Args:
        setup: of the stages; name and domain are replaced.
        num_layers: to compute between the hops, as processes that have just slept are slower to answer.

    Raises:
        EngineUnavailableError: a stage does not start or answer.
    """
    setup = replace(setup, domain_key=uuid.uuid4().hex)
    host = ProcessStageHost()
    folder = DomainFolder(folder_key(setup.domain_key, host.node))
    inbox = Inbox("router", folder=folder.path, node=host.node)
    stages = [host.launch(replace(setup, name=f"stage-{index}")) for index in range(2)]
    outlets: list[Outlet] = []
    try:
        endpoints = [stage.report().result(_START_S).endpoint for stage in stages]
        rows = decodes(_NUM_SEQS, context=_CONTEXT)
        num_blocks = num_blocks_of(rows, block_size=setup.block_size)
        half = num_layers // 2
        parts = [(0, half, endpoints[1]), (half, num_layers, inbox.endpoint)]
        ready = [
            stage.prepare(
                Assignment(epoch=1, start=start, stop=stop, is_first=start == 0, is_last=False, next=next_),
                num_blocks=num_blocks,
                fresh=True,
            )
            for stage, (start, stop, next_) in zip(stages, parts, strict=True)
        ]
        for future in ready:
            future.result(_START_S)
        outlets = [connect(endpoint, node=host.node) for endpoint in endpoints]
        seconds = []
        for step in range(1, _NUM_WARM_UP + _NUM_STEPS + 1):
            batch = make_step(
                rows, block_size=setup.block_size, vocab_size=vocab_size, num_threads=num_threads, step=step
            )
            started = time.perf_counter()
            frames = batch.encode()
            for outlet in outlets:
                outlet.send(frames)
            answer = inbox.receive(_STEP_S)
            if answer is None:
                raise EngineUnavailableError(f"two stages did not answer a step within {_STEP_S:.0f} s.")
            header = decode_header(answer[0])
            elapsed = time.perf_counter() - started
            if isinstance(header, FailureHeader):
                raise EngineUnavailableError(f"{header.stage} failed: {header.message}")
            assert isinstance(header, HiddenHeader), header
            stage_seconds: list[float] = np.frombuffer(answer[1], np.float64)[1:].tolist()
            seconds.append((elapsed - sum(stage_seconds)) / _NUM_HOPS)
        return statistics.median(seconds[_NUM_WARM_UP:])
    finally:
        for outlet in outlets:
            outlet.close()
        for stage in stages:
            stage.stop()
        inbox.close()
        folder.close()
