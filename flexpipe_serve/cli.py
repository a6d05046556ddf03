"""The console command ``flexpipe``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flexpipe_serve import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit status."""
    from flexpipe_serve import cli_admin, cli_config, cli_decisions, cli_drain, cli_plan, cli_profile, launch
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
    cli_config.add_command(commands)
    cli_drain.add_command(commands)
    cli_plan.add_command(commands)
    cli_decisions.add_command(commands)
    cli_profile.add_command(commands)
    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    for name, module, about in (
        ("serve", bench_serve, "load on one or several OpenAI endpoints"),
        ("refactor", bench_refactor, "what a change of the pipeline costs the streams that are running"),
        ("resize", bench_resize, "what it is worth that KV capacity follows the layout"),
        ("adapt", bench_adapt, "what it is worth to change the pipeline with the load"),
        ("mix-shift", bench_mix_shift, "the same on unequal stages, when the kind of request changes"),
        ("model", bench_model, "how far the planner's latency model is from the real server"),
    ):
        command = bench.add_parser(name, help=about)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status
