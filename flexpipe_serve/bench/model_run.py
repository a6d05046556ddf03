"""The measuring part of ``flexpipe bench model``: one server, refactored from split to split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.model_points import Point, predict_point, split_of
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.serve import build_prompts, first_model
from flexpipe_serve.bench.server import running_server
from flexpipe_serve.bench.wave import run_wave
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Calibration, SchedulerLimits, Split
from flexpipe_serve.transport import HttpTransport

_NUM_WARM_UP, _WARM_UP_TOKENS = 16, 32


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Args:
        rates: requests/s, one wave each on every split; or, where there is none,
        loads: shares of what the first split does when all comes at once.
        seconds: of a wave.
        limits: of the server's scheduler; as many requests as it runs at once saturate a split.
        num_prompt_tokens: of a request.
        num_output_tokens: of a request.
        seed: of arrivals and prompts.
        timeout_s: a longer request failed.
    """

    rates: tuple[float, ...]
    loads: tuple[float, ...]
    seconds: float
    limits: SchedulerLimits
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    timeout_s: float

    def arrivals(self, rate: float | None) -> list[Arrival]:
        """Of one wave: the same on every split."""
        num = self.limits.max_num_seqs if rate is None else max(2, round(rate * self.seconds))
        return gamma_arrivals(
            num,
            rate=float("inf") if rate is None else rate,
            cv=1.0,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            seed=(self.seed, 0 if rate is None else round(1e6 * rate)),
        )


async def measure(
    config: Mapping[str, Any],
    profile: ModelProfile,
    load: Load,
    *,
    stages: Sequence[int],
    builder: PromptBuilder,
    log: Path,
    on_point: Callable[[Point], None],
    calibrate: bool,
) -> None:
    """All waves on all splits.

    Args:
        config: of the server.
        profile: of its model on this machine.
        stages: numbers of stages, in the order of measuring; layers are split evenly.
        log: of the server.
        on_point: called with each point as it is there.
        calibrate: predict each wave with what the server has learnt from its steps before it.

    Raises:
        ConfigError: the server does not come up, cannot be split like that, or a warm-up request fails.
    """
    with running_server(config, log=log) as url:
        target = Target("flexpipe", url, model=first_model(Target("flexpipe", url, model="")))
        async with AsyncHandle(HttpTransport(url)) as handle:

            async def learnt() -> Calibration:
                return (await handle.plan()).calibration if calibrate else Calibration()

            async def compare(split: Split, rate: float | None, *, seed: Sequence[int]) -> Point:
                arrivals = load.arrivals(rate)
                prompts = build_prompts(builder, arrivals, seed=seed, ids=False)
                before = await learnt()
                wave = await run_wave(target, arrivals, prompts, concurrency=None, timeout_s=load.timeout_s)
                point = predict_point(
                    profile,
                    split,
                    arrivals,
                    rate=rate,
                    wave=wave,
                    limits=load.limits,
                    before=before,
                    after=await learnt(),
                )
                on_point(point)
                return point

            rates = load.rates
            for index, num_stages in enumerate(stages):
                split = split_of(await _refactored(handle, num_stages), profile)
                # New prompts each time, or the prefix cache would know them.
                await _warm_up(target, builder, load, seed=(load.seed, index, 0, 2))
                at_once = await compare(split, None, seed=(load.seed, index, 0))
                if not rates:
                    rates = tuple(share * at_once.measured["requests_per_s"] for share in load.loads)
                for number, rate in enumerate(rates, start=1):
                    await compare(split, rate, seed=(load.seed, index, number))


async def _refactored(handle: AsyncHandle, num_stages: int) -> ServerStatus:
    status = await handle.status()
    if status.layout.num_stages != num_stages:
        record = await (await handle.refactor(stages=num_stages, reason="bench model")).wait()
        if record.error is not None:
            raise ConfigError(f"the server did not get to {num_stages} stages: {record.error}")
        status = await handle.status()
    return status


async def _warm_up(target: Target, builder: PromptBuilder, load: Load, *, seed: Sequence[int]) -> None:
    arrivals = [Arrival(0.0, load.num_prompt_tokens, _WARM_UP_TOKENS)] * _NUM_WARM_UP
    prompts = build_prompts(builder, arrivals, seed=seed, ids=False)
    wave = await run_wave(target, arrivals, prompts, concurrency=_NUM_WARM_UP // 2, timeout_s=load.timeout_s)
    for request in wave.requests:
        if request.error is not None:
            raise ConfigError(f"a warm-up request to {target.url} failed: {request.error}")
