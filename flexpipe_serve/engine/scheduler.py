"""Which tokens of which sequences the next step computes. Pure: no clock, no I/O, no randomness.

One rule for prefill and decode: computed tokens chase known tokens. A step takes decodes first, then chunks of
prompts already begun, then new sequences, all within one token budget. A sequence is in at most one step; several
steps are in flight, one for each stage, and each takes at most its share of the runnable sequences, so that the
stages have equal work.

When blocks run out, the sequence that ranks last (lowest priority, newest) gives up its KV and waits to be computed
again. A sequence never takes blocks from one that ranks higher, so the highest always gets on and everything ends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection

from flexpipe_serve.engine.outputs import FinishReason
from flexpipe_serve.engine.request import Sequence, SequenceEnd, SequenceStatus, SequenceUpdate
from flexpipe_serve.engine.request_groups import RequestGroups
from flexpipe_serve.engine.request_limits import check_prompt, check_queue
from flexpipe_serve.engine.scheduler_config import SchedulerConfig, SchedulerStats
from flexpipe_serve.engine.step_builder import Chunk, Step, build_batch, plan_step
from flexpipe_serve.errors import InvalidRequestError
from flexpipe_serve.kv.block_manager import BlockManager
from flexpipe_serve.pipeline.messages import StepBatch


class Scheduler:
    """Continuous batching over a fixed number of KV blocks.

    Args:
        num_blocks: KV blocks of ``block_size`` tokens, equal on all stages.
    """

    def __init__(self, config: SchedulerConfig, *, num_blocks: int, block_size: int) -> None:
        self.config = config
        self._blocks = BlockManager(num_blocks=num_blocks, block_size=block_size, prefix_cache=config.prefix_cache)
        self._groups = RequestGroups(block_size=block_size, prefix_cache=config.prefix_cache)
        self._waiting: list[Sequence] = []
        """Sorted by rank."""
        self._running: set[Sequence] = set()
        self._ready: OrderedDict[Sequence, None] = OrderedDict()
        """Running and not in flight; who was computed longest ago stands first."""
        self._in_flight: dict[int, Step] = {}
        self._next_arrival = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_prefix_hit_tokens = 0

    # ------------------------------------------------------------------ requests

    @property
    def max_len(self) -> int:
        """Prompt and output tokens one sequence can have: what the model and the KV cache allow."""
        return min(self.config.max_model_len, self._num_kv_tokens)

    @property
    def _num_kv_tokens(self) -> int:
        return self._blocks.num_blocks * self._blocks.block_size

    @property
    def is_idle(self) -> bool:
        """True where no sequence is unfinished."""
        return len(self._groups) == 0

    def add(self, *sequences: Sequence) -> None:
        """Queue the sequences of a request, all or none.

        Raises:
            InvalidRequestError: empty or too long a prompt, a request id in use, more sequences than can ever queue.
            QueueFullError: the waiting queue is at its limit.
        """
        for seq in sequences:
            check_prompt(seq, self.config, num_kv_tokens=self._num_kv_tokens)
            if any(s.index == seq.index for s in self._groups.sequences(seq.request_id)):
                raise InvalidRequestError(f"A request with the id {seq.request_id!r} is being served; use another id.")
        check_queue(len(sequences), self.config, num_unfinished=len(self._running) + len(self._waiting))
        for seq in sequences:
            seq.arrival = self._next_arrival
            insort(self._waiting, seq, key=_rank)
            self._groups.add(seq)
        self._next_arrival += 1

    def abort(self, request_id: str, *, now: float) -> list[Sequence]:
        """End all sequences of a request with ``abort``; unknown and ended requests are ignored.

        Returns:
            The sequences that ended at once. The others end with the update of their step in flight.
        """
        sequences = self._groups.sequences(request_id)
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
            self._end(sequence, end, now)

    # ------------------------------------------------------------------ steps

    def schedule(self, *, step: int, epoch: int, num_stages: int, now: float, num_threads: int = 0) -> StepBatch | None:
        """The next step, in flight from now on; None where ``num_stages`` are in flight or nothing can run.

        Call it until it returns None: the stages are only busy with as many steps in flight as there are stages.

        Args:
            step: a number no step in flight has.
            num_threads: goes into the header as it is.
        """
        if len(self._in_flight) >= num_stages:
            return None
        assert step not in self._in_flight, f"step {step} is in flight"
        num_runnable = len(self._running) + self._num_admissible()
        max_rows = -(-num_runnable // num_stages)
        rows = self._continue_running(max_rows)
        self._admit_waiting(rows, max_rows, now)
        if not rows:
            return None
        plan = plan_step(rows)
        self._in_flight[step] = plan
        for seq, _ in rows:
            seq.in_flight = step
        return build_batch(plan, step=step, epoch=epoch, block_size=self._blocks.block_size, num_threads=num_threads)

    def complete(self, step: int, token_ids: Collection[int], *, now: float) -> list[SequenceUpdate]:
        """Take in a step's result: the sampled tokens, one for each sample of its header.

        Returns:
            One update for each row of the step, in order; nothing for a step that is not in flight (a void one).
        """
        plan = self._in_flight.pop(step, None)
        if plan is None:
            return []
        assert len(token_ids) == plan.num_samples, f"step {step}: {len(token_ids)} tokens, {plan.num_samples} samples"
        tokens = list(token_ids)
        return [self._advance(chunk, tokens, now) for chunk in plan.chunks]

    def fail_step(self, step: int, *, now: float) -> list[SequenceUpdate]:
        """A step raised on a stage: its writes are void. Its sequences wait to be computed again from their tokens.

        What earlier steps computed stays in the prefix cache. ``Sequence.num_failed_steps`` counts, so that the
        caller can end those that fail again and again. Blocks go back at once: no stage may execute the step any
        more after a step that is scheduled from now on.

        Returns:
            One update without tokens for each row, in order; nothing for a step that is not in flight.
        """
        plan = self._in_flight.pop(step, None)
        if plan is None:
            return []
        updates = []
        for chunk in plan.chunks:
            seq = chunk.sequence
            seq.in_flight = None
            seq.num_failed_steps += 1
            if seq.end_requested is not None:
                self._end(seq, seq.end_requested, now)
            else:
                self._back_to_waiting(seq)
            updates.append(SequenceUpdate(sequence=seq, finished=seq.is_finished))
        return updates

    def reset(self, num_blocks: int, *, now: float) -> list[Sequence]:
        """All KV is lost: every step in flight is void, the prefix cache is empty, all sequences wait.

        They keep their output and their rank. Results of void steps that still arrive are ignored by ``complete``
        as long as step numbers are not used again.

        Returns:
            The sequences that ended: those whose end was requested, and those too long for ``num_blocks`` blocks
            (``length``, or ``error`` where there is no output yet).
        """
        self._in_flight.clear()
        for seq in list(self._running):
            seq.in_flight = None
            self._back_to_waiting(seq)
        self._blocks.reset(num_blocks)
        self._groups.forget_computed()
        ended = []
        for seq in list(self._waiting):
            end = seq.end_requested
            if end is None and len(seq.tokens) + min(1, seq.params.max_tokens) > self.max_len:
                end = SequenceEnd("length" if seq.num_output_tokens else "error")
            if end is not None:
                self._end(seq, end, now)
                ended.append(seq)
        return ended

    # ------------------------------------------------------------------ introspection

    def stats(self) -> SchedulerStats:
        """What holds now."""
        blocks = self._blocks
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps_in_flight=len(self._in_flight),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_cached,
            num_used_blocks=blocks.num_used,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError where blocks or sequences are lost or counted twice."""
        in_flight = [c.sequence for plan in self._in_flight.values() for c in plan.chunks]
        grouped = list(self._groups)
        assert len(in_flight) == len(set(in_flight)), "a sequence is in two steps"
        assert set(in_flight).isdisjoint(self._ready)
        assert set(in_flight) | set(self._ready) == self._running
        assert self._running.isdisjoint(self._waiting)
        assert len(grouped) == len(self._running) + len(self._waiting)
        assert set(grouped) == self._running | set(self._waiting)
        assert self._waiting == sorted(self._waiting, key=_rank)
        assert all(seq.num_computed == len(seq.block_table) == 0 for seq in self._waiting)
        self._blocks.check_integrity(seq.block_table for seq in self._running)

    # ------------------------------------------------------------------ choosing

    def _continue_running(self, max_rows: int) -> list[tuple[Sequence, int]]:
        """Rows of sequences that hold KV, at most ``max_rows``: decodes, then chunks of prompts by rank."""
        chosen: list[Sequence] = []
        for seq in list(self._ready):
            if len(chosen) == max_rows:
                break
            if seq in self._ready and self._make_room(seq, chosen):
                chosen.append(seq)
        decodes = [seq for seq in chosen if seq.num_remaining == 1]
        prefills = sorted((seq for seq in chosen if seq.num_remaining > 1), key=_rank)
        budget = self.config.max_num_batched_tokens
        rows = []
        for seq in decodes + prefills:
            if budget == 0:
                break
            num_new = seq.max_chunk(budget)
            budget -= num_new
            del self._ready[seq]
            rows.append((seq, num_new))
        return rows

    def _admit_waiting(self, rows: list[tuple[Sequence, int]], max_rows: int, now: float) -> None:
        """Fill ``rows`` up with waiting sequences, by rank; the first that does not fit blocks those behind it."""
        budget = self.config.max_num_batched_tokens - sum(num_new for _, num_new in rows)
        position = 0
        while len(rows) < max_rows and budget > 0 and self._num_places > 0 and position < len(self._waiting):
            seq = self._waiting[position]
            if self._groups.is_held_back(seq):
                position += 1
                continue
            if not self._admit(seq, now):
                break
            del self._waiting[position]
            num_new = seq.max_chunk(budget)
            budget -= num_new
            rows.append((seq, num_new))

    @property
    def _num_places(self) -> int:
        return self.config.max_num_seqs - len(self._running)

    def _num_admissible(self) -> int:
        """How many waiting sequences have a place and blocks now, as far as can be told without the prefix cache."""
        num_places = self._num_places
        num_available = self._blocks.num_available - len(self._running)
        count = 0
        for seq in self._waiting:
            if count >= num_places:
                break
            if self._groups.is_held_back(seq):
                continue
            num_needed = self._blocks.num_blocks_for(len(seq.tokens))
            if num_needed > num_available:
                # The first must not be left out, or a full pipeline would never look at it.
                return count or int(self._find_room(seq) is not None)
            num_available -= num_needed + 1
            count += 1
        return count

    def _num_missing_blocks(self, seq: Sequence) -> int:
        return self._blocks.num_blocks_for(len(seq.tokens)) - len(seq.block_table)

    def _find_room(self, seq: Sequence) -> list[int] | None:
        """Blocks the prefix cache has for a waiting sequence; None where those it still needs are not to be had."""
        return self._blocks.find_room(
            seq.tokens,
            max_cached_tokens=seq.max_cached_tokens,
            # Or the next decode of a running sequence would preempt the newcomer.
            num_reserved=len(self._running),
        )

    # ------------------------------------------------------------------ transitions

    def _admit(self, seq: Sequence, now: float) -> bool:
        """Give a waiting sequence the blocks of all its known tokens; False where they are not to be had."""
        cached = self._find_room(seq)
        if cached is None:
            return False
        self._blocks.acquire(cached, seq.block_table)
        self._blocks.allocate(self._num_missing_blocks(seq), seq.block_table)
        seq.num_computed = len(cached) * self._blocks.block_size
        seq.status = SequenceStatus.RUNNING
        self._running.add(seq)
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = now
            seq.num_cached_tokens = seq.num_computed
            self._num_prompt_tokens += seq.num_prompt_tokens
            self._num_prefix_hit_tokens += seq.num_computed
        return True

    def _make_room(self, seq: Sequence, chosen: Collection[Sequence]) -> bool:
        """Give ``seq`` the blocks of all its known tokens, preempting who ranks lower and is in no step.

        False where only such could help that rank higher or are in a step: it keeps its turn and tries again.
        """
        num_missing = self._num_missing_blocks(seq)
        if num_missing == 0:
            return True
        while self._blocks.num_available < num_missing:
            victim = max((s for s in self._ready if s not in chosen), key=_rank)
            if victim is seq:
                return False
            del self._ready[victim]
            self._back_to_waiting(victim)
            victim.num_preemptions += 1
            self._num_preemptions += 1
        self._blocks.allocate(num_missing, seq.block_table)
        return True

    def _advance(self, chunk: Chunk, tokens: list[int], now: float) -> SequenceUpdate:
        seq = chunk.sequence
        num_computed = seq.num_computed + chunk.num_new
        self._blocks.publish(seq.block_table, seq.tokens, start=seq.num_computed, stop=num_computed)
        seq.num_computed = num_computed
        seq.num_prompt_logprobs += chunk.num_targets
        seq.in_flight = None
        self._groups.note_computed(seq)

        end = seq.end_requested
        if end is not None:
            self._end(seq, end, now)
            return SequenceUpdate(sequence=seq, finished=True)
        new_token_ids: tuple[int, ...] = ()
        if chunk.sample_index is not None:
            token = int(tokens[chunk.sample_index])
            new_token_ids = (token,)
            seq.tokens.append(token)
            if seq.first_token_time is None:
                seq.first_token_time = now
            end = seq.end_after(token, max_len=self.max_len)
        elif seq.num_remaining == 0:
            end = SequenceEnd("length")  # max_tokens = 0: the prompt was to be scored
        if end is not None:
            self._end(seq, end, now)
        else:
            self._ready[seq] = None
        return SequenceUpdate(
            sequence=seq,
            new_token_ids=new_token_ids,
            finished=end is not None,
            sample_index=chunk.sample_index,
            prompt_logprobs_index=chunk.prompt_logprobs_index,
        )

    def _back_to_waiting(self, seq: Sequence) -> None:
        """Drop the KV of a running sequence in no step; it keeps its tokens and its rank."""
        self._blocks.release(seq.block_table)
        seq.num_computed = 0
        seq.status = SequenceStatus.WAITING
        self._running.remove(seq)
        self._ready.pop(seq, None)
        insort(self._waiting, seq, key=_rank)

    def _end(self, seq: Sequence, end: SequenceEnd, now: float) -> None:
        """End a sequence in no step and give its blocks back."""
        assert seq.in_flight is None
        if seq.status is SequenceStatus.RUNNING:
            self._blocks.release(seq.block_table)
            self._running.remove(seq)
            self._ready.pop(seq, None)
        else:
            del self._waiting[bisect_left(self._waiting, seq.order, key=_rank)]
        seq.status = SequenceStatus.FINISHED
        seq.end = end
        seq.end_requested = None
        seq.finish_time = now
        self._groups.remove(seq)


def _rank(seq: Sequence) -> tuple[int, int, int]:
    return seq.order
