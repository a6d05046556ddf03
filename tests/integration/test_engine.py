"""The engine over real stages (threads) and a tiny random model: ends, aborts, losses, replay, layouts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import collect, even_layout, generate, generate_all, running_engine, tokens_of
from tiny_models import make_checkpoint

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.errors import InvalidRequestError, QueueFullError
from flexpipe_serve.pipeline import stage as stage_module
from flexpipe_serve.pipeline.local_host import LocalStageHost

NUM_STAGES = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    # Any tokenizer does: its ids beyond the tiny vocabulary are never sampled.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return folder


@pytest.fixture
def host() -> LocalStageHost:
    return LocalStageHost()


@pytest.fixture
def engine(tiny: Path, host: LocalStageHost) -> Iterator[Engine]:
    with running_engine(tiny, num_stages=NUM_STAGES, host=host, block_size=4, max_num_batched_tokens=64) as engine:
        yield engine


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 120) for _ in range(length)]


def greedy(num_tokens: int, **kwargs: object) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **kwargs)  # type: ignore[arg-type]


def assert_nothing_held(engine: Engine) -> None:
    engine._loop.call(engine._loop.scheduler.check_integrity).result()
    stats = engine._loop.scheduler.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_seeded_sampling_does_not_depend_on_batch_or_split(tiny: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=11, ignore_eos=True)
    prompts = [prompt_of(5 + 3 * i, seed=i) for i in range(6)]
    with running_engine(tiny, num_stages=1, block_size=4) as engine:
        alone = [generate_all(engine, [prompt], params)[0] for prompt in prompts]
    for num_stages in (1, 2, 4):
        with running_engine(tiny, num_stages=num_stages, block_size=4, max_num_batched_tokens=64) as engine:
            assert generate_all(engine, prompts, params) == alone


def test_n_sequences_have_their_own_seeds(engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, ignore_eos=True)
    outputs = asyncio.run(collect(engine, prompt_of(20), params, n=3))
    tokens = [tokens_of(o) for o in outputs]
    assert len({tuple(t) for t in tokens}) == 3
    second = SamplingParams(max_tokens=16, temperature=1.0, seed=6, ignore_eos=True)
    assert generate_all(engine, [prompt_of(20)], second) == [tokens[1]]


def test_a_client_that_leaves_gives_all_blocks_back(engine: Engine) -> None:
    async def run() -> None:
        async def leave_after(num_outputs: int) -> None:
            async with contextlib.aclosing(generate(engine, prompt_of(30), greedy(500))) as stream:
                async for _ in stream:
                    num_outputs -= 1
                    if num_outputs == 0:
                        break

        neighbour = asyncio.create_task(collect(engine, prompt_of(9, seed=9), greedy(60)))
        await asyncio.gather(*(leave_after(i) for i in range(1, 9)))
        tokens = tokens_of((await neighbour)[0])
        assert [tokens] == await asyncio.to_thread(generate_all, engine, [prompt_of(9, seed=9)], greedy(60))
        await collect(engine, prompt_of(3), greedy(4))  # every step of before is over by then

    asyncio.run(run())
    assert_nothing_held(engine)


def test_a_lost_stage_is_replaced_and_its_sequences_replayed(engine: Engine, host: LocalStageHost) -> None:
    prompts = [prompt_of(7 + i, seed=i) for i in range(5)]
    expected = generate_all(engine, prompts, greedy(80))

    async def run() -> list[list[int]]:
        tasks = [asyncio.create_task(collect(engine, prompt, greedy(80))) for prompt in prompts]
        async with contextlib.aclosing(generate(engine, prompt_of(3), greedy(20))) as stream:
            async for _ in stream:  # the others are on their way now
                break
        await asyncio.to_thread(host._alive["stage-1"].stop)
        return [tokens_of((await task)[0]) for task in tasks]

    assert asyncio.run(run()) == expected
    assert engine.status().epoch == 2


def test_a_lost_stage_is_replaced_without_rests(
    engine: Engine, host: LocalStageHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests wait for it. Beside another pipeline on the machine, rests took most of a minute."""
    rested: list[Path] = []

    def gently(work: Callable[[Callable[[], None]], object], *, folder: Path) -> None:
        rested.append(folder)
        work(lambda: None)

    monkeypatch.setattr(stage_module, "gently", gently)
    expected = generate_all(engine, [prompt_of(5)], greedy(3))
    engine._pipeline.stage("stage-1").stop()
    assert generate_all(engine, [prompt_of(5)], greedy(3)) == expected
    assert [event.kind for event in engine.events()] == ["stage_lost", "rebuilt"]
    assert not rested


