"""How pipelines share the memory of their domains: pure code.

Each has its own KV, and a budget of each domain that it has stages in. When one joins, the domains that it stands in
are divided equally; when one goes, the others take what it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexpipe_serve.errors import ConfigError, RefactorRefusedError
from flexpipe_serve.pipeline.budget import KVBudget, count_blocks
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.refactor.feasibility import ModelWeights


@dataclass(frozen=True, kw_only=True)
class PipelineUse:
    """A pipeline and its memory."""

    layout: Layout
    reports: Mapping[str, StageReport]
    """Of all its stages, by name."""
    budgets: Mapping[str, int]
    """Bytes by domain; none yet for one that joins."""
    num_needed: int
    """KV blocks without which its sequences would not go on as they are."""

    @property
    def domains(self) -> frozenset[str]:
        """Those that it has stages in."""
        return frozenset(report.domain for report in self.reports.values())


def make_room(
    serving: Sequence[PipelineUse], new: PipelineUse, *, budget: KVBudget, weights: ModelWeights
) -> list[dict[str, int]]:
    """New budgets of the pipelines that serve, so that one more fits in beside them.

    Args:
        new: its stages are launched, and empty.
        budget: of the new one; what others have counts as taken.

    Returns:
        For each of ``serving`` its budgets by domain, of the domains that it has in common with ``new``.

    Raises:
        RefactorRefusedError: one of them needs more KV than it would have, or the new one would have none.
    """
    free = {report.domain: report.domain_free_bytes for report in new.reports.values()}
    for report in new.reports.values():
        free[report.domain] += report.weights_bytes + report.overhead_bytes + report.kv_bytes
    shares: list[dict[str, int]] = [{} for _ in serving]
    budgets: dict[str, int] = {}
    for report in new.reports.values():
        domain = report.domain
        sharers = [i for i, use in enumerate(serving) if domain in use.domains and domain in use.budgets]
        left = budget.domain_bytes(report, free_bytes=free[domain])
        total = left + sum(serving[i].budgets[domain] for i in sharers)
        for i in sharers:
            shares[i][domain] = min(serving[i].budgets[domain], total // (len(sharers) + 1))
        budgets[domain] = total - sum(shares[i][domain] for i in sharers)
    for number, (use, share) in enumerate(zip(serving, shares, strict=True)):
        _check(use, {**use.budgets, **share}, budget, who=f"pipeline {number}")
    _check(_filled(serving, new, weights), budgets, budget, who="the new pipeline")
    return shares


def take_room(staying: Sequence[PipelineUse], budgets: Mapping[str, int]) -> list[dict[str, int]]:
    """New budgets of the pipelines that stay when one is gone: what it had, ``budgets``, goes in equal parts to those
    that have stages in the same domain. For each of ``staying`` by domain; empty where nothing changes."""
    shares: list[dict[str, int]] = [{} for _ in staying]
    for domain, num_bytes in budgets.items():
        sharers = [i for i, use in enumerate(staying) if domain in use.domains and domain in use.budgets]
        for i in sharers:
            shares[i][domain] = staying[i].budgets[domain] + num_bytes // len(sharers)
    return shares


def _filled(serving: Sequence[PipelineUse], new: PipelineUse, weights: ModelWeights) -> PipelineUse:
    """``new`` with its weights; a process that has run steps takes more than an empty one."""
    overhead = max(r.overhead_bytes for use in (*serving, new) for r in use.reports.values())
    first, last = new.layout.stages[0], new.layout.stages[-1]
    reports = {
        part.stage: replace(
            new.reports[part.stage],
            weight_sizes=weights.sizes(part.layers, is_first=part.stage == first, is_last=part.stage == last),
            overhead_bytes=overhead,
        )
        for part in new.layout.slices
    }
    return replace(new, reports=reports)


def _check(use: PipelineUse, budgets: Mapping[str, int], budget: KVBudget, *, who: str) -> None:
    try:
        num_blocks = count_blocks(use.layout, use.reports, budgets=budgets, budget=budget)
    except ConfigError as error:
        raise RefactorRefusedError(f"There is no room for {who} in an equal share: {error}") from None
    if num_blocks < use.num_needed:
        raise RefactorRefusedError(
            f"Only {num_blocks} KV blocks would be left to {who}, but its sequences need {use.num_needed}. Raise"
            " memory_budget, or try again under less load."
        )
