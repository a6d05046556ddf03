"""``flexpipe profile``: what a model costs on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flexpipe_serve.cli_console import run_command
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model import profile_cache
from flexpipe_serve.model.source import resolve_source
from flexpipe_serve.planner.profile import ModelProfile, StepShape

_BUSY_SHARE = 0.1
_LIKELY = (
    ("1 sequence decodes, context 256", StepShape(num_tokens=1, num_samples=1, num_context_tokens=256)),
    ("8 sequences decode, context 256", StepShape(num_tokens=8, num_samples=8, num_context_tokens=8 * 256)),
    ("32 sequences decode, context 256", StepShape(num_tokens=32, num_samples=32, num_context_tokens=32 * 256)),
    ("prompt of 128 tokens", StepShape(num_tokens=128, num_samples=1, num_pairs=128 * 129 // 2)),
    ("prompt of 512 tokens", StepShape(num_tokens=512, num_samples=1, num_pairs=512 * 513 // 2)),
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``profile`` to the parser of ``flexpipe``."""
    parser = commands.add_parser(
        "profile", help="measure what a model costs on this machine: times of its parts, which the planner goes by"
    )
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 on a CPU, bfloat16 on CUDA",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a step (default: all cores)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the profile there too, as JSON")
    parser.add_argument("--refresh", action="store_true", help="measure anew though there is a profile")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Measures, or shows what was measured before. Returns the exit status."""
    return run_command(lambda console: _show(args, console))


def _show(args: argparse.Namespace, console: Console) -> int:
    profile, file = _profile(args)
    console.print(profile_view(profile))
    console.print(f"kept in {file}", soft_wrap=True)
    if args.output is not None:
        profile_cache.write_profile(profile, args.output)
        console.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def _profile(args: argparse.Namespace) -> tuple[ModelProfile, Path]:
    num_threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
    if num_threads < 1:
        raise ConfigError(f"--threads is {num_threads}; it must be at least 1.")
    device = _device(args.device)
    dtype = args.dtype if args.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    path = resolve_source(args.model)
    file = profile_cache.cache_file(path, dtype=dtype, device=device, num_threads=num_threads)
    found = profile_cache.load_profile(path, dtype=dtype, device=device, num_threads=num_threads)
    if found is not None and not args.refresh:
        return found, file
    # Torch takes seconds to import, for what may be there already.
    from flexpipe_serve.model.profiling import profile_model

    console = Console(stderr=True)
    columns = (TextColumn("measuring {task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawing takes CPU from what is measured.
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as bar:
        task = bar.add_task("", total=1.0)
        profile = profile_model(
            path,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
            on_progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    profile_cache.write_profile(profile, file)
    return profile, file


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch  # only now: it takes seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def profile_view(profile: ModelProfile) -> Group:
    """Tables for a person."""
    where = f"{profile.device}, {profile.dtype}"
    if profile.num_threads:
        where += f", {profile.num_threads} threads"
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    weights = sum(profile.layer_bytes) + profile.embedding_bytes + profile.head_bytes
    return Group(
        f"[bold]{escape(profile.model)}[/] on {escape(where)} ({escape(versions)})",
        _curve_table(profile),
        _parts_table(profile),
        _steps_table(profile),
        f"weights {weights / 2**20:.0f} MiB in {profile.num_layers} layers and both ends;"
        f" KV {profile.kv_bytes_per_token * profile.num_layers / 1024:.1f} KiB a token;"
        f" {profile.activation_bytes_per_token / 1024:.1f} KiB a token between stages",
        f"error of the prediction on {profile.num_measured} other steps that mix decoding and prompts:"
        f" mean {profile.error_mean:.1%}, largest {profile.error_max:.1%}",
        *_warnings(profile),
    )


def _warnings(profile: ModelProfile) -> list[str]:
    if profile.others_share < _BUSY_SHARE:
        return []
    return [
        f"[yellow]other work took {profile.others_share:.0%} of the cores meanwhile, so the times are too long; measure"
        " again with --refresh when the machine is idle[/]"
    ]


def _curve_table(profile: ModelProfile) -> Table:
    table = Table(title="A layer by new tokens of the step, without reading the cache", box=box.SIMPLE_HEAD)
    table.title_justify = "left"
    table.add_column("tokens")
    for count in profile.layer.counts:
        table.add_column(f"{count:.0f}", justify="right")
    table.add_row("ms", *(f"{1e3 * seconds:.3g}" for seconds in profile.layer.seconds))
    return table


def _parts_table(profile: ModelProfile) -> Table:
    table = Table(title="Other parts", box=box.SIMPLE_HEAD, show_header=False)
    table.title_justify = "left"
    table.add_column()
    table.add_column(justify="right")
    context, pair = profile.context_token_s, profile.pair_s
    rows = {
        "a layer, each cached token that a decoding sequence reads": f"{1e9 * context:.1f} ns",
        "a layer, each pair of tokens in a prompt's chunk": f"{1e9 * pair:.2f} ns",
        "embedding of 512 tokens": f"{1e3 * profile.embedding.at(512):.2f} ms",
        "head and sampling for 1, 8, 32 sequences": ", ".join(f"{1e3 * profile.head.at(num):.2f}" for num in (1, 8, 32))
        + " ms",
        "a stage beside its layers": f"{1e3 * profile.stage_s:.2f} ms",
        "a hop from process to process": f"{1e3 * profile.hop_s:.2f} ms",
        "the Router's part of a step": f"{1e3 * profile.step_s:.2f} ms",
        "loading weights": f"{profile.load_bytes_per_s / 1e6:.0f} MB/s",
    }
    if profile.cached_load_bytes_per_s is not None:
        rows["loading weights from the host cache"] = f"{profile.cached_load_bytes_per_s / 1e6:.0f} MB/s"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _steps_table(profile: ModelProfile) -> Table:
    table = Table(title="Whole steps through one stage, predicted", box=box.SIMPLE_HEAD, show_header=False)
    table.title_justify = "left"
    table.add_column()
    table.add_column(justify="right")
    for name, shape in _LIKELY:
        seconds = profile.stage_seconds(0, profile.num_layers, shape) + profile.hop_s + profile.step_s
        table.add_row(name, f"{1e3 * seconds:.1f} ms")
    return table
