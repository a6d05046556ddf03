"""Sequences that go from one pipeline's scheduler to another's, whenever: tokens and rank stay, nothing is lost."""

from __future__ import annotations

import random
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import DEFAULTS, make_seq
from scheduler_sim import Simulation, reference

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.scheduler import Scheduler


def make_sims(num: int, *, num_blocks: int = 60) -> list[Simulation]:
    arrivals = count()
    return [
        Simulation(
            Scheduler(DEFAULTS, num_blocks=num_blocks, block_size=4, arrivals=arrivals), num_stages=1 + i, block_size=4
        )
        for i in range(num)
    ]


def hand_over(source: Simulation, targets: list[Simulation], rng: random.Random) -> list[Sequence]:
    """Everything of ``source`` goes to ``targets``, sibling sequences to the same one. Those that ended."""
    ended, going = source.scheduler.hand_over(now=source.now)
    source.pipeline.steps.clear()
    for request_id in {seq.request_id: None for seq in going}:
        target = rng.choice(targets)
        sequences = [seq for seq in going if seq.request_id == request_id]
        assert target.scheduler.take_over(sequences, now=target.now) == []
        for seq in sequences:
            target.sequences.append(seq)
            target.outputs[seq] = source.outputs.pop(seq)
            target.prompt_logprobs[seq] = source.prompt_logprobs.pop(seq)
    source.sequences.clear()
    for sim in (source, *targets):
        sim.scheduler.check_integrity()
    return ended


def act(sim: Simulation, rng: random.Random) -> None:
    for _ in range(rng.randrange(4)):
        if rng.random() < 0.5 or not sim.pipeline.steps:
            sim.submit()
        elif rng.random() < 0.9:
            sim.complete()
        else:
            while sim.pipeline.steps[0].num_stages_passed == sim.pipeline.num_stages:
                sim.complete()
                if not sim.pipeline.steps:
                    return
            sim.fail(0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_tokens_stay_the_same_however_often_sequences_go_elsewhere(seed: int) -> None:
    rng = random.Random(seed)
    sims = make_sims(3)
    everything: list[Sequence] = []
    beginning = [rng.randrange(30) for _ in range(20)]
    for number in range(12):
        prompt = beginning[: rng.randrange(20)] + [rng.randrange(30) for _ in range(rng.randrange(1, 20))]
        sequences = [
            make_seq(f"r{number}", prompt, index=i, priority=rng.randrange(2), max_tokens=rng.randrange(1, 20))
            for i in range(rng.choice((1, 1, 3)))
        ]
        rng.choice(sims).add(*sequences)
        everything += sequences
        for _ in range(rng.randrange(5)):
            act(rng.choice(sims), rng)
        if rng.random() < 0.4:
            source = rng.choice(sims)
            assert hand_over(source, [sim for sim in sims if sim is not source], rng) == []
            assert source.scheduler.is_idle
    for sim in sims:
        sim.drain(max_steps=5000)
        stats = sim.scheduler.stats()
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    outputs = {seq: output for sim in sims for seq, output in sim.outputs.items()}
    for seq in everything:
        assert outputs[seq] == reference(seq.prompt_token_ids, seq.params, seq.index, 240)[0]


def test_who_came_first_is_served_first_wherever() -> None:
    first, second = make_sims(2)
    seqs = [make_seq(name, 8) for name in "abcd"]
    for sim, seq in zip((first, second, first, second), seqs, strict=True):
        sim.add(seq)
    first.submit()
    _, going = first.scheduler.hand_over(now=0.0)
    assert going == [seqs[0], seqs[2]]
    second.scheduler.take_over(going, now=0.0)
    assert second.scheduler._pool.waiting == seqs


def test_an_end_that_was_asked_for_comes_before_the_sequence_goes() -> None:
    first = make_sims(1)[0]
    ending, going_on = make_seq("a", 8), make_seq("b", 8)
    first.add(ending)
    first.add(going_on)
    first.submit()
    assert first.scheduler.abort("a", now=1.0) == []
    ended, going = first.scheduler.hand_over(now=1.0)
    assert (ended, going) == ([ending], [going_on])
    assert ending.finish_reason == "abort"
    assert first.scheduler.complete(0, [1, 2], now=2.0) == []  # void


def test_who_failed_is_tried_alone_there_too_and_here_no_more() -> None:
    first, second = make_sims(2)
    suspect, other = make_seq("a", 8), make_seq("b", 8)
    first.add(suspect)
    first.submit()
    first.fail(0)
    second.add(other)
    _, going = first.scheduler.hand_over(now=1.0)
    assert first.submit() is None
    second.scheduler.take_over(going, now=1.0)
    batch = second.scheduler.schedule(step=0, epoch=1, num_stages=1, now=1.0)
    assert batch is not None
    assert batch.header.num_seqs == 1
    assert suspect.in_flight == 0


def test_what_does_not_fit_there_ends() -> None:
    first = make_sims(1)[0]
    small = make_sims(1, num_blocks=4)[0]
    begun, unbegun = make_seq("a", 14, max_tokens=30), make_seq("b", 40)
    first.add(begun)
    for _ in range(3):
        first.submit()
        first.complete()
    first.add(unbegun)
    _, going = first.scheduler.hand_over(now=1.0)
    assert small.scheduler.take_over(going, now=1.0) == [begun, unbegun]
    assert (begun.finish_reason, unbegun.finish_reason) == ("length", "error")
