"""``flexpipe status``, ``events``, ``refactor`` and ``scale``: a running server from the command line."""

from __future__ import annotations

import argparse

import msgspec
from rich.console import Console

from flexpipe_serve.cli_server import server_arguments, with_handle
from flexpipe_serve.cli_views import (
    RefactorProgress,
    events_table,
    plan_view,
    scale_view,
    status_view,
    summary_view,
)
from flexpipe_serve.handle import Handle, RefactorJob
from flexpipe_serve.refactor.record import Mode, Outcome, RefactorRecord


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommands to the parser of ``flexpipe``."""
    server = server_arguments()
    status = commands.add_parser("status", parents=[server], help="the pipeline: stages, memory, queue")
    status.add_argument("--json", action="store_true", help="as the server gives it")
    status.set_defaults(run=with_handle(_status))
    events = commands.add_parser("events", parents=[server], help="what happened to the pipeline lately")
    events.set_defaults(run=with_handle(_events))
    scale = commands.add_parser("scale", parents=[server], help="let pipelines come and go while they serve")
    wanted = scale.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--pipelines", type=int, metavar="N", help="how many; further ones are split like the first")
    wanted.add_argument(
        "--layouts",
        nargs="+",
        type=_layout,
        metavar="SPLIT",
        help="the split of each, a number of stages or boundaries with a comma: 2 10,20 ('10,' for one boundary)",
    )
    scale.set_defaults(run=with_handle(_scale))
    refactor = commands.add_parser("refactor", parents=[server], help="change the pipeline's split while it serves")
    split = refactor.add_mutually_exclusive_group(required=True)
    split.add_argument("--stages", type=int, help="number of stages, with layers split evenly")
    refactor.add_argument(
        "--pipeline", type=int, default=0, metavar="N", help="which, where there are several (default: %(default)s)"
    )
    split.add_argument("--boundaries", type=_boundaries, help="first layer of each later stage, such as 10,20")
    refactor.add_argument(
        "--nodes", type=_names, help="where each stage shall stand, such as 10.0.0.1,10.0.0.2 (see flexpipe status)"
    )
    refactor.add_argument("--avoid", type=_names, default=(), help="nodes whose layers go elsewhere")
    refactor.add_argument(
        "--mode", choices=[mode.value for mode in Mode], default="live", help="what goes on meanwhile (default: all)"
    )
    refactor.add_argument("--hurry", action="store_true", help="be quick, though those who wait for tokens may notice")
    refactor.add_argument("--dry-run", action="store_true", help="only say what would be done, and whether it fits")
    refactor.add_argument("--no-wait", action="store_true", help="return when it has started")
    refactor.set_defaults(run=with_handle(_refactor))


def _boundaries(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 10,20") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _layout(text: str) -> int | tuple[int, ...]:
    return int(text) if text.isdecimal() else _boundaries(text.removesuffix(","))


def _status(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    status = handle.status()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(status), indent=2).decode())
    else:
        console.print(status_view(status))
    return 0


def _events(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    console.print(events_table(handle.events()))
    return 0


def _scale(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    console.print(scale_view(handle.scale(pipelines=args.pipelines, layouts=args.layouts)))
    return 0


def _refactor(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    job = handle.refactor(
        stages=args.stages,
        boundaries=args.boundaries,
        pipeline=args.pipeline,
        nodes=args.nodes,
        avoid=args.avoid,
        mode=args.mode,
        hurry=args.hurry,
        dry_run=args.dry_run,
    )
    console.print(plan_view(job.plan))
    if args.dry_run:
        return 0 if job.plan.verdict != "refused" else 1
    if args.no_wait:
        console.print(f"refactoring {job.id} has started; {args.url}/flexpipe/refactor/{job.id} has its record")
        return 0
    record = _follow(job, console)
    console.print(summary_view(record))
    return 0 if record.outcome in (Outcome.DONE, Outcome.RECOVERED) else 1


def _follow(job: RefactorJob, console: Console) -> RefactorRecord:
    """Show its progress. The first Ctrl-C asks the server to stop it, the second one leaves it alone."""
    with RefactorProgress(console) as progress:
        try:
            return job.wait(on_progress=progress.update)
        except KeyboardInterrupt:
            job.cancel()
            console.print(
                f"[yellow]asked the server to cancel {job.id}[/yellow]; after the switch that is without effect."
                " Ctrl-C again: leave without waiting."
            )
            return job.wait(on_progress=progress.update)
