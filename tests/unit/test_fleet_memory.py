"""How pipelines share the memory of domains: nothing is given twice, nothing is lost, nobody gets too little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.engine.fleet_memory import PipelineUse, make_room, take_room
from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.budget import DomainUse, KVBudget
from flexpipe_serve.pipeline.layout import make_layout, stage_prefix
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.refactor.feasibility import ModelWeights

MIB = 1 << 20
NUM_LAYERS = 6
WEIGHTS = ModelWeights(layers=(2 * MIB,) * NUM_LAYERS, embedding=MIB, head=MIB)
TOTAL = 1000 * MIB


def report(name: str, domain: str, *, weights: int = 0) -> StageReport:
    return StageReport(
        name=name,
        setup=SimpleNamespace(),  # type: ignore[arg-type]
        pid=1,
        node=domain,
        device="cpu",
        compute=domain,
        speed=1.0,
        domain=domain,
        domain_free_bytes=TOTAL,
        endpoint=SimpleNamespace(),  # type: ignore[arg-type]
        epoch=1,
        start=0,
        stop=0,
        weight_sizes=WeightSizes(embedding=weights),
        overhead_bytes=10 * MIB,
        kv_bytes=0,
        num_blocks=0,
        num_steps=0,
        busy_seconds=0.0,
    )


def use(number: int, domains: list[str], *, budgets: dict[str, int] | None = None, num_needed: int = 1) -> PipelineUse:
    """A pipeline with a stage in each of ``domains``."""
    bounds = range(1, len(domains))
    layout = make_layout(num_layers=NUM_LAYERS, boundaries=bounds, prefix=stage_prefix(number))
    held = 0 if budgets is None else 4 * MIB
    reports = {name: report(name, domain, weights=held) for name, domain in zip(layout.stages, domains, strict=True)}
    return PipelineUse(layout=layout, reports=reports, budgets=budgets or {}, num_needed=num_needed)


def budget(serving: list[PipelineUse], **fields: Any) -> KVBudget:
    def others(domain: str) -> DomainUse:
        return DomainUse(budget_bytes=sum(use.budgets.get(domain, 0) for use in serving))

    return KVBudget(budget_bytes=TOTAL, block_bytes=MIB, max_blocks=10**6, others=others, **fields)


places = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)


@given(st.lists(places, min_size=1, max_size=4), places)
def test_pipelines_that_join_and_go_share_each_domain(before: list[list[str]], joining: list[str]) -> None:
    serving: list[PipelineUse] = []
    for number, domains in enumerate([*before, joining]):
        new = use(number, domains)
        former = [dict(u.budgets) for u in serving]
        shares = make_room(serving, new, budget=budget(serving), weights=WEIGHTS)
        for share, budgets in zip(shares, former, strict=True):
            assert share.keys() == new.domains & budgets.keys()
            assert all(share[domain] <= budgets[domain] for domain in share)
        serving = [
            use(i, [r.domain for r in u.reports.values()], budgets={**u.budgets, **share})
            for i, (u, share) in enumerate(zip(serving, shares, strict=True))
        ]
        left = budget(serving)
        own = {r.domain: left.domain_bytes(r, free_bytes=TOTAL) for r in new.reports.values()}
        serving.append(use(number, domains, budgets=own))
        for domain in "abc":
            parts = [u.budgets[domain] for u in serving if domain in u.budgets]
            assert sum(parts) == (TOTAL if parts else 0)
            assert not parts or max(parts) - min(parts) <= len(parts)  # equal but for rounding
    *staying, gone = serving
    for u, share in zip(staying, take_room(staying, gone.budgets), strict=True):
        assert share.keys() == u.domains & gone.domains
        for domain, num_bytes in share.items():
            sharers = [other for other in staying if domain in other.domains]
            assert num_bytes == u.budgets[domain] + gone.budgets[domain] // len(sharers)


def test_who_would_have_too_little_for_its_sequences_refuses() -> None:
    # 500 MiB less 3 processes of 10 MiB and 12 MiB of weights, in blocks of 6 layers.
    serving = [use(0, ["a", "a", "a"], budgets={"a": TOTAL}, num_needed=77)]
    with pytest.raises(RefactorRefusedError, match=r"Only 76 KV blocks would be left to pipeline 0, but .* need 77"):
        make_room(serving, use(1, ["a"]), budget=budget(serving), weights=WEIGHTS)
    serving = [use(0, ["a", "a", "a"], budgets={"a": TOTAL}, num_needed=76)]
    assert make_room(serving, use(1, ["a"]), budget=budget(serving), weights=WEIGHTS) == [{"a": TOTAL // 2}]


def test_the_new_ones_weights_and_processes_count() -> None:
    serving = [use(0, ["a"], budgets={"a": 60 * MIB})]
    small = KVBudget(
        budget_bytes=60 * MIB, block_bytes=MIB, max_blocks=10, others=lambda domain: DomainUse(budget_bytes=60 * MIB)
    )
    # 30 MiB: one stage takes 10 and 14 of weights, and one block 6; two stages take 10 more.
    assert make_room(serving, use(1, ["a"]), budget=small, weights=WEIGHTS) == [{"a": 30 * MIB}]
    with pytest.raises(RefactorRefusedError, match="no room for the new pipeline in an equal share: memory budget of"):
        make_room(serving, use(1, ["a", "a"]), budget=small, weights=WEIGHTS)


def test_without_a_given_budget_a_share_of_what_is_free_and_held_is_divided() -> None:
    held = DomainUse(budget_bytes=300 * MIB, held_bytes=200 * MIB)
    given = KVBudget(budget_bytes=None, block_bytes=MIB, max_blocks=10, others=lambda domain: held)
    assert given.domain_bytes(report("stage-0", "a"), free_bytes=800 * MIB) == 300 * MIB
    assert given.domain_bytes(report("stage-0", "a"), free_bytes=100 * MIB) == 0
