"""A pipeline that does nothing but remember which token it wrote where, and a reference for what it must answer.

Every stage keeps its own KV: slot (block, offset) -> (token, digest of all tokens up to it). A step recomputes the
digest of everything it attends to, so one wrong, stale or missing token anywhere in its context is seen; and the next
token is a function of that digest, so a context that belongs to somebody else is seen in the output.

Every stage takes the steps in the order sent, each at its own time, and makes a step's copies before it computes. A
copy leaves nothing behind where it came from, so whoever looks there afterwards is seen too.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from flexpipe_serve.engine.request import Sequence, SequenceUpdate
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.pipeline.messages import StepBatch

VOCAB = 32
EOS = 31
GARBAGE = (-1, -1)


def digest(prefix_digest: int, token: int) -> int:
    return ((prefix_digest ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % (1 << 61)


def digest_of(tokens: list[int]) -> int:
    result = 0
    for token in tokens:
        result = digest(result, token)
    return result


def next_token(context_digest: int, seed: int, position: int) -> int:
    return (context_digest ^ (seed * 7919 + position * 104729)) % 1009 % VOCAB


def reference(prompt: list[int], params: SamplingParams, index: int, max_len: int) -> tuple[list[int], str]:
    """Output tokens and finish reason that a sequence must have, from the rules alone."""
    tokens = list(prompt)
    output: list[int] = []
    if params.max_tokens == 0:
        return [], "length"
    while True:
        token = next_token(digest_of(tokens), params.seed + index, len(tokens))
        tokens.append(token)
        output.append(token)
        if token == EOS and not params.ignore_eos:
            return output, "stop"
        if token in params.stop_token_ids:
            return output, "stop"
        if len(output) == params.max_tokens or len(tokens) == max_len:
            return output, "length"


def tables_of(batch: StepBatch, block_size: int) -> list[list[int]]:
    """The blocks of each row, without padding."""
    num_blocks = -(-(batch.num_computed + batch.num_new) // block_size)
    return [table[:num].tolist() for table, num in zip(batch.block_tables, num_blocks, strict=True)]


@dataclass
class Result:
    token_ids: list[int]
    prompt_logprobs: list[list[tuple[int, int]]]


@dataclass
class _Submitted:
    batch: StepBatch
    num_stages_passed: int = 0
    has_failed: bool = False
    result: Result | None = None


@dataclass
class FakePipeline:
    num_stages: int
    block_size: int
    num_blocks: int
    """Blocks the stages have memory for."""
    steps: deque[_Submitted] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.kv: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in range(self.num_stages)]

    def submit(self, batch: StepBatch) -> None:
        self._check_no_block_is_shared_and_written(batch)
        self._check_copies(batch)
        self.steps.append(_Submitted(batch))
        assert len(self.steps) <= self.num_stages

    def advance(self, position: int) -> None:
        """Let the step at ``position`` pass one more stage, if the step before it is already through there."""
        step = self.steps[position]
        limit = self.steps[position - 1].num_stages_passed if position else self.num_stages
        if step.num_stages_passed < limit:
            kv = self.kv[step.num_stages_passed]
            self._copy(step.batch, kv)
            if step.has_failed:  # whatever it wrote before it raised, and would have written
                kv.update(dict.fromkeys((slot for slots in self._written_slots(step.batch) for slot in slots), GARBAGE))
            else:
                step.result = self._execute(step.batch, kv)
            step.num_stages_passed += 1

    def result(self) -> tuple[int, Result | None]:
        """The oldest step's number and result, None where it failed."""
        while self.steps[0].num_stages_passed < self.num_stages:
            self.advance(0)
        step = self.steps.popleft()
        assert step.has_failed == (step.result is None)
        return step.batch.header.step, step.result

    def fail(self, position: int) -> None:
        """The step raises at its next stage; those behind drop it. The Router hears of it when its turn has come."""
        step = self.steps[position]
        assert step.num_stages_passed < self.num_stages
        step.has_failed = True
        step.result = None

    def resize(self, num_blocks: int) -> None:
        """Commit or decommit KV memory. No step in flight may need what goes, and what comes is empty."""
        assert all(max(self._touched(step.batch), default=0) < num_blocks for step in self.steps), "a step needs it"
        self.kv = [{slot: value for slot, value in kv.items() if slot[0] < num_blocks} for kv in self.kv]
        self.num_blocks = num_blocks

    def lose(self) -> None:
        """All stages die with their KV."""
        self.steps.clear()
        self.__post_init__()

    def _written_slots(self, batch: StepBatch) -> list[list[tuple[int, int]]]:
        size = self.block_size
        return [
            [(int(table[p // size]), p % size) for p in range(first, first + num)]
            for table, first, num in zip(batch.block_tables, batch.num_computed, batch.num_new, strict=True)
        ]

    def _check_no_block_is_shared_and_written(self, batch: StepBatch) -> None:
        rows = []
        for other in [*(step.batch for step in self.steps), batch]:
            for table, slots in zip(tables_of(other, self.block_size), self._written_slots(other), strict=True):
                assert len(set(table)) == len(table)
                rows.append((set(table), {block for block, _ in slots}))
        for i, (_, written) in enumerate(rows):
            for j, (table, _) in enumerate(rows):
                assert i == j or not written & table, "a block is written by one row and in the table of another"

    def _check_copies(self, batch: StepBatch) -> None:
        copies = batch.header.copies
        sources, targets = {source for source, _ in copies}, {target for _, target in copies}
        assert len(sources | targets) == 2 * len(copies), "a block is in two copies"
        touched = self._touched(batch)
        assert max(touched) < self.num_blocks, "there is no such block"
        moved_from = {source for step in self.steps for source, _ in step.batch.header.copies}
        assert not moved_from & touched, "used again before its copy is over"
        assert not sources & set().union(*tables_of(batch, self.block_size)), "a step uses what it has moved away"
        in_flight: set[int] = set().union(*(t for step in self.steps for t in tables_of(step.batch, self.block_size)))
        assert not targets & in_flight, "a copy to where a step works"

    def _touched(self, batch: StepBatch) -> set[int]:
        """All blocks that the step reads or writes."""
        return set().union(*tables_of(batch, self.block_size), *batch.header.copies)

    def _copy(self, batch: StepBatch, kv: dict[tuple[int, int], tuple[int, int]]) -> None:
        for source, target in batch.header.copies:
            for offset in range(self.block_size):
                kv.pop((target, offset), None)
                if (source, offset) in kv:
                    kv[target, offset] = kv.pop((source, offset))

    def _execute(self, batch: StepBatch, kv: dict[tuple[int, int], tuple[int, int]]) -> Result:
        size = self.block_size
        header = batch.header
        assert header.num_seqs == len(batch.num_new) == len(batch.num_computed) == len(batch.block_tables)
        assert header.num_tokens == len(batch.token_ids) == batch.num_new.sum()
        assert (batch.num_new >= 1).all()
        assert header.num_seqs or (header.copies and header.num_tokens == header.table_width == 0)
        contexts: list[list[int]] = []
        digests: list[list[int]] = []
        written = self._written_slots(batch)
        new_tokens = np.split(batch.token_ids, np.cumsum(batch.num_new)[:-1])
        for row, table in enumerate(batch.block_tables):
            tokens: list[int] = []
            row_digests = [0]
            for p in range(batch.num_computed[row]):
                token, stored = kv[int(table[p // size]), p % size]
                tokens.append(token)
                row_digests.append(digest(row_digests[-1], token))
                assert stored == row_digests[-1], f"step {header.step} row {row}: wrong KV at position {p}"
            for slot, token in zip(written[row], new_tokens[row].tolist(), strict=True):
                tokens.append(token)
                row_digests.append(digest(row_digests[-1], token))
                kv[slot] = (token, row_digests[-1])
            contexts.append(tokens)
            digests.append(row_digests)

        histories = batch.histories.tolist()
        token_ids = []
        for spec in header.samples:
            assert spec.position == len(contexts[spec.row])
            if spec.num_history:
                assert histories[: spec.num_history] == contexts[spec.row]
                del histories[: spec.num_history]
            token_ids.append(next_token(digests[spec.row][-1], spec.seed, spec.position))
        assert not histories
        targets = batch.targets.tolist()
        prompt_logprobs = []
        for lp in header.prompt_logprobs:
            assert 1 <= lp.num_targets <= batch.num_new[lp.row]
            first = int(batch.num_computed[lp.row])
            befores = digests[lp.row][first + 1 : first + 1 + lp.num_targets]
            prompt_logprobs.append(list(zip(befores, targets[: lp.num_targets], strict=True)))
            del targets[: lp.num_targets]
        assert not targets
        return Result(token_ids, prompt_logprobs)


class Simulation:
    """Scheduler and pipeline together; collects what an engine would hand to its clients."""

    def __init__(self, scheduler: Scheduler, *, num_stages: int, block_size: int) -> None:
        self.scheduler = scheduler
        self.pipeline = FakePipeline(num_stages, block_size, scheduler.stats().num_blocks)
        self.now = 0.0
        self.next_step = 0
        self.sequences: list[Sequence] = []
        self.outputs: dict[Sequence, list[int]] = {}
        self.prompt_logprobs: dict[Sequence, list[tuple[int, int]]] = {}
        self.ended: set[Sequence] = set()
        self.seen: Counter[str] = Counter()
        """What happened to the blocks."""

    def add(self, *sequences: Sequence) -> None:
        self.scheduler.add(*sequences)
        for seq in sequences:
            self.sequences.append(seq)
            self.outputs[seq] = []
            self.prompt_logprobs[seq] = []

    def submit(self) -> StepBatch | None:
        self.now += 1
        batch = self.scheduler.schedule(
            step=self.next_step, epoch=3, num_stages=self.pipeline.num_stages, now=self.now, patched_through=7
        )
        if batch is not None:
            assert (batch.header.step, batch.header.epoch, batch.header.patched_through) == (self.next_step, 3, 7)
            num_blocks = self.scheduler.stats().num_blocks
            assert all(source >= num_blocks > target for source, target in batch.header.copies)
            assert len(batch.header.copies) <= 8
            self.seen["copies"] += len(batch.header.copies)
            self.seen["steps of copies alone"] += batch.header.num_seqs == 0
            if batch.header.copies:
                others = [step for step in self.pipeline.steps if step.batch.header.copies]
                self.seen["copies in two steps in flight"] += bool(others)
            assert batch.header.num_tokens <= self.scheduler.config.max_num_batched_tokens
            assert self.scheduler.stats().num_running <= self.scheduler.config.max_num_seqs
            unfinished = sum(1 for seq in self.sequences if not seq.is_finished)
            assert batch.header.num_seqs <= -(-unfinished // self.pipeline.num_stages)
            self.next_step += 1
            self.pipeline.submit(batch)
        return batch

    def complete(self) -> list[SequenceUpdate]:
        self.now += 1
        has_copies = bool(self.pipeline.steps[0].batch.header.copies)
        step, result = self.pipeline.result()
        if result is None:
            self.seen["failed steps with copies"] += has_copies
            return self._take_failure(step)
        updates = self.scheduler.complete(step, result.token_ids, now=self.now)
        for update in updates:
            self._note(update)
            if update.sample_index is not None:
                assert update.new_token_ids == (result.token_ids[update.sample_index],)
            if update.prompt_logprobs_index is not None:
                self.prompt_logprobs[update.sequence] += result.prompt_logprobs[update.prompt_logprobs_index]
        return updates

    def fail(self, position: int) -> list[SequenceUpdate]:
        """The step fails, the steps before it end, and the failure arrives."""
        self.pipeline.fail(position)
        for _ in range(position):
            self.complete()
        return self.complete()

    def _take_failure(self, step: int) -> list[SequenceUpdate]:
        updates = self.scheduler.fail_step(step, now=self.now)
        for update in updates:
            assert not update.new_token_ids
            self._note(update)
        assert self.scheduler.complete(step, [], now=self.now) == []
        return updates

    def reset(self, num_blocks: int) -> list[Sequence]:
        self.pipeline.lose()
        self.pipeline.num_blocks = num_blocks
        ended = self.scheduler.reset(num_blocks, now=self.now)
        self.ended.update(ended)
        return ended

    def decommit(self) -> None:
        """What the stages do once nothing is above the limit any more."""
        num_blocks = self.scheduler.stats().num_blocks
        if self.scheduler.is_shrunk and num_blocks < self.pipeline.num_blocks:
            self.seen["decommits"] += 1
            self.pipeline.resize(num_blocks)

    def grow(self, num_blocks: int) -> list[Sequence]:
        self.seen["grown while shrinking"] += not self.scheduler.is_shrunk
        if num_blocks > self.pipeline.num_blocks:
            self.pipeline.resize(num_blocks)
        ended = self.scheduler.grow(num_blocks, now=self.now)
        self.ended.update(ended)
        return ended

    def drain(self, max_steps: int) -> None:
        """Run until nothing is left to do, with the pipeline as full as the scheduler allows."""
        first = self.next_step
        while not self.scheduler.is_idle:
            while self.submit() is not None:
                pass
            assert self.pipeline.steps, "nothing can run, yet sequences are unfinished"
            self.complete()
            self.scheduler.check_integrity()
            assert self.next_step - first <= max_steps, f"not done after {max_steps} steps"
        while self.pipeline.steps:  # of copies alone
            self.complete()

    def _note(self, update: SequenceUpdate) -> None:
        seq = update.sequence
        assert seq not in self.ended, "an update after the end"
        assert update.finished == seq.is_finished
        self.outputs[seq] += update.new_token_ids
        if update.finished:
            self.ended.add(seq)
