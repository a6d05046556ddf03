"""Whatever happens in whatever order, every sequence gets the tokens it would get alone, and all blocks come back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_sim import EOS, Simulation, digest_of, reference

from flexpipe_serve.engine import scheduler as scheduler_module
from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import InvalidRequestError, QueueFullError, RefactorRefusedError

# Relative frequencies. A uniform choice would seldom leave a sequence alive long enough to be preempted.
_ACTIONS = {
    "submit": 6, "advance": 6, "complete": 6, "run": 4, "add": 5,
    "abort": 1, "finish": 1, "fail": 2,
    "shrink": 2, "decommit": 2, "grow": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_copies_in_a_step() -> Iterator[None]:
    """So that a small KV cache takes several steps to shrink."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "_MAX_COPIES", 2)
        yield


class History:
    """Random events on a scheduler, all of them drawn from ``rng``."""

    def __init__(self, sim: Simulation, rng: random.Random, *, max_blocks: int) -> None:
        self.sim = sim
        self.rng = rng
        self.max_blocks = max_blocks
        self.num_requests = 0
        self.cut_short: set[Sequence] = set()
        """Sequences ended from outside: their output is a beginning of the reference's."""
        self.has_waited_for_growth = False
        self.max_len_of: dict[Sequence, int] = {}

    def act(self) -> None:
        # A reset is rare: it empties the cache and all tables, where trouble could build up.
        name = "reset" if self.rng.random() < 0.01 else self.rng.choices([*_ACTIONS], [*_ACTIONS.values()])[0]
        getattr(self, name)()
        stats = self.sim.scheduler.stats()
        if self.sim.scheduler.is_shrunk:
            in_use = self.sim.scheduler.blocks_in_use()
            assert len(in_use) == stats.num_used_blocks + stats.num_cached_blocks
            assert (in_use < stats.num_blocks).all()
        num_kv_tokens = stats.num_blocks * self.sim.pipeline.block_size
        self.has_waited_for_growth |= any(
            not seq.is_finished and seq.num_output_tokens and len(seq.tokens) > num_kv_tokens
            for seq in self.sim.sequences
        )

    def add(self) -> None:
        rng = self.rng
        if self.sim.sequences and rng.random() < 0.3:  # a conversation's next turn
            prompt = [*rng.choice(self.sim.sequences).tokens.view().tolist(), rng.randrange(4)]
        else:  # few distinct beginnings, so that prompts share prefixes of many lengths
            prompt = (rng.choice(([0], [0, 1], [1, 2, 3])) * 8)[: rng.randrange(20)]
            prompt += [rng.randrange(4) for _ in range(rng.randrange(3))]
        params = SamplingParams(
            max_tokens=rng.choice((0, 1, 5, 20, 30)),
            seed=rng.randrange(4),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice(((), (30,))),
            prompt_logprobs=rng.random() < 0.3,
            presence_penalty=rng.choice((0.0, 0.5)),
        )
        priority = rng.choice((-1, 0, 0, 1))
        sequences = [
            Sequence(
                request_id=f"r{self.num_requests}",
                prompt_token_ids=prompt,
                params=params,
                index=index,
                priority=priority,
                eos_token_ids=[EOS],
            )
            for index in range(rng.choice((1, 1, 2, 3)))
        ]
        before = self.sim.scheduler.stats()
        try:
            self.sim.add(*sequences)
        except (InvalidRequestError, QueueFullError):
            assert self.sim.scheduler.stats() == before
            return
        self.num_requests += 1
        self.max_len_of.update(dict.fromkeys(sequences, self.sim.scheduler.max_len))

    def submit(self) -> None:
        self.sim.submit()

    def advance(self) -> None:
        if self.sim.pipeline.steps:
            self.sim.pipeline.advance(self.rng.randrange(len(self.sim.pipeline.steps)))

    def complete(self) -> None:
        if self.sim.pipeline.steps:
            self.sim.complete()

    def run(self) -> None:
        for _ in range(self.rng.randrange(8)):
            while self.sim.submit() is not None:
                pass
            self.complete()

    def abort(self) -> None:
        request_id = f"r{self.rng.randrange(self.num_requests + 1)}"
        unfinished = {s for s in self.sim.sequences if s.request_id == request_id and not s.is_finished}
        ended = self.sim.scheduler.abort(request_id, now=self.sim.now)
        assert set(ended) == {s for s in unfinished if s.in_flight is None}
        self.cut_short |= unfinished
        self.sim.ended.update(ended)

    def finish(self) -> None:
        if self.sim.sequences:
            seq = self.rng.choice(self.sim.sequences)
            if not seq.is_finished:
                self.cut_short.add(seq)
            self.sim.scheduler.finish(seq, "stop", "END", now=self.sim.now)
            if seq.is_finished:
                self.sim.ended.add(seq)

    def fail(self) -> None:
        pipeline = self.sim.pipeline
        on_the_way = [i for i, step in enumerate(pipeline.steps) if step.num_stages_passed < pipeline.num_stages]
        with_copies = [i for i in on_the_way if pipeline.steps[i].batch.header.copies]
        if on_the_way:
            pipeline.fail(self.rng.choice(with_copies or on_the_way))

    def shrink(self) -> None:
        scheduler = self.sim.scheduler
        before, max_len = scheduler.stats(), scheduler.max_len
        # Close to what has content, or nothing would have to move.
        least = before.num_used_blocks + self.rng.randrange(before.num_cached_blocks + 1)
        num_blocks = min(max(3, least + self.rng.randrange(-1, 4)), before.num_blocks)
        try:
            scheduler.shrink(num_blocks)
        except RefactorRefusedError:
            assert scheduler.stats() == before
            return
        after = scheduler.stats()
        assert (after.num_blocks, after.num_used_blocks) == (num_blocks, before.num_used_blocks)
        assert scheduler.max_len == max_len

    def decommit(self) -> None:
        self.sim.decommit()

    def grow(self) -> None:
        num_blocks = self.sim.scheduler.stats().num_blocks
        grown = max(num_blocks, self.rng.choice((num_blocks, *range(6, self.max_blocks))))
        self._note_too_long(self.sim.grow(grown))

    def reset(self) -> None:
        self._note_too_long(self.sim.reset(self.rng.randrange(4, self.max_blocks)))

    def _note_too_long(self, ended: list[Sequence]) -> None:
        """What sequences can count on is another number of blocks than before."""
        self.cut_short.update(ended)
        for seq in self.sim.sequences:
            if not seq.is_finished:
                self.max_len_of[seq] = self.sim.scheduler.max_len
                if seq.end_requested is not None:
                    self.cut_short.add(seq)

    def check_end(self) -> None:
        """Run dry, then compare every sequence with the reference."""
        sim = self.sim
        self.grow()
        # Every token may in the worst case cost the recomputation of all others, chunk by chunk.
        num_tokens = sum(s.num_prompt_tokens + s.params.max_tokens for s in sim.sequences if not s.is_finished)
        sim.drain(max_steps=20 + 10 * num_tokens)
        for seq in sim.sequences:
            self._check_sequence(seq)
        stats = sim.scheduler.stats()
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
        assert stats.num_used_blocks == stats.num_running == stats.num_waiting == stats.num_steps_in_flight == 0

    def _check_sequence(self, seq: Sequence) -> None:
        output = self.sim.outputs[seq]
        assert seq in self.sim.ended
        assert output == seq.output_token_ids
        assert (seq.first_token_time is not None) == bool(output)
        prompt = seq.prompt_token_ids
        logprobs = [(digest_of(prompt[:i]), prompt[i]) for i in range(1, len(prompt)) if seq.params.prompt_logprobs]
        expected, reason = reference(prompt, seq.params, seq.index, self.max_len_of[seq])
        if seq in self.cut_short:
            got = self.sim.prompt_logprobs[seq]
            assert (output, got) == (expected[: len(output)], logprobs[: len(got)])
        else:
            assert (output, seq.finish_reason) == (expected, reason)
            assert self.sim.prompt_logprobs[seq] == logprobs

    def reached(self) -> Counter[str]:
        """Which of the situations worth testing the history has been in."""
        sequences = self.sim.sequences
        seen = self.sim.seen
        stats = self.sim.scheduler.stats()
        return Counter(
            {
                "preempted": stats.num_preemptions > 0,
                "prefix hit": stats.num_prefix_hit_tokens > 0,
                "copied": seen["copies"] > 0,
                "copies in two steps in flight": seen["copies in two steps in flight"] > 0,
                "step of copies alone": seen["steps of copies alone"] > 0,
                "step with copies failed": seen["failed steps with copies"] > 0,
                "grown while shrinking": seen["grown while shrinking"] > 0,
                "too long until the cache grows": self.has_waited_for_growth,
                "decommitted": seen["decommits"] > 0,
                "step failed": any(s.num_failed_steps for s in sequences),
                "scoring interrupted": any(
                    s.params.prompt_logprobs and s.num_preemptions + s.num_failed_steps for s in sequences
                ),
            }
        )


def play(seed: int) -> History:
    """A random history on a random scheduler, to its end."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice((1, 2, 4, 6))
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 5, 16)),
        max_waiting=rng.choice((0, 8)),
        max_model_len=rng.choice((2, 13, 40, 40)),
        prefix_cache=rng.random() < 0.7,
    )
    block_size = rng.choice((1, 2, 4))
    max_blocks = rng.choice((24, 24, 100))  # few to be short of them, many to move
    scheduler = Scheduler(config, num_blocks=rng.randrange(6, max_blocks), block_size=block_size)
    sim = Simulation(scheduler, num_stages=rng.randrange(1, 5), block_size=block_size)
    history = History(sim, rng, max_blocks=max_blocks)
    for _ in range(150):
        history.act()
        scheduler.check_integrity()
    history.check_end()
    return history


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_sequence_gets_its_tokens(seed: int) -> None:
    play(seed)


def test_the_histories_reach_what_they_are_for() -> None:
    reached: Counter[str] = Counter()
    for seed in range(60):
        reached += play(seed).reached()
    assert all(reached[name] >= 3 for name in play(0).reached()), reached
