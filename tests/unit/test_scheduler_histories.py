"""Whatever happens in whatever order, every sequence gets the tokens it would get alone, and all blocks come back."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_sim import EOS, VOCAB, Simulation, digest_of, reference

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import InvalidRequestError, QueueFullError

# Few distinct beginnings, so that prompts share prefixes of many lengths.
_PROMPTS = st.builds(
    lambda base, cut, tail: (base * 8)[:cut] + tail,
    base=st.sampled_from([[0], [0, 1], [1, 2, 3]]),
    cut=st.integers(0, 20),
    tail=st.lists(st.integers(0, VOCAB - 2), max_size=3),
)


class SchedulerHistories(RuleBasedStateMachine):
    @initialize(
        num_stages=st.integers(1, 4),
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(2, 24),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 16),
        max_waiting=st.integers(0, 8),
        max_model_len=st.integers(2, 40),
        prefix_cache=st.booleans(),
    )
    def start(
        self,
        num_stages: int,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        extra_budget: int,
        max_waiting: int,
        max_model_len: int,
        prefix_cache: bool,
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            max_waiting=max_waiting,
            max_model_len=max_model_len,
            prefix_cache=prefix_cache,
        )
        scheduler = Scheduler(config, num_blocks=num_blocks, block_size=block_size)
        self.sim = Simulation(scheduler, num_stages=num_stages, block_size=block_size)
        self.block_size = block_size
        self.num_requests = 0
        self.cut_short: set[Sequence] = set()
        """Sequences ended from outside: their output is a beginning of the reference's."""
        self.max_lens: dict[Sequence, int] = {}

    @rule(
        prompt=_PROMPTS,
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        max_tokens=st.integers(0, 24),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (4,)]),
        prompt_logprobs=st.booleans(),
        presence_penalty=st.sampled_from([0.0, 0.5]),
    )
    def add(self, prompt: list[int], n: int, priority: int, **params: Any) -> None:
        request_id = f"r{self.num_requests}"
        sequences = [
            Sequence(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=SamplingParams(**params),
                index=index,
                priority=priority,
                eos_token_ids=[EOS],
            )
            for index in range(n)
        ]
        before = self.sim.scheduler.stats()
        try:
            self.sim.add(*sequences)
        except (InvalidRequestError, QueueFullError):
            assert self.sim.scheduler.stats() == before
            return
        self.num_requests += 1
        self.max_lens.update(dict.fromkeys(sequences, self.sim.scheduler.max_len))

    @rule()
    def submit(self) -> None:
        self.sim.submit()

    @rule()
    def fill(self) -> None:
        while self.sim.submit() is not None:
            pass

    @precondition(lambda self: self.sim.pipeline.steps)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        self.sim.pipeline.advance(data.draw(st.integers(0, len(self.sim.pipeline.steps) - 1)))

    @precondition(lambda self: self.sim.pipeline.steps)
    @rule()
    def complete(self) -> None:
        self.sim.complete()

    @rule(num_rounds=st.integers(1, 8))
    def run(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.fill()
            if self.sim.pipeline.steps:
                self.complete()

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = f"r{data.draw(st.integers(0, self.num_requests - 1))}"
        unfinished = {s for s in self.sim.sequences if s.request_id == request_id and not s.is_finished}
        ended = self.sim.scheduler.abort(request_id, now=self.sim.now)
        assert set(ended) == {s for s in unfinished if s.in_flight is None}
        self.cut_short |= unfinished
        self.sim.ended.update(ended)

    @precondition(lambda self: self.sim.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.sim.sequences))
        if not seq.is_finished:
            self.cut_short.add(seq)
        self.sim.scheduler.finish(seq, "stop", "END", now=self.sim.now)
        if seq.is_finished:
            self.sim.ended.add(seq)

    @precondition(lambda self: self.sim.pipeline.steps)
    @rule(data=st.data())
    def fail_step(self, data: st.DataObject) -> None:
        self.sim.fail(data.draw(st.integers(0, len(self.sim.pipeline.steps) - 1)))

    @rule(num_blocks=st.integers(2, 24))
    def reset(self, num_blocks: int) -> None:
        ended = self.sim.reset(num_blocks)
        self.cut_short.update(ended)
        max_len = self.sim.scheduler.max_len
        for seq in self.sim.sequences:
            if not seq.is_finished:
                self.max_lens[seq] = max_len

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "sim"):
            self.sim.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        sim = self.sim
        # Every token may in the worst case cost the recomputation of all others, chunk by chunk.
        num_tokens = sum(s.num_prompt_tokens + s.params.max_tokens for s in sim.sequences if not s.is_finished)
        sim.drain(max_steps=20 + 10 * num_tokens)
        for seq in sim.sequences:
            self._check_end(seq)
        stats = sim.scheduler.stats()
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
        assert stats.num_used_blocks == stats.num_running == stats.num_waiting == stats.num_steps_in_flight == 0

    def _check_end(self, seq: Sequence) -> None:
        output = self.sim.outputs[seq]
        assert seq in self.sim.ended
        assert output == seq.output_token_ids
        expected, reason = reference(seq.prompt_token_ids, seq.params, seq.index, self.max_lens[seq])
        assert (seq.first_token_time is not None) == bool(output)
        targets = seq.prompt_token_ids
        logprobs = [(digest_of(targets[:i]), targets[i]) for i in range(1, len(targets))]
        if not seq.params.prompt_logprobs:
            logprobs = []
        got = self.sim.prompt_logprobs[seq]
        if seq in self.cut_short:
            assert output == expected[: len(output)]
            assert got == logprobs[: len(got)]
        else:
            assert output == expected
            assert seq.finish_reason == reason
            assert got == logprobs


SchedulerHistories.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedulerHistories = SchedulerHistories.TestCase
