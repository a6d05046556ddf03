"""``flexpipe bench resize``: what it is worth that KV capacity follows the layout (PipeLive's resize ablation).

Two stages have unequal memory budgets. Every block of KV exists on every stage, so capacity is the minimum over the
stages: while the stage with the small budget holds many layers, it is a few sequences. Requests come slowly, then
faster; at that moment the pipeline is refactored, in a hurry, to a layout whose small stage has fewer layers. With
resizing the capacity grows to what the budgets now allow; without, it stays what it was, and requests queue. Both do
the same refactoring and get the same requests in the same order, each on a fresh server, in turns.

How the numbers are chosen, so that this means something on any machine:

* Budgets. A first server, with plentiful KV, is looked at under load: weights, what a process takes (it grows by some
  20 MB when first used), and bytes of a block. The small stage's budget is what it takes with its many layers, and
  blocks for ``--sequences`` of the longest requests. The new boundary is the nearest one that leaves room for
  ``--growth`` times as many: weights that go make room, and each block costs fewer layers. The other stage's budget is
  the one that never limits. A run's server starts with the new layout, is warmed up, and is refactored to the old one,
  so that the capacity at the start follows from what the processes take in use, as after the step.
* Rates. The first server also tells how many requests a second it finishes with as many at once as the old layout
  holds, and with as many as the new one holds. The low rate is half of the former: no queue. The high rate is 85 %
  of the latter: it can be served with the new capacity, and is more than the old one can serve as long as
  batching pays at all. ``--low-rate`` and ``--high-rate`` replace them.
* The prefix cache is off and prompts are random words of 128 to 256 tokens: nothing is shared. Outputs have 128 tokens.
"""

import argparse
import json
import secrets
from pathlib import Path

import numpy as np
from rich.console import Console

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.experiment import run_experiment
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.resize_plan import ResizePlan, plan_resize, stepped_arrivals
from flexpipe_serve.bench.resize_report import render, save_picture, to_json
from flexpipe_serve.bench.resize_run import Calibration, ResizeRun, calibrate, run_once
from flexpipe_serve.bench.serve import positive_int
from flexpipe_serve.bench.server import adapt_config, default_log, read_config
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.demo import ensure_demo

_LOW_SHARE, _HIGH_SHARE = 0.5, 0.85


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench resize``."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    server = parser.add_argument_group("server")
    server.add_argument(
        "--config", type=Path, default=Path("serve_config.yaml"), metavar="YAML", help="of the servers that are started"
    )
    server.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json (default: the demo's)")
    server.add_argument(
        "--boundary", type=positive_int, default=12, metavar="N", help="first layer of the small stage before (12)"
    )
    server.add_argument(
        "--sequences", type=positive_int, default=4, metavar="N", help="longest requests that fit before (default 4)"
    )
    server.add_argument(
        "--growth", type=float, default=4.0, metavar="X", help="so many times as many after (default 4)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--low-rate", type=float, metavar="R", help="requests/s before the step (default: measured)")
    load.add_argument("--high-rate", type=float, metavar="R", help="requests/s after it (default: measured)")
    load.add_argument("--low-seconds", type=float, default=20.0, metavar="S", help="until the step (default 20)")
    load.add_argument("--high-seconds", type=float, default=60.0, metavar="S", help="after the step (default 60)")
    load.add_argument("--cv", type=float, default=1.0, help="of the gaps: 0 even, 1 Poisson (default), more is bursty")
    load.add_argument("--min-prompt-tokens", type=positive_int, default=128, metavar="N", help="default 128")
    load.add_argument("--max-prompt-tokens", type=positive_int, default=256, metavar="N", help="default 256")
    load.add_argument("--output-tokens", type=positive_int, default=128, metavar="N", help="of a request (default 128)")
    load.add_argument("--timeout", type=float, default=300.0, metavar="S", help="a longer request failed (default 300)")
    load.add_argument("--rounds", type=positive_int, default=1, metavar="N", help="of both runs (default 1)")
    load.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the requests (default: a new one)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="write TTFT and KV capacity over time")
    out.add_argument("--server-log", type=Path, metavar="FILE", help="of the servers that are started")


def main(args: argparse.Namespace) -> int:
    """Runs the experiment.

    Returns:
        0; 1 if a request or a refactoring failed; 2 if it cannot be measured.
    """
    return run_experiment(_Experiment, args)


