"""Which sequences the next step computes, and how many tokens of each. Pure."""

from __future__ import annotations

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.sequence_pool import SequencePool, rank

Row = tuple[Sequence, int]
"""A sequence of a step, and how many of its tokens are computed."""
_LONG_CONTEXT = 2048
"""Tokens from which on attention, which grows with them, is what a chunk of a prompt takes."""


class RowChoice:
    """Decodes first, then chunks of prompts already begun, then new sequences, within one token budget. A sequence
    whose last step failed goes alone. While others run, chunks behind a long context are smaller, so that their steps
    take no longer: the others wait for each.

    Args:
        pool: whose sequences it admits, and makes room for.
        config: its limits of a step and of what runs.
    """

    def __init__(self, pool: SequencePool, config: SchedulerConfig) -> None:
        self._pool = pool
        self._max_num_tokens = config.max_num_batched_tokens
        self._max_num_seqs = config.max_num_seqs
        self._suspects: dict[Sequence, None] = {}
        """Sequences whose last step failed."""

    def suspect(self, seq: Sequence) -> None:
        """A step of this sequence failed: it goes alone until it has a new token."""
        self._suspects[seq] = None

    def clear_of_suspicion(self, seq: Sequence) -> None:
        """It has a new token."""
        self._suspects.pop(seq, None)

    def forget_suspects(self) -> None:
        """All sequences are gone."""
        self._suspects.clear()

    def choose(self, *, num_stages: int, now: float) -> list[Row]:
        """The rows of the next step, with room made for them; empty where nothing can run.

        Args:
            num_stages: steps in flight at once, of which each takes its share of the runnable sequences.
        """
        num_runnable = len(self._pool.running) + self._num_admissible()
        max_rows = -(-num_runnable // num_stages)
        rows = self._retry_suspect(now)
        if not rows:
            rows = self._continue_running(max_rows)
            self._admit_waiting(rows, max_rows, now)
        return rows

    def _retry_suspect(self, now: float) -> list[Row]:
        """A row of a sequence whose last step failed, alone; empty where none can run now."""
        budget = self._max_num_tokens
        for seq in list(self._suspects):
            if seq.is_finished:
                del self._suspects[seq]
            elif seq in self._pool.ready:
                if self._pool.make_room(seq, spared=()):
                    return [(seq, seq.max_chunk(budget))]
            elif seq.in_flight is None and self._num_places > 0:
                cached = self._pool.find_room(seq)
                if cached is not None:
                    self._pool.admit(seq, cached, now=now)
                    return [(seq, seq.max_chunk(budget))]
        return []

    def _continue_running(self, max_rows: int) -> list[Row]:
        """Rows of ready sequences, at most ``max_rows``: decodes, then chunks of prompts by rank."""
        ready = self._pool.ready
        chosen: list[Sequence] = []
        for seq in list(ready):
            if len(chosen) == max_rows:
                break
            # It may have been preempted for one before it. Where it gets no block it keeps its turn.
            if seq in ready and self._pool.make_room(seq, spared=chosen):
                chosen.append(seq)
        decodes = [seq for seq in chosen if seq.num_remaining == 1]
        prefills = sorted((seq for seq in chosen if seq.num_remaining > 1), key=rank)
        budget = self._max_num_tokens
        rows = []
        for seq in decodes + prefills:
            if budget == 0:
                break
            num_new = self._chunk(seq, budget)
            budget -= num_new
            rows.append((seq, num_new))
        return rows

    def _admit_waiting(self, rows: list[Row], max_rows: int, now: float) -> None:
        """Fill ``rows`` up with waiting sequences, by rank; the first that does not fit blocks those behind it."""
        budget = self._max_num_tokens - sum(num_new for _, num_new in rows)
        while len(rows) < max_rows and budget > 0 and self._num_places > 0:
            seq = next(self._pool.admissible(), None)
            cached = self._pool.find_room(seq) if seq else None
            if seq is None or cached is None:
                break
            self._pool.admit(seq, cached, now=now)
            num_new = self._chunk(seq, budget)
            budget -= num_new
            rows.append((seq, num_new))

    def _chunk(self, seq: Sequence, budget: int) -> int:
        """Tokens of a row."""
        if seq.num_computed > _LONG_CONTEXT and len(self._pool.running) > 1:
            budget = min(budget, max(1, self._max_num_tokens * _LONG_CONTEXT // seq.num_computed))
        return seq.max_chunk(budget)

    @property
    def _num_places(self) -> int:
        return self._max_num_seqs - len(self._pool.running)

    def _num_admissible(self) -> int:
        """How many waiting sequences have a place and blocks now, as far as can be told without the prefix cache."""
        num_places = self._num_places
        blocks = self._pool.blocks
        num_available = blocks.num_available - len(self._pool.running)
        count = 0
        for seq in self._pool.admissible():
            if count == num_places:
                break
            num_needed = blocks.num_blocks_for(len(seq.tokens))
            if num_needed > num_available:
                # The first must not be left out, or a full pipeline would never look at it.
                return count or int(self._pool.find_room(seq) is not None)
            num_available -= num_needed + 1
            count += 1
        return count
