"""Which tokens of which sequences the next step computes. Pure: no clock, no I/O, no randomness.

One rule for prefill and decode: computed tokens chase known tokens. A step takes decodes first, then chunks of
prompts already begun, then new sequences, all within one token budget. A sequence is in at most one step; several
steps are in flight, one for each stage, and each takes at most its share of the runnable sequences, so that the
stages have equal work.

When blocks run out, the sequence that ranks last (lowest priority, newest) gives up its KV and waits to be computed
again. A sequence never takes blocks from one that ranks higher, so the highest always gets on and everything ends.

The number of blocks can change while all this goes on. A shrink moves KV down by copies that ride in the steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import numpy.typing as npt

from flexpipe_serve.engine.outputs import FinishReason
from flexpipe_serve.engine.request import Sequence, SequenceEnd, SequenceUpdate
from flexpipe_serve.engine.request_limits import check_prompt, check_queue
from flexpipe_serve.engine.row_choice import RowChoice
from flexpipe_serve.engine.scheduler_config import SchedulerConfig, SchedulerStats
from flexpipe_serve.engine.sequence_pool import SequencePool
from flexpipe_serve.engine.step_builder import Chunk, Step, build_batch, plan_step
from flexpipe_serve.errors import InvalidRequestError
from flexpipe_serve.pipeline.messages import StepBatch

_MAX_COPIES = 8
"""KV blocks that one step copies: few enough to be lost in the time it computes."""


class Scheduler:
    """Continuous batching over the KV blocks of a pipeline.

    Args:
        num_blocks: KV blocks of ``block_size`` tokens, equal on all stages.
        arrivals: rising numbers for the requests; schedulers that take over each other's sequences draw from one.
    """

    def __init__(
        self, config: SchedulerConfig, *, num_blocks: int, block_size: int, arrivals: Iterator[int] | None = None
    ) -> None:
        self.config = config
        self._pool = SequencePool(num_blocks=num_blocks, block_size=block_size, prefix_cache=config.prefix_cache)
        self._in_flight: dict[int, Step] = {}
        self._rows = RowChoice(self._pool, config)
        self._arrivals = count() if arrivals is None else arrivals

    @property
    def max_len(self) -> int:
        """Prompt and output tokens one sequence can have: what the model and the KV cache allow. ``shrink`` leaves it
        alone, for the cache may grow again: who needs more blocks than there are waits for ``grow``."""
        return min(self.config.max_model_len, self._pool.num_kv_tokens)

    @property
    def is_idle(self) -> bool:
        """True where no sequence is unfinished."""
        return len(self._pool) == 0

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._pool)

    def set_max_waiting(self, max_waiting: int) -> None:
        """Change the bound of the queue; what waits already stays."""
        self.config = replace(self.config, max_waiting=max_waiting)

    def add(self, *sequences: Sequence) -> None:
        """Queue the sequences of a request, all or none.

        Raises:
            InvalidRequestError: empty or too long a prompt, a request id in use, more sequences than can ever queue.
            QueueFullError: the waiting queue is at its limit.
        """
        for seq in sequences:
            check_prompt(seq, self.config, num_kv_tokens=self._pool.num_kv_tokens)
            if any(s.index == seq.index for s in self._pool.groups.sequences(seq.request_id)):
                raise InvalidRequestError(f"A request with the id {seq.request_id!r} is being served; use another id.")
        check_queue(len(sequences), self.config, num_unfinished=len(self._pool))
        arrival = next(self._arrivals)
        for seq in sequences:
            seq.arrival = arrival
            self._pool.add(seq)

    def abort(self, request_id: str, *, now: float) -> list[Sequence]:
        """End all sequences of a request with ``abort``; unknown and ended requests are ignored.

        Returns:
            The sequences that ended at once. The others end with the update of their step in flight.
        """
        sequences = self._pool.groups.sequences(request_id)
        for seq in sequences:
            self.finish(seq, "abort", now=now)
        return [seq for seq in sequences if seq.is_finished]

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None, *, now: float
    ) -> None:
        """End a sequence from outside: stop string, abort, error.

        At once, or when its step in flight is over: its blocks are being written until then. The first reason
        counts; an ended sequence stays as it is.
        """
        if sequence.is_finished or sequence.end_requested is not None:
            return
        end = SequenceEnd(reason, stop_reason)
        if sequence.in_flight is not None:
            sequence.end_requested = end
        else:
            self._pool.end(sequence, end, now=now)

    @property
    def num_blocks_needed(self) -> int:
        """Blocks without which unfinished sequences would not go on as they are: those in use now, or those that the
        longest of them may come to need. Where it ends early, it needed fewer."""
        blocks = self._pool.blocks
        longest = max((s.num_prompt_tokens + s.params.max_tokens for s in self._pool.groups), default=1)
        return max(blocks.num_used, blocks.num_blocks_for(min(longest, self.max_len)))

    @property
    def is_shrunk(self) -> bool:
        """True where no KV is above the limit and no step in flight copies any. Without a shrink it is true too, but
        for the copies of one just taken back: wait for it before steps take another route."""
        return self._pool.blocks.is_shrunk

    def shrink(self, num_blocks: int) -> None:
        """Use only the first ``num_blocks`` blocks from now on. The next steps carry copies that move KV down; when
        ``is_shrunk``, the stages need no more.

        Meant to last for a time: ``max_len`` stays until ``grow`` says what there is to be.

        Raises:
            RefactorRefusedError: more blocks are in use; nothing has changed.
        """
        self._pool.blocks.shrink(num_blocks)

    def grow(self, num_blocks: int, *, now: float) -> list[Sequence]:
        """Use ``num_blocks`` blocks from now on, no fewer than at present; the stages have them. At any time, also
        while a shrink goes on. With the number there is already, it makes a shrink final.

        Returns:
            The sequences that ended: those too long for ``num_blocks`` blocks, if that is fewer than before the
            shrink (``length``, or ``error`` where there is no output yet). Of those in flight the next update tells.
        """
        self._pool.grow(num_blocks)
        return self._end_too_long(now)

    def blocks_in_use(self) -> npt.NDArray[np.int32]:
        """Ids of the blocks whose KV can still be read: of running sequences and of the prefix cache. Rising."""
        return self._pool.blocks.in_use()

    def schedule(
        self, *, step: int, epoch: int, num_stages: int, now: float, num_threads: int = 0, patched_through: int = 0
    ) -> StepBatch | None:
        """The next step, in flight from now on; None where ``num_stages`` are in flight or nothing can run.

        Call it until it returns None: the stages are only busy with as many steps in flight as there are stages.
        In a shrink a step may have no rows and carry copies only.

        Args:
            step: a number no step in flight has.
            num_threads: goes into the header as it is, like ``patched_through``.
        """
        if len(self._in_flight) >= num_stages:
            return None
        assert step not in self._in_flight, f"step {step} is in flight"
        rows = self._rows.choose(num_stages=num_stages, now=now)
        copies = self._pool.take_moves(_MAX_COPIES)
        if not rows and not copies:
            return None
        for seq, _ in rows:
            self._pool.start(seq, step)
        plan = plan_step(rows, copies=copies)
        self._in_flight[step] = plan
        return build_batch(
            plan,
            step=step,
            epoch=epoch,
            block_size=self._pool.blocks.block_size,
            num_threads=num_threads,
            patched_through=patched_through,
        )

    def complete(self, step: int, token_ids: Collection[int], *, now: float) -> list[SequenceUpdate]:
        """Take in a step's result: the sampled tokens, one for each sample of its header.

        Returns:
            One update for each row of the step, in order; nothing for a step that is not in flight (a void one).
        """
        plan = self._land(step)
        if plan is None:
            return []
        assert len(token_ids) == plan.num_samples, f"step {step}: {len(token_ids)} tokens, {plan.num_samples} samples"
        tokens = [int(token) for token in token_ids]
        return [self._advance(chunk, tokens, now) for chunk in plan.chunks]

    def fail_step(self, step: int, *, now: float) -> list[SequenceUpdate]:
        """A step raised on a stage: its writes are void, though not its copies. Its sequences wait to be computed again
        from their tokens, each alone until it has a new token: one may be to blame, and the others shall not fail with
        it again.

        What earlier steps computed stays in the prefix cache. ``Sequence.num_failed_steps`` counts the failures since
        its last token, so that the caller can end those that fail again. Blocks go back at once: no stage may execute
        the step any more after a step that is scheduled from now on.

        Returns:
            One update without tokens for each row, in order; nothing for a step that is not in flight.
        """
        plan = self._land(step)
        if plan is None:
            return []
        for chunk in plan.chunks:
            seq = chunk.sequence
            seq.num_failed_steps += 1
            self._rows.suspect(seq)
            self._pool.evict(seq)
            if seq.end_requested is not None:
                self._pool.end(seq, seq.end_requested, now=now)
        return [SequenceUpdate(sequence=c.sequence, finished=c.sequence.is_finished) for c in plan.chunks]

    def reset(self, num_blocks: int, *, now: float) -> list[Sequence]:
        """All KV is lost: every step in flight is void, the prefix cache is empty, all sequences wait.

        They keep their output and their rank. Results of void steps that still arrive are ignored by ``complete``
        as long as step numbers are not used again.

        Returns:
            The sequences that ended: those whose end was requested, and those too long for ``num_blocks`` blocks
            (``length``, or ``error`` where there is no output yet).
        """
        return self._lose_kv(num_blocks, now) + self._end_too_long(now)

    def hand_over(self, *, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """Give up all sequences: other schedulers ``take_over`` them. As in ``reset`` steps in flight are void.

        Returns:
            The sequences that ended, since that was requested, and those that go on elsewhere, by rank.
        """
        ended = self._lose_kv(self._pool.blocks.num_blocks, now)
        self._rows.forget_suspects()
        return ended, self._pool.take_out()

    def take_over(self, sequences: Collection[Sequence], *, now: float) -> list[Sequence]:
        """Go on with sequences that another scheduler handed over, from their tokens. They keep output and rank; no
        bound of the queue holds for them.

        Returns:
            The sequences that ended: those too long (``length``, or ``error`` where there is no output yet).
        """
        for seq in sequences:
            self._pool.add(seq)
            if seq.num_failed_steps:
                self._rows.suspect(seq)
        return self._end_too_long(now)

    def stats(self) -> SchedulerStats:
        """What holds now."""
        return self._pool.stats(num_steps_in_flight=len(self._in_flight))

    def check_integrity(self) -> None:
        """Raises AssertionError where blocks or sequences are lost or counted twice."""
        steps = {c.sequence: step for step, plan in self._in_flight.items() for c in plan.chunks}
        assert len(steps) == sum(len(plan.chunks) for plan in self._in_flight.values()), "a sequence is in two steps"
        assert steps == {seq: seq.in_flight for seq in self._pool.running if seq.in_flight is not None}
        self._pool.check_integrity(tuple(copy for plan in self._in_flight.values() for copy in plan.copies))

    def _lose_kv(self, num_blocks: int, now: float) -> list[Sequence]:
        """All sequences wait. Those that ended because that was requested."""
        self._in_flight.clear()
        self._pool.reset(num_blocks)
        requested = [(seq, seq.end_requested) for seq in self._pool.waiting if seq.end_requested is not None]
        for seq, end in requested:
            self._pool.end(seq, end, now=now)
        return [seq for seq, _ in requested]

    def _land(self, step: int) -> Step | None:
        """Take a step out of flight, None for a void one. Its copies are made, whatever became of its rows."""
        plan = self._in_flight.pop(step, None)
        if plan is not None:
            self._pool.blocks.finish_moves(plan.copies)
        return plan

    def _end_too_long(self, now: float) -> list[Sequence]:
        """End the sequences without room for another token, those in flight with their step. Those that have ended."""
        too_long = [s for s in self._pool.groups if len(s.tokens) + min(1, s.params.max_tokens) > self.max_len]
        for seq in too_long:
            self.finish(seq, "length" if seq.num_output_tokens else "error", now=now)
        return [seq for seq in too_long if seq.is_finished]

    def _advance(self, chunk: Chunk, tokens: list[int], now: float) -> SequenceUpdate:
        """Take in a row of a completed step."""
        seq = chunk.sequence
        self._pool.note_computed(seq, chunk.num_new)
        if seq.end_requested is not None:
            self._pool.end(seq, seq.end_requested, now=now)
            return SequenceUpdate(sequence=seq, finished=True)
        seq.num_prompt_logprobs += chunk.num_targets
        new_token_ids: tuple[int, ...] = ()
        end = None
        if chunk.sample_index is not None:
            token = tokens[chunk.sample_index]
            if token < 0:  # no valid distribution in this row: its own sequence fails, and no other
                self._pool.end(seq, SequenceEnd("error"), now=now)
                return SequenceUpdate(sequence=seq, finished=True)
            new_token_ids = (token,)
            seq.num_failed_steps = 0
            self._rows.clear_of_suspicion(seq)
            seq.tokens.append(token)
            if seq.first_token_time is None:
                seq.first_token_time = now
            end = seq.end_after(token, max_len=self.max_len)
        elif seq.num_remaining == 0:
            end = SequenceEnd("length")  # max_tokens is 0: the prompt was to be scored
        if end is not None:
            self._pool.end(seq, end, now=now)
        return SequenceUpdate(
            sequence=seq,
            new_token_ids=new_token_ids,
            finished=end is not None,
            sample_index=chunk.sample_index,
            prompt_logprobs_index=chunk.prompt_logprobs_index,
        )
