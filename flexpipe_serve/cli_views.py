"""How the command line shows a pipeline, a plan, and a refactoring."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from flexpipe_serve.engine.scale_record import ScaleRecord
from flexpipe_serve.engine.status import Event, NodeStatus, PipelineStatus, ServerStatus
from flexpipe_serve.refactor.record import Outcome, Phase, RefactorPlan, RefactorRecord, StagePlan

_COLOURS = {Outcome.DONE: "green", Outcome.RECOVERED: "yellow", Outcome.ABORTED: "red", Outcome.REFUSED: "red"}
_PHASES = list(Phase)


def size(num_bytes: float) -> str:
    """Bytes for people, such as '1.5 GiB'."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    exponent = min(3, (int(num_bytes).bit_length() - 1) // 10)
    value = num_bytes / 1024**exponent
    return f"{value:.{0 if value >= 100 else 1}f} {'KMG'[exponent - 1]}iB"


def seconds(value: float) -> str:
    """A time for people, such as '1.2 ms'."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms"


def layer_ranges(layers: Sequence[int]) -> str:
    """Rising layers as ranges, such as '3-5, 9'."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def status_view(status: ServerStatus) -> RenderableType:
    """For each pipeline a head line, a table of stages, KV and queue."""
    parts: list[RenderableType] = []
    if status.config_error:
        parts.append(f"[red]config error:[/red] {escape(status.config_error)}")
    pipelines = status.pipelines
    for pipeline in pipelines:
        number = f"  pipeline {pipeline.pipeline}" if len(pipelines) > 1 else ""
        parts.append(_pipeline_view(pipeline, title=f"[bold]{escape(status.model)}[/bold]{number}"))
    if len(status.nodes) > 1:
        parts.append(_nodes_view(status.nodes))
    return Group(*parts)


def _nodes_view(nodes: Sequence[NodeStatus]) -> RenderableType:
    table = _table("node", "address", "rack", "zone", "state", "stages")
    for node in nodes:
        state = "[yellow]draining[/]" if node.draining else "[green]alive[/]" if node.alive else "[red]gone[/]"
        places = [escape(place) or "-" for place in (node.address, node.rack, node.zone)]
        table.add_row(_short(node.id), *places, state, escape(", ".join(node.stages)) or "-")
    return table


def _pipeline_view(status: PipelineStatus, *, title: str) -> RenderableType:
    serving = status.state == "serving"
    state = f"[{'green' if serving else 'red'}]{status.state}[/]"
    lines = [f"{title}  {state}  epoch {status.epoch}"]
    if status.reason:
        lines.append(f"[red]reason:[/red] {escape(status.reason)}")
    stages = _table("stage", "node", "pid", "device", "layers", "weights", "KV", "overhead", "steps", right=5)
    for stage in status.stages:
        start, stop = stage.layers
        stages.add_row(
            stage.name,
            _short(stage.node),
            str(stage.pid),
            stage.device,
            layer_ranges(range(start, stop)) or "-",
            size(stage.weights_bytes),
            size(stage.kv_bytes),
            size(stage.overhead_bytes),
            str(stage.num_steps),
        )
    kv, queue = status.kv, status.queue
    return Group(
        *lines,
        stages,
        f"KV     {kv.num_used_blocks} of {kv.num_blocks} blocks used ({kv.use:.1%}),"
        f" {kv.num_cached_blocks} cached; room for {kv.max_tokens} tokens",
        f"queue  {queue.num_running} running, {queue.num_waiting} waiting,"
        f" {queue.num_steps_in_flight} steps in flight, {queue.num_preemptions} preemptions",
    )


def events_table(events: Sequence[Event]) -> RenderableType:
    """Oldest first."""
    table = _table("time", "kind", "message")
    for event in events:
        table.add_row(clock(event.time), event.kind, escape(event.message))
    return table


def clock(unix_s: float) -> str:
    """A time as clocks here show it."""
    return datetime.datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")


