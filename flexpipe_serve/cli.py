"""The console command ``flexpipe``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flexpipe_serve import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit status."""
    from flexpipe_serve import cli_admin, cli_drain, cli_plan, cli_profile, launch
    from flexpipe_serve.bench import adapt as bench_adapt
    from flexpipe_serve.bench import mix_shift as bench_mix_shift
    from flexpipe_serve.bench import model as bench_model
    from flexpipe_serve.bench import refactor as bench_refactor
    from flexpipe_serve.bench import resize as bench_resize
    from flexpipe_serve.bench import serve as bench_serve

    parser = argparse.ArgumentParser(prog="flexpipe", description="Serve a model through a live pipeline.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start Ray, Serve and the application; Ctrl-C ends all of it")
    launch.add_arguments(serve)
    serve.set_defaults(run=launch.main)
    cli_admin.add_commands(commands)
    cli_drain.add_command(commands)
    cli_plan.add_command(commands)
    cli_profile.add_command(commands)
    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    load = bench.add_parser("serve", help="load on one or several OpenAI endpoints")
    bench_serve.add_arguments(load)
    load.set_defaults(run=bench_serve.main)
    refactor = bench.add_parser("refactor", help="what a change of the pipeline costs the streams that are running")
    bench_refactor.add_arguments(refactor)
    refactor.set_defaults(run=bench_refactor.main)
    resize = bench.add_parser("resize", help="what it is worth that KV capacity follows the layout")
    bench_resize.add_arguments(resize)
    resize.set_defaults(run=bench_resize.main)
    adapt = bench.add_parser("adapt", help="what it is worth to change the pipeline with the load")
    bench_adapt.add_arguments(adapt)
    adapt.set_defaults(run=bench_adapt.main)
    model = bench.add_parser("model", help="how far the planner's latency model is from the real server")
    bench_model.add_arguments(model)
    model.set_defaults(run=bench_model.main)
    mix_shift = bench.add_parser("mix-shift", help="the same on unequal stages, when the kind of request changes")
    bench_mix_shift.add_arguments(mix_shift)
    mix_shift.set_defaults(run=bench_mix_shift.main)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status
