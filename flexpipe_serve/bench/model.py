"""``flexpipe bench model``: how far the planner's latency model is from the real server.

One server is refactored from split to split. On each, as many requests of one length come at once as are served
together, which tells the capacity; then they come at several rates (Poisson, open loop). Each wave is compared with
what the model predicts from the machine's profile for the arrivals as they came: mean time to first token, time per
output token, latency, and requests/s of the first wave against the predicted capacity. The same arrivals come to
every split, each time with new prompts. As in the planner, the profile is corrected by what the server's steps have
taken so far: before a wave, so that nothing is predicted from what it is compared with; not with ``--profile``. Where
a machine's speed changes from wave to wave that is an error too; how much of it shows when the wave's own steps count.

Predicted is the long run. From an empty pipeline that takes the longer the nearer the rate is to capacity: waves too
short for it are named, and mean errors are told without them, too.

The rates are shares of what the first split does when all comes at once, unless ``--rate`` gives them. A
profile that is missing is measured first; nothing else should run on the machine.
"""

import argparse
import os
import secrets
from pathlib import Path

from rich.console import Console

from flexpipe_serve.bench.adapt_server import settings_of, write_json
from flexpipe_serve.bench.experiment import run_experiment
from flexpipe_serve.bench.model_points import Point
from flexpipe_serve.bench.model_report import render, save_picture, to_json
from flexpipe_serve.bench.model_run import Load, measure
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.serve import positive_int
from flexpipe_serve.bench.server import adapt_config, default_log, read_config
from flexpipe_serve.config import ServeArgs, parse
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.profile_cache import gpu_name, load_profile, read_profile, start_profiling
from flexpipe_serve.model.source import resolve_source
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import SchedulerLimits

_LOADS = (0.3, 0.55, 0.8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench model``."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    server = parser.add_argument_group("server")
    server.add_argument(
        "--config", type=Path, default=Path("serve_config.yaml"), metavar="YAML", help="of the server that is started"
    )
    server.add_argument("--profile", type=Path, metavar="FILE", help="of its model (default: this machine's)")
    server.add_argument(
        "--stages", type=positive_int, nargs="+", default=[1, 2, 3], metavar="N", help="splits (default 1 2 3)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, nargs="+", metavar="R", help="requests/s")
    load.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=list(_LOADS),
        metavar="X",
        help=f"or shares of what the first split does at once (default {' '.join(map(str, _LOADS))})",
    )
    load.add_argument("--seconds", type=float, default=12.0, metavar="S", help="of each rate (default 12)")
    load.add_argument("--prompt-tokens", type=positive_int, default=128, metavar="N", help="a prompt (default 128)")
    load.add_argument("--output-tokens", type=positive_int, default=64, metavar="N", help="an answer (default 64)")
    load.add_argument("--timeout", type=float, default=300.0, metavar="S", help="a longer request failed (default 300)")
    load.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the requests (default: a new one)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="write measured and predicted figures by rate")
    out.add_argument("--server-log", type=Path, metavar="FILE", help="of the server that is started")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 if a request failed or not all was measured; 2 if it cannot be measured.
    """
    return run_experiment(_Experiment, args)


class _Experiment:
    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._args = args
        self._console = console
        self._points: list[Point] = []
        self._config = adapt_config(
            read_config(args.config),
            args={},
            user_config={"layout": {"stages": args.stages[0]}, "planner": {"mode": "off"}},
        )
        serve_args = parse(ServeArgs, self._config["applications"][0]["args"])
        self._path = resolve_source(serve_args.model.source)
        self._profile = _profile(args, serve_args, self._path, console)
        self._load = _load(args, serve_args)
        self._log = args.server_log or default_log()

    @property
    def is_good(self) -> bool:
        """Whether all points are there, and no request failed."""
        is_complete = len(self._points) == len(self._args.stages) * (len(self._load.rates or self._load.loads) + 1)
        return is_complete and not any(request.error for point in self._points for request in point.wave.requests)

    async def run(self) -> None:
        """All waves on all splits."""
        load = self._load
        rates = [f"{rate:.2f}/s" for rate in load.rates] or [f"{share:.0%} of that" for share in load.loads]
        self._console.print(
            f"{load.limits.max_num_seqs} requests at once, {', '.join(rates)}, on"
            f" {', '.join(map(str, self._args.stages))} stages (log of the server: {self._log})"
        )
        await measure(
            self._config,
            self._profile,
            load,
            stages=self._args.stages,
            builder=PromptBuilder(self._path),
            log=self._log,
            on_point=self._on_point,
            calibrate=self._args.profile is None,
        )

    def _on_point(self, point: Point) -> None:
        self._points.append(point)
        rate = "at once" if point.rate is None else f"at {point.rate:.2f}/s"
        self._console.print(f"{point.num_stages} stages: {len(point.wave.requests)} requests {rate}")
        self._save()

    def report(self) -> None:
        """Table, JSON and picture of what was measured."""
        if not self._points:
            return
        self._console.print(render(self._points))
        if self._args.json is not None:
            self._save()
            self._console.print(f"wrote {self._args.json}")
        if self._args.plot is not None:
            save_picture(self._points, self._args.plot)
            self._console.print(f"wrote {self._args.plot}")

    def _save(self) -> None:
        if self._args.json is not None:
            data = to_json(self._points, profile=self._profile, settings=settings_of(self._args))
            write_json(data, self._args.json)


def _profile(args: argparse.Namespace, serve_args: ServeArgs, path: Path, console: Console) -> ModelProfile:
    if args.profile is not None:
        return read_profile(args.profile)
    device, dtype = serve_args.device, serve_args.model.dtype
    if device == "auto":
        device = "cpu" if gpu_name() is None else "cuda"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    num_threads = len(os.sched_getaffinity(0))
    found = load_profile(path, dtype=dtype, device=device, num_threads=num_threads)
    if found is None:
        console.print("measuring the profile")
        found = start_profiling(path, dtype=dtype, device=device, num_threads=num_threads).result()
    return found


def _load(args: argparse.Namespace, serve_args: ServeArgs) -> Load:
    limits = SchedulerLimits(
        max_num_seqs=serve_args.scheduler.max_num_seqs,
        max_num_batched_tokens=serve_args.scheduler.max_num_batched_tokens,
    )
    lowest = min(args.rate or args.load)
    if lowest <= 0:
        raise ConfigError(f"the lowest rate is {lowest}; rates and loads must be above 0.")
    return Load(
        rates=tuple(args.rate or ()),
        loads=tuple(args.load),
        seconds=args.seconds,
        limits=limits,
        num_prompt_tokens=args.prompt_tokens,
        num_output_tokens=args.output_tokens,
        seed=args.seed,
        timeout_s=args.timeout,
    )
