"""What must hold when nothing is under way: nothing leaks, and all is as the layout in force says."""

from __future__ import annotations

from refactor_sim_network import InvariantError
from refactor_sim_router import MAX_LEN, ModelRouter
from refactor_sim_stage import ModelStage, Segment

from flexpipe_serve.pipeline.layout import Layout


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantError(message)


def check_stages(
    layout: Layout,
    *,
    epoch: int,
    num_blocks: int,
    stages: dict[str, ModelStage],
    parked: set[str],
    domains: dict[str, dict[int, Segment]],
) -> None:
    """The stages hold exactly what ``layout`` says; warm ones nothing; no KV is mapped by nobody or by the dead.

    A stage that has just died, with nobody knowing it yet, is missing in ``stages``.
    """
    check(set(stages) <= set(layout.stages) | parked, f"stages {sorted(stages)} for {layout.stages} and {parked}")
    for part in layout.slices:
        if part.stage not in stages:
            continue
        stage = stages[part.stage]
        check(set(stage.routes) == {epoch}, f"{stage.name} serves epochs {sorted(stage.routes)}, not {epoch}")
        check(stage.routes[epoch].layers == part.layers, f"{stage.name} serves other layers than its own")
        check(set(stage.segments) == set(part.layers), f"{stage.name} maps layers {sorted(stage.segments)}")
        check(not stage.givers, f"{stage.name} still gives")
        check(set(stage.takers) == {epoch}, f"{stage.name} takes for epochs {sorted(stage.takers)}")
        for layer, segment in stage.segments.items():
            check(segment.num_blocks == num_blocks, f"layer {layer}: {segment.num_blocks} blocks, not {num_blocks}")
    for name in parked:
        stage = stages.get(name)
        if stage is not None:
            held = (stage.routes, stage.segments, stage.givers, stage.takers)
            check(not any(held), f"{name} is in the pool, but holds {held}")
    for name, domain in domains.items():
        for layer, segment in domain.items():
            check(segment.mappers <= set(stages), f"{name}: layer {layer} is mapped by {segment.mappers}")
            check(all(stages[m].segments.get(layer) is segment for m in segment.mappers), f"{name}: {layer} twice")


def check_router(router: ModelRouter, *, is_over: bool) -> None:
    """No block, sequence or step is lost."""
    router.scheduler.check_integrity()
    if not is_over:
        return
    stats = router.scheduler.stats()
    check(not router.in_flight and stats.num_steps_in_flight == 0, "a step is lost")
    check(router.scheduler.is_idle and stats.num_used_blocks == 0, "a block is lost")
    check(not router.is_held and not router.is_down, "the scheduler is left paused")
    check(router.patching_epoch is None, "steps still wait for patches")
    for seq in router.sequences:
        check(seq.is_finished, f"{seq} has not ended")
        reason = seq.finish_reason
        check(reason in ("length", "abort"), f"{seq} ended with {reason}")
        full = min(seq.params.max_tokens, MAX_LEN - seq.num_prompt_tokens)
        check(reason == "abort" or seq.num_output_tokens == full, f"{seq} was cut short")