class _Experiment:
    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        if args.min_prompt_tokens > args.max_prompt_tokens:
            raise ConfigError(
                f"the shortest prompt has {args.min_prompt_tokens} tokens, the longest {args.max_prompt_tokens}"
            )
        self._args = args
        self._console = console
        self._log = args.server_log or default_log()
        self._builder = PromptBuilder(args.tokenizer or ensure_demo())
        self._config = adapt_config(
            read_config(args.config),
            args={"kv": {"domain": "stage", "prefix_cache": False}},
            user_config={"layout": {"stages": 2}, "warm_stages": 0},
        )
        self._runs: list[ResizeRun] = []
        self._calibration: Calibration | None = None
        self._plan: ResizePlan | None = None

    @property
    def is_good(self) -> bool:
        """Whether all runs were done, and nothing failed in them."""
        return len(self._runs) == 2 * self._args.rounds and not any(
            run.record.error or any(request.error for request in run.wave.requests) for run in self._runs
        )

    async def run(self) -> None:
        """Calibrates, then does the runs: on and off, then off and on, and so forth."""
        args = self._args
        calibration = self._calibration = await self._calibrate()
        per_sequence = -(-(args.max_prompt_tokens + args.output_tokens) // calibration.profile.block_size)
        plan = self._plan = plan_resize(
            calibration.profile, old=args.boundary, num_blocks=args.sequences * per_sequence, growth=args.growth
        )
        low = args.low_rate or _LOW_SHARE * calibration.few_per_s
        high = args.high_rate or _HIGH_SHARE * calibration.many_per_s
        self._console.print(
            f"second stage from layer {plan.old}, then {plan.new}; budgets"
            f" {' and '.join(f'{size / 2**20:.0f} MiB' for size in plan.budgets)};"
            f" KV blocks {plan.old_blocks}, then {plan.new_blocks}; {low:.2f} requests/s, then {high:.2f}"
        )
        if high <= calibration.few_per_s:
            self._console.print(
                "[yellow]the old capacity can serve the high rate too: on this machine a larger batch gains too little"
                " for the experiment to show anything; give --high-rate[/]"
            )
        for round_index in range(args.rounds):
            arrivals = stepped_arrivals(
                low_rate=low,
                high_rate=high,
                low_s=args.low_seconds,
                high_s=args.high_seconds,
                cv=args.cv,
                prompt_tokens=(args.min_prompt_tokens, args.max_prompt_tokens),
                num_output_tokens=args.output_tokens,
                seed=args.seed + round_index,
            )
            prompts = self._prompts(arrivals, round_index)
            for resize_kv in (True, False) if round_index % 2 == 0 else (False, True):
                name = "on" if resize_kv else "off"
                self._console.print(f"round {round_index + 1}, resizing {name}: {len(arrivals)} requests")
                run = await run_once(
                    self._config,
                    plan,
                    arrivals,
                    prompts,
                    step_s=args.low_seconds,
                    resize_kv=resize_kv,
                    round_index=round_index,
                    num_warm_up=min(len(arrivals), 2 * args.sequences),
                    timeout_s=args.timeout,
                    log=self._log,
                )
                self._runs.append(run)

    async def _calibrate(self) -> Calibration:
        args = self._args
        num_many = round(args.growth * args.sequences)
        self._console.print(f"looking at speed and memory with plentiful KV (log of the servers: {self._log})")
        rng = np.random.default_rng([args.seed, 4])
        lengths = rng.integers(args.min_prompt_tokens, args.max_prompt_tokens + 1, num_many)
        arrivals = [Arrival(0.0, int(length), args.output_tokens) for length in lengths]
        plentiful = 2 * num_many * (args.max_prompt_tokens + args.output_tokens)
        config = adapt_config(self._config, args={"kv": {"max_tokens": plentiful}}, user_config={})
        prompts = self._prompts(arrivals, -1)
        return await calibrate(config, arrivals, prompts, num_few=args.sequences, log=self._log)

    def _prompts(self, arrivals: list[Arrival], round_index: int) -> list[str]:
        rng = np.random.default_rng([self._args.seed, 3, round_index + 1])
        return [self._builder.build(arrival.num_prompt_tokens, rng) for arrival in arrivals]

    def report(self) -> None:
        """Tables, JSON and picture of the runs that were finished."""
        args, console = self._args, self._console
        if not self._runs or self._plan is None or self._calibration is None:
            return
        console.print(render(self._runs))
        if args.json is not None:
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
            del settings["run"]
            data = to_json(self._runs, plan=self._plan, calibration=self._calibration, settings=settings)
            args.json.write_text(json.dumps(data) + "\n")
            console.print(f"wrote {args.json}")
        if args.plot is not None:
            save_picture(self._runs, args.plot)
            console.print(f"wrote {args.plot}")
