"""PLAN: what a refactoring needs, and whether the memory suffices: pure code (PipeLive's feasibility, P2-P3)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from flexpipe_serve.kv.capacity import StageFootprint, blocks_by_domain
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.refactor.moves import held_layers, moves_between
from flexpipe_serve.refactor.record import DomainPlan, Mode, MovePlan, RefactorPlan, StagePlan

FITS = "fits"
FITS_AFTER_SHRINKING = "fits after shrinking"
REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """Bytes of a model's weights on stages: at most, or where they were seen, exactly."""

    layers: tuple[int, ...]
    """Of each layer."""
    embedding: int
    """On the first stage."""
    head: int
    """Final norm and LM head, on the last stage."""
    shared_ends: int = 0
    """What a single stage saves because embedding and head are one matrix there."""

    def of(self, layers: Iterable[int], *, is_first: bool, is_last: bool) -> int:
        """Bytes of these layers and ends on one stage."""
        return self.sizes(layers, is_first=is_first, is_last=is_last).total

    def sizes(self, layers: Iterable[int], *, is_first: bool, is_last: bool) -> WeightSizes:
        """The same, one by one."""
        return WeightSizes(
            layers={layer: self.layers[layer] for layer in layers},
            embedding=is_first * self.embedding,
            head=is_last * self.head,
            shared_ends=(is_first and is_last) * self.shared_ends,
        )

    def seen(self, sizes: Iterable[WeightSizes]) -> ModelWeights:
        """These, with what stages hold of them at its real size."""
        layers, embedding, head, shared_ends = dict(enumerate(self.layers)), self.embedding, self.head, self.shared_ends
        for held in sizes:
            layers.update(held.layers)
            embedding, head = held.embedding or embedding, held.head or head
            shared_ends = held.shared_ends or shared_ends
        return ModelWeights(
            layers=tuple(layers[layer] for layer in range(len(self.layers))),
            embedding=embedding,
            head=head,
            shared_ends=shared_ends,
        )


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What a stage takes of its domain now, or will once it is launched."""

    domain: str
    """Whose budget it takes from."""
    kv_domain: str
    """Stages with the same one can map each other's KV: a node's RAM; on a GPU each process is alone."""
    weights_bytes: int
    """Measured; 0 for one without layers."""
    overhead_bytes: int
    """Measured, or for one to be launched an estimate."""


@dataclass(frozen=True, kw_only=True)
class KVDemand:
    """The scheduler's side."""

    num_blocks: int
    """Capacity now."""
    num_used: int
    """Blocks that live sequences use now."""
    num_cached: int
    """Further ones that hold the prefix cache: a copy carries them, but they may be dropped."""
    num_longest: int
    """The most blocks that one unfinished sequence may need in its life."""


def plan_refactoring(
    *,
    old: Layout,
    new: Layout,
    mode: Mode,
    weights: ModelWeights,
    stages: Mapping[str, StageMemory],
    parked: Collection[str],
    budgets: Mapping[str, int],
    block_bytes: int,
    max_blocks: int,
    demand: KVDemand,
    may_grow: bool,
) -> RefactorPlan:
    """What has to be done to get from ``old`` to ``new``, and the verdict.

    While the refactoring runs a stage holds the layers of both layouts; where stages map it, a layer's KV counts once,
    weights count for each stage. A restart holds the new ones alone.

    Args:
        stages: every stage that is alive or to be launched, also warm ones without layers.
        parked: stages that stay alive without layers afterwards (in the pool).
        budgets: bytes by domain.
        block_bytes: of one block of one layer.
        max_blocks: upper limit of the capacity beside the budgets.
        may_grow: capacity may become more than it is now; else it returns at most to that.

    Returns:
        The plan; with the verdict 'refused' nothing may be touched.
    """
    alive = [name for name in stages if name in new.stages or name in parked or name not in old.stages]
    after = _memory((new,), old=old, weights=weights, stages=stages, alive=alive)
    during = after
    if mode is not Mode.RESTART:
        during = _memory((old, new), old=old, weights=weights, stages=stages, alive=stages)
    fit_during = blocks_by_domain(footprints=during, budgets=budgets, block_bytes=block_bytes)
    fit_after = blocks_by_domain(footprints=after, budgets=budgets, block_bytes=block_bytes)
    ceiling = max_blocks if may_grow else min(max_blocks, demand.num_blocks)
    num_during = max(0, min(demand.num_blocks, max_blocks, *fit_during.values()))
    num_after = max(num_during, min(ceiling, *fit_after.values()))
    if mode is Mode.RESTART:
        num_during = num_after = max(0, min(ceiling, *fit_during.values()))
    moves = tuple(
        MovePlan(
            source=move.source,
            target=move.target,
            layers=move.layers,
            shared=stages[move.source].kv_domain == stages[move.target].kv_domain,
        )
        for move in moves_between(old, new)
    )
    num_copied_layers = 0 if mode is Mode.RESTART else sum(len(move.layers) for move in moves if not move.shared)
    verdict, reason = _verdict(old, new, mode, demand, num_during, during, fit_during, budgets, block_bytes)
    return RefactorPlan(
        verdict=verdict,
        reason=reason,
        old=_slices(old),
        new=_slices(new),
        moves=moves,
        launched=tuple(name for name in new.stages if name not in old.stages),
        retired=tuple(name for name in old.stages if name not in new.stages),
        domains=tuple(
            DomainPlan(
                domain=domain,
                budget_bytes=budgets[domain],
                weights_bytes=sum(f.weights_bytes for f in during if f.domain == domain),
                overhead_bytes=sum(f.overhead_bytes for f in during if f.domain == domain),
                kv_bytes=num_during * block_bytes * sum(f.num_layers for f in during if f.domain == domain),
            )
            for domain in sorted({f.domain for f in during})
        ),
        num_blocks_before=demand.num_blocks,
        num_blocks_during=num_during,
        num_blocks_after=num_after,
        weights_bytes=sum(_loaded(name, old, new, weights) for name in new.stages),
        kv_bytes=num_copied_layers * (demand.num_used + demand.num_cached) * block_bytes,
    )


