"""Feasibility: no budget is overdrawn while both layouts are held, and the verdict says what the numbers say."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.refactor.feasibility import (
    FITS,
    FITS_AFTER_SHRINKING,
    REFUSED,
    KVDemand,
    ModelWeights,
    StageMemory,
    plan_refactoring,
)
from flexpipe_serve.refactor.moves import held_layers
from flexpipe_serve.refactor.record import Mode

NAMES = [f"stage-{i}" for i in range(6)]


@st.composite
def cases(draw):
    num_layers = draw(st.integers(2, 8))

    def layout():
        boundaries = sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=3)))
        names = draw(st.permutations(NAMES))
        return make_layout(num_layers=num_layers, boundaries=boundaries, stages=names[: len(boundaries) + 1])

    old, new = layout(), layout()
    weights = ModelWeights(
        layers=tuple(draw(st.lists(st.integers(1, 90), min_size=num_layers, max_size=num_layers))),
        embedding=draw(st.integers(0, 90)),
        head=draw(st.integers(0, 90)),
    )
    pool = draw(st.sets(st.sampled_from(NAMES), max_size=2))
    domains = {name: draw(st.sampled_from(["x", "y", name])) for name in NAMES}
    held = held_layers(old)
    stages = {
        name: StageMemory(
            domain=domains[name],
            kv_domain=domains[name],
            weights_bytes=weights.of(
                held.get(name, ()), is_first=name == old.stages[0], is_last=name == old.stages[-1]
            ),
            overhead_bytes=draw(st.integers(0, 50)),
        )
        for name in NAMES
        if name in old.stages or name in new.stages or name in pool
    }
    num_blocks = draw(st.integers(1, 40))
    num_used = draw(st.integers(0, num_blocks))
    return {
        "old": old,
        "new": new,
        "mode": draw(st.sampled_from(Mode)),
        "weights": weights,
        "stages": stages,
        "parked": draw(st.sets(st.sampled_from(old.stages), max_size=1)) - set(new.stages),
        "budgets": {m.domain: draw(st.integers(100, 1500)) for m in stages.values()},
        "block_bytes": draw(st.integers(1, 6)),
        "max_blocks": draw(st.integers(num_blocks, 60)),
        "demand": KVDemand(
            num_blocks=num_blocks,
            num_used=num_used,
            num_cached=draw(st.integers(0, num_blocks - num_used)),
            num_longest=draw(st.integers(0, num_blocks)),
        ),
        "may_grow": draw(st.booleans()),
    }


def bytes_by_domain(case, layouts, alive, num_blocks):
    """From the definition: weights of each stage, KV of each layer once a domain."""
    taken = dict.fromkeys(case["budgets"], 0)
    layers = {domain: set() for domain in taken}
    for name in alive:
        stage = case["stages"][name]
        held = held_layers(*layouts).get(name, frozenset())
        layers[stage.domain] |= held
        taken[stage.domain] += stage.overhead_bytes + case["weights"].of(
            held,
            is_first=any(layout.stages[0] == name for layout in layouts),
            is_last=any(layout.stages[-1] == name for layout in layouts),
        )
    return {d: taken[d] + num_blocks * case["block_bytes"] * len(layers[d]) for d in taken}, layers


def fits(case, layouts, alive, num_blocks):
    taken, layers = bytes_by_domain(case, layouts, alive, num_blocks)
    return all(taken[d] <= case["budgets"][d] for d in taken if layers[d])


@settings(max_examples=150)
@given(cases())
def test_the_plan_fits_every_budget_and_no_more_would(case):
    plan = plan_refactoring(**case)
    old, new, demand = case["old"], case["new"], case["demand"]
    after = [n for n in case["stages"] if n in new.stages or n in case["parked"] or n not in old.stages]
    is_restart = case["mode"] is Mode.RESTART
    layouts, alive = ((new,), after) if is_restart else ((old, new), case["stages"])
    ceiling = case["max_blocks"] if case["may_grow"] else demand.num_blocks
    assert plan.num_blocks_before == demand.num_blocks
    assert 0 <= plan.num_blocks_during <= plan.num_blocks_after <= ceiling
    if plan.verdict == REFUSED:
        needed = max(1, demand.num_longest, 0 if is_restart else demand.num_used)
        assert (old == new and not is_restart) or not fits(case, layouts, alive, needed)
        return
    assert old != new or is_restart
    assert plan.num_blocks_during >= max(1, demand.num_longest)
    assert is_restart or plan.num_blocks_during >= demand.num_used
    assert (plan.verdict == FITS) == (plan.num_blocks_during >= demand.num_blocks)
    assert fits(case, layouts, alive, plan.num_blocks_during)
    assert fits(case, (new,), after, plan.num_blocks_after)
    assert plan.num_blocks_after == ceiling or not fits(case, (new,), after, plan.num_blocks_after + 1)
    if not is_restart:
        assert plan.num_blocks_during == demand.num_blocks or not fits(case, layouts, alive, plan.num_blocks_during + 1)
    taken, _ = bytes_by_domain(case, layouts, alive, plan.num_blocks_during)
    for domain in plan.domains:
        assert domain.weights_bytes + domain.overhead_bytes + domain.kv_bytes == taken[domain.domain]


@given(cases())
def test_the_plan_says_what_moves(case):
    plan = plan_refactoring(**case)
    old, new, stages = case["old"], case["new"], case["stages"]
    before, union = held_layers(old), held_layers(old, new)
    assert set(plan.launched) == set(new.stages) - set(old.stages)
    assert set(plan.retired) == set(old.stages) - set(new.stages)
    for move in plan.moves:
        assert move.shared == (stages[move.source].domain == stages[move.target].domain)
    copied = sum(len(m.layers) for m in plan.moves if not m.shared) if case["mode"] is not Mode.RESTART else 0
    held = case["demand"].num_used + case["demand"].num_cached
    assert plan.kv_bytes == copied * held * case["block_bytes"]
    layers = sum(case["weights"].layers[i] for name in union for i in union[name] - before.get(name, frozenset()))
    ends = (new.stages[0] != old.stages[0]) * case["weights"].embedding
    ends += (new.stages[-1] != old.stages[-1]) * case["weights"].head
    assert plan.weights_bytes == layers + ends


def plan(**changes):
    """Two stages of four layers of 10 MiB in one domain of 200 MiB; a block of a layer has 1 MiB."""
    mib = 2**20
    old = make_layout(num_layers=4, boundaries=[2])
    case = {
        "old": old,
        "new": make_layout(num_layers=4, boundaries=[3]),
        "mode": Mode.LIVE,
        "weights": ModelWeights(layers=(10 * mib,) * 4, embedding=5 * mib, head=5 * mib, shared_ends=4 * mib),
        "stages": {
            name: StageMemory(domain="node", kv_domain="node", weights_bytes=25 * mib, overhead_bytes=15 * mib)
            for name in old.stages
        },
        "parked": (),
        "budgets": {"node": 200 * mib},
        "block_bytes": mib,
        "max_blocks": 100,
        "demand": KVDemand(num_blocks=30, num_used=10, num_cached=2, num_longest=20),
        "may_grow": True,
    }
    return plan_refactoring(**{**case, **changes})


def test_shared_layers_count_once_and_weights_twice():
    found = plan()
    # 200 - 2 * 25 - 2 * 15 leaves 120: 30 blocks of 4 layers; layer 2 is held twice meanwhile, which leaves 110.
    assert found.verdict == FITS_AFTER_SHRINKING
    assert (found.num_blocks_during, found.num_blocks_after) == (27, 30)
    assert found.kv_bytes == 0
    assert found.weights_bytes == 10 * 2**20
    assert found.reason == (
        "KV shrinks from 30 to 27 blocks meanwhile: domain 'node' has 200 MiB, of which weights take 60 MiB and"
        " processes 30 MiB while the refactoring runs, and a KV block of its 4 layers 4.00 MiB."
    )


def test_a_single_stage_may_hold_one_matrix_for_both_ends():
    found = plan(new=make_layout(num_layers=4, boundaries=[]))
    assert found.weights_bytes == (20 + 5 - 4) * 2**20


@pytest.mark.parametrize("demand", [{"num_used": 28}, {"num_longest": 28}])
def test_it_is_refused_with_the_numbers_that_decided(demand):
    base = KVDemand(num_blocks=30, num_used=10, num_cached=2, num_longest=20)
    found = plan(demand=replace(base, **demand))
    assert found.verdict == REFUSED
    assert "Only 27 KV blocks would be left, but 28 are needed" in found.reason
    assert plan(budgets={"node": 2**20}).verdict == REFUSED


def test_stages_of_one_gpu_share_its_memory_but_copy_their_kv() -> None:
    old, new = make_layout(num_layers=4, boundaries=[2]), make_layout(num_layers=4, boundaries=[1])
    stages = {
        name: StageMemory(domain="gpu", kv_domain=f"gpu/{name}", weights_bytes=0, overhead_bytes=0)
        for name in old.stages
    }
    plan = plan_refactoring(
        old=old,
        new=new,
        mode=Mode.LIVE,
        weights=ModelWeights(layers=(0,) * 4, embedding=0, head=0),
        stages=stages,
        parked=(),
        budgets={"gpu": 100},
        block_bytes=1,
        max_blocks=1000,
        demand=KVDemand(num_blocks=25, num_used=3, num_cached=2, num_longest=1),
        may_grow=True,
    )
    assert [(move.layers, move.shared) for move in plan.moves] == [((1,), False)]
    assert plan.num_blocks_during == 100 // 5, "layer 1 is there twice meanwhile"
    assert plan.kv_bytes == 5
