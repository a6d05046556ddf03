"""What a server holds when nothing is to be done: before and after many refactorings it should be the same."""

import asyncio
from dataclasses import asdict, dataclass

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.memory import LocalMemory

_POLL_S = 0.5
_IDLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server holds at rest; None: not known, for it is not on this machine.

    Args:
        num_stages: of the pipeline.
        num_warm_stages: without layers.
        num_running: sequences.
        num_waiting: sequences.
        num_used_blocks: KV blocks of sequences.
        num_blocks: KV capacity.
        num_stage_processes: processes that run stages.
        num_segments: KV files in shared memory.
        memory_bytes: of the stages, the Router and the KV.
    """

    num_stages: int
    num_warm_stages: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_stage_processes: int | None
    num_segments: int | None
    memory_bytes: int | None


async def look(handle: AsyncHandle, memory: LocalMemory | None) -> Holdings:
    """What the server holds, once no sequence is left and what its status says is of the layout in force; after a
    while whatever it is."""
    deadline = asyncio.get_running_loop().time() + _IDLE_S
    while True:
        status = await handle.status()
        stages, queue = status.stages, status.queue
        num_processes = None if memory is None else memory.num_stage_processes()
        holdings = Holdings(
            num_stages=len(stages),
            num_warm_stages=len(status.warm_stages),
            num_running=queue.num_running,
            num_waiting=queue.num_waiting,
            num_used_blocks=status.kv.num_used_blocks,
            num_blocks=status.kv.num_blocks,
            num_stage_processes=num_processes,
            num_segments=None if memory is None else len(memory.segments()),
            memory_bytes=None if memory is None else memory.total_bytes(),
        )
        is_settled = (
            len(stages) == status.layout.num_stages
            and num_processes in (None, len(stages) + holdings.num_warm_stages)
            and not holdings.num_used_blocks
        )
        if is_settled or asyncio.get_running_loop().time() > deadline:
            return holdings
        await asyncio.sleep(_POLL_S)


def compare(before: Holdings, after: Holdings) -> dict[str, tuple[int | None, int | None]]:
    """What was held, before and after, by name."""
    old, new = asdict(before), asdict(after)
    return {name: (old[name], new[name]) for name in old}


def find_leaks(before: Holdings, after: Holdings) -> list[str]:
    """Names of what there is more of than before; memory is left out: whether it grows without end is seen only over
    time."""
    return [
        name
        for name, (old, new) in compare(before, after).items()
        if name not in ("memory_bytes", "num_blocks") and old is not None and new is not None and new > old
    ]
