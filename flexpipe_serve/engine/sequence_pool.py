"""Where each unfinished sequence is, and the KV blocks it holds there.

A sequence is *waiting* (no KV), *ready* (holds KV, in no step) or in a step in flight (holds KV). The scheduler
decides who moves; this module makes the moves, so that a sequence and its blocks are never in two places.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator

from flexpipe_serve.engine.request import Sequence, SequenceEnd, SequenceStatus
from flexpipe_serve.engine.request_groups import RequestGroups
from flexpipe_serve.engine.scheduler_config import SchedulerStats
from flexpipe_serve.kv.block_manager import BlockManager, Moves


class SequencePool:
    """The unfinished sequences of one pipeline and its KV blocks."""

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.blocks = BlockManager(num_blocks=num_blocks, block_size=block_size, prefix_cache=prefix_cache)
        self.groups = RequestGroups(block_size=block_size, prefix_cache=prefix_cache)
        self.waiting: list[Sequence] = []
        """Sorted by rank."""
        self.running: set[Sequence] = set()
        """All that hold KV."""
        self.ready: OrderedDict[Sequence, None] = OrderedDict()
        """Running and in no step; who was computed longest ago stands first."""
        self.num_kv_tokens = num_blocks * block_size
        """Tokens one sequence can count on. More than all blocks can hold while the KV cache is shrunk for a time: who
        needs more then waits until it grows."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_prefix_hit_tokens = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Let a new sequence wait."""
        insort(self.waiting, seq, key=rank)
        self.groups.add(seq)

    def admissible(self) -> Iterator[Sequence]:
        """The waiting sequences by rank, without those that wait for a sibling or for the KV cache to grow."""
        return (seq for seq in self.waiting if self._fits_alone(seq) and not self.groups.is_held_back(seq))

    def find_room(self, seq: Sequence) -> list[int] | None:
        """Blocks the prefix cache has for a waiting sequence; None where those it still needs are not to be had."""
        return self.blocks.find_room(
            seq.tokens,
            max_cached_tokens=seq.max_cached_tokens,
            # Or the next decode of a running sequence would preempt the newcomer.
            num_reserved=len(self.running),
        )

    def admit(self, seq: Sequence, cached: list[int], *, now: float) -> None:
        """Make a waiting sequence ready, with blocks for all its known tokens.

        Args:
            cached: what ``find_room`` has just returned.
        """
        del self.waiting[self._waiting_position(seq)]
        self.blocks.acquire(cached, seq.block_table)
        self.blocks.allocate(self._num_missing_blocks(seq), seq.block_table)
        seq.num_computed = len(cached) * self.blocks.block_size
        seq.status = SequenceStatus.RUNNING
        self.running.add(seq)
        self.ready[seq] = None
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = now
            seq.num_cached_tokens = seq.num_computed
            self.num_prompt_tokens += seq.num_prompt_tokens
            self.num_prefix_hit_tokens += seq.num_computed

    def make_room(self, seq: Sequence, *, spared: Collection[Sequence]) -> bool:
        """Give a ready sequence blocks for all its known tokens, preempting ready ones that rank lower.

        Args:
            spared: ready sequences that must stay.

        Returns:
            False where only sequences could help that rank higher, are spared or are in flight; also where the whole
            KV cache is too small for now: then it waits, and others can run meanwhile.
        """
        num_missing = self._num_missing_blocks(seq)
        if num_missing == 0:
            return True
        if not self._fits_alone(seq):
            self._preempt(seq)
            return False
        while self.blocks.num_available < num_missing:
            victim = max((s for s in self.ready if s not in spared), key=rank)
            if victim is seq:
                return False
            self._preempt(victim)
        self.blocks.allocate(num_missing, seq.block_table)
        return True

    def start(self, seq: Sequence, step: int) -> None:
        """Put a ready sequence into a step."""
        del self.ready[seq]
        seq.in_flight = step

    def note_computed(self, seq: Sequence, num_new: int) -> None:
        """The step of a sequence is over: the KV of its next ``num_new`` tokens is there. It is ready again."""
        num_computed = seq.num_computed + num_new
        self.blocks.publish(seq.block_table, seq.tokens, start=seq.num_computed, stop=num_computed)
        seq.num_computed = num_computed
        seq.in_flight = None
        self.ready[seq] = None
        self.groups.note_computed(seq)

    def evict(self, seq: Sequence) -> None:
        """Drop the KV of a running sequence, and whatever its step in flight would bring. It waits at its rank."""
        self._leave_running(seq)
        seq.num_computed = 0
        seq.in_flight = None
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=rank)

    def end(self, seq: Sequence, end: SequenceEnd, *, now: float) -> None:
        """Take out a sequence that is in no step and give its blocks back."""
        assert seq.in_flight is None
        if seq.status is SequenceStatus.RUNNING:
            self._leave_running(seq)
        else:
            del self.waiting[self._waiting_position(seq)]
        seq.status = SequenceStatus.FINISHED
        seq.end = end
        seq.end_requested = None
        seq.finish_time = now
        self.groups.remove(seq)

    def reset(self, num_blocks: int) -> None:
        """All KV is lost: every sequence waits."""
        for seq in list(self.running):
            self.evict(seq)
        self.blocks.reset(num_blocks)
        self.num_kv_tokens = num_blocks * self.blocks.block_size
        self.groups.forget_computed()

    def take_out(self) -> list[Sequence]:
        """Let all sequences go, after ``reset``: none holds KV. By rank."""
        assert not self.running
        taken, self.waiting = self.waiting, []
        for seq in taken:
            self.groups.remove(seq)
        return taken

    def grow(self, num_blocks: int) -> None:
        """More blocks than now, or as many; what one sequence can count on is what they hold."""
        self.blocks.grow(num_blocks)
        self.num_kv_tokens = num_blocks * self.blocks.block_size

    def take_moves(self, max_moves: int) -> Moves:
        """Copies for the next step, which bring blocks and their tables below the limit of a shrink."""
        return self.blocks.take_moves((seq.block_table for seq in self.running), max_moves=max_moves)

    def stats(self, *, num_steps_in_flight: int) -> SchedulerStats:
        """What holds now."""
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_steps_in_flight=num_steps_in_flight,
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            num_cached_blocks=self.blocks.num_cached,
            num_used_blocks=self.blocks.num_used,
            num_preemptions=self.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_prefix_hit_tokens=self.num_prefix_hit_tokens,
        )

    def check_integrity(self, unfinished_moves: Moves) -> None:
        """Raises AssertionError where a block or a sequence is lost or in two places."""
        in_flight = {seq for seq in self.running if seq.in_flight is not None}
        assert in_flight | set(self.ready) == self.running
        assert in_flight.isdisjoint(self.ready)
        assert self.running.isdisjoint(self.waiting)
        assert sorted(self.groups, key=rank) == sorted(self.running.union(self.waiting), key=rank)
        assert self.waiting == sorted(self.waiting, key=rank)
        assert all(seq.num_computed == len(seq.block_table) == 0 for seq in self.waiting)
        self.blocks.check_integrity((seq.block_table for seq in self.running), unfinished_moves)

    def _preempt(self, seq: Sequence) -> None:
        self.evict(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _leave_running(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table)
        self.running.remove(seq)
        self.ready.pop(seq, None)

    def _num_missing_blocks(self, seq: Sequence) -> int:
        return self.blocks.num_blocks_for(len(seq.tokens)) - len(seq.block_table)

    def _fits_alone(self, seq: Sequence) -> bool:
        return len(seq.tokens) <= self.blocks.num_blocks * self.blocks.block_size

    def _waiting_position(self, seq: Sequence) -> int:
        position = bisect_left(self.waiting, rank(seq), key=rank)
        assert self.waiting[position] is seq
        return position


def rank(seq: Sequence) -> tuple[int, int, int]:
    """Unique: who is smaller is admitted first and preempted last."""
    return (seq.priority, seq.arrival, seq.index)