def test_another_layout_keeps_every_request(engine: Engine) -> None:
    prompts = [prompt_of(7 + i, seed=i) for i in range(5)]
    expected = generate_all(engine, prompts, greedy(60))

    async def run(num_stages: int) -> list[list[int]]:
        tasks = [asyncio.create_task(collect(engine, prompt, greedy(60))) for prompt in prompts]
        await asyncio.sleep(0)
        await asyncio.wrap_future(engine.set_layout(even_layout(4, num_stages)))
        return [tokens_of((await task)[0]) for task in tasks]

    for num_stages in (4, 1, 3):
        assert asyncio.run(run(num_stages)) == expected
        assert engine.status().layout.num_stages == num_stages
        assert [s.num_layers for s in engine.status().stages].count(0) == 0


def test_a_step_that_fails_fails_no_one_else(engine: Engine, host: LocalStageHost, monkeypatch) -> None:
    """A poisonous sequence ends with an error; those that shared its steps get their tokens."""
    poison = 121
    core = host._alive["stage-0"].core
    real = core.computer.prepare

    def prepare(batch, **kwargs):
        if poison in batch.token_ids:
            raise RuntimeError("poison")
        return real(batch, **kwargs)

    monkeypatch.setattr(core.computer, "prepare", prepare)
    good = [prompt_of(6, seed=i) for i in range(4)]
    expected = generate_all(engine, good, greedy(20))

    async def run() -> tuple[list[list[int]], str | None]:
        tasks = [asyncio.create_task(collect(engine, prompt, greedy(20))) for prompt in good]
        bad = asyncio.create_task(collect(engine, [poison, 5], greedy(20)))
        return [tokens_of((await t)[0]) for t in tasks], (await bad)[0][-1].error

    outputs, error = asyncio.run(run())
    assert outputs == expected
    assert error is not None
    assert "poison" in error
    assert_nothing_held(engine)


def test_stop_strings_end_a_sequence_and_are_not_shown(engine: Engine) -> None:
    (output,) = asyncio.run(collect(engine, prompt_of(8), greedy(40)))
    text = "".join(o.text for o in output)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (stopped,) = asyncio.run(collect(engine, prompt_of(8), greedy(40, stop=(stop,))))
    assert "".join(o.text for o in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].stop_reason == stop


def test_a_prompt_is_scored_token_by_token(engine: Engine) -> None:
    prompt = prompt_of(100)  # longer than a chunk
    params = SamplingParams(max_tokens=0, prompt_logprobs=True, num_logprobs=2)
    (output,) = asyncio.run(collect(engine, prompt, params))
    scores = output[-1].prompt_logprobs
    assert scores is not None
    assert [s.token_id for s in scores] == prompt
    assert scores[0].logprob is None
    assert all(s.logprob is not None and s.logprob < 0 and len(s.top) == 2 for s in scores[1:])


def test_too_much_is_refused_with_numbers(engine: Engine, tiny: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"\d+"):
        asyncio.run(collect(engine, prompt_of(5000), greedy(1)))
    with running_engine(tiny, max_num_seqs=1, max_waiting=1, block_size=4) as small:

        async def crowd() -> list[object]:
            requests = (collect(small, prompt_of(4, seed=i), greedy(30)) for i in range(4))
            return await asyncio.gather(*requests, return_exceptions=True)

        results = asyncio.run(crowd())
        assert sum(isinstance(r, QueueFullError) for r in results) == 2
        assert sum(isinstance(r, list) for r in results) == 2


def test_preemption_changes_no_token(tiny: Path) -> None:
    prompts = [prompt_of(10 + i, seed=i) for i in range(8)]
    with running_engine(tiny, block_size=4) as engine:
        expected = generate_all(engine, prompts, greedy(50))
    with running_engine(tiny, num_stages=2, block_size=4, max_tokens=160, prefix_cache=False) as engine:
        assert generate_all(engine, prompts, greedy(50)) == expected
        assert engine.status().queue.num_preemptions > 0
