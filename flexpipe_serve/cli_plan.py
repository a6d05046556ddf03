"""``flexpipe plan``: what the planner would do now, or would have done over a recorded trace."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from flexpipe_serve.cli_console import run_command
from flexpipe_serve.cli_plan_views import decision_view, replay_view
from flexpipe_serve.cli_server import server_arguments
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.handle import connect
from flexpipe_serve.planner.types import PlannerWeights
from flexpipe_serve.planner.wire import to_wire
from flexpipe_serve.simulate.result import SimulationResult, summarize

_DEFAULTS = PlannerWeights()


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``plan`` to the parser of ``flexpipe``."""
    parser = commands.add_parser(
        "plan",
        parents=[server_arguments()],
        help="what the planner would do now and why (nothing is changed); with --replay, over a recorded trace",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the decision, or the replay, there as JSON")
    sim = parser.add_argument_group(
        "replay", "run a policy over a trace on a simulated server with simulated nodes; no server is needed"
    )
    sim.add_argument(
        "--replay", type=Path, metavar="TRACE", help="CSV (also .gz): arrival_s, prompt_tokens, output_tokens"
    )
    sim.add_argument("--profile", type=Path, metavar="FILE", help="what `flexpipe profile --output FILE` wrote")
    sim.add_argument(
        "--policy", choices=("gated", "flexpipe", "static"), default="gated", help="static: the first split stays"
    )
    sim.add_argument("--nodes", type=int, default=4, help="with one device each, like the profiled one (default: 4)")
    sim.add_argument("--memory", default="4GiB", help="budget of each node (default: %(default)s)")
    sim.add_argument("--stages", type=int, default=1, help="to begin with (default: 1)")
    sim.add_argument("--max-pipelines", type=int, default=1, help="most to serve with at once (default: 1)")
    sim.add_argument("--rate-scale", type=float, default=1.0, help="2 doubles the arrival rate (default: 1)")
    sim.add_argument("--length-scale", type=float, default=1.0, help="of prompts and outputs (default: 1)")
    sim.add_argument("--max-requests", type=int, metavar="N", help="only the first N requests")
    sim.add_argument(
        "--horizon", type=float, default=_DEFAULTS.horizon_s, help="s a gain is counted over (default: %(default)g)"
    )
    sim.add_argument(
        "--margin", type=float, default=_DEFAULTS.margin, help="a gain must exceed its cost by (default: %(default)g)"
    )
    sim.add_argument("--plot", type=Path, metavar="PNG", help="demand, queue, latency, granularity over time")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Show the present decision, or a replay. Returns the exit status."""
    return run_command(lambda console: _show_present(args, console) if args.replay is None else _replay(args, console))


def _show_present(args: argparse.Namespace, console: Console) -> int:
    if args.plot is not None or args.profile is not None:
        raise ConfigError("--plot and --profile go with --replay TRACE; without it the running server is asked.")
    with connect(args.url, api_key=args.api_key) as handle:
        decision = handle.plan()
    console.print(decision_view(decision))
    if args.json is not None:
        _write(args.json, msgspec.json.encode(to_wire(decision)))
    return 0


def _replay(args: argparse.Namespace, console: Console) -> int:
    # Only now: every other command would pay for them.
    from flexpipe_serve.bench.arrivals import read_trace
    from flexpipe_serve.model.profile_cache import read_profile
    from flexpipe_serve.simulate.replay import replay

    if args.profile is None:
        raise ConfigError("--replay needs --profile FILE; `flexpipe profile --output FILE` makes one.")
    profile = read_profile(args.profile)
    if not args.rate_scale > 0:
        raise ConfigError(f"--rate-scale is {args.rate_scale}; give a number above 0.")
    arrivals = read_trace(
        args.replay,
        time_scale=1 / args.rate_scale,
        length_scale=args.length_scale,
        max_requests=args.max_requests,
    )
    weights = PlannerWeights(
        horizon_s=args.horizon, margin=args.margin, max_stages=args.nodes, max_pipelines=args.max_pipelines
    )
    started = time.perf_counter()
    result = replay(
        profile,
        arrivals,
        policy=args.policy,
        weights=weights,
        num_nodes=args.nodes,
        memory_bytes=_size(args.memory),
        num_stages=args.stages,
    )
    took_s = time.perf_counter() - started
    title = f"{args.replay.name}, policy {args.policy}, {args.nodes} nodes"
    console.print(f"[bold]{escape(title)}[/]")
    console.print(
        f"[yellow]simulated[/]: the times of {escape(profile.model)} as profiled on {escape(profile.device)}, on nodes"
        f" that do not exist; nothing here was measured on a server ({took_s:.1f} s of computing)"
    )
    console.print(replay_view(summarize(result), result))
    if args.plot is not None:
        from flexpipe_serve.simulate.replay_plot import save_replay_plot  # Matplotlib takes a second

        save_replay_plot(result, args.plot, title=title)
        console.print(f"wrote {args.plot}", soft_wrap=True)
    if args.json is not None:
        _write(args.json, _replay_json(args, result))
        console.print(f"wrote {args.json}", soft_wrap=True)
    return 0


def _replay_json(args: argparse.Namespace, result: SimulationResult) -> bytes:
    content = {
        "simulated": True,
        "trace": args.replay.name,
        "policy": args.policy,
        "nodes": args.nodes,
        "rate_scale": args.rate_scale,
        "length_scale": args.length_scale,
        "summary": summarize(result),
        "result": msgspec.structs.replace(result, decisions=()),
        "decisions": [to_wire(decision) for decision in result.decisions],
    }
    return msgspec.json.encode(content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(msgspec.json.format(content, indent=2) + b"\n")


def _size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"--memory is {text!r}; give a size such as 4GiB.") from None