def plan_view(plan: RefactorPlan) -> RenderableType:
    """Old and new layout, the moves, and the memory they need by domain."""
    parts: list[RenderableType] = [
        f"[bold]{_layout(plan.old)}[/bold]  →  [bold]{_layout(plan.new)}[/bold]",
        f"[{'red' if plan.verdict == 'refused' else 'green'}]{plan.verdict}[/]: {escape(plan.reason)}",
    ]
    if plan.moves:
        moves = _table("layers", "from", "to", "KV")
        for move in plan.moves:
            shared = "shared, nothing to copy" if move.shared else "copied"
            moves.add_row(layer_ranges(move.layers), move.source, move.target, shared)
        parts.append(moves)
    domains = _table("domain", "weights", "overhead", "KV", "sum", "budget", right=1)
    for domain in plan.domains:
        total = domain.weights_bytes + domain.overhead_bytes + domain.kv_bytes
        parts_of = (domain.weights_bytes, domain.overhead_bytes, domain.kv_bytes, total, domain.budget_bytes)
        domains.add_row(_short(domain.domain), *map(size, parts_of))
    parts.append(domains)
    blocks = (plan.num_blocks_before, plan.num_blocks_during, plan.num_blocks_after)
    parts.append(
        f"{size(plan.weights_bytes)} of weights to load, {size(plan.kv_bytes)} of KV to copy;"
        f" KV blocks {' → '.join(map(str, blocks))} (before, during, after)"
    )
    for what, stages in (("starts", plan.launched), ("ends", plan.retired)):
        if stages:
            parts.append(f"{what} {', '.join(stages)}")
    return Group(*parts)


def scale_view(record: ScaleRecord) -> RenderableType:
    """What serves after pipelines came or went."""
    table = _table("pipeline", "boundaries", "KV blocks", right=2)
    for pipeline in record.pipelines:
        boundaries = ", ".join(map(str, pipeline.boundaries)) or "one stage"
        table.add_row(str(pipeline.pipeline), boundaries, str(pipeline.num_blocks))
    head = f"{record.num_before} → {len(record.pipelines)} pipelines after {seconds(record.seconds)}"
    if record.num_handed_over:
        head += f"; {record.num_handed_over} sequences go on in another one"
    return Group(head, table)


def summary_view(record: RefactorRecord) -> RenderableType:
    """How a refactoring ended, and what it took."""
    head = f"[bold {_COLOURS[record.outcome]}]{record.outcome}[/] {record.id} ({record.mode})"
    parts: list[RenderableType] = [f"{head} after {seconds(record.seconds)}"]
    if record.error:
        parts.append(f"[red]why:[/red] {escape(record.error)}")
    facts = Table.grid(padding=(0, 2))
    moved = sum(len(move.layers) for move in record.plan.moves)
    facts.add_row("layers moved", f"{moved} in {len(record.plan.moves)} moves")
    facts.add_row("phases", ", ".join(f"{time.phase} {seconds(time.seconds)}" for time in record.phases))
    facts.add_row("KV copied", f"{size(record.snapshot_bytes)} snapshot, {size(record.patch_bytes)} patches")
    held = f"{seconds(record.stop_seconds)} in all, {seconds(record.longest_hold_seconds)} the longest step"
    facts.add_row("steps held back", held)
    facts.add_row("KV capacity", f"{record.plan.num_blocks_before} → {record.num_blocks} blocks")
    facts.add_row("tokens meanwhile", str(record.num_tokens_meanwhile))
    if record.num_replayed:
        facts.add_row("sequences replayed", str(record.num_replayed))
    parts.append(facts)
    return Group(*parts)


class RefactorProgress:
    """A bar for each phase; where the output is no terminal, a line for each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<8}"), BarColumn(bar_width=40), _StateColumn(), console=console
        )
        self._tasks: dict[Phase, TaskID] = {}
        self._printed = {Phase.PLAN}

    def __enter__(self) -> RefactorProgress:
        if self._console.is_terminal:
            self._tasks = {phase: self._progress.add_task(phase, total=1.0, state="") for phase in _PHASES[1:]}
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, record: RefactorRecord) -> None:
        """Show the record as it is now."""
        times = {time.phase: time.seconds for time in record.phases if record.is_over or time.phase != record.phase}
        if not self._console.is_terminal:
            for phase in times:
                if phase not in self._printed:
                    self._console.print(f"{phase:<8} {seconds(times[phase])}")
                    self._printed.add(phase)
            return
        for phase, task in self._tasks.items():
            if phase in times:
                self._progress.update(task, completed=1.0, state=seconds(times[phase]))
            elif _PHASES.index(phase) < _PHASES.index(record.phase):
                self._progress.update(task, state="not needed")
            elif phase is record.phase:
                state = record.outcome.value if record.is_over else f"{record.progress:.0%}"
                self._progress.update(task, completed=record.progress, state=state)


class _StateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["state"]), style="dim")


def _table(*columns: str, right: int | None = None) -> Table:
    """Without lines between rows; columns from the one with index ``right`` on are numbers."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right is not None and index >= right else "left")
    return table


def _short(name: str) -> str:
    """Ray's node ids have 56 digits, of which the first tell them apart."""
    return name if len(name) <= 24 else f"{name[:8]}…"


def _layout(stages: Sequence[StagePlan]) -> str:
    return " | ".join(layer_ranges(range(stage.start, stage.stop)) for stage in stages)