def _memory(
    layouts: Collection[Layout],
    *,
    old: Layout,
    weights: ModelWeights,
    stages: Mapping[str, StageMemory],
    alive: Iterable[str],
) -> list[StageFootprint]:
    """Footprints while ``alive`` stages serve ``layouts``. What is held now counts as measured."""
    held = held_layers(*layouts)
    counted: set[tuple[str, int]] = set()
    footprints = []
    for name in alive:
        memory = stages[name]
        layers = {(memory.kv_domain, layer) for layer in held.get(name, ())}
        now = _weights(name, (old,), weights)
        footprints.append(
            StageFootprint(
                stage=name,
                domain=memory.domain,
                num_layers=len(layers - counted),
                weights_bytes=max(0, memory.weights_bytes + _weights(name, layouts, weights) - now),
                overhead_bytes=memory.overhead_bytes,
            )
        )
        counted |= layers
    return footprints


def _weights(stage: str, layouts: Collection[Layout], weights: ModelWeights) -> int:
    """Bytes that ``stage`` holds to serve ``layouts``."""
    return weights.of(
        held_layers(*layouts).get(stage, ()),
        is_first=any(layout.stages[0] == stage for layout in layouts),
        is_last=any(layout.stages[-1] == stage for layout in layouts),
    )


def _loaded(stage: str, old: Layout, new: Layout, weights: ModelWeights) -> int:
    """Bytes that ``stage`` reads for ``new``."""
    return _weights(stage, (old, new), weights) - _weights(stage, (old,), weights)


def _slices(layout: Layout) -> tuple[StagePlan, ...]:
    return tuple(StagePlan(stage=part.stage, start=part.start, stop=part.stop) for part in layout.slices)


def _verdict(
    old: Layout,
    new: Layout,
    mode: Mode,
    demand: KVDemand,
    num_during: int,
    footprints: Collection[StageFootprint],
    fit: Mapping[str, int],
    budgets: Mapping[str, int],
    block_bytes: int,
) -> tuple[str, str]:
    if new == old and mode is not Mode.RESTART:
        return REFUSED, f"The pipeline has these {old.num_stages} stages already, with the same boundaries."
    num_needed = max(1, demand.num_longest, 0 if mode is Mode.RESTART else demand.num_used)
    domain = min(fit, key=lambda d: fit[d])
    members = [f for f in footprints if f.domain == domain]
    numbers = (
        f"domain {_short(domain)!r} has {budgets[domain] / 2**20:.0f} MiB, of which weights take"
        f" {sum(f.weights_bytes for f in members) / 2**20:.0f} MiB and processes"
        f" {sum(f.overhead_bytes for f in members) / 2**20:.0f} MiB while the refactoring runs, and a KV block of its"
        f" {sum(f.num_layers for f in members)} layers {sum(f.num_layers for f in members) * block_bytes / 2**20:.2f}"
        " MiB"
    )
    if num_during < num_needed:
        return REFUSED, (
            f"Only {num_during} KV blocks would be left, but {num_needed} are needed ({demand.num_used} in use, up to"
            f" {demand.num_longest} for one sequence): {numbers}. Raise memory_budget, or try again under less load."
        )
    if num_during < demand.num_blocks:
        return FITS_AFTER_SHRINKING, f"KV shrinks from {demand.num_blocks} to {num_during} blocks meanwhile: {numbers}."
    return FITS, f"All {demand.num_blocks} KV blocks stay: {numbers}."


def _short(domain: str) -> str:
    """For people: Ray's node ids have 56 digits."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{48}\b", "\\1…", domain)
